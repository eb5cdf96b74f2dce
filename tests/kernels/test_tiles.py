"""The table of tiles: a tile for every shape, an architecture's own before the default, and a file
that is broken never silently used."""

from __future__ import annotations

import json
import math

import pytest
import triton
from fastdml_kernels import tiles
from fastdml_kernels.tiles import TABLE, Tile, read_table, register_tile, wide_tile
from hypothesis import given
from hypothesis import strategies as st

SHAPES = {"K": st.integers(1, 40), "C": st.integers(1, 300_000), "pairs": st.booleans()}
NUMBERS = ["rows", "block_c", "warps", "stages", "back_stages", "programs"]


def written(path, given):
    file = path / "tiles.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    return file


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Makes lists by architecture the package's table, beside its default."""

    def use(**lists) -> None:
        default = json.loads(TABLE.read_text(encoding="utf-8"))["default"]
        found = read_table(written(tmp_path, {"default": default, **lists}))
        monkeypatch.setattr(tiles, "table", lambda: found)

    return use


@given(**SHAPES)
def test_every_shape_has_a_wide_tile_that_is_no_wider_than_its_rows(K, C, pairs):
    tile = wide_tile(K, C, pairs)
    assert tile.rows == 1
    assert tile.block_c == triton.next_power_of_2(tile.block_c) <= triton.next_power_of_2(max(C, 2))
    assert tile.warps == 1 or 32 * tile.warps <= tile.block_c  # no thread without a class
    blocks = math.ceil(C / tile.block_c)
    assert 1 <= tile.stages <= blocks  # nothing is loaded ahead that the row does not have
    assert 1 <= tile.back_stages <= blocks


@given(K=st.integers(1, 40), C=st.integers(1, 10_000))
def test_rows_that_registers_hold_have_a_register_tile(K, C):
    tile = register_tile(K, C)
    block_c = triton.next_power_of_2(max(C, 2))
    assert (tile is not None) == (K * block_c <= tiles.most_logits())
    assert tile is None or tile.block_c == block_c


def test_an_architectures_own_tiles_come_first_and_the_default_fills_in(use):
    use(sm_90=[
        {"kernel": "wide", "peers": [2, 2], "classes": [65_537, 131_072], "pairs": False, "size": 2,
         "block_c": 4096, "warps": 16, "stages": 4, "back_stages": 2, "programs": 2},
        {"kernel": "register", "logits": [1, 64], "rows": 32, "warps": 8},
    ])  # fmt: skip
    assert wide_tile(2, 128_256, False, 2, "sm_90") == Tile(1, 4096, 16, 4, 2, 2)
    for other in ((2, 128_256, True, 2, "sm_90"), (2, 128_256, False, 4, "sm_90"),
                  (3, 128_256, False, 2, "sm_90"), (2, 65_536, False, 2, "sm_90"),
                  (2, 128_256, False, 2, "sm_100"), (2, 128_256, False, 2, None)):  # fmt: skip
        assert wide_tile(*other) == wide_tile(*other[:3])
    assert register_tile(2, 10, "sm_90") == Tile(32, 16, 8)
    assert register_tile(2, 10) == register_tile(2, 10, "sm_100") == Tile(16, 16, 4)
    assert register_tile(2, 100, "sm_90") == register_tile(2, 100)


def test_programs_of_a_tile_or_what_the_cache_allows():
    plain = Tile(1, 2048, 8)
    assert tiles.programs_per_sm("register", plain, 400) == tiles.PROGRAMS_PER_SM
    assert tiles.programs_per_sm("wide", plain, 2 * 2 * 32_768) == 2
    assert tiles.programs_per_sm("wide", plain, 2 * 2 * 128_256) == 1
    assert tiles.programs_per_sm("wide", plain, 2) == tiles.PROGRAMS_PER_SM
    set_by_table = Tile(1, 2048, 8, programs=3)
    assert tiles.programs_per_sm("wide", set_by_table, 2 * 2 * 128_256) == 3
    assert tiles.programs_per_sm("wide", set_by_table, 2 * 2 * 128_256, resident=2) == 2
    assert tiles.programs_per_sm("register", plain, 400, resident=12) == 12
    assert tiles.programs_per_sm("wide", plain, 2, resident=5) == 5
    assert tiles.programs_per_sm("wide", plain, 2, resident=16) == tiles.PROGRAMS_PER_SM
    assert tiles.programs_per_sm("register", plain, 400, resident=0) == 1


