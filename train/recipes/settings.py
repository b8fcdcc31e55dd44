"""The settings of the recipes: one dataclass per experiment, every field a command-line option."""

import dataclasses
import math
from typing import Any, ClassVar


def _setting(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


def changed_flags(default: Any, settings: dict[str, Any]) -> str:
    """The command-line options that turn the default settings into these."""
    usual = dataclasses.asdict(default)
    changed = {name: value for name, value in settings.items() if value != usual.get(name)}
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())


@dataclasses.dataclass(frozen=True)
class ClipShapes:
    """Settings of the recipe `clip-shapes`; `jaxrel train clip-shapes --help` lists them.

    Raises:
      ValueError: a setting is out of range.
    """

    seed: int = _setting(0, "of the parameters and of the order of examples")
    data_seed: int = _setting(0, "of the Shapes data set")
    scenes: int = _setting(60_000, "training scenes, drawn once and kept in memory")
    steps: int = _setting(3_000, "of the optimiser")
    batch: int = _setting(128, "images per step, each with one caption")
    learning_rate: float = _setting(1e-3, "the highest; it falls to 0 as a cosine")
    warmup: int = _setting(200, "steps until the highest learning rate")
    weight_decay: float = _setting(0.1, "of AdamW")
    full: float = _setting(0.6, "share of captions that name every object")
    width: int = _setting(128, "features per token, in both towers")
    vision_layers: int = _setting(4, "layers of the image tower")
    text_layers: int = _setting(2, "layers of the text tower")
    heads: int = _setting(4, "attention heads")
    patch_size: int = _setting(8, "pixels of a side of a patch")
    context: int = _setting(34, "tokens of the longest text")
    projection: int = _setting(128, "features of the common space")
    log_every: int = _setting(50, "steps between two lines of the log")

    def __post_init__(self):
        for name in ("scenes", "steps", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"clip-shapes: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.batch > self.scenes:
            raise ValueError(
                f"clip-shapes: batch {self.batch} is more than the {self.scenes} scenes"
            )
        if self.context < 32:
            raise ValueError(
                f"clip-shapes: context must be at least 32, for captions of 29 words and their "
                f"ends, got {self.context}"
            )
        if not 0 <= self.full <= 1:
            raise ValueError(f"clip-shapes: full must be from 0 to 1, got {self.full}")


def _check_training(
    recipe: Any, counts: tuple[str, ...] = (), numbers: tuple[str, ...] = ()
) -> None:
    """Raise ValueError for numbers with which no training can begin.

    Args:
      recipe: the settings.
      counts: further settings that must be at least 1.
      numbers: further settings that must be 0 or more.
    """
    for name in ("steps", "batch", "accumulate", "log_every", "checkpoint_every", *counts):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(recipe, name)}")
    for name in ("warmup", *numbers):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {getattr(recipe, name)}")
    if not 0 < recipe.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive, got {recipe.learning_rate}")
    if recipe.checkpoint_every % recipe.log_every:
        raise ValueError(
            f"checkpoint_every must be a multiple of log_every {recipe.log_every}, got "
            f"{recipe.checkpoint_every}"
        )
    if recipe.batch % recipe.accumulate:
        raise ValueError(
            f"batch must be a multiple of accumulate {recipe.accumulate}, got {recipe.batch}"
        )


def _check_clamp(clamp: float) -> None:
    if not 0 < clamp <= math.inf:
        raise ValueError(f"clamp must be positive (inf: no bound), got {clamp}")


def _check_real(recipe: Any) -> None:
    """Raise ValueError if no data are named, or what to do with bad images is unclear."""
    if not recipe.data:
        raise ValueError("data is empty; name the folder of the data set with --data")
    for name in ("missing", "corrupt"):
        if getattr(recipe, name) not in ("error", "skip"):
            raise ValueError(f"{name} must be error or skip, got {getattr(recipe, name)!r}")


def _check_context(context: int, least: int, what: str) -> None:
    if context < least:
        raise ValueError(
            f"context must be at least {least} for the longest {what} of Shapes, got {context}"
        )


