"""analysis.json is read as it was written, and refused in one line where it is not one."""

from __future__ import annotations

import json
import math

import pytest

from fastdml.errors import InputError
from fastdml.report.analysis_file import ANALYSIS, LARGEST, read_analysis, write_analysis


def test_there_and_back(tmp_path):
    assert read_analysis(tmp_path) == {}
    path = write_analysis(tmp_path, {"flat_minima": {"loss": [0.5, math.nan]}, "pairs": [{}]})
    assert path == tmp_path / ANALYSIS
    assert read_analysis(tmp_path) == {"flat_minima": {"loss": [0.5, None]}, "pairs": [{}]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\x00{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "holds no analysis"),
        (b"{}", "holds no analysis"),
        (b'{"version": true}', "holds no analysis"),
        (json.dumps({"version": 2}).encode(), "of a later version of fastdml"),
    ],
)
def test_what_is_none_is_one_line(tmp_path, text, said):
    (tmp_path / ANALYSIS).write_bytes(text)
    with pytest.raises(InputError, match=said) as caught:
        read_analysis(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_or_a_huge_file_in_its_place(tmp_path):
    with (tmp_path / ANALYSIS).open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(InputError, match="holds no analysis"):
        read_analysis(tmp_path)
    (tmp_path / ANALYSIS).unlink()
    (tmp_path / ANALYSIS).mkdir()
    with pytest.raises(InputError, match="holds no analysis"):
        read_analysis(tmp_path)
