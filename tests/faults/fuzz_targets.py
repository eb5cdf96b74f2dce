"""The product's parsers, each with inputs that are nearly right. See `fuzzing`."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from fastdml_kernels import Options
from fastdml_kernels.reference import mutual_loss_reference
from fuzzing import Check, Target
from mutations import NUMBERS, REALS, TEXTS, altered, junk, mutated, name, nearly_json
from PIL import Image
from recovery import SETTINGS

from fastdml import Cohort, cli, mutual_loss
from fastdml.cli.kernels import shape
from fastdml.cli.main import COMMANDS
from fastdml.cli.train import train_config
from fastdml.data.files import archive, check_files, decode
from fastdml.data.sets import cifar, market1501
from fastdml.errors import InputError
from fastdml.models import create_model, model_names
from fastdml.report import plots
from fastdml.report.metrics_log import MetricsLog, read_metrics
from fastdml.train import checkpoint
from fastdml.train.config.fields import field_types
from fastdml.train.config.sources import load_config, preset

DATA = ("digits", "cifar10", "cifar100", "market1501")
TARGETS: dict[str, Target] = {}


def target(*refuses: type[Exception]) -> Callable[[Callable[[Path], Check]], Callable]:
    def register(prepare: Callable[[Path], Check]) -> Callable[[Path], Check]:
        TARGETS[prepare.__name__] = Target(prepare, refuses or (InputError,))
        return prepare

    return register


def rewrite(path: Path, content: bytes | str) -> Path:
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    )
    return path


# ---- settings


@target()
def settings_file(folder: Path) -> Check:
    whole = []
    for data in DATA:
        preset(data).save(folder / "settings.yaml")
        whole.append((folder / "settings.yaml").read_bytes())
    tokens = (
        ": ", "\n", "- ", "[", "]", "{", "}", ",", "&a ", "*a", "!!python/object/apply:os.system ",
        "!!int ", "!!binary ", "!!timestamp ", "2001-99-99", "<<: ", "? ", "| ", "> ", "#", "---\n",
        "...\n", "'", '"', "%YAML 9.9\n", "0o7", "1:30", ".inf", ".nan", "~", "  ", "\t", "1e-3",
        "true", "off", "2024-01-01", "0b1", "epochs", "peers", "lr", "data", "digits", *TEXTS,
    )  # fmt: skip

    def check(random: Random) -> None:
        if random.random() < 0.5:
            content = mutated(random, random.choice(whole))
        else:
            content = "".join(random.choice(tokens) for _ in range(random.randrange(20)))
        config = load_config(rewrite(folder / "settings.yaml", content))
        config.save(folder / "again.yaml")
        assert load_config(folder / "again.yaml") == config

    return check


@target()
def settings_values(folder: Path) -> Check:
    """Every setting with every kind of value."""

    def check(random: Random) -> None:
        config = preset(random.choice(DATA))
        names = list(field_types(type(config)))
        changes = {random.choice(names): junk(random) for _ in range(random.randint(1, 3))}
        config = config.replace(**changes)
        assert type(config)(**config.to_dict()) == config

    return check


@target()
def training_options(folder: Path) -> Check:
    rewrite(folder / "given.yaml", "epochs: 3\n")
    values = (
        *map(str, NUMBERS),
        *map(str, REALS),
        *TEXTS,
        *model_names(),
        "resnet8",
        "auto",
        "off",
    )

    def check(random: Random) -> None:
        data = random.choice(DATA)
        names = [n.replace("_", "-") for n in field_types(type(preset(data)))]
        options = []
        for _ in range(random.randint(1, 4)):
            option = f"--{random.choice(('', '', '', 'no-'))}{random.choice(names)}"
            options.append(
                random.choice(
                    (option, option, mutated(random, option.encode(), 1).decode(errors="replace"))
                )
            )
            if random.random() < 0.7:
                options += random.choices(values, k=random.choice((1, 1, 1, 2)))
        if random.random() < 0.1:
            options.append(f"--config={random.choice((folder / 'given.yaml', folder, 'no'))}")
        if not {"--help", "-h"} & {*options}:
            with contextlib.redirect_stdout(io.StringIO()):
                train_config(data, options)

    return check


@target()
def command_line(folder: Path) -> Check:
    """Whole commands: 0 and some output, or 2 and one line on stderr."""
    words = (
        *COMMANDS, *DATA, "--help", "-h", "--version", "--json", "--data", "--to", "--weights",
        "--format", "--device", "--peers", "--ranked-lists", "--no-rerank", "--distractors",
        "--shapes", "--dtypes", "--archs", "best", "onnx", "torch", "bf16", "2x100", str(folder),
        *TEXTS, *map(str, NUMBERS),
    )  # fmt: skip

    def check(random: Random) -> None:
        command = random.choice(("evaluate", "export", "kernels", *words))
        words_ = random.choices(words, k=random.randrange(5))
        if command == "kernels":
            words_.append("--archs=none")  # or kernels would be compiled, for seconds
        if command == "train" and words_ and words_[0] in DATA:
            words_ = [words_[0], "--no-such-option"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([command, *words_])
        said = err.getvalue()
        assert code in (0, 2), (code, said)
        if code == 2 and out.getvalue() == "":
            assert said.startswith("fastdml: "), said
            assert said.count("\n") == 1, said

    return check


@target()
def shapes_of_kernels(folder: Path) -> Check:
    def check(random: Random) -> None:
        text = "".join(random.choice(("2", "x", "X", "100", *TEXTS, "-1", "0")) for _ in range(3))
        K, C = shape(text)
        assert K >= 1
        assert C >= 1

    return check


# ---- models


@target()
def model_name(folder: Path) -> Check:
    parts = (
        "resnet", "wrn_", "wrn-", "mobilenet", "googlenet", "timm:", "8", "10", "20", "14", "_",
        "1", "2", "0", "18", "50", ".", ":", "os.path", "torchvision.models", "resnet18",
        "torch.nn", "Identity", "Linear", "json", "loads", "-1", "²", *TEXTS,
    )  # fmt: skip

    def check(random: Random) -> None:
        text = "".join(random.choice(parts) for _ in range(random.randint(1, 4)))
        size = random.choice((1, 10, 10, *NUMBERS[:4], None, "10", 1.5))
        create_model(text, size, in_channels=random.choice((1, 3, 3, 0, -1, "3")))

    return check


# ---- a run's files


@target()
def cohort_description(folder: Path) -> Check:
    Cohort(["resnet8", "resnet8"], 10).save(folder)
    whole = json.loads((folder / "cohort.json").read_bytes())

    def check(random: Random) -> None:
        rewrite(folder / "cohort.json", nearly_json(random, whole))
        assert len(Cohort.load(folder)) >= 1

    return check


@target()
def weights_file(folder: Path) -> Check:
    """Bytes that somebody changed, digest and all."""
    Cohort(["resnet8"], 10).save(folder)
    description = json.loads((folder / "cohort.json").read_bytes())
    (path,) = folder.glob("peers/*")
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:size])

    def check(random: Random) -> None:
        if random.random() < 0.5:
            head = nearly_json(random, header)
            wrong = len(head).to_bytes(8, "little") + head + whole[size:]
        else:
            wrong = mutated(random, whole[:size]) + mutated(random, whole[size:])
        path.write_bytes(wrong)
        description["peers"][0]["sha256"] = hashlib.sha256(wrong).hexdigest()
        rewrite(folder / "cohort.json", json.dumps(description))
        Cohort.load(folder)

    return check


class Code:
    """What a pickle must not get to run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@target()
