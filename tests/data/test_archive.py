from __future__ import annotations

import functools
import hashlib
import http.server
import io
import socket
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fastdml.data.files import archive
from fastdml.data.files.archive import extract, fetch
from fastdml.data.sets import cifar
from fastdml.data.sets.stand_in import StandIn, build_standin
from fastdml.errors import InputError


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; names that begin with "cut-" stop half way."""

    requests: list[str]

    def do_GET(self):
        self.requests.append(self.path)
        if not self.path.startswith("/cut-"):
            return super().do_GET()
        data = (Path(self.directory) / self.path[1:]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder on 127.0.0.1: its path, its address, and the paths asked for."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Recording", (Handler,), {"requests": []})
    httpd = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}/", handler.requests
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def tar_of(*entries: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def message(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fetch(server, tmp_path):
    folder, address, requests = server
    data = bytes(range(256)) * 10_000
    (folder / "set").write_bytes(data)
    target = tmp_path / "new" / "set"
    fetch(address + "set", target, md5(data))
    assert target.read_bytes() == data
    fetch(address + "set", target, md5(data))  # what is there and right is kept
    assert requests == ["/set"]
    assert [p.name for p in target.parent.iterdir()] == ["set"]


def test_fetch_without_tqdm(server, tmp_path, monkeypatch):
    folder, address, _ = server
    (folder / "set").write_bytes(b"data")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    fetch(address + "set", tmp_path / "set", md5(b"data"))
    assert (tmp_path / "set").read_bytes() == b"data"


def test_wrong_md5_leaves_nothing(server, tmp_path):
    folder, address, _ = server
    (folder / "set").write_bytes(b"altered")
    found = message(fetch, address + "set", tmp_path / "new" / "set", md5(b"official"))
    assert md5(b"altered") in found
    assert md5(b"official") in found
    assert address in found
    assert list((tmp_path / "new").iterdir()) == []


def test_archive_there_with_a_wrong_md5_is_refused_and_kept(tmp_path):
    target = tmp_path / "set"
    target.write_bytes(b"mine")
    found = message(fetch, "http://127.0.0.1:9/set", target, md5(b"official"))
    assert f"{target}: MD5 is {md5(b'mine')}" in found
    assert "delete it" in found
    assert target.read_bytes() == b"mine"


def test_connection_that_ends_half_way(server, tmp_path):
    folder, address, _ = server
    (folder / "cut-set").write_bytes(bytes(100_000))
    target = tmp_path / "new" / "set"
    found = message(fetch, address + "cut-set", target, md5(bytes(100_000)))
    assert "the download failed" in found
    assert "50,000 of 100,000 bytes" in found or "50000 bytes read" in found
    assert list(target.parent.iterdir()) == []


def test_missing_file_and_silent_server(server, tmp_path):
    _, address, _ = server
    assert "404" in message(fetch, address + "absent", tmp_path / "set", md5(b""))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "download failed" in message(
        fetch, f"http://127.0.0.1:{port}/set", tmp_path / "set", md5(b"")
    )


def test_interrupt_leaves_nothing(server, tmp_path, monkeypatch):
    folder, address, _ = server
    (folder / "set").write_bytes(b"data")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "_progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(address + "set", tmp_path / "new" / "set", md5(b"data"))
    assert list((tmp_path / "new").iterdir()) == []


def test_extract(tmp_path):
    path = tmp_path / "set.tar.gz"
    folder = special("set", tarfile.DIRTYPE)
    path.write_bytes(tar_of(folder, ("set/a", b"1"), ("./set/deep/b", b"22"), ("set/empty", b"")))
    extract(path, tmp_path, "set")
    files = {str(p.relative_to(tmp_path / "set")): p for p in (tmp_path / "set").rglob("*")}
    assert set(files) == {"a", "deep", "deep/b", "empty"}
    assert files["deep/b"].read_bytes() == b"22"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.tar.gz"]


def test_what_operating_systems_leave_is_not_unpacked(tmp_path):
    path = tmp_path / "set.tar.gz"
    names = ["._set", "set/._a", "set/.DS_Store", "__MACOSX/set/._a", "set/Thumbs.db", ".DS_Store"]
    links = special("set/._b", tarfile.SYMTYPE, "/etc/passwd")
    path.write_bytes(tar_of(*((name, b"x") for name in names), links, ("set/a", b"1")))
    extract(path, tmp_path, "set")
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.tar.gz"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (("../._evil", b"x"), "climbs out"),
        (("../evil", b"x"), "climbs out"),
        (("set/../../evil", b"x"), "climbs out"),
        (("/tmp/evil", b"x"), "climbs out"),
        (("set\\..\\evil", b"x"), "climbs out"),
        (("other/evil", b"x"), "lies outside set"),
        (("evil", b"x"), "lies outside set"),
        (special("set/evil", tarfile.SYMTYPE, "/etc/passwd"), "is a link to '/etc/passwd'"),
        (special("set/evil", tarfile.SYMTYPE, ".."), "is a link"),
        (special("set/evil", tarfile.LNKTYPE, "../set.tar.gz"), "is a link"),
        (special("set/evil", tarfile.CHRTYPE), "neither a file nor a folder"),
        (special("set/evil", tarfile.BLKTYPE), "neither a file nor a folder"),
        (special("set/evil", tarfile.FIFOTYPE), "neither a file nor a folder"),
        (special("../evil", tarfile.DIRTYPE), "climbs out"),
        (special("set", tarfile.SYMTYPE, "/tmp"), "is a link"),
    ],
)
def test_dangerous_entries_are_refused(tmp_path, entry, reason):
    root = tmp_path / "root"
    root.mkdir()
    path = root / "set.tar.gz"
    path.write_bytes(tar_of(("set/fine", b"1"), entry, ("set/after", b"2")))
    found = message(extract, path, root, "set")
    assert reason in found
    assert str(path) in found
    assert [p.name for p in tmp_path.rglob("*")] == ["root", "set.tar.gz"]


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "empty", "twice"])
def test_damaged_archives_leave_nothing(tmp_path, damage):
    noise = bytes((7 * k * k + k // 3) % 256 for k in range(50_000))
    data = bytearray(tar_of(("set/a", noise)))
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "not gzip":
        data = bytearray(b"<html>404</html>")
    elif damage == "empty":
        data = bytearray(tar_of())
    else:
        data = bytearray(tar_of(("set/a", b"1"), ("set/a", b"2")))
    path = tmp_path / "set.tar.gz"
    path.write_bytes(data)
    assert str(path) in message(extract, path, tmp_path, "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz"]


def test_extract_overwrites_nothing(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_bytes(b"mine")
    path = tmp_path / "set.tar.gz"
    path.write_bytes(tar_of(("set/mine", b"theirs")))
    assert "move it away" in message(extract, path, tmp_path, "set")
    assert (tmp_path / "set" / "mine").read_bytes() == b"mine"


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    found = message(fetch, "http://127.0.0.1:9/set", tmp_path / "file" / "set", md5(b""))
    assert "the download failed" in found


@pytest.mark.parametrize("source", [cifar.CIFAR10, cifar.CIFAR100], ids=lambda s: s.name)
def test_download_of_a_set(server, tmp_path, monkeypatch, source):
    """From an empty folder to images: fetched once, checked, unpacked, read."""
    served, address, requests = server
    record = bytes(len(source.label_ranges)) + bytes(range(256)) * 12
    data = tar_of(*((f"{source.binary_folder}/{name}.bin", record * 3) for name in source.files))
    (served / source.archive).write_bytes(data)
    monkeypatch.setattr(cifar, "BASE_URL", address)
    small = replace(source, train_records=3, test_records=3, md5=md5(data))
    root = tmp_path / "data"
    for _ in range(2):
        train, test = cifar.load_source(small, root, True)
        assert len(train) == 3 * len(source.train)
        assert len(test) == 3
        assert train.images[0].flatten()[:256].tolist() == list(range(256))
    assert requests == ["/" + source.archive]
    altered = replace(small, md5=md5(b"something else"))
    found = message(cifar.load_source, altered, tmp_path / "other", True)
    assert "the official one is" in found
    assert list((tmp_path / "other").iterdir()) == []


def test_an_archive_already_there_is_unpacked_without_a_network(tmp_path, monkeypatch):
    source = cifar.CIFAR100
    record = bytes(3074)
    data = tar_of(*((f"{source.binary_folder}/{name}.bin", record) for name in source.files))
    (tmp_path / source.archive).write_bytes(data)
    monkeypatch.setattr(archive.urllib.request, "urlopen", None)
    small = replace(source, train_records=1, test_records=1, md5=md5(data))
    assert len(cifar.load_source(small, tmp_path, True)[0]) == 1


def test_official_addresses():
    assert cifar.BASE_URL.startswith("https://www.cs.toronto.edu/")
    assert cifar.CIFAR100.md5 == "03b5dce01913d631647c71ecec9e9cb8"
    assert cifar.CIFAR10.md5 == "c32a1d4ab5d03f1284b67883e8d87530"


@pytest.mark.parametrize("hint", ["download=True", "--download"])
@pytest.mark.parametrize(
    "state", ["absent", "empty", "incomplete", "short", "wrong archive", "damaged archive", "gone"]
)
def test_the_remedy_is_that_of_the_caller(tmp_path, monkeypatch, state, hint):
    """An option to the command, an argument in Python; never the one of the other."""
    source, root, download = cifar.CIFAR100, tmp_path / "data", False
    if state != "absent":
        root.mkdir()
    folder, packed = root / source.binary_folder, root / source.archive
    if state in ("incomplete", "short"):
        folder.mkdir()
        (folder / "train.bin").write_bytes(b"")
        download = state == "incomplete"
    if state == "short":
        (folder / "test.bin").write_bytes(b"")
    if "archive" in state:
        packed.write_bytes(b"<html>")
        download = True
    if state == "damaged archive":
        source = replace(source, md5=md5(b"<html>"))
    if state == "gone":
        monkeypatch.setattr(cifar, "BASE_URL", "http://127.0.0.1:9/")
        download = True
    found = message(cifar.load_source, source, root, download, hint)
    other = {"download=True": "--download", "--download": "download=True"}[hint]
    assert f"use {hint}" in found
    assert other not in found


def test_the_stand_in_passes_the_remedy_on(tmp_path):
    for hint in ("download=True", "--download"):
        found = message(build_standin, tmp_path / "to", tmp_path / "nowhere", StandIn(), hint)
        assert found.endswith(f"or use {hint}")
