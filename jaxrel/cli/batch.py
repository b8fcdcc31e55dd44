"""`jaxrel batch INPUT --out FOLDER`: many inputs to a table."""

import argparse
import functools
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrel.cli import options as shared
from jaxrel.cli.explain import DEFAULT_MODELS, METHODS_HELP, Asked, check_asked

EXAMPLES = """examples:
  jaxrel batch photos/ --text "a dog" --out results
  jaxrel batch questions.csv --question "what is red?" --method weighted,lrp --out results
  jaxrel batch captions_val2017.json --images val2017 --model openai/clip-vit-base-patch32 --out r
"""


def add(commands: Any) -> None:
    """Add the command."""
    batch = commands.add_parser(
        "batch",
        help="explain a folder or a table of inputs, and write a table",
        description="Explain every row of a folder of images, of a CSV, JSONL or Parquet file "
        "(columns id, image, text, target), or of a file of COCO captions, VQA v2 questions or "
        "Flickr30k, and write Parquet files to OUT. A job that was stopped goes on with the same "
        "command. An input that cannot be read is a row with its error.",
        epilog=f"{METHODS_HELP}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument(
        "input", type=shared.folder, help="a folder, or a .csv, .jsonl, .parquet or .json file"
    )
    _add_asked(batch)
    _add_files(batch)
    _add_engine(batch)
    batch.set_defaults(run=run)


def _add_asked(batch: argparse.ArgumentParser) -> None:
    asked = batch.add_mutually_exclusive_group()
    asked.add_argument(
        "--text", metavar="SENTENCE", help="compare images with this, where rows have none"
    )
    asked.add_argument("--question", help="answer this, where rows have no question of their own")
    asked.add_argument(
        "--caption", action="store_true", help="write captions, and explain each word"
    )
    batch.add_argument(
        "--model",
        type=shared.name,
        help="a bundled model, a folder or a hub name (default: by what is asked)",
    )
    batch.add_argument(
        "--method",
        help="one or several of the methods below, with commas, or 'all' (default: weighted; with "
        "a Captioner lrp)",
    )
    batch.add_argument("--layers", type=shared.numbers, help="layers that count, such as 0,1")
    batch.add_argument("--heads", type=shared.numbers, help="attention heads that count")
    batch.add_argument("--importance", default="grad_value", help="measure of the weighted method")


def _add_files(batch: argparse.ArgumentParser) -> None:
    rows = batch.add_argument_group("rows")
    rows.add_argument(
        "--columns",
        type=_columns,
        default={},
        metavar="image=FILE,text=CAPTION",
        help="the file's names of the columns id, image, text and target",
    )
    rows.add_argument(
        "--images", type=shared.folder, help="the folder of the images that the file names"
    )
    rows.add_argument("--strict", action="store_true", help="stop at an input that cannot be read")
    results = batch.add_argument_group("results")
    results.add_argument(
        "--out", default=Path("out"), type=shared.folder, help="output folder (default: out)"
    )
    results.add_argument(
        "--precision",
        choices=("float32", "float16"),
        default="float32",
        help="of the images' relevance in the files (default: float32)",
    )
    results.add_argument(
        "--shard-rows",
        type=shared.positive,
        default=1024,
        help="inputs per file; what is lost when the job is stopped (default: 1024)",
    )
    results.add_argument(
        "--save-images",
        type=_which,
        metavar="every:N|ID,ID",
        help="draw every Nth row, or those of these ids (default: none)",
    )


def _add_engine(batch: argparse.ArgumentParser) -> None:
    engine = batch.add_argument_group("engine")
    engine.add_argument(
        "--batch-size", type=shared.positive, help="rows explained together (default: what fits)"
    )
    engine.add_argument(
        "--threads", type=shared.positive, default=2, help="threads that read ahead (default: 2)"
    )
    engine.add_argument(
        "--engine",
        choices=("embedded", "ray"),
        default="embedded",
        help="embedded: this process; ray: Ray Data (pip install 'jaxrel[ray]')",
    )
    engine.add_argument("--ray-address", help="of a Ray cluster (default: Ray on this machine)")
    engine.add_argument("--actors", type=shared.positive, default=1, help="Ray actors (default: 1)")
    engine.add_argument("--num-cpus", type=float, help="CPUs of a Ray actor")
    engine.add_argument("--num-gpus", type=float, help="GPUs of a Ray actor")
    engine.add_argument(
        "--resources",
        type=_resources,
        default={},
        metavar="TPU=4",
        help="other resources of a Ray actor",
    )


def _which(text: str) -> str:
    every = text.removeprefix("every:")
    if every != text:
        shared.positive(every)
    return text


def _pairs(text: str, what: str) -> dict[str, str]:
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(name and value for name, value in pairs.items()):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return pairs


def _columns(text: str) -> dict[str, str]:
    known = ("id", "image", "text", "target")
    pairs = _pairs(text, "image=NAME,text=NAME")
    for name in pairs:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"there is no column {name!r}; there are {', '.join(known)}"
            )
    return pairs


def _resources(text: str) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in _pairs(text, "NAME=NUMBER").items()}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}") from None


