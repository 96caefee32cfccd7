"""Models whose class transformers itself ships: made again from a config file and weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..refusal import Refused

_PLAIN_ATTENTION = ("sdpa", "eager")


def is_stock(made: type) -> bool:
    """Whether a class is a transformers model that comes with transformers."""
    own = next(
        (base for base in made.__mro__ if "forward" in vars(base) and not hasattr(base, "_reattend_made_from")), made
    )
    return own.__module__.startswith("transformers.models.") and any(
        base.__name__ == "PreTrainedModel" and base.__module__ == "transformers.modeling_utils" for base in made.__mro__
    )


def stock_model(folder: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> nn.Module:
    """The model of a folder's config.json around these weights; only classes inside transformers are made."""
    if facts["model"]["stock"] is not True:
        fits = 'reattend.load(folder, model=instance), or model="module:factory"'
        raise Refused(f"a {facts['model']['class']}, which transformers does not ship", fits=fits)
    if importlib.util.find_spec("transformers") is None:
        raise Refused("transformers is not installed", fits="pip install 'reattend[hf]'")
    import transformers

    made = _class_of(folder, transformers)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        spelled = facts.get("attention")
        if spelled in _PLAIN_ATTENTION:
            config._attn_implementation = spelled
        model, said = made.from_pretrained(None, config=config, state_dict=dict(weights), output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise Refused(str(error).strip().splitlines()[0][:200], where="config.json", fits="a whole folder") from None
    if missing := sorted(said["missing_keys"]):
        raise Refused(f"no tensor for {missing[0]}", where="model.safetensors", fits="a complete folder")
    stock: nn.Module = model.eval()
    return stock


def _class_of(folder: Path, transformers: Any) -> Any:
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise Refused("no architectures", where="config.json", fits="as save_pretrained writes it") from None
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    made = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(made, type) or not issubclass(made, transformers.PreTrainedModel) or not is_stock(made):
        raise Refused(f"architecture {named!r}", where="config.json", fits="one model class of transformers")
    return made
