"""The command as a process: start-up, signals, pipes, imports, what a terminal can show."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import C_LOCALE, ENVIRONMENT, FASTDML

from fastdml import cli
from fastdml.train.tasks import classification


@pytest.mark.parametrize("module", ["fastdml", "fastdml.cli"])
def test_the_real_command_refuses_in_one_line(tmp_path, module):
    done = subprocess.run(
        [sys.executable, "-m", module, "train", "cifar100", "--root", "nowhere"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("fastdml: error: nowhere")
    assert list(tmp_path.iterdir()) == []


def test_top_level_help_and_typing_errors_need_no_torch(tmp_path):
    code = (
        "import sys; from fastdml.cli import main\n"
        "codes = [main(a.split()) for a in ('--help', '--version', 'train', 'trian', 'data')]\n"
        "assert codes == [0, 0, 0, 2, 0], codes\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [*FASTDML, "--help"],
            cwd=tmp_path, env=ENVIRONMENT, stdout=closed, stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
    assert done.returncode == 141
    assert done.stderr == b""


def test_interrupting_before_training_promises_nothing(monkeypatch, capfd):
    def interrupted(name: str, root: str, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classification, "load", interrupted)
    assert cli.main(["train", "digits"]) == 130
    assert capfd.readouterr().err == "fastdml: interrupted\n"


def test_interrupting_says_how_to_go_on(tmp_path):
    options = "--peers resnet8 --epochs 500 --folder run"
    process = subprocess.Popen(
        [*FASTDML, "train", "digits", *options.split()],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "last.ckpt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("fastdml: ")
    assert "resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0  # from the checkpoint


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        pytest.param({"PYTHONIOENCODING": "ascii"}, b"\\xe9", marks=pytest.mark.slow),
        (C_LOCALE | {"PYTHONIOENCODING": "ascii"}, "é".encode()),
    ],
)
def test_what_a_terminal_cannot_show(tmp_path, environment, shown):
    """A whole run in a folder called é, said as the terminal can; and then a refusal."""
    code = (
        "import sys; from fastdml.cli import main\n"
        "options = 'train digits --peers resnet8 --epochs 1 --subset 128 --no-tensorboard'\n"
        "args = [*options.split(), '--folder', sys.argv[1]]\n"
        "sys.exit([main(args), main(args)] != [0, 2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "é"],
        cwd=tmp_path, env=ENVIRONMENT | environment, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"run folder: " + shown + b"\n")
    assert b"error: " + shown + b" is there already" in done.stderr
    assert (tmp_path / "é" / "cohort.json").exists()


def test_names_that_are_no_text(tmp_path, capfdbinary):
    """Bytes that are not UTF-8 reach the terminal as they are."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    assert cli.main(["evaluate", os.fsdecode(folder)]) == 2
    assert folder in capfdbinary.readouterr().err


def test_a_file_of_settings_in_a_locale_without_its_letters(tmp_path):
    (tmp_path / "c.yaml").write_text("folder: é\n", encoding="utf-8")
    done = subprocess.run(
        [*FASTDML, "train", "digits", "--config", "c.yaml"],
        cwd=tmp_path, capture_output=True, timeout=60, text=True,
        env=ENVIRONMENT | C_LOCALE,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be the name of a file here" in done.stderr