def run(options: argparse.Namespace) -> None:
    """Explain the rows that OUT lacks, and say what there is."""
    from jaxrel.batch import embedded
    from jaxrel.batch.memory import fit
    from jaxrel.explanations.tables import required

    for text in (options.text, options.question):
        if text is not None:
            shared.sentence(text)
    if options.images is not None and not options.images.is_dir():
        raise NotADirectoryError(
            f"--images {options.images} is no folder; give the one that holds the images"
        )
    required("pyarrow")
    shared.check_out(options.out)
    if options.engine == "ray":
        required("ray", extra="ray")
    source = _source(options)
    asked = _asked(options, source)
    options.model = options.model or DEFAULT_MODELS[asked]
    made = _explainer(options)
    if options.text or options.question or options.caption:
        check_asked(made.model, asked, options.model)
    first = made.prepare(next(made.split(source.read(0, 1))))
    _check_first(options, first)
    found = fit(made, first, options.batch_size)
    options.batch_size = found.batch_size
    made.batch_size = found.batch_size
    folder = _folder(options, source, made)
    folder.open()
    left = sum(stop - start for start, stop in map(folder.inputs, folder.missing()))
    print(f"{folder.rows} rows in {found}", file=sys.stderr)
    draw = _drawing(options, source.ids)
    if options.engine == "ray":
        from jaxrel.batch import ray_data

        ray_data.run(
            functools.partial(_explainer, options),
            functools.partial(_source, options),
            folder,
            precision=options.precision,
            threads=options.threads,
            draw=draw,
            address=options.ray_address,
            actors=options.actors,
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            resources=options.resources,
        )
    else:
        embedded.run(
            made, source, folder, precision=options.precision, threads=options.threads, draw=draw
        )
    print(_said(options, folder, left))


def _said(options: argparse.Namespace, folder: Any, left: int) -> str:
    """What was done, and what is there, after `left` rows were explained."""
    errors = folder.errors()
    what = f", {errors} of them with an error (column 'error')" if errors else ""
    if not left:
        return f"nothing left to do: {folder.rows} rows in {options.out}{what}"
    whole = f", which has {folder.rows} now" if left < folder.rows else ""
    return f"wrote {left} rows to {options.out}{whole}{what}"


def _source(options: argparse.Namespace) -> Any:
    from jaxrel.batch.sources import open_source

    text = options.text or options.question
    return open_source(options.input, columns=options.columns, images=options.images, text=text)


def _asked(options: argparse.Namespace, source: Any) -> Asked:
    """What is asked: as the options say, or as the first row and the model do."""
    if options.question:
        return "question"
    if options.caption:
        return "caption"
    if source.are_questions:
        return "question"
    # Single rows may lack theirs.
    has_text = any(row["text"] is not None for row in source.read(0, options.shard_rows))
    if not has_text and options.model is None:
        raise ValueError(
            f"the rows of {options.input} have no text: say with --text, --question or --caption "
            "what to explain, or name the column with --columns text=NAME"
        )
    return "text"


def _explainer(options: argparse.Namespace) -> Any:
    from jaxrel.attention.methods import check_methods
    from jaxrel.batch import Explainer
    from jaxrel.explanations.methods import WORD_BY_WORD, family
    from jaxrel.metrics import Detector
    from jaxrel.models.checkpoint import find_folder

    model = shared.load(options.model)
    kind = family(model)
    named = kind.usual if options.method is None else options.method
    methods = kind.methods if named == "all" else shared.names(named)
    by_word = kind is WORD_BY_WORD
    return Explainer(
        model,
        check_methods(methods, kind.methods, "method"),
        batch_size=options.batch_size or 1,
        layers=options.layers,
        heads=options.heads,
        importance=options.importance,
        detector=Detector.load(find_folder(options.model), model) if by_word else None,
        name=shared.printable(options.model),
        strict=options.strict,
    )


def _check_first(options: argparse.Namespace, first: Any) -> None:
    """Raise ValueError where the first row shows that no row can be explained."""
    if first.batch is None and options.strict:
        raise ValueError(next(iter(first.errors.values())))


def _folder(options: argparse.Namespace, source: Any, made: Any) -> Any:
    from jaxrel.batch.folder import Folder
    from jaxrel.batch.provenance import model_digest, versions

    settings = {
        "input": str(options.input),
        "inputs": source.digest,
        "columns": options.columns or None,
        "images": options.images and str(options.images),
        "model": options.model,
        "model_digest": model_digest(made.model),
        "text": options.text or options.question,
        "method": list(made.request.methods),
        "layers": options.layers and list(options.layers),
        "heads": options.heads and list(options.heads),
        "importance": options.importance,
        "precision": options.precision,
    }
    provenance = {"engine": options.engine, "command": options.command, "versions": versions()}
    return Folder(options.out, len(source.ids), options.shard_rows, settings, provenance)


def _drawing(options: argparse.Namespace, ids: Sequence[str]) -> Any:
    """What draws the rows of a batch that are to be drawn; None where none are."""
    if not options.save_images:
        return None
    known = set(ids)
    # Of the ids "a" and "a.png" neither may take the other's file.
    kept = not any(f"{one}.png" in known for one in ids)
    return functools.partial(_draw, options, kept)


def _image_name(identity: str, kept: bool) -> str:
    """The file that a row is drawn into: its id, whose ".png" may be kept."""
    name = urllib.parse.quote(identity, safe=" ")
    return name if kept and name.lower().endswith(".png") else f"{name}.png"


def _draw(
    options: argparse.Namespace, kept: bool, found: Sequence[Any], loaded: Any, start: int
) -> None:
    """Draw the rows of a batch that `--save-images` names."""
    from jaxrel import report
    from jaxrel.explanations.tables import example_of

    if not found:
        return
    examples = list(example_of(found[0]))
    for i, row in enumerate(loaded.good):
        identity = loaded.rows[row]["id"]
        if _drawn(options.save_images, start + row, identity):
            place = slice(examples.index(i), examples.index(i) + examples.count(i))
            file = options.out / "_images" / _image_name(identity, kept)
            report.save([one[place] for one in found], file)


def _drawn(which: str, number: int, identity: str) -> bool:
    every = which.removeprefix("every:")
    if every != which:
        return number % int(every) == 0
    return identity in which.split(",")
