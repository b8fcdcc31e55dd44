"""Image files from anywhere: every mode becomes RGB, every bad file a clear error."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxrel.images import read_image, read_images, rgb


def save(path, image, **options):
    image.save(path, **options)
    return path


def noise(height, width, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def png_header(width, height):
    """A PNG file that promises this size and holds no pixels."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    pixels = noise(5, 7)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(pixels), lossless=True)
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_the_content_counts_not_the_suffix(tmp_path):
    path = save(tmp_path / "a.txt", Image.new("RGB", (4, 4), (250, 128, 3)), format="JPEG")
    # JPEG is lossy; a plain area comes back within rounding of its colour transform.
    np.testing.assert_allclose(np.asarray(read_image(str(path)))[0, 0], (250, 128, 3), atol=2)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ],
)
def test_modes_become_rgb_over_white(tmp_path, mode, colour, expected):
    path = save(tmp_path / "a.png", Image.new(mode, (3, 2), colour))
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert image.getpixel((0, 0)) == expected


def test_palettes_and_their_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    opaque = read_image(save(tmp_path / "a.png", image))
    assert [opaque.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    for name in ("b.png", "b.gif"):
        clear = read_image(save(tmp_path / name, image, transparency=1))
        assert [clear.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    # Transparency as a list of bytes, of which Pillow warns when it converts.
    clear = read_image(save(tmp_path / "c.png", image, transparency=b"\x00\xff"))
    assert clear.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = read_image(save(tmp_path / "a.jpg", image, quality=100)).getpixel((4, 4))
    np.testing.assert_allclose(red, (255, 0, 0), atol=4)  # JPEG is lossy
    assert read_image(save(tmp_path / "a.tiff", image)).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_cut(tmp_path, suffix):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    image = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("values", [np.array([[0.0, 0.5]], np.float32), np.array([[0, 1 << 20]])])
def test_values_without_a_defined_white_are_refused(tmp_path, values):
    kind = np.float32 if values.dtype == np.float32 else np.int32
    path = save(tmp_path / "a.tiff", Image.fromarray(values.astype(kind)))
    with pytest.raises(ValueError, match=r"a\.tiff has pixels of .*8-bit RGB or grey"):
        read_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = noise(4, 6)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(path)), upright)


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00II*\x00"]
)
def test_unreadable_exif_is_ignored(tmp_path, exif):
    path = save(tmp_path / "a.jpg", Image.new("RGB", (6, 4)), exif=exif)
    assert read_image(path).size == (6, 4)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_and_long_strips(tmp_path):
    for size in ((1, 1), (4000, 1), (1, 4000)):
        assert read_image(save(tmp_path / "a.png", Image.new("L", size))).size == size


def test_files_that_are_no_images(tmp_path):
    def refused(name, error, text):
        with pytest.raises(error, match=text) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)

    refused("missing.png", FileNotFoundError, "there is no such file; check the name")
    (tmp_path / "folder").mkdir()
    refused("folder", IsADirectoryError, "is a folder; give an image file")
    os.mkfifo(tmp_path / "pipe")
    refused("pipe", OSError, "not a regular file")
    (tmp_path / "empty.png").write_bytes(b"")
    refused("empty.png", ValueError, r"is empty \(0 bytes\)")
    (tmp_path / "text.png").write_text("this is no image")
    refused("text.png", ValueError, "is not an image .* PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM")
    (tmp_path / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refused("drawing.eps", ValueError, "is not an image that can be read")
    (tmp_path / "flat.png").write_bytes(png_header(0, 10))
    refused("flat.png", ValueError, "is not an image that can be read, or its header is damaged")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_cut_images(tmp_path, kind):
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, kind)
    data = whole.getvalue()
    for share in (0.9, 0.5, 0.02):
        path = tmp_path / f"{share}.png"
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"damaged or cut short|header is damaged"):
            read_image(path)


def test_damage_inside(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "PNG")
    data = bytearray(whole.getvalue())
    data[200:260] = bytes(60)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png is damaged or cut short .*get a whole copy"):
        read_image(tmp_path / "a.png")


def test_too_large_is_told_from_the_header(tmp_path):
    path = tmp_path / "a.png"
    # Promises 100 million pixels, which Pillow only warns of, and holds none.
    path.write_bytes(png_header(10_000, 10_000))
    with pytest.raises(
        ValueError, match=r"10,000 x 10,000 = 100,000,000 pixels, at most 50,000,000.*scale"
    ):
        read_image(path)
    # Pillow refuses this one itself.
    path.write_bytes(png_header(50_000, 50_000))
    with pytest.raises(ValueError, match="too large: 2,500,000,000 pixels, at most 50,000,000"):
        read_image(path)
    with pytest.raises(ValueError, match="too large: 2,500,000,000 pixels, at most 178,956,970"):
        read_image(path, max_pixels=10**12)
    small = save(tmp_path / "b.png", Image.new("L", (10, 10)))
    with pytest.raises(ValueError, match="10 x 10 = 100 pixels, at most 99"):
        read_image(small, max_pixels=99)
    assert read_image(small, max_pixels=100).size == (10, 10)


def test_several(tmp_path):
    paths = [save(tmp_path / f"{i}.png", Image.new("L", (i, 2))) for i in (3, 1, 2)]
    assert [image.width for image in read_images(iter(paths))] == [3, 1, 2]
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_images([*paths, tmp_path / "absent.png"])
    with pytest.raises(ValueError, match="at least one"):
        read_images([])
    with pytest.raises(TypeError, match="needs a list of paths, got one"):
        read_images(str(paths[0]))


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def test_an_opened_image_is_read_as_its_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.fromarray(noise(4, 6, 4))
    grey = Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000)
    for image, name in ((Image.fromarray(noise(4, 6)), "a.png"), (clear, "b.png"), (grey, "c.png")):
        path = save(tmp_path / name, image, exif=exif)
        found = rgb(opened(path))
        assert (found.mode, found.size) == ("RGB", (4, 6))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(read_image(path)))
        # What is upright is not turned again, and what was given stays as it was.
        np.testing.assert_array_equal(np.asarray(rgb(found)), np.asarray(found))
        assert opened(path).getexif()[0x0112] == 6


def test_an_opened_image_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="the image has pixels of Pillow's mode 'F', which have"):
        rgb(Image.new("F", (2, 2)))
    path = save(tmp_path / "a.png", Image.fromarray(noise(64, 64)))
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as image, pytest.raises(ValueError, match="the image is damaged or cut"):
        rgb(image)
