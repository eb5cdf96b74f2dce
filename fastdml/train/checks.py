"""Checks before a run has a folder: processes, packages, the first batch of training and test."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdml import cohort_files
from fastdml.cohort import REMEDY, Cohort, check_logits
from fastdml.data import dataset_names
from fastdml.data.image_set import IGNORED
from fastdml.engine.amp import Amp
from fastdml.errors import InputError, one_line, require
from fastdml.eval_mode import evaluating
from fastdml.grouped_loss import GroupedLoss
from fastdml.loss import MutualLoss
from fastdml.parallel import RemotePeer
from fastdml.torch_private import wraps_compiled
from fastdml.train.batches import Batches, described, first_batch, noun, sizes
from fastdml.train.config.base import TrainConfig
from fastdml.train.tasks.task import task_of

logger = logging.getLogger(__name__)

# Variables in which launchers tell each process how many there are: torchrun; Open MPI; MPICH,
# Intel MPI and relatives; MVAPICH; srun (SLURM_NTASKS is set in a batch script too, which is one
# process).
WORLD_SIZES = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


def one_process(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses to train where several processes were started: each would train the same run."""
    sizes = {name: environment[name] for name in WORLD_SIZES if name in environment}
    several = [f"{name}={size}" for name, size in sizes.items() if size.strip() != "1"]
    if not sizes and "RANK" in environment:
        several = [f"RANK={environment['RANK']}"]
    if not several and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        several = [f"torch.distributed has {dist.get_world_size()} processes"]
    if several:
        raise InputError(
            f"started as one of several processes ({several[0]}), each of which would train the "
            "same run: say how they share it (--mesh peer=2,data=2, or mesh= of fit), or start one "
            "process, without torchrun, srun or mpirun"
        )


def extras(config: TrainConfig) -> None:
    """Imports every optional package that a run will need, so that none is missing after hours."""
    for module in ("yaml", "tqdm", "safetensors.torch", "matplotlib.figure"):
        require(module, "train")
    if config.policy:
        require("torchvision.transforms.v2", "images")
    if config.wandb:
        require("wandb", "wandb")
    if config.tensorboard:
        require("tensorboard", "train")  # or torch's own error would be that of a torch module
        require("torch.utils.tensorboard", "train")


def arguments(cohort: Any, config: Any) -> None:
    if not isinstance(cohort, Cohort):
        raise InputError(
            f"cohort must be a fastdml.Cohort, not a {type(cohort).__name__}: make one, for "
            "instance Cohort(['resnet32', 'resnet32'], num_classes=10)"
        )
    if not isinstance(config, TrainConfig):
        raise InputError(
            f"config must be a TrainConfig, not a {type(config).__name__}: make one, for instance "
            "TrainConfig(epochs=10)"
        )
    for name, peer in zip(cohort.names, cohort.peers, strict=True):
        if any(map(nn.parameter.is_lazy, peer.parameters())):
            raise InputError(
                f"peer {name} has lazy layers, whose weights are not there yet: call it on a batch "
                "before the cohort is made"
            )
    if config.groups not in (1, cohort.groups):
        raise InputError(
            f"groups={config.groups}: the cohort was made with {cohort.groups}: make it with "
            f"Cohort(..., groups={config.groups}), and leave the setting out"
        )
    if next(cohort.parameters(), None) is None:
        raise InputError("the peers have no parameters, so that there is nothing to train")


def groups(cohort: Cohort, config: TrainConfig, on_a_mesh: bool) -> None:
    """Refuses groups of peers where they would learn from each other, or not be told apart."""
    if config.groups != cohort.groups:  # of a task of the user's
        raise InputError(
            f"groups={config.groups}, and {task_of(config).title} runs made {cohort.groups}: their "
            "prepare must make Cohort(..., groups=config.groups)"
        )
    if cohort.groups > 1 and on_a_mesh:
        raise InputError(
            f"groups={cohort.groups} on a mesh: the groups share one device; train without a mesh"
        )


def keeps_groups_apart(loss: MutualLoss, groups: int) -> None:
    """Refuses another task's loss, in which groups of peers would learn from each other."""
    if groups > 1 and not isinstance(loss, GroupedLoss):
        raise InputError(
            f"groups={groups}: a {type(loss).__name__} does not keep groups of peers apart; train "
            "without groups"
        )


