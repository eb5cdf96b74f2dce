"""A run talks to nobody."""

from __future__ import annotations

import sys

from fastdml import cli

seen: list[str] | None = None  # what happens to sockets, where somebody listens


def note(event: str, args: tuple) -> None:
    if seen is not None and event.startswith(
        ("socket.", "http.", "urllib.", "ftplib.", "smtplib.")
    ):
        seen.append(f"{event} {args[1:]}")


def test_training_opens_no_socket(tmp_path, monkeypatch):
    """Python reports each socket that is made, each name that is looked up and each connection,
    whatever library asks for it."""
    global seen
    monkeypatch.chdir(tmp_path)
    sys.addaudithook(note)  # for good: it cannot be taken back
    options = "--subset 64 --batch-size 16 --epochs 1 --csv --independent --figures png"
    seen = []
    try:
        assert cli.main(["train", "digits", "--peers", "resnet8", "resnet8", *options.split()]) == 0
        found = seen
    finally:
        seen = None
    # the machine's own name is part of the names of TensorBoard's files
    assert [event for event in found if not event.startswith("socket.gethostname")] == []


def test_the_hook_would_see_one():
    import socket

    global seen
    sys.addaudithook(note)
    seen = []
    try:
        socket.socket().close()
        assert seen
    finally:
        seen = None
