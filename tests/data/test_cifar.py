from __future__ import annotations

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastdml.data import load, load_cifar100
from fastdml.data.sets.cifar import CIFAR10, CIFAR100, MEAN, STD, load_source
from fastdml.errors import InputError

RECORDS = {"train_records": 20, "test_records": 10}
SOURCES = [replace(CIFAR10, **RECORDS), replace(CIFAR100, **RECORDS)]
CIFAR100_SMALL = SOURCES[1]
by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)


def content(source, k, records):
    """Labels (records, bytes a record) and pixels (records, 3072) of file `k`."""
    random = np.random.default_rng(k)
    labels = np.stack([random.integers(0, c, records) for c in source.label_ranges], axis=1)
    return labels.astype(np.uint8), random.integers(0, 256, (records, 3072), dtype=np.uint8)


def each_file(source):
    for k, name in enumerate(source.files):
        records = source.test_records if name == source.test else source.train_records
        yield name, *content(source, k, records)


def write_binary(source, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels, pixels in each_file(source):
        np.concatenate([labels, pixels], axis=1).tofile(folder / f"{name}.bin")


def write_python(source, folder, **change):
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels, pixels in each_file(source):
        batch = {"data": pixels, source.python_labels: labels[:, -1].tolist(), **change}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=4))


def refusal(source, root, **options) -> str:
    with pytest.raises(InputError) as error:
        load_source(source, root, options.get("download", False))
    assert "\n" not in str(error.value)
    return str(error.value)


@by_name
@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("place", ["below", "root"])
def test_files_are_found_and_read(tmp_path, source, version, place):
    folder = tmp_path / getattr(source, f"{version}_folder") if place == "below" else tmp_path
    {"binary": write_binary, "python": write_python}[version](source, folder)
    train, test = load_source(source, tmp_path, False)
    files = list(each_file(source))
    for found, parts in ((train, files[:-1]), (test, files[-1:])):
        pixels = np.concatenate([p for _, _, p in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([labels[:, -1] for _, labels, _ in parts]).astype(np.int64)
        assert torch.equal(found.images, torch.from_numpy(pixels))
        assert found.pixels.is_contiguous()  # as loaders read them, without a copy
        assert torch.equal(found.labels, torch.from_numpy(labels))
        assert found.num_classes == len(found.class_names) == source.label_ranges[-1]
        assert (found.mean, found.std) == (MEAN, STD)
        found.images[0, 0, 0, 0] = 1  # the memory is the set's own


@by_name
def test_absent(tmp_path, source):
    assert "no such folder" in refusal(source, tmp_path / "nowhere")
    found = refusal(source, tmp_path)
    assert f"{tmp_path}: holds no {source.name}" in found
    assert source.binary_folder in found
    assert source.python_folder in found
    assert found.endswith("or use download=True")


def test_folders_of_the_other_set_are_not_taken(tmp_path):
    write_binary(SOURCES[0], tmp_path / CIFAR10.binary_folder)
    assert "holds no CIFAR-100" in refusal(CIFAR100_SMALL, tmp_path)


@by_name
def test_one_file_missing_is_named(tmp_path, source):
    write_binary(source, tmp_path / source.binary_folder)
    (tmp_path / source.binary_folder / f"{source.test}.bin").unlink()
    found = refusal(source, tmp_path)
    assert f"{source.binary_folder}: {source.test}.bin missing" in found
    # a download would have to overwrite the folder: it says so before it fetches anything
    assert refusal(source, tmp_path, download=True) == found


def test_a_complete_version_is_read_where_the_other_is_incomplete(tmp_path):
    write_python(CIFAR100_SMALL, tmp_path / CIFAR100.python_folder)
    write_binary(CIFAR100_SMALL, tmp_path / CIFAR100.binary_folder)
    (tmp_path / CIFAR100.binary_folder / "train.bin").unlink()
    train, _ = load_source(CIFAR100_SMALL, tmp_path, False)
    assert len(train) == 20


@by_name
@pytest.mark.parametrize("cut", [1, 3072, "record"])
def test_truncated_binary_file(tmp_path, source, cut):
    folder = tmp_path / source.binary_folder
    write_binary(source, folder)
    path = folder / f"{source.train[-1]}.bin"
    record = 3072 + len(source.label_ranges)
    size = 20 * record - (record if cut == "record" else cut)
    os.truncate(path, size)
    assert f"{path}: {size:,} bytes, {20 * record:,} expected" in refusal(source, tmp_path)


@pytest.mark.parametrize(("head", "label"), [(0, 20), (1, 100), (1, 255)])
def test_binary_label_out_of_range(tmp_path, head, label):
    folder = tmp_path / CIFAR100.binary_folder
    write_binary(CIFAR100_SMALL, folder)
    data = bytearray((folder / "train.bin").read_bytes())
    data[7 * 3074 + head] = label
    (folder / "train.bin").write_bytes(data)
    found = refusal(CIFAR100_SMALL, tmp_path)
    assert f"{folder / 'train.bin'}: record 7 has label {label}, beyond 0 to" in found


BATCH = np.zeros((20, 3072), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_labels": [0] * 19 + [100]}, "record 19 has label 100, beyond 0 to 99"),
        ({"fine_labels": [-1] + [0] * 19}, "record 0 has label -1, beyond 0 to 99"),
        ({"fine_labels": [0, 2**70] + [0] * 18}, f"record 1 has label {2**70}"),
        ({"fine_labels": [0] * 19}, "19 'fine_labels' for 20 records"),
        ({"fine_labels": [0.0] * 20}, "no list of integers 'fine_labels'"),
        ({"fine_labels": None}, "no list of integers 'fine_labels'"),
        ({"data": BATCH.tobytes()}, "holds no array 'data'"),
        ({"data": BATCH.reshape(40, 1536)}, r"'data' is (40, 1536), expected (20, 3072)"),
        ({"data": BATCH.astype(np.int8)}, "'data' holds 'i1', not bytes"),
        ({"data": BATCH.astype(object)[:, :1600]}, "'data' holds 'O8', not bytes"),
    ],
)
def test_python_content_is_checked(tmp_path, change, message):
    folder = tmp_path / CIFAR100.python_folder
    write_python(CIFAR100_SMALL, folder, **change)
    found = refusal(CIFAR100_SMALL, tmp_path)
    assert found.startswith(f"{folder / 'train'}: ")
    assert message in found


def test_fortran_order_is_understood(tmp_path):
    folder = tmp_path / CIFAR100.python_folder
    write_python(CIFAR100_SMALL, folder)
    labels, pixels = content(CIFAR100, 0, 20)
    batch = {"data": np.asfortranarray(pixels), "fine_labels": labels[:, 1].tolist()}
    (folder / "train").write_bytes(pickle.dumps(batch, protocol=4))
    train, _ = load_source(CIFAR100_SMALL, tmp_path, False)
    assert torch.equal(train.images, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))


