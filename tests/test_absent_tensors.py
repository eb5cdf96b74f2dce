"""Peers whose weights are not, or not wholly, here, and states that are more than tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastdml import Cohort, MutualLoss
from fastdml.engine import make_optimizer, make_step
from fastdml.errors import InputError

C = 4


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, C))


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 2, 2, generator=generator), torch.randint(C, (8,), generator=generator)


def lazy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.LazyLinear(C))


def on_meta() -> list[nn.Module]:
    with torch.device("meta"):
        return [net(), net()]


@pytest.fixture
def sharded():
    """FSDP2 in a job of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda: [fully_shard(net(k), mesh=mesh) for k in range(2)]
    dist.destroy_process_group()


def sgd(cohort) -> torch.optim.Optimizer:
    return torch.optim.SGD(cohort.parameters(), 0.1)


def train(cohort, optimizer):
    step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager")
    return step(*batch())


def refused(tmp_path, cohort, message, but=()):
    """By everything that needs the weights, except for `but`, before anything is written."""
    work = {
        "make_optimizer": lambda: make_optimizer(cohort, lr=0.1),
        "make_step": lambda: make_step(cohort, MutualLoss(), sgd(cohort), execution="eager"),
        "auto": lambda: make_step(cohort, MutualLoss(), sgd(cohort)),
        "save": lambda: cohort.save(tmp_path / "saved"),
    }
    for name in work.keys() - {*but}:
        call = work[name]
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "saved").exists()


def test_meta_peers_are_refused_until_they_have_values(tmp_path):
    cohort = Cohort(on_meta(), C)
    refused(tmp_path, cohort, r"1\.weight of peer Sequential-1 is on the meta device.*to_empty")
    own = Cohort([net(0), net(1)], C)
    cohort.to_empty(device="cpu")
    cohort.load_state_dict(own.state_dict())
    found, expected = (train(c, make_optimizer(c, lr=0.1)).losses for c in (cohort, own))
    assert torch.equal(found, expected)


def test_lazy_peers_are_refused_until_they_have_seen_a_batch(tmp_path):
    cohort = Cohort([lazy(0), lazy(1)], C)
    message = r"1\.weight of peer Sequential-1 is of a lazy layer.*cohort\(images\)"
    refused(tmp_path, cohort, message)
    cohort(batch()[0])
    assert train(cohort, make_optimizer(cohort, lr=0.1)).losses.isfinite().all()
    cohort.save(tmp_path / "saved")
    loaded = Cohort.load(tmp_path / "saved", peers=[lazy(2), lazy(3)])
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, cohort.state_dict()[name])


@pytest.mark.filterwarnings("ignore")  # of FSDP's, about one process
def test_sharded_peers_are_refused(tmp_path, sharded):
    cohort = Cohort(sharded(), C)
    message = r"1\.weight of peer FSDPSequential-1 is sharded \(a DTensor.*keep each.*mesh="
    refused(tmp_path, cohort, message, but=["make_optimizer"])  # for a step on a mesh


@pytest.mark.filterwarnings("ignore")
def test_peers_sharded_after_the_step_was_made_are_noticed(sharded):
    cohort = Cohort([net(0), net(1)], C)
    step = make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=0.1), execution="eager")
    cohort.peers = nn.ModuleList(sharded())
    with pytest.raises(InputError, match="is sharded"):
        step(*batch())


def test_peers_on_the_meta_device_load_what_was_saved(tmp_path):
    cohort = Cohort([net(0), net(1)], C)
    cohort.save(tmp_path)
    loaded = Cohort.load(tmp_path, peers=on_meta())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, cohort.state_dict()[name])
    assert train(loaded.train(), make_optimizer(loaded, lr=0.1)).losses.isfinite().all()


def test_a_buffer_that_no_file_has_is_missed(tmp_path):
    def peer():
        made = net()
        made.register_buffer("table", torch.zeros(3), persistent=False)
        return made

    Cohort([peer(), net(1)], C).save(tmp_path)
    with torch.device("meta"):
        peers = [peer(), net(1)]
    with pytest.raises(InputError, match="table of peer Sequential-1 is on the meta device"):
        Cohort.load(tmp_path, peers=peers)


class Counting(nn.Sequential):
    """Keeps more than tensors in its state."""

    extra: object = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def counting(extra) -> Cohort:
    peers = [net(0), Counting(*net(1))]
    peers[1].extra = extra
    return Cohort(peers, C)


@pytest.mark.parametrize("extra", [{"steps": 1}, 7, "text", None, [torch.zeros(1)]])
def test_a_state_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path, extra):
    kind = type(extra).__name__
    message = f"_extra_state of peer Counting is a {kind}, and the files of a cohort hold tensors"
    with pytest.raises(InputError, match=message):
        counting(extra).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_state_that_is_a_tensor_is_saved_and_loaded(tmp_path):
    counting(torch.arange(3)).save(tmp_path)
    loaded = Cohort.load(tmp_path, peers=[net(2), Counting(*net(3))])
    assert torch.equal(loaded.peers[1].extra, torch.arange(3))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(2, dtype=torch.complex128), "complex128, strided"),
        (torch.eye(2).to_sparse(), "float32, sparse_coo"),
    ],
    ids=["complex128", "sparse"],
)  # fmt: skip
def test_tensors_that_the_files_cannot_hold_are_refused(tmp_path, tensor, kind):
    cohort = Cohort([net(0), net(1)], C)
    cohort.peers[1].register_buffer("odd", tensor)
    with pytest.raises(InputError, match=rf"odd of peer Sequential-2 is a tensor \({kind}\)"):
        cohort.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda ws: torch.optim.LBFGS(ws), "LBFGS computes the loss several times a step"),
        (lambda ws: torch.optim.SparseAdam(ws), "SparseAdam takes sparse gradients alone"),
        (lambda ws: [torch.optim.SGD(ws, 0.1)], "must be one torch optimizer .* not list"),
        (lambda ws: ws, "must be one torch optimizer .* not list"),
    ],
    ids=["LBFGS", "SparseAdam", "list", "weights"],
)
@pytest.mark.parametrize("execution", ["auto", "eager"])
def test_optimizers_that_no_step_can_use_are_one_line(optimizer, message, execution):
    cohort = Cohort([net(0), net(1)], C)
    made = optimizer(list(cohort.parameters()))
    with pytest.raises(InputError, match=message) as caught:
        make_step(cohort, MutualLoss(), made, execution=execution)
    assert "\n" not in str(caught.value)


def test_an_optimizer_of_ones_own_with_a_closure_that_must_be_given_is_refused():
    class Own(torch.optim.SGD):
        def step(self, closure):
            closure()

    cohort = Cohort([net(0), net(1)], C)
    with pytest.raises(InputError, match="Own computes the loss several times a step"):
        make_step(cohort, MutualLoss(), Own(cohort.parameters(), 0.1))


def test_peers_without_parameters_are_one_line():
    cohort = Cohort([nn.Flatten(), nn.Flatten()], C)
    with pytest.raises(InputError, match="the peers have no parameters"):
        make_step(cohort, MutualLoss(), torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
