"""First launches of a signature: by several threads, where loading fails, on other devices."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from fastdml_kernels import Options
from on_stand_in import scenarios_of
from test_launch_plan import RESULTS, labels_of, loss_call, no_plans, rows, shown

from fastdml import MutualLoss, mutual_loss


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_first_launches")


@contextmanager
def loading(change: Callable):
    """Kernels are loaded by change(load, *arguments)."""
    from triton.runtime import driver

    utils = driver.active.utils
    load = utils.load_binary
    utils.load_binary = lambda *arguments: change(load, *arguments)
    try:
        yield
    finally:
        utils.load_binary = load


def first_calls_of_threads(gpu):
    """Threads call while another thread's first call of the signature loads the kernel."""
    y, found, under_way = labels_of(12), [], threading.Event()
    calls = [loss_call(rows(2, 12, 21), y) for _ in range(5)]

    def slow(load, *arguments):
        under_way.set()
        time.sleep(0.2)
        return load(*arguments)

    def run(call):
        try:
            call()
        except Exception as error:
            found.append(repr(error))

    with loading(slow):
        threads = [threading.Thread(target=run, args=(call,)) for call in calls]
        threads[0].start()
        under_way.wait(60)
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
    return [found, len(gpu.launches())]


def test_threads_that_call_while_the_kernel_is_loaded(seen):
    assert seen(first_calls_of_threads) == [[], 5]


def loaded_later(gpu):
    """Kernels that the driver could not load at the first call: the device's memory was full."""
    from fastdml_kernels.scale_grads import launch_scale

    def full(load, *arguments):
        raise RuntimeError("out of memory")

    z, was = rows(2, 12, 22), []
    for call in (loss_call(z, labels_of(12)), lambda: launch_scale(z, torch.ones(2).double())):
        said = []
        with loading(full):
            for _ in range(2):
                try:
                    call()
                except RuntimeError as error:
                    said.append(str(error))
        gpu.clear()
        call()
        was.append([said, len(gpu.launches())])
    return was


def test_a_kernel_that_could_not_be_loaded_is_loaded_by_a_later_call(seen):
    assert seen(loaded_later) == [[["out of memory"] * 2, 1]] * 2


def of_numpy(gpu):
    """Options as numpy's numbers, of the function and of the module."""
    import numpy as np
    from fastdml_kernels import launch

    z, y, was = rows(2, 12, 23), labels_of(12), []
    numpy = {
        "label_smoothing": np.float32(0.5), "ignore_index": np.int64(3), "symmetric": np.True_,
        "detach_targets": np.True_, "mimic_ignored": np.False_, "return_stats": np.True_,
    }  # fmt: skip
    own = {name: value.item() for name, value in numpy.items()}
    for options in (own, numpy):
        for call in (lambda o: mutual_loss(z, y, **o), lambda o: MutualLoss(**o)(z, y)):
            gpu.clear()
            with no_plans(launch._PLANS):
                call(options)
            (each,) = gpu.launches()
            was.append(shown(each, RESULTS))
    return was


def test_numbers_of_numpy_are_pythons_numbers(seen):
    first, *rest = seen(of_numpy)
    assert rest == [first] * 3


def another_backend(gpu):
    """A device of which Triton's backend is not known here, nor torch's properties complete."""
    from fastdml_kernels import launch, occupancy

    kept = launch.compiled_for, torch.cuda.get_device_properties
    caches = occupancy.multiprocessors, occupancy.limits_of
    launch.compiled_for = lambda *arguments: None
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=5)
    try:
        with no_plans(launch._PLANS):
            for cache in caches:
                cache.cache_clear()
            loss_call(rows(2, 12_000, 10), labels_of(12_000), Options(reduction="sum"))()
    finally:
        launch.compiled_for, torch.cuda.get_device_properties = kept
        for cache in caches:
            cache.cache_clear()
    return [list(each.grid) for each in gpu.launches()]


def test_another_backend_needs_the_number_of_multiprocessors_alone(seen):
    assert seen(another_backend) == [[40, 1, 1]]


def counters_held(gpu):
    """Whether a launch's counter is there until the launch is made."""
    from fastdml_kernels import launch

    call, made, was = loss_call(rows(2, 12, 10), labels_of(12)), [], []
    call()

    def take(stream=None):
        counter = torch.zeros(1, dtype=torch.int32)
        made.append(weakref.ref(counter))
        return counter

    def example():
        return torch.zeros(1, dtype=torch.int32)

    def seen_by(direct):
        return lambda *arguments: was.append(made[-1]() is not None) or direct(*arguments)

    known, counters_of = launch._PLANS.known, launch.counters_of
    launch.counters_of = lambda device: SimpleNamespace(take=take, example=example)
    try:
        with no_plans(launch._PLANS):
            call()
            for signature, plan in known.items():
                known[signature] = plan._replace(direct=seen_by(plan.direct))
            call()
    finally:
        launch.counters_of = counters_of
    return was


def test_a_counter_of_the_launchs_own_is_held_until_the_launch(seen):
    assert seen(counters_held) == [True]


SCENARIOS = [first_calls_of_threads, loaded_later, of_numpy, another_backend, counters_held]