@dataclasses.dataclass(frozen=True)
class MapperShapes:
    """What the recipes `vqa-shapes` and `caption-shapes` have in common.

    Raises:
      ValueError: a setting is out of range.
    """

    seed: int = _setting(0, "of the parameters and of the order of examples")
    data_seed: int = _setting(0, "of the Shapes data set")
    stage1: str = _setting("clip-shapes", "what the model begins as: a CLIP or a CLIPmapper")
    scenes: int = _setting(50_000, "training scenes, drawn once and kept in memory")
    steps: int = _setting(3_000, "of the optimiser")
    batch: int = _setting(36, "images per step")
    accumulate: int = _setting(1, "parts of the batch, one after the other, to save memory")
    learning_rate: float = _setting(1e-3, "the highest; it falls to 0 as a cosine")
    stage1_rate: float = _setting(1.0, "factor on the learning rate in stage 1; 0 freezes it")
    warmup: int = _setting(100, "steps until the highest learning rate")
    weight_decay: float = _setting(0.05, "of AdamW")
    patch_loss: float = _setting(0.5, "weight of naming the object that each patch shows")
    width: int = _setting(128, "features per token in the mapper")
    layers: int = _setting(2, "layers of the mapper")
    heads: int = _setting(4, "attention heads of the mapper")
    mlp_width: int = _setting(256, "hidden features of the mapper's MLPs")
    context: int = _setting(20, "tokens of the longest text")
    dtype: str = _setting("float32", "of the computation: float32 or bfloat16")
    log_every: int = _setting(50, "steps between two lines of the log")
    checkpoint_every: int = _setting(250, "steps between two checkpoints")

    def __post_init__(self):
        _check_training(self, ("layers",), ("stage1_rate", "weight_decay"))
        if self.scenes < 1 or not 0 <= self.patch_loss < math.inf:
            raise ValueError(
                f"scenes must be at least 1 and patch_loss 0 or more, got {self.scenes} and "
                f"{self.patch_loss}"
            )
        if self.batch > self.scenes:
            raise ValueError(f"batch {self.batch} is more than the {self.scenes} scenes")


@dataclasses.dataclass(frozen=True)
class VqaShapes(MapperShapes):
    """Settings of the recipe `vqa-shapes`: each image of a batch with all its questions."""

    stage1: str = _setting("caption-shapes", "what the model begins as: a CLIP or a CLIPmapper")
    steps: int = _setting(3_500, "of the optimiser")
    batch: int = _setting(16, "images per step")
    asked_loss: float = _setting(0.5, "weight of finding what each question is about")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.asked_loss < math.inf:
            raise ValueError(f"asked_loss must be 0 or more, got {self.asked_loss}")
        _check_context(self.context, 18, "questions")


@dataclasses.dataclass(frozen=True)
class CaptionShapes(MapperShapes):
    """Settings of the recipe `caption-shapes`: each image of a batch with one caption."""

    steps: int = _setting(3_000, "of the optimiser")
    batch: int = _setting(64, "images per step")
    context: int = _setting(34, "tokens of the longest text")
    full: float = _setting(1.0, "share of captions that name every object")

    def __post_init__(self):
        super().__post_init__()
        _check_context(self.context, 32, "captions")
        if not 0 <= self.full <= 1:
            raise ValueError(f"full must be from 0 to 1, got {self.full}")


