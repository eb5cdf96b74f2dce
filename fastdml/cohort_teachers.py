"""Frozen networks that teach the peers of a cohort and learn nothing themselves.

A teacher costs a forward pass a step and its weights; no activation is kept, and nothing of it
stands in an optimizer, an average or a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdml.absent_tensors import absence
from fastdml.errors import InputError
from fastdml.models.timm_models import pretrained_classifier
from fastdml.names import unique

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

TIMM = "timm:"


class Identity(NamedTuple):
    """What is written of a teacher; its weights never are."""

    name: str
    source: str | None  # what finds it again: RUN:PEER, a file or timm:NAME; None of a module
    model: str | None  # the name that it was built from, None of a module
    sha256: str  # of its weights: see `digest`


class Teacher(nn.Module):
    """`network` as a teacher: images as the peers get them -> logits (N, C), without a gradient.

    It is in evaluation mode whatever anyone sets, its weights take no gradients, and its forward
    pass keeps no activations.

    record: what is known of the images that it was trained on, as `Cohort.record` gives it; None
    where it is to take the peers' images as they are.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        source: str | None = None,
        model: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()
        self.name, self.source, self.model, self.record = name, source, model, record
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self._images: dict[str, Any] | None = None  # those that it is fitted to
        self._sha256: str | None = None

    def twin(self) -> Teacher:
        """The same network for another cohort, whose names and images may be others."""
        twin = Teacher(
            self.network,
            name=self.name,
            source=self.source,
            model=self.model,
            record=self.record,
        )
        twin._sha256 = self._sha256
        return twin

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        if any(m.training for m in self.network.modules()):  # its owner may have called train()
            self.network.eval()
        if self.scale is not None and self.shift is not None:
            x = x * self.scale + self.shift
        return self.network(x)

    def identity(self) -> Identity:
        """Its weights' digest is that of the first call."""
        if self._sha256 is None:
            self._sha256 = digest(self.network)
        return Identity(self.name, self.source, self.model, self._sha256)

    def match(self, images: Mapping[str, Any]) -> None:
        """Fits it to the peers' images, described as `Cohort.record` does: where it was trained on
        the same pixels by another normalisation, its forward pass undoes theirs and does its own,
        which is exact but for the rounding of one multiplication and one addition.

        Raises InputError where it was trained on other classes or another size, and where nothing
        says how one of the two normalises.
        """
        if images == self._images:
            return  # a step that was captured goes on with its tensors
        own, scale, shift = self.record, None, None
        if own is not None:
            _check_classes(self.name, own["classes"], images["classes"])
            _check_shape(self.name, own["image_shape"], images["image_shape"])
            if any(own[key] != images[key] for key in ("mean", "std")):
                scale, shift = self._renormalisation(own, images)
        self.scale, self.shift, self._images = scale, shift, dict(images)

    def _renormalisation(self, own: Mapping[str, Any], images: Mapping[str, Any]) -> list[Tensor]:
        """The factor and the summand, a number a channel, that undo the peers' normalisation and
        do its own. Raises InputError where one of these is not known."""
        if None in (own["mean"], own["std"], images["mean"], images["std"]):
            unknown, remedy = "the peers' images", "set mean and std of the cohort before training"
            if None in (own["mean"], own["std"]):
                unknown = f"those of teacher {self.name}"
                remedy = "give its module as the teacher, which then gets the images as they are"
            raise InputError(
                f"teacher {self.name} and the peers are to see the same images, and nothing says "
                f"how {unknown} were normalised: {remedy}"
            )
        (m, s), (mean, std) = (
            [torch.tensor(record[key], dtype=torch.float64) for key in ("mean", "std")]
            for record in (own, images)
        )
        device = next((t.device for t in chain(self.parameters(), self.buffers())), None)
        return [t.to(device, torch.float32).view(-1, 1, 1) for t in (std / s, (mean - m) / s)]


def _check_classes(name: str, own: Sequence[str] | None, theirs: Sequence[str] | None) -> None:
    if own is None or theirs is None or list(own) == list(theirs):
        return
    k = next(k for k, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b)
    raise InputError(
        f"teacher {name} was trained on other classes, or in another order: class {k} is "
        f"{own[k]!r} for it and {theirs[k]!r} for the peers"
    )


