"""What explanations of CLIP are judged on: which caption it chooses for an image of Shapes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array
from tqdm.auto import trange

from jaxrel.explanations.methods import CONVOLUTIONAL, family
from jaxrel.metrics import perturbation
from jaxrel.models.clip import CLIP
from jaxrel.models.clipmapper import CLIPMapper
from jaxrel.train.data.shapes import Shapes
from jaxrel.train.evaluate.mapper_examples import Examples

AMONG = 32


def kind_of(name: str, model: Any) -> str:
    """What methods are judged on: the task of a CLIPmapper, or "clip" for a CLIP with a ViT.

    ValueError names another model.
    """
    if isinstance(model, CLIPMapper):
        return model.task
    if isinstance(model, CLIP) and family(model) is not CONVOLUTIONAL:
        return "clip"
    raise ValueError(
        f"{name} is a {type(model).__name__}; methods are judged on CLIPmappers and on a CLIP with "
        "a ViT"
    )


def pair_examples(
    model: CLIP, *, data_seed: int, split: str, count: int, among: int = AMONG
) -> list[Examples]:
    """Images with the captions that a CLIP chooses for them, and captions with their images.

    Scenes go in groups, in which the model chooses for each image one of the group's full captions,
    and for each caption one of its images. The pair that it chooses is explained. Patches are
    removed of the image that chooses, and words of the caption.

    Args:
      model: one with a ViT.
      data_seed: of the Shapes data set.
      split: of the data set.
      count: how many scenes.
      among: size of a group.

    Returns:
      Examples of images, and of captions. Their inputs also hold "others", the embeddings of the
      group that is chosen from, a row per example: give whole groups to what is measured.

    Raises:
      ValueError: `count` is no multiple of `among`.
    """
    if among < 1 or count % among:
        raise ValueError(
            f"pairs: the number of examples must be a multiple of {among}, the number of captions "
            f"that an image has to choose from; got {count}"
        )
    data = Shapes(seed=data_seed)
    parts: tuple[list[Any], list[Any]] = [], []
    for start in trange(0, count, among, desc="choosing", leave=False):
        scenes = [data.scene(split, i) for i in range(start, start + among)]
        inputs = model.prepare(
            image=[scene.image for scene in scenes], text=[s.captions[0].text for s in scenes]
        )
        compared = jax.device_get(_compare(model, inputs["image"], inputs["text"]))
        image, text = np.asarray(inputs["image"]), np.asarray(inputs["text"])
        caption, chosen = (compared["logits_per_image"].argmax(axis) for axis in (1, 0))
        of_captions, of_images = compared["text_embeds"], compared["image_embeds"]
        parts[0].append({"image": image, "text": text[caption], "others": of_captions})
        parts[1].append({"image": image[chosen], "text": text, "others": of_images})
    found = []
    for modality, stream, part in zip(("image", "text"), ("vision", "text"), parts, strict=True):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *part)
        removable = np.asarray(model.content(joined)[stream])
        what = "a caption for an image" if modality == "image" else "an image for a caption"
        found.append(
            Examples(
                joined,
                {modality: removable},
                f"the model's own choice of {what}",
                f"share of right choices of {what}, among {among}",
                _right,
            )
        )
    return found


def sweep_program(graph: Any, drawn: Examples, modality: str) -> Callable:
    """As `perturbation.sweep_program`, of a CLIP: the other tower's embeddings stay."""

    @jax.jit
    def sweep_image(parameters, inputs, relevance, removable):
        model = nnx.merge(graph, parameters)

        def measured(kept):
            tokens, _ = model.vision(jnp.asarray(inputs["image"]), keep=kept)
            return drawn.measured(model, model.vision.embed(tokens), inputs)

        return perturbation.sweep_indices(measured, relevance, drawn.removable["image"][0])

    @jax.jit
    def sweep_text(parameters, inputs, relevance, removable):
        model, text = nnx.merge(graph, parameters), jnp.asarray(inputs["text"])
        end = model.target_tokens(inputs)["text"]

        def measured(keep):
            tokens, _ = model.text(text, keep=keep)
            return drawn.measured(model, model.text.embed(tokens, end), inputs)

        return perturbation.sweep(measured, relevance, removable)

    return sweep_image if modality == "image" else sweep_text


def _right(model: CLIP, embeddings: Array, inputs: Any) -> Array:
    """Whether each row of a group is the most similar to its own partner."""
    similar = embeddings @ jnp.asarray(inputs["others"]).T
    return (similar.argmax(-1) == jnp.arange(len(embeddings))).astype(jnp.float32)


@jax.jit
def _compare(model: CLIP, image: Array, text: Array) -> dict[str, Array]:
    return model({"image": image, "text": text})