def checkpoint_file(folder: Path) -> Check:
    path = folder / "last.ckpt"
    state = {"a": torch.arange(6.0), "b": [1, {"c": None}], "d": torch.zeros(2, dtype=torch.int64)}
    checkpoint.save(path, state)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        parts = {entry: file.read(entry) for entry in file.namelist()}
    pickled = next(entry for entry in parts if entry.endswith("data.pkl"))
    evil = folder.parent / "ran"

    def check(random: Random) -> None:
        if random.random() < 0.4:
            path.write_bytes(mutated(random, whole))
        else:
            changed = dict(parts)
            if random.random() < 0.2:
                changed[pickled] = pickle.dumps(Code(evil), protocol=2)
            else:
                chosen = random.choice(list(parts))
                changed[chosen] = mutated(random, parts[chosen])
            with zipfile.ZipFile(path, "w") as file:
                for entry, content in changed.items():
                    file.writestr(entry, content)
        assert isinstance(checkpoint.load(path), dict)

    return check


@target()
def metrics_file(folder: Path) -> Check:
    lines = [
        {"kind": "peers", "step": 0, "names": ["a", "b"]},
        {"kind": "train", "step": 2, "epoch": 0.5, "time": 1.0, "ce": [1.0, 2.0], "kl": [0.1, None],
         "pairwise_kl": [[0.0, 0.1], [0.2, 0.0]], "loss": [1.1, 2.1]},
        {"kind": "epoch", "step": 4, "epoch": 1, "time": 2.0, "ce": [1.0, 2.0], "lr": 0.1},
        {"kind": "test", "step": 4, "epoch": 1, "time": 2.0, "top1": [0.5, 0.25],
         "ensemble_top1": 0.5},
    ]  # fmt: skip

    def check(random: Random) -> None:
        changed = altered(random, lines) if random.random() < 0.7 else lines
        changed = changed if isinstance(changed, list) else [changed]
        content = "".join(f"{json.dumps(line)}\n" for line in changed).encode()
        if random.random() < 0.3:
            content = mutated(random, content + (b"[" * 100_000 if random.random() < 0.1 else b""))
        rewrite(folder / "metrics.jsonl", content)
        for record in read_metrics(folder):
            assert isinstance(record, dict)
        with MetricsLog(folder, ["a", "b"], resume_step=4, tensorboard=False) as log:
            log.log("train", 5, 1.25, loss=[1.0, 2.0])
        assert read_metrics(folder)[-1]["step"] == 5

    return check


