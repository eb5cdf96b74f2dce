"""The settings of a mesh: what can be read, and what is refused in a line."""

from __future__ import annotations

import pytest

from fastdml.errors import InputError
from fastdml.train import TrainConfig


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("peer=2,data=2", (2, 2)),
        ("data=3, peer=4", (4, 3)),
        ("peer=2", (2, 1)),
        ("data=16", (1, 16)),
        ("", None),
        ("auto", None),
    ],
)
def test_a_mesh_is_read(text, sizes):
    assert TrainConfig(mesh=text, batch_size=48).mesh_sizes == sizes


def test_sizes_of_a_mesh_are_written_as_they_are_read():
    sizes = TrainConfig(mesh="data=2").mesh_sizes
    assert str(sizes) == "peer=1,data=2"
    assert sizes.processes == 2
    assert TrainConfig(mesh=str(sizes)).mesh_sizes == sizes


@pytest.mark.parametrize(
    "text",
    ["2x2", "peer=0", "peer=-1", "peer=two", "peer=2,peer=2", "rows=2", "peer=2,", "peer=2.0", " "],
)
def test_a_malformed_mesh_is_refused(text):
    with pytest.raises(InputError, match="mesh must be auto or two sizes of 1 or more"):
        TrainConfig(mesh=text)


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("timeout", 0.0, "above 0"),
        ("timeout", float("inf"), "a finite number"),
        ("max_restarts", -1, "0 or more"),
        ("exchange_every", 0, "1 or more"),
        ("keep_checkpoints", 0, "1 or more"),
        ("exchange", "features", "one of logits, weights"),
    ],
)
def test_values_out_of_range_are_refused(name, value, meaning):
    with pytest.raises(InputError, match=f"{name} must be {meaning}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("mesh", ["auto", "peer=1,data=1", "peer=2"])
def test_a_mesh_does_not_go_with_sequential_updates(mesh):
    with pytest.raises(InputError, match=f"mesh {mesh} needs update simultaneous"):
        TrainConfig(mesh=mesh, update="sequential")


def test_a_columns_images_split_into_the_parts():
    TrainConfig(mesh="data=3", batch_size=64)  # uneven columns are fine where nothing is split
    TrainConfig(mesh="peer=4,data=2", batch_size=64, accumulate=16)
    with pytest.raises(InputError, match=r"is 21 images a column.*batch_size to a multiple of 6"):
        TrainConfig(mesh="data=3", batch_size=64, accumulate=2)
