"""Whole runs, each into a folder: data, peers and one or two phases of training.

A run folder holds config.yaml, from before the first step last.ckpt (on a mesh checkpoints/),
metrics.jsonl, tensorboard/, and at the end cohort.json and peers/ (the last weights), curves.png,
pairwise_kl.png, summary.json and, of classification, predictions.npz; best/ has the weights of the
epoch with the highest mean accuracy, or mAP, of the peers. Where validation images chose them, the
summary's table reports the best weights; where the test images did, which flatters, the last ones.
With `independent` there is also initial.ckpt, the weights both phases start from, and independent/,
a run folder of its own. The empty .lock keeps a second process out while one trains.

On a mesh every rank runs this, with peers of its own and its share of each batch; rank 0 makes the
folder and alone writes what is not a peer's.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.data import HINT
from fastdml.data.loaders.torch_workers import naming_dead_workers
from fastdml.devices import choose_device
from fastdml.engine.amp import resolve_amp
from fastdml.errors import InputError
from fastdml.files import writing
from fastdml.logs import held
from fastdml.parallel import Mesh
from fastdml.parallel.shards import is_sharded
from fastdml.report import plots
from fastdml.report.metrics_log import INDEPENDENT
from fastdml.report.summary import write_summary
from fastdml.terminal import lenient_stderr
from fastdml.train import checkpoint, checks
from fastdml.train.batches import Batches, as_batches
from fastdml.train.callbacks import Callback, check_callbacks
from fastdml.train.config.base import TrainConfig
from fastdml.train.dryrun import plan
from fastdml.train.evaluations import concluding, evaluations, keep_predictions
from fastdml.train.group_folders import write_group_folders
from fastdml.train.ranks import OneProcess, ranks_of
from fastdml.train.result import TrainResult
from fastdml.train.run_folder import (
    alone_in,
    check_new_folder,
    new_folder,
    resume_folder,
)
from fastdml.train.saving import accumulate_on
from fastdml.train.stopping import Stop, listening
from fastdml.train.tasks.task import Evaluate, Prepared, Task, prepared, scoring_of, task_of
from fastdml.train.teachers import taught, untaught
from fastdml.train.trainer import Trainer
from fastdml.train.unlabelled import with_unlabelled
from fastdml.yaml_file import CONFIG

logger = logging.getLogger(__name__)


def run(
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    hint: str = HINT,
    command: str = "fastdml.train.run",
) -> TrainResult | None:
    """The run that `config` describes: data, peers, training. None after a dry run. hint: what
    messages say that a download is asked for by. command: what summary.json says was called.
    callbacks: see `Callback`. Raises as `fit` does."""
    callbacks = check_callbacks(callbacks)
    config.check_peers()
    ranks = ranks_of(config, len(config.peers))
    checks.extras(config)
    task = task_of(config)
    with held() as show, ranks.speaking(), ExitStack() as stack:
        auto = config.mesh == "auto"
        config = ranks.begun(config)
        device = ranks.device or choose_device(config.device)

        def prepare(ranks: OneProcess) -> Prepared:
            with ranks.in_turn():
                return stack.enter_context(prepared(task, config, device, hint, **ranks.share))

        ready = prepare(ranks)
        if auto and not (config.resume or config.fsdp):
            amp = resolve_amp(config.amp, device)
            train = _batches(ready.train, None, ready.cohort, device, config, task, ranks)
            chosen = ranks.measured(ready.cohort, train, amp)
            if chosen is not ranks:  # whose share of a batch may be another
                ranks = chosen
                stack.enter_context(ranks.speaking())
                config = config.replace(mesh=ranks.sizes)
                ready = prepare(ranks)
        if config.validation and ready.validation is None:
            raise InputError(
                f"validation={config.validation:g}: {config.data} keeps no validation images; set "
                "validation to 0"
            )
        return _fit(task, ready, config, ranks, show, command, callbacks, device=device)


def fit(
    cohort: Cohort,
    train: Any,
    test: Any | Evaluate | None,
    config: TrainConfig,
    *,
    validation: Any | Evaluate | None = None,
    teachers: Sequence[str | nn.Module] = (),
    unlabelled: Any = None,
    callbacks: Sequence[Callback] = (),
    mesh: Mesh | None = None,
) -> TrainResult | None:
    """Trains `cohort` in place, on the device it is on, and leaves it with the last mutual weights.

    train: a pair of arrays or tensors (inputs, labels); a data set of torch; any sized iterable of
    batches (inputs, labels), such as a DataLoader; or a loader of `fastdml.data`. Inputs are images
    (N, channels, H, W), rows (N, F), token ids (N, L) or whatever the peers take; labels are class
    indices (N,). Of arrays and data sets `config` gives batch size and seed, and such a run resumes
    exactly, unless a data set draws from other generators than torch's; of a DataLoader
    `train.batches` says when it does. test: the same for evaluation, or a function from the cohort
    to its scores, or None. validation: the same again; it chooses the best weights and when to stop
    (`patience`), and `test` is then read at the end alone. teachers: frozen networks that teach in
    this run, beside the cohort's own: modules as `Cohort` takes them, or names as the setting has
    them. unlabelled: inputs without labels, on which the peers imitate each other (semi-supervised
    training): an array (N, ...), a data set or batches of inputs; labels in them are not looked at.
    Beside arrays and data sets `config.unlabelled_share` of each batch is of these, and an epoch
    shows as many samples as there are of both kinds; of a DataLoader each batch is added to one of
    `train`, whose passes are the epochs. A description of the images is saved
    with the weights, see `Cohort`. config: its device is not used; its settings of data and peers
    are replaced in the run's record by those of `train` and `cohort`. callbacks: see `Callback`.
    mesh: of the ranks that all call this, with the same cohort and data, from
    `fastdml.parallel.make_mesh`; config.mesh does the same. batch_size is then that of all, of
    which a DataLoader must give each column its share. Of sharded peers (config.fsdp, or the
    caller's `fully_shard`) each rank keeps its part at the end, and the weights are in the folder.
    Returns None after a dry run.

    Raises InputError, one line with the remedy, for peers, batches, settings or a folder that
    cannot be used; TrainingDiverged, also an InputError, where a loss is no longer finite;
    TrainingStopped, a SystemExit, after a signal, when the checkpoint is written.
    """
    callbacks = check_callbacks(callbacks)
    checks.arguments(cohort, config)
    ranks = ranks_of(config, len(cohort), mesh)
    checks.extras(config)
    task = task_of(config)
    with held() as show, ranks.speaking():
        ready, config = Prepared(cohort, train, test, validation), ranks.begun(config)
        run_of = partial(_fit, task, ready, config, ranks, show, "fastdml.train.fit", callbacks)
        device = ranks.device or next(cohort.parameters()).device
        return run_of(own=True, device=device, teachers=teachers, unlabelled=unlabelled)


def _fit(
    task: Task,
    ready: Prepared,
    config: TrainConfig,
    ranks: OneProcess,
    show: Callable[[], None],
    command: str,
    callbacks: Sequence[Callback],
    *,
    device: torch.device,
    own: bool = False,
    teachers: Sequence[str | nn.Module] = (),
    unlabelled: Any = None,
) -> TrainResult | None:
    """show: shows the log lines that were held back, once nothing can be refused any more. command:
    recorded in summary.json. own: data and peers are the caller's, not those that `config`
    names. teachers: beside the cohort's and the settings' own. unlabelled: of the caller's data."""
    cohort, train, test, validation = ready
    kinds = checks.kinds_of(cohort)
    train = _batches(train, unlabelled, cohort, device, config, task, ranks)
    amp = resolve_amp(config.amp, device)
    with (
        taught(cohort, config, teachers),
        lenient_stderr(),
        naming_dead_workers(),
        _reproducible(config, device, ranks.threads(config.threads)),
        ranks.distributed(cohort, train, config, amp, give_back=own) as initial,
        ExitStack() as stack,
    ):
        # 1. Prepare: refuse what cannot run before anything is written.
        if len(cohort) + len(cohort.teachers) == 1:
            logger.info("one peer learns from the labels alone: nothing is mutual below two")
        if not any(map(is_sharded, cohort)):
            cohort.to(memory_format=torch.channels_last)
        images = checks.first_look(cohort, train, config, amp)
        scored = evaluations(task, cohort, validation, test, config, amp)
        if own:
            facts: Any = {"kinds": kinds, "rows": ranks.rows(len(images), train)}
            config = checks.recorded(config, cohort, train, images, validation, **facts)
        checks.groups(cohort, config, ranks.mesh is not None)
        ranks.prepare_layers(cohort, config)
        new_trainer = partial(
            Trainer, cohort, train, scored, task, callbacks=callbacks, ranks=ranks
        )
        resumed = ranks.decided(lambda: _resumed_folder(config))
        if resumed:
            config = accumulate_on(Path(resumed), config, ranks.mesh)
        trainer = new_trainer(config, Path(), amp, label="mutual")
        ranks.check_same({f"{use} data": mark for use, mark in trainer.data_marks.items()})
        if config.dry_run:
            show()
            text = plan(trainer)
            if ranks.lead:
                print(text)
            return None
        folder = Path(resumed or ranks.decided(lambda: str(new_folder(config))))
        ranks.found_folder(folder)
        show()
        config = config.replace(folder=str(folder), resume=False)
        ranks.decided(lambda: stack.enter_context(alone_in(folder)))
        with listening() as stop:
            if not resumed and ranks.lead:
                config.save(folder / CONFIG)  # from here on it can be resumed
            if config.independent:
                whole = cohort.state_dict() if initial is None else initial
                if ranks.decided(lambda: checkpoint.save_initial(folder, whole)):
                    checkpoint.load_initial(folder, cohort)
            # 2. Train the peers together.
            trainer = new_trainer(config, folder, amp, label="mutual")
            mutual = trainer.run(stop)
            with concluding():
                keep_predictions(trainer)
            # 3. Train them each by itself, from the same weights, on the same batches.
            independent = None
            if config.independent:
                with untaught(cohort):
                    independent = _independent(trainer, stop)
            # 4. Conclude: pictures and summaries.
            return _conclude(mutual, independent, command, ranks)


def _batches(
    train: Any,
    unlabelled: Any,
    cohort: Cohort,
    device: torch.device,
    config: TrainConfig,
    task: Task,
    ranks: OneProcess,
) -> Batches:
    """This process's share of the caller's batches, or those that the task prepared."""
    size: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, **ranks.share}
    where = (device, cohort.num_classes)
    if unlabelled is None or not config.unlabelled_share:
        return as_batches(train, *where, check=task.check_labels, **size)
    config.check_gate()
    size["rows"] = config.unlabelled_rows
    return with_unlabelled(train, unlabelled, *where, task.check_labels, **size)


