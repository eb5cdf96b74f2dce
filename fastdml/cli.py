"""The command `fastdml`: finds the subcommand, hands over, turns the user's mistakes into a line.

Exit codes: 0 done; 1 the output could not be written; 2 the input is wrong (one line on stderr,
nothing written); 130 interrupted; 141 the reader of the output went away. Anything else is a defect
and keeps its traceback. A stderr that cannot be written to stops nothing.

Subcommands import what they need when they are called, so that `fastdml --help` and a mistyped name
answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastdml import __version__
from fastdml.errors import InputError
from fastdml.files import NO_ROOM
from fastdml.options import advice, split_lists
from fastdml.paths import expanded
from fastdml.terminal import complete_streams, discard, lenient_stderr, print_anything

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.train import TrainConfig
    from fastdml.train.unfinished import Unfinished

DATA = ("digits", "cifar10", "cifar100", "market1501")

# What tyro passes on of Python's int() and float().
NO_NUMBER = re.compile(
    r"Error parsing (--[\w-]+): (?:invalid literal for (int)\(\) with base 10|"
    r"could not convert string to float): (.+)"
)


def train(args: list[str]) -> None:
    """train peers together on digits, cifar10, cifar100 or market1501"""
    usage = f"usage: fastdml train {{{','.join(DATA)}}} [OPTIONS]"
    if not args or args[0] in ("-h", "--help"):
        print(f"{usage}\n\nThe options of each: fastdml train {DATA[-1]} --help")
        return
    data, *options = args
    if data not in DATA:
        raise InputError(f"cannot train on {data!r}; {advice(data, DATA)}")
    config = _train_config(data, options)
    _find_own_models(config.peers)

    from fastdml.train import report, run

    command = shlex.join(["fastdml", "train", *args])
    result = run(config, hint="--download", command=command)
    if result is not None:  # None after a dry run, which has said its part
        summary = json.loads((result.folder / report.SUMMARY).read_text())
        print(f"\n{report.summary_table(summary)}\n{result.device}; run folder: {result.folder}")


def evaluate(args: list[str]) -> None:
    """score the peers of a run on its test images, or on its queries and gallery"""
    parser = Parser("evaluate", evaluate)
    _add_run_options(parser)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of the data set's files (default: the one that the run was trained from)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch CIFAR-10 or CIFAR-100 into the folder of --data where it is missing",
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    of_retrieval = parser.add_argument_group("re-identification runs only")
    of_retrieval.add_argument(
        "--no-rerank", action="store_true", help="leave out the scores after re-ranking"
    )
    of_retrieval.add_argument(
        "--distractors", action="store_true", help="add the 500k distractors to the gallery"
    )
    of_retrieval.add_argument(
        "--ranked-lists",
        type=int,
        default=0,
        metavar="N",
        help="draw N queries and what each peer finds for them, into RUN/ranked_lists",
    )
    options = parser.parse(args)

    from dataclasses import asdict

    import torch

    from fastdml.data import load
    from fastdml.engine import cpus
    from fastdml.train import ReidConfig, report
    from fastdml.train.run import choose_device
    from fastdml.train.run import evaluate as evaluate_images
    from fastdml.train.tasks import reid

    config = _run_config(options.run).replace(device=options.device)
    retrieval = isinstance(config, ReidConfig)
    wanted = [n for n in ("no_rerank", "distractors", "ranked_lists") if getattr(options, n)]
    if wanted and not retrieval:
        option = f"--{wanted[0].replace('_', '-')}"
        raise InputError(f"{option} is for runs on market1501; {options.run} is on {config.data}")
    if options.ranked_lists < 0:
        raise InputError(f"--ranked-lists {options.ranked_lists}: give 0 or more")
    device = choose_device(config)
    torch.set_num_threads(cpus.sensible())
    data = _evaluated_set(options, config)
    cohort = _run_cohort(options, device)
    _check_trained_on(cohort, data, options.run)
    root = options.data or config.root
    if retrieval:
        config = config.replace(root=root, download=options.download)
        scores, pictures = reid.evaluate(
            cohort,
            config,
            device,
            rerank=not options.no_rerank,
            distractors=options.distractors,
            ranked_lists=options.ranked_lists,
            folder=options.run / "ranked_lists",
            say=lambda line: print(line, file=sys.stderr),
            hint="--download",
        )
    else:
        _, test = load(data, root, download=options.download, hint="--download")
        scores, pictures = asdict(evaluate_images(cohort, test, amp=config.amp)), []
    if options.json:
        found = {"run": str(options.run), "weights": options.weights, "peers": cohort.names}
        print(report.to_json({**found, "device": report.device_name(device), "scores": scores}))
    else:
        table = report.retrieval_table if retrieval else report.scores_table
        print(table(cohort.names, scores))
        print(f"{options.weights} weights of {options.run}, on {report.device_name(device)}")
        for path in pictures:
            print(path)
    if cohort.image_shape is None and not retrieval:
        print(
            f"the weights of {options.run} are of an earlier version and do not say what images "
            f"they were trained on: taken for those of {data}, as config.yaml says",
            file=sys.stderr,
        )


def export(args: list[str]) -> None:
    """write the peers of a run as ONNX or torch.export files"""
    parser = Parser("export", export)
    _add_run_options(parser)
    parser.add_argument(
        "--format",
        choices=("onnx", "torch"),
        default="onnx",
        help="onnx: NN-peer.onnx; torch: NN-peer.pt2, a torch.export program (default: onnx)",
    )
    parser.add_argument(
        "--to", type=_folder, metavar="DIR", help="folder to write into (default: RUN/export)"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels of the images to export for (default: those that the peers were trained on)",
    )
    options = parser.parse(args)
    to = options.to or options.run / "export"
    if options.size and min(options.size) < 1:
        raise InputError(f"--size {options.size[0]} {options.size[1]}: give 1 or more")

    import torch

    _run_config(options.run)  # refuses what is no run
    cohort = _run_cohort(options, "cpu")
    if cohort.image_shape is None and not options.size:
        raise InputError(
            f"the weights of {options.run} are of an earlier version and do not say what images "
            "they were trained on: give --size HEIGHT WIDTH"
        )
    example = torch.zeros(1, cohort.in_channels, *options.size) if options.size else None
    for path in cohort.export(to, example, options.format):
        print(path)


def kernels(args: list[str]) -> None:
    """what the compiler made of the kernels: registers, spills, bytes moved; no GPU needed"""
    parser = Parser("kernels", kernels)
    parser.add_argument(
        "--shapes", nargs="+", metavar="KxC",
        help="peers x classes, such as 2x100 (default: CIFAR to a language model's vocabulary)",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", default=["bf16"], choices=("bf16", "fp16", "fp32"),
        help="of logits and gradients (default: bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--archs", nargs="+", metavar="ARCH", help="of sm_80 sm_90 sm_100 gfx942 (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as a JSON list")
    options = parser.parse(args)

    from fastdml_kernels import static_report
    from triton import knobs

    if knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, so that nothing is compiled: unset it")
    archs = options.archs or list(static_report.TARGETS)
    unknown = [arch for arch in archs if arch not in static_report.TARGETS]
    if unknown:
        near = advice(unknown[0], static_report.TARGETS)
        raise InputError(f"no report for {unknown[0]!r}; {near}")
    shapes = [_shape(text) for text in options.shapes or ()] or static_report.SHAPES
    found = static_report.reports(shapes, options.dtypes, archs)
    if options.json:
        print(json.dumps([row.as_dict() for row in found], indent=1))
    else:
        print(static_report.table(found))


def _shape(text: str) -> tuple[int, int]:
    try:
        K, C = (int(part) for part in text.lower().split("x"))
    except ValueError:
        K = C = 0
    if K < 1 or C < 1:
        raise InputError(f"--shapes {text!r}: give peers x classes, such as 2x100")
    return K, C


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "export": export,
    "kernels": kernels,
}


def main(argv: Sequence[str] | None = None) -> int:
    complete_streams()
    print_anything()
    with lenient_stderr():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(args: list[str]) -> int:
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _complain(f"error: {error}", 2)
    except KeyboardInterrupt:
        # Training itself ends by a checkpoint and its own message, unless it is asked twice.
        return _complain("interrupted", 130)
    except BrokenPipeError:
        discard(sys.stdout)  # `fastdml ... | head`: nobody reads on
        return 141
    except OSError as error:
        if error.filename is not None:
            return _complain(f"error: {error.filename}: {error.strerror}", 2)
        if error.errno not in NO_ROOM:
            raise
        discard(sys.stdout)
        return _complain(f"error: cannot write the output: {error.strerror}", 1)


def _dispatch(args: list[str]) -> int:
    if args[:1] == ["help"]:
        args = [*(arg for arg in args if arg != "help"), "--help"]
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"fastdml {__version__}")
        return 0
    if args[0] not in COMMANDS:
        raise InputError(f"unknown command {args[0]!r}; {advice(args[0], [*COMMANDS, 'help'])}")
    try:
        COMMANDS[args[0]](args[1:])
    except SystemExit as stop:  # after --help, from tyro, or because a signal ended training
        if getattr(stop, "message", None):
            return _complain(stop.message, stop.code)
        return stop.code or 0
    return 0


def _help() -> str:
    commands = "\n".join(f"  {name:<9} {run.__doc__}" for name, run in COMMANDS.items())
    return (
        "usage: fastdml COMMAND ...\n\n"
        "Deep Mutual Learning: peers that learn from the labels and from each other.\n\n"
        f"{commands}\n\n"
        "fastdml help COMMAND lists its options, as fastdml COMMAND --help does; fastdml --version "
        "prints the version."
    )


def _complain(message: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
    print(f"fastdml: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """A subcommand's options; a mistake is an InputError, an unknown option names the nearest."""

    def __init__(self, name: str, command: Callable[[list[str]], None]) -> None:
        super().__init__(f"fastdml {name}", description=command.__doc__, allow_abbrev=False)

    def parse(self, args: list[str]) -> argparse.Namespace:
        _check_options(args, self._option_string_actions, self.prog)
        lists = [name for a in self._actions if a.nargs == "+" for name in a.option_strings]
        return self.parse_args(split_lists(args, lists))

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")


