"""What fastdml says: on stderr by default, by the user's handlers where there are some, once."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastdml import Cohort, logs
from fastdml.errors import InputError
from fastdml.terminal import lenient_stderr
from fastdml.train import TrainConfig, fit

logger = logging.getLogger("fastdml.of.a.test")


@pytest.fixture
def root():
    """The root logger, with the test's own handlers taken off it afterwards."""
    found = logging.getLogger()
    before = list(found.handlers)
    yield found
    for handler in set(found.handlers) - set(before):
        found.removeHandler(handler)


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def kept():
    """A handler of the user's for fastdml."""
    handler = Kept()
    logs.LOGGER.addHandler(handler)
    yield handler
    logs.LOGGER.removeHandler(handler)


@pytest.fixture
def train(tmp_path):
    """A run of a fraction of a second; calls differ in their folders."""
    torch.manual_seed(0)
    images, labels = torch.randn(32, 1, 4, 4), torch.arange(32) % 3
    batches = DataLoader(TensorDataset(images, labels), batch_size=16)
    numbers = iter(range(9))

    def call(peers=2, **changes):
        peers = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(peers)]
        folder = str(tmp_path / f"run{next(numbers)}")
        values = {"epochs": 1, "execution": "eager", "device": "cpu", "threads": 1}
        values |= {"tensorboard": False, "figures": (), "folder": folder, "batch_size": 16}
        return fit(Cohort(peers, num_classes=3), batches, None, TrainConfig(**values | changes))

    return call


def test_lines_are_plain_and_on_stderr(capsys):
    logger.info("100 %% of %s", "it")
    logger.warning("a fault")
    logger.debug("a detail")
    assert capsys.readouterr() == ("", "100 % of it\na fault\n")


def test_two_runs_in_a_process_say_each_line_once(train, capsys):
    for _ in range(2):
        train()
        first, epoch = capsys.readouterr().err.splitlines()
        assert first.startswith("mutual: ")
        assert epoch.startswith("mutual epoch 1/1  loss ")


def test_a_level_silences(train, capsys):
    logs.LOGGER.setLevel(logging.WARNING)
    try:
        train()
        assert capsys.readouterr() == ("", "")
    finally:
        logs.LOGGER.setLevel(logging.INFO)


def test_a_handler_of_ones_own_gets_the_lines_in_place_of_stderr(train, capsys, kept):
    train()
    assert [line.partition(":")[0].partition("  ")[0] for line in kept.lines] == [
        "mutual",
        "mutual epoch 1/1",
    ]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("lenient", [False, True])
def test_a_roots_handler_on_the_terminal_says_them_alone(root, capsys, lenient):
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root.addHandler(handler)
    if lenient:
        with lenient_stderr():
            logger.info("a line")
    else:
        logger.info("a line")
    assert capsys.readouterr() == ("", "INFO a line\n")


def test_a_roots_handler_of_another_packages_says_them_alone(root, capsys):
    root.addHandler(handler := Kept())
    logger.info("a line")
    assert handler.lines == ["a line"]
    assert capsys.readouterr() == ("", "")


def test_a_file_gets_them_beside_stderr(root, capsys, tmp_path):
    handler = logging.FileHandler(tmp_path / "log")
    root.addHandler(handler)
    root.addHandler(logging.NullHandler())
    logger.info("a line")
    handler.close()
    assert (tmp_path / "log").read_text() == "a line\n"
    assert capsys.readouterr() == ("", "a line\n")


def test_a_level_that_was_set_before_the_import_stays():
    code = (
        "import logging; logging.getLogger('fastdml').setLevel(logging.ERROR); import fastdml; "
        "logging.getLogger('fastdml.x').warning('said'); "
        "logging.getLogger('fastdml.x').error('a fault')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "a fault\n")


def test_lines_that_wait_are_shown_when_it_is_certain(capsys, kept):
    logs.LOGGER.removeHandler(kept)
    with logs.held() as show:
        logger.info("first")
        with logs.held():
            logger.info("never")
        assert capsys.readouterr().err == ""
        show()
        show()
        assert capsys.readouterr().err == "first\n"
        logger.info("second")
        assert capsys.readouterr().err == "second\n"
    logger.info("third")
    assert capsys.readouterr().err == "third\n"


def test_a_refusal_takes_back_what_led_to_it(train, capsys):
    with pytest.raises(InputError, match="nothing to resume"):
        train(peers=1, resume=True)
    assert capsys.readouterr().err == ""
    train(peers=1)
    assert capsys.readouterr().err.startswith("one peer learns from the labels alone: ")


@pytest.mark.parametrize("kind", ["none", "closed"])
def test_a_stderr_that_is_not_there_stops_nothing(monkeypatch, capsys, kind):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", None if kind == "none" else stream)
    logger.info("a line")
    assert capsys.readouterr().out == ""


def test_lines_stand_above_a_bar(monkeypatch):
    tqdm = pytest.importorskip("tqdm").tqdm
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with tqdm(total=2, file=stream, desc="bar", leave=True) as bar:
        logger.info("a line")
        bar.update()
    text = stream.getvalue()
    line = text.index("a line\n")
    assert text[:line].endswith("\r")  # the bar was cleared
    assert "bar" in text[line:]  # and drawn again below
