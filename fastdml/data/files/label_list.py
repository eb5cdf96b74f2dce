"""Lists of images with their labels: CSV files of path,label.

A first line that names the columns is recognised, and other columns are then passed over; without
it there are two, in this order. Paths are relative to the list, with slashes or backslashes; names
with commas, quotes or line breaks stand in quotes, as spreadsheets write them. Labels are names:
whole numbers too, which are only sorted as numbers.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

from fastdml.data.files.class_folders import Listing, class_name, counted, is_image
from fastdml.errors import InputError

PATH = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "img",
)
LABEL = ("label", "class", "class_name", "classname", "category", "target", "y")
FORM = "write two columns, path,label, or name them so in the first line"
THERE = "the file is not there"


def read_label_list(file: Path) -> Listing:
    """The images that a list names. Files that are not there go into `bad`. Raises InputError,
    with the line, for a list that cannot be read or says two things of one image."""
    found = Listing(file)
    first: dict[str, tuple[str, int]] = {}  # path -> label, line
    again = 0
    folder = str(file.parent)
    for line, written, label in _rows(file):
        name = class_name(label, f"{file}, line {line}")
        path = _resolved(folder, written)
        if path in first:
            before, where = first[path]
            if before != name:
                raise InputError(
                    f"{file}: {written!r} is {before!r} in line {where} and {name!r} in line "
                    f"{line}: keep one of them"
                )
            again += 1
            continue
        first[path] = name, line
        found.paths.append(path)
        found.classes.append(name)
        if not os.path.isfile(path):
            found.bad[path] = f"{THERE}, but line {line} of {file} names it"
    if not first:
        raise InputError(f"{file}: names no images: {FORM}")
    if again:
        found.notes.append(f"{file}: {counted(again, 'line')} left out: another says the same")
    return found


def sorted_classes(names: set[str], listed: bool) -> tuple[str, ...]:
    """Class names in the order of their labels: as text, and in a list, where all are whole
    numbers, as these."""
    if listed and all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, path, label) of each row."""
    text = _text(file)
    columns: tuple[int, int] | None = None
    reader = csv.reader(io.StringIO(text), delimiter=_separator(text), skipinitialspace=True)
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                columns = _columns(row)
                if columns is not None:
                    continue
                columns = 0, 1
                if len(row) != 2:
                    raise InputError(
                        f"{file}: line {reader.line_num} has {counted(len(row), 'column')}: {FORM}"
                    )
                if not is_image(row[0].strip()) and not os.path.isfile(file.parent / row[0]):
                    raise InputError(
                        f"{file}: line {reader.line_num} names neither an image nor columns that "
                        f"are known, but {row[0]!r} and {row[1]!r}: {FORM}"
                    )
            if len(row) <= max(columns):
                raise InputError(
                    f"{file}: line {reader.line_num} has {counted(len(row), 'column')}, too few: "
                    f"{FORM}"
                )
            path, label = row[columns[0]], row[columns[1]].strip()
            if not path.strip() or not label:
                what = "label" if path.strip() else "path"
                raise InputError(f"{file}: line {reader.line_num} has no {what}: give one")
            yield reader.line_num, path, label
    except csv.Error as error:
        raise InputError(f"{file}: line {reader.line_num}: {error}: {FORM}") from None


def _separator(text: str) -> str:
    """What stands between the columns: the first of these that divides the first line."""
    head = text.lstrip().partition("\n")[0]
    try:
        return next((s for s in ",;\t" if len(next(csv.reader([head], delimiter=s), ())) > 1), ",")
    except csv.Error:  # reading the list says what it is
        return ","


def _columns(row: list[str]) -> tuple[int, int] | None:
    """Which columns hold path and label, where the first row says so."""
    names = [cell.strip().lower() for cell in row]
    at = [next((names.index(n) for n in known if n in names), None) for known in (PATH, LABEL)]
    return None if at[0] is None or at[1] is None else (at[0], at[1])


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file}: is not written in UTF-8: save it as CSV UTF-8") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if "\0" in text:
        raise InputError(f"{file}: is no text file: save it as CSV UTF-8")
    return text


def _resolved(folder: str, written: str) -> str:
    """The path that a list means, relative to `folder`."""
    tries = [written, written.strip(), written.strip().replace("\\", "/")]
    paths = [os.path.normpath(os.path.join(folder, name)) for name in tries]
    return next((path for path in paths if os.path.isfile(path)), paths[1])
