"""The tuner without a GPU: a stand-in compiles and measures in no time, by a clock of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fastdml_kernels import tiles
from fastdml_kernels.tiles import TABLE, read_table

from bench import tune
from bench.tune import Shape, candidates, in_use

SHAPES = (Shape(2, 128_256), Shape(4, 1000, regime="register"))
ARCH = "sm_90"


class Gauge:
    """Every tile takes `usual` seconds but those in `fast`; compiling and comparing cost `cost`."""

    def __init__(self, fast=(), usual=1.0, cost=0.0) -> None:
        self.fast, self.usual, self.cost, self.now = dict(fast), usual, cost, 0.0
        self.spilling, self.wrong, self.compared, self.timed = set(), set(), [], []

    def clock(self) -> float:
        return self.now

    def reports(self, shape, tiles, seconds):
        self.now += self.cost
        report = {"registers": 96, "spills": 0, "stack_bytes": 0, "shared_bytes": 512}
        bound = SimpleNamespace(resident=2)
        return [
            SimpleNamespace(**report | {"spills": 4 * (tile in self.spilling)}, bound=bound)
            for tile in tiles
        ]

    def differs(self, shape, tile, used):
        self.now += self.cost
        self.compared.append(tile)
        return "other results" if tile in self.wrong else None

    def times(self, shape, tiles, seconds):
        self.now += seconds
        self.timed += tiles
        return {tile: self.fast.get(tile, self.usual) for tile in tiles}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tiles.json"
    file.write_bytes(TABLE.read_bytes())
    return file


def run(gauge, path, shapes=SHAPES, seconds=100.0):
    return list(tune.tune(shapes, ARCH, gauge, path, seconds, gauge.clock))


def tiles_of(shape):
    used, *others = candidates(shape, in_use(shape, ARCH))
    return used, others


def found(path, monkeypatch, shape):
    """What a launch takes by the written file."""
    monkeypatch.setattr(tiles, "table", lambda: read_table(path))
    return in_use(shape, ARCH)


@pytest.mark.parametrize("shape", [*tune.SHAPES, Shape(3, 21_841, "fp32")], ids=str)
def test_candidates_are_tiles_that_the_table_can_hold(path, shape):
    used, others = tiles_of(shape)
    assert len(others) >= 5
    assert len({used, *others}) == len(others) + 1
    for tile in others:
        tune.write_entry(path, ARCH, tune.entry(shape, tile))  # reads it again
    assert len(read_table(path)[ARCH]) == 1  # the same shapes: one entry, replaced


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fastest_tile_is_written_and_launched(path, monkeypatch, shape):
    _, others = tiles_of(shape)
    fast = next(tile for tile in others if (tile.programs or 1) <= 2)
    (_, best, rows), = run(Gauge({fast: 0.9, others[-1]: 0.95}), path, [shape])  # fmt: skip
    assert best == fast
    assert [row.note for row in rows if row.tile == fast] == ["best"]
    launched = found(path, monkeypatch, shape)
    assert (launched.block_c, launched.warps, launched.stages, launched.back_stages) == (
        fast.block_c, fast.warps, fast.stages, fast.back_stages)  # fmt: skip
    assert read_table(path)["default"] == read_table(TABLE)["default"]


def test_noise_replaces_nothing(path):
    used, others = tiles_of(SHAPES[0])
    (_, best, _), = run(Gauge({others[0]: 1 - tune.MARGIN / 2}), path, SHAPES[:1])  # fmt: skip
    assert best == used


def test_what_spills_does_not_fit_or_differs_is_neither_timed_nor_written(path):
    used, others = tiles_of(SHAPES[0])
    gauge = Gauge(dict.fromkeys(others, 0.5))
    small = [tile for tile in others if tile.programs <= 2]
    gauge.spilling, gauge.wrong = set(small[::2]), set(small[1::2])
    (_, best, rows), = run(gauge, path, SHAPES[:1])  # fmt: skip
    assert best == used
    assert gauge.timed == [used]
    assert not gauge.spilling & set(gauge.compared)
    notes = {row.tile: row.note for row in rows}
    assert all(notes[tile] == "spills (4)" for tile in gauge.spilling)
    assert all(notes[tile] == "other results" for tile in gauge.wrong)
    assert all(notes[tile] == "2 programs fit" for tile in others if tile.programs > 2)


def test_a_tile_in_use_that_does_not_run_writes_nothing(path):
    used, _ = tiles_of(SHAPES[0])
    before = path.read_bytes()
    gauge = Gauge()
    gauge.wrong = {used}
    (_, best, _), = run(gauge, path, SHAPES[:1])  # fmt: skip
    assert best is None
    assert gauge.timed == []
    assert path.read_bytes() == before


def test_the_time_is_kept_and_shared(path):
    gauge = Gauge()
    assert len(run(gauge, path, tune.SHAPES, seconds=80.0)) == len(tune.SHAPES)
    assert gauge.now == pytest.approx(80.0)


def test_slow_compilation_leaves_candidates_out_not_time(path):
    gauge = Gauge(cost=3.0)
    (_, best, rows), = run(gauge, path, SHAPES[:1], seconds=20.0)  # fmt: skip
    assert best is not None
    assert gauge.now == pytest.approx(20.0)
    assert rows[-1].note == tune.NO_TIME


def test_a_run_that_stops_keeps_what_it_has_and_the_next_goes_on(path):
    runs = tune.tune(SHAPES, ARCH, Gauge(), path, 100.0, lambda: 0.0)
    next(runs)
    runs.close()
    assert tune.unmeasured(SHAPES, path, ARCH) == [SHAPES[1]]
    assert tune.unmeasured(SHAPES, path, "sm_100") == list(SHAPES)
    assert run(Gauge(), path, seconds=tune.LEAST / 2) == []  # no time: nothing is begun


def test_the_file_is_complete_at_every_moment(path, monkeypatch):
    before = path.read_bytes()

    def breaks(draft, target):
        assert read_table(draft)[ARCH]
        assert path.read_bytes() == before
        raise OSError("disk full")

    monkeypatch.setattr(tune.os, "replace", breaks)
    with pytest.raises(OSError, match="disk full"):
        run(Gauge(), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_yet_to_be_written_begins_with_the_packages_tiles(tmp_path):
    path = tmp_path / "new.json"
    run(Gauge(), path, SHAPES[:1])
    assert read_table(path)["default"] == read_table(TABLE)["default"]
    assert len(read_table(path)[ARCH]) == 1


def test_the_written_file_has_an_entry_a_line(path):
    run(Gauge(), path)
    text = path.read_text(encoding="utf-8")
    assert text.count("\n    {") == sum(len(entries) for entries in json.loads(text).values())


def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == tune.NO_GPU


def test_a_broken_table_is_one_line(path, capsys):
    path.write_text("{")
    with pytest.raises(SystemExit):
        tune.main(["--table", str(path), "--dry-run", "sm_90"])
    error = capsys.readouterr().err
    assert f"error: tiles {path} cannot be used" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("text", ["2", "2x", "0x10", "2x3x4", "axb"])
def test_a_shape_that_is_none_is_refused(capsys, text):
    with pytest.raises(SystemExit):
        tune.main(["--shapes", text])
    assert f"'{text}' is no shape" in capsys.readouterr().err


def test_a_dry_run_compiles_and_lists_the_candidates(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = subprocess.run(
        [sys.executable, "-m", "bench.tune", "--dry-run", ARCH, "--shapes", "2x32768"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0].startswith("wide 2 x 32768 bf16")
    listed = [line.split() for line in lines[2:]]
    assert len(listed) == len(candidates(Shape(2, 32_768), in_use(Shape(2, 32_768), ARCH)))
    used = dict(zip(lines[1].split(), listed[0], strict=False))
    assert used["block"] == "2048"
    assert used["spills"] == "0"
    assert 32 < int(used["regs"]) <= 255
