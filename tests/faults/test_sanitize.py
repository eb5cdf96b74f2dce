"""The CPU's native code under sanitizers, against plain double arithmetic; see `make sanitize`."""

from __future__ import annotations

import pytest
from sanitize import HERE, NATIVE, available, driver, problems


def need(tmp_path, build):
    if not available(tmp_path, build):
        pytest.skip(f"the compiler here has no sanitizer for {build}")


@pytest.mark.parametrize(
    ("build", "count"),
    [
        ("address", 30),
        pytest.param("address", 150, marks=pytest.mark.slow),
        pytest.param("thread", 60, marks=pytest.mark.slow),
    ],
)
def test_random_problems(build, count, tmp_path):
    need(tmp_path, build)
    assert problems(driver(tmp_path, build), 0, count) is None


@pytest.mark.parametrize(
    ("build", "file", "right", "wrong", "said"),
    [
        ("address", "cpu_plain_rows.h", "0 : C - LANES;", "0 : C - LANES + 1;", "AddressSanitizer"),
        ("thread", "cpu_variant.h", "Sums *own = sums + b;", "Sums *own = sums;", "data race"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, monkeypatch, build, file, right, wrong, said):
    """A mistake put into a copy of the code."""
    need(tmp_path, build)
    for path in NATIVE.glob("cpu_*.[ch]"):  # for any processor alone, which compiles faster
        (tmp_path / path.name).write_text(path.read_text().replace("#define FASTDML_X86\n", "\n"))
    code, text = (tmp_path / file).read_text(), (HERE / "rows_driver.c").read_text()
    assert right in code
    (tmp_path / file).write_text(code.replace(right, wrong))
    text = text.replace("../../kernels/fastdml_kernels/", "")
    if build == "thread":
        text = text.replace("!draw(40)", "1")  # every problem is worth threads
    (tmp_path / "rows_driver.c").write_text(text)
    monkeypatch.setattr("sanitize.HERE", tmp_path)
    monkeypatch.setattr("sanitize.NATIVE", tmp_path)
    assert said in problems(driver(tmp_path, build), 0, 60)
