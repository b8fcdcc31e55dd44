"""Sizes of CLIPmapper, and its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrel.models.checkpoint import CONFIG
from jaxrel.models.clip.config import CLIPConfig
from jaxrel.models.sizes import (
    check_choice,
    check_keys,
    check_types,
    field_names,
    from_json,
    to_json,
)
from jaxrel.models.transformer import check_transformer

MODEL_TYPE = "clipmapper"
TASKS = ("vqa", "caption")


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
      layers: number of layers of the mapper.
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
        check_choice("mapper", "task", self.task, TASKS)
        check_transformer(self, "mapper")
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
        check_keys("mapper_config", mapper, field_names(cls, without=("clip",)))
        check_types("mapper_config", cls, mapper)
        answers = mapper["answers"]
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise ValueError(
                f"{CONFIG}: mapper_config.answers must be a list of strings, got {answers!r:.80}"
            )
        return cls(**from_json(mapper), clip=CLIPConfig.from_dict(stage1))

    def to_dict(self) -> dict[str, Any]:
        """Write the content of a config.json (without `remat` and `dtype`)."""
        return {
            "model_type": MODEL_TYPE,
            "clip_config": self.clip.to_dict(),
            "mapper_config": to_json(self, without=("clip",)),
        }
