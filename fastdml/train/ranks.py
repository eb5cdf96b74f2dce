"""What differs between a training by one process and one by the ranks of a mesh.

`OneProcess` decides everything by itself and does nothing else; `Ranks` does the same among the
ranks of a mesh, all of which make the same calls in the same order. Rank 0, the lead, alone writes
and speaks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdml import host
from fastdml.engine import Ema, cpus
from fastdml.engine.auto import Choice
from fastdml.errors import InputError
from fastdml.logs import LOGGER
from fastdml.parallel import (
    averaged_statistics,
    make_mesh,
    separate_batchnorm,
    shard,
    sync_batchnorm,
    total,
)
from fastdml.parallel.agreement import Agreement
from fastdml.parallel.failure import explained
from fastdml.parallel.node_turns import wait_for, working
from fastdml.parallel.shards import is_sharded
from fastdml.report.metrics_log import MetricsLog
from fastdml.report.summary import versions
from fastdml.train import checks
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.mesh_sizes import MeshSizes
from fastdml.train.mesh_choice import measured, remember, rows_before, settings_before, sizes_of
from fastdml.train.peer_costs import peer_seconds

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.engine.amp import Amp
    from fastdml.engine.execution import Step, StepOutput
    from fastdml.parallel import Mesh
    from fastdml.train.batches import Batches
    from fastdml.train.trainer import Trainer

logger = logging.getLogger(__name__)

T = TypeVar("T")
FOLDER = "folder"  # of the run, in the launcher's store
RUNS = count()  # of this process, which a script that is started again makes in the same order
# Settings that may differ among the ranks: where things are on a machine, and what is shown.
OF_A_NODE = frozenset(["root", "unlabelled", "teachers", "device", "threads", "progress"])


class OneProcess:
    """A training by one process."""

    mesh: Mesh | None = None
    lead = True  # whether this process writes and speaks
    device: torch.device | None = None  # of this process, where the mesh says it

    @property
    def sizes(self) -> str:
        """Of the mesh, as the setting has them."""
        return ""

    # --- decisions ---

    def ask(self, flags: int) -> int:
        """Once a step: the flags that are to be heeded now."""
        return flags

    def settle(self, flags: int) -> int:
        """The flags that any process has raised up to now."""
        return flags

    def done(self, flags: int) -> None:
        """What these flags asked for is done."""

    def decided(self, choose: Callable[[], T]) -> T:
        """What the lead chooses, a plain value; the others do not call the function."""
        return choose()

    # --- sums ---

    def sum(self, t: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the host."""
        return t

    def min(self, t: Tensor) -> Tensor:
        """The least over all processes."""
        return t

    def holds(self, k: int) -> bool:
        """Whether the weights of peer k are in this process."""
        return True

    @property
    def first_row(self) -> bool:
        """Whether this process counts what belongs to no peer."""
        return True

    # --- the parts of a training ---

    def rows(self, shown: int, batches: Batches) -> int:
        """The rows of a step's whole batch. shown: those that this process sees."""
        return shown

    def metrics_log(self, *arguments: Any, **options: Any) -> Any:
        return MetricsLog(*arguments, **options)

    def step_options(self, config: TrainConfig, threads: int | None) -> dict[str, Any]:
        """What `make_step` is given more. threads: of a CPU's steps, as the settings have them."""
        return {"threads": threads}

    def choice(self, step: Step) -> Choice:
        """What a step runs as that leaves nothing to choose."""
        return Choice(step.name)

    def whole(self, output: StepOutput) -> StepOutput:
        """A step's output of which this process has a share."""
        return output

    def stands_at(self, step: Step, position: int) -> None:
        """So many steps are done: tells a step whose next one depends on that."""

    def described(self, trainer: Trainer) -> dict[str, Any] | None:
        """The mesh and what it sends, for the summary; None without one."""
        return None

    def keep_averages(self, cohort: Cohort, ema: Ema | None) -> None:
        """Gives running statistics that processes have of their own the mean of all, for good."""

    def threads(self, wanted: int) -> int:
        """Of this process outside of steps. wanted: the setting, 0: as many as there are CPUs."""
        return wanted or cpus.sensible()

    # --- a run ---

    @property
    def share(self) -> dict[str, int]:
        """Which rows of a batch this process sees, as loaders take it."""
        return {}

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Within it the lead alone logs what is no error, and a rank that is lost is named."""
        yield

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Within it one process a node is first, and the others follow when it is done."""
        yield

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises InputError, one line that names what differs, where the ranks do not have the same
        plain values."""

    def begun(self, config: TrainConfig) -> TrainConfig:
        """The settings of this run: compared among the ranks, with the mesh that there is; those of
        a run to go on with where the launcher has started its ranks again."""
        return config

    def measured(self, cohort: Cohort, train: Batches, amp: Amp) -> OneProcess:
        """The ranks as a mesh that suits what a step of each peer takes, measured here; these where
        that is theirs."""
        return self

    def found_folder(self, folder: Path) -> None:
        """Tells ranks that a launcher starts again where the run is."""

    @contextmanager
    def distributed(
        self, cohort: Cohort, train: Batches, config: TrainConfig, amp: Amp, give_back: bool
    ) -> Iterator[dict[str, Tensor] | None]:
        """Within it this process holds its own peers, on its device. give_back: at the end the
        cohort has all of them again, with the weights that were trained, but for sharded ones, of
        which no rank can hold all: those stay where and as they are. Gives the lead the weights
        of all peers where an independent run begins with them, None: those are in the cohort."""
        cohort.to(amp.device)
        yield None

    def prepare_layers(self, cohort: Cohort, config: TrainConfig) -> None:
        """Changes layers that see the whole batch, before there is an optimizer."""


class Ranks(OneProcess):
    """A training by the ranks of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh: Mesh = mesh
        self.lead, self.device = mesh.lead, mesh.device
        self.agreement = Agreement(mesh)
        self.run = next(RUNS)

    @property
    def sizes(self) -> str:
        return str(MeshSizes(self.mesh.peer, self.mesh.data))

    def ask(self, flags: int) -> int:
        return self.agreement.ask(flags)

    def settle(self, flags: int) -> int:
        return self.agreement.settle(flags)

    def done(self, flags: int) -> None:
        self.agreement.done(flags)

    def decided(self, choose: Callable[[], T]) -> T:
        """What the lead refuses is refused everywhere, by the same line."""
        found: Any = None
        if self.lead:
            try:
                found = {"value": choose()}
            except InputError as error:
                self.mesh.share({"refused": str(error)})
                raise
        found = self.mesh.share(found)
        if "refused" in found:
            raise InputError(found["refused"])
        return found["value"]

    def sum(self, t: Tensor) -> Tensor:
        return self._reduced(t, dist.ReduceOp.SUM)

    def min(self, t: Tensor) -> Tensor:
        return self._reduced(t, dist.ReduceOp.MIN)

    def _reduced(self, t: Tensor, how: Any) -> Tensor:
        t = t.clone()
        dist.all_reduce(t, how, group=self.mesh.control)
        return t

    def holds(self, k: int) -> bool:
        return k in self.mesh.local

    @property
    def first_row(self) -> bool:
        return self.mesh.row == 0

    def rows(self, shown: int, batches: Batches) -> int:
        return batches.batch_size or shown * self.mesh.data

    def metrics_log(self, *arguments: Any, **options: Any) -> Any:
        return MetricsLog(*arguments, **options) if self.lead else Silent()

    def choice(self, step: Step) -> Choice:
        threads = None if self.mesh.device.type == "cuda" else torch.get_num_threads()
        return Choice(step.name, threads, threads)

    def whole(self, output: StepOutput) -> StepOutput:
        found: Any = total(output, self.mesh)
        return found

    def stands_at(self, step: Any, position: int) -> None:
        step.number = position

    def step_options(self, config: TrainConfig, threads: int | None) -> dict[str, Any]:
        return {  # threads are torch's number, which the run has set
            "mesh": self.mesh,
            "seed": config.seed,
            "exchange": config.exchange,
            "exchange_every": config.exchange_every,
        }

    def described(self, trainer: Trainer) -> dict[str, Any]:
        sent = torch.tensor([trainer.step.exchange.sent], dtype=torch.float64)
        steps = max(1, trainer.progress.position - (trainer.progress.first or 0))
        return {
            "peer": self.mesh.peer,
            "data": self.mesh.data,
            "ranks": self.mesh.world,
            "rows": list(self.mesh.rows),
            "bytes_a_step": float(self.sum(sent)) / steps,
        }

    def keep_averages(self, cohort: Cohort, ema: Ema | None) -> None:
        tensors = [*cohort.buffers(), *(ema.averages if ema else [])]
        with torch.no_grad():
            with averaged_statistics(cohort, self.mesh, ema):
                means = [t.clone() for t in tensors]
            for t, mean in zip(tensors, means, strict=True):
                t.copy_(mean)

    def threads(self, wanted: int) -> int:
        """A setting is of each rank; else the machine's CPUs are divided among its ranks."""
        share = max(1, host.cpus() // self.mesh.local_world)
        return wanted or cpus.asked() or min(share, cpus.most())

    @contextmanager
    def speaking(self) -> Iterator[None]:
        before = LOGGER.level
        if not self.lead:
            LOGGER.setLevel(logging.ERROR)
        try:
            with explained(self.mesh):
                yield
        finally:
            LOGGER.setLevel(before)

    @property
    def share(self) -> dict[str, int]:
        return {"rank": self.mesh.column, "world": self.mesh.data}

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        mesh, name = self.mesh, "prepared"
        first = mesh.rank - mesh.local_rank
        if mesh.rank != first:
            wait_for(mesh, name, [first])
        with working(mesh, name):
            yield
        wait_for(mesh, name, range(mesh.world))

    def check_same(self, facts: Mapping[str, Any]) -> None:
        found = self.mesh.gather(facts)
        for rank, other in enumerate(found):
            for name, value in other.items():
                if value != found[0].get(name):
                    raise InputError(
                        f"rank {rank} has another {name} than rank 0: {str(value)[:60]}, not "
                        f"{str(found[0].get(name))[:60]}: start all ranks with the same"
                    )

    def begun(self, config: TrainConfig) -> TrainConfig:
        mesh = self.mesh
        shown = {n: v for n, v in config.to_dict().items() if n not in OF_A_NODE}
        self.check_same({**versions(), **shown})
        folder = mesh.share(self._folder_before())
        if folder is not None:
            config = config.replace(folder=folder, resume=True)
        return config.replace(mesh=self.sizes, timeout=mesh.timeout)

    @property
    def _key(self) -> str:
        return f"{FOLDER}/{self.run}"

    def _folder_before(self) -> str | None:
        """Of an attempt before this one of the same job, on the lead."""
        store = self.mesh.job_store
        if not self.lead or store is None or not store.check([self._key]):
            return None
        return store.get(self._key).decode()

    def found_folder(self, folder: Path) -> None:
        if self.lead and self.mesh.job_store is not None:
            self.mesh.job_store.set(self._key, str(folder))
            remember(self.mesh)

    @contextmanager
    def distributed(
        self, cohort: Cohort, train: Batches, config: TrainConfig, amp: Amp, give_back: bool
    ) -> Iterator[dict[str, Tensor] | None]:
        mesh, initial, device = self.mesh, None, next(cohort.parameters()).device
        K = len(cohort)
        before = self.decided(lambda: rows_before(config, K, mesh.peer))
        if len(mesh.rows) != K and before is not None:
            mesh.put(tuple(before))
        elif len(mesh.rows) != K:
            sizes = [float(sum(w.numel() for w in peer.parameters())) for peer in cohort]
            # A device may not hold a peer that is to be sharded, to measure it.
            costs = sizes if config.fsdp else None
            if mesh.peer > 1 and not config.fsdp:
                costs = self._costs(cohort, train, amp)
            mesh.place(K, costs)
        if config.independent and any(map(is_sharded, cohort.peers)):
            raise InputError(
                "independent starts a second time from the first weights, and these peers are "
                "sharded already: give them whole, with fsdp=True"
            )
        if config.independent and self.lead:
            initial = {n: t.detach().to("cpu", copy=True) for n, t in cohort.state_dict().items()}
        taken = mesh.distribute(cohort, keep=config.exchange == "weights")
        sharded = config.fsdp or any(map(is_sharded, cohort.peers))
        if sharded:  # before they move, since a device may not hold a whole peer
            if config.sync_batchnorm:
                sync_batchnorm(cohort, mesh)
            shard(cohort, mesh)
        cohort.to(mesh.device)
        if sharded or not give_back:
            taken.clear()
        try:
            yield initial
        except BaseException:  # of this rank alone, perhaps: nothing can be collected
            for k, peer in taken.items():
                cohort.peers[k] = peer
            cohort.mesh = None
            raise
        separate_batchnorm(cohort)
        if give_back and not sharded:
            mesh.collect(cohort, taken)
            cohort.to(device)

    def measured(self, cohort: Cohort, train: Batches, amp: Amp) -> OneProcess:
        mesh = measured(self.mesh, self._costs(cohort, train, amp))
        if mesh is self.mesh:
            return self
        found = Ranks(mesh)
        found.run = self.run
        return found

    def _costs(self, cohort: Cohort, train: Batches, amp: Amp) -> list[float] | None:
        """What a step of each peer takes, measured on the lead, where peers differ."""
        if len(set(cohort.models)) == 1:
            return None
        if not self.lead:
            return None
        images, device = next(iter(train.epoch(0)))[0], next(cohort.parameters()).device
        found = []
        for peer in cohort:  # of which there may be more than the device holds
            found.append(peer_seconds([peer.to(amp.device)], images, amp))
            peer.to(device)
        return None if None in found else [each[0] for each in found if each]

    def prepare_layers(self, cohort: Cohort, config: TrainConfig) -> None:
        if config.sync_batchnorm:
            sync_batchnorm(cohort, self.mesh)


def ranks_of(config: TrainConfig, K: int, mesh: Mesh | None = None) -> OneProcess:
    """The ranks of a mesh that the caller made, or that `config` asks for, or one process. K: the
    number of peers. Raises InputError where the processes that there are do not fit."""
    if mesh is None and not config.mesh and not _begun_on_a_mesh(config):
        checks.one_process()
        for name in ("exchange", "exchange_every", "fsdp", "sync_batchnorm"):
            if (value := getattr(config, name)) != getattr(TrainConfig, name):
                raise InputError(
                    f"{name}={value} is for peers on several devices: give mesh, or leave {name} "
                    "out"
                )
        return OneProcess()
    if config.cache_teachers:
        raise InputError(
            "cache_teachers does not go with a mesh, whose ranks see shares of the batches: leave "
            "it out, and every rank runs the teachers"
        )
    if mesh is None:
        mesh = make_mesh(*sizes_of(config, K), timeout=config.timeout, device=config.device)
    return Ranks(mesh)


def _begun_on_a_mesh(config: TrainConfig) -> bool:
    """Whether the run to go on with had one: its steps go on as they were, on one process too."""
    before = settings_before(config)
    return before is not None and bool(before.mesh)


class Silent:
    """In the place of a metrics log, on ranks that write none."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def log(self, *values: Any, **more: Any) -> None:
        pass

    def sync(self) -> None:
        pass
