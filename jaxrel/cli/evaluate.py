"""`jaxrel evaluate WHAT`: judge a model or methods on held-out data."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxrel.cli import options as shared

EXAMPLES = """examples:
  jaxrel evaluate clip-shapes
  jaxrel evaluate perturbation --model vqa-shapes --method equal,weighted:norm --out curves
  jaxrel evaluate captioner --model gridtd-shapes --scenes 128
"""


def add(commands: Any) -> None:
    """Add the command, with a command of its own per recipe and per test of methods."""
    evaluate = commands.add_parser(
        "evaluate",
        help="judge a model or methods on held-out data",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    judged = evaluate.add_subparsers(title="what is judged", required=True, metavar="what")
    _add_recipes(judged)
    _add_perturbation(judged)
    _add_weighting(judged)
    _add_sanity(judged)
    _add_methods(judged)
    _add_captioner(judged)
    _add_finetuning(judged)
    for name, test in judged.choices.items():
        test.add_argument(
            "--record",
            nargs="?",
            const="",
            metavar="FOLDER",
            help="keep the result in a folder, as JSON and Markdown (default: train/results)",
        )
        test.set_defaults(judged=name)


def _add_recipes(judged: Any) -> None:
    from jaxrel.train.recipes.registry import RECIPES, is_real

    for name in RECIPES:
        recipe = judged.add_parser(name, help=f"a model made by `jaxrel train {name}`")
        real = is_real(name)
        recipe.add_argument(
            "--model",
            type=shared.name,
            default=None if real else name,
            required=real,
            help="a bundled model, a folder or a hub name",
        )
        if real:
            recipe.add_argument(
                "--data", type=shared.name, required=True, help="folder of the data set"
            )
        recipe.add_argument("--split", help="split of the data set, other than the usual one")
        _add_count(recipe, "--scenes", 2048, "number of scenes or images")
        if not real:
            recipe.add_argument(
                "--card", action="store_true", help="write the model's README.md too"
            )
            recipe.add_argument(
                "--familiarity",
                action="store_true",
                help="measure instead which images are familiar, and keep it in the model's "
                "folder, where `jaxrel explain` finds it",
            )
        recipe.set_defaults(run=_recipe, recipe=name, data=None, card=False, familiarity=False)


def _add_perturbation(judged: Any) -> None:
    meaning = "remove tokens by their relevance, watch the model"
    test = _add_mapper_test(judged, "perturbation", _perturbation, 2048, meaning)
    _add_method(test)
    _add_removal(test)
    _add_count(test, "--regenerated", 512, "number of captions that are regenerated; 0 for none")


def _add_weighting(judged: Any) -> None:
    meaning = "compare rules of weighted accumulation"
    test = _add_mapper_test(judged, "weighting", _weighting, 1024, meaning, split="val")
    test.add_argument(
        "--rule", default="all", help="one or several, with commas (default: all of the family)"
    )
    _add_removal(test)


def _add_sanity(judged: Any) -> None:
    meaning = "randomise parameters, watch the relevance"
    _add_method(_add_mapper_test(judged, "sanity", _sanity, 128, meaning))


def _add_methods(judged: Any) -> None:
    methods = judged.add_parser(
        "methods", help="judge methods: all in one table, on CLIPmappers and CLIP"
    )
    methods.add_argument(
        "--models",
        default="vqa-shapes,caption-shapes,clip-shapes",
        help="CLIPmappers and a CLIP, with commas (default: vqa-shapes,caption-shapes,clip-shapes)",
    )
    _add_method(methods)
    methods.add_argument("--split", default="test", help="split of Shapes (default: test)")
    _add_count(methods, "--examples", 1024, "number of examples of a perturbation test")
    _add_count(methods, "--located", 512, "number of examples for localisation")
    _add_count(methods, "--batch", 32, "number of examples that are computed together")
    _add_count(methods, "--seed", 0, "seed of everything that is drawn")
    shared.add_out(methods)
    methods.set_defaults(run=_methods)


def _add_mapper_test(
    judged: Any, name: str, run: Callable, examples: int, meaning: str, split: str = "test"
) -> argparse.ArgumentParser:
    """Add a test of the methods that explain a CLIPmapper."""
    test = judged.add_parser(name, help=f"judge methods: {meaning}")
    test.add_argument(
        "--model", type=shared.name, default="vqa-shapes", help="a CLIPmapper: name or folder"
    )
    test.add_argument("--split", default=split, help=f"split of Shapes (default: {split})")
    _add_count(test, "--examples", examples, "number of examples")
    _add_count(test, "--seed", 0, "seed of everything that is drawn")
    shared.add_out(test)
    test.set_defaults(run=run)
    return test


def _add_count(test: argparse.ArgumentParser, name: str, default: int, meaning: str) -> None:
    test.add_argument(name, type=int, default=default, help=f"{meaning} (default: {default})")


def _add_method(test: argparse.ArgumentParser) -> None:
    test.add_argument(
        "--method",
        default="all",
        help="one or several, with commas (weighted:norm for a measure; default: all)",
    )


def _add_removal(test: argparse.ArgumentParser) -> None:
    _add_count(test, "--batch", 32, "number of examples that are computed together")
    test.add_argument(
        "--modality",
        default="image,text",
        help="modalities whose tokens are removed, with commas (default: image,text)",
    )


def _add_captioner(judged: Any) -> None:
    captioner = judged.add_parser(
        "captioner",
        help="judge explanations of captions: remove, locate, and tell what is not there",
    )
    captioner.add_argument(
        "--model", type=shared.name, required=True, help="a Captioner: name or folder"
    )
    captioner.add_argument(
        "--data", type=shared.name, help="folder of COCO or Flickr30k (default: Shapes)"
    )
    captioner.add_argument("--split", help="split of the data set, other than the usual one")
    _add_count(captioner, "--scenes", 512, "number of scenes or images")
    captioner.add_argument(
        "--method", default="all", help="one or several, with commas (default: all)"
    )
    _add_count(captioner, "--batch", 16, "number of images that are computed together")
    _add_count(captioner, "--beams", 1, "width of the beam search; 1 is greedy")
    _add_count(captioner, "--seed", 0, "seed of the method 'random'")
    captioner.add_argument(
        "--detector",
        action="store_true",
        help="keep what tells hallucinated words in the model's folder, where `jaxrel explain "
        "--caption` finds it and flags words by it",
    )
    shared.add_out(captioner)
    captioner.set_defaults(run=_captioner)


def _add_finetuning(judged: Any) -> None:
    finetuning = judged.add_parser(
        "finetuning", help="compare fine-tuned captioners of Shapes, by mode, with the control"
    )
    finetuning.add_argument(
        "--models",
        required=True,
        type=shared.folder,
        help="folder with the models of `jaxrel train finetune-shapes`, a folder each",
    )
    finetuning.add_argument(
        "--split",
        default="biased_test,test",
        help="splits of Shapes, with commas (default: biased_test,test)",
    )
    _add_count(finetuning, "--scenes", 2048, "number of scenes of each split")
    shared.add_out(finetuning)
    finetuning.set_defaults(run=_finetuning)


def _recipe(options: argparse.Namespace) -> None:
    recipe = shared.recipe(options.recipe)
    from jaxrel.models.checkpoint import find_folder

    folder = find_folder(options.model)
    if options.card and not (folder / "settings.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no settings.json, which a model card quotes; it is written by "
            f"jaxrel train {options.recipe}"
        )
    chosen = {name: getattr(options, name) for name in ("data", "split", "scenes")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    model = shared.load(options.model)
    if not isinstance(model, recipe.model):
        raise ValueError(
            f"{options.model!r} is a {type(model).__name__}, and {options.recipe} judges a "
            f"{recipe.model.__name__}"
        )
    if options.familiarity:
        return _familiarity(model, folder, options.scenes)
    result = recipe.evaluate(model, **chosen)
    print(json.dumps({"model": options.model, **result}, indent=2))
    if options.card:
        (folder / "README.md").write_text(recipe.card(folder, result), encoding="utf-8")
    from jaxrel.train.evaluate.tables import all_tables

    _record(options, result["protocol"], (recipe.tables or all_tables)(result), result)


def _familiarity(model: Any, folder: Path, scenes: int) -> None:
    from jaxrel.train.evaluate.familiarity import measure

    fields = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    found = measure(
        model, pixel_mean=fields["image_mean"], pixel_std=fields["image_std"], scenes=scenes
    )
    print(
        f"{found.share:.1%} of {found.scenes} held-out scenes are nearer than {found.usual}, and "
        f"the highest score is {found.score}\nwrote {found.save(folder)}"
    )


def _record(
    options: argparse.Namespace, protocol: str, tables: Sequence, result: Any, name: str = ""
) -> None:
    """Keep a result if `--record` asks for it; of a model's test by both names."""
    if options.record is None:
        return
    from jaxrel.train.evaluate import record

    tested = "-".join(dict.fromkeys((options.judged, Path(getattr(options, "model", "")).name)))
    files = record.record(
        name or tested.rstrip("-"),
        protocol,
        tables,
        command=options.command,
        result=result,
        folder=Path(options.record) if options.record else record.FOLDER,
    )
    print("recorded " + ", ".join(map(str, files)))