def first_look(cohort: Cohort, train: Batches, config: TrainConfig, amp: Amp) -> Tensor:
    """The inputs of the first batch, after checking that every peer can be trained on them; the
    cohort then records the shape and normalisation of images, and the classes."""
    check = task_of(config).check_labels
    images, _ = first_batch(train, cohort.num_classes, check=check)
    part = images[: max(1, len(images) // config.accumulate)]
    for name, peer in _here(cohort):
        _try_evaluation(name, peer, part, cohort.num_classes, amp)
        _try_training(name, peer, part, cohort.num_classes, amp)
    cohort.image_shape = None
    if images.dim() == 4:  # else the inputs are no images
        cohort.image_shape = tuple(images.shape[1:])
        cohort.in_channels = images.shape[1]
    cohort_files.check_savable(cohort, shards=cohort.mesh is not None)
    cohort.record()  # refuses values that the caller set and that do not fit
    for name, value in described(train, cohort.in_channels).items():
        before = getattr(cohort, name)
        setattr(cohort, name, value)
        try:
            cohort.record()
        except InputError:  # names or numbers that do not fit these images
            setattr(cohort, name, before)
    for teacher in cohort.teachers:
        teacher.match(cohort.record())
        logits = _try_evaluation(
            teacher.name, teacher, part, cohort.num_classes, amp, role="teacher"
        )
        _can_teach(teacher.name, logits)
    return images


def _here(cohort: Cohort) -> list[tuple[str, nn.Module]]:
    """The peers that this process holds, with their names."""
    pairs = zip(cohort.names, cohort.peers, strict=True)
    return [(name, peer) for name, peer in pairs if not isinstance(peer, RemotePeer)]


def test_look(cohort: Cohort, test: Batches, config: TrainConfig, amp: Amp, what: str) -> Tensor:
    """Checks that every peer can be evaluated on the first batch, before an epoch is trained, and
    that its labels mean what they do in training. what: "test" or "validation", for messages.
    Returns its labels."""
    same_images(cohort, test, what)
    images, labels = first_batch(test, cohort.num_classes, what, task_of(config).check_labels)
    for name, peer in _here(cohort):
        _try_evaluation(name, peer, images, cohort.num_classes, amp, f"{what} ")
    return labels


def all_labelled(labels: Tensor, what: str) -> None:
    """Refuses labels of rows to be scored among which some are missing."""
    missing = int((labels == IGNORED).sum())
    if missing:
        raise InputError(
            f"{what} data: {missing} of {len(labels)} rows have no label ({IGNORED}), so that they "
            "cannot be scored: leave them out"
        )


def same_images(cohort: Cohort, test: Batches, what: str = "test") -> None:
    """Refuses test batches whose classes, or their order, differ from those that `cohort` has
    recorded; another normalisation is logged."""
    found, known = described(test, cohort.in_channels), cohort.record()
    names = found.get("classes")
    if known["classes"] and names and names != known["classes"]:
        pairs = enumerate(zip_longest(known["classes"], names))
        k, (ours, theirs) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
        raise InputError(
            f"the {what} data have other classes than the training data, or another order: label "
            f"{k} is {ours!r} in training and {theirs!r} in the {what}"
        )
    for name in ("mean", "std"):
        if known[name] and found.get(name, known[name]) != known[name]:
            logger.warning(
                "the %s images are normalised by another %s than the training images", what, name
            )


def _try_evaluation(
    name: str,
    peer: nn.Module,
    images: Tensor,
    num_classes: int,
    amp: Amp,
    what: str = "",
    role: str = "peer",
) -> Tensor:
    try:
        with evaluating(peer), torch.inference_mode(), amp.autocast():
            logits = peer(images)
    except Exception as error:  # whatever a peer's code may raise
        raise InputError(
            f"{role} {name} fails on {what}{noun(images)}s {tuple(images.shape)}: {one_line(error)}"
            f"{_of_another_type(peer, images)}"
        ) from error
    check_logits(name, logits, images, num_classes, REMEDY, role=role)
    return logits


def _can_teach(name: str, logits: Tensor) -> None:
    if not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise InputError(f"teacher {name} gives logits of {kind}: wrap it, and cast them to float")
    if bad := int(logits.isnan().any(1).sum()):
        raise InputError(
            f"teacher {name} gives logits with NaN for {bad} of the {len(logits)} first inputs: "
            "nobody can learn from it, so leave it out"
        )


def _of_another_type(peer: nn.Module, images: Tensor) -> str:
    """The remedy for images whose dtype is not that of the peer's weights."""
    weights = next((p.dtype for p in peer.parameters() if p.is_floating_point()), images.dtype)
    if images.dtype == weights:
        return ""
    have, want = (str(dtype).removeprefix("torch.") for dtype in (images.dtype, weights))
    what = f"{noun(images)}s"
    convert = f"{what}.float()" if weights == torch.float32 else f"{what}.to(torch.{want})"
    return f"; the {what} are {have} and its weights {want}: {convert} in the data set mends that"


def _try_training(name: str, peer: nn.Module, images: Tensor, num_classes: int, amp: Amp) -> None:
    """A forward pass with gradients on a copy, so that the peer's statistics and counters stay."""
    twin = copied(peer)
    if twin is None:
        return
    try:
        with amp.autocast():
            logits = twin(images)
        if isinstance(logits, Tensor) and logits.requires_grad:
            logits.float().sum().backward()
    except Exception as error:
        raise InputError(
            f"peer {name} fails on {noun(images)}s {tuple(images.shape)} in training: "
            f"{one_line(error)}"
        ) from error
    check_logits(name, logits, images, num_classes, REMEDY, " in training")


def copied(peer: nn.Module) -> nn.Module | None:
    """A copy in training mode; None where it cannot be copied, or compiling it would take
    minutes."""
    if any(map(wraps_compiled, peer.modules())):
        return None
    try:
        return copy.deepcopy(peer).train()
    except Exception:
        return None


def kinds_of(cohort: Cohort) -> list[str]:
    """The architecture of each peer, by its name or its class."""
    pairs = zip(cohort.models, cohort.peers, strict=True)
    return [model or type(peer).__name__ for model, peer in pairs]


def recorded(
    config: TrainConfig,
    cohort: Cohort,
    train: Batches,
    images: Tensor,
    validation: Any = None,
    *,
    kinds: Sequence[str],
    rows: int,
) -> TrainConfig:
    """`config` for the caller's own data: the settings of data and augmentation replaced by those
    that the loader has. validation: what the best weights are chosen on, as `fit` takes it. kinds:
    of the peers, see `kinds_of`. rows: of a whole batch, of which `images` may be a share."""
    if config.validation:
        raise InputError(
            f"validation={config.validation:g} divides the data sets that fastdml knows by name: "
            "of your own, give the images to validate on as validation=, and leave the setting out"
        )
    if config.labelled or config.unlabelled:
        name = "labelled" if config.labelled else "unlabelled"
        raise InputError(
            f"{name}={getattr(config, name)} is for the data sets that fastdml knows by name: of "
            "your own, give the inputs without labels as unlabelled=, and leave the setting out"
        )
    label = "own data" if config.data in dataset_names() else config.data.partition(":")[0]
    kind = f"{noun(images)}s {sizes(images.shape[1:])}"
    if not images.is_floating_point():  # sequences may be of any length
        kind = f"{noun(images)}s of {str(images.dtype).removeprefix('torch.')}"
    validated = "" if validation is None else ", with validation"
    labelled: Any = getattr(train, "labelled", train)
    augment = getattr(labelled, "augment", None)  # of fastdml's loaders
    changes: dict[str, Any] = {
        "data": f"{label}: {len(train)} batches of {rows}, {kind}{validated}",
        "download": False,
        "subset": 0,
        "batch_size": rows,
        "pad": getattr(augment, "pad", 0),
        "flip": bool(getattr(augment, "flip", False)),
        "augment": getattr(labelled, "policy", None) or "standard",
        "peers": tuple(kinds),
        "groups": cohort.groups,
        "teachers": tuple(teacher.source or teacher.name for teacher in cohort.teachers),
    }
    changes |= task_of(config).recorded(cohort, train, images)
    return config.replace(**changes)