@dataclasses.dataclass(frozen=True)
class MapperReal:
    """What the recipes on real data have in common: CLIPmapper over a CLIP of the hub.

    Raises:
      ValueError: a setting is out of range.
    """

    data: str = _setting("", "folder of the data set, as downloaded and unpacked")
    split: str = _setting("train", "split to train on")
    missing: str = _setting("error", "what to do with missing images: error or skip")
    corrupt: str = _setting("error", "what to do with damaged images: error or skip")
    stage1: str = _setting("openai/clip-vit-base-patch32", "the CLIP that stage 1 begins as")
    seed: int = _setting(0, "of the parameters and of the order of examples")
    steps: int = _setting(40_000, "of the optimiser")
    batch: int = _setting(256, "examples per step")
    accumulate: int = _setting(1, "parts of the batch, one after the other, to save memory")
    learning_rate: float = _setting(1e-4, "the highest; it falls to 0 as a cosine")
    stage1_rate: float = _setting(0.1, "factor on the learning rate in stage 1; 0 freezes it")
    warmup: int = _setting(1_000, "steps until the highest learning rate")
    weight_decay: float = _setting(0.05, "of AdamW")
    width: int = _setting(768, "features per token in the mapper")
    layers: int = _setting(6, "layers of the mapper")
    heads: int = _setting(12, "attention heads of the mapper")
    mlp_width: int = _setting(3072, "hidden features of the mapper's MLPs")
    context: int = _setting(32, "tokens of the longest text")
    dtype: str = _setting("bfloat16", "of the computation: float32 or bfloat16")
    workers: int = _setting(8, "processes that read images; 0 reads in threads")
    log_every: int = _setting(50, "steps between two lines of the log")
    checkpoint_every: int = _setting(1_000, "steps between two checkpoints")

    def __post_init__(self):
        _check_training(self, ("layers",), ("stage1_rate", "weight_decay"))
        _check_real(self)


@dataclasses.dataclass(frozen=True)
class VqaV2(MapperReal):
    """Settings of the recipe `vqa-v2`."""

    at_least: int = _setting(9, "how often an answer must occur to be one of the model's")
    counted: str = _setting("train,val", "the splits in which answers are counted")


@dataclasses.dataclass(frozen=True)
class CaptionCoco(MapperReal):
    """Settings of the recipe `caption-coco`: COCO in Karpathy's splits."""

    split: str = _setting("train+restval", "split to train on")
    context: int = _setting(40, "tokens of the longest text")


@dataclasses.dataclass(frozen=True)
class _Captioner:
    """What all recipes of captioners have in common.

    "The paper" in the help is Sun et al. 2022.
    """

    kind: ClassVar[str]

    seed: int = _setting(0, "of the parameters, the dropout and the order of examples")
    steps: int = _setting(3_000, "of the optimiser")
    batch: int = _setting(32, "captions per step, each with its image (the paper's: 32)")
    accumulate: int = _setting(1, "parts of the batch, one after the other, to save memory")
    learning_rate: float = _setting(
        5e-4, "the highest; it falls to 0 as a cosine (the paper's: 5e-4, less on a plateau)"
    )
    warmup: int = _setting(100, "steps until the highest learning rate (the paper's: 0)")
    b1: float = _setting(0.8, "of Adam (the paper's: 0.8)")
    b2: float = _setting(0.999, "of Adam (the paper's: 0.999)")
    clamp: float = _setting(0.1, "bound of each gradient's size (the paper's: 0.1)")
    embed: int = _setting(512, "features of a word (the paper's: 512)")
    hidden: int = _setting(512, "features of states and attended values (the paper's: 512)")
    context: int = _setting(32, "tokens of the longest caption, with start and end")
    dtype: str = _setting("float32", "of the computation: float32 or bfloat16")
    log_every: int = _setting(50, "steps between two lines of the log")
    checkpoint_every: int = _setting(250, "steps between two checkpoints")

    def __post_init__(self):
        _check_training(self)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        _check_clamp(self.clamp)


@dataclasses.dataclass(frozen=True)
class _GridTD:
    """What captioners with adaptive attention and two LSTMs have of their own."""

    kind: ClassVar[str] = "gridtd"

    dropout: float = _setting(0.5, "before the prediction of the word (the paper's: 0.5)")
    attention: str = _setting(
        "paper", "form of the attention's scores: paper, or 'as coded' by its authors"
    )


@dataclasses.dataclass(frozen=True)
class _AoA:
    """What captioners with multi-head attention behind a gate have of their own."""

    kind: ClassVar[str] = "aoa"

    dropout: float = _setting(0.3, "before the prediction of the word (the paper's: 0.3)")
    heads: int = _setting(8, "of the attention (the paper's: 8)")
    attention_dropout: float = _setting(0.1, "of the attention maps (the paper's: 0.1)")


