"""CLIPmapper: CLIP's encoders, then a mapper over both streams (Huang et al. 2023).

Stage 1 turns an image into patch tokens and a text into word tokens, with the two towers of a
CLIP model. Stage 2, the mapper, has single-modality self-attention and cross-modality
co-attention in every layer. Two models are made of it: one answers questions, one captions.
"""

import dataclasses
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel import capture_with_grad
from jaxrel.models.captions import (
    describe_words,
    logit_by_token,
    sentences,
    special_ids,
    word_rows,
)
from jaxrel.models.checkpoint import (
    CONFIG,
    find_folder,
    parameters_by_path,
    read_config,
    read_parameters,
    read_tensors,
    write_model,
)
from jaxrel.models.clip import (
    CLIP,
    CLIPConfig,
    Kept,
    TextTower,
    VisionTower,
    check_vocabulary,
    end_of_text,
    kept_mask,
)
from jaxrel.models.clipmapper.mapper import Mapper, Maps, Memories
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.processor import Processor
from jaxrel.models.transformer import (
    ACTIVATIONS,
    Mask,
    Memory,
    causal_mask,
    key_mask,
    layer_norm,
    read_at,
)

MODEL_TYPE = "clipmapper"
TASKS = ("vqa", "caption")

Inputs = Mapping[str, Array | np.ndarray]


