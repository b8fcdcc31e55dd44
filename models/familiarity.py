"""How far an image is from those a model was trained on, by simple statistics of its pixels.

A model answers anything: a small one of drawn scenes also scores photographs. Its features do not
tell them apart well, since it never learned what else there is; how many colours an image has, how
its edges are distributed and how its brightness varies from coarse to fine do. The distance is
Mahalanobis's (1936), from the mean of images like those of the training, as in Lee et al. 2018,
"A Simple Unified Framework for Detecting Out-of-Distribution Samples", there with features.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxrel.models.checkpoint import read_json

FILE = "familiarity.json"
PROTOCOL = "familiarity/1"

_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
# Below this no difference of brightness is seen; logarithms start here.
_SMALL = 1e-3
# Added to the variances of statistics that hardly vary or depend on each other.
_RIDGE = 0.01


@dataclass(frozen=True)
class Familiarity:
    """What images like those of the training look like.

    Attributes:
      data: the name of the data set.
      scenes: how many held-out images the thresholds are of; others made the mean and the scales.
      mean: of the statistics.
      whitening: [statistics, statistics], makes them independent and of variance 1.
      usual: the distance that `share` of the held-out images do not exceed.
      share: such as 0.995.
      score: the highest score of a held-out image.
      pixel_mean: what the model's preprocessing takes from each channel, of values 0 to 1.
      pixel_std: what it divides by.
    """

    data: str
    scenes: int
    mean: tuple[float, ...]
    whitening: tuple[tuple[float, ...], ...]
    usual: float
    share: float
    score: float
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    def distance(
        self, image: Float[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, " batch"]:
        """How far each image is from the mean, in standard deviations.

        Args:
          image: as the model reads it, normalised.
        """
        pixels = np.asarray(image, np.float64) * np.array(self.pixel_std) + self.pixel_mean
        centred = statistics(pixels) - np.array(self.mean)
        return np.sqrt(np.mean((centred @ np.array(self.whitening)) ** 2, axis=1))

    def told(self, distance: float, score: float) -> tuple[dict[str, Any], list[str]]:
        """The numbers of one image and score, and in words what is unusual about them."""
        numbers = {
            "distance": round(distance, 3),
            "usual": self.usual,
            "share": self.share,
            "unlike": bool(distance > self.usual),
            "score": round(float(score), 3),
            "highest score": self.score,
        }
        notes = []
        if distance > self.usual:
            notes.append(
                f"This image is unlike those the model was trained on ({self.data}): the distance "
                f"of its colours and edges is {distance:.1f}, and {self.share:.1%} of "
                f"{self.scenes} held-out images are below {self.usual:.1f}; what the model says "
                "of it may mean little."
            )
        if score > self.score:
            notes.append(
                f"The score {score:.1f} is higher than that of any of {self.scenes} held-out "
                f"images ({self.score:.1f} at most)."
            )
        return numbers, notes

    def save(self, folder: Path) -> Path:
        """Write it into a model's folder, and return the file."""
        path = folder / FILE
        text = json.dumps({"protocol": PROTOCOL, **asdict(self)}, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")
        return path


def read_familiarity(folder: Path) -> Familiarity | None:
    """Read what a model's folder says of familiar images; None where it says nothing.

    Raises:
      ValueError: the file is damaged or of another protocol.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        if content.pop("protocol", None) != PROTOCOL:
            raise ValueError(f"expected protocol {PROTOCOL!r}")
        found = Familiarity(**{name: _frozen(value) for name, value in content.items()})
        if np.shape(found.whitening) != (_COUNT, _COUNT) or np.shape(found.mean) != (_COUNT,):
            raise ValueError(f"expected {_COUNT} statistics, got {len(found.mean)}")
        return found
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not tell which images are familiar: {error}. Delete the file, or "
            "measure again with jaxrel evaluate RECIPE --familiarity"
        ) from error


def _frozen(value: Any) -> Any:
    """Lists as tuples, which can be compared and hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def fit(
    known: Float[np.ndarray, "known height width 3"],
    held_out: Float[np.ndarray, "scenes height width 3"],
    score: Float[np.ndarray, " scores"],
    *,
    data: str,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    share: float = 0.995,
) -> Familiarity:
    """Measure what is familiar.

    Args:
      known: images like those of the training, normalised, as the model reads them.
      held_out: others, which give the threshold.
      score: the model's scores of held-out images.
      data: the name of the data set.
      pixel_mean: see `Familiarity`.
      pixel_std: see `Familiarity`.
      share: of held-out images that are familiar.
    """
    measured = statistics(np.asarray(known, np.float64) * np.array(pixel_std) + pixel_mean)
    mean = measured.mean(0)
    scale = measured.std(0) + 1e-6
    values, vectors = np.linalg.eigh(np.cov(((measured - mean) / scale).T))
    whitening = (vectors / np.sqrt(values + _RIDGE)) / scale[:, None]
    draft = Familiarity(
        data=data,
        scenes=len(held_out),
        mean=_short(mean),
        whitening=tuple(map(_short, whitening)),
        usual=0.0,
        share=share,
        score=float(f"{np.max(score):.4g}"),
        pixel_mean=tuple(pixel_mean),
        pixel_std=tuple(pixel_std),
    )
    usual = np.quantile(draft.distance(held_out), share)
    return replace(draft, usual=float(f"{usual:.4g}"))


def _short(numbers: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{number:.4g}") for number in numbers)


def statistics(
    image: Float[np.ndarray, "batch height width 3"],
) -> Float[np.ndarray, "batch statistics"]:
    """What is looked at in each image, 0 to 1, RGB: colours, edges, and coarse against fine."""
    image = np.asarray(image, np.float64)
    light = image @ np.array([0.299, 0.587, 0.114])
    across, down = np.abs(np.diff(light, axis=2)), np.abs(np.diff(light, axis=1))
    edges = np.concatenate([across.reshape(len(image), -1), down.reshape(len(image), -1)], axis=1)
    vivid = image.max(-1) - image.min(-1)
    parts = [
        _colours(image),
        np.log(_flat_and_vivid(across[:, :-1] + down[:, :, :-1], vivid[:, :-1, :-1]) + 2e-3),
        _quantiles(vivid, (0.98, 0.99, 1.0)),
        np.log(_quantiles(edges, _QUANTILES) + _SMALL),
        np.log(_quantiles(_corners(light), _QUANTILES) + _SMALL),
        np.log(_quantiles(_roughness(image), _QUANTILES) + _SMALL),
        _quantiles(vivid, _QUANTILES),
        _quantiles(light, _QUANTILES),
        np.log(_spectrum(light) + 1e-4),
        image.mean((1, 2)),
        image.std((1, 2)),
    ]
    return np.concatenate(parts, axis=1)


_COUNT = 58


def _quantiles(values: np.ndarray, at: Sequence[float]) -> np.ndarray:
    return np.quantile(values.reshape(len(values), -1), at, axis=1).T


def _colours(image: np.ndarray) -> np.ndarray:
    """How many colours there are, of 16 shades per channel, and what share the commonest have."""
    shades = (np.clip(image, 0, 0.999) * 16).astype(int) @ np.array([256, 16, 1])
    found = []
    for one in shades.reshape(len(image), -1):
        counts = np.bincount(one, minlength=16**3)
        share = np.sort(counts[counts > 0])[::-1] / one.size
        commonest = np.cumsum(np.pad(share, (0, 32)))[[0, 1, 3, 7, 15, 31]]
        entropy = -(share * np.log(share)).sum()
        found.append([np.log(len(share)), *np.log(commonest + _SMALL), entropy])
    return np.array(found)


def _flat_and_vivid(edges: np.ndarray, vivid: np.ndarray) -> np.ndarray:
    """Shares of the image that are even and of a strong colour, as drawn things are."""
    even = edges < 0.04
    return np.stack([(even & (vivid > least)).mean((1, 2)) for least in (0.2, 0.4, 0.6)], axis=1)


def _corners(light: np.ndarray) -> np.ndarray:
    """How much each pixel differs from the mean of its four neighbours."""
    around = light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
    return np.abs(4 * light[:, 1:-1, 1:-1] - around)


def _roughness(image: np.ndarray) -> np.ndarray:
    """The standard deviation within each of 8 x 8 blocks."""
    count, height, width, _ = image.shape
    rows, columns = height // 8, width // 8
    blocks = image[:, : 8 * rows, : 8 * columns].reshape(count, 8, rows, 8, columns, 3)
    return blocks.std((2, 4)).mean(-1)


def _spectrum(light: np.ndarray) -> np.ndarray:
    """The power of brightness in eight bands, from coarse to fine."""
    centred = light - light.mean((1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(centred)) ** 2
    away = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, light.shape[:0:-1])))
    edges = np.geomspace(0.02, 0.5, 9)
    bands = [(away >= low) & (away < high) for low, high in itertools.pairwise(edges)]
    return np.stack([power[:, band].mean(1) for band in bands], axis=1)