def _resumed_folder(config: TrainConfig) -> str | None:
    """The folder of the run to go on with, checked; None: a new run, whose folder can be made."""
    if not config.resume:
        check_new_folder(config)
        return None
    folder = resume_folder(config)
    checkpoint.check_resume(folder, config)
    return str(folder)


@contextmanager
def _reproducible(config: TrainConfig, device: torch.device, count: int) -> Iterator[None]:
    """Restores the caller's generators, threads and determinism settings at the end. count: of
    threads, within it."""
    was = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    memory: Any = torch.utils.deterministic  # whose property type checkers do not see
    fills = memory.fill_uninitialized_memory
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        # Filling what torch.empty gives is a launch each; ours is written before it is read.
        memory.fill_uninitialized_memory = False
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = was[2:]
        memory.fill_uninitialized_memory = fills


def _independent(mutual: Trainer, stop: Stop) -> TrainResult:
    """The same peers from the same weights on the same batches, each by itself."""
    cohort, folder = mutual.cohort, mutual.folder / INDEPENDENT
    trained = {key: value.clone() for key, value in cohort.state_dict().items()}
    if not mutual.ranks.decided(lambda: checkpoint.has_begun(folder)):
        checkpoint.load_initial(mutual.folder, cohort)
    with writing(folder):
        folder.mkdir(exist_ok=True)
    config = mutual.config.alone().replace(folder=str(folder))
    amp = resolve_amp(config.amp, mutual.device)  # with a scaler of its own
    try:
        choice = mutual.choice
        if choice is not None and mutual.execution is not None:  # may have fallen back to eager
            choice = choice._replace(execution=mutual.execution)
        trainer = Trainer(
            *(cohort, mutual.train, mutual.evaluations, mutual.task, config, folder, amp),
            label="independent",
            choice=choice,
            callbacks=mutual.calls.callbacks,
            ranks=mutual.ranks,
        )
        result = trainer.run(stop)
        with concluding():
            keep_predictions(trainer)
        return result
    finally:
        cohort.load_state_dict(trained)