WIDE = {"kernel": "wide", "block_c": 2048, "warps": 8}
BROKEN = {
    "no kernel": {"block_c": 2048, "warps": 8},
    "unknown kernel": WIDE | {"kernel": "narrow"},
    "missing number": {"kernel": "wide", "block_c": 2048},
    "unknown name": WIDE | {"stage": 3},
    "register rows have no blocks": {"kernel": "register", "rows": 4, "warps": 4, "block_c": 128},
    "no power of two": WIDE | {"block_c": 2000},
    "too many warps": WIDE | {"warps": 64},
    "a number in words": WIDE | {"stages": "3"},
    "a truth for a number": WIDE | {"stages": True},
    "no stage": WIDE | {"back_stages": 0},
    "half a program": WIDE | {"programs": 0.5},
    "from alone": WIDE | {"peers": [2]},
    "from beyond up to": WIDE | {"classes": [10, 5]},
    "a number for pairs": WIDE | {"pairs": 1},
    "bytes of no dtype": WIDE | {"size": 3},
    "no object": [1, 2],
}


@pytest.mark.parametrize("entry", BROKEN.values(), ids=BROKEN)
def test_a_broken_entry_is_named_in_one_line(tmp_path, entry):
    lists = json.loads(TABLE.read_text(encoding="utf-8")) | {"sm_90": [WIDE, entry]}
    file = written(tmp_path, lists)
    with pytest.raises(ValueError, match="sm_90, entry 1: ") as raised:
        read_table(file)
    assert str(file) in str(raised.value)
    assert "Restore the file" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"default": {}}', '{"sm_90": []}', "\xff"])
def test_a_broken_file_is_refused(tmp_path, text):
    file = tmp_path / "tiles.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="cannot be used"):
        read_table(file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be used"):
        read_table(tmp_path / "tiles.json")


@pytest.mark.parametrize("spans", [[[2, None]], [[1, 4], [6, None]], [[1, 16]]])
def test_a_default_without_a_tile_for_some_number_of_peers_is_refused(tmp_path, spans):
    with pytest.raises(ValueError, match="no tile for wide rows of"):
        read_table(written(tmp_path, {"default": [WIDE | {"peers": span} for span in spans]}))


ANYTHING = (
    st.sampled_from([1, 2, 8, 256, None, True, "8", {}]) | st.integers() | st.floats()
    | st.lists(st.none() | st.integers(-1, 70_000), max_size=3)
)  # fmt: skip
NAMES = st.sampled_from([*NUMBERS, "logits", "peers", "classes", "pairs", "size", "other"])


@given(base=st.sampled_from([WIDE, {"kernel": "register", "rows": 4, "warps": 4}]), name=NAMES,
       value=ANYTHING)  # fmt: skip
def test_any_value_makes_a_tile_that_kernels_can_be_compiled_with_or_is_refused(base, name, value):
    entry = base | {name: value}
    try:
        tile = tiles._entry(entry).tile
    except ValueError:
        return
    for number in entry.keys() & set(NUMBERS):
        assert type(getattr(tile, number)) is int
        assert getattr(tile, number) == entry[number] >= 1
    assert tile.rows & (tile.rows - 1) == tile.warps & (tile.warps - 1) == 0
    assert tile.block_c & (tile.block_c - 1) == 0
