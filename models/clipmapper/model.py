"""What the two CLIPmappers share: both stages, the order of attention, and the checks."""

import os
from dataclasses import replace
from typing import Any, ClassVar

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel import capture_with_grad
from jaxrel.models.base import Model, empty
from jaxrel.models.checkpoint import fill, find_folder, read_config, read_values, variables
from jaxrel.models.clip.model import CLIP
from jaxrel.models.clip.tokens import content, end_of_text
from jaxrel.models.clip.towers import Kept, TextTower, VisionTower
from jaxrel.models.clipmapper.config import MODEL_TYPE, CLIPMapperConfig
from jaxrel.models.clipmapper.mapper import Mapper, Maps
from jaxrel.models.familiarity import read_familiarity
from jaxrel.models.inputs import Inputs, check_floats, check_held, check_text
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.processor import Processor
from jaxrel.models.transformer import Mask, causal_mask, key_mask, layer_norm

# The model for each task; the modules of the models enter them.
KINDS: dict[str, type["CLIPMapper"]] = {}


class CLIPMapper(Model):
    """What the question-answering and the captioning model share; `from_pretrained` gives either.

    `inputs` is a dict {"image": float [batch, height, width, 3], normalised; "text": int [batch,
    tokens]}, as `prepare` makes it. Optional are "image_keep" bool [batch, patches + 1] and
    "text_keep" bool [batch, tokens]: tokens that are not kept are hidden from all others in
    every attention layer.

    The tags are the names of the attention maps, "vision" and "text" (stage 1), "image_single",
    "text_single", "text_to_image", "image_to_text", "image_self" and "text_self" (stage 2), and
    with these in front "/before" (the residual stream), and "/after" (what is added to it).

    Args:
      config: the sizes.
      rngs: keys for the initial parameters (stream "params").
      processor: tokenizer and image preprocessing.

    Raises:
      ValueError: the tokenizer has more tokens than the model.
    """

    task: ClassVar[str]

    def __init__(
        self, config: CLIPMapperConfig, *, rngs: nnx.Rngs, processor: Processor | None = None
    ) -> None:
        dtype = jnp.dtype(config.clip.dtype)
        self.config = config
        self.processor = processor or Processor()
        self.processor.check_vocabulary(config.clip.text.vocab_size)
        eps, stage1 = config.layer_norm_eps, config.clip
        outputs = len(config.answers) or stage1.text.vocab_size
        self.vision = VisionTower(stage1.vision, None, dtype, rngs=rngs)
        self.text = TextTower(stage1.text, None, dtype, rngs=rngs)
        self.vision_norm = layer_norm(stage1.vision.width, eps=eps, dtype=dtype, rngs=rngs)
        self.text_norm = layer_norm(stage1.text.width, eps=eps, dtype=dtype, rngs=rngs)
        self.vision_in = nnx.Linear(stage1.vision.width, config.width, dtype=dtype, rngs=rngs)
        self.text_in = nnx.Linear(stage1.text.width, config.width, dtype=dtype, rngs=rngs)
        self.mapper = Mapper(config, co_attention=config.task == "vqa", dtype=dtype, rngs=rngs)
        self.final_norm = layer_norm(config.width, eps=eps, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, outputs, dtype=dtype, rngs=rngs)

    def encode_image(
        self,
        image: Float[Array, "batch height width 3"],
        keep: Kept | None = None,
        *,
        return_attention: bool = False,
    ) -> tuple[Float[Array, "batch seen features"], Maps]:
        """Return the image's tokens after stage 1, and with `return_attention` the maps by name.

        Args:
          image: normalised images.
          keep: which of the tokens are seen. bool [batch, tokens] hides the others, which are to
            be hidden from stage 2 too; indices [batch, kept] leave them out.
          return_attention: also return the attention maps by name.
        """
        tokens, maps = self.vision(
            image, keep=keep, remat=self.config.clip.remat, return_attention=return_attention
        )
        return tokens, {} if maps is None else {"vision": maps}

    def encode_text(
        self,
        text: Int[Array, "batch words"],
        keep: Bool[Array, "batch words"] | None = None,
        *,
        return_attention: bool = False,
    ) -> tuple[Float[Array, "batch words features"], Maps]:
        """Return the text's tokens after stage 1, and with `return_attention` the maps by name."""
        tokens, maps = self.text(
            text, keep=keep, remat=self.config.clip.remat, return_attention=return_attention
        )
        return tokens, {} if maps is None else {"text": maps}

    def map(
        self,
        image: Float[Array, "batch tokens features"],
        text: Int[Array, "batch words"],
        **options: Any,
    ) -> tuple[Float[Array, "batch words mapped"], Maps]:
        """Return the text's tokens and the attention maps of `streams`, with its arguments."""
        (_, words), maps = self.streams(image, text, **options)
        return words, maps

    def streams(
        self,
        image: Float[Array, "batch tokens features"],
        text: Int[Array, "batch words"],
        *,
        encoded: Float[Array, "batch words encoded"] | None = None,
        image_keep: Bool[Array, "batch tokens"] | None = None,
        text_keep: Bool[Array, "batch words"] | None = None,
        return_attention: bool = False,
    ) -> tuple[
        tuple[Float[Array, "batch tokens mapped"], Float[Array, "batch words mapped"]], Maps
    ]:
        """Run stage 1 of the text, and stage 2.

        Args:
          image: the image's tokens, as `encode_image` returns them.
          text: token ids.
          encoded: the text's tokens, as `encode_text` returns them; None: they are made here.
          image_keep: which of the image's tokens are seen.
          text_keep: which of the text's tokens are seen; padding never is.
          return_attention: also return the attention maps.

        Returns:
          The image's tokens as the words of the last layer read them, the text's tokens after
          it, normalised for the head; and the maps by name, empty without `return_attention`.
        """
        maps: Maps = {}
        if encoded is None:
            encoded, maps = self.encode_text(text, text_keep, return_attention=return_attention)
        (seen, words), mapped = self.mapper(
            self.vision_in(self.vision_norm(image)),
            self.text_in(self.text_norm(encoded)),
            None if image_keep is None else key_mask(image_keep),
            self._text_mask(text, text_keep),
            remat=self.config.clip.remat,
            return_attention=return_attention,
        )
        return (seen, self.final_norm(words)), maps | (mapped or {})

    def _text_mask(self, text: Array, keep: Array | None) -> Mask:
        """Which tokens of the text are seen in stage 2, and from where."""
        if self.config.task == "caption":
            mask = causal_mask(text.shape[1])
            return mask if keep is None else mask & key_mask(keep)
        end = end_of_text(text, self.config.clip.text.eos_token_id)
        words = jnp.arange(text.shape[1]) <= end[:, None]
        return key_mask(words if keep is None else words & keep)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        dtype: str | None = None,
        allow_pickle: bool = False,
    ) -> "CLIPMapper":
        """Load a model and its tokenizer and image preprocessing.

        Args:
          name_or_folder: a bundled model, a folder that `save_pretrained` wrote, or a hub name.
          dtype: dtype of the computation, "float32" (default) or "bfloat16".
          allow_pickle: read a pickled checkpoint where there is nothing else; needs torch.

        Returns:
          A `CLIPMapperVQA` or a `CLIPMapperCaption`, as config.json says.

        Raises:
          FileNotFoundError: no such model, or a file is missing.
          OSError: the hub did not answer, or a file is truncated.
          ValueError: config.json or the weights are not those of a CLIPmapper (of the task of
            this class), do not belong together, are pickled, or hold values that are not finite.
        """
        folder = find_folder(name_or_folder)
        config = CLIPMapperConfig.from_dict(read_config(folder, MODEL_TYPE))
        config = replace(config, clip=replace(config.clip, dtype=dtype or config.clip.dtype))
        kind = KINDS[config.task]
        if not issubclass(kind, cls):
            raise ValueError(
                f"{folder} holds a model for the task {config.task!r}, and {cls.__name__} does "
                f"{cls.task!r}; load it with {kind.__name__} or CLIPMapper"
            )
        model = empty(kind, config, Processor.from_folder(folder))
        fill(model, read_values(folder, model, allow_pickle=allow_pickle))
        model.familiar = read_familiarity(folder)
        return model

    def init_from(self, other: "CLIP | CLIPMapper") -> None:
        """Take over parameters of another model, in place.

        From a CLIP these are stage 1: its towers without their last norms. From a CLIPmapper they
        are also all parameters of stage 2, except the head, that have the same shape in both.

        Args:
          other: its towers have this model's sizes. Where it reads longer texts, its first text
            positions are taken.

        Raises:
          ValueError: a size of the towers differs.
        """
        theirs, taken = variables(other), []
        for path, variable in variables(self).items():
            if path[0] not in ("vision", "text"):
                shared = path in theirs and theirs[path].shape == variable.shape
                if isinstance(other, CLIPMapper) and shared and path[0] != "head":
                    taken.append((variable, theirs[path][...]))
                continue
            value = theirs[path][...]
            if path == ("text", "position_embedding"):
                value = value[: variable.shape[0]]
            if value.shape != variable.shape:
                raise ValueError(
                    f"init_from: {'/'.join(path)} has shape {list(value.shape)} there and "
                    f"{list(variable.shape)} here; make the model from the other's own config"
                )
            taken.append((variable, value))
        for variable, value in taken:
            variable.set_value(value)

    @property
    def layout(self) -> Layout:
        """What the axes of the attention maps mean, and in which order the streams attend.

        Stream s is the text, which holds the target token, and stream q the image.
        """
        vision, text = self.config.clip.vision, self.config.clip.text
        reads = (("qs", "image_to_text"),) if self.config.task == "vqa" else ()
        mapper = (
            (("ss", "text_single"), ("qq", "image_single")),
            (("sq", "text_to_image"), *(reads if self.config.layers > 1 else ())),
            (("ss", "text_self"), *((("qq", "image_self"),) if self.config.layers > 1 else ())),
        )
        return Layout(
            (
                Stream("text", "text", text.context),
                Stream("vision", "image", vision.tokens, vision.grid),
            ),
            schedule=(((("qq", "vision"),),), ((("ss", "text"),),), mapper),
            target="example" if self.config.task == "vqa" else "words",
        )

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the scalar that explanations explain; each of the two models says which."""
        raise NotImplementedError

    def attention_gradients(
        self, inputs: Inputs, target: Any = None
    ) -> tuple[Float[Array, " batch"], Maps, Maps]:
        """Return scores, attention maps and the scores' gradients by them, in one pass.

        Args:
          inputs: what `prepare` returns.
          target: see `score`.

        Returns:
          The scores, and two dicts by name: maps and gradients [layers, batch, heads, query,
          key], float32.
        """
        names = [tag for block in self.layout.schedule for stage in block for _, tag in stage]
        captured = capture_with_grad(lambda inputs: self.score(inputs, target), names)
        score, *both = captured(inputs)
        # A mapper of one layer runs no scan, which would give the maps their layer axis.
        maps, grads = ({n: x if x.ndim == 5 else x[None] for n, x in d.items()} for d in both)
        return score, maps, grads

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return where the tokens are that stand for something: patches, and words."""
        return content(self.config.clip, inputs["image"], inputs["text"])

    def tokens(self, inputs: Inputs) -> list[list[str]]:
        """Return one string per text token to display it; "" for special tokens.

        A word that the model does not know is marked "(unknown)" where its spelling is known, and
        else is "".
        """
        return self.processor.shown(inputs, known=True)

    def _check(self, inputs: Inputs) -> None:
        check_held(inputs, "image", "text")
        image, text = inputs["image"], inputs["text"]
        check_floats("image", image, (*self.config.clip.vision.sides, 3))
        check_text(text, self.config.clip.text.context)
        if len(image) != len(text):
            raise ValueError(
                f"{len(image)} images and {len(text)} texts: give one text per image, or "
                "repeat the one that is shared"
            )
        tokens_of = {"image_keep": self.config.clip.vision.tokens, "text_keep": text.shape[1]}
        for name, tokens in tokens_of.items():
            keep = inputs.get(name)
            if keep is not None and (keep.dtype != bool or keep.shape != (len(text), tokens)):
                raise ValueError(
                    f"{name} must be bool [{len(text)}, {tokens}], one per token of the stream, "
                    f"got {keep.dtype} {list(keep.shape)}"
                )

    def _features(
        self, inputs: Inputs, return_attention: bool = False
    ) -> tuple[Float[Array, "batch words mapped"], Maps]:
        self._check(inputs)
        image_keep, text_keep = (
            jnp.asarray(inputs[name]) if inputs.get(name) is not None else None
            for name in ("image_keep", "text_keep")
        )
        image, seen = self.encode_image(
            jnp.asarray(inputs["image"]), image_keep, return_attention=return_attention
        )
        words, maps = self.map(
            image,
            jnp.asarray(inputs["text"]),
            image_keep=image_keep,
            text_keep=text_keep,
            return_attention=return_attention,
        )
        return words, {**seen, **maps}
