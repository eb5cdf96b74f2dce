"""The cohort: peers that differ, reproducibly; one class count; logits, features, ensemble."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_peers import linear_net, same
from torch import nn

from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.models import ReidHead


def test_peers_of_one_architecture_start_different_and_a_seed_repeats_them():
    one, two = (Cohort(["resnet8"] * 3, 10, seed=3) for _ in range(2))
    for k in range(3):
        assert same(one.peers[k], two.peers[k])
        assert not same(one.peers[k], one.peers[(k + 1) % 3])
    other = Cohort(["resnet8"] * 3, 10, seed=4)
    assert not any(same(a, b) for a in one.peers for b in other.peers)


def test_a_peer_does_not_depend_on_its_neighbours():
    mixed, alike = Cohort(["wrn_10_1", "resnet8"], 10), Cohort(["resnet8", "resnet8"], 10)
    assert same(mixed.peers[1], alike.peers[1])


@given(seed=st.integers(0, 2**64), state=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_building_leaves_the_global_generator_alone(seed, state):
    torch.manual_seed(state)
    before = torch.get_rng_state()
    first = Cohort(["resnet8", "resnet8"], 10, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert same(first.peers[1], Cohort(["resnet8", "resnet8"], 10, seed=seed).peers[1])


def test_default_device_does_not_change_the_weights():
    with torch.device("meta"):
        cohort = Cohort(["resnet8"], 10)
    assert same(cohort.peers[0], Cohort(["resnet8"], 10).peers[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_building_leaves_the_cuda_generator_alone():
    before = torch.cuda.get_rng_state()
    Cohort(["resnet8"], 10)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_names_and_modules_mix():
    cohort = Cohort(["resnet8", linear_net(), "resnet8", nn.Sequential(linear_net())], 4)
    assert cohort.names == ["resnet8-1", "Sequential-1", "resnet8-2", "Sequential-2"]
    assert cohort.models == ["resnet8", None, "resnet8", None]
    assert Cohort(["resnet8", "wrn_10_1"], 4).names == ["resnet8", "wrn_10_1"]
    assert len(cohort) == len(cohort.peers) == 4
    logits = cohort(torch.randn(5, 3, 8, 8))
    assert [z.shape for z in logits] == [(5, 4)] * 4


@given(st.lists(st.sampled_from(["resnet8", "wrn_10_1", "resnet14"]), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_names_are_unique_and_in_order(peers):
    names = Cohort(peers, 3).names
    assert len({*names}) == len(peers)
    assert [name.split("-")[0] for name in names] == peers


def test_class_count_is_found_in_modules():
    assert Cohort([linear_net(6), linear_net(6)]).num_classes == 6
    assert Cohort([Cohort(["resnet8"], 6).peers[0], "resnet8"]).num_classes == 6


@pytest.mark.parametrize(
    ("peers", "num_classes", "message"),
    [
        ([], 10, "at least one peer"),
        ("resnet8", 10, "must be a list, .* not 'resnet8'"),
        (nn.Flatten(), 10, "must be a list, .* not Flatten"),
        (None, 10, "must be a list, .* not None"),
        ([3], 10, "peer 0 is a int, neither"),
        (["resnet8"], None, "num_classes is needed"),
        ([nn.Flatten()], None, "num_classes is needed"),
        (["resnet8"], 0, "num_classes must be .* not 0"),
        (["resnet8"], 5.5, "num_classes must be .* not 5.5"),
        ([linear_net(4)], "4", "num_classes must be .* not '4'"),
        ([nn.Flatten()], -1, "num_classes must be .* not -1"),
        (["resnet8", "resnet9"], 10, "no model 'resnet9'"),
        ([linear_net(4), linear_net(5)], None, "Sequential-1 has 4, Sequential-2 has 5"),
    ],
)
def test_peers_that_cannot_be_used(peers, num_classes, message):
    with pytest.raises(InputError, match=message):
        Cohort(peers, num_classes)


def test_a_class_count_that_contradicts_a_module():
    peer = Cohort(["resnet8"], 6).peers[0]
    with pytest.raises(InputError, match="num_classes is 7, ResNetCifar has 6"):
        Cohort([peer], 7)


@pytest.mark.parametrize("seed", [-1, 1.5, None, "1"])
def test_seed_is_checked(seed):
    with pytest.raises(InputError, match="seed must be a whole number"):
        Cohort(["resnet8"], 10, seed=seed)


def test_twins_are_refused():
    net = linear_net()
    with pytest.raises(InputError, match="peers 0 and 1 are the same module"):
        Cohort([net, net])
    with pytest.raises(InputError, match=r"peers 1 and 2 start with identical .*deepcopy"):
        Cohort([linear_net(), net, copy.deepcopy(net)])
    with pytest.raises(InputError, match="peers 0 and 1 share 2 parameters"):
        Cohort([net, nn.Sequential(net)])
    nudged = copy.deepcopy(net)
    with torch.no_grad():
        nudged[1].bias[0] += 1
    assert len(Cohort([net, nudged])) == 2


def test_ensemble_is_the_mean_of_probabilities():
    cohort = Cohort(["resnet8", "wrn_10_1"], 5).eval()
    x = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        expected = sum(peer(x).double().softmax(1) for peer in cohort.peers) / 2
        mean = cohort.ensemble(x)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = cohort.ensemble(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(1), torch.ones(7))


def test_one_loss_reaches_its_own_peer_only():
    cohort = Cohort(["resnet8", "resnet8"], 5)
    cohort(torch.randn(4, 3, 8, 8))[0].sum().backward()
    assert all(p.grad is not None for p in cohort.peers[0].parameters())
    assert all(p.grad is None for p in cohort.peers[1].parameters())


class TwoHeads(nn.Module):
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.net = linear_net()

    def forward(self, x):
        return self.net(x), self.net(x)


def test_a_peer_with_other_outputs_is_named():
    x = torch.randn(5, 3, 8, 8)
    with pytest.raises(InputError, match=r"peer TwoHeads must return logits \(N, 4\).* tuple"):
        Cohort([TwoHeads()])(x)
    with pytest.raises(InputError, match=r"peer Sequential must .*\(N, 9\).*returned \(5, 4\)"):
        Cohort([linear_net()], 9)(x)


def test_training_mode_reaches_every_peer():
    cohort = Cohort(["resnet8", "wrn_10_1"], 5)
    assert all(not m.training for m in cohort.eval().modules())
    assert all(m.training for m in cohort.train().modules())


def test_compiles_without_graph_breaks():
    cohort = Cohort(["resnet8", "mobilenet"], 5).eval()
    compiled = torch.compile(cohort, backend="eager", fullgraph=True)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        for z, expected in zip(compiled(x), cohort(x), strict=True):
            assert torch.equal(z, expected)


def test_a_head_comes_with_names_and_not_with_modules():
    net = linear_net(4)
    cohort = Cohort(["resnet8", net], 4, head=ReidHead())
    assert cohort.peers[1] is net
    with pytest.raises(InputError, match="peer Sequential has no re-identification head"):
        cohort.embed(torch.zeros(1, 3, 8, 8))


def test_a_cohort_goes_over_its_peers():
    cohort = Cohort(["resnet8", linear_net()], 4)
    assert [*cohort] == [cohort[0], cohort[1]] == [*cohort.peers]
    assert cohort[-1] is cohort.peers[1]
    with pytest.raises(IndexError):
        cohort[2]