@target()
def damaged_run(folder: Path) -> Check:
    """A finished run with one file of it changed, gone or something else: it is evaluated or
    resumed, or refused in a line."""
    plots.plot_curves = plots.plot_pairwise_kl = lambda folder: None
    whole, run = folder / "whole", folder / "run"
    settings = [*SETTINGS, "--no-tensorboard", "--folder"]
    assert cli.main([*settings, str(whole)]) == 0
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())

    def damage(random: Random, path: Path) -> None:
        content = path.read_bytes()
        kind = random.randrange(8)
        if kind >= 3:
            try:
                value = json.loads(content)
            except ValueError:
                value = None
            path.write_bytes(nearly_json(random, value) if value else mutated(random, content))
            return
        path.unlink()
        if kind == 1:
            path.mkdir()
        elif kind == 2:
            path.symlink_to(random.choice(("nowhere", "/dev/null", path.name)))

    def check(random: Random) -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        settings_file = (run / "config.yaml").read_text().replace(str(whole), str(run))
        (run / "config.yaml").write_text(settings_file)
        damage(random, run / random.choice(names))
        command = random.choice((
            ["evaluate", str(run)], ["evaluate", str(run), "--weights", "best", "--json"],
            [*settings, str(run), "--resume"], [*settings, str(run), "--resume"],
        ))  # fmt: skip
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(command)
        said = [line for line in err.getvalue().splitlines() if line.startswith("fastdml: ")]
        assert (code, len(said)) in ((0, 0), (2, 1)), (code, err.getvalue())

    return check


# ---- data


SMALL = replace(cifar.CIFAR100, train_records=3, test_records=2)


@target()
def cifar_binary(folder: Path) -> Check:
    random = Random(0)

    def records(number: int) -> bytes:
        return b"".join(
            bytes([random.randrange(20), random.randrange(100)]) + random.randbytes(3072)
            for _ in range(number)
        )

    where = folder / SMALL.binary_folder
    where.mkdir()
    (where / "test.bin").write_bytes(records(2))
    whole = records(3)

    def check(random: Random) -> None:
        wrong = mutated(random, whole)
        if random.random() < 0.5:
            wrong = (wrong + whole)[: len(whole)]
        (where / "train.bin").write_bytes(wrong)
        train, _ = cifar.load_source(SMALL, folder, False)
        assert train.images.shape == (3, 3, 32, 32)

    return check