def put_pickle(tmp_path, data: bytes):
    """`data` as the training file, followed by as many bytes as its size check asks for."""
    folder = tmp_path / CIFAR100.python_folder
    write_python(CIFAR100_SMALL, folder)
    (folder / "train").write_bytes(data + bytes(20 * 3072 + 1))
    return folder / "train"


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(5))
def test_pickle_that_runs_a_command_is_refused(tmp_path, protocol):
    witness = tmp_path / "witness"
    attack = {"data": Runs(os.system, f"touch {witness}")}
    path = put_pickle(tmp_path, pickle.dumps(attack, protocol=protocol))
    found = refusal(CIFAR100_SMALL, tmp_path)
    assert f"{path}: refused" in found
    assert f"{os.system.__module__}.system" in found
    assert not witness.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "numpy.load",
        "numpy.core.multiarray.scalar",
    ],
)
def test_pickle_that_asks_for_another_name_is_refused_by_that_name(tmp_path, name):
    module, function = name.rsplit(".", 1)
    put_pickle(tmp_path, f"c{module}\n{function}\n(S'touch x'\ntR.".encode())
    assert f"asks for {name}," in refusal(CIFAR100_SMALL, tmp_path)


DTYPE = b"cnumpy\ndtype\n(S'u1'\ntR"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated or not a pickle"),
        (b"\x80\x02}q\x01(U\x04data", "truncated or not a pickle"),
        (b"\x93NUMPY", "truncated or not a pickle"),
        (b"(lp0\n.", "holds a list, not a dictionary"),
        (b"I1\n.", "holds a int, not a dictionary"),
        (b"(S'data'\nI5\nd.", "holds no array 'data'"),
        (b"(S'data'\n" + ARRAY + b"d.", "'data' holds None, not bytes"),
        (b"(S'data'\n" + ARRAY + b"(I1\nI2\ntbd.", "truncated or not a pickle"),
        # a shape larger than the bytes, where numpy itself would have to be trusted to notice
        (
            b"(S'data'\n" + ARRAY + b"(I1\n(I20\nI3072\nt" + DTYPE + b"I00\nS'abc'\ntbd.",
            r"'data' holds 3 bytes for the shape (20, 3072)",
        ),
        (
            b"(S'data'\n" + ARRAY + b"(I1\nS'xy'\n" + DTYPE + b"I00\nS'abc'\ntbd.",
            "'data' holds 3 bytes for the shape b'xy'",
        ),
    ],
)
def test_damaged_pickle(tmp_path, data, message):
    path = put_pickle(tmp_path, data)
    found = refusal(CIFAR100_SMALL, tmp_path)
    assert found.startswith(f"{path}: ")
    assert message in found


@pytest.mark.parametrize("size", [0, 20 * 3072, 20 * (3072 + 200)])
def test_size_of_a_python_file(tmp_path, size):
    folder = tmp_path / CIFAR100.python_folder
    write_python(CIFAR100_SMALL, folder)
    os.truncate(folder / "test", 0)
    os.truncate(folder / "train", size)
    assert f"train: {size:,} bytes, 61,440 to 65,440 expected" in refusal(CIFAR100_SMALL, tmp_path)


def test_real_cifar100(cifar100_root):
    """Both versions of the real files, and the facts about them that the reader states."""
    binary = load("cifar100", cifar100_root)
    python = load_cifar100(cifar100_root / "cifar-100-python")
    for a, b, n in zip(binary, python, (50_000, 10_000), strict=True):
        assert a.images.shape == (n, 3, 32, 32)
        assert a.pixels.is_contiguous()
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.bincount(a.labels).tolist() == [n // 100] * 100
    assert binary[0].class_names[binary[0].labels[0]] == "cattle"
    meta = pickle.loads((cifar100_root / "cifar-100-python" / "meta").read_bytes())
    assert list(binary[0].class_names) == meta["fine_label_names"]
    # the set's own statistics, and that the customary ones come near
    channels = binary[0].images.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(c, minlength=256) for c in channels]).double()  # (3, 256)
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256).double()
    mean = share @ value
    std = (share @ value.square() - mean.square()).sqrt()
    assert [round(float(m), 1) for m in mean] == [129.3, 124.1, 112.4]
    assert [round(float(s), 1) for s in std] == [68.2, 65.4, 70.4]
    assert ((mean - torch.tensor(MEAN)) / torch.tensor(STD)).abs().max() < 0.07
    assert (std / torch.tensor(STD) - 1).abs().max() < 0.09
