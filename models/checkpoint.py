"""Model folders in the Hugging Face layout: how they are found, read, checked and written."""

import json
import os
import shlex
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax import numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrel.files import check_writable

PRETRAINED = Path(__file__).parent / "pretrained"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OPEN_CLIP, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
# Weights under another name, of other libraries, or links whose files are not there.
_OTHERS = ("*.safetensors", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.ckpt")
# Dtypes of safetensors that NumPy has, with `ml_dtypes`; the others have 8 bits or fewer.
_READABLE = (
    "F64",
    "F32",
    "F16",
    "BF16",
    *(f"{s}{n}" for s in "IU" for n in (8, 16, 32, 64)),
    "BOOL",
)
DOWNLOADS = ["*.json", "*.txt", "*.safetensors"]


@dataclass(frozen=True)
class Parameter:
    """Where one parameter of a model is in a file of weights.

    Args:
      path: path of the parameter in the model.
      name: name of the tensor in the file; "{layer}" stands for the layer's number, and then
        the model's parameter has a leading layer axis.
      axes: axis i of the model's parameter (of one layer) is axis `axes[i]` of the tensor;
        None: the axes are the same.
    """

    path: tuple[str, ...]
    name: str
    axes: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        """Whether the model's parameter has a leading layer axis."""
        return "{layer}" in self.name

    def names(self, shape: Sequence[int]) -> list[str]:
        """Return the names of the tensors that make up the parameter of this shape."""
        layers = shape[0] if self.stacked else 1
        return [self.name.format(layer=layer) for layer in range(layers)]

    def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in the file of (one layer of) the parameter of this shape."""
        shape = tuple(shape[1:] if self.stacked else shape)
        return shape if self.axes is None else tuple(shape[i] for i in np.argsort(self.axes))

    def from_tensors(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the model's parameter, float32."""
        layers = [np.asarray(tensor, np.float32) for tensor in tensors]
        if self.axes is not None:
            layers = [layer.transpose(self.axes) for layer in layers]
        return np.stack(layers) if self.stacked else layers[0]

    def to_tensors(self, value: np.ndarray) -> list[np.ndarray]:
        """Return the tensors of a file, float32."""
        value = np.asarray(value, np.float32)
        layers = list(value) if self.stacked else [value]
        if self.axes is not None:
            layers = [layer.transpose(np.argsort(self.axes)) for layer in layers]
        return [np.asarray(layer, order="C") for layer in layers]


def bundled() -> list[str]:
    """Return the names of the models that ship with the library."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG}"))


def find_folder(name_or_folder: str | os.PathLike) -> Path:
    """Find a model's folder.

    Args:
      name_or_folder: the name of a bundled model, a local folder, or "owner/name" on the
        Hugging Face hub, from where JSON, text and safetensors files are fetched.

    Returns:
      The folder.

    Raises:
      FileNotFoundError: there is no such folder or bundled model.
      NotADirectoryError: a file was given.
      OSError: the hub did not answer or has no such model.
    """
    name = os.fspath(name_or_folder)
    if name in bundled():
        return PRETRAINED / name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise NotADirectoryError(
            f"{folder} is a file; pass the folder that holds {CONFIG} and {WEIGHTS}"
            + (
                f". {_how_to_convert([folder], folder.parent / WEIGHTS)}"
                if any(map(folder.match, PICKLES))
                else ""
            )
        )
    known = f"bundled models: {', '.join(bundled()) or 'none'}"
    on_the_hub = len(folder.parts) == 2 and name[0] not in "./~\\" and "\\" not in name
    if not on_the_hub:
        raise FileNotFoundError(
            f"no model folder {name!r}; {known}. Otherwise pass an existing folder, or a hub name "
            "such as openai/clip-vit-base-patch32"
        )
    return _from_hub(name, known)


def _from_hub(name: str, known: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADS))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise OSError(
            f"{name!r} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the "
            f"name and the network; without a network, run `hf download {name} --local-dir FOLDER` "
            f"on a machine that has one and pass FOLDER; {known}"
        ) from error


def read_config(folder: Path, model_type: str) -> dict[str, Any]:
    """Read a model folder's config.json.

    Args:
      folder: the folder.
      model_type: the architecture that is wanted.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is not valid JSON, or describes another architecture.
    """
    config = read_any_config(folder)
    found = config.get("model_type")
    if found != model_type:
        raise ValueError(
            f"{folder / CONFIG} describes a model of type {found!r:.80}, and this class loads "
            f"{model_type!r}; pass a folder of that architecture"
        )
    return config


def read_any_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json, whatever the architecture; see `read_config`."""
    path = folder / CONFIG
    if not path.is_file():
        _refuse_open_clip(folder)
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; a model folder holds {CONFIG} and {WEIGHTS} as "
            "save_pretrained writes them"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
      ValueError: it holds something else, or no valid JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    """Read all tensors of a model folder.

    Args:
      folder: a folder with model.safetensors, or with shards and their index.
      allow_pickle: where there is only a pickled checkpoint, read it with PyTorch's
        `torch.load(weights_only=True)`. Needs torch.

    Returns:
      The tensors by name, in the file's dtype (bfloat16 as `ml_dtypes` knows it).

    Raises:
      FileNotFoundError: no weights, or a shard is missing.
      OSError: a file is truncated or no safetensors file.
      ValueError: pickled weights that were not allowed, or a wrong index.
      ImportError: pickled weights were allowed, and torch is not installed.
    """
    if (folder / WEIGHTS).is_file():
        return _read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    _refuse_open_clip(folder)
    pickles = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    # Beside the weights there may be the state of their training.
    pickles = [path for path in pickles if path.name.startswith("pytorch_model")] or pickles
    if not pickles:
        others = sorted(path.name for pattern in _OTHERS for path in folder.glob(pattern))
        raise FileNotFoundError(
            f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}"
            + (f" (what is there is neither: {some(others)})" if others else "")
            + "; fetch the file into the folder, or save the model again with save_pretrained"
        )
    if not allow_pickle:
        raise ValueError(
            f"{pickles[0]} is a pickled checkpoint, and unpickling can run any code. "
            f"{_how_to_convert(pickles, folder / WEIGHTS)}; or, from Python, if you trust it and "
            "torch is installed, pass allow_pickle=True"
        )
    return _read_pickle(pickles)


