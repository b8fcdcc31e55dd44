"""The weights of the reference implementation of Sun et al. 2022."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from jaxrel.models.captioner.config import CaptionerConfig
from jaxrel.models.checkpoint import Parameter, read_parameters

ENCODER_PREFIX = "img_encoder.encoder."

# Linear maps of x and of h that are one map of [x; h] here: the sum of two maps and biases.
_MERGED = {
    name: tuple(f"{name}.{part}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    for name in ("AdaLSTM.lstm_cell", "LanguageLSTM")
} | {
    "AdaLSTM.gate": tuple(
        f"AdaLSTM.{gate}.{part}" for part in ("weight", "bias") for gate in ("x_gate", "h_gate")
    )
}

_REFERENCE_NAMES = {
    "aoa": {
        "cell.lstm.gates": "LanguageLSTM",
        "cell.query": "decoder_multihead_attention.q_proj",
        "cell.key": "decoder_k_proj",
        "cell.value": "decoder_v_proj",
        "cell.gate": "decoder_aoa_linear_gate",
        "cell.out": "decoder_aoa_linear",
    },
    "adaptive": {
        "cell.image": "global_img_feature_proj",
        "cell.lstm.lstm.gates": "AdaLSTM.lstm_cell",
        "cell.lstm.gate": "AdaLSTM.gate",
        "cell.attention.image": "AdaAttention.W_v_proj",
        "cell.attention.sentinel": "AdaAttention.W_s_proj",
        "cell.attention.hidden": "AdaAttention.W_g_proj",
        "cell.attention.score": "AdaAttention.w_h",
    },
}
_REFERENCE_NAMES["gridtd"] = _REFERENCE_NAMES["adaptive"] | {"cell.language.gates": "LanguageLSTM"}
_WITHOUT_BIAS = ("AdaAttention.W_g_proj", "AdaAttention.w_h")


def reference_order(vocab_size: int) -> Int[np.ndarray, " tokens"]:
    """Return, for each id of `word_tokenizer`, the reference implementation's id of that token.

    There the ids are 0 `<pad>`, the words, `<unk>`, `<start>`, `<end>`. The order's `argsort`
    leads from its ids to those here.
    """
    return np.r_[0, np.arange(vocab_size - 3, vocab_size), np.arange(1, vocab_size - 3)]


def read_reference(
    config: CaptionerConfig,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
) -> dict[tuple[str, ...], np.ndarray]:
    """Return the parameters of a captioner, without its encoder's, by path.

    Args:
      config: the sizes; see `Captioner.from_reference`.
      tensors: tensors by the names of the PyTorch state dict; those of the encoder are ignored.
      shapes: shapes of the parameters that are wanted, by path.

    Raises:
      ValueError: see `Captioner.from_reference`.
    """
    if config.kind != "aoa" and config.attention != "as coded":
        raise ValueError(
            "the reference implementation trains with attention='as coded', and the config "
            f"has {config.attention!r}: its weights do not fit that form"
        )
    inside = {name: x for name, x in tensors.items() if not name.startswith("img_encoder.")}
    return read_parameters(_merged(inside), _table(config), shapes)


def _table(config: CaptionerConfig) -> list[Parameter]:
    names = {"project": "img_projector", "head": "fc"} | _REFERENCE_NAMES[config.kind]
    table = [Parameter(("embedding", "embedding"), "embedding.weight")]
    for ours, theirs in names.items():
        path = tuple(ours.split("."))
        table.append(Parameter((*path, "kernel"), f"{theirs}.weight", (1, 0)))
        if theirs not in _WITHOUT_BIAS:
            table.append(Parameter((*path, "bias"), f"{theirs}.bias"))
    return table


def _merged(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with the maps that are one here merged, and with the vocabulary in our order."""
    tensors = dict(tensors)
    for name, parts in _MERGED.items():
        if all(part in tensors for part in parts):
            of_x, of_h, *biases = (np.asarray(tensors.pop(part)) for part in parts)
            if len(of_x) != len(of_h):
                raise ValueError(
                    f"the tensors {parts[0]} and {parts[1]} have {len(of_x)} and {len(of_h)} rows, "
                    "and make one map: they are of different models"
                )
            tensors[f"{name}.weight"] = np.concatenate([of_x, of_h], axis=1)
            tensors[f"{name}.bias"] = biases[0] + biases[1]
    projector = "img_projector.weight"
    if projector in tensors and tensors[projector].ndim == 4:  # a 1 x 1 convolution
        tensors[projector] = tensors[projector][:, :, 0, 0]
    for name in ("embedding.weight", "fc.weight", "fc.bias"):
        if name in tensors:
            tensors[name] = tensors[name][reference_order(len(tensors[name]))]
    return tensors