@dataclasses.dataclass(frozen=True)
class CaptionerShapes(_Captioner):
    """What the recipes `gridtd-shapes` and `aoa-shapes` have in common.

    Raises:
      ValueError: a setting is out of range.
    """

    data_seed: int = _setting(0, "of the Shapes data set")
    split: str = _setting("biased_train", "split to train on; biased_train teaches to hallucinate")
    scenes: int = _setting(40_000, "training scenes, drawn once and kept in memory")
    full: float = _setting(1.0, "share of captions that name every object")
    steps: int = _setting(2_000, "of the optimiser")
    batch: int = _setting(64, "images per step, each with one caption (the paper's: 32)")
    learning_rate: float = _setting(
        1e-3, "the highest; it falls to 0 as a cosine (the paper's: 5e-4, less on a plateau)"
    )
    encoder: str = _setting(
        "16,32-32,64-64,128-128", "channels of the VGG's convolutions; a pooling is at each comma"
    )
    embed: int = _setting(128, "features of a word (the paper's: 512)")
    hidden: int = _setting(256, "features of states and attended values (the paper's: 512)")
    patch_loss: float = _setting(0.5, "weight of naming the object that each position shows")

    def __post_init__(self):
        super().__post_init__()
        _check_context(self.context, 31, "captions")
        if self.scenes < 1 or not 0 <= self.patch_loss < math.inf:
            raise ValueError(
                f"scenes must be at least 1 and patch_loss 0 or more, got {self.scenes} and "
                f"{self.patch_loss}"
            )
        if self.batch > self.scenes:
            raise ValueError(f"batch {self.batch} is more than the {self.scenes} scenes")
        if not 0 <= self.full <= 1:
            raise ValueError(f"full must be from 0 to 1, got {self.full}")


@dataclasses.dataclass(frozen=True)
class GridTDShapes(_GridTD, CaptionerShapes):
    """Settings of the recipe `gridtd-shapes`."""


@dataclasses.dataclass(frozen=True)
class AoAShapes(_AoA, CaptionerShapes):
    """Settings of the recipe `aoa-shapes`."""


@dataclasses.dataclass(frozen=True)
class CaptionerReal(_Captioner):
    """What the recipes of captioners on COCO and on Flickr30k have in common.

    Raises:
      ValueError: a setting is out of range.
    """

    dataset: ClassVar[str]

    data: str = _setting("", "folder of the data set, as downloaded and unpacked")
    split: str = _setting("train", "split to train on, in which words are counted too")
    missing: str = _setting("error", "what to do with missing images: error or skip")
    corrupt: str = _setting("error", "what to do with damaged images: error or skip")
    at_least: int = _setting(3, "how often a word must occur to be one of the model's")
    encoder: str = _setting(
        "vgg16", "vgg16, resnet50 or another preset, or a VGG's channels, such as 32-32,64-64"
    )
    encoder_weights: str = _setting(
        "timm/vgg16.tv_in1k",
        "file, folder or hub name of the encoder's weights; empty: from nothing",
    )
    encoder_rate: float = _setting(
        0.0, "factor on the learning rate in the encoder; 0 freezes it (to fine-tune, paper: 0.2)"
    )
    image_size: int = _setting(224, "pixels of a side of the images (the paper's: 224)")
    steps: int = _setting(45_000, "of the optimiser; about ten epochs")
    warmup: int = _setting(1_000, "steps until the highest learning rate (the paper's: 0)")
    dtype: str = _setting("bfloat16", "of the computation: float32 or bfloat16")
    workers: int = _setting(8, "processes that read images; 0 reads in threads")
    checkpoint_every: int = _setting(1_000, "steps between two checkpoints")

    def __post_init__(self):
        super().__post_init__()
        _check_real(self)
        if self.at_least < 1 or not 0 <= self.encoder_rate < math.inf:
            raise ValueError(
                f"at_least must be at least 1 and encoder_rate 0 or more, got {self.at_least} and "
                f"{self.encoder_rate}"
            )
        if not self.encoder_weights and not self.encoder_rate:
            raise ValueError(
                "encoder_weights is empty and encoder_rate 0: an encoder would be frozen that "
                "has learnt nothing. Name its weights with --encoder-weights, or train it with "
                "--encoder-rate 1"
            )