def _check_shape(name: str, own: Sequence[int] | None, theirs: Sequence[int] | None) -> None:
    if own is None or theirs is None or list(own) == list(theirs):
        return
    was, now = ("x".join(map(str, shape)) for shape in (own, theirs))
    remedy = "train the peers on that size, or take another teacher"
    if name.startswith(TIMM):
        remedy = f"write {name}@{own[1]} to have it resize them"
    raise InputError(
        f"teacher {name} was trained on images of {was}, and those of the peers are {now}, of "
        f"which its own cannot be made: {remedy}"
    )


def digest(network: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a network's weights and buffers."""
    found = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            found.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def listed_teachers(found: Iterable[str | nn.Module]) -> list[str | nn.Module]:
    """`found` as a list. Raises InputError for a name or a module, which may be iterable too."""
    if isinstance(found, (str, nn.Module)) or not isinstance(found, Iterable):
        one = type(found).__name__ if isinstance(found, nn.Module) else repr(found)
        raise InputError(f"teachers must be a list, such as ['timm:resnet18'], not {one}")
    return [*found]


def as_teachers(found: Iterable[str | nn.Module], cohort: Cohort) -> tuple[Teacher, ...]:
    """The teachers of a cohort, on its device: each a `Teacher`, a module that gives logits, or
    timm:NAME with its pretrained weights. Raises InputError, see `Cohort`."""
    teachers = [_teacher(k, one, cohort) for k, one in enumerate(listed_teachers(found))]
    names = unique([*cohort.names, *(t.name for t in teachers)])[len(cohort.names) :]
    for teacher, name in zip(teachers, names, strict=True):
        teacher.name = name
        _check_counts(teacher, cohort)
    _check_apart(teachers, cohort)
    device = next((w.device for w in cohort.parameters()), None)
    return tuple(teacher.to(device) for teacher in teachers)


def _teacher(k: int, found: str | nn.Module, cohort: Cohort) -> Teacher:
    if isinstance(found, Teacher):
        return found.twin()
    if isinstance(found, str):
        if not found.startswith(TIMM):
            raise InputError(
                f"teacher {found!r} has no trained weights: name one of timm's as timm:NAME, or "
                "give a trained module (a run's peers: [*fastdml.load(RUN).peers])"
            )
        network, record = pretrained_classifier(found.removeprefix(TIMM))
        return Teacher(network, name=found, source=found, model=found, record=record)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"teacher {k} is a {type(found).__name__}, neither timm:NAME nor a torch module"
        )
    peers = getattr(found, "peers", None)
    if isinstance(peers, nn.ModuleList):  # a cohort, or what fastdml.load gives
        raise InputError(
            f"teacher {k} is a {type(found).__name__}, which gives no logits (N, C): its peers do, "
            "teachers=[*it.peers]"
        )
    for key, t in chain(found.named_parameters(), found.named_buffers()):
        if (why := absence(t)) is not None:
            raise InputError(f"{key} of teacher {k} is {why}")
    return Teacher(found, name=type(found).__name__)


def _check_counts(teacher: Teacher, cohort: Cohort) -> None:
    count = getattr(teacher.network, "num_classes", None)
    if isinstance(count, int) and count != cohort.num_classes:
        raise InputError(
            f"teacher {teacher.name} tells {count} classes apart, and the peers "
            f"{cohort.num_classes}: it cannot teach them"
        )


def _check_apart(teachers: Sequence[Teacher], cohort: Cohort) -> None:
    """Raises InputError for a teacher that has a module or a tensor of a peer, which would be
    frozen with it, or of another teacher."""
    owners: dict[int, str] = {}
    for name, peer in zip(cohort.names, cohort.peers, strict=True):
        owners |= dict.fromkeys(_parts(peer), f"peer {name}")
    for teacher in teachers:
        for part, what in _parts(teacher.network).items():
            if part in owners:
                raise InputError(
                    f"teacher {teacher.name} and {owners[part]} share {what}: a teacher is a "
                    "network of its own, such as a copy.deepcopy of a trained one"
                )
        owners |= dict.fromkeys(_parts(teacher.network), f"teacher {teacher.name}")


def _parts(network: nn.Module) -> dict[int, str]:
    """The modules, parameters and buffers below a network by identity, each in words."""
    found: dict[int, str] = {id(m): f"the module {n}" for n, m in network.named_modules() if n}
    found |= {id(t): f"the weight {n}" for n, t in network.named_parameters()}
    found |= {id(t): f"the buffer {n}" for n, t in network.named_buffers()}
    return {id(network): "all their weights", **found}
