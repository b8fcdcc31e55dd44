"""From images to a model's inputs, as preprocessor_config.json of the Hugging Face layout says."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from jaxrel.models.checkpoint import read_json
from jaxrel.models.sizes import is_number, is_size

IMAGES = "preprocessor_config.json"

# Of the images that the published encoders were trained on, for each channel in 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of those that CLIP was trained on: what CLIP's file need not say.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# An image that is so many times as large as its middle is not enlarged as a whole.
_MUCH = 16

# A shortest side, or (height, width), both in pixels.
Size = int | tuple[int, int]


@dataclass(frozen=True)
class ImageProcessing:
    """Resizes, crops and normalises images.

    What is cropped away is never enlarged, so that memory does not grow with an image's shape.

    Args:
      size: the shortest side after resizing, which keeps the aspect, or (height, width).
      crop: (height, width) of the middle that is kept; zeros fill what an image lacks.
      mean: taken from each channel, after `factor`.
      std: divides each channel.
      resample: the filter, as Pillow numbers them.
      factor: multiplies the values 0..255.
      resizes, crops, scales, normalises: whether each step is taken.

    Raises:
      ValueError: a value is of another type or out of range.
    """

    size: Size = 224
    crop: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD
    resample: int = int(Image.Resampling.BICUBIC)
    factor: float = 1 / 255
    resizes: bool = True
    crops: bool = True
    scales: bool = True
    normalises: bool = True

    def __post_init__(self) -> None:
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"resample must be a filter of Pillow, 0 to 5, got {self.resample!r}")
        if 0 in self.std:
            raise ValueError(f"image_std must not be 0, got {list(self.std)}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ImageProcessing":
        """Read the content of a preprocessor_config.json; what it lacks is as in CLIP.

        Raises:
          ValueError: a value is of another type or out of range, or is not supported.
        """
        found: dict[str, Any] = {}
        kind = str(fields.get("image_processor_type"))
        usual = next((usual for start, usual in _USUAL.items() if kind.startswith(start)), None)
        for name, (ours, read) in _FIELDS.items():
            # transformers takes null as its default.
            if fields.get(name) is not None:
                found[ours] = read(name, fields[name])
        if usual is None:
            return cls(**found)
        images = replace(usual, **found)
        # Without a crop, height and width say what is made.
        whole = not images.crops and isinstance(images.size, tuple)
        return images.for_size(images.size) if whole else images

    def to_dict(self) -> dict[str, Any]:
        """Write the content of a preprocessor_config.json."""
        size = self.size
        return {
            "crop_size": dict(zip(("height", "width"), self.crop, strict=True)),
            "do_center_crop": self.crops,
            "do_convert_rgb": True,
            "do_normalize": self.normalises,
            "do_rescale": self.scales,
            "do_resize": self.resizes,
            "image_mean": list(self.mean),
            "image_processor_type": "CLIPImageProcessor",
            "image_std": list(self.std),
            "resample": self.resample,
            "rescale_factor": self.factor,
            "size": {"shortest_edge": size}
            if isinstance(size, int)
            else {"height": size[0], "width": size[1]},
        }

    def save_pretrained(self, folder: Path) -> None:
        """Write preprocessor_config.json into a folder."""
        text = json.dumps(self.to_dict(), indent=2)
        (Path(folder) / IMAGES).write_text(text + "\n", encoding="utf-8")

    def __call__(self, image: Image.Image) -> Float[np.ndarray, "height width 3"]:
        """Return the input that a model makes of an image.

        Args:
          image: of mode RGB.

        Returns:
          float32, normalised.
        """
        x = np.asarray(self._cropped(image))
        if self.scales:
            x = (x.astype(np.float64) * self.factor).astype(np.float32)
        x = x.astype(np.float32)
        if self.normalises:
            x = (x - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return x

    @property
    def sides(self) -> tuple[int, int] | None:
        """The (height, width) of what is made of any image; None where it depends on the image."""
        if self.crops:
            return self.crop
        return self.size if self.resizes and isinstance(self.size, tuple) else None

    def made(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) of what is made of an image of this (width, height)."""
        return self.crop if self.crops else self._resized_size(size)[::-1]

    def for_size(self, image_size: int | tuple[int, int]) -> "ImageProcessing":
        """Return the same for another image size.

        Args:
          image_size: pixels of a side of a square, to which images are resized by their shortest
            side and cropped, unless this one crops nothing; or (height, width), to which they are
            resized without keeping their aspect.
        """
        square = isinstance(image_size, int)
        crop = (image_size, image_size) if isinstance(image_size, int) else image_size
        size: Size = image_size if square and self.crops else crop
        return replace(self, size=size, crop=crop, resizes=True)

    def seen(self, image: Image.Image) -> Image.Image:
        """Return the part of an image that is not cropped away, at the image's own resolution."""
        if not (self.resizes and self.crops and isinstance(self.size, int)):
            return image
        # The shortest side becomes `size` pixels, of which the crop keeps the middle.
        scale = min(image.size) / self.size
        height, width = self.crop
        kept = [
            max(1, min(side, round(crop * scale)))
            for side, crop in zip(image.size, (width, height), strict=True)
        ]
        left, top = ((side - keep) // 2 for side, keep in zip(image.size, kept, strict=True))
        return image.crop((left, top, left + kept[0], top + kept[1]))

    def _cropped(self, image: Image.Image) -> Image.Image:
        """The middle of the resized image."""
        whole, wanted = self._resized_size(image.size), self.crop[::-1]
        # Pillow resizes in two passes and rounds between them, in an order that depends on the
        # sizes: what is made of a part differs a little from a part of what is made of all. So
        # the whole is resized, as transformers does, unless much of it would be cropped away.
        large = math.prod(whole) > _MUCH * math.prod(wanted)
        if self.resizes and not (self.crops and large):
            image = image.resize(whole, self.resample)
        if not self.crops:
            return image
        # The middle, rounded towards the start; below 0 where the image is too small.
        start = [(side - crop) // 2 for side, crop in zip(whole, wanted, strict=True)]
        low = [max(0, at) for at in start]
        high = [min(side, at + crop) for side, at, crop in zip(whole, start, wanted, strict=True)]
        part = (high[0] - low[0], high[1] - low[1])
        if image.size == whole:
            image = image.crop((low[0], low[1], high[0], high[1]))
        else:
            (left, right), (top, bottom) = (
                (begin * size / side, end * size / side)  # exact at the image's ends
                for begin, end, size, side in zip(low, high, image.size, whole, strict=True)
            )
            box = (left, top, right, bottom)
            image = image.resize(part, self.resample, box=box)
        if part == wanted:
            return image
        canvas = Image.new("RGB", wanted)
        canvas.paste(image, (max(0, -start[0]), max(0, -start[1])))
        return canvas

    def _resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after resizing."""
        if not self.resizes:
            return size
        if not isinstance(self.size, int):
            return self.size[::-1]
        short, long = sorted(size)
        new = (self.size, int(self.size * long / short))
        return new if size[0] <= size[1] else new[::-1]


def _read_size(name: str, value: Any) -> Size:
    if is_size(value):
        return value
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        return _read_size(f"{name}.shortest_edge", value["shortest_edge"])
    sides: Any = value
    if isinstance(value, dict):
        sides = [value[key] for key in ("height", "width") if key in value]
        sides = sides if len(value) == 2 else None
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(map(is_size, sides)):
        raise ValueError(
            f"{name} must be a number of pixels, or hold shortest_edge, or height and width; "
            f"got {value!r:.80}"
        )
    return sides[0], sides[1]


def _read_crop(name: str, value: Any) -> tuple[int, int]:
    size = _read_size(name, value)
    return (size, size) if isinstance(size, int) else size


def _read_channels(name: str, value: Any) -> tuple[float, ...]:
    values = [value] * 3 if is_number(value) else value
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(is_number, values)):
        raise ValueError(f"{name} must be three numbers, got {value!r:.80}")
    return tuple(map(float, values))


def _read_number(name: str, value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r:.80}")
    return float(value)


def _read_filter(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number of a filter of Pillow, got {value!r:.80}")
    return int(value)


def _read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.80}")
    return value


# What a file says: our field, and what reads it.
_FIELDS: dict[str, tuple[str, Any]] = {
    "size": ("size", _read_size),
    "crop_size": ("crop", _read_crop),
    "image_mean": ("mean", _read_channels),
    "image_std": ("std", _read_channels),
    "resample": ("resample", _read_filter),
    "rescale_factor": ("factor", _read_number),
    "do_resize": ("resizes", _read_flag),
    "do_center_crop": ("crops", _read_flag),
    "do_rescale": ("scales", _read_flag),
    "do_normalize": ("normalises", _read_flag),
}


# By the start of an image processor's name, what its file need not say.
_USUAL = {
    "Siglip": ImageProcessing((224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crops=False),
    "DINOv3ViT": ImageProcessing(
        (224, 224),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resample=int(Image.Resampling.BILINEAR),
        crops=False,
    ),
}


def read_images(
    folder: Path, image_size: int | tuple[int, int] | None = None
) -> ImageProcessing | None:
    """Read the image preprocessing of a model folder; None where there is none.

    Args:
      folder: a folder in the Hugging Face layout.
      image_size: resize and crop to this instead of the folder's number; see
        `ImageProcessing.for_size`.

    Raises:
      ValueError: the file is no valid JSON, or a value in it is of another type, out of range or
        not supported; the message names the file.
    """
    # transformers 5 writes one file for the whole processor, older ones a file for images.
    for name, section in ((IMAGES, None), ("processor_config.json", "image_processor")):
        path = folder / name
        if not path.is_file():
            continue
        fields: Any = read_json(path)
        if section is not None:
            fields = fields.get(section)
            if fields is None:
                return None
            if not isinstance(fields, dict):
                raise ValueError(f"{path}: {section} must be an object, got {fields!r:.80}")
        try:
            images = ImageProcessing.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return images if image_size is None else images.for_size(image_size)
    return None


def image_processing(
    image_size: int,
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> ImageProcessing:
    """Image preprocessing for a new model: shortest side to `image_size`, crop, normalise.

    Args:
      image_size: pixels of a side of the square the model sees.
      mean: taken from each channel, of values in 0..1.
      std: divides each channel.

    Returns:
      What a `Processor` applies to images.
    """
    crop = (image_size, image_size)
    return ImageProcessing(image_size, crop, tuple(map(float, mean)), tuple(map(float, std)))


def imagenet_processing(image_size: int = 224) -> ImageProcessing:
    """Image preprocessing of encoders trained on ImageNet, as captioners use it.

    The whole image is resized to a square, without keeping the aspect, and normalised (Sun et
    al. 2022); `image_processing` crops instead.

    Args:
      image_size: pixels of a side of the square the model sees.

    Returns:
      What a `Processor` applies to images.
    """
    side = (image_size, image_size)
    return ImageProcessing(
        size=side,
        crop=side,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resample=int(Image.Resampling.BILINEAR),
        crops=False,
    )
