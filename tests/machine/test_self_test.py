"""The self-test of the loss: right here by every route, and it notices a wrong one."""

from __future__ import annotations

import _ctypes
import math
import shutil

import pytest
import torch
from fastdml_kernels import cpu, cpu_rows

from fastdml.machine import self_test


def test_every_route_of_this_machine_is_right():
    first, *routes = self_test.rows()
    assert first["native"] in ("built", "absent")
    assert {row["route"] for row in routes} >= {"torch"}
    assert all(row["right"] for row in routes), routes
    for row in routes:  # rounding shows: nothing is compared with itself
        assert all(0 < gradients < 1e-2 for _, gradients in row["errors"].values()), row


def test_a_wrong_gradient_is_noticed(monkeypatch):
    real = cpu._Problem._write_grads

    def wrong(problem, *arguments) -> None:
        real(problem, *arguments)
        problem.grads[0][3, 5] += 1e-4

    monkeypatch.setattr(cpu._Problem, "_write_grads", wrong)
    row = self_test.compare("torch", self_test.TORCH, "cpu")
    assert not row["right"]
    assert row["errors"]["float64"][0] < 1e-10  # the losses are right
    assert row["errors"]["float64"][1] > 1e-6


def test_not_a_number_is_no_small_error():
    assert self_test.relative_error([torch.tensor(math.nan)], [torch.tensor(1.0)]) == math.inf


def test_native_code_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "_cpu_rows.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(cpu_rows, "__file__", str(tmp_path / "cpu_rows.py"))
    monkeypatch.setattr(cpu_rows, "library", lambda: None)
    assert "_cpu_rows.abi3.so" in self_test.native_code()
    (tmp_path / "_cpu_rows.abi3.so").unlink()
    assert self_test.native_code() == "absent"


def test_native_code_of_an_earlier_version_is_not_called(monkeypatch, tmp_path):
    shutil.copy(_ctypes.__file__, tmp_path / "_cpu_rows.abi3.so")  # a library without the function
    monkeypatch.setattr(cpu_rows, "__file__", str(tmp_path / "cpu_rows.py"))
    assert cpu_rows.library.__wrapped__() is None
    monkeypatch.setattr(cpu_rows, "library", lambda: None)
    assert self_test.native_code() == "_cpu_rows.abi3.so was built from other code"


@pytest.mark.gpu
def test_the_kernels_of_this_device_are_right():
    rows = {row.get("route"): row for row in self_test.rows()}
    assert rows["Triton"]["right"], rows["Triton"]
    assert set(rows["Triton"]["errors"]) == {"float32", "bfloat16"}
