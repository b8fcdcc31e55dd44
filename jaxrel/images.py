"""Reading image files that come from anywhere: a user's folder, a download, a camera."""

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

# A closed list: Pillow also knows formats that start other programs (EPS starts Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# What Pillow's readers raise on bytes that are not what their header promised.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError)
_BROKEN = (*_DAMAGE, struct.error, zlib.error, OverflowError)

# EXIF orientation: how the camera was held, and what turns the image upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    path: str | os.PathLike[str] | io.BufferedIOBase, *, max_pixels: int = 50_000_000
) -> Image.Image:
    """Read an image file as RGB, upright.

    The size in the header is checked before any pixel is decoded. Of an animation the first
    frame is read. Transparent parts become white. 16-bit greys are scaled to 8 bits. Colour
    profiles are not applied.

    Args:
      path: a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file, or one that is open for reading in
        binary; the content counts, not the suffix.
      max_pixels: the largest image accepted, height times width.

    Returns:
      An image of mode RGB, at least 1 x 1.

    Raises:
      OSError: there is no such file, or it is a folder or cannot be opened.
      ValueError: the file is empty, no image, cut short, damaged or too large.
    """
    if not isinstance(path, str | os.PathLike):
        return _decoded(path, Path("the image"), max_pixels)
    path = _checked(path)
    with path.open("rb") as file:
        return _decoded(file, path, max_pixels)


def _decoded(file: Any, path: Path, max_pixels: int) -> Image.Image:
    # Pillow warns of odd metadata and large images; what matters here is raised instead.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(
                f"{path} is not an image that can be read, or its header is damaged; "
                f"give one of {', '.join(FORMATS)}"
            ) from None
        except Image.DecompressionBombError as error:
            # Pillow refuses very large images itself, and tells their size only here.
            pixels = int(re.findall(r"\d+", str(error))[0])
            limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
            raise _too_large(path, f"{pixels:,} pixels", limit) from None
        except _BROKEN as error:
            raise _damaged(str(path), error) from error
        with image:
            width, height = image.size
            if width * height > max_pixels:
                size = f"{width:,} x {height:,} = {width * height:,} pixels"
                raise _too_large(path, size, max_pixels)
            found = rgb(image, name=str(path))
    # As images that Pillow opens have it: explanations say which file they are of.
    vars(found)["filename"] = str(path)
    return found


def rgb(image: Image.Image, *, name: str = "the image") -> Image.Image:
    """Return an image as `read_image` reads a file: RGB, upright, on white.

    Args:
      image: what `PIL.Image.open` returns, or any other image; it stays as it is.
      name: what to call it in a message.

    Returns:
      A new image of mode RGB. It has no metadata: what turned it upright must not do so twice.

    Raises:
      ValueError: its colours are not sure, or its file is cut short or damaged.
    """
    try:
        image.load()
    except _BROKEN as error:
        raise _damaged(name, error) from error
    try:
        found = _colours(_upright(image))
    except ValueError as error:
        raise ValueError(
            f"{name} has pixels of Pillow's mode {image.mode!r}, which have no sure colour "
            f"({error}); save it as an 8-bit RGB or grey image"
        ) from error
    found.info = {}
    return found


def read_images(
    paths: Iterable[str | os.PathLike[str]], *, max_pixels: int = 50_000_000
) -> list[Image.Image]:
    """Read several image files, as `read_image` does; the first bad one raises.

    Args:
      paths: the files, at least one.
      max_pixels: the largest image accepted, height times width.

    Returns:
      The images, in the order of the paths.

    Raises:
      TypeError: `paths` is a single path.
      ValueError: there are no paths, or a file is no usable image.
      OSError: a file cannot be opened.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"read_images needs a list of paths, got one: [{str(paths)!r}]")
    paths = list(paths)
    if not paths:
        raise ValueError("no image files are given; give at least one")
    # All of them, before a large first one is decoded.
    for path in paths:
        _checked(path)
    return [read_image(path, max_pixels=max_pixels) for path in paths]


def _checked(given: str | os.PathLike[str]) -> Path:
    if is_address(given):
        raise ValueError(f"{given!s:.80} is an address; download the image, and give the file")
    path = Path(given)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give an image file, such as {path}/*.png")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; check the name of the image")
    if not path.is_file():
        raise OSError(f"{path} is not a regular file; give an image file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); give an image file")
    return path


def is_address(name: str | os.PathLike[str]) -> bool:
    """Whether a name is an address, as of the web, and no file's."""
    return isinstance(name, str) and re.match(r"[a-z0-9]+://|data:image/", name) is not None


def _too_large(path: Path, size: str, max_pixels: int) -> ValueError:
    return ValueError(
        f"{path} is too large: {size}, at most {max_pixels:,} are read; scale the image down "
        "(a model sees a few hundred pixels a side), or, in Python, raise max_pixels if you trust "
        "the file"
    )


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} is damaged or cut short ({error}); get a whole copy of the image")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _BROKEN:
        # Unreadable metadata says nothing about the pixels, which have been read.
        return image
    step = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if step is None else image.transpose(step)


def _colours(image: Image.Image) -> Image.Image:
    """The colours of an image that is upright; ValueError says why they are not sure."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() >= 0 and values.max() < 2**16:
            # Pillow's own conversion cuts off at 255. 65535 / 257 = 255.
            image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    # For these two Pillow cuts off silently: nothing says which value is white.
    if image.mode in ("I", "F"):
        raise ValueError("no value is defined as white")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image.convert("RGB")