def read_file(path: Path, *, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    """Read all tensors of one file of weights.

    Args:
      path: a safetensors file, or a pickled checkpoint.
      allow_pickle: see `read_tensors`.

    Returns:
      The tensors by name.

    Raises:
      FileNotFoundError: there is no such file.
      OSError, ValueError, ImportError: see `read_tensors`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path of the weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if allow_pickle:
        return _read_pickle([path])
    raise ValueError(
        f"{path} is a pickled checkpoint, and unpickling can run any code. Convert it once where "
        f"torch is installed: safetensors.torch.save_file(torch.load({path.name!r}, "
        f"weights_only=True), '{path.stem}.safetensors'), and pass the new file; or, if you trust "
        "it and torch is installed, pass allow_pickle=True"
    )


def _how_to_convert(paths: Sequence[Path], target: Path) -> str:
    """A command that reads plain weights and nothing else."""
    # In double quotes, since the whole is in single ones.
    names = json.dumps([*map(str, paths)], ensure_ascii=False)
    code = (
        "import torch; from safetensors.torch import save_file; found = {}; "
        f'[found.update(torch.load(p, "cpu", weights_only=True)) for p in {names}]; '
        "save_file({n: t.clone() for n, t in found.items()}, "
        f"{json.dumps(str(target), ensure_ascii=False)})"
    )
    return (
        f"Convert it once where torch is installed: python -c {shlex.quote(code)} (or read it with "
        "transformers, and write it with save_pretrained)"
    )


def _refuse_open_clip(folder: Path) -> None:
    """Say of a folder in OpenCLIP's own layout that it is one, where its files are not read."""
    found = sorted(path.name for path in folder.glob("open_clip*"))
    if found:
        raise ValueError(
            f"{folder} is in the layout of OpenCLIP ({', '.join(found)}), which only "
            f"CLIP.from_pretrained reads, from {OPEN_CLIP} and {OPEN_CLIP_WEIGHTS}; it can save it "
            f"in the Hugging Face layout, with {CONFIG} and {WEIGHTS}"
        )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in _READABLE:
                    raise ValueError(_quantised(name, dtype))
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        if "unknown variant" in str(error):  # a dtype that is newer than the package
            raise ValueError(
                f"{path} has a dtype that the installed safetensors does not know ({error}); use "
                "a float32, float16 or bfloat16 checkpoint"
            ) from None
        raise OSError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file "
            f"({error}); fetch it again"
        ) from None