@dataclasses.dataclass(frozen=True)
class _Coco(CaptionerReal):
    """COCO in Karpathy's splits."""

    dataset: ClassVar[str] = "coco"

    split: str = _setting("train+restval", "split to train on, in which words are counted too")
    at_least: int = _setting(4, "how often a word must occur to be one of the model's")
    steps: int = _setting(175_000, "of the optimiser; about ten epochs")


@dataclasses.dataclass(frozen=True)
class _Flickr30k(CaptionerReal):
    """Flickr30k in Karpathy's splits."""

    dataset: ClassVar[str] = "flickr30k"


@dataclasses.dataclass(frozen=True)
class GridTDCoco(_GridTD, _Coco):
    """Settings of the recipe `gridtd-coco`."""


@dataclasses.dataclass(frozen=True)
class AoACoco(_AoA, _Coco):
    """Settings of the recipe `aoa-coco`."""


@dataclasses.dataclass(frozen=True)
class GridTDFlickr30k(_GridTD, _Flickr30k):
    """Settings of the recipe `gridtd-flickr30k`."""


@dataclasses.dataclass(frozen=True)
class AoAFlickr30k(_AoA, _Flickr30k):
    """Settings of the recipe `aoa-flickr30k`."""


@dataclasses.dataclass(frozen=True)
class _Finetune:
    """What all recipes that go on with a captioner have in common.

    "The paper" in the help is Sun et al. 2022.
    """

    # Of Adam, as in the paper.
    b1: ClassVar[float] = 0.8
    b2: ClassVar[float] = 0.999

    model: str = _setting("", "the captioner to begin as: a bundled model, a folder or a hub name")
    mode: str = _setting(
        "lrp",
        "plain: as in training; lrp: LRP-inference; scst: CIDEr-D of sampled captions as reward; "
        "lrp-scst: the same with captions from re-weighted predictions",
    )
    mixing: float = _setting(
        0.5, "mode lrp: weight of the plain prediction's loss; the rest is the re-weighted one's"
    )
    temperature: float = _setting(1.0, "modes lrp: t in the weights t R / max|R| + max(t, 1)")
    weighed: str = _setting(
        "both", "modes lrp: which values are weighed: both, attended or hidden (the paper's: both)"
    )
    stop_words: str = _setting(
        "", "modes lrp: words, with commas, that are not re-weighted; empty: English function words"
    )
    idf: str = _setting("corpus", "modes scst: where words are weighed, corpus or batch")
    ends: str = _setting(
        "both", "modes scst: who has the end as a word in the reward: both, references or neither"
    )
    dropout: int = _setting(
        1, "modes plain and lrp: 1 drops values as in training, 0 does not (scst never does)"
    )
    seed: int = _setting(0, "of the dropout, the samples and the order of examples")
    steps: int = _setting(600, "of the optimiser")
    batch: int = _setting(32, "captions per step, each with its image (the paper's: 32)")
    accumulate: int = _setting(1, "parts of the batch, one after the other, to save memory")
    learning_rate: float = _setting(
        5e-4, "the highest; it falls to 0 as a cosine (the paper's: 5e-4, 1e-5 or 5e-5, constant)"
    )
    encoder_rate: float = _setting(
        0.2, "factor on the learning rate in the encoder; 0 freezes it (the paper's: 0.2 or 0)"
    )
    warmup: int = _setting(20, "steps until the highest learning rate (the paper's: 0)")
    clamp: float = _setting(0.1, "bound of each gradient's size (the paper's: 0.1)")
    dtype: str = _setting("float32", "of the computation: float32 or bfloat16")
    log_every: int = _setting(20, "steps between two lines of the log")
    checkpoint_every: int = _setting(100, "steps between two checkpoints")

    def __post_init__(self):
        _check_training(self, numbers=("encoder_rate",))
        if not self.model:
            raise ValueError("model is empty; name the captioner to begin as with --model")
        for name, known in (
            ("mode", ("plain", "lrp", "scst", "lrp-scst")),
            ("weighed", ("both", "attended", "hidden")),
            ("idf", ("corpus", "batch")),
            ("ends", ("both", "references", "neither")),
            ("dropout", (0, 1)),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, known))}, got "
                    f"{getattr(self, name)!r}"
                )
        if not 0 <= self.mixing <= 1 or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"mixing must be from 0 to 1 and temperature positive, got {self.mixing} and "
                f"{self.temperature}"
            )
        _check_clamp(self.clamp)


