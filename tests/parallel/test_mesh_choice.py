"""`--mesh auto`: the sizes that suit the peers' measured times, decided on rank 0 for all."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from fastdml.parallel import make_mesh
from fastdml.train import ranks as train_ranks
from fastdml.train import run
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.sources import load_config
from fastdml.train.mesh_choice import remember, sizes_of

PEERS = ("resnet8", "mobilenet")


def auto(folder: str, costs: dict[str, float]) -> tuple:
    """A run whose peers take so many seconds a batch, by rank 0's clock."""
    seen = []

    def seconds(peers, images, amp):
        seen.append(len(images))
        return [costs[type(peers[0]).__name__]]

    train_ranks.peer_seconds = seconds
    config = TrainConfig(
        data="digits", peers=PEERS, mesh="auto", subset=64, batch_size=32, epochs=1, folder=folder,
        device="cpu", amp="off", tensorboard=False, figures=[],
    )  # fmt: skip
    result = run(config)
    return result.config.mesh, len(seen)


@pytest.mark.parametrize(
    ("costs", "mesh"),
    [
        pytest.param((1.0, 1.05), "peer=2,data=1", marks=pytest.mark.slow),
        ((1.0, 10.0), "peer=1,data=2"),
    ],
)
def test_sizes_follow_the_times_of_the_peers(tmp_path, costs, mesh):
    from fastdml import Cohort

    names = [type(peer).__name__ for peer in Cohort(PEERS, 10)]
    folder = tmp_path / "run"
    found = run_ranks(2, auto, str(folder), dict(zip(names, costs, strict=True)))
    assert [f[0] for f in found] == [mesh, mesh]
    assert [f[1] for f in found] == [2, 0]  # measured once a peer, on rank 0 alone
    assert load_config(folder / "config.yaml").mesh == mesh


def sizes_again(folder: str) -> tuple:
    """Of a run that goes on with "auto", and of a job that is started again."""
    config = TrainConfig(data="digits", peers=PEERS, mesh="auto", folder=folder, device="cpu")
    resumed = sizes_of(config.replace(resume=True), 2)
    remember(make_mesh(1, 2))
    return resumed, sizes_of(config, 2), make_mesh(*sizes_of(config, 2)).data


def test_a_run_keeps_the_sizes_that_it_began_with(tmp_path):
    TrainConfig(data="digits", peers=PEERS, mesh="peer=1,data=4").save(tmp_path / "config.yaml")
    assert run_ranks(2, sizes_again, str(tmp_path)) == [((1, 2), (1, 2), 2)] * 2


def dear_peers(folder: str) -> list:
    """The rows of two peers in a run, and where it goes on though the other peer is the dear one by
    then."""
    rows = []
    for costs in ([1.0, 10.0], [10.0, 1.0]):
        times = iter(costs)
        train_ranks.peer_seconds = lambda peers, images, amp, times=times: [next(times)]
        config = TrainConfig(
            data="digits", peers=PEERS, mesh="peer=2", subset=32, batch_size=32, epochs=1,
            folder=folder, device="cpu", amp="off", resume=bool(rows), figures=[],
        )  # fmt: skip
        rows.append(run(config).mesh["rows"])
    return rows


def test_a_run_that_goes_on_keeps_the_rows_of_its_peers(tmp_path):
    found = run_ranks(2, dear_peers, str(tmp_path / "run"))
    assert found == [[[1, 0], [1, 0]]] * 2
