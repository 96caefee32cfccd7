"""Which task judges a model: by name, by what its config says it is, or the caller's own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...compiler.held_out import held_out
from ...compiler.recipe import Data, Recipe
from ...compiler.refusal import Refused, nearest
from ..extras import needed
from ..load import minilm_folder
from .given import given
from .language import language
from .pictures import pictures
from .sentences import sentences
from .task import Task

LONGEST = 2048  # bytes of context that the language task asks for


def task_for(model: nn.Module, wanted: str | Task = "", data: Iterable[Any] | str | Path | None = None) -> Task:
    """The caller's calls where there are any; else the task of a name; else the one that fits the model."""
    if data is not None:
        return given(_calls(data))
    if isinstance(wanted, Task):
        return wanted
    if wanted and wanted not in TASKS:
        raise Refused(f"task {wanted!r}", where="quality", fits=nearest(wanted, TASKS, kind="tasks"))
    for name, (fits, make) in TASKS.items():
        if name == wanted or (not wanted and fits(model)):
            return make(model)
    kinds = "a byte-level causal language model, a classifier of the shipped pictures, minilm"
    fits_ = f"{kinds}; of any other model: data=[calls], --data FILE"
    raise Refused(f"no task for a {type(model).__name__}", where="quality", fits=fits_)


def _calls(data: Iterable[Any] | str | Path) -> Any:
    """Calls given in Python, or the lines of a file."""
    if isinstance(data, str | Path):
        return held_out(Recipe(data=Data(verify=str(data))), None)[0]
    calls, _ = held_out(Recipe(), data)
    if not calls:
        raise Refused("no calls", where="data", fits="an iterable of calls like example_inputs")
    return calls


def _config(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _language(model: nn.Module) -> Task:
    return language(min(_config(model, "max_position_embeddings") or LONGEST, LONGEST))


def _is_language(model: nn.Module) -> bool:
    return type(model).__name__.endswith("CausalLM") and _config(model, "vocab_size") == 256


def _pictures(model: nn.Module) -> Task:
    from ..training.images import CLASSES
    from ..training.images import pictures as drawn
    from ..training.vision import TEST_SEED

    return pictures(lambda first, count: drawn(TEST_SEED, first, count), len(CLASSES))


def _is_pictures(model: nn.Module) -> bool:
    return "ImageClassification" in type(model).__name__ and _config(model, "image_size") == 64


def _sentences(model: nn.Module) -> Task:
    tokenizer = needed("transformers", "reattend[hf]").AutoTokenizer.from_pretrained(minilm_folder())

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        found = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return sentences(tokenize)


def _is_sentences(model: nn.Module) -> bool:
    return _config(model, "name_or_path") == "minilm"


TASKS: dict[str, tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Task]]] = {
    "language": (_is_language, _language),
    "pictures": (_is_pictures, _pictures),
    "sentences": (_is_sentences, _sentences),
}