def _load(options: argparse.Namespace, kind: Any, called: str) -> Any:
    """The model to test; ValueError for one of another kind or an unusable --out."""
    shared.check_out(options.out)
    model = shared.load(options.model)
    if not isinstance(model, kind):
        raise ValueError(
            f"{options.model!r} is a {type(model).__name__}; this test is made for {called}"
        )
    return model


def _mapper(options: argparse.Namespace) -> Any:
    from jaxrel.models import CLIPMapper

    model = _load(options, CLIPMapper, "CLIPmapper")
    options.out.mkdir(parents=True, exist_ok=True)
    return model


def _perturbation(options: argparse.Namespace) -> None:
    shared.check_plots()
    from jaxrel.train.evaluate import perturbation, tables

    result = perturbation.evaluate(
        _mapper(options),
        modality=shared.names(options.modality),
        methods=shared.names(options.method, perturbation.METHODS),
        split=options.split,
        examples=options.examples,
        regenerated=options.regenerated,
        batch=options.batch,
        seed=options.seed,
    )
    result = {name: {"model": options.model, **summary} for name, summary in result.items()}
    files = perturbation.save(result, options.out)
    found = [table for summary in result.values() for table in perturbation.tables(summary)]
    print(tables.markdown(found))
    print("wrote " + ", ".join(map(str, files)))
    _record(options, perturbation.PROTOCOL, found, result)