@target()
def cifar_pickle(folder: Path) -> Check:
    where = folder / SMALL.python_folder
    where.mkdir()

    def content(number: int) -> dict[bytes, Any]:
        pixels = np.arange(number * 3072, dtype=np.uint32).astype(np.uint8).reshape(number, 3072)
        labels = [7] * number
        return {b"data": pixels, b"fine_labels": labels, b"coarse_labels": labels, b"filenames": []}

    (where / "test").write_bytes(pickle.dumps(content(2), protocol=2))
    wholes = [pickle.dumps(content(3), protocol=p) for p in (2, 3, 4, 5)]
    heads = [len(w) - 3 * 3072 for w in wholes]
    evil = folder.parent / "ran"

    def fitting(data: bytes) -> bytes:  # of a size that is looked into
        return data.ljust(3 * 3072 + 300, b".")

    def check(random: Random) -> None:
        kind = random.randrange(4)
        if kind == 0:
            wrong = mutated(random, random.choice(wholes))
        elif kind == 1:  # the structure, not the pixels
            at = random.randrange(len(wholes))
            cut = max(heads[at] - 120, 60)
            wrong = mutated(random, wholes[at][:cut]) + mutated(random, wholes[at][cut:])
        elif kind == 2:
            wrong = content(3)
            key = random.choice(list(wrong))
            wrong[key] = junk(random)
            wrong = pickle.dumps(wrong, protocol=random.choice((2, 4)))
        else:
            wrong = pickle.dumps([Code(evil), content(1)], protocol=2)
        (where / "train").write_bytes(fitting(wrong))
        train, _ = cifar.load_source(SMALL, folder, False)
        assert train.images.shape == (3, 3, 32, 32)

    return check


@target()
def archives(folder: Path) -> Check:
    """Names that climb out, links, devices, files where folders are due, damaged streams."""
    root, packed = folder / "root", folder / "set.tar.gz"
    parts = ("set", "set/", "/", "..", "../", "a", "b.bin", "./", "\\", "é", "x" * 120, "\n", " ")
    kinds = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
             tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE,
             tarfile.GNUTYPE_SPARSE, b"Z")  # fmt: skip

    def entry(random: Random) -> tuple[tarfile.TarInfo, bytes]:
        made = "".join(random.choice(parts) for _ in range(random.randint(1, 4)))
        info = tarfile.TarInfo(made if random.random() < 0.3 else f"set/{made}")
        info.type = random.choice(kinds) if random.random() < 0.3 else tarfile.REGTYPE
        info.linkname = random.choice(("set/a", "../outside", "/etc/passwd", "."))
        info.mode = random.choice((0o644, 0, 0o7777))
        content = random.randbytes(random.randrange(2000))
        info.size = len(content) if info.isreg() else 0
        return info, content

    def check(random: Random) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        raw = io.BytesIO()
        form = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
            for _ in range(random.randint(0, 4)):
                info, content = entry(random)
                with contextlib.suppress(ValueError):  # a name that the format cannot hold
                    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
        content = raw.getvalue()
        if random.random() < 0.4:
            content = mutated(random, content)
        squeezed = io.BytesIO()
        with gzip.GzipFile(fileobj=squeezed, mode="wb", mtime=0) as file:
            file.write(content)
        content = squeezed.getvalue()
        packed.write_bytes(mutated(random, content, 2) if random.random() < 0.2 else content)
        try:
            archive.extract(packed, root, "set")
        finally:
            assert {p.name for p in root.iterdir()} <= {"set"}
            for path in root.rglob("*"):
                assert not path.is_symlink()
                assert path.is_file() or path.is_dir()
                assert path.stat().st_nlink == 1 or path.is_dir()
            assert {p.name for p in folder.iterdir()} == {"root", "set.tar.gz"}
        assert (root / "set").is_dir()

    return check