def _read_shards(folder: Path) -> dict[str, np.ndarray]:
    index = folder / INDEX
    where = read_json(index).get("weight_map")
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(f, str) for f in where.values())
    ):
        raise ValueError(f"{index} has no 'weight_map' from tensor names to files")
    files = sorted(set(where.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise ValueError(f"{index} names a file outside its folder: {outside[0]!r}")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of the {len(files)} shards that {INDEX} names: "
            f"{some(missing)}; fetch them into the folder"
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= _read_safetensors(folder / file)
    lost = sorted(set(where) - set(tensors))
    if lost:
        raise ValueError(
            f"{index} names tensors that its shards do not hold: {some(lost)}; index and shards "
            "are of different models or a download was interrupted, fetch them again"
        )
    return tensors


def _read_pickle(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading the pickled {paths[0]} needs torch, which is not installed: "
            f"pip install 'jaxrel[torch]', or avoid it. "
            f"{_how_to_convert(paths, paths[0].parent / WEIGHTS)}"
        ) from error
    tensors: dict[str, np.ndarray] = {}
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what the pickle makes it raise
            raise OSError(f"{path} cannot be read as plain weights ({error})") from error
        tensors |= {name: tensor.float().numpy() for name, tensor in state.items()}
    return tensors


def read_parameters(
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Parameter],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    *,
    wanted: str = "",
) -> dict[tuple[str, ...], np.ndarray]:
    """Turn the tensors of a file into a model's parameters; every check comes first.

    Args:
      tensors: tensors by name. Buffers of position numbers, as in old checkpoints, are ignored.
      table: where each parameter is.
      shapes: the shape of each of the model's parameters, by path.
      wanted: the model whose tensors they should be, for the messages; by default the one that
        config.json describes.

    Returns:
      float32 parameters by path.

    Raises:
      ValueError: a tensor is missing, unexpected, of a wrong shape, not of floats, or has a
        value that is not finite.
    """
    expected = {
        name: parameter.tensor_shape(shapes[parameter.path])
        for parameter in table
        for name in parameter.names(shapes[parameter.path])
    }
    says, advice = f"{CONFIG} says", f"check that {CONFIG} and the weights belong together"
    if wanted:
        says, advice = f"{wanted} has", "give the sizes of the model in the file"
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(n for n in set(tensors) - set(expected) if not n.endswith("position_ids"))
    if missing or unexpected:
        parts = [f"{len(missing)} tensors are missing: {some(missing)}"] if missing else []
        if unexpected:
            parts.append(f"{len(unexpected)} tensors are unexpected: {some(unexpected)}")
        raise ValueError(
            f"these weights are not those of {wanted or f'the model that {CONFIG} describes'}. "
            f"{'. '.join(parts)}. {advice[0].upper()}{advice[1:]}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"the tensor {name} has shape {list(tensors[name].shape)}, and {says} "
                f"{list(shape)}; {advice}"
            )
        _check_values(name, tensors[name])
    return {
        p.path: p.from_tensors([tensors[name] for name in p.names(shapes[p.path])]) for p in table
    }


def _check_values(name: str, tensor: np.ndarray) -> None:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(_quantised(name, tensor.dtype))
    bad = np.size(tensor) - np.count_nonzero(np.isfinite(np.asarray(tensor, np.float32)))
    if bad:
        raise ValueError(
            f"the tensor {name} has {bad} values of {tensor.size} that are NaN or infinite; "
            "the checkpoint is damaged, or its training diverged"
        )


def _quantised(name: str, dtype: Any) -> str:
    return (
        f"the tensor {name} has dtype {dtype}; quantised weights cannot be loaded, "
        "use a float32, float16 or bfloat16 checkpoint"
    )


def variables(model: nnx.Module) -> dict[tuple[str, ...], nnx.Variable]:
    """Return a model's parameters and its statistics of batch normalisation, by path."""
    found = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {tuple(map(str, path)): variable for path, variable in found}


def shapes_of(model: nnx.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shapes of a model's `variables`, by path."""
    return {path: variable.shape for path, variable in variables(model).items()}


def parameters_by_path(paths: Iterable[tuple[str, ...]]) -> list[Parameter]:
    """Tensors named by their paths, stacked as they are: for models that no other library has."""
    return [Parameter(path, ".".join(path)) for path in paths]


def read_values(
    folder: Path,
    model: nnx.Module,
    table: Sequence[Parameter] | None = None,
    *,
    allow_pickle: bool = False,
) -> dict[tuple[str, ...], np.ndarray]:
    """Read the values of a model's `variables` from a folder.

    Args:
      folder: with config.json and the weights.
      model: a model, of which only the shapes count.
      table: where each parameter is in the file; None: named by its path.
      allow_pickle: see `read_tensors`.

    Raises:
      FileNotFoundError, OSError, ValueError, ImportError: see `read_tensors` and
        `read_parameters`.
    """
    shapes = shapes_of(model)
    tensors = read_tensors(folder, allow_pickle=allow_pickle)
    return read_parameters(tensors, table or parameters_by_path(shapes), shapes)


def fill(model: nnx.Module, parameters: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Give a model's `variables` these values, in place; those that have none stay."""
    for path, variable in variables(model).items():
        if path in parameters:
            variable.set_value(jnp.asarray(parameters[path]))


def save_model(
    model: Any,
    folder: str | os.PathLike,
    table: Sequence[Parameter] | None = None,
    *,
    dtype: str = "float32",
) -> None:
    """Write config.json, model.safetensors and the processor's files.

    The folder appears as a whole, or, when something fails, not at all.

    Args:
      model: has a `config` with `to_dict`, and a `processor`.
      folder: a new folder, or an older model folder, which is replaced.
      table: where each parameter is in the file; None: named by its path.
      dtype: dtype of the file, "float32", or "float16" for half the size.

    Raises:
      FileExistsError: the folder exists and is no model folder.
      ValueError: another dtype.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
    parameters = {path: np.asarray(value[...]) for path, value in variables(model).items()}
    tensors: dict[str, np.ndarray] = {}
    for parameter in table or parameters_by_path(parameters):
        value = parameters[parameter.path]
        written = [tensor.astype(dtype) for tensor in parameter.to_tensors(value)]
        for name, tensor in zip(parameter.names(value.shape), written, strict=True):
            # Parts of one tensor follow each other.
            parts = (tensors[name], tensor) if name in tensors else (tensor,)
            tensors[name] = np.concatenate(parts) if len(parts) > 1 else tensor
    with new_folder(folder) as draft:
        text = json.dumps(model.config.to_dict(), indent=2)
        (draft / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        model.processor.save(draft)


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a folder to write a model into; it takes the name `folder` when all went well.

    An older model folder of that name is replaced as a whole; its other files (a model card)
    are kept. When writing fails, everything stays as it was.

    Args:
      folder: the name; its parent is made if need be.

    Raises:
      FileExistsError: something of that name exists and is no model folder.
    """
    replaces = check_new_folder(folder)
    target = Path(folder).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    draft = target.with_name(f".{target.name}.{unique}.draft")
    draft.mkdir()
    try:
        yield draft
        if replaces:
            _keep_other_files(target, draft)
            old = target.with_name(f".{target.name}.{unique}.old")
            target.rename(old)
            draft.rename(target)
            shutil.rmtree(old)
        else:
            # An empty folder of that name gives way to the new one.
            draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_new_folder(folder: str | os.PathLike) -> bool:
    """Raise the error that `new_folder` would, before any work; return whether it replaces."""
    target = Path(folder).expanduser().resolve()
    check_writable(target.parent)
    replaces = target.is_dir() and any(target.iterdir())
    if (target.exists() and not target.is_dir()) or (replaces and not (target / CONFIG).is_file()):
        raise FileExistsError(
            f"{target} exists and is no model folder (no {CONFIG} in it); pass a new folder"
        )
    return replaces


def _keep_other_files(old: Path, new: Path) -> None:
    weights = ("*.safetensors", INDEX, *PICKLES)
    for path in old.iterdir():
        if (new / path.name).exists() or any(map(path.match, weights)):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name)
        else:
            shutil.copy2(path, new / path.name)


def some(names: Sequence[str], count: int = 5) -> str:
    """Return the first names and the number of others, for a message."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
