"""What all recipes of CLIPmapper share: settings, the model before training, the optimiser."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx
from jaxtyping import Array

from jaxrel.models.auto import from_pretrained
from jaxrel.models.clip import CLIP
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperConfig
from jaxrel.train.data.shapes.examples import SIDE, normalise
from jaxrel.train.loop.batches import Source
from jaxrel.train.loop.train import train_model
from jaxrel.train.losses.auxiliary import PatchNames
from jaxrel.train.recipes.settings import OnImages, OnShapes, Training, setting

M = TypeVar("M", bound=CLIPMapper)
TokensLoss = Callable[[dict[str, Any], Array, dict[str, Array]], tuple[Array, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Mapper(Training):
    """What all recipes of CLIPmapper have in common."""

    stage1: str = setting("clip-shapes", "model that stage 1 is copied from: a CLIP or CLIPmapper")
    stage1_rate: float = setting(
        1.0, "factor on the learning rate in stage 1; 0 freezes it", "0 or more"
    )
    weight_decay: float = setting(0.05, "weight decay of AdamW", "0 or more")
    width: int = setting(128, "features per token in the mapper")
    layers: int = setting(2, "layers of the mapper", "at least 1")
    heads: int = setting(4, "attention heads of the mapper")
    mlp_width: int = setting(256, "hidden features of the mapper's MLPs")
    context: int = setting(20, "tokens of the longest text")

    def optimiser(self) -> dict[str, Any]:
        """AdamW, slower in stage 1."""
        factors = {"model/vision": self.stage1_rate, "model/text": self.stage1_rate}
        return {"weight_decay": self.weight_decay, "b2": 0.98, "factors": factors}


@dataclasses.dataclass(frozen=True)
class MapperShapes(OnShapes, Mapper):
    """What the recipes `vqa-shapes` and `caption-shapes` have in common."""

    patch_loss: float = setting(
        0.5, "weight of the loss of naming the object in each patch", "0 or more"
    )


@dataclasses.dataclass(frozen=True)
class MapperReal(OnImages, Mapper):
    """What the recipes on photographs have in common: CLIPmapper over a CLIP of the hub."""

    stage1: str = "openai/clip-vit-base-patch32"
    stage1_rate: float = 0.1
    steps: int = 40_000
    batch: int = setting(256, "examples per step", "at least 1")
    learning_rate: float = 1e-4
    warmup: int = 1_000
    width: int = 768
    layers: int = 6
    heads: int = 12
    mlp_width: int = 3072
    context: int = 32
    dtype: str = "bfloat16"
    checkpoint_every: int = 1_000


def new_model(
    recipe: Mapper,
    kind: type[M],
    *,
    answers: tuple[str, ...] = (),
    several: bool = False,
) -> M:
    """The model before training, with the recipe's `stage1` (see `CLIPMapper.init_from`).

    Raises:
      ValueError: stage 1 reads shorter texts than the recipe wants.
    """
    stage1 = from_pretrained(recipe.stage1)
    towers = stage1.config if isinstance(stage1, CLIP) else stage1.config.clip
    if recipe.context > towers.text.context:
        raise ValueError(
            f"context {recipe.context} is more than the {towers.text.context} tokens that "
            f"{recipe.stage1!r} reads"
        )
    text = dataclasses.replace(towers.text, context=recipe.context)
    sizes = {name: getattr(recipe, name) for name in ("width", "layers", "heads", "mlp_width")}
    config = CLIPMapperConfig(
        task=kind.task,
        clip=dataclasses.replace(towers, text=text, dtype=recipe.dtype),
        answers=answers,
        several=several,
        **sizes,
    )
    model = kind(config, rngs=nnx.Rngs(recipe.seed), processor=stage1.processor)
    model.init_from(stage1)
    return model


def new_model_of_shapes(recipe: MapperShapes, kind: type[M], **options: Any) -> M:
    """`new_model`, of a stage 1 that reads images of Shapes.

    Raises:
      ValueError: as `new_model`, and for a stage 1 that reads larger or smaller images.
    """
    model = new_model(recipe, kind, **options)
    side = model.config.clip.vision.image_size
    if side != SIDE:
        raise ValueError(
            f"stage1 {recipe.stage1!r} reads images of {side} x {side} pixels, and this recipe "
            f"trains on Shapes of {SIDE} x {SIDE}; name a CLIP of that size, such as clip-shapes"
        )
    return model


def train_on_shapes(
    recipe: MapperShapes,
    folder: Path,
    parts: dict[str, Any],
    loss_of_tokens: TokensLoss,
    source: Source,
    *,
    name: str,
) -> CLIPMapper:
    """Train with the loss of naming what each patch shows added to a recipe's own.

    Args:
      recipe, folder, parts, source, name: see `train_model`.
      loss_of_tokens: `(parts, tokens, batch) -> (value, metrics)`, of the image's tokens.
    """
    vision = parts["model"].config.clip.vision
    parts = parts | {"names": PatchNames(vision.width, vision.grid, rngs=nnx.Rngs(recipe.seed))}

    def loss(parts: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        model = parts["model"]
        tokens, _ = model.encode_image(normalise(batch["image"]))
        value, metrics = loss_of_tokens(parts, tokens, batch)
        named = parts["names"].loss(model.vision_norm(tokens), batch["shown"])
        return value + recipe.patch_loss * named, metrics | {"patches": named}

    return train_model(recipe, folder, parts, loss, source, name=name)
