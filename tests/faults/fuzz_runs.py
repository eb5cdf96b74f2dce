"""Fuzz targets: almost valid settings, commands, models and files of runs. See `fuzzing`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from random import Random

import torch
from fuzz_registry import Code, rewrite, target
from fuzzing import Check
from mutations import NUMBERS, REALS, TEXTS, altered, junk, mutated, nearly_json
from recovery import SETTINGS

from fastdml import Cohort, cli
from fastdml.cli.kernels import shape
from fastdml.cli.main import COMMANDS
from fastdml.cli.train import train_config
from fastdml.models import create_model, model_names
from fastdml.report import plots
from fastdml.report.metrics_log import MetricsLog, read_metrics
from fastdml.train import checkpoint
from fastdml.train.config.fields import field_types
from fastdml.train.config.sources import load_config, preset

DATA = ("digits", "cifar10", "cifar100", "market1501")


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
        if command in ("doctor", "bench"):
            words_.append("--no-such-option")  # or the machine would be measured, for seconds
        if command == "config":
            words_ = [word for word in words_ if word != "--to"]  # which would write into here
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
    plots.draw = lambda *_: []  # takes longer than the run
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
