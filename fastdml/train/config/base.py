"""The settings of a training run: one frozen dataclass for Python, YAML and the command line.

Defaults are the paper's for CIFAR-100. The line below each field is its help text on the command
line. A value from anywhere passes the same checks; an unknown key is refused with the nearest known
one. `fastdml.train.config.reid` has what re-identification adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastdml.errors import InputError
from fastdml.paths import expand
from fastdml.peer_groups import check_groups
from fastdml.train.config.fields import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Limit,
    check_limit,
    check_names,
    convert,
    documented,
    field_types,
)
from fastdml.train.config.mesh_sizes import MeshSizes, read_mesh
from fastdml.yaml_file import write_settings

if TYPE_CHECKING:
    from typing_extensions import Self


@documented
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run; the defaults are the paper's for CIFAR-100.

    The same names are options of `fastdml train`, keys of a YAML file and arguments of
    `fastdml.train.cifar100` and its like. Values are converted and checked when a TrainConfig is
    made: InputError names the one that is wrong, and what it may be.
    """

    # --- data ---
    data: str = "cifar100"
    """Data set: digits, cifar10 or cifar100."""
    root: str = "data"
    """Folder of the data set's files (digits needs none)."""
    download: bool = False
    """Fetch the data set into `root` where it is missing, checked by its MD5."""
    subset: int = 0
    """Train on this many images, evenly of each class; 0 means all. Paper: all."""
    validation: float = 0.0
    """Training images kept to choose the best weights: below 1 a share, else a number; 0: none."""
    labelled: int = 0
    """Semi-supervised: so many training images keep their labels, evenly of each class, of which
    validation is taken; the others lose theirs, and peers imitate each other on them. 0: all."""
    unlabelled: str = ""
    """Semi-supervised: a folder of images without labels, in it or deeper, on which peers imitate
    each other."""
    unlabelled_share: float = 0.5
    """Share of each batch that has no labels, where labelled or unlabelled is given; 0: they are
    not used. An epoch then shows as many images as there are of both kinds."""
    batch_size: int = 64
    """Images a step; the last short batch of an epoch is left out. Paper: 64."""
    pad: int = 4
    """Pixels of reflected border that the random crop moves in; 0 means no crop. Paper: 4."""
    flip: bool = True
    """Mirror half of the training images, at random. Paper: yes."""
    augment: Literal["none", "standard", "trivial", "rand"] = "standard"
    """standard: crop and mirror, as pad and flip say; none: neither; trivial, rand: torchvision's
    TrivialAugmentWide or RandAugment before these, by worker processes. Paper: standard."""
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    """Where batches come from. auto: from the device's memory if they fit, else streamed."""

    # --- peers and loss ---
    peers: tuple[str, ...] = ("resnet32", "resnet32")
    """Models to train together; a name given twice is two peers with different initial weights."""
    groups: int = 1
    """Equal groups of consecutive peers that do not learn from each other: several seeds in one
    run. Group g, from 0 on, begins with the weights of seed + g; all see the batches of seed."""
    teachers: tuple[str, ...] = ()
    """Frozen networks that teach too: RUN, RUN:PEER or timm:NAME (pretrained). Paper: no."""
    cache_teachers: bool = False
    """Ask teachers once for each image and keep what they say on the disk; with augment none."""
    pretrained: bool = False
    """Begin with timm's weights, a new head on top; for peers called timm:NAME. Paper: no."""
    temperature: float = 1.0
    """The peers imitate softmax(z / T); the KL term is multiplied by T squared. Paper: 1."""
    temperature_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How temperature goes to temperature_end over the steps of the run."""
    temperature_end: float | None = None
    """The temperature at the last step; needs a temperature_schedule that is not constant."""
    temperature_warmup_epochs: float = 0.0
    """Epochs in which the temperature first goes linearly from 1, fractions allowed."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels. Paper: 1."""
    kl_weight: float = 1.0
    """Weight of the mean KL divergence from the other peers. Paper: 1."""
    kl_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How kl_weight goes to kl_weight_end over the steps of the run. Paper: constant."""
    kl_weight_end: float | None = None
    """The kl_weight at the last step; needs a kl_schedule that is not constant."""
    kl_warmup_epochs: float = 0.0
    """Epochs in which kl_weight first rises linearly from 0, fractions allowed. Paper: 0."""
    target: Literal["peers", "ensemble", "ensemble_logits"] = "peers"
    """What a peer imitates: each other peer, the mean of their probabilities (DML_e) or the softmax
    of their mean logits. Paper: peers."""
    gate: Literal["none", "correct", "best", "confidence", "entropy"] = "none"
    """Who teaches on an image: all; who is right; the best, of lowest cross-entropy; all, weighted
    by the probability of the label, or by how sure they are. Paper: none."""
    divergence: Literal["forward", "reverse", "jeffreys", "jsd"] = "forward"
    """KL from the teacher to the student (forward), from the student to the teacher (reverse), the
    mean of both, or the divergence of Jensen and Shannon with jsd_beta. Paper: forward."""
    jsd_beta: float = 0.5
    """The teacher's share of the mixture in jsd: 0 is forward, 1 is reverse."""
    label_smoothing: float = 0.0
    """Share of the label's probability spread over all classes, 0 to 1. Paper: 0."""
    update: Literal["simultaneous", "sequential"] = "simultaneous"
    """Together, or one by one with predictions recomputed (Algorithm 1, 2K - 1 forward passes)."""
    independent: bool = False
    """Then train the same peers without KL, same start and batches; report both runs."""

    # --- optimizer ---
    optimizer: Literal["sgd", "adam", "adamw", "apex_sgd", "apex_adam", "apex_lamb"] = "sgd"
    """One optimizer over all peers; apex_* are NVIDIA Apex's fused ones. Paper: sgd."""
    lr: float = 0.1
    """Learning rate at the start. Paper: 0.1."""
    momentum: float = 0.9
    """Momentum of sgd and apex_sgd; the first beta of the others. Paper: 0.9."""
    nesterov: bool = True
    """Nesterov momentum (sgd and apex_sgd only). Paper: yes."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters. Not stated in the paper; reproductions use 5e-4."""
    epochs: int = 200
    """Passes over the training images. Paper: 200."""
    iterations: int = 0
    """Steps of the run, in place of epochs, which is 0 then. 0: as many as the epochs make."""
    schedule: Literal["step", "cosine"] = "step"
    """Learning rate: dropped in steps, or half a cosine to 0 over all epochs. Paper: step."""
    lr_drop_every: int = 60
    """Epochs between two drops (step schedule); 0: none. Paper: 60."""
    lr_drops: tuple[int, ...] = ()
    """Epochs after which the rate drops, in place of lr_drop_every (step schedule)."""
    lr_drop_factor: float = 0.1
    """What a drop multiplies the learning rate by (step schedule). Paper: 0.1."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0, fractions allowed. Paper: 0."""
    grad_clip: float = 0.0
    """Largest norm of one peer's gradient; 0 means no clipping. Paper: 0."""
    accumulate: int = 1
    """Equal parts that each batch is computed in, to use less memory. Paper: 1."""
    ema: float = 0.0
    """Decay of averaged weights, which are then what is evaluated and saved; 0: none. Paper: 0."""

    # --- speed ---
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda or cuda:N."""
    execution: Literal["auto", "eager", "threads", "streams", "graph", "stacked"] = "auto"
    """How a step runs. auto: the fastest by a short measurement; by a rule where deterministic."""
    threads: int = 0
    """Threads of a CPU. 0: OMP_NUM_THREADS if set, else measured at the start with execution."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Precision of the peers. auto: bf16 if the hardware has it, fp16 on older CUDA, else off."""
    compile: bool = False
    """Compile the peers with torch.compile (minutes at the start, faster steps)."""
    profile: bool = False
    """Record ten steps: trace.json (for Chrome) and profile.txt, in the run's folder."""

    # --- several devices ---
    mesh: str = ""
    """peer=P,data=D: P * D processes, the peers spread over P rows of them, each batch over D
    columns; auto: chosen and balanced by measured times. Empty: one process."""
    timeout: float = 300.0
    """Seconds that a process waits for another before the job ends."""
    max_restarts: int = 0
    """How often a job that lost a process starts again by itself, from its last checkpoint."""
    sync_batchnorm: bool = False
    """BatchNorm over the whole batch instead of each column's share of it."""
    exchange: Literal["logits", "weights"] = "logits"
    """What peers on other devices send: their logits, or their weights, of which copies are kept
    and run (codistillation)."""
    exchange_every: int = 1
    """Steps between two exchanges. With logits the KL term exists on those steps only, with weights
    the copies are as old. Paper: 1."""
    fsdp: bool = False
    """Split the weights of each peer over the columns (FSDP2), for peers too large for a device."""

    # --- reproducibility ---
    seed: int = 0
    """Fixes initial weights, order and augmentation."""
    deterministic: bool = False
    """Runs repeat bit for bit: deterministic algorithms, execution and threads by rule; slower."""

    # --- the run ---
    folder: str | None = None
    """Folder of the run, made anew. Default: runs/DATA-PEERS-NNN, the next free number."""
    resume: bool = False
    """Go on, bit for bit, with the run in `folder` (default: the newest of these peers)."""
    dry_run: bool = False
    """Build everything, run one step, print what would happen, write nothing."""
    eval_every: int = 1
    """Epochs between two evaluations, on validation images if any, else on the test images."""
    patience: int = 0
    """End after so many evaluations without a better one (needs validation images); 0: never."""
    log_every: int = 50
    """Steps between two readings of the losses (each waits for the device); 0: once an epoch."""
    save_every_steps: int = 0
    """Steps between two checkpoints; 0: none by count. Every epoch ends with one anyway."""
    save_every_minutes: float = 10.0
    """Minutes between two checkpoints; 0: none by time."""
    keep_checkpoints: int = 2
    """Checkpoints kept of a run on a mesh, the newest; and that of the best weights."""
    progress: bool = False
    """Show the progress bar even where the output is not a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    csv: bool = False
    """Write metrics.csv, a row an epoch, beside metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases too, by its own client; WANDB_MODE=offline keeps it on the disk."""
    figures: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)
    """Formats of the pictures, curves and pairwise_kl."""

    # Weights of the losses between peers, which a peer alone does not have. Pictures know only
    # a run's settings, and know these by name: kl_weight, and names that end in "mutual_weight".
    mutual_weights: ClassVar[tuple[str, ...]] = ("kl_weight",)
    limits: ClassVar[dict[str, Limit]] = {
        "subset": NOT_NEGATIVE,
        "validation": (
            lambda x: 0 <= x < 1 or x == int(x) >= 1,
            "a share below 1, a whole number of images, or 0",
        ),
        "labelled": NOT_NEGATIVE,
        "unlabelled_share": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
        "batch_size": COUNT,
        "groups": COUNT,
        "pad": NOT_NEGATIVE,
        "temperature": POSITIVE,
        "temperature_end": (lambda x: x is None or x > 0, "above 0, or none"),
        "temperature_warmup_epochs": NOT_NEGATIVE,
        "ce_weight": NOT_NEGATIVE,
        "kl_weight": NOT_NEGATIVE,
        "kl_weight_end": (lambda x: x is None or x >= 0, "0 or more, or none"),
        "kl_warmup_epochs": NOT_NEGATIVE,
        "jsd_beta": FRACTION,
        "label_smoothing": FRACTION,
        "lr": POSITIVE,
        "momentum": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
        "weight_decay": NOT_NEGATIVE,
        "epochs": NOT_NEGATIVE,
        "iterations": NOT_NEGATIVE,
        "lr_drop_every": NOT_NEGATIVE,
        "lr_drop_factor": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
        "warmup_epochs": NOT_NEGATIVE,
        "grad_clip": NOT_NEGATIVE,
        "accumulate": COUNT,
        "ema": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
        "seed": (lambda x: 0 <= x < 2**63, "within 0..2**63-1"),
        "threads": (lambda x: 0 <= x <= 1024, "within 0..1024"),
        "timeout": POSITIVE,
        "max_restarts": NOT_NEGATIVE,
        "exchange_every": COUNT,
        "eval_every": COUNT,
        "patience": NOT_NEGATIVE,
        "log_every": NOT_NEGATIVE,
        "save_every_steps": NOT_NEGATIVE,
        "save_every_minutes": NOT_NEGATIVE,
        "keep_checkpoints": COUNT,
    }

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = convert(name, getattr(self, name), hint)
            if name in ("root", "folder", "unlabelled") and value:
                value = expand(value)
            object.__setattr__(self, name, value)
            check_limit(name, value, self.limits)
        self._check_augment()
        self._check_shares()
        self._check_losses()
        self._check_schedules()
        self._check_steps()
        self._check_length()
        self._check_mesh()

    def _check_augment(self) -> None:
        if self.augment == "none" and (self.pad or self.flip):
            what = f"pad {self.pad}" if self.pad else "flip"
            raise InputError(
                f"augment none and {what} contradict each other: leave {what.split()[0]} out (in a "
                "TrainConfig: pad=0, flip=False), or set augment to standard"
            )

    def _check_shares(self) -> None:
        """Raises InputError where a batch has no place for one of both kinds of images."""
        rows, share = self.unlabelled_rows, self.unlabelled_share
        if (self.labelled or self.unlabelled) and share and not 0 < rows < self.batch_size:
            raise InputError(
                f"unlabelled_share {share:g} of batch_size {self.batch_size} is {rows} images: "
                "give a share that leaves one of each kind at least, or a larger batch"
            )

    def check_gate(self) -> None:
        """Raises InputError for a gate that shuts out rows without a label, for a training that has
        some."""
        if self.unlabelled_share and self.gate in ("correct", "best", "confidence"):
            raise InputError(
                f"gate {self.gate} goes by labels, so that nobody would teach on images without "
                "one: set gate to none or entropy"
            )

    def _check_losses(self) -> None:
        """Raises InputError where there are no peers, no loss for one of them, or options of the
        loss that do not go together."""
        if self.labelled or self.unlabelled:
            self.check_gate()
        if self.divergence != "jsd" and self.jsd_beta != 0.5:
            raise InputError(
                f"jsd_beta {self.jsd_beta:g} has no effect with divergence {self.divergence}: set "
                "divergence to jsd, or leave jsd_beta out"
            )
        if not self.peers:
            raise InputError("peers is empty: name at least one model, for instance resnet32")
        self._check_groups()
        if self.groups == 1 or self.peers != type(self).peers:
            self.check_peers()

    def check_peers(self) -> None:
        """Raises InputError for groups that the peers do not make, and where one of them has no
        loss. Of groups of the default peers only a run by names asks: `fit` has a cohort's."""
        check_groups(self.groups, self.peers)
        alone = self.independent or (len(self.peers) == self.groups and not self.teachers)
        weights = [
            name
            for name in field_types(type(self))
            if name.endswith("_weight") and not (alone and name in self.mutual_weights)
        ]
        rises = not alone and self.kl_weight_end
        if not rises and not any(getattr(self, name) for name in weights):
            learner = "a peer by itself" if alone else "the peers"
            raise InputError(
                f"{' = '.join(weights)} = 0: {learner} would learn nothing; give a weight above 0"
            )

    def _check_groups(self) -> None:
        """Raises InputError for groups that would not be seeds."""
        chosen = [n for n in ("subset", "validation", "labelled") if getattr(self, n)]
        if self.groups > 1 and chosen:
            raise InputError(
                f"groups {self.groups} with {chosen[0]} {getattr(self, chosen[0]):g}: the seed "
                "chooses these images, and groups of other seeds share them; train each seed in a "
                "run of its own"
            )

    def _check_schedules(self) -> None:
        """Raises InputError for schedules of the loss's numbers that lack a part."""
        for kind, end in (
            ("kl_schedule", "kl_weight_end"),
            ("temperature_schedule", "temperature_end"),
        ):
            chosen, last = getattr(self, kind), getattr(self, end)
            if chosen == "constant" and last is not None:
                raise InputError(
                    f"{end} {last:g} has no effect with {kind} constant: set {kind} to linear or "
                    f"cosine, or leave {end} out"
                )
            if chosen != "constant" and last is None:
                raise InputError(f"{kind} {chosen} needs {end}, the value at the last step")

    def _check_steps(self) -> None:
        if self.optimizer in ("sgd", "apex_sgd") and self.nesterov and self.momentum == 0:
            raise InputError("nesterov needs momentum above 0: set momentum, or nesterov to false")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate "
                f"({self.accumulate})"
            )
        if self.accumulate > 1 and self.update == "sequential":
            raise InputError("accumulate above 1 needs update simultaneous, not sequential")

    def _check_length(self) -> None:
        """How long the run is, and what happens after so many epochs of it."""
        if not self.epochs and not self.iterations:
            raise InputError("epochs must be 1 or more, not 0")
        if self.epochs and self.iterations:
            raise InputError(
                f"epochs ({self.epochs}) and iterations ({self.iterations}) both say how long: "
                "set one of them to 0"
            )
        for name in ("warmup_epochs", "kl_warmup_epochs", "temperature_warmup_epochs"):
            warmup = getattr(self, name)
            if warmup > self.epochs and not self.iterations:
                raise InputError(f"{name} ({warmup:g}) must not exceed epochs ({self.epochs})")
        drops = list(self.lr_drops)
        if any(drop < 1 for drop in drops) or drops != sorted(set(drops)):
            raise InputError(f"lr_drops must be rising numbers of epochs, not {drops}")

    def _check_mesh(self) -> None:
        """Raises InputError for a mesh that cannot be read, or that an option does not go with."""
        sizes = self.mesh_sizes
        if self.mesh and self.groups > 1:
            raise InputError(
                f"groups {self.groups} with mesh {self.mesh}: the groups share one device; give "
                "each a run, and with it devices, of its own"
            )
        if self.mesh and self.update == "sequential":
            raise InputError(
                f"mesh {self.mesh} needs update simultaneous: sequential, one peer after the "
                "other, leaves all other processes waiting"
            )
        if sizes is None or self.accumulate == 1:
            return
        for column in range(sizes.data):
            start, stop = (self.batch_size * (column + i) // sizes.data for i in (0, 1))
            if (stop - start) % self.accumulate:
                raise InputError(
                    f"batch_size {self.batch_size} over data={sizes.data} is {stop - start} images "
                    f"a column, which do not split into accumulate={self.accumulate} equal parts: "
                    f"set batch_size to a multiple of {sizes.data * self.accumulate}"
                )

    @property
    def mesh_sizes(self) -> MeshSizes | None:
        """Rows and columns that `mesh` names; None where it is empty or auto."""
        return read_mesh(self.mesh)

    @property
    def unlabelled_rows(self) -> int:
        """Images of a batch that have no label, where there are any."""
        return round(self.unlabelled_share * self.batch_size)

    @property
    def policy(self) -> str | None:
        """torchvision's part of the augmentation, as loaders take it."""
        return self.augment if self.augment in ("trivial", "rand") else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and checkpoints hold them."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed; unknown ones are refused by name."""
        check_names(changes, type(self))
        return dataclasses.replace(self, **completed(changes))

    def alone(self) -> Self:
        """The settings of the independent run: the same peers without the losses between them, and
        without teachers."""
        constant = {"kl_schedule": "constant", "kl_weight_end": None, "kl_warmup_epochs": 0.0}
        none = dict.fromkeys(self.mutual_weights, 0.0)
        frozen = {"teachers": (), "cache_teachers": False}
        return self.replace(**none, **constant, **frozen, independent=False)

    def save(self, path: Path) -> None:
        write_settings(path, self.to_dict())


def completed(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """`changes` with what they imply for settings that they do not give. Of epochs alone, or
    iterations alone, the other is 0: what is given wins over a default in the other unit. Augment
    none turns off crop and flip."""
    if changes.get("augment") == "none":
        changes = {"pad": 0, "flip": False, **changes}
    for name, other in (("epochs", "iterations"), ("iterations", "epochs")):
        if name in changes and other not in changes and changes[name] not in (0, "0"):
            return {**changes, other: 0}
    return changes
