"""Tensors in safetensors files: tied ones once, sharded ones together, each put back where the model keeps it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..refusal import Refused
from .graph_json import tensor_at

WEIGHTS = "model.safetensors"
_SHARD = re.compile(r"model[\w-]*\.safetensors", re.ASCII)


def write_weights(model: nn.Module, folder: Path) -> None:
    """The model's state, every tensor once however many names it has."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    write_tensors(kept, folder / WEIGHTS)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Tensors that share memory become tensors of their own."""
    whole: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous()
        memory = value.untyped_storage().data_ptr()
        whole[name] = value.clone() if memory in taken else value
        taken.add(memory)
    save_file(whole, str(path), metadata={"format": "pt"})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, also where they are in several files."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).exists() or not index.exists():
        return read_tensors(folder / WEIGHTS)
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused("not whole, or not JSON", where=index.name, fits="a complete file") from None
    found: dict[str, Tensor] = {}
    for name in files:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise Refused(f"a file {name!r}", where=index.name, fits="model-*.safetensors beside it")
        found |= read_tensors(folder / name)
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(str(path))
    except (OSError, SafetensorError) as error:
        said = str(error).splitlines()[0][:120]
        raise Refused(f"cannot be read ({said})", where=path.name, fits="a whole safetensors file") from None
    return found


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], *, known: set[str]) -> None:
    """Give a model these weights, all of them and in their own dtype; a tied one through any of its names."""
    standing = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and n not in known}
    if strange := sorted(set(weights) - set(standing)):
        raise Refused(f"tensor {strange[0]}", where=WEIGHTS, fits=f"the {type(model).__name__} that was saved")
    filled = {id(tensor_at(model, n)) for n in weights}
    lost = sorted(n for n, t in standing.items() if id(t) not in filled)
    if lost:
        raise Refused(f"no tensor for {lost[0]}", where=WEIGHTS, fits=f"the {type(model).__name__} that was saved")
    for name, value in weights.items():
        if value.shape != standing[name].shape:
            found = f"{name} is {tuple(value.shape)}"
            raise Refused(found, where=WEIGHTS, fits=f"the given model has {tuple(standing[name].shape)}")
    for name, value in weights.items():
        standing[name].data = value.to(standing[name].device)
