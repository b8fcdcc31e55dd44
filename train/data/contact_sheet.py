"""Images of the Shapes data set: a contact sheet, and the sample scenes that ship.

python -m jaxrel.train.data.contact_sheet out.png
python -m jaxrel.train.data.contact_sheet --samples train/data/samples
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jaxrel.train.data.shapes import SPLITS, Scene, Shapes
from jaxrel.train.data.shapes.language import with_article

# Scene of the test split: the object, by its number there, that the sample's sentence names.
SAMPLES = {287: 2, 44: 0, 85: 1, 185: 3, 191: 3}
SAMPLE_SIZE = 192

_IMAGE = 224
_MARGIN = 16
_LINE = 17
_INK, _FAINT, _PAPER = (25, 25, 30), (95, 95, 105), (255, 255, 255)


def contact_sheet(scenes: Sequence[Scene], *, columns: int = 4) -> Image.Image:
    """Draws scenes in a grid, each with a caption, a question and its answer below it.

    Args:
        scenes: the scenes, at least one; their sizes may differ.
        columns: images per row.

    Returns:
        The sheet (RGB).
    """
    texts = [_text_below(scene, number) for number, scene in enumerate(scenes)]
    rows = [range(start, len(scenes))[:columns] for start in range(0, len(scenes), columns)]
    heights = [_IMAGE + _LINE * max(len(texts[i]) for i in row) + 2 * _MARGIN for row in rows]
    width = columns * (_IMAGE + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), _PAPER)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            _draw_cell(sheet, scenes[i], texts[i], _MARGIN + column * (_IMAGE + _MARGIN), top)
        top += height
    return sheet


def _text_below(scene: Scene, number: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Lines and their colours: a full caption, and another kind of question in every cell."""
    question = scene.questions[number % len(scene.questions)]
    caption, asked = scene.captions[1].text, f"{question.text} {question.answer}"
    return [(line, _INK) for line in _wrap(caption)] + [(line, _FAINT) for line in _wrap(asked)]


def _draw_cell(
    sheet: Image.Image,
    scene: Scene,
    lines: list[tuple[str, tuple[int, int, int]]],
    left: int,
    top: int,
) -> None:
    image = Image.fromarray(scene.image).resize((_IMAGE, _IMAGE), Image.Resampling.LANCZOS)
    sheet.paste(image, (left, top))
    draw = ImageDraw.Draw(sheet)
    for i, (line, colour) in enumerate(lines):
        draw.text((left, top + _IMAGE + 6 + _LINE * i), line, colour, _font())


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)


def _wrap(text: str) -> list[str]:
    """Breaks a text into lines as wide as an image."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= _IMAGE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def write_samples(folder: Path) -> None:
    """Writes the sample scenes as PNG files, and `samples.json` with a sentence and a box each.

    Args:
        folder: where to; it is made where it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = Shapes(size=SAMPLE_SIZE)
    records = {}
    for index, number in SAMPLES.items():
        scene = data.scene("test", index)
        thing = scene.objects[number]
        name = f"{thing.colour}-{thing.shape}.png"
        Image.fromarray(scene.image).save(folder / name)
        records[name] = {
            "sentence": with_article(f"{thing.colour} {thing.shape}"),
            "box": [round(float(side) / SAMPLE_SIZE, 6) for side in scene.boxes[number]],
            "index": index,
        }
    (folder / "samples.json").write_text(json.dumps(records, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: what follows the program's name; by default, what the user typed.
    """
    parser = argparse.ArgumentParser(prog="contact_sheet", description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("sheet", nargs="?", type=Path, help="image to write")
    where.add_argument("--samples", type=Path, metavar="FOLDER", help="write the samples instead")
    parser.add_argument("--split", default="train", choices=SPLITS, help="default: train")
    parser.add_argument("--count", type=int, default=12, help="number of scenes (default: 12)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}; expected at least 1")
    if options.samples:
        write_samples(options.samples)
        return
    data = Shapes(size=_IMAGE)
    scenes = [data.scene(options.split, index) for index in range(options.count)]
    contact_sheet(scenes).save(options.sheet)


if __name__ == "__main__":
    main()
