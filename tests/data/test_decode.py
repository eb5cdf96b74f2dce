"""What is taken for an image, and what is not."""

from __future__ import annotations

import io

import numpy as np
import pytest

from fastdml.data.files.decode import BadImage, decode

Image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow, which is absent")


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 100, 50)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "PPM", "WEBP", "GIF", "TIFF"])
def test_formats_that_images_come_in(tmp_path, form):
    (tmp_path / "image.jpg").write_bytes(encoded(form))
    pixels = decode(tmp_path / "image.jpg")
    assert pixels.shape == (4, 6, 3)
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() < 16


@pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO"])
def test_a_file_decides_on_no_other_program_or_decoder(tmp_path, monkeypatch, form):
    """Pillow hands EPS to `gs`, whatever the file is called."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "image.jpg").write_bytes(encoded(form))
    with pytest.raises(BadImage, match="not an image that can be decoded"):
        decode(tmp_path / "image.jpg")
    assert not (tmp_path / "ran").exists()
