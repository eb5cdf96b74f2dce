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


def test_the_first_picture_of_several(tmp_path):
    """As phones write them into one file."""
    first, second = (Image.new("RGB", (6, 4), colour) for colour in ("white", "black"))
    for form in ("MPO", "GIF"):
        first.save(tmp_path / form, form, save_all=True, append_images=[second])
        assert decode(tmp_path / form).min() == 255


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


def photograph(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [(40, 30, 16), (30, 40, 16), (31, 31, 16), (7, 5, 16), (16, 16, 16), (16, 40, 16),
     (333, 97, 64), (5, 1, 8), (1, 9, 8), (64, 63, 63), (50, 201, 33)],
)  # fmt: skip
def test_crop_gives_the_bits_of_torchvision(tmp_path, width, height, side):
    """Enlarged, shrunk, of that size already, and with odd margins to cut off."""
    v1 = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    from torchvision.transforms import v2

    photograph(width, height).save(tmp_path / "image.png")
    ours = decode(tmp_path / "image.png", (side, side), "crop")
    for transforms in (v1, v2):
        theirs = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
        assert np.array_equal(ours, np.asarray(theirs(Image.open(tmp_path / "image.png"))))


@pytest.mark.parametrize(
    ("width", "height"), [(40, 30), (30, 40), (24, 16), (100, 16), (3, 2), (2, 3)]
)
def test_crop_covers_what_is_not_square(tmp_path, width, height):
    image = photograph(width, height)
    image.save(tmp_path / "image.png")
    pixels = decode(tmp_path / "image.png", (16, 24), "crop")
    assert pixels.shape == (16, 24, 3)
    scale = max(16 / height, 24 / width)
    cover = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
    left, top = round((cover.width - 24) / 2), round((cover.height - 16) / 2)
    assert np.array_equal(pixels, np.asarray(cover)[top : top + 16, left : left + 24])


def test_stretch_changes_the_proportions(tmp_path):
    image = photograph(40, 30)
    image.save(tmp_path / "image.png")
    stretched = np.asarray(image.resize((24, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(tmp_path / "image.png", (16, 24)), stretched)
    assert np.array_equal(decode(tmp_path / "image.png", (30, 40), "crop"), np.asarray(image))


def test_a_narrow_image_is_not_made_an_enormous_one(tmp_path):
    Image.new("L", (30_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(BadImage, match="30000x1 pixels are too narrow for 224x224"):
        decode(tmp_path / "line.png", (224, 224), "crop")
    assert decode(tmp_path / "line.png", (2, 2), "crop").shape == (2, 2, 3)


def test_orientation_of_a_camera_comes_before_the_crop(tmp_path):
    image, exif = photograph(40, 30), Image.Exif()
    exif[0x0112] = 6  # turn it by 270 degrees to look at it
    image.save(tmp_path / "image.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(decode(tmp_path / "image.png"), np.asarray(upright))
    upright.save(tmp_path / "upright.png")
    cropped = [decode(tmp_path / f"{name}.png", (16, 16), "crop") for name in ("image", "upright")]
    assert np.array_equal(*cropped)


def in_mode(mode: str) -> Image.Image:
    image = photograph(12, 8)
    if mode == "P with transparency":
        image = image.quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
    elif mode == "P with one transparent colour":
        image = image.quantize(16)
        image.info["transparency"] = 3
    elif mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(photograph(12, 8).convert("L"))
    else:
        image = image.convert(mode)
    return image


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"),
     ("RGBA", "WEBP"), ("P with transparency", "PNG"), ("P with one transparent colour", "GIF"),
     ("P with one transparent colour", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("CMYK", "TIFF"),
     ("YCbCr", "TIFF")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Palette images")  # Pillow's, of torchvision's loader
def test_modes_become_rgb_as_for_torchvision(tmp_path, mode, form):
    """Transparency is dropped: a transparent pixel has the colour that its file stores."""
    folder = pytest.importorskip("torchvision.datasets.folder", reason="torchvision is absent")
    options = {"transparency": t} if (t := in_mode(mode).info.get("transparency")) else {}
    in_mode(mode).save(tmp_path / "image", form, **options)
    theirs = folder.pil_loader(str(tmp_path / "image"))
    assert np.array_equal(decode(tmp_path / "image"), np.asarray(theirs))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled(tmp_path, form):
    """Pillow's own conversion would make nearly all of it white."""
    values = np.arange(0, 1 << 16, 37, dtype=np.uint16)[: 40 * 44].reshape(40, 44)
    Image.fromarray(values).save(tmp_path / "image", form)
    pixels = decode(tmp_path / "image")
    assert np.array_equal(pixels, np.stack([values // 256] * 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6
    if form == "PNG":  # turned, and resized after the scaling
        Image.fromarray(values).save(tmp_path / "turned", form, exif=exif)
        assert np.array_equal(decode(tmp_path / "turned"), np.rot90(pixels, -1))


def test_pixels_of_32_bits_are_refused(tmp_path):
    for name, values in (
        ("float", np.ones((4, 6), np.float32)),
        ("int", np.ones((4, 6), np.int32)),
    ):
        Image.fromarray(values).save(tmp_path / name, "TIFF")
        with pytest.raises(BadImage, match="32-bit numbers, whose range is unknown: save it in 8"):
            decode(tmp_path / name)
