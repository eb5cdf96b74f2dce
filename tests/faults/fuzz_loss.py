"""Fuzz targets: arguments of the loss. See `fuzzing`."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from fastdml_kernels import Options
from fastdml_kernels.reference import mutual_loss_reference
from fuzz_registry import target
from fuzzing import Check
from mutations import REALS, junk

from fastdml import mutual_loss


def extreme(random: Random, tensor: torch.Tensor) -> None:
    for _ in range(random.randrange(4)):
        value = random.choice((1e4, -1e4, 1e30, -1e30, 3e38, -3e38, *REALS))
        if tensor.numel():
            tensor.view(-1)[random.randrange(tensor.numel())] = torch.tensor(value)


def laid_out(random: Random, values: torch.Tensor) -> torch.Tensor:
    """The same values (N, C) with other strides."""
    kind = random.randrange(4)
    if kind == 0:
        return values.t().contiguous().t()
    if kind == 1:
        wide = values.new_full((values.shape[0] + 1, values.shape[1] + 3), float("nan"))
        return wide[1:, 2:-1].copy_(values)
    if kind == 2:
        wide = values.new_full((values.shape[0], values.shape[1], 2), float("nan"))
        return wide[..., 1].copy_(values)
    return values


def agree(
    losses: torch.Tensor,
    exact: list[torch.Tensor],
    labels: torch.Tensor,
    options: dict[str, Any],
    wild: bool,
) -> None:
    """Losses are those of the definitions in float64; of wild logits where those are finite."""
    beside = {"temperature", "kl_weight", "peer_weights", "class_weight", "sample_weight"}
    beside &= options.keys()
    chosen = Options(**{k: v for k, v in options.items() if k not in beside})
    want, _ = mutual_loss_reference(exact, labels, chosen, **{k: options[k] for k in beside})
    assert losses.shape == want.shape
    if wild:
        sure = want.isfinite() & (want.abs() < 1e30)
        losses, want = losses[sure], want[sure]
    scale = float(want.abs().nan_to_num(0).max()) if want.numel() else 0.0
    torch.testing.assert_close(
        losses.double(), want, rtol=1e-4, atol=1e-4 + 1e-5 * scale, equal_nan=True
    )


@target(ValueError, TypeError)
def loss_arguments(folder: Path) -> Check:
    """Whatever fits is answered as in float64; gradients are finite where the losses are."""

    def check(random: Random) -> None:
        torch.manual_seed(random.randrange(2**31))
        K, N, C = random.randint(1, 5), random.randint(0, 40), random.choice((1, 2, 7, 8, 9, 33))
        dtypes = [random.choice((torch.float32, torch.bfloat16, torch.float16)) for _ in range(K)]
        wild = random.random() < 0.3
        logits = []
        for dtype in dtypes:
            z = torch.randn(N, C) * random.choice((0.1, 3, 20))
            if wild:
                extreme(random, z)
            logits.append(laid_out(random, z.to(dtype)))
        labels = torch.randint(0, C, (N,), dtype=random.choice((torch.int64, torch.int32)))
        options: dict[str, Any] = {}
        if random.random() < 0.5:
            options["temperature"] = random.choice((0.5, 1.0, 4.0, 1e-3, 1e3))
        if random.random() < 0.3:
            options["label_smoothing"] = random.choice((0.1, 1.0))
        if random.random() < 0.3:
            options["reduction"] = random.choice(("mean", "sum", "none"))
        if random.random() < 0.3:
            options["target"] = random.choice(("peers", "ensemble", "ensemble_logits"))
        if random.random() < 0.4:
            options["divergence"] = random.choice(("reverse", "jeffreys", "jsd"))
        if options.get("divergence") == "jsd":
            options["jsd_beta"] = random.choice((0.0, 0.1, 0.5, 1.0))
        if random.random() < 0.3:  # "correct" and "best" choose, at ties not as float64 does
            options["gate"] = random.choice(("confidence", "entropy"))
        if random.random() < 0.3:
            options["students"] = tuple(sorted(random.sample(range(K), random.randint(1, K))))
        if random.random() < 0.2:
            options["sample_weight"] = torch.rand(N) * (torch.rand(N) < 0.8)
        if random.random() < 0.2:
            options["detach_targets"] = False
        if random.random() < 0.2:
            options["peer_weights"] = torch.rand(K, K)
        if random.random() < 0.2:
            options["class_weight"] = torch.rand(C) + 0.1
        if random.random() < 0.2:
            options["kl_weight"] = random.choice((0.0, 0.3))
        if random.random() < 0.3:
            labels[torch.rand(N) < 0.3] = -100
            options["mimic_ignored"] = random.random() < 0.3
        exact = [z.double() for z in logits]
        if random.random() < 0.3:  # what does not fit
            kind = random.randrange(6)
            if kind == 0 and N:
                labels[random.randrange(N)] = random.choice((-1, C, 2**31 - 1, -(2**31)))
            elif kind == 1:
                logits[-1] = logits[-1][: N // 2]
            elif kind == 2:
                labels = random.choice((labels.float(), labels[None], labels[: N // 2], None, [0]))
            elif kind == 3:
                key = random.choice(("temperature", "label_smoothing", "reduction", "target"))
                options[key] = junk(random)
            elif kind == 4:
                logits[0] = random.choice((logits[0].int(), logits[0][0:0], logits[0].flatten(), 1))
            else:
                logits = random.choice(([], logits[0], None, 3))
        inputs = [z.requires_grad_() for z in logits] if isinstance(logits, list) and all(
            isinstance(z, torch.Tensor) and z.is_floating_point() for z in logits
        ) else logits  # fmt: skip
        losses = mutual_loss(inputs, labels, **options)
        # Of other temperatures float32 has too few digits, or for a huge z / T too few powers.
        if options.get("temperature", 1.0) in ((1.0, 4.0) if wild else (0.5, 1.0, 4.0)):
            agree(losses, exact, labels, options, wild)
        losses.sum().backward()
        if not wild and losses.isfinite().all():
            assert all(z.grad is None or z.grad.isfinite().all() for z in inputs)

    return check
