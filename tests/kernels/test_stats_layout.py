"""The layout of the packed statistics: its order, and that every path keeps to it."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from fastdml_kernels import cpu as cpu_module
from fastdml_kernels.cpu import mutual_loss_cpu
from fastdml_kernels.cpu_rows import library
from fastdml_kernels.launch import launch
from fastdml_kernels.options import Options
from fastdml_kernels.stats_layout import stats_layout
from fastdml_kernels.tiles import Tile
from oracle import DEVICE

PACKAGE = Path(cpu_module.__file__).parent
K, N, C = 3, 7, 5
ORDERS = {
    1: "ce0 kl0 label_weight labelled entropy0 correct0 ensemble_correct pairwise_kl00",
    2: "ce0 ce1 kl0 kl1 label_weight labelled entropy0 entropy1 correct0 correct1 ensemble_correct "
    "pairwise_kl00 pairwise_kl01 pairwise_kl10 pairwise_kl11",
    5: "ce0 ce1 ce2 ce3 ce4 kl0 kl1 kl2 kl3 kl4 label_weight labelled "
    "entropy0 entropy1 entropy2 entropy3 entropy4 correct0 correct1 correct2 correct3 correct4 "
    "ensemble_correct pairwise_kl00 pairwise_kl01 pairwise_kl02 pairwise_kl03 pairwise_kl04 "
    "pairwise_kl10 pairwise_kl11 pairwise_kl12 pairwise_kl13 pairwise_kl14 "
    "pairwise_kl20 pairwise_kl21 pairwise_kl22 pairwise_kl23 pairwise_kl24 "
    "pairwise_kl30 pairwise_kl31 pairwise_kl32 pairwise_kl33 pairwise_kl34 "
    "pairwise_kl40 pairwise_kl41 pairwise_kl42 pairwise_kl43 pairwise_kl44",
}  # fmt: skip
NAMES = ("ce", "kl", "label_weight", "labelled", "entropy", "correct", "ensemble_correct",
         "pairwise_kl")  # fmt: skip


@pytest.mark.parametrize(("peers", "size"), [(1, 8), (2, 16), (5, 64)])
def test_the_order(peers, size):
    layout, order = stats_layout(peers), ORDERS[peers].split()
    assert (layout.used, layout.size) == (len(order), size)
    packed = torch.arange(size)
    for name in NAMES:
        values = layout.view(packed, name)
        assert values.data_ptr() == packed[getattr(layout, name) :].data_ptr()  # no copy
        for index in product(*map(range, values.shape)):
            assert order[values[index]] == name + "".join(map(str, index))
    assert order[layout.span("ce", "kl")] == order[: 2 * peers]
    assert order[layout.span("entropy", "pairwise_kl")] == order[2 * peers + 2 :]
    assert order[layout.span("correct")] == [f"correct{k}" for k in range(peers)]


def test_packing_is_the_way_back():
    layout, packed = stats_layout(2), torch.randn(16)
    packed[15] = 0.0  # the padding
    assert torch.equal(layout.pack({name: layout.view(packed, name) for name in NAMES}), packed)
    for name, values in layout.views(packed).items():
        assert torch.equal(values, layout.view(packed, name)), name
    assert torch.equal(layout.pack(layout.views(packed)), packed)


def in_torch(monkeypatch):
    monkeypatch.setattr(cpu_module, "rows_loss", lambda *_: None)
    return mutual_loss_cpu, "cpu", {}


def in_c(monkeypatch):
    if library() is None:
        pytest.skip("installed without a C compiler")
    return mutual_loss_cpu, "cpu", {}


def register(monkeypatch):
    return launch, DEVICE, {"regime": "register", "tile": Tile(4, 8, 4)}


def wide(monkeypatch):
    return launch, DEVICE, {"regime": "wide", "tile": Tile(1, 4, 4)}


@pytest.mark.parametrize("path", [in_torch, in_c, register, wide])
def test_each_path_puts_every_number_where_the_layout_says(path, monkeypatch):
    """Worked out here number by number; no two of them are the same."""
    compute, device, extra = path(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    z = [2 * torch.randn(N, C, generator=generator) for _ in range(K)]
    y = torch.randint(C, (N,), generator=generator)
    y[2] = -100
    known = y != -100
    p = torch.stack(z).double().softmax(2)[:, known]
    right = p.argmax(2) == y[known]
    together = p.mean(0).argmax(1) == y[known]
    pairs = [[(a * (a / b).log()).sum(1).mean().item() for b in p] for a in p]
    want = [
        *(-p[k][range(N - 1), y[known]].log().mean().item() for k in range(K)),
        *(sum(pairs[teacher][k] for teacher in range(K)) / (K - 1) for k in range(K)),
        N - 1, N - 1,
        *(-(q * q.log()).sum(1).mean().item() for q in p),
        *right.sum(1).tolist(),
        together.sum().item(),
        *(pairs[teacher][k] for teacher in range(K) for k in range(K)),
    ]  # fmt: skip
    _, packed = compute(
        [x.to(device) for x in z], y.to(device), Options(), want_stats=True, **extra
    )
    assert packed.shape == (stats_layout(K).size,)
    found = packed[: len(want)].double().cpu()
    torch.testing.assert_close(found, torch.tensor(want).double(), rtol=2e-5, atol=2e-6)


def test_nobody_else_counts_positions():
    """No offset such as 2 * K + 1 or 4 * K + 3 in any file of the two packages."""
    offset = re.compile(r"[234] ?\* ?K ?\+ ?[123]\b")
    library = Path(__file__).parents[2] / "fastdml"
    sources = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*.[ch]"), *library.rglob("*.py")]
    assert {"cpu_rows.c", "launch.py", "meters.py", "mutual_stats.py"} <= {p.name for p in sources}
    assert [path.name for path in sources if offset.search(path.read_text())] == []