def _weighting(options: argparse.Namespace) -> None:
    from jaxrel.train.evaluate import record, weighting

    rules = shared.names(options.rule, tuple(weighting.FAMILY))
    models = {}
    for name in shared.names(options.model):  # all are loaded before the first is judged
        options.model = name
        models[name] = _mapper(options)
    if len(depths := {model.config.layers for model in models.values()}) > 1:
        raise ValueError(
            f"a table compares rules on mappers of one depth, got mappers of "
            f"{', '.join(map(str, sorted(depths)))} layers; judge each depth by itself"
        )
    result: dict[str, Any] = {}
    for model, loaded in models.items():
        found = weighting.evaluate(
            loaded,
            modality=shared.names(options.modality),
            rules=rules,
            split=options.split,
            examples=options.examples,
            batch=options.batch,
            seed=options.seed,
        )
        result |= {f"{model}, {name}": {"model": model, **one} for name, one in found.items()}
    (table,) = weighting.tables(list(result.values()))
    name = f"{options.split}-{next(iter(result.values()))['layers']}-layers"
    files = record.save(result, table.markdown(), options.out / f"rules-{name}")
    print(table.markdown())
    print("wrote " + ", ".join(map(str, files)))
    _record(options, weighting.PROTOCOL, [table], result, name=f"weighting-{name}")


def _methods(options: argparse.Namespace) -> None:
    shared.check_out(options.out)
    from jaxrel.train.evaluate import methods, record, tables

    result = methods.evaluate(
        {name: shared.load(name) for name in shared.names(options.models)},
        methods=shared.names(options.method, methods.METHODS),
        split=options.split,
        examples=options.examples,
        located=options.located,
        batch=options.batch,
        seed=options.seed,
    )
    found = methods.tables(result)
    text = tables.markdown(found)
    files = record.save(result, text, options.out / "methods")
    print(text)
    print("wrote " + ", ".join(map(str, files)))
    _record(options, methods.PROTOCOL, found, result)


def _sanity(options: argparse.Namespace) -> None:
    from jaxrel.models import CLIP, CLIPMapper
    from jaxrel.train.evaluate import sanity, tables

    result = sanity.evaluate(
        _load(options, (CLIPMapper, CLIP), "CLIPmapper and CLIP"),
        methods=None if options.method == "all" else shared.names(options.method),
        split=options.split,
        examples=options.examples,
        seed=options.seed,
    )
    result = {"model": options.model, **result}
    files = sanity.save(result, options.out)
    found = sanity.tables(result)
    print(tables.markdown(found))
    print("wrote " + ", ".join(map(str, files)))
    _record(options, sanity.PROTOCOL, found, result)


def _captioner(options: argparse.Namespace) -> None:
    shared.check_plots()
    from jaxrel.explanations.methods import WORD_METHODS
    from jaxrel.models.captioner import Captioner
    from jaxrel.models.checkpoint import find_folder
    from jaxrel.train.evaluate import caption_explanation_tables, caption_explanations
    from jaxrel.train.evaluate.detector import detector

    model = _load(options, Captioner, "Captioner")
    methods = shared.names(options.method, caption_explanations.METHODS)
    if options.detector and not {*methods} & {*WORD_METHODS}:
        raise ValueError(
            f"--detector needs an explanation to tell words by, and --method is {options.method}; "
            f"there are {', '.join(WORD_METHODS)}"
        )
    result = caption_explanations.evaluate(
        model,
        data=options.data,
        split=options.split,
        methods=methods,
        scenes=options.scenes,
        batch=options.batch,
        beams=options.beams,
        seed=options.seed,
    )
    result = {"model": options.model, **result}
    files = caption_explanation_tables.save(result, options.out)
    print(caption_explanation_tables.markdown(result))
    print("wrote " + ", ".join(map(str, files)))
    found = caption_explanation_tables.tables(result)
    _record(options, caption_explanations.PROTOCOL, found, result)
    if options.detector:
        print(f"wrote {detector(result).save(find_folder(options.model))}")


def _finetuning(options: argparse.Namespace) -> None:
    shared.check_plots()
    from jaxrel.train.evaluate import finetuning

    shared.check_out(options.out)
    result = finetuning.evaluate(
        options.models, splits=shared.names(options.split), scenes=options.scenes
    )
    files = finetuning.save(result, options.out)
    print(finetuning.markdown(result))
    print("wrote " + ", ".join(map(str, files)))
    # A study of its own has a record of its own: finetuning-overfit for runs/overfit.
    study = options.models.resolve().name
    name = "finetuning" if study == "finetune" else f"finetuning-{study}"
    _record(options, finetuning.PROTOCOL, finetuning.tables(result), result, name)