def pictures() -> list[bytes]:
    found = []
    image = Image.fromarray(
        np.arange(20 * 12 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 12, 3)
    )
    for form, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {}),
        ("WEBP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("ICO", {}),
        ("TGA", {}), ("PCX", {}), ("EPS", {}), ("JPEG2000", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        more = {"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}
        with contextlib.suppress(OSError):  # a codec that this Pillow has not
            image.save(buffer, form, **options, **more)
            found.append(buffer.getvalue())
    for mode in ("L", "CMYK", "1"):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, "TIFF")
        found.append(buffer.getvalue())
    return found


@target()
def images(folder: Path) -> Check:
    wholes = pictures()

    def check(random: Random) -> None:
        wrong = mutated(random, random.choice(wholes))
        if random.random() < 0.1:
            wrong = wrong[:200] + random.choice(wholes)
        path = rewrite(folder / "image.jpg", wrong)
        size = random.choice((None, (16, 8), (1, 1)))
        pixels = decode.decode(path, size)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert size is None or pixels.shape[:2] == size

    return check


NAME_PARTS = (
    "0001", "0002", "-1", "0000", "_", "c", "c1", "c2", "s1", "_000151", "_01", ".jpg", ".jpeg",
    ".png", ".JPG", ".", "99999999999999999999", "x", "٣", "²", "-", "+1", " ", "_1_2_", "._",
)  # fmt: skip


@target()
def reid_names(folder: Path) -> Check:
    """Names of files in the layouts that have an identity and a camera in them."""
    picture = pictures()[2]

    def check(random: Random) -> None:
        for old in folder.iterdir():
            shutil.rmtree(old)
        layout = random.choice(("market1501", "dukemtmc"))
        for split in ("bounding_box_train", "query", "bounding_box_test"):
            (folder / split).mkdir()
            for made in (
                *(name(random, NAME_PARTS) for _ in range(random.randrange(2))),
                *(f"000{k}_c{random.randint(1, 6)}s1_{k}.jpg" for k in (1, 2)),
            ):
                with contextlib.suppress(OSError):  # too long, or there already as a folder
                    if random.random() < 0.05:
                        (folder / split / made).mkdir()
                    else:
                        (folder / split / made).write_bytes(picture)
        bad_files = random.choice(("error", "skip"))
        with contextlib.redirect_stderr(io.StringIO()):
            found = market1501.ImageFolderReID(folder, layout, bad_files=bad_files, progress=False)
        assert len(found.train) >= 1
        assert 0 <= int(found.train.labels.max()) < found.train.num_classes

    return check


@target()
def reid_lists(folder: Path) -> Check:
    picture = pictures()[2]
    files = ("0000/0000_000_01_0303morning_0008_0.jpg", "0001/0001_000_02_x.jpg")
    for split in ("train", "test"):
        for file in files:
            (folder / split / file).parent.mkdir(parents=True)
            (folder / split / file).write_bytes(picture)
    lists = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
    whole = "".join(f"{file} {k}\n" for k, file in enumerate(files)).encode()
    words = (*files, " ", "\n", "\t", "0", "../", "/etc/passwd", "a/", "x" * 300, *TEXTS)

    def check(random: Random) -> None:
        for listed in lists:
            (folder / listed).write_bytes(whole)
        wrong = (
            mutated(random, whole)
            if random.random() < 0.5
            else whole + "".join(random.choice(words) for _ in range(6)).encode(errors="ignore")
        )
        (folder / random.choice(lists)).write_bytes(wrong)
        with contextlib.redirect_stderr(io.StringIO()):
            found = market1501.ImageFolderReID(folder, "msmt17", progress=False)
        assert len(found.train) >= 1

    return check


@target()
def scan_memory(folder: Path) -> Check:
    """What an earlier scan of the images left in the cache: a wrong one costs time alone."""
    paths = [str(rewrite(folder / f"{k}.png", pictures()[2])) for k in range(2)]
    cache = folder / "cache"
    check_files.scan(paths, cache=cache)
    (file,) = cache.iterdir()
    whole = json.loads(file.read_bytes())

    def check(random: Random) -> None:
        file.write_bytes(nearly_json(random, whole))
        found = check_files.scan(paths, cache=cache)
        assert found.files == 2
        assert all(isinstance(why, str) for why in found.bad.values())

    return check


# ---- the loss


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
    beside = {"temperature", "kl_weight", "peer_weights", "class_weight"} & options.keys()
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
        if random.random() < 0.2:
            options["symmetric"] = options["detach_targets"] = True
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
            assert all(z.grad.isfinite().all() for z in inputs)

    return check