def _check_options(args: Iterable[str], known: Iterable[str], command: str) -> None:
    known = list(known)
    for arg in args:
        option = arg.partition("=")[0]
        if option.startswith("--") and option.replace("_", "-") not in known:
            others = f"{command} --help lists those there are"
            raise InputError(f"unknown option {option}; {advice(option, known, others=others)}")


def _train_config(data: str, options: list[str]) -> TrainConfig:
    from dataclasses import fields

    from fastdml.train.config.sources import config_type, from_command_line

    settings = fields(config_type(data))
    names = [field.name.replace("_", "-") for field in settings]
    flags = [f"--no-{field.name.replace('_', '-')}" for field in settings if field.type == "bool"]
    known = ["--help", "--config", *(f"--{name}" for name in names), *flags]
    _check_options(options, known, f"fastdml train {data}")
    if os.environ.get("NO_COLOR"):  # which tyro does not look at
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return from_command_line(data, options)
    except SystemExit as stop:
        # tyro frames what a value's own check says; the check's one line is enough.
        cause: BaseException | None = stop
        while cause := cause.__cause__ or cause.__context__:
            if isinstance(cause, InputError):
                raise cause from None
        if not stop.code:  # after --help
            raise
        raise InputError(
            f"{_unframed(shown.getvalue())}; fastdml train {data} --help lists the options"
        ) from None