@dataclass(frozen=True)
class CLIPMapperConfig:
    """Sizes of a CLIPmapper.

    Args:
      task: "vqa" answers questions, "caption" writes captions.
      clip: stage 1. Its common embedding space is not used.
      answers: the answers, in the order of the logits (task "vqa").
      several: whether several answers may be right: each has a probability of its own
        (sigmoid), as VQA v2 needs it; otherwise one is right (softmax).
      width: features per token in the mapper.
      layers: of the mapper.
      heads: attention heads; divides `width`.
      mlp_width: hidden features of the MLPs.
      activation: "quick_gelu" or "gelu".
      layer_norm_eps: added to the variance in layer norms.

    Raises:
      ValueError: a size or a name is out of range, or the answers do not suit the task.
    """

    task: str = "vqa"
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    answers: tuple[str, ...] = ()
    several: bool = False
    width: int = 768
    layers: int = 6
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"mapper: task must be one of {', '.join(TASKS)}, got {self.task!r}")
        for name in ("width", "layers", "heads", "mlp_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"mapper: {name} must be a positive integer, got {value!r}")
        if self.width % self.heads:
            raise ValueError(
                f"mapper: width {self.width} is not a multiple of its {self.heads} heads"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"mapper: unknown activation {self.activation!r}, known are "
                f"{', '.join(ACTIVATIONS)}"
            )
        if (self.task == "vqa") != bool(self.answers):
            raise ValueError(
                f"mapper: task {self.task!r} with {len(self.answers)} answers; 'vqa' needs the "
                "answers it chooses from, 'caption' has none"
            )
        if len(set(self.answers)) < len(self.answers):
            twice = sorted({a for a in self.answers if self.answers.count(a) > 1})
            raise ValueError(f"mapper: answers are repeated: {', '.join(twice[:5])}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPMapperConfig":
        """Read the content of a config.json, as `to_dict` writes it.

        Raises:
          ValueError: a key is missing or unknown, or a value is out of range.
        """
        mapper, stage1 = config.get("mapper_config"), config.get("clip_config")
        if not isinstance(mapper, dict) or not isinstance(stage1, dict):
            raise ValueError(f"{CONFIG}: expected objects clip_config and mapper_config")
        known = {f.name for f in dataclasses.fields(cls)} - {"clip"}
        if set(mapper) != known:
            wrong = ", ".join(sorted(set(mapper) ^ known))
            raise ValueError(
                f"{CONFIG}: mapper_config must hold {', '.join(sorted(known))}; missing or "
                f"unknown: {wrong}"
            )
        answers = mapper["answers"]
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise ValueError(
                f"{CONFIG}: mapper_config.answers must be a list of strings, got {answers!r:.80}"
            )
        return cls(**(mapper | {"answers": tuple(answers)}), clip=CLIPConfig.from_dict(stage1))

    def to_dict(self) -> dict[str, Any]:
        """Write the content of a config.json (without `remat` and `dtype`)."""
        mapper = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "clip"
        }
        return {
            "model_type": MODEL_TYPE,
            "clip_config": self.clip.to_dict(),
            "mapper_config": mapper | {"answers": list(self.answers)},
        }


class CLIPMapper(nnx.Module):
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
      rngs: for the initial parameters (stream "params").
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
        check_vocabulary(self.processor, config.clip)
        eps, stage1 = config.layer_norm_eps, config.clip
        outputs = len(config.answers) or stage1.text.vocab_size
        self.vision = VisionTower(stage1.vision, None, dtype, rngs=rngs)
        self.text = TextTower(stage1.text, None, dtype, rngs=rngs)
        self.vision_norm = layer_norm(stage1.vision.width, eps=eps, dtype=dtype, rngs=rngs)
        self.text_norm = layer_norm(stage1.text.width, eps=eps, dtype=dtype, rngs=rngs)
        self.vision_in = nnx.Linear(stage1.vision.width, config.width, dtype=dtype, rngs=rngs)
        self.text_in = nnx.Linear(stage1.text.width, config.width, dtype=dtype, rngs=rngs)
        self.mapper = Mapper(
            config.width,
            config.layers,
            config.heads,
            config.mlp_width,
            co_attention=config.task == "vqa",
            activation=config.activation,
            eps=eps,
            dtype=dtype,
            rngs=rngs,
        )
        self.final_norm = layer_norm(config.width, eps=eps, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, outputs, dtype=dtype, rngs=rngs)

    def encode_image(
        self,
        image: Float[Array, "batch height width 3"],
        keep: Kept | None = None,
        *,
        return_attention: bool = False,
    ) -> tuple[Float[Array, "batch seen features"], Maps]:
        """Stage 1 of the image: its tokens, and with `return_attention` the maps by name.

        Args:
          image: normalised images.
          keep: which of the tokens are seen. bool [batch, tokens] hides the others, which are to
            be hidden from stage 2 too; indices [batch, kept] leave them out.
          return_attention: also return the attention maps by name.
        """
        tokens, maps = self.vision(
            image,
            keep=keep,
            remat=self.config.clip.remat,
            return_attention=return_attention,
        )
        return tokens, {} if maps is None else {"vision": maps}

    def encode_text(
        self,
        text: Int[Array, "batch words"],
        keep: Bool[Array, "batch words"] | None = None,
        *,
        return_attention: bool = False,
    ) -> tuple[Float[Array, "batch words features"], Maps]:
        """Stage 1 of the text: its tokens, and with `return_attention` the maps by name."""
        tokens, maps = self.text(
            text,
            keep=keep,
            remat=self.config.clip.remat,
            return_attention=return_attention,
        )
        return tokens, {} if maps is None else {"text": maps}

    def map(
        self,
        image: Float[Array, "batch tokens features"],
        text: Int[Array, "batch words"],
        *,
        encoded: Float[Array, "batch words encoded"] | None = None,
        image_keep: Bool[Array, "batch tokens"] | None = None,
        text_keep: Bool[Array, "batch words"] | None = None,
        return_attention: bool = False,
    ) -> tuple[Float[Array, "batch words mapped"], Maps]:
        """Stage 1 of the text, and stage 2: the text's tokens, normalised for the head.

        Args:
          image: the image's tokens, as `encode_image` returns them.
          text: token ids.
          encoded: the text's tokens, as `encode_text` returns them; None: they are made here.
          image_keep: which of the image's tokens are seen.
          text_keep: which of the text's tokens are seen, beside the padding, which never is.
          return_attention: also return the attention maps by name.
        """
        (_, words), maps = self.streams(
            image,
            text,
            encoded=encoded,
            image_keep=image_keep,
            text_keep=text_keep,
            return_attention=return_attention,
        )
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
        """As `map`, with the image's tokens as the last layer's words read them before these."""
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
          dtype: of the computation, "float32" (default) or "bfloat16".
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
        kind = _KINDS[config.task]
        if not issubclass(kind, cls):
            raise ValueError(
                f"{folder} holds a model for the task {config.task!r}, and {cls.__name__} does "
                f"{cls.task!r}; load it with {kind.__name__} or CLIPMapper"
            )
        processor = Processor.from_folder(folder)
        check_vocabulary(processor, config.clip)
        model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), processor=processor))
        shapes = {path: variable.shape for path, variable in _parameters(model)}
        tensors = read_tensors(folder, allow_pickle=allow_pickle)
        parameters = read_parameters(tensors, parameters_by_path(shapes), shapes)
        for path, variable in _parameters(model):
            variable.set_value(jnp.asarray(parameters[path]))
        return model

    def save_pretrained(self, folder: str | os.PathLike, *, dtype: str = "float32") -> None:
        """Write config.json, model.safetensors and the processor's files.

        The folder appears as a whole, or, when something fails, not at all.

        Args:
          folder: a new folder, or an older model folder, which is replaced.
          dtype: of the file: "float32", or "float16" for half the size.

        Raises:
          FileExistsError: the folder exists and is no model folder.
          ValueError: another dtype.
        """
        parameters = {path: np.asarray(value[...]) for path, value in _parameters(self)}
        write_model(folder, self.config.to_dict(), parameters, self.processor, dtype=dtype)

    def init_from(self, other: "CLIP | CLIPMapper") -> None:
        """Begin with the parameters of another model, in place.

        Of a CLIP these are stage 1: its towers without their last norms. Of a CLIPmapper they
        are also those of stage 2 that both models have in one size, but for the head.

        Args:
          other: its towers have this model's sizes; of its text positions the first are taken
            where it reads longer texts.

        Raises:
          ValueError: a size of the towers differs.
        """
        theirs = dict(nnx.to_flat_state(nnx.state(other, nnx.Param)))
        taken = []
        for path, variable in _parameters(self):
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

        Stream s is the text, which is read out, and stream q the image.
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
        )

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the scalar that explanations explain; each of the two models says which."""
        raise NotImplementedError

    def attention_gradients(
        self, inputs: Inputs, target: Any = None
    ) -> tuple[Float[Array, " batch"], Maps, Maps]:
        """Return scores, attention maps and the scores' gradients by them, in one pass.

        Args:
          inputs: as `prepare` makes them.
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
        image, text = inputs["image"], jnp.asarray(inputs["text"])
        patches = jnp.arange(self.config.clip.vision.tokens) >= 1
        columns = jnp.arange(text.shape[1])
        end = end_of_text(text, self.config.clip.text.eos_token_id)
        return {
            "vision": jnp.broadcast_to(patches, (len(image), len(patches))),
            "text": (columns >= 1) & (columns < end[:, None]),
        }

    def tokens(self, inputs: Inputs) -> list[list[str]]:
        """Return one string per text token to display it; "" for special and unknown tokens."""
        unknown = getattr(self.processor.tokenizer, "unk_token", None)
        rows = self.processor.tokens(np.asarray(inputs["text"]))
        return [["" if token == unknown else token for token in row] for row in rows]

    def seen(self, image: Any) -> Any:
        """Return the part of an image that the model sees; `prepare` crops to the middle."""
        return self.processor.seen(image)

    def _token_ids(self, text: Any) -> Int[Array, "batch tokens"]:
        """Texts as token ids; ValueError if they do not end as the model expects."""
        ids = self.processor.text(text, self.config.clip.text.context)
        eos, found = self.config.clip.text.eos_token_id, self.processor.tokenizer.eos_token_id
        if np.any(np.take_along_axis(ids, np.asarray(end_of_text(ids, eos))[:, None], 1) != found):
            raise ValueError(
                f"the tokenizer ends a text with the id {found}, and the model looks for the id "
                f"{eos}: this is the tokenizer of another model"
            )
        return jnp.asarray(ids)

    def _check(self, inputs: Inputs) -> None:
        missing = [name for name in ("image", "text") if name not in inputs]
        if missing:
            raise ValueError(
                f"inputs lack {' and '.join(missing)}; they hold {', '.join(inputs) or 'nothing'}. "
                "Make them with model.prepare(image=..., text=...)"
            )
        image, text = inputs["image"], inputs["text"]
        side, context = self.config.clip.vision.image_size, self.config.clip.text.context
        if image.ndim != 4 or image.shape[1:] != (side, side, 3):
            raise ValueError(
                f"image must have shape [batch, {side}, {side}, 3], got {list(image.shape)}; use "
                "model.prepare"
            )
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise TypeError(
                f"image must be normalised floats, got {image.dtype}; use model.prepare"
            )
        if text.ndim != 2 or not 1 <= text.shape[1] <= context:
            raise ValueError(
                f"text must be token ids of shape [batch, tokens] with at most {context} tokens, "
                f"got {list(text.shape)}; use model.prepare"
            )
        if not jnp.issubdtype(text.dtype, jnp.integer):
            raise TypeError(f"text must be integer token ids, got {text.dtype}; use model.prepare")
        if len(image) != len(text):
            raise ValueError(
                f"{len(image)} images and {len(text)} texts: give one text per image, or "
                "repeat the one that is shared"
            )
        for name, stream in (("image_keep", "vision"), ("text_keep", "text")):
            tokens = self.config.clip.vision.tokens if stream == "vision" else text.shape[1]
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


