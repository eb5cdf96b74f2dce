"""`fastdml predict`: the classes of images, by the peers of a run and their ensemble."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from fastdml.cli.parsing import Parser, as_folder
from fastdml.cli.runs import find_own_models
from fastdml.errors import InputError, MissingExtra, require
from fastdml.files import writing
from fastdml.paths import expand

if TYPE_CHECKING:
    from torch import Tensor

    from fastdml.predictor import Predictor

logger = logging.getLogger(__name__)

TABLE_TOP, CSV_TOP = 5, 1  # classes shown, where --top does not say
MOST_AT_ONCE = 64  # images of a batch, and at most as many as fit into
BATCH_BYTES = 1 << 27
ENDINGS = {False: (".csv",), True: (".json", ".jsonl")}  # of --to, by --json


class Found(NamedTuple):
    """What was found of one image."""

    path: str
    top: list[list[tuple[str, float]]]  # of each output its most probable classes
    error: str = ""  # why the image could not be read; then there are none


def predict(args: list[str]) -> None:
    """tell the classes of images, by the peers of a run and their ensemble"""
    options = _options(args)
    require("PIL.Image", "train")

    import torch

    from fastdml.devices import choose_device
    from fastdml.engine import cpus
    from fastdml.predictor import Predictor
    from fastdml.train.run_weights import best_peer, load_cohort

    find_own_models(options.peers or ())
    device = choose_device(options.device)
    torch.set_num_threads(cpus.sensible())
    cohort, weights = load_cohort(options.run, options.weights, device, options.peers)
    peer = options.peer
    if peer == "best":
        peer = best_peer(options.run, weights, cohort.names)
    predictor = Predictor(cohort, peer)
    if predictor.features:
        raise InputError(
            f"{options.run} was trained for re-identification: its peers give features, not "
            "classes; fastdml export writes networks that give them, and fastdml evaluate "
            "--ranked-lists N draws what they find"
        )
    predictor.preprocessing  # noqa: B018 - raises where nothing says how images are prepared
    outputs = Outputs(predictor, peer == "ensemble")
    first, *others = options.images
    if others or os.path.isdir(first):
        _print_many(outputs, options)
        return
    top = options.top or TABLE_TOP
    if not (options.json or options.to):
        print(outputs.table(_one(outputs, first), top))
        return
    with _opened(options.to) as file:
        write = _writer(file, outputs, options, top)
        (found,) = outputs.read([first], top)
        if found.error:
            raise InputError(f"{first}: {found.error}")
        write(found)


def _options(args: list[str]) -> argparse.Namespace:
    parser = Parser("predict", predict)
    parser.usage = f"{parser.prog} RUN IMAGE... [OPTIONS]"
    parser.add_argument(
        "run",
        type=as_folder,
        metavar="RUN",
        help="folder of a training run or a cohort, or a .safetensors file of fastdml export",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=_as_text,
        metavar="IMAGE",
        help="one image: a table of its classes; several, or a folder: CSV, a line an image",
    )
    parser.add_argument(
        "--top",
        type=int,
        metavar="N",
        help=f"classes to tell of each image (default: {TABLE_TOP}, in CSV {CSV_TOP})",
    )
    parser.add_argument(
        "--peer",
        default="ensemble",
        metavar="PEER",
        help="ensemble: each peer and their ensemble; best: the peer with the best score; a "
        "peer's name or number (default: ensemble)",
    )
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        help="of a run (default: best where validation images chose it, else last)",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="MODEL",
        help="what to load into, in order; needed where a peer is package.module:function",
    )
    parser.add_argument(
        "--json", action="store_true", help="JSON, an object an image, each in a line"
    )
    parser.add_argument(
        "--to", type=as_folder, metavar="FILE", help="file to write, .csv (default: stdout)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    options = parser.parse(args)
    if options.top is not None and options.top < 1:
        raise InputError(f"--top {options.top}: give 1 or more")
    endings = ENDINGS[options.json]
    if options.to and options.to.suffix.lower() not in endings:
        raise InputError(f"--to {options.to}: give a name that ends in {' or '.join(endings)}")
    _check_folders(options.images)
    return options


def _check_folders(paths: Sequence[str]) -> None:
    """Raises InputError for a folder without one image."""
    from fastdml.data.files.class_folders import SUFFIXES

    for path in paths:
        if os.path.isdir(path) and next(_images_below(path), None) is None:
            raise InputError(f"{path}: holds no images ({' '.join(SUFFIXES)})")


def _as_text(text: str) -> str:
    """A path as the user wrote it, but for ~."""
    try:
        return expand(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Outputs:
    """The peers of a predictor and, where it is the ensemble of several, the ensemble."""

    def __init__(self, predictor: Predictor, ensemble: bool) -> None:
        self.predictor = predictor
        self.ensemble = ensemble and len(predictor.names) > 1
        self.names = [*predictor.names, *(["ensemble"] if self.ensemble else [])]
        height, width = predictor.preprocessing.size
        image = 4 * predictor.preprocessing.channels * height * width
        self.at_once = max(1, min(MOST_AT_ONCE, BATCH_BYTES // image))

    def probabilities(self, images: Sequence[Tensor]) -> Tensor:
        """Of each output, (outputs, N, C) on the CPU. images: N of (channels, H, W)."""
        import torch

        from fastdml.preprocessing import stacked

        each = self.predictor.of_each(stacked(images))
        return (torch.cat([each, each.mean(0, keepdim=True)]) if self.ensemble else each).cpu()

    def read(self, paths: Iterator[str] | Sequence[str], top: int) -> Iterator[Found]:
        """The images in order, decoded by threads ahead of the peers, in batches; memory is bounded
        whatever their number."""
        preparing = self.predictor.preprocessing
        batch: list[tuple[str, Any]] = []
        for path, pixels in _ahead(preparing.pixels, paths, 2 * self.at_once):
            batch.append((path, pixels))
            if len(batch) == self.at_once:
                yield from self._found(batch, top)
                batch = []
        yield from self._found(batch, top)

    def _found(self, batch: list[tuple[str, Any]], top: int) -> Iterator[Found]:
        from fastdml.preprocessing import reason

        good = [pixels for _, pixels in batch if not isinstance(pixels, InputError)]
        tops: Iterator[Any] = iter(())
        if good:
            images = [self.predictor.preprocessing.normalized(pixels) for pixels in good]
            every = [self.predictor.most_probable(p, top) for p in self.probabilities(images)]
            tops = zip(*every, strict=True)
        for path, pixels in batch:
            bad = isinstance(pixels, InputError)
            yield Found(path, [], reason(pixels)) if bad else Found(path, list(next(tops)))

    def table(self, probabilities: Tensor, top: int) -> str:
        """probabilities: (outputs, C) of one image. A row a class: the last output's `top`, and
        whatever another finds most probable."""
        from fastdml.report.tables import fixed_columns

        order = probabilities[-1].argsort(descending=True, stable=True)[:top].tolist()
        order = list(dict.fromkeys([*order, *probabilities.argmax(1).tolist()]))
        rows = [("class", *(f"{name} %" for name in self.names))]
        rows += [
            (
                self.predictor.class_name(c),
                *(f"{100 * p:.2f}" for p in probabilities[:, c].tolist()),
            )
            for c in order
        ]
        return fixed_columns(rows)


def _one(outputs: Outputs, path: str) -> Tensor:
    """(outputs, C) of one image, which must be readable."""
    from fastdml.preprocessing import reason

    try:
        image = outputs.predictor.preprocess(path)
    except MissingExtra:
        raise
    except InputError as error:
        raise InputError(f"{path}: {reason(error)}") from None
    return outputs.probabilities([image])[:, 0]


def _print_many(outputs: Outputs, options: argparse.Namespace) -> None:
    from fastdml.data.files.check_files import progress_bar

    top = options.top or (TABLE_TOP if options.json else CSV_TOP)
    read = bad = 0
    bar = progress_bar(None, "predicting", None if options.to else False)
    with _opened(options.to) as file, contextlib.closing(bar):
        write = _writer(file, outputs, options, top)
        for found in outputs.read(_paths(options.images), top):
            if found.error:
                bad += 1
                shown = found.path if found.path.isprintable() else repr(found.path)
                logger.warning(f"{shown}: {found.error}")
            read += 1
            write(found)
            bar.update(1)
            if read % outputs.at_once == 0:
                file.flush()
    if options.to:
        logger.info(f"{read:,} images: {options.to}")
    if bad:
        raise InputError(f"{bad:,} of {read:,} images could not be read; the others are done")


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    """The file to write, or stdout. Names of files come out byte for byte."""
    if path is None:
        yield sys.stdout
        return
    with (
        writing(path),
        open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as f,
    ):
        yield f


def _writer(
    file: TextIO, outputs: Outputs, options: argparse.Namespace, top: int
) -> Callable[[Found], None]:
    """What writes one image's line; of CSV the header is written now."""
    if options.json:
        from fastdml.report.metrics_log import to_json

        def as_json(found: Found) -> None:
            told: dict[str, Any] = {"image": found.path}
            if found.error:
                told["error"] = found.error
            else:
                pairs = zip(outputs.names, found.top, strict=True)
                told["predictions"] = {
                    name: [{"class": c, "probability": p} for c, p in likely]
                    for name, likely in pairs
                }
            print(to_json(told), file=file)

        return as_json
    top = min(top, outputs.predictor.num_classes)
    places = [""] if top == 1 else [f"_{place}" for place in range(1, top + 1)]
    columns = [
        f"{name}_{what}{place}"
        for name in outputs.names
        for place in places
        for what in ("class", "probability")
    ]
    file.write(csv_line(["path", *columns, "error"]))

    def as_csv(found: Found) -> None:
        cells = [cell for likely in found.top for c, p in likely for cell in (c, f"{p:.6g}")]
        file.write(csv_line([found.path, *(cells or [""] * len(columns)), found.error]))

    return as_csv


