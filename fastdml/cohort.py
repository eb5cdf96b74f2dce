"""The cohort: K peers as one module. Building them costs their initialisation on the CPU.

cohort_files.py has what is written on disk, cohort_export.py the files for other programs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, combinations
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdml import cohort_export, cohort_files, image_record
from fastdml.absent_tensors import lacks_values
from fastdml.cohort_export import Format
from fastdml.cohort_teachers import Identity, Teacher, as_teachers
from fastdml.errors import InputError
from fastdml.models import ReidHead
from fastdml.models.create import check_count, create_model
from fastdml.models.own import is_own
from fastdml.names import unique
from fastdml.paths import expanded
from fastdml.peer_groups import check_groups, check_one_ensemble

REMEDY = "wrap it in a module that returns {it}"  # where a peer returns more than its logits


class Cohort(nn.Module):
    """K peers that see the same images and give K logits of the same shape.

    peers: names for `create_model`, modules, or a mix. A module that is built twice from one seed,
    or passed twice, would learn nothing from its twin and is refused. `len`, iteration and an index
    go over the peers.
    num_classes: needed where the peers are names.
    seed: peer k is built from (seed, k) alone, whatever its neighbours are; torch's global
    generator is left as it was.
    head: the re-identification head that peers given by name get; `embed` and metric losses need
    one. A module brings its own (`logits_and_features` and `embed`, as `ReidModel` has them).
    pretrained: peers begin with timm's weights; all must be models of timm.
    image_size: (height, width) that timm's networks of one size are built for.
    groups: that the peers are, equal ones of consecutive peers, which do not learn from each other
        in a training, and each of which is an ensemble of its own: several seeds in one run. A peer
        that is given by its name begins as it would in a cohort of its group alone, of the seed
        `seed + g` in group g, counted from 0. Groups name the same models.
    teachers: frozen networks that the peers learn from as well: trained modules that give logits
        (N, num_classes) of the peers' images, which are frozen and put into evaluation mode; and
        timm:NAME, with the classifier and the weights that timm has for it, which needs `mean` and
        `std` (below) to be known when a step is made. They are no peers: `len`, iteration,
        `parameters`, `state_dict` and files leave them out; `to` and its like move them.

    Raises InputError for names that mean no model, class counts that differ or are not given,
    peers that start alike, teachers that are peers or share something with one, and values out of
    range.

    Attributes: `peers`, the modules; `names`, unique names for display; `models`, the name each
    peer was built from (None for a module); `num_classes`; `in_channels`; `head`; `image_size`;
    `teachers`, a tuple, which may be assigned before a step is made; `groups`.

    Six more attributes describe the images that the peers were trained on; each is None until it
    is known. Training records them at the first batch, if the batches tell; set the others before
    training. `save`, `load` and `export` keep them:
    image_shape: (channels, height, width) of a batch's images, after any resizing and cropping.
    mean, std: a number a channel, that a pixel is normalised by, in units of the pixel as it is
        stored: 0 to 255 for bytes (digits: 0 to 16).
    classes: a name for each of the `num_classes` logits, in their order.
    resize: how images of another size were brought to that shape: "crop" resizes them until they
        cover it and cuts out the middle, "stretch" changes their proportions.
    stored: (height, width) that files were decoded to before that, where it is not their shape.
    """

    peers: nn.ModuleList
    names: list[str]
    models: list[str | None]
    num_classes: int
    in_channels: int
    head: ReidHead | None
    image_size: tuple[int, int] | None
    groups: int = 1  # an earlier version's pickle has none
    image_shape: Sequence[int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    classes: Sequence[str] | None
    resize: str | None
    stored: Sequence[int] | None
    # Tuples, which torch does not take for modules of this one; a pickle of old has neither.
    _teachers: tuple[Teacher, ...] = ()
    _taught_by: Sequence[Identity] = ()
    # The `parallel.Mesh` that the peers are spread over; `Mesh.distribute` sets it.
    mesh: Any = None

    def __init__(
        self,
        peers: Sequence[str | nn.Module],
        num_classes: int | None = None,
        *,
        in_channels: int = 3,
        seed: int = 0,
        head: ReidHead | None = None,
        pretrained: bool = False,
        image_size: Sequence[int] | None = None,
        groups: int = 1,
        teachers: Sequence[str | nn.Module] = (),
    ) -> None:
        super().__init__()
        peers = _listed(peers)
        if not peers:
            raise InputError("a cohort needs at least one peer; name one, such as resnet32")
        if not isinstance(seed, Integral) or seed < 0:
            raise InputError(f"seed must be a whole number of at least 0, not {seed!r}")
        if num_classes is not None:
            check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        if image_size is not None:
            image_size = cohort_files.height_and_width(image_size)

        check_groups(groups, [p if isinstance(p, str) else type(p).__name__ for p in peers])
        self.groups = int(groups)
        size = len(peers) // self.groups
        self.models = [peer if isinstance(peer, str) else None for peer in peers]
        self.names = unique([p if isinstance(p, str) else type(p).__name__ for p in peers])
        self.in_channels = in_channels
        self.head = head
        self.image_size = image_size
        self.image_shape = self.mean = self.std = self.classes = self.resize = self.stored = None
        self.num_classes = int(self._common_class_count(peers, num_classes))
        self.peers = nn.ModuleList(
            p
            if not isinstance(p, str)
            else _build(
                *(p, self.num_classes, in_channels, seed + k // size, k % size),
                *(head, pretrained, image_size),
            )
            for k, p in enumerate(peers)
        )
        self._check_peers_differ()
        self.teachers = teachers

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        return self._teachers

    @teachers.setter
    def teachers(self, teachers: Sequence[str | nn.Module]) -> None:
        self._teachers, self._taught_by = as_teachers(teachers, self), ()

    @property
    def taught_by(self) -> list[Identity]:
        """Which teachers these weights have learnt from, as far as known: those at hand, or those
        that a file names. The digests of weights are computed at the first reading."""
        return [t.identity() for t in self._teachers] or [*self._taught_by]

    @taught_by.setter
    def taught_by(self, identities: Sequence[Identity]) -> None:
        self._taught_by = [*identities]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cohort:
        """Moves the teachers too: `to`, `cuda`, `float` and their like come by here."""
        for teacher in self._teachers:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __len__(self) -> int:
        return len(self.peers)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.peers)

    def __getitem__(self, k: int) -> nn.Module:
        return self.peers[k]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (N, in_channels, H, W) -> K logits (N, C). InputError where a peer returns other than
        one tensor (N, C)."""
        logits = tuple(peer(x) for peer in self.peers)
        for name, z in zip(self.names, logits, strict=True):
            check_logits(name, z, x, self.num_classes, REMEDY)
        return logits

    def ensemble(self, x: Tensor) -> Tensor:
        """Mean of the peers' probabilities in float32, (N, C). InputError where they are several
        groups."""
        check_one_ensemble(self)
        return torch.stack([z.float().softmax(dim=1) for z in self(x)]).mean(dim=0)

    def embed(self, x: Tensor) -> list[Tensor]:
        """x: (N, in_channels, H, W) -> K tensors (N, D_k): what each peer compares images by.
        InputError where a peer has no re-identification head."""
        peers: Iterable[Any] = self.peers
        for name, peer in zip(self.names, peers, strict=True):
            check_embeds(name, peer)
        return [peer.embed(x) for peer in peers]

    def record(self) -> dict[str, Any]:
        """`image_shape`, `mean`, `std`, `classes` and `stored` as plain lists, and `resize`, None
        where unknown; InputError where they are not of their kind, or do not fit each other."""
        values = {name: getattr(self, name) for name in image_record.FIELDS}
        return image_record.checked_record(values, self.num_classes)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `cohort.json` (what the peers are) and `peers/NN-name.safetensors` (their weights
        and nothing else); an interrupted save never leaves a file half written.

        Files are completed under temporary names first and renamed together; cohort.json comes
        last and holds each file's SHA-256, so `load` notices a mix of two saves. Raises InputError,
        before any file is written, for peers that the files cannot hold (see `check_savable`) and
        for a folder that cannot be written to; MissingExtra without safetensors.
        """
        cohort_files.save(self, folder)

    def description(self) -> dict[str, Any]:
        """What cohort.json says, in plain values, without the digests of files."""
        return cohort_files.describe(self)

    def check_savable(self) -> None:
        """Raises InputError for peers whose state is more than whole tensors in this process:
        safetensors holds nothing else, such as the result of a `get_extra_state`."""
        cohort_files.check_savable(self)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        device: str | torch.device = "cpu",
        *,
        peers: Sequence[str | nn.Module] | None = None,
    ) -> Cohort:
        """The cohort that `save` wrote, on `device` and in evaluation mode.

        peers: what to load into, in order. Needed where a peer was a module, or came from
        package.module:function: a file must not decide which code is imported.

        Raises InputError for files that are absent, damaged, of two saves, or not of these peers.
        """
        folder = expanded(folder)
        description = cohort_files.read_description(folder / "cohort.json")
        read = partial(cohort_files.read_peer, folder)
        return cls._rebuilt(description, folder, read, device, peers)

    @classmethod
    def restore(
        cls,
        description: dict[str, Any],
        weights: dict[str, Tensor],
        path: Path,
        device: str | torch.device = "cpu",
        *,
        peers: Sequence[str | nn.Module] | None = None,
    ) -> Cohort:
        """As `load`, from a cohort's `description` and `state_dict`. path: of the file that held
        them, for messages. Raises InputError."""
        description = cohort_files.checked_description(lambda: dict(description), path)

        def read(k: int, entry: dict[str, str]) -> tuple[dict[str, Tensor], Path]:
            own = f"peers.{k}."
            return {n.removeprefix(own): w for n, w in weights.items() if n.startswith(own)}, path

        return cls._rebuilt(description, path, read, device, peers)

    @classmethod
    def _rebuilt(
        cls,
        description: dict[str, Any],
        place: Path,
        read: Callable[[int, dict[str, str]], tuple[dict[str, Tensor], Path]],
        device: str | torch.device,
        peers: Sequence[str | nn.Module] | None,
    ) -> Cohort:
        """read: the tensors of a peer, and the file they are from."""
        entries = description["peers"]
        sources: list[Any] = [e["model"] for e in entries] if peers is None else _listed(peers)
        if len(sources) != len(entries):
            raise InputError(f"{place} holds {len(entries)} peers, and peers= has {len(sources)}")

        modules = []
        for k, (entry, source) in enumerate(zip(entries, sources, strict=True)):
            name = entry["name"]
            if peers is None and (source is None or is_own(source)):
                raise InputError(
                    f"peer {name} of {place} is your own code ({source or 'a module'}): say what "
                    "to load into, a name or a module for each (peers= of Cohort.load, names only: "
                    "--peers of the command)"
                )
            if isinstance(source, str):
                source = _build(
                    source,
                    description["num_classes"],
                    description["in_channels"],
                    seed=0,
                    k=k,
                    head=description["head"],
                    pretrained=False,
                    image_size=description["image_size"],
                )
            weights, path = read(k, entry)
            cohort_files.load_peer(source, name, weights, path)
            modules.append(source)

        same = {key: description[key] for key in ("in_channels", "head", "image_size", "groups")}
        cohort = cls(modules, description["num_classes"], **same)
        cohort.names = [entry["name"] for entry in entries]
        cohort.models = [entry["model"] for entry in entries]
        for name in image_record.FIELDS:
            setattr(cohort, name, description[name])
        cohort.taught_by = description["teachers"]
        return cohort.to(device).eval()

    def export(
        self,
        folder: str | os.PathLike,
        example: Tensor | None = None,
        format: Format = "onnx",
        *,
        peer: str | int = "all",
    ) -> list[Path]:
        """Writes peers, in evaluation mode, for other programs, and returns the files' paths:
        NN-name.onnx, NN-name.pt2 (format="torch-export") or NN-name.safetensors.

        Input "images": (N, in_channels, H, W), normalised; N, in ONNX called "batch", stays free.
        Output: "logits" (N, C), or of a peer with a re-identification head "features" (N, D), as
        `embed` gives them; its logits are those of the identities that it was trained on.
        example: images of the size to export for; by default that of `image_shape`. Of modules any
        input (N, ...).
        peer: "all", each in a file; a name or number; or "ensemble", all in one file, ensemble.onnx
        and so on, whose output are "probabilities" (N, C), or features concatenated.

        What is known of the images, as `record` gives it, goes into the file as JSON: in ONNX as
        metadata of these names, in torch's as the extra file images.json, in safetensors with all
        that `fastdml.load` needs under "fastdml" in the header. Beside safetensors model_NN_name.py
        makes the network without fastdml, of peers given by name.

        Each file is run before it gets its name, ONNX by ONNX Runtime where that is installed:
        outputs may differ by 1e-4 (of outputs above 10, by 1e-5 of the largest). The differences
        are logged. A file of the same name is replaced. Needs memory for three copies of what is
        exported. Raises InputError for a peer that cannot be exported, which it names, or a file
        that computes something else, and MissingExtra without the packages of the extra `onnx`.
        """
        return cohort_export.export(self, folder, example, format, peer)

    def _common_class_count(self, peers: Sequence[str | nn.Module], num_classes: int | None) -> int:
        counts: dict[str, int] = {}
        for name, peer in zip(self.names, peers, strict=True):
            if isinstance(peer, str):
                continue
            count = getattr(peer, "num_classes", None)
            if not isinstance(count, int) and num_classes is None:
                # The last linear layer, as registered, is the head of nearly every classifier;
                # `forward` checks the shape and says so if it was not.
                linear = [m for m in peer.modules() if isinstance(m, nn.Linear)]
                count = linear[-1].out_features if linear else None
            if isinstance(count, int):
                counts[name] = count
        found = {*counts.values()} if num_classes is None else {*counts.values(), num_classes}
        if not found:
            raise InputError("num_classes is needed: nothing in the peers says how many there are")
        if len(found) > 1:
            each = ", ".join(f"{name} has {count}" for name, count in counts.items())
            asked = "" if num_classes is None else f"num_classes is {num_classes}, "
            raise InputError(
                f"all peers must have the same number of classes: {asked}{each}; "
                "build them with one num_classes"
            )
        return found.pop()

    def _check_peers_differ(self) -> None:
        remedy = "give names, as in Cohort(['resnet32', 'resnet32'], 100), or build each afresh"
        for (a, first), (b, second) in combinations(enumerate(self.peers), 2):
            if first is second:
                raise InputError(f"peers {a} and {b} are the same module; {remedy}")
            ours, theirs = [*first.parameters()], [*second.parameters()]
            if any(map(lacks_values, chain(ours, theirs))):
                continue  # they get their values later
            shared = {id(p) for p in ours} & {id(p) for p in theirs}
            if shared:
                raise InputError(f"peers {a} and {b} share {len(shared)} parameters; {remedy}")
            if [p.shape for p in ours] != [p.shape for p in theirs]:
                continue
            pairs = zip(ours, theirs, strict=True)
            if ours and all(torch.equal(p, q.to(p.device)) for p, q in pairs):
                raise InputError(
                    f"peers {a} and {b} start with identical parameters (a deepcopy?) and would "
                    f"never differ; {remedy}"
                )


def check_embeds(name: str, peer: nn.Module) -> None:
    """Raises InputError for a peer without a re-identification head."""
    if not hasattr(peer, "embed"):
        raise InputError(
            f"peer {name} has no re-identification head: build the cohort with head=ReidHead()"
        )


def check_logits(
    name: str,
    out: object,
    x: object,
    num_classes: int,
    remedy: str,
    when: str = "",
    role: str = "peer",
) -> None:
    """Raises InputError for an output that is not one tensor (N, C). Looks at shapes only, which
    does not wait for the device.

    x: the inputs, whose number is compared where it is known. remedy: where `out` holds more than
    the logits; `{it}` in it becomes the expression that picks them. when: such as " in training".
    role: "peer" or "teacher".
    """
    n = x.shape[0] if isinstance(x, Tensor) else None
    if isinstance(out, Tensor) and out.shape[1:] == (num_classes,) and n in (None, len(out)):
        return
    batch = "a batch"
    if isinstance(x, Tensor):
        batch = f"{n} {'image' if x.dim() == 4 else 'input'}s"
    got, it = type(out).__name__, "its logits"
    if isinstance(out, Tensor):
        got, remedy = str(tuple(out.shape)), "num_classes of the cohort and of the peer must be one"
    elif hasattr(out, "logits"):
        it = "out.logits"
    elif isinstance(out, Mapping):
        it = f"out[{next(iter(out), None)!r}]"
        got += f" of {', '.join(map(str, out))}"
    elif isinstance(out, Sequence):
        it = "out[0]"
    raise InputError(
        f"{role} {name} must return logits (N, {num_classes}), and for {batch}{when} returned "
        f"{got}: {remedy.format(it=it)}"
    )


def _build(
    name: str,
    num_classes: int,
    in_channels: int,
    seed: int,
    k: int,
    head: ReidHead | None,
    pretrained: bool,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """The model `name` with the weights that belong to (seed, k), on the CPU."""
    state = int(np.random.SeedSequence((seed, k)).generate_state(1)[0])
    # Only the CPU generator is seeded, and restored: torch.manual_seed would also reset CUDA's.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(state)
        return create_model(
            name,
            num_classes,
            in_channels=in_channels,
            head=head,
            pretrained=pretrained,
            image_size=image_size,
        )


def _listed(peers: Sequence[str | nn.Module]) -> list[str | nn.Module]:
    if isinstance(peers, (str, nn.Module)) or not isinstance(peers, Iterable):
        one = type(peers).__name__ if isinstance(peers, nn.Module) else repr(peers)
        raise InputError(f"peers must be a list, such as ['resnet32', 'resnet32'], not {one}")
    peers = list(peers)
    for k, peer in enumerate(peers):
        if not isinstance(peer, (str, nn.Module)):
            raise InputError(
                f"peer {k} is a {type(peer).__name__}, neither a model name nor a torch module"
            )
    return peers