class CLIPMapperVQA(CLIPMapper):
    """CLIPmapper that answers questions: one of a list of answers, read at the end token."""

    task = "vqa"

    def __call__(self, inputs: Inputs, *, return_attention: bool = False) -> Any:
        """Return the answers' logits.

        Args:
          inputs: images and questions, one question per image.
          return_attention: also return the attention maps.

        Returns:
          float32 [batch, answers]; with `return_attention` a pair of it and the maps by name,
          [layers, batch, heads, query, key].

        Raises:
          ValueError, TypeError: an input is missing or has a wrong shape or dtype.
        """
        words, maps = self._features(inputs, return_attention)
        text = jnp.asarray(inputs["text"])
        logits = self.answer_logits(words, text)
        return (logits, maps) if return_attention else logits

    def answer_logits(
        self, words: Float[Array, "batch words mapped"], text: Int[Array, "batch words"]
    ) -> Float[Array, "batch answers"]:
        """Read the answers' logits at the question's end token; see `map`."""
        return self.head(self.at_end(words, text)).astype(jnp.float32)

    def at_end(
        self, words: Float[Array, "batch words mapped"], text: Int[Array, "batch words"]
    ) -> Float[Array, "batch mapped"]:
        """The token that the answer is read from: the question's end."""
        end = end_of_text(text, self.config.clip.text.eos_token_id)
        return jnp.take_along_axis(words, end[:, None, None], axis=1)[:, 0]

    def predict(self, inputs: Inputs) -> Float[Array, "batch answers"]:
        """Return each answer's probability."""
        logits = self(inputs)
        return jax.nn.sigmoid(logits) if self.config.several else jax.nn.softmax(logits)

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the logit of one answer per question: the scalar that explanations explain.

        Args:
          inputs: images and questions; "answer" int [batch], if there, is the target.
          target: the answer's index, one or one per question; None: those of the inputs, or
            else the most probable.
        """
        target = inputs.get("answer") if target is None else target
        logits = self(inputs)
        # An index has no gradient: the choice of the answer is not explained, its logit is.
        chosen = logits.argmax(-1) if target is None else jnp.asarray(target)
        chosen = jnp.broadcast_to(chosen, len(logits))
        return jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images and questions, with the model's own preprocessing.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them.
          text: a question or a list of questions.

        Raises:
          TypeError, ValueError: see `CLIP.prepare`.
        """
        ids = self._token_ids(text)
        return {"image": jnp.asarray(self.processor.image(image)), "text": ids}

    def pairs(self, inputs: Inputs, target: Any = None) -> dict[str, Array]:
        """Bring inputs to one image, question and answer per row.

        Args:
          inputs: images and questions.
          target: the answer to explain, in words or as an index, one or one per question; the
            most probable by default.

        Raises:
          ValueError: the numbers do not fit, or the model does not have this answer.
        """
        images, questions = len(inputs["image"]), len(inputs["text"])
        rows = max(images, questions)
        if {images, questions} - {1, rows}:
            raise ValueError(
                f"{images} images and {questions} questions make no pairs: give as many "
                "images as questions, one image, or one question"
            )
        paired = {name: jnp.broadcast_to(x, (rows, *x.shape[1:])) for name, x in inputs.items()}
        if target is None:
            answer = _predict(self, paired).argmax(-1)
        else:
            chosen = [target] if np.ndim(target) == 0 else list(target)
            answer = jnp.asarray([self._answer(one) for one in chosen])
            if len(answer) not in (1, rows):
                raise ValueError(f"{len(answer)} answers for {rows} questions; give one for each")
            answer = jnp.broadcast_to(answer, rows)
        return paired | {"answer": answer.astype(jnp.int32)}

    def _answer(self, answer: Any) -> int:
        answers = self.config.answers
        if isinstance(answer, str) and answer in answers:
            return answers.index(answer)
        if hasattr(answer, "__index__") and operator.index(answer) in range(len(answers)):
            return operator.index(answer)
        shown = ", ".join(answers[:30]) + (", ..." if len(answers) > 30 else "")
        raise ValueError(
            f"this model has no answer {answer!r}; it has {len(answers)} answers: {shown}"
        )

    def describe(self, inputs: Inputs) -> list[str]:
        """Return each row's answer, with its probability."""
        answer = np.asarray(inputs["answer"])
        asked = {name: value for name, value in inputs.items() if name != "answer"}
        probability = np.asarray(_predict(self, asked))[np.arange(len(answer)), answer]
        named = [self.config.answers[i] for i in answer]
        return [f"{name} ({p:.0%})" for name, p in zip(named, probability, strict=True)]

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the token that the answer is read from: the question's end."""
        end = end_of_text(inputs["text"], self.config.clip.text.eos_token_id)
        return {"text": end}


