"""Names of the hardware behind torch's devices."""

from __future__ import annotations

from fastdml.devices import device_name


def test_device_name_of_this_processor():
    name = device_name("cpu")
    assert "thread" in name
    assert "\n" not in name
