"""A call that is not in order is refused in the same words whatever was called before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdml import loss_checks, mutual_loss

N, C = 6, 5


def peers(K=2, N=N, C=C, **like):
    return [torch.randn(N, C).to(**like) for _ in range(K)]


def labels_of(N=N, **like):
    return torch.randint(C, (N,)).to(**like)


def in_order():
    """Calls whose signatures are near those of the faults below."""
    ones = torch.ones(2, 2)
    for logits in (peers(), torch.randn(2, N, C), peers(3), [peers()[0].bfloat16(), peers()[1]]):
        for rest in (
            {}, {"temperature": 2, "ce_weight": 0, "kl_weight": 1}, {"temperature": torch.ones(())},
            {"class_weight": torch.ones(C)}, {"ce_weight": torch.ones(()), "ignore_index": 2},
            {"ignore_index": np.int64(3)},
        ):  # fmt: skip
            mutual_loss(logits, labels_of(), **rest)
            mutual_loss(logits, labels_of().int(), **rest)
    mutual_loss(peers(), labels_of(), peer_weights=ones)
    mutual_loss(peers(N=3), labels_of(3))
    mutual_loss(peers(N=0), labels_of(0))


class Own(torch.Tensor):
    pass


grad = {"requires_grad": True}
FAULTS = {
    "no peers": ([], labels_of(), {}),
    "no classes": (peers(C=0), labels_of(), {}),
    "two dimensions": (torch.randn(N, C), labels_of(), {}),
    "one dimension each": ([torch.randn(N)], labels_of(), {}),
    "one dimension each, and one label": ([torch.randn(C)] * 2, labels_of()[0], {}),
    "three dimensions each": ([torch.randn(2, N, C)], labels_of(), {}),
    "no tensor": ([torch.randn(N, C), "a"], labels_of(), {}),
    "a tensor and a list": ([torch.randn(N, C), [1.0]], labels_of(), {}),
    "other rows": ([*peers(1), *peers(1, N=7)], labels_of(), {}),
    "other classes": ([*peers(1), *peers(1, C=7)], labels_of(), {}),
    "whole numbers": (peers(dtype=torch.int64), labels_of(), {}),
    "one of whole numbers": ([*peers(1), *peers(1, dtype=torch.int32)], labels_of(), {}),
    "another device": (peers(device="meta"), labels_of(device="meta"), {}),
    "one on another device": ([*peers(1), *peers(1, device="meta")], labels_of(), {}),
    "labels on another device": (peers(), labels_of(device="meta"), {}),
    "sparse": ([*peers(1), peers(1)[0].to_sparse()], labels_of(), {}),
    "sparse labels": (peers(), labels_of().to_sparse(), {}),
    "nested": ([torch.nested.nested_tensor(peers())], labels_of(), {}),
    "more labels": (peers(), labels_of(7), {}),
    "labels of two dimensions": (peers(), labels_of()[:, None], {}),
    "float labels": (peers(), labels_of().float(), {}),
    "a list of labels": (peers(), [0] * N, {}),
    "class weights too many": (peers(), labels_of(), {"class_weight": torch.ones(C + 1)}),
    "class weights elsewhere": (peers(), labels_of(), {"class_weight": torch.ones(C).to("meta")}),
    "class weights with gradient": (peers(), labels_of(), {"class_weight": torch.ones(C, **grad)}),
    "a number for class weights": (peers(), labels_of(), {"class_weight": 1.0}),
    "sparse class weights": (peers(), labels_of(), {"class_weight": torch.ones(C).to_sparse()}),
    "peer weights of three": (peers(), labels_of(), {"peer_weights": torch.ones(3, 3)}),
    "a number for peer weights": (peers(), labels_of(), {"peer_weights": 1}),
    "ignore_index": (peers(), labels_of(), {"ignore_index": 2.0}),
    "ignore_index of 64 bits": (peers(), labels_of(), {"ignore_index": 2**63}),
    "a weight beyond floats": (peers(), labels_of(), {"ce_weight": 10**400}),
}  # fmt: skip
for _name in ("temperature", "ce_weight", "kl_weight"):
    for _value in (
        -1.0, -1, float("nan"), float("inf"), None, "1", torch.ones(1), torch.ones((), **grad),
        torch.ones(()).to("meta"),
    ):  # fmt: skip
        FAULTS[f"{_name} = {_value!r}"] = (peers(), labels_of(), {_name: _value})
for _value in (0, 0.0, 1e-19, 1e19):
    FAULTS[f"temperature = {_value}"] = (peers(), labels_of(), {"temperature": _value})


def said(logits, labels, options):
    with pytest.raises((TypeError, ValueError)) as raised:
        mutual_loss(logits, labels, **options)
    return type(raised.value), str(raised.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_after_any_calls_in_order(fault):
    loss_checks._passed.clear()
    alone = said(*FAULTS[fault])
    assert not loss_checks._passed
    in_order()
    assert loss_checks._passed
    assert said(*FAULTS[fault]) == alone
    assert said(*FAULTS[fault]) == alone


def test_other_numbers_of_rows_are_the_same_signature():
    loss_checks._passed.clear()
    for rows in (4, 5, 9, 0):
        mutual_loss(peers(N=rows), labels_of(rows))
        mutual_loss(peers(N=rows), labels_of(rows), temperature=1.0 + rows)
    assert len(loss_checks._passed) == 1


def test_signatures_are_a_limited_number(monkeypatch):
    monkeypatch.setattr(loss_checks, "MOST", 3)
    for classes in range(2, 12):
        mutual_loss(peers(C=classes), labels_of() % classes)
        assert len(loss_checks._passed) <= 3


def test_tracers_leave_no_signature():
    """Their sizes may be tensors or symbols."""
    loss_checks._passed.clear()
    logits, labels = peers(), labels_of()
    with pytest.warns(torch.jit.TracerWarning):
        torch.jit.trace(lambda *z: mutual_loss(z, labels).sum(), tuple(logits), check_trace=False)
    torch.compile(lambda *z: mutual_loss(z, labels).sum(), backend="eager")(*logits)
    assert not loss_checks._passed


def test_subclasses_are_looked_at_each_time():
    loss_checks._passed.clear()
    mutual_loss([z.as_subclass(Own) for z in peers()], labels_of())
    assert not loss_checks._passed