class CLIPMapperCaption(CLIPMapper):
    """CLIPmapper that writes captions: each word from the image and the words before it."""

    task = "caption"

    def __call__(self, inputs: Inputs, *, return_attention: bool = False) -> Any:
        """Return the logits of the next word after each token of the captions.

        Args:
          inputs: images and captions, one caption per image.
          return_attention: also return the attention maps.

        Returns:
          float32 [batch, tokens, vocabulary]; with `return_attention` a pair of it and the maps
          by name, [layers, batch, heads, query, key].

        Raises:
          ValueError, TypeError: an input is missing or has a wrong shape or dtype.
        """
        words, maps = self._features(inputs, return_attention)
        logits = self.word_logits(words)
        return (logits, maps) if return_attention else logits

    def word_logits(
        self, words: Float[Array, "batch words mapped"]
    ) -> Float[Array, "batch words vocabulary"]:
        """Logits of the word after each token; see `map`."""
        return self.head(words).astype(jnp.float32)

    def log_probability(self, inputs: Inputs) -> Float[Array, " batch"]:
        """Return the mean log-probability of the caption's words and its end (teacher forcing)."""
        return self.mean_log_probability(self(inputs), jnp.asarray(inputs["text"]))

    def mean_log_probability(
        self, logits: Float[Array, "batch tokens vocabulary"], text: Int[Array, "batch tokens"]
    ) -> Float[Array, " batch"]:
        """As `log_probability`, from the logits of the word after each token."""
        of_token = logit_by_token(jax.nn.log_softmax(logits), text)
        end = end_of_text(text, self.config.clip.text.eos_token_id)
        place = jnp.arange(text.shape[1])
        counted = (place >= 1) & (place <= end[:, None])
        return jnp.where(counted, of_token, 0).sum(-1) / jnp.maximum(counted.sum(-1), 1)

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the logit of one word of each caption: the scalar that explanations explain.

        Args:
          inputs: images and captions; "position" int [batch], if there, is the target. With
            "words" bool [batch, tokens] it is the mean of the logits of several words.
          target: the position of the word in its caption, from 1 (0 is the start token), one or
            one per caption.

        Raises:
          ValueError: neither the inputs nor `target` say which word.
        """
        if target is None and "words" in inputs:
            of_token = logit_by_token(self(inputs), jnp.asarray(inputs["text"]))
            return of_token.mean(axis=-1, where=jnp.asarray(inputs["words"]))
        if target is None and "position" not in inputs:
            raise ValueError(
                "which word of the caption? Pass target= its position, from 1, or make the inputs "
                "with model.pairs, which gives every word a row"
            )
        position = jnp.asarray(inputs["position"] if target is None else target)
        logits = self(inputs)
        word = read_at(jnp.asarray(inputs["text"]), position)
        return read_at(read_at(logits, position - 1), word)

    def generate(
        self, image: Float[Array, "batch height width 3"], keep: Kept | None = None
    ) -> Int[Array, "batch words"]:
        """Write a caption for each image, the most probable word at each step (greedy).

        Args:
          image: normalised images.
          keep: which of the image's tokens are seen, as in `encode_image`; all by default.

        Returns:
          Token ids with start and end, padded; a caption that has not ended when the context
          is full ends there.
        """
        text = self.config.clip.text
        start, end, pad = special_ids(self.processor.tokenizer)
        # A caption has one start, and padding only after its end (which may be the same token).
        never = jnp.zeros(text.vocab_size, bool).at[jnp.array([start, pad])].set(True)
        never = never.at[end].set(False)
        tokens, _ = self.encode_image(image, keep)
        mask = kept_mask(keep)
        empty = jnp.full((len(image), text.context), pad, jnp.int32).at[:, 0].set(start)

        def unfinished(state):
            _, position, ended, _ = state
            return (position < text.context) & ~ended.all()

        def step(state):
            ids, position, ended, memory = state
            before = jax.lax.dynamic_index_in_dim(ids, position - 1, 1, keepdims=False)
            logits, memory = self.next_word(before, memory, position - 1, mask)
            best = jnp.where(never, -jnp.inf, logits).argmax(-1).astype(jnp.int32)
            best = jnp.where(position == text.context - 1, end, best)
            best = jnp.where(ended, pad, best)
            ids = jax.lax.dynamic_update_index_in_dim(ids, best, position, 1)
            return ids, position + 1, ended | (best == end), memory

        ended = jnp.zeros(len(image), bool)
        state = (empty, jnp.int32(1), ended, self.begin(tokens, mask))
        return jax.lax.while_loop(unfinished, step, state)[0]

    def begin(
        self, image: Float[Array, "batch tokens features"], image_mask: Mask | None = None
    ) -> tuple[Memory, dict[str, Memories]]:
        """Return what is remembered of an image before its caption, for `next_word`.

        Args:
          image: the image's tokens, as `encode_image` returns them.
          image_mask: which of them are seen.
        """
        context = self.config.clip.text.context
        seen = self.vision_in(self.vision_norm(image))
        return (
            self.text.transformer.empty(len(image), context),
            self.mapper.begin(seen, image_mask, context),
        )

    def next_word(
        self,
        token: Int[Array, " batch"],
        memory: tuple[Memory, dict[str, Memories]],
        position: Int[Array, ""],
        image_mask: Mask | None = None,
    ) -> tuple[Float[Array, "batch vocabulary"], tuple[Memory, dict[str, Memories]]]:
        """Return the logits of the word after a token, as a call would on all tokens so far.

        Args:
          token: the last token of each caption.
          memory: of what came before, as `begin` or the word before returned it.
          position: of the token.
          image_mask: as in `begin`.

        Returns:
          The logits, float32, and the memory with this token.
        """
        encoded, of_tower = self.text.step(token, memory[0], position)
        word, of_mapper = self.mapper.step(
            self.text_in(self.text_norm(encoded)), memory[1], position, image_mask
        )
        logits = self.word_logits(self.final_norm(word))[:, 0]
        return logits, (of_tower, of_mapper)

    def predict(self, inputs: Inputs) -> list[str]:
        """Return a caption for each image, in words."""
        ids = _generate(self, jnp.asarray(inputs["image"]))
        return self.sentences(ids)

    def sentences(self, ids: Int[Array | np.ndarray, "batch tokens"]) -> list[str]:
        """Return captions in words, without what the tokenizer does not know."""
        rows = self.tokens({"text": ids})
        return sentences(rows)

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images and captions; without a caption the model writes it.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them.
          text: a caption or a list of captions to explain in the place of the model's own.

        Raises:
          TypeError, ValueError: see `CLIP.prepare`.
        """
        pixels = jnp.asarray(self.processor.image(image))
        if text is None:
            return {"image": pixels, "text": _generate(self, pixels)}
        return {"image": pixels, "text": self._token_ids(text)}

    def pairs(self, inputs: Inputs, target: Any = None) -> dict[str, Array]:
        """Bring inputs to one row per word: its image, its caption and its position.

        Args:
          inputs: images and captions, one caption per image.
          target: the positions of the words to explain, from 1, or one; by default all words
            but those that the tokenizer does not know, such as a word tokenizer's commas.
            "caption" explains each caption as a whole, in one row: the mean of its words' logits.

        Raises:
          ValueError: the numbers do not fit, or a caption has no word there.
        """
        images, captions = len(inputs["image"]), len(inputs["text"])
        if images != captions:
            raise ValueError(f"{images} images and {captions} captions: give one caption per image")
        words = np.asarray(self.content(inputs)["text"]).sum(-1)
        shown = self.tokens(inputs)
        if isinstance(target, str) and target == "caption":
            word_rows(shown, words)  # says which caption has no words
            whole = jnp.asarray([[bool(token) for token in row] for row in shown])
            kept = {name: jnp.asarray(value) for name, value in inputs.items()}
            return kept | {"words": whole, "example": jnp.arange(captions)}
        example, position = map(jnp.asarray, word_rows(shown, words, target))
        by_row = {name: jnp.asarray(value)[example] for name, value in inputs.items()}
        return by_row | {"position": position, "example": example}

    def describe(self, inputs: Inputs) -> list[str]:
        """Return each row's word, after the words before it; or its whole caption."""
        rows = self.tokens(inputs)
        if "words" in inputs:
            return [" ".join(filter(None, row)) for row in rows]
        return describe_words(rows, inputs["position"])

    def target_tokens(self, inputs: Inputs) -> dict[str, Array]:
        """Return the token that each word is predicted from: the one before it.

        Of whole captions the weights of all that a word is predicted from, [batch, tokens].
        """
        if "words" in inputs:
            before = jnp.roll(jnp.asarray(inputs["words"]), -1, axis=1).astype(jnp.float32)
            return {"text": before / before.sum(-1, keepdims=True)}
        return {"text": jnp.asarray(inputs["position"]) - 1}

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return where the tokens are that stand for something: patches, and words before."""
        content = super().content(inputs)
        if "position" in inputs:
            before = jnp.arange(content["text"].shape[1]) < inputs["position"][:, None]
            content["text"] &= before
        return content


_KINDS: dict[str, type[CLIPMapper]] = {"vqa": CLIPMapperVQA, "caption": CLIPMapperCaption}


@jax.jit
def _predict(model: CLIPMapperVQA, inputs: Any) -> Array:
    return model.predict(inputs)


@jax.jit
def _generate(model: CLIPMapperCaption, image: Array) -> Array:
    return model.generate(image)


def _parameters(model: CLIPMapper) -> list[tuple[Any, nnx.Variable]]:
    return list(nnx.to_flat_state(nnx.state(model, nnx.Param)))
