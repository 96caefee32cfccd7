"""A model of a config's shape without weights in memory: for what can be said before anything is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..compiler.refusal import Refused
from .extras import needed


def on_meta(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a Hugging Face config describes, its weights on the meta device."""
    transformers = needed("transformers", "reattend[hf]")
    if not isinstance(config, transformers.PretrainedConfig):
        fits = "a torch.nn.Module or a Hugging Face config"
        raise Refused(f"a {type(config).__name__}", where="preview", fits=fits)
    named = [n for n in config.architectures or [] if hasattr(transformers, n)]
    with torch.device("meta"):
        if named:
            model: Any = getattr(transformers, named[0])(config)
        elif type(config) in transformers.AutoModelForCausalLM._model_mapping:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = transformers.AutoModel.from_config(config)
    own = dtype or getattr(config, "dtype", None)
    return model.eval().to(own) if isinstance(own, torch.dtype) else model.eval()


def shape_of(name: str, dtype: torch.dtype | None = None) -> nn.Module | None:
    """The same for hf:<id or directory>, of which only the config is read; None for other kinds of names."""
    kind, _, rest = name.partition(":")
    if kind != "hf" or not rest:
        return None
    transformers = needed("transformers", "reattend[hf]")
    try:
        return on_meta(transformers.AutoConfig.from_pretrained(rest), dtype)
    except OSError as error:
        raise Refused(f"model {name!r}", fits=str(error).split("\n", 1)[0]) from None
