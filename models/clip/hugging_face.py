"""The weights of a Hugging Face CLIPModel: where they are, and for another image size."""

import numpy as np
from jaxtyping import Float

from jaxrel.models.checkpoint import Parameter


def _tower_parameters(ours: str, theirs: str) -> list[Parameter]:
    layer = f"{theirs}.encoder.layers.{{layer}}"
    block = (ours, "transformer", "blocks")
    linears = {
        ("attention", "query"): "self_attn.q_proj",
        ("attention", "key"): "self_attn.k_proj",
        ("attention", "value"): "self_attn.v_proj",
        ("attention", "out"): "self_attn.out_proj",
        ("expand",): "mlp.fc1",
        ("contract",): "mlp.fc2",
    }
    norms = {("norm1",): "layer_norm1", ("norm2",): "layer_norm2"}
    return [
        *(_kernel((*block, *path), f"{layer}.{name}") for path, name in linears.items()),
        *(_bias((*block, *path), f"{layer}.{name}") for path, name in (linears | norms).items()),
        *(_scale((*block, *path), f"{layer}.{name}") for path, name in norms.items()),
    ]


def _kernel(path: tuple[str, ...], name: str) -> Parameter:
    return Parameter((*path, "kernel"), f"{name}.weight", axes=(1, 0))


def _bias(path: tuple[str, ...], name: str) -> Parameter:
    return Parameter((*path, "bias"), f"{name}.bias")


def _scale(path: tuple[str, ...], name: str) -> Parameter:
    return Parameter((*path, "scale"), f"{name}.weight")


def _norm(path: tuple[str, ...], name: str) -> list[Parameter]:
    return [_scale(path, name), _bias(path, name)]


# The tensor names of the Hugging Face CLIPModel ("pre_layrnorm" is spelled so there).
PARAMETERS = (
    Parameter(("logit_scale",), "logit_scale"),
    Parameter(("vision", "class_embedding"), "vision_model.embeddings.class_embedding"),
    Parameter(
        ("vision", "patch_embedding", "kernel"),
        "vision_model.embeddings.patch_embedding.weight",
        axes=(2, 3, 1, 0),
    ),
    Parameter(
        ("vision", "position_embedding"), "vision_model.embeddings.position_embedding.weight"
    ),
    *_norm(("vision", "pre_norm"), "vision_model.pre_layrnorm"),
    *_tower_parameters("vision", "vision_model"),
    *_norm(("vision", "post_norm"), "vision_model.post_layernorm"),
    _kernel(("vision", "projection"), "visual_projection"),
    Parameter(
        ("text", "token_embedding", "embedding"), "text_model.embeddings.token_embedding.weight"
    ),
    Parameter(("text", "position_embedding"), "text_model.embeddings.position_embedding.weight"),
    *_tower_parameters("text", "text_model"),
    *_norm(("text", "final_norm"), "text_model.final_layer_norm"),
    _kernel(("text", "projection"), "text_projection"),
)


def interpolate_positions(
    positions: Float[np.ndarray, "tokens width"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
) -> Float[np.ndarray, "new_tokens width"]:
    """Interpolate a position embedding to another grid of patches.

    Bicubic convolution with a = -0.75 (Keys 1981) at cell centres with the border repeated,
    as transformers' `interpolate_pos_encoding` does.

    Args:
      positions: embeddings of the class token and the patches, row by row.
      grid: (rows, columns) of the patches.
      new_grid: (rows, columns) wanted.
    """
    patches = positions[1:].reshape(*grid, -1)
    rows, columns = (_bicubic(old, new) for old, new in zip(grid, new_grid, strict=True))
    patches = np.einsum("ir,jc,rcw->ijw", rows, columns, patches)
    patches = patches.reshape(-1, positions.shape[-1]).astype(positions.dtype)
    return np.concatenate([positions[:1], patches])


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """The [new, old] matrix that interpolates a row of `old` cells to `new` cells."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-1, 3)
    d = np.abs(centre[:, None] - taps)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    matrix = np.zeros((new, old))
    cells = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new)[:, None], cells), np.where(d <= 1, near, far))
    return matrix
