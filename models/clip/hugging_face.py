"""Where the weights of a Hugging Face CLIPModel are."""

from jaxrel.models.checkpoint import Parameter
from jaxrel.models.tables import Path, convolution, kernel, layers, norm

_LINEARS: dict[Path, str] = {
    ("attention", "query"): "self_attn.q_proj",
    ("attention", "key"): "self_attn.k_proj",
    ("attention", "value"): "self_attn.v_proj",
    ("attention", "out"): "self_attn.out_proj",
    ("expand",): "mlp.fc1",
    ("contract",): "mlp.fc2",
}
_NORMS: dict[Path, str] = {("norm1",): "layer_norm1", ("norm2",): "layer_norm2"}


def tower_parameters(ours: str, theirs: str) -> list[Parameter]:
    """The layers of a tower, `ours`, in a file that calls it `theirs`; SigLIP's are alike."""
    prefix = f"{theirs}.encoder.layers.{{layer}}."
    return layers((ours, "transformer", "blocks"), _LINEARS, _NORMS, prefix)


# The tensor names of the Hugging Face CLIPModel ("pre_layrnorm" is spelled so there).
PARAMETERS = (
    Parameter(("logit_scale",), "logit_scale"),
    Parameter(("vision", "class_embedding"), "vision_model.embeddings.class_embedding"),
    convolution(("vision", "patch_embedding"), "vision_model.embeddings.patch_embedding"),
    Parameter(
        ("vision", "position_embedding"), "vision_model.embeddings.position_embedding.weight"
    ),
    *norm(("vision", "pre_norm"), "vision_model.pre_layrnorm"),
    *tower_parameters("vision", "vision_model"),
    *norm(("vision", "post_norm"), "vision_model.post_layernorm"),
    kernel(("vision", "projection"), "visual_projection"),
    Parameter(
        ("text", "token_embedding", "embedding"), "text_model.embeddings.token_embedding.weight"
    ),
    Parameter(("text", "position_embedding"), "text_model.embeddings.position_embedding.weight"),
    *tower_parameters("text", "text_model"),
    *norm(("text", "final_norm"), "text_model.final_layer_norm"),
    kernel(("text", "projection"), "text_projection"),
)