def _unframed(box: str) -> str:
    """The first paragraph in one of tyro's boxes, in one line, without the title above it."""
    paragraph: list[str] = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]:
        text = line.strip("│ ")
        if text.strip("╰─╯-"):
            paragraph.append(text)
        elif paragraph:  # the rule below it
            break
    text = " ".join(paragraph).rstrip(".") or "wrong options"
    number = NO_NUMBER.search(text)
    if not number:
        return text
    option, whole, value = number.groups()
    return f"{option} must be {'a whole number' if whole else 'a number'}, not {value}"


def _add_run_options(parser: Parser) -> None:
    parser.usage = f"{parser.prog} RUN [OPTIONS]"  # after --peers RUN would be one of them
    parser.add_argument("run", type=_folder, metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        default="last",
        help="last: after the last epoch; best: of the epoch with the best test accuracy or mAP, "
        "which the test images chose and therefore flatter (default: last)",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="MODEL",
        help="what to load into, in order; needed where a peer is package.module:function, which "
        "a file in a run folder does not get to import",
    )


def _folder(text: str) -> Path:
    try:
        return expanded(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run_config(run: Path) -> TrainConfig:
    from fastdml.train.config.sources import load_config

    if not (run / "config.yaml").is_file():
        within = (run.parent / "config.yaml").is_file()
        remedy = f": give the run's folder, {run.parent}" if within else ": it holds no config.yaml"
        raise InputError(f"{run} is not the folder of a run{remedy}")
    return load_config(run / "config.yaml")


def _evaluated_set(options: argparse.Namespace, config: TrainConfig) -> str:
    """The data set to score a run on: its own or, of a run of `fit` on data of one's own, the one
    that these data were, if any."""
    from fastdml import data
    from fastdml.cohort import read_record
    from fastdml.train import ReidConfig
    from fastdml.train.config.sources import is_known

    if is_known(config.data):
        return config.data
    found, folder = _run_weights(options)
    found = read_record(folder) if found is None else found.record()
    how = "fastdml.train.evaluate(cohort, batches) scores it on batches (images, labels)"
    if isinstance(config, ReidConfig):
        how = "fastdml.train.extract_features and fastdml.metrics.reid_scores score it"
    else:
        for name in data.SETS:
            if data.record(name) == found:
                return name
    raise InputError(
        f"{options.run} was trained by fit on {config.data}, which the command cannot read: in "
        f"Python, with cohort = fastdml.Cohort.load({str(folder)!r}), {how}"
    )


def _check_trained_on(cohort: Cohort, data: str, run: Path) -> None:
    """Refuses to score peers on images that are not of the kind that they were trained on."""
    from fastdml.data import SETS, record

    if data not in SETS:
        return
    known, found = record(data), cohort.record()
    wrong = [name for name, value in found.items() if value not in (None, known[name])]
    if len(known["classes"]) != cohort.num_classes:
        raise InputError(
            f"the peers of {run} tell {cohort.num_classes} classes apart, and {data} has "
            f"{len(known['classes'])}: they were not trained on it"
        )
    if wrong:
        raise InputError(
            f"the peers of {run} were not trained on {data}: the {wrong[0]} of their images was "
            f"{str(found[wrong[0]])[:60]}, and of {data} it is {str(known[wrong[0]])[:60]}"
        )
    channels = known["image_shape"][0]
    if all(cohort.models) and cohort.in_channels != channels:
        raise InputError(
            f"the peers of {run} take images of {cohort.in_channels} channels, and those of {data} "
            f"have {channels}: they were not trained on it"
        )


def _run_cohort(options: argparse.Namespace, device: Any) -> Cohort:
    from fastdml.cohort import Cohort

    _find_own_models(options.peers or ())
    found, folder = _run_weights(options)
    if found is None:
        return Cohort.load(folder, device, peers=options.peers)
    cohort = found.cohort(device, options.peers)
    print(found.describe(), file=sys.stderr)
    return cohort


def _run_weights(options: argparse.Namespace) -> tuple[Unfinished | None, Path]:
    """The folder that a run's weights are in; of a run that has not ended, its last are those of
    its checkpoint."""
    from fastdml.train.unfinished import prolonged, unfinished

    last = options.weights == "last"
    folder = options.run if last else options.run / "best"
    there = (folder / "cohort.json").is_file()
    if there and not (last and prolonged(options.run, _run_config(options.run))):
        return None, folder
    found = unfinished(options.run) if last else None
    if found is None and there:
        return None, folder
    if found is None:
        raise InputError(
            f"{options.run} holds no {options.weights} weights: they are written when "
            f"{'training ends' if last else 'an epoch is evaluated'}"
        )
    return found, found.path


def _find_own_models(peers: Sequence[str]) -> None:
    """Peers that are the user's own code are looked for in the current folder first, where `python
    -m fastdml` finds them too. Without such a peer nothing is imported from there."""
    from fastdml.models import is_own

    if any(map(is_own, peers)) and not getattr(sys.flags, "safe_path", False):
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
