"""A rewritten model as a folder, written and read: weights, config, recipes, and each signature's graph as JSON.

config.json, model.safetensors    as the model's class saves them; the recipe's new tensors are among the weights
recipe.yaml, recipe.1.yaml ...    the recipes, in the order in which they were applied
reattend.json                     what was decided, the report, the graphs (docs/shipping.md)
reattend.safetensors              constants of the graphs, and buffers that a state_dict leaves out
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ..capture import Captured
from ..config_values import changed_config
from ..hosted import adopt, host, way_out
from ..hosting import hosting, is_hosted
from ..keeping import keeping_json, keeping_of
from ..mounting import place_at
from ..plain_graph import CONSTANTS
from ..program import Store
from ..quantized_linear import QuantizedLinear, described, layer_of, quantized_layers
from ..recipe_load import load_recipe
from ..refusal import Refused
from ..report import Report
from ..rewriting import Rewriting, Settled
from ..steps import vocabulary
from .graph_json import segments, tensor_at
from .signature_json import captured_json, captured_of
from .stock import is_stock, stock_model
from .weights import put_weights, read_tensors, read_weights, write_tensors, write_weights

log = logging.getLogger("reattend")
FORMAT, VERSION = "reattend", 1
FACTS, EXTRA = "reattend.json", "reattend.safetensors"
MAX_BYTES, MAX_RECIPES, MAX_SIGNATURES = 256 * 2**20, 16, 256


# --- writing ----------------------------------------------------------------------------------------------------------


def save(fast: Any, folder: str | Path) -> Path:
    """Write a rewritten model so that `load` gives it back in another process."""
    if not is_hosted(fast) or hosting(fast).about is None:
        fits = "what optimize() gave, captured whole; a model captured in islands is saved by its own means only"
        raise Refused(f"a {type(fast).__name__} that holds no graph", where="save", fits=fits)
    target = Path(folder)
    if hasattr(fast, "save_pretrained"):
        fast.save_pretrained(target)
    else:
        write_beside(fast, target)
    return target


@way_out("write beside")
def write_beside(fast: Any, folder: str | Path) -> None:
    """What reattend adds to the files that the model's class has written; all of it where the class writes none."""
    target, work = Path(folder), hosting(fast).about
    if work is None:
        return
    target.mkdir(parents=True, exist_ok=True)
    if not is_stock(type(fast)):
        write_weights(fast, target)
    kept, left_out = _signatures(fast)
    write_tensors({n: tensor_at(fast, n) for n in _beside_state_dict(fast, kept)}, target / EXTRA)
    for name, recipe in zip(_recipe_files(len(work.recipes)), work.recipes):
        (target / name).write_text(recipe.text(), encoding="utf-8")
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "written_with": {"torch": torch.__version__},
        "model": {"class": type(fast).__name__, "stock": is_stock(type(fast)), "name": work.name},
        "attention": getattr(getattr(fast, "config", None), "_attn_implementation", None),
        "recipes": len(work.recipes),
        "sources": [recipe.source for recipe in work.recipes],
        "settled": _settled(work),
        "keeps": _keeps(fast, work),
        "new": _new_tensors(fast),
        "quantized": {path: described(layer) for path, layer in quantized_layers(fast).items()},
        "report": work.report.to_dict() if work.report is not None else None,
        "signatures": kept,
        "left_out": left_out,
    }
    text = json.dumps(facts, allow_nan=False, separators=(",", ":"))
    (target / FACTS).write_text(text.replace('{"call":', '\n{"call":').replace('{"op":', '\n{"op":'), encoding="utf-8")


def _settled(work: Rewriting) -> dict[str, Any] | None:
    if work.settled is None:
        return None
    return {
        "rolled_back": dict(work.settled.rolled_back),
        "changed": {path: list(now) for path, now in work.settled.changed.items()},
        "refused": sorted(map(list, work.settled.refused)),
    }


def _keeps(fast: Any, work: Rewriting) -> dict[str, list[Any]] | None:
    """What a decoder's layers keep; nothing of a model that does not decode, or of layers that no cache is made for."""
    if not hasattr(fast, "generate"):
        return None
    try:
        return None if work.keeps is None else keeping_json(work.keeps)
    except Refused:
        return None


