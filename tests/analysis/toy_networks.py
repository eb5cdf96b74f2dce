"""Networks whose loss is known in closed form."""

from __future__ import annotations

import torch
from torch import nn


class Quadratic(nn.Module):
    """Its cross-entropy with label 1 of 2 classes is c + (w - w0)' H (w - w0) / 2, in float64,
    whatever the inputs: softplus(z) is that for z = log(exp(loss) - 1)."""

    def __init__(self, weights, hessian, centre=0.0, c=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weights, dtype=torch.float64).reshape(1, -1))
        self.hessian = torch.as_tensor(hessian, dtype=torch.float64)
        self.centre, self.c = centre, c

    def loss(self, weight=None):
        w = (self.weight if weight is None else weight).reshape(-1) - self.centre
        return self.c + w @ self.hessian @ w / 2

    def forward(self, x):
        z = torch.log(torch.expm1(self.loss()))
        return torch.stack([z, torch.zeros_like(z)]).expand(len(x), 2)


def label_one(rows=4):
    return [(torch.zeros(rows, 1), torch.ones(rows, dtype=torch.int64))]


def small_conv(seed=0, classes=4):
    """A convolution with BatchNorm, and a linear layer; with running statistics of its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 8, 8) * 2 + 1)
    return model.eval()


def images(rows=48, classes=4, seed=0, batch=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    y = torch.randint(classes, (rows,), generator=generator)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def state_of(model):
    """A copy of everything an analysis might leave changed."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    return tensors, modes


def same_state(model, before):
    tensors, modes = state_of(model)
    return modes == before[1] and all(
        torch.equal(value.view(torch.uint8), before[0][name].view(torch.uint8))
        if value.dim()
        else torch.equal(value, before[0][name])
        for name, value in tensors.items()
    )