def _conclude(
    mutual: TrainResult, independent: TrainResult | None, command: str, ranks: OneProcess
) -> TrainResult:
    """Pictures and summaries, of the independent run too."""
    with concluding():
        ranks.decided(lambda: _report(mutual, independent, command))
    return dataclasses.replace(mutual, independent=independent)


def _report(mutual: TrainResult, independent: TrainResult | None, command: str) -> None:
    for result in (independent, mutual):
        if result is None:
            continue
        scoring = scoring_of(result.scores)
        plots.draw(result.folder, scoring.headlines, result.config.figures)
        summed_up = result.scores is not None
        beside = independent if result is mutual and summed_up else None
        facts: Any = {
            "mutual": _summary(result) if summed_up else None,
            "independent": None if beside is None else _summary(beside),
            "scoring": scoring,
            "teachers": [identity._asdict() for identity in result.teachers],
            "parameters": result.parameters,
            "device": result.device,
            "execution": result.execution,
            "threads": result.threads,
            "command": command,
            "chosen_on": result.chosen_on,
            "scored_on": result.scored_on,
        }
        if result.config.groups > 1:
            write_group_folders(result.folder, result.config, **facts)
        if summed_up:  # the last file: it tells that all others are there
            settings = result.config.to_dict()
            write_summary(result.folder, config=settings, peers=result.peers, **facts)


def _summary(result: TrainResult) -> dict[str, Any]:
    return {
        "scores": dataclasses.asdict(result.scores),
        "images_per_second": result.images_per_second,
        "data_wait": result.data_wait,
        "wall_seconds": result.seconds,
        "training_images": result.images,
        "epochs": result.history[-1]["epoch"],
        "precision": result.precision,
        "skipped_steps": result.skipped_steps,
        "weights": {name: str(folder) for name, folder in result.weights.items()},
        "best_epoch": result.best_epoch,
        "best_scores": dataclasses.asdict(result.best_scores),
        "stopped": result.stopped,
        **({"mesh": result.mesh} if result.mesh else {}),
        "validation": _validation(result),
    }


def _validation(result: TrainResult) -> dict[str, Any] | None:
    """What the best weights were chosen by, where validation images did it."""
    if result.best_validation_scores is None:
        return None
    return {
        "scores": dataclasses.asdict(result.validation_scores),
        "best_scores": dataclasses.asdict(result.best_validation_scores),
    }
