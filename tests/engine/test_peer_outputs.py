"""What a peer may return, and under which modes a step runs, in every execution."""

from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.graph import GraphStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

from .small_runs import DirectCapture

C = 4
Pair = namedtuple("Pair", "logits aux")


class Net(nn.Module):
    num_classes = C

    def __init__(self, seed: int, give=lambda z: z) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, C))
        self.give = give

    def forward(self, x):
        return self.give(self.net(x))


KINDS = {
    "tuple": (lambda z: (z, z), "tuple: make_step(output=lambda out: out[0])"),
    "list": (lambda z: [z, z, z], "list: make_step(output=lambda out: out[0])"),
    "dict": (
        lambda z: {"logits": z, "aux": z},
        "dict of logits, aux: make_step(output=lambda out: out['logits'])",
    ),
    "named tuple": (lambda z: Pair(z, z), "Pair: make_step(output=lambda out: out.logits)"),
    "nothing": (lambda z: None, "NoneType: make_step(output=lambda out: its logits)"),
    "classes": (
        lambda z: torch.cat([z, z], 1),
        f"(3, {2 * C}): num_classes of the cohort and of the peer must be one",
    ),
    "rows": (lambda z: z.mean(0, keepdim=True), f"(1, {C}): num_classes"),
    "class maps": (lambda z: z[:, :, None], f"(3, {C}, 1): num_classes"),
}
EXECUTIONS = [
    {"execution": "eager"},
    {"execution": "threads"},
    {"execution": "auto"},
    {"execution": "eager", "update": "sequential"},
    {"execution": "graph"},
]


def made(peers, *, execution="eager", output=None, **options):
    cohort = Cohort(peers, C)
    optimizer = make_optimizer(cohort, lr=0.1)
    if execution == "graph":
        step = make_step(cohort, MutualLoss(), optimizer, execution="eager", amp="off",
                         output=output)  # fmt: skip
        return cohort, GraphStep(step, DirectCapture)
    step = make_step(cohort, MutualLoss(), optimizer, execution=execution, amp="off",
                     output=output, **options)  # fmt: skip
    return cohort, step


