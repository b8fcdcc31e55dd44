"""Recipe `clip-shapes`: a small CLIP, trained on Shapes from nothing, on two CPU cores.

The contrastive loss is CLIP's (Radford et al. 2021): in a batch of images with one caption
each, every image shall find its caption, and every caption its image.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Int, UInt8
from tqdm.auto import tqdm, trange

from jaxrel.explanations.explain import METHODS
from jaxrel.metrics import bootstrap
from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from jaxrel.models.preprocessing import image_processing
from jaxrel.models.processor import Processor
from jaxrel.models.tokenizer import word_tokenizer
from jaxrel.train.data.shapes import Scene, Shapes, vocabulary
from jaxrel.train.data.shapes.examples import CAPTIONS, FULL, SIDE, draw_scenes, normalise
from jaxrel.train.evaluate.localisation import localisation_table, localise, named_objects
from jaxrel.train.evaluate.tables import cell, grid
from jaxrel.train.loop.optimiser import warmup_cosine
from jaxrel.train.loop.train import write_settings
from jaxrel.train.losses.contrastive import contrastive_loss
from jaxrel.train.recipes.registry import Recipe
from jaxrel.train.recipes.settings import OnShapes, Settings, setting, write_card


@dataclasses.dataclass(frozen=True)
class ClipShapes(OnShapes, Settings):
    """Settings of the recipe `clip-shapes`."""

    least_context = (32, "captions")

    scenes: int = 60_000
    batch: int = setting(128, "images per step, each with one caption", "at least 1")
    warmup: int = 200
    weight_decay: float = setting(0.1, "weight decay of AdamW", "0 or more")
    full: float = setting(0.6, "share of captions that name every object", "from 0 to 1")
    width: int = setting(128, "features per token, in both towers")
    vision_layers: int = setting(4, "layers of the image tower")
    text_layers: int = setting(2, "layers of the text tower")
    heads: int = setting(4, "attention heads")
    patch_size: int = setting(8, "pixels of a side of a patch")
    context: int = setting(34, "tokens of the longest text")
    projection: int = setting(128, "features of the common space")


def new_model(recipe: ClipShapes) -> CLIP:
    """The untrained model, with its tokenizer and image preprocessing."""
    tower: dict[str, Any] = {
        "width": recipe.width,
        "heads": recipe.heads,
        "mlp_width": 4 * recipe.width,
    }
    tokenizer = word_tokenizer(vocabulary(), recipe.context)
    config = CLIPConfig(
        vision=VisionConfig(
            layers=recipe.vision_layers, image_size=SIDE, patch_size=recipe.patch_size, **tower
        ),
        text=TextConfig(
            layers=recipe.text_layers,
            vocab_size=len(tokenizer),
            context=recipe.context,
            eos_token_id=tokenizer.eos_token_id,
            **tower,
        ),
        projection=recipe.projection,
    )
    processor = Processor(tokenizer, image_processing(SIDE))
    return CLIP(config, rngs=nnx.Rngs(recipe.seed), processor=processor)


def load(
    recipe: ClipShapes, model: CLIP
) -> tuple[UInt8[np.ndarray, "scenes 64 64 3"], Int[np.ndarray, "scenes 5 tokens"]]:
    """Draw scenes: their images, and the token ids of their captions."""
    arrays, texts = draw_scenes(
        recipe.data_seed,
        "train",
        recipe.scenes,
        lambda scene: [caption.text for caption in scene.captions],
    )
    ids = model.processor.text([text for five in texts for text in five], recipe.context)
    return arrays["image"], ids.astype(np.int16).reshape(recipe.scenes, CAPTIONS, -1)


def optimiser(recipe: ClipShapes) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine; only matrices decay."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    rate = warmup_cosine(recipe.learning_rate, recipe.steps, recipe.warmup)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=recipe.weight_decay, mask=matrices),
    )


def train(recipe: ClipShapes, folder: Path) -> CLIP:
    """Train, and write the model, its settings and `train.jsonl` into a folder.

    `train.jsonl` has one line per `log_every` steps: the step and the mean loss since the last.

    Args:
      recipe: the settings.
      folder: where the model goes; a model that is there is replaced at the end, not before.

    Returns:
      The trained model.

    Raises:
      FileExistsError: the folder exists and is no model folder; said before any work.
      FloatingPointError: the loss is no longer finite; nothing is written.
    """
    check_new_folder(folder)
    model = new_model(recipe)
    images, texts = load(recipe, model)
    graph, params = nnx.split(model)
    transform = optimiser(recipe)

    @jax.jit
    def step(params: Any, state: Any, image: Array, text: Array) -> Any:
        def loss(params):
            model = nnx.merge(graph, params)
            return contrastive_loss(model, normalise(image), text.astype(jnp.int32))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, value

    state = transform.init(params)
    rng = np.random.default_rng(recipe.seed)
    log: list[dict[str, float]] = []
    losses: list[Any] = []
    progress = tqdm(range(1, recipe.steps + 1), desc="clip-shapes", unit="step")
    for number in progress:
        rows = rng.choice(recipe.scenes, recipe.batch, replace=False)
        which = _choose_captions(rng, recipe)
        params, state, value = step(params, state, images[rows], texts[rows, which])
        losses.append(value)
        if number % recipe.log_every == 0 or number == recipe.steps:
            mean = float(np.mean(jax.device_get(losses)))
            losses.clear()
            if not np.isfinite(mean):
                raise FloatingPointError(
                    f"clip-shapes: the loss is {mean} at step {number}; nothing was written. "
                    f"Try a learning rate below {recipe.learning_rate}"
                )
            log.append({"step": number, "loss": mean})
            progress.set_postfix(loss=f"{mean:.3f}")
    model = nnx.merge(graph, params)
    model.save_pretrained(folder)
    write_settings(recipe, folder)
    lines = "".join(json.dumps(line) + "\n" for line in log)
    (Path(folder) / "train.jsonl").write_text(lines, encoding="utf-8")
    return model


def _choose_captions(rng: np.random.Generator, recipe: ClipShapes) -> Int[np.ndarray, " batch"]:
    full = rng.random(recipe.batch) < recipe.full
    drawn = rng.integers(0, FULL, recipe.batch), rng.integers(FULL, CAPTIONS, recipe.batch)
    return np.where(full, *drawn)


def evaluate(
    model: CLIP, *, data_seed: int = 0, split: str = "test", scenes: int = 2048, among: int = 32
) -> dict[str, Any]:
    """Judge a model on held-out scenes: retrieval, and where the relevance lies.

    Retrieval: does an image find its full caption among `among`, and a caption its image?
    Localisation: relevance mass accuracy and the pointing game, by method, for an object that a
    one-object phrase names uniquely ("a red circle").

    Args:
      model: a CLIP that knows Shapes' words.
      data_seed: of the Shapes data set.
      split: of the data set.
      scenes: how many, a multiple of `among`; a quarter of them serve localisation.
      among: size of the groups in which retrieval is judged.

    Returns:
      `protocol`, `retrieval`, `localisation` with means and bootstrap 95% intervals.

    Raises:
      ValueError: `scenes` is no multiple of `among`.
    """
    if scenes < among or scenes % among:
        raise ValueError(f"scenes must be a multiple of {among}, got {scenes}")
    data = Shapes(seed=data_seed)
    drawn = [data.scene(split, i) for i in range(scenes)]
    return {
        "protocol": "clip-shapes/1",
        "split": split,
        "data_seed": data_seed,
        "retrieval": _retrieval(model, drawn, among),
        "localisation": _localisation(model, drawn[: max(among, scenes // 4)]),
    }


def _retrieval(model: CLIP, scenes: list[Scene], among: int) -> dict[str, Any]:
    found: dict[str, list[np.ndarray]] = {"caption": [], "image": []}
    compare = nnx.jit(lambda model, inputs: model(inputs)["logits_per_image"])
    for start in trange(0, len(scenes), among, desc="retrieval", leave=False):
        group = scenes[start : start + among]
        inputs = model.prepare(
            image=[scene.image for scene in group],
            text=[scene.captions[0].text for scene in group],
        )
        logits = np.asarray(compare(model, inputs))
        found["caption"].append(logits.argmax(1) == np.arange(among))
        found["image"].append(logits.argmax(0) == np.arange(among))
    scores = {name: bootstrap(np.concatenate(hits)) for name, hits in found.items()}
    shown = {name: interval._asdict() for name, interval in scores.items()}
    return {"scenes": len(scenes), "among": among, "chance": 1 / among, **shown}


def _localisation(model: CLIP, scenes: list[Scene]) -> dict[str, Any]:
    drawn, phrases, masks = zip(*named_objects(scenes), strict=True)
    return localise(
        model,
        [scene.image for scene in drawn],
        phrases,
        np.stack(masks),
        methods=METHODS,
        batch=min(64, len(phrases)),
    )


def card(folder: Path, result: dict[str, Any]) -> str:
    """The model card; `result` is what `evaluate` found."""
    retrieval, local = result["retrieval"], result["localisation"]
    table = localisation_table(local)
    return write_card(
        CARD,
        folder,
        ClipShapes(),
        split=result["split"],
        caption=cell(retrieval["caption"]),
        image=cell(retrieval["image"]),
        tested=retrieval["scenes"],
        among=retrieval["among"],
        by_chance=retrieval["chance"],
        examples=local["examples"],
        chance=cell(local["chance"]),
        table=grid(table.columns, table.rows),
    )


CARD = """\
# clip-shapes

A small CLIP for 64x64 images of coloured shapes: the model that `jaxrel explain` uses when none
is named. It knows the 75 words of the Shapes grammar and nothing of photographs.

    jaxrel train clip-shapes{flags} --out models/pretrained/clip-shapes
    jaxrel evaluate clip-shapes --model models/pretrained/clip-shapes --card

Trained on {scenes} scenes of the split `train` (data seed {data_seed}), {steps} steps of {batch}
images with one caption each; settings.json has every setting, train.jsonl the loss.

Judged on the split `{split}`, with bootstrap 95% intervals:

| retrieval among {among} ({tested} scenes, chance {by_chance:.3f}) | |
|---|---|
| an image finds its caption | {caption} |
| a caption finds its image | {image} |

Relevance for a phrase that names one object of several, all layers ({examples} examples): relevance
mass accuracy (the share of relevance inside the object's mask), its difference to equal
accumulation's on the same examples, and how often the most relevant point is on the object
(pointing game). The mass accuracy of a map without information is the mask's share of the image:
{chance}.

{table}"""

RECIPES = {"clip-shapes": Recipe(ClipShapes, CLIP, train, evaluate, card)}