def _signatures(fast: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Each captured signature as JSON that was read back once, and those that JSON cannot say, with the reason."""
    state = hosting(fast)
    changed = changed_config(fast, state.config)
    kept, left_out = [], []
    for key, captured in state.graphs.items():
        if tuple(s for s in key.setting if s.startswith("config.")) != changed:
            left_out.append(f"{key}: captured with another config")
            continue
        setting = tuple(s for s in key.setting if not s.startswith("config."))
        try:
            entry = captured_json(replace(captured, key=replace(key, setting=setting)))
            captured_of(entry, fast)
        except Refused as refused:
            left_out.append(f"{key}: {refused}")
            log.info("not saved, captured again at its first call: %s", left_out[-1])
            continue
        kept.append(entry)
    return kept, left_out


def _beside_state_dict(fast: nn.Module, kept: list[dict[str, Any]]) -> list[str]:
    """Tensors that the graphs name and a state_dict does not hold."""
    named = {n["target"]: None for entry in kept for n in entry["graph"] if n["op"] == "get_attr"}
    weights = set(fast.state_dict())
    return [n for n in named if n not in weights and n not in dict(fast.named_parameters(remove_duplicate=False))]


def _new_tensors(fast: nn.Module) -> dict[str, str]:
    """The tensors that the recipe added: parameters and buffers by name."""
    learned = dict(fast.named_parameters())
    return {n: "parameter" if n in learned else "buffer" for n in fast.state_dict() if "reattend" in n.split(".")}


def _recipe_files(count: int) -> list[str]:
    return ["recipe.yaml" if k == 0 else f"recipe.{k}.yaml" for k in range(count)]


# --- reading ----------------------------------------------------------------------------------------------------------


def load(folder: str | Path, model: nn.Module | None = None) -> Any:
    """A saved model in eval(), hosted in the class that its config names, or in the given model's own."""
    source = Path(folder)
    facts = _facts(source / FACTS)
    try:
        return _loaded(source, facts, model)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        said = f"{type(error).__name__}: {error}"
        raise Refused(f"not whole ({said[:120]})", where=str(source / FACTS), fits="a complete file") from None
    except Refused as refused:
        raise refused.at(str(source)) from None


def _loaded(source: Path, facts: Mapping[str, Any], model: nn.Module | None) -> Any:
    new = {name: kind for name, kind in facts["new"].items() if _is_new(name)}
    weights = read_weights(source)
    own = {name: weights.pop(name) for name in list(weights) if name in new}
    if lost := sorted(set(new) - set(own)):
        raise Refused(f"tensor {lost[0]} is missing", where="model.safetensors", fits="a complete folder")
    layers = _layers(facts.get("quantized", {}), weights)
    base = stock_model(source, {**weights, **_places(layers)}, facts) if model is None else model
    if layers and model is not None:
        base = copy.deepcopy(model)  # the given one keeps its own layers
    for path, layer in layers.items():
        base.set_submodule(path, layer)
    work = _work(source, facts)
    fast: Any = host(base, work.program_for, about=work, limit=max(8, 2 * len(facts["signatures"])))
    for name, kind in new.items():
        place_at(fast, name, nn.Parameter(own[name]) if kind == "parameter" else own[name])
    if model is not None or layers:
        weights |= {f"{path}.{n}": t.data for path, layer in layers.items() for n, t in layer.state_dict().items()}
        put_weights(fast, weights, known=set(new))
    for name, value in read_tensors(source / EXTRA).items():
        _put_extra(fast, name, value)
    work.store = _store(fast, new)
    fast.eval()
    if not isinstance(facts["signatures"], list) or len(facts["signatures"]) > MAX_SIGNATURES:
        raise Refused("signatures", where=FACTS, fits=f"a list of at most {MAX_SIGNATURES}")
    for captured in [captured_of(entry, fast) for entry in facts["signatures"]]:
        _adopt(fast, captured)
    return fast


def _layers(said: Any, weights: dict[str, torch.Tensor]) -> dict[str, QuantizedLinear]:
    """The quantized layers of a file; their tensors leave the weights."""
    found = {}
    for path, one in said.items():
        segments(path)
        names = [name for name in weights if name.rpartition(".")[0] == path]
        found[path] = layer_of(one, {name.rpartition(".")[2]: weights.pop(name) for name in names})
    return found


def _places(layers: Mapping[str, QuantizedLinear]) -> dict[str, torch.Tensor]:
    """Weights that a class asks for at the places of quantized layers, which are put there afterwards."""
    found: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        found[f"{path}.weight"] = torch.zeros((), dtype=layer.dtype).expand(layer.out_features, layer.in_features)
        bias: Any = layer.bias
        if bias is not None:
            found[f"{path}.bias"] = bias.detach()
    return found


def _adopt(fast: Any, captured: Captured) -> None:
    mode = "train" if "train" in captured.key.setting else "eval"
    captured.graph.train(mode == "train")
    adopt(fast, captured)


def _facts(path: Path) -> Mapping[str, Any]:
    """The file's content, once it is known to be ours and not from a newer version."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{path.stat().st_size} bytes", where=str(path), fits=f"at most {MAX_BYTES}")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        fits = "a folder that save_pretrained or reattend.save wrote"
        raise Refused(f"no {FACTS} ({error.strerror})", where=str(path.parent), fits=fits) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refused):
            raise
        said = str(error).splitlines()[0][:120]
        raise Refused(f"not whole, or not JSON ({said})", where=str(path), fits="a complete file") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or type(found.get("version")) is not int:
        raise Refused("another file", where=str(path), fits=f'"format": "{FORMAT}" and a version')
    if not 1 <= found["version"] <= VERSION:
        fits = f"this reattend reads version {VERSION}; upgrade reattend, or save again with this one"
        raise Refused(f"format version {found['version']}", where=str(path), fits=fits)
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_new(name: Any) -> bool:
    if "reattend" not in segments(name):
        raise Refused(f"new tensor {name!r}", where=FACTS, fits="names below a `reattend`")
    return True


def _work(source: Path, facts: Mapping[str, Any]) -> Rewriting:
    """Who rewrites further signatures: the same recipes, with what was decided before."""
    count = facts["recipes"]
    if type(count) is not int or not 1 <= count <= MAX_RECIPES:
        raise Refused(f"{count!r} recipes", where=FACTS, fits=f"1 to {MAX_RECIPES}")
    named = zip(_recipe_files(count), facts["sources"], strict=True)
    recipes = tuple(
        replace(load_recipe(source / name, vocabulary(), alone=True), source=str(said)) for name, said in named
    )
    work = Rewriting(recipes, str(facts["model"]["name"]))
    decided = facts["settled"]
    if decided is not None:
        back = {str(k): str(v) for k, v in decided["rolled_back"].items()}
        changed = {str(path): tuple(map(str, now)) for path, now in decided["changed"].items()}
        work.settled = Settled(back, changed, frozenset((str(path), str(slug)) for path, slug in decided["refused"]))
    kept = facts.get("keeps")
    work.kept = None if kept is None else keeping_of(kept)
    work.report = _report(facts["report"])
    return work


def _report(plain: Any) -> Report | None:
    if plain is None:
        return None
    try:
        return TypeAdapter(Report).validate_python({k: v for k, v in plain.items() if k != "verdict"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(f"report.{where}: {first['msg']}", where=FACTS, fits="a complete file") from None


def _put_extra(fast: nn.Module, name: str, value: torch.Tensor) -> None:
    """A constant of the graphs, or a buffer of the model that its state_dict leaves out."""
    if segments(name)[0] == CONSTANTS:
        place_at(fast, name, value)
        return
    standing = tensor_at(fast, name)
    if standing.shape != value.shape:
        fits = f"the model's own is {tuple(standing.shape)}"
        raise Refused(f"{name} is {tuple(value.shape)}", where=EXTRA, fits=fits)
    standing.data = value.to(standing.device)


def _store(fast: nn.Module, new: Mapping[str, str]) -> Store:
    found = {name: tensor_at(fast, name) for name in new}
    return Store(
        {n: t for n, t in found.items() if isinstance(t, nn.Parameter)},
        {n: t for n, t in found.items() if not isinstance(t, nn.Parameter)},
    )