def batch(n: int = 3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 2, 2, generator=generator), torch.randint(C, (n,), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", EXECUTIONS, ids=str)
def test_other_outputs_are_one_line_that_names_the_peer_and_the_remedy(kind, options):
    give, message = KINDS[kind]
    cohort, step = made([Net(0), Net(1, give)], **options)
    before = copy.deepcopy(cohort.state_dict())
    with pytest.raises(InputError) as caught:
        step(*batch())
    assert str(caught.value) == (
        f"peer Net-2 must return logits (N, {C}), and for 3 images returned {message}"
        + (" of the cohort and of the peer must be one" if message.endswith("num_classes") else "")
    )
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    assert all(w.grad is None for w in cohort.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_refuses_other_outputs_in_one_line(kind):
    cohort, step = made([Net(k, KINDS[kind][0]) for k in range(2)], execution="stacked")
    before = copy.deepcopy(cohort.state_dict())
    with pytest.raises(InputError) as caught:
        step(*batch())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())


@pytest.mark.parametrize(
    ("give", "output"),
    [
        (lambda z: (z, z), lambda out: out[0]),
        (lambda z: {"logits": z}, lambda out: out["logits"]),
        (lambda z: Pair(z, None), lambda out: out.logits),
        (lambda z: z[:, :, None], lambda out: out.squeeze(2)),
    ],
    ids=["tuple", "dict", "named tuple", "tensor"],
)
@pytest.mark.parametrize("options", EXECUTIONS, ids=str)
def test_output_picks_the_logits(give, output, options):
    states = []
    for peers, pick in (([Net(0, give), Net(1, give)], output), ([Net(0), Net(1)], None)):
        if pick is None and options["execution"] == "auto":
            options = {"execution": "eager"}  # peers without output= could be stacked
        cohort, step = made(peers, output=pick, **options)
        for _ in range(2):
            step(*batch())
        states.append(cohort.state_dict())
    assert all(torch.equal(v, states[0][k]) for k, v in states[1].items())


def test_output_is_refused_where_nothing_would_heed_it():
    with pytest.raises(InputError, match="output= does not go with execution 'stacked': wrap the"):
        made([Net(0), Net(1)], execution="stacked", output=lambda out: out)


def test_evaluation_names_its_own_remedy():
    message = r"returned dict of logits: wrap it in a module that returns out\['logits'\]"
    with pytest.raises(InputError, match=message):
        Cohort([Net(0), Net(1, lambda z: {"logits": z})], C)(batch()[0])


@pytest.mark.parametrize("library", ["transformers", "torchvision"])
def test_models_of_other_libraries(library):
    """They return more than the logits, in training at least."""
    torch.manual_seed(0)
    if library == "transformers":
        hf = pytest.importorskip("transformers")
        sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
        config = hf.ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=C)
        peers, side = [hf.ViTForImageClassification(config) for _ in range(2)], 8
    else:
        models = pytest.importorskip("torchvision.models")
        peers = [models.GoogLeNet(num_classes=C, aux_logits=True, init_weights=False)
                 for _ in range(2)]  # fmt: skip
        side = 48
    x, y = torch.randn(4, 3, side, side), torch.randint(C, (4,))
    cohort, step = made(peers)
    with pytest.raises(
        InputError, match=r"returned \w+.*: make_step\(output=lambda out: out.logits"
    ):
        step(x, y)
    cohort, step = made(peers, output=lambda out: out.logits)
    before = [w.detach().clone() for w in cohort.parameters()]
    assert step(x, y).losses.isfinite().all()
    moved = [not torch.equal(w, b) for w, b in zip(cohort.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 3  # not the auxiliary heads, which no loss sees


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [*EXECUTIONS, {"execution": "stacked"}], ids=str)
@pytest.mark.parametrize("after", [0, 2], ids=["first step", "third step"])
def test_a_step_that_computes_no_gradients_is_one_line_and_changes_nothing(mode, options, after):
    class Plain(nn.Sequential):
        pass

    torch.manual_seed(0)
    cohort, step = made([Plain(nn.Flatten(), nn.Linear(12, C)) for _ in range(2)], **options)
    for _ in range(after):
        step(*batch())
    before = copy.deepcopy(cohort.state_dict())
    message = rf"a training step under torch.{mode.__name__}\(\) computes no gradients: call the"
    with mode(), pytest.raises(InputError, match=message):
        step(*batch())
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    step(*batch())
    assert not all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())


def test_gradients_enabled_within_inference_mode_are_not_enough():
    _, step = made([Net(0), Net(1)])
    message = r"under torch.inference_mode\(\)"
    with torch.inference_mode(), torch.enable_grad(), pytest.raises(InputError, match=message):
        step(*batch())


@pytest.mark.parametrize("options", [*EXECUTIONS, {"execution": "stacked"}], ids=str)
def test_images_made_in_inference_mode_are_as_good_as_others(options):
    states = []
    for mode in (torch.inference_mode, torch.enable_grad):
        peers = [nn.Sequential(nn.Flatten(), nn.Linear(12, C)) for _ in range(2)]
        for k, p in enumerate(peers):
            nn.init.constant_(p[1].weight, k + 1.0)
        if options["execution"] == "auto":
            options = {"execution": "eager"}
        cohort, step = made(peers, **options)
        nn.init.zeros_(cohort.peers[0][1].bias)
        nn.init.zeros_(cohort.peers[1][1].bias)
        with mode():
            x, y = batch()
            x = x * 1.0
        step(x, y)
        states.append(cohort.state_dict())
    assert all(torch.equal(v, states[0][k]) for k, v in states[1].items())


def test_peers_made_in_inference_mode_are_one_line():
    with torch.inference_mode():
        peers = [Net(0), Net(1)]
    with pytest.raises(InputError, match=r"net.1.weight of peer Net-1 was made under torch.inf"):
        made(peers)


@pytest.mark.parametrize("options", [*EXECUTIONS, {"execution": "stacked"}], ids=str)
def test_peers_that_are_frozen_altogether_are_one_line(options):
    cohort, step = made([nn.Sequential(nn.Flatten(), nn.Linear(12, C)) for _ in range(2)],
                        **options)  # fmt: skip
    cohort.requires_grad_(False)
    with pytest.raises(InputError, match=r"trained nothing: no weight .* unfreeze some"):
        step(*batch())