@dataclasses.dataclass(frozen=True)
class FinetuneShapes(_Finetune):
    """Settings of the recipe `finetune-shapes`.

    Raises:
      ValueError: a setting is out of range.
    """

    model: str = _setting(
        "gridtd-shapes", "the captioner to begin as: a bundled model, a folder or a hub name"
    )
    data_seed: int = _setting(0, "of the Shapes data set")
    split: str = _setting("biased_train", "split to train on")
    scenes: int = _setting(40_000, "training scenes, drawn once and kept in memory")
    full: float = _setting(1.0, "modes plain and lrp: share of captions that name every object")
    batch: int = _setting(64, "images per step, each with one caption (the paper's: 32)")

    def __post_init__(self):
        super().__post_init__()
        self.training()

    def training(self, **changes: Any) -> CaptionerShapes:
        """The settings of a training that has the same examples."""
        same = ("seed", "data_seed", "split", "scenes", "full", "batch")
        return CaptionerShapes(**{name: getattr(self, name) for name in same}, **changes)


@dataclasses.dataclass(frozen=True)
class FinetuneReal(_Finetune):
    """What the recipes `finetune-coco` and `finetune-flickr30k` have in common.

    Raises:
      ValueError: a setting is out of range.
    """

    dataset: ClassVar[str]

    data: str = _setting("", "folder of the data set, as downloaded and unpacked")
    split: str = _setting("train", "split to train on, in which the reward weighs words too")
    missing: str = _setting("error", "what to do with missing images: error or skip")
    corrupt: str = _setting("error", "what to do with damaged images: error or skip")
    steps: int = _setting(4_500, "of the optimiser; about one epoch (the paper's: one)")
    encoder_rate: float = _setting(
        0.0, "factor on the learning rate in the encoder; 0 freezes it (the paper's: 0.2 or 0)"
    )
    warmup: int = _setting(100, "steps until the highest learning rate (the paper's: 0)")
    dtype: str = _setting("bfloat16", "of the computation: float32 or bfloat16")
    workers: int = _setting(8, "processes that read images; 0 reads in threads")
    checkpoint_every: int = _setting(500, "steps between two checkpoints")

    def __post_init__(self):
        super().__post_init__()
        _check_real(self)


@dataclasses.dataclass(frozen=True)
class FinetuneCoco(FinetuneReal):
    """Settings of the recipe `finetune-coco`."""

    dataset: ClassVar[str] = "coco"

    split: str = _setting("train+restval", "split to train on, in which the reward weighs words")
    steps: int = _setting(17_500, "of the optimiser; about one epoch (the paper's: one)")


@dataclasses.dataclass(frozen=True)
class FinetuneFlickr30k(FinetuneReal):
    """Settings of the recipe `finetune-flickr30k`."""

    dataset: ClassVar[str] = "flickr30k"


SETTINGS: dict[str, type] = {
    "clip-shapes": ClipShapes,
    "vqa-shapes": VqaShapes,
    "caption-shapes": CaptionShapes,
    "vqa-v2": VqaV2,
    "caption-coco": CaptionCoco,
    "gridtd-shapes": GridTDShapes,
    "aoa-shapes": AoAShapes,
    "gridtd-coco": GridTDCoco,
    "aoa-coco": AoACoco,
    "gridtd-flickr30k": GridTDFlickr30k,
    "aoa-flickr30k": AoAFlickr30k,
    "finetune-shapes": FinetuneShapes,
    "finetune-coco": FinetuneCoco,
    "finetune-flickr30k": FinetuneFlickr30k,
}