def csv_line(cells: Sequence[str]) -> str:
    """A line of CSV. A cell with a carriage return is quoted too, which readers take for the end of
    a line: csv.writer quotes what its own end of lines is made of."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _paths(given: Sequence[str]) -> Iterator[str]:
    """The images that arguments mean: files, and those in folders or deeper."""
    for path in given:
        if os.path.isdir(path):
            yield from _images_below(path)
        else:
            yield path


def _images_below(folder: str) -> Iterator[str]:
    """The images in a folder and deeper, in the order of names. Links are followed; a folder that
    two lead to is read once. Hidden files are left out."""
    from fastdml.data.files.class_folders import is_image

    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        status = os.stat(here)
        mark = status.st_dev, status.st_ino
        if mark in seen:
            folders.clear()
            continue
        seen.add(mark)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and is_image(name):
                yield os.path.join(here, name)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _ahead(prepare: Any, paths: Iterator[str] | Sequence[str], window: int) -> Iterator[tuple]:
    """(path, what `prepare` gives or the InputError it raises), in order; threads work at most
    `window` images ahead."""
    from fastdml import host

    def attempt(path: str) -> Any:
        try:
            return prepare(path)
        except InputError as error:
            return error

    waiting: deque[tuple[str, Future]] = deque()
    pool = ThreadPoolExecutor(host.cpus(), thread_name_prefix="decode")
    try:
        for path in paths:
            waiting.append((path, pool.submit(attempt, path)))
            if len(waiting) >= window:
                path, future = waiting.popleft()
                yield path, future.result()
        for path, future in waiting:
            yield path, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
