"""Random cohorts, losses, options and changes between steps, trained on a mesh and in one process.
A case is a function of its seed and of the mesh's shape."""

from __future__ import annotations

import random
import traceback
import warnings
from typing import Any

import torch
from mesh_runs import SIDE, C, share
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from fastdml.cohort import Cohort
from fastdml.engine import Ema, make_optimizer, make_step
from fastdml.engine.amp import Amp, LossScale
from fastdml.engine.update import NOTHING_TRAINED
from fastdml.loss import MutualLoss
from fastdml.parallel import Mesh, total

CPU = torch.device("cpu")
STEPS = 5
EXACT, ROUGH = 1e-9, 5e-2  # tolerances of float64 and of less
COUNTS = ("correct", "ensemble_correct")  # which a logit's last bit may change by one
DIVISOR = "label_weight"  # with `mimic_ignored` it is 1 of rows that have no label at all
OF_PARTS = ("running_", "num_batches", "seen")  # statistics of the parts that one process takes


class Net(nn.Module):
    """A convolution, a norm, and linear layers that are used in the way of `kind`."""

    def __init__(self, kind: str, width: int, norm: str, drop: float) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(2, width, 3, padding=1, bias=norm == "none")
        if kind == "spectral":
            self.conv = spectral_norm(self.conv)
        if kind == "weight norm":
            self.conv = weight_norm(self.conv)
        self.norm = {
            "batch": lambda: nn.BatchNorm2d(width),
            "cumulative": lambda: nn.BatchNorm2d(width, momentum=None),
            "group": lambda: nn.GroupNorm(2, width),
            "none": nn.Identity,
        }[norm]()
        self.drop = nn.Dropout(drop) if drop else nn.Identity()
        self.mid = nn.Linear(width, width)
        self.more = nn.Linear(width, width)
        if kind == "tied":
            self.more.weight = self.mid.weight
        self.head = nn.Linear(width, C)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean_seen", torch.zeros(width))
        if kind == "hooks":
            self.mid.register_forward_hook(lambda m, i, o: o * 1.5)
            self.head.weight.register_hook(lambda g: g.clamp(-0.2, 0.2))

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def body(self, x: Tensor) -> Tensor:
        if self.kind == "mixed":
            x = x + self.mid(x.to(self.mid.weight.dtype)).to(x.dtype)
        else:
            x = x + self.mid(x).tanh()
        return self.drop(x) + self.more(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "checkpoint":
            x = checkpoint(self.body, x, use_reentrant=False)
        elif self.kind == "twice":
            x = self.body(self.body(x))
        else:
            x = self.body(x)
        if self.kind == "buffers" and self.training:
            self.seen += len(x)
            self.mean_seen.lerp_(x.detach().mean(0).to(self.mean_seen.dtype), 0.1)
        return self.head(x)


KINDS = [
    "plain", "tied", "twice", "mixed", "checkpoint", "hooks", "buffers", "weight norm", "spectral",
]  # fmt: skip


class Signed(torch.optim.Optimizer):
    """An optimizer of a user's own, with momentum."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    state = self.state[w]
                    state["m"] = state.get("m", torch.zeros_like(w)).lerp(w.grad, 0.3)
                    w.sub_(state["m"].tanh() * group["lr"])


CHANGES = [
    "lr", "freeze", "unfreeze", "replace", "add group", "load", "assign", "peer weights",
    "kl weight", "eval", "size", "none",
]  # fmt: skip


def case_of(seed: int, peer: int, data: int) -> dict[str, Any]:
    """What is drawn for a mesh of `peer` rows and `data` columns."""
    r = random.Random(f"{seed} {peer} {data}")
    accumulate = r.choice([1, 1, 2, 3, 4])
    uneven = data > 1 and r.random() < 0.25  # columns of other numbers of rows
    if uneven:
        accumulate = 1
    norms = ["group", "none"] if uneven else ["batch", "batch", "cumulative", "group", "none"]
    # Power iterations are one a forward pass, of which data=D has fewer in a row than accumulate=D.
    kinds = KINDS if data == 1 else [k for k in KINDS if k != "spectral"]
    if uneven:  # a hook clips the gradient of a part, and one process has no such parts
        kinds = [k for k in kinds if k != "hooks"]
    K = peer + r.randrange(3)
    amp = r.choice(["off", "off", "off", "bf16", "fp16"])
    drops = r.random() < 0.25 and not uneven
    peers = [
        {
            "kind": r.choice(kinds), "width": 2 * r.randint(2, 5), "norm": r.choice(norms),
            "drop": 0.3 if drops and r.random() < 0.6 else 0.0,
            "frozen": r.choice(["", "", "", "", "all", "conv", "norm"]),
        }
        for _ in range(K)
    ]  # fmt: skip
    if all(p["frozen"] == "all" for p in peers):
        peers[0]["frozen"] = ""
    teachers = r.choice([0, 0, 0, 1, 2])
    loss: dict[str, Any] = {
        "temperature": r.choice([1.0, 2.0, 3.5]),
        "ce_weight": r.choice([1.0, 1.0, 0.5, 0.0]),
        "kl_weight": r.choice([1.0, 1.0, 0.3, "tensor"]),
        "target": r.choice(["peers", "peers", "ensemble", "ensemble_logits"]),
        "label_smoothing": r.choice([0.0, 0.0, 0.1]),
        "ignore_index": r.choice([-100, -100, 1]),
        "mimic_ignored": r.random() < 0.4,
        "reduction": r.choice(["mean", "mean", "mean", "sum", "none"]),
        "divergence": r.choice(["forward", "forward", "reverse", "jeffreys", "jsd"]),
        "gate": r.choice(["none", "none", "correct", "best", "confidence", "entropy"]),
        "class_weight": r.random() < 0.3,
        "peer_weights": r.random() < 0.4,
        "detach_targets": r.random() < 0.85,
    }
    m = r.choice([2, 3])
    n = data * accumulate * m + (r.randint(1, data - 1) if uneven else 0)
    return {
        "seed": seed, "peers": peers, "teachers": teachers, "loss": loss, "amp": amp,
        "accumulate": accumulate, "n": n, "uneven": uneven, "drops": drops,
        "unlabelled": r.choice([0.0, 0.0, 0.4, 0.8]),
        "optimizer": r.choice(["sgd", "sgd", "adam", "adamw", "own", "one group"]),
        "clip": r.choice([None, None, 0.1]),
        "ema": r.choice([None, None, 0.9]),
        "exchange": r.choice(["logits", "logits", "logits", "weights"]),
        "rounds": r.random() < 0.3,
        "changes": [r.choice(CHANGES) for _ in range(STEPS)],
    }  # fmt: skip


def cohort_of(case: dict[str, Any]) -> Cohort:
    dtype = torch.float64 if case["amp"] == "off" else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        nets = []
        for p in case["peers"]:
            net: Any = Net(p["kind"], p["width"], p["norm"], p["drop"]).to(dtype)
            if p["kind"] == "mixed":
                net.mid.to(torch.float32)
            for name, w in net.named_parameters():
                if p["frozen"] == "all" or (p["frozen"] and name.startswith(p["frozen"])):
                    w.requires_grad_(False)
            nets.append(net)
        peers = Cohort(nets, C)
        teachers = [Net("plain", 6, "batch", 0.0).to(dtype) for _ in range(case["teachers"])]
        if teachers:
            peers.teachers = teachers
    return peers


def loss_of(case: dict[str, Any]) -> MutualLoss:
    options = dict(case["loss"])
    size = len(case["peers"]) + case["teachers"]
    g = torch.Generator().manual_seed(case["seed"])
    if options.pop("class_weight"):
        options["class_weight"] = torch.rand(C, generator=g, dtype=torch.float64) + 0.1
    if options.pop("peer_weights"):
        options["peer_weights"] = torch.rand(size, size, generator=g, dtype=torch.float64)
    if options["kl_weight"] == "tensor":
        options["kl_weight"] = torch.tensor(0.7, dtype=torch.float64)
    return MutualLoss(**options)


def batch_of(case: dict[str, Any], step: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * case["seed"] + step)
    dtype = torch.float64 if case["amp"] == "off" else torch.float32
    images = torch.randn(n, 2, SIDE, SIDE, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(C, (n,), generator=g)
    gone = torch.rand(n, generator=g) < case["unlabelled"]
    return images, labels.masked_fill(gone, case["loss"]["ignore_index"])


def change(
    kind: str, at: int, case: dict[str, Any], peers: Cohort, step: Any, local: Any, n: int
) -> int:
    """Changes something before a step, in the peers that are here, `local`. Returns the size of the
    batches from now on."""
    optimizer, loss = step.optimizer, step.loss
    k = at % len(case["peers"])
    here = k in local
    net: Any = peers[k]
    if kind == "lr":
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5
    elif kind == "freeze" and here:
        net.head.weight.requires_grad_(False)
    elif kind == "unfreeze" and here:
        for w in net.parameters():
            w.requires_grad_(True)
    elif kind in ("replace", "add group") and here:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(at)
            old = net.head
            net.head = nn.Linear(old.in_features, C).to(old.weight.dtype)
        if kind == "add group":
            optimizer.add_param_group({"params": list(net.head.parameters()), "lr": 0.05})
    elif kind in ("load", "assign") and here and case["peers"][k]["kind"] != "tied":
        state = {n: t.clone() for n, t in net.state_dict().items()}
        state["head.bias"] = state["head.bias"] + 0.1
        net.load_state_dict(state, assign=kind == "assign")
    elif kind == "peer weights" and loss.peer_weights is not None:
        loss.peer_weights.mul_(0.5).add_(0.2)
    elif kind == "kl weight":
        if isinstance(loss.kl_weight, Tensor):
            loss.kl_weight.mul_(0.5)
        else:
            loss.kl_weight = loss.kl_weight * 0.5
    elif kind == "eval":
        peers.eval()
        with torch.no_grad():
            for j in local:
                peers[j](batch_of(case, 99, 3)[0])
        peers.train()
    elif kind == "size":
        n += case["parts"] * (1 if at % 2 else -1)
        n = max(n, 2 * case["parts"])
    return n


def train(case: dict[str, Any], mesh: Mesh | None, data: int) -> dict[str, Any]:
    """Trains what is `case` for STEPS steps; everything that a step gives and changes.

    data: the columns of the mesh that the case is of, each of which one process takes as a part.
    """
    torch.set_num_threads(1)
    case = case | {"parts": data * case["accumulate"]}
    peers, loss = cohort_of(case), loss_of(case)
    options: dict[str, Any] = {"execution": "eager", "grad_clip": case["clip"]}
    own = 1 if mesh is None else mesh.data
    options["accumulate"] = case["parts"] // own
    if case["uneven"]:
        options["accumulate"] = 1
    if mesh is not None:
        options["mesh"] = mesh
        mesh.distribute(peers, keep=case["exchange"] == "weights")
        options["exchange"] = case["exchange"]
    options["amp"] = case["amp"]
    if case["amp"] == "fp16":
        options["amp"] = Amp(CPU, torch.float16, LossScale(CPU, init=2.0**17))
    if case["ema"]:
        options["ema"] = Ema(peers, case["ema"])
    name = case["optimizer"]
    trained = [w for w in peers.parameters() if w.requires_grad]
    if name == "own":
        optimizer: Any = Signed([{"params": [w]} for w in trained] or [{"params": []}], lr=0.02)
    elif name == "one group":
        optimizer = torch.optim.SGD(
            trained or [{"params": []}], lr=0.1, momentum=0.9, nesterov=True
        )
    else:
        optimizer = make_optimizer(peers, name, lr=0.05 if name == "sgd" else 0.01)
    step = make_step(peers, loss, optimizer, **options)
    if mesh is not None:
        step.exchange.in_rounds = case["rounds"]
    local = range(len(peers)) if mesh is None else mesh.local
    found: dict[str, Any] = {"local": [*local], "outputs": []}
    n = case["n"]
    for i, kind in enumerate(case["changes"]):
        n = change(kind, i, case, peers, step, local, n)
        output = step(*share(batch_of(case, i, n), mesh))
        if mesh is not None:
            output = total(output, mesh)
        found["outputs"].append(
            {"losses": output.losses, "teacher_kl": output.teacher_kl}
            | output.stats.layout.views(output.stats.packed)
        )
    found["weights"] = {name: t.clone() for name, t in peers.state_dict().items()}
    found["averages"] = {} if not case["ema"] else dict(options["ema"].state_dict())
    found["state"] = {
        name: [v.clone() for v in optimizer.state.get(w, {}).values() if isinstance(v, Tensor)]
        for name, w in peers.named_parameters()
    }
    found["scale"] = None if step.amp.scaler is None else step.amp.scaler.scale.clone()
    found["overflow"] = None if step.update.overflow is None else step.update.overflow.clone()
    return found


def tried(case: dict[str, Any], mesh: Mesh | None, data: int) -> dict[str, Any]:
    """What `train` found, or its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return train(case, mesh, data)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            return {"error": text, "traceback": traceback.format_exc()}


def compare(
    case: dict[str, Any], ranks: list[dict[str, Any]], alone: dict[str, Any], data: int
) -> list[str]:
    """The differences between what the ranks found and what one process did."""
    errors = [found.get("error") for found in ranks]
    if any(errors) or "error" in alone:
        return _other_errors(ranks, errors, alone)
    double = case["amp"] == "off" and all(p["kind"] != "mixed" for p in case["peers"])
    tol = EXACT if double else ROUGH
    # Sums of one or two parts have one order. Those of more are added in another on a mesh.
    bits = data == 1 or (data == 2 and case["accumulate"] == 1 and not case["uneven"])
    found = []
    for rank, of_rank in enumerate(ranks):
        for i, (outputs, expected) in enumerate(
            zip(of_rank["outputs"], alone["outputs"], strict=True)
        ):
            for name, t in outputs.items():
                if name == DIVISOR or (name in COUNTS and not double):
                    continue
                if not same(t, expected[name], tol):
                    found.append(f"rank {rank}, step {i}, {name}: {t}, not {expected[name]}")
        for what in ("weights", "averages"):
            missing = {*alone[what]}.difference(*(held[what] for held in ranks))
            if missing:
                found.append(f"{what} that no rank has: {sorted(missing)}")
            for name, t in of_rank[what].items():
                if data > 1 and any(part in name for part in OF_PARTS):
                    continue
                if not same(t, alone[what][name], 0.0 if bits else tol):
                    found.append(f"rank {rank}, {what}, {name}{off(t, alone[what][name])}")
        for name, state in of_rank["state"].items():
            theirs = alone["state"][name]
            if len(state) != len(theirs) or not all(
                same(a, b, 0.0 if bits else tol) for a, b in zip(state, theirs, strict=True)
            ):
                found.append(f"rank {rank}, the optimizer's state of {name}")
        for what in ("scale", "overflow"):
            if not same(of_rank[what], alone[what], 0.0):
                found.append(f"rank {rank}, {what}: {of_rank[what]}, not {alone[what]}")
    return found


def _other_errors(
    ranks: list[dict[str, Any]], errors: list[str | None], alone: dict[str, Any]
) -> list[str]:
    theirs = alone.get("error")
    # On a mesh a later step that trains nothing is let be: to know it would be a collective a step.
    if theirs is not None and NOTHING_TRAINED in theirs and not any(errors):
        return []
    if {*errors} == {theirs}:
        return []
    tracebacks = [found["traceback"] for found in (*ranks, alone) if "traceback" in found]
    return [f"errors {errors} on the ranks, {theirs} in one process", *tracebacks[:1]]


def same(a: Tensor | None, b: Tensor | None, tol: float) -> bool:
    """Whether they are equal within `tol`, NaNs where the other has NaNs."""
    if a is None or b is None:
        return a is b
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.allclose(a.double(), b.double(), rtol=tol, atol=tol, equal_nan=True)


def off(a: Tensor, b: Tensor) -> str:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f": {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
    return f": {(a.double() - b.double()).abs().max().item():.3g} off"
