"""Inputs made up from a forward's signature and the config, where they run; random, so never to judge quality by.

Every guess is a rule: what a forward with such an argument, and a model with such a config, takes. The rules are tried
in order until the model runs on what they give together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .containers import take_apart
from .refusal import Refused
from .signature import forward_signature
from .untouched import unchanged

BATCH, LENGTH = 2, 12


@dataclass(frozen=True)
class Guess:
    """What is known about a model, and random numbers to make inputs of; the same in every run."""

    arguments: tuple[str, ...]
    config: Any
    cfg: dict[str, Any]  # timm's default_cfg
    built: Any  # the image size that a timm model was built for, where it keeps it
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def value(self, *names: str) -> Any:
        """The first of these config values that there is, in the config or in one of its parts."""
        parts = [self.config, *(getattr(self.config, f"{p}_config", None) for p in ("text", "vision", "audio"))]
        found = (_of(part, name) for part in parts if part is not None for name in names)
        return next((v for v in found if v is not None), None)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def tokens(self, length: int, most: int) -> Tensor:
        """Token ids without the first few, which are often special, and without those that stand for an image."""
        low = 5 if most > 16 else 0
        ids = torch.randint(low, max(most, low + 1), (BATCH, length), generator=self.generator)
        stand_ins = [self.value(n) for n in ("image_token_id", "image_token_index", "audio_token_id")]
        for token in (t for t in stand_ins if isinstance(t, int)):
            ids[ids == token] = low
        return ids.to(self.device)


def example_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments on which the model runs, or Refused saying what to pass."""
    tried = []
    for kwargs in _guesses(model):
        given = ", ".join(f"{n} {tuple(v.shape)}" for n, v in kwargs.items() if isinstance(v, Tensor))
        try:
            with torch.no_grad(), unchanged(model), torch.random.fork_rng(devices=[]):
                answer = model(**kwargs)
        except Exception as error:
            tried.append(f"{given} ({type(error).__name__})")
            continue
        return (), kwargs if _known(answer) or not _takes_cache(model) else kwargs | {"use_cache": False}
    found = f"tried {'; '.join(tried[:3])}" if tried else "nothing in its signature or config says what it takes"
    fits = (
        f"pass example_inputs=(positional,), {{keyword: ...}} or both for forward{forward_signature(model)}; a factory"
    )
    fits += " of py:module:factory gives them as a pair (model, inputs)"
    raise Refused(found, where=type(model).__name__, fits=fits)


def _known(answer: Any) -> bool:
    """Whether it is made of what graphs give: a cache of states that are no keys and values is not."""
    try:
        take_apart(answer, "")
    except Refused:
        return False
    return True


def _takes_cache(model: nn.Module) -> bool:
    return "use_cache" in forward_signature(model).parameters


def _guesses(model: nn.Module) -> Iterator[dict[str, Any]]:
    cfg = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
    config = getattr(model, "config", None)
    if config is None and not cfg:
        return
    parameters = forward_signature(model).parameters
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    named = tuple(n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD)
    for rule in RULES:
        generator = torch.Generator().manual_seed(0)
        kwargs = rule(Guess(named, config, cfg, _built_for(model), weight.dtype, weight.device, generator))
        if kwargs:
            yield {n: v for n, v in kwargs.items() if n in named}


# --- the rules --------------------------------------------------------------------------------------------------------


def _built_for(model: nn.Module) -> Any:
    held = (getattr(part, "img_size", None) for part in (model, getattr(model, "patch_embed", None)))
    return next((size for size in held if isinstance(size, tuple)), None)


def _timm_as_built(g: Guess) -> dict[str, Any]:
    """What timm lists is the size of the published model; this one may have been built for another."""
    size = g.cfg.get("input_size")
    return {g.arguments[0]: g.floats(BATCH, size[0], *g.built)} if size and g.built else {}


def _timm(g: Guess) -> dict[str, Any]:
    size = g.cfg.get("input_size")
    return {g.arguments[0]: g.floats(BATCH, *size)} if size else {}


def _text(g: Guess) -> dict[str, Any]:
    """Encoders, decoders and encoder-decoders over token ids."""
    vocabulary = g.value("vocab_size")
    if "input_ids" not in g.arguments or not isinstance(vocabulary, int):
        return {}
    known = g.value("max_position_embeddings", "n_positions")
    length = min(LENGTH, known) if isinstance(known, int) and known > 0 else LENGTH  # xlnet says -1: any
    given: dict[str, Any] = {"input_ids": g.tokens(length, vocabulary)}
    if g.value("is_encoder_decoder"):
        given["decoder_input_ids"] = g.tokens(max(length - 4, 2), vocabulary)
    return given


def _image(g: Guess) -> dict[str, Any]:
    if "pixel_values" not in g.arguments:
        return {}
    size = g.value("image_size") or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": g.floats(BATCH, g.value("num_channels") or 3, int(height), int(width))}


def _image_and_text(g: Guess) -> dict[str, Any]:
    """Two towers, each with its own input."""
    text, image = _text(g), _image(g)
    return text | image if text and image else {}


def _image_in_text(g: Guess) -> dict[str, Any]:
    """An image's features stand in the text where its token is repeated, once for every patch."""
    both = _image_and_text(g)
    token = g.value("image_token_id", "image_token_index")
    patch = g.value("patch_size")
    if not both or not isinstance(token, int) or not isinstance(patch, int):
        return {}
    height, width = both["pixel_values"].shape[2:]
    count = g.value("image_seq_length") or (height // patch) * (width // patch)
    if g.value("vision_feature_select_strategy") == "full":
        count += 1
    image = torch.full((BATCH, count), token, device=g.device)
    return both | {"input_ids": torch.cat([both["input_ids"][:, :4], image, both["input_ids"][:, 4:]], 1)}


def _patches_in_text(g: Guess) -> dict[str, Any]:
    """The same where the count is not in the config: as many as (size / patch)²."""
    both = _image_in_text(g)
    if not both:
        return {}
    patch, token = g.value("patch_size"), g.value("image_token_id", "image_token_index")
    height, width = both["pixel_values"].shape[2:]
    image = torch.full((BATCH, (height // patch) * (width // patch)), token, device=g.device)
    text = both["input_ids"]
    return both | {"input_ids": torch.cat([text[:, :4], image, text[:, -4:]], 1)}


def _spectrogram(g: Guess) -> dict[str, Any]:
    bins = g.value("num_mel_bins", "feature_size", "input_feat_per_channel")
    name = next((n for n in ("input_features", "input_values") if n in g.arguments), None)
    if name is None or not bins:
        return {}
    frames = 2 * g.value("max_source_positions") if g.value("max_source_positions") else 100
    given: dict[str, Any] = {name: g.floats(BATCH, bins, frames)}
    if g.value("is_encoder_decoder") and "decoder_input_ids" in g.arguments:
        given["decoder_input_ids"] = g.tokens(8, g.value("vocab_size"))
    return given


def _frames_first(g: Guess) -> dict[str, Any]:
    frames = g.value("max_length")
    bins = g.value("num_mel_bins")
    return {"input_values": g.floats(BATCH, frames, bins)} if "input_values" in g.arguments and frames and bins else {}


def _waveform(g: Guess) -> dict[str, Any]:
    return {"input_values": g.floats(BATCH, 4000)} if "input_values" in g.arguments else {}


def _denoiser(g: Guess) -> dict[str, Any]:
    """A diffusion model: a noisy sample, its time, and what it is conditioned on."""
    size, channels = g.value("sample_size"), g.value("in_channels")
    name = next((n for n in ("sample", "hidden_states") if n in g.arguments), None)
    if name is None or "timestep" not in g.arguments or not size or not channels:
        return {}
    height, width = size if isinstance(size, list | tuple) else (size, size)
    given: dict[str, Any] = {name: g.floats(BATCH, channels, height, width)}
    given["timestep"] = torch.full((BATCH,), 10, device=g.device)
    if g.value("cross_attention_dim"):
        given["encoder_hidden_states"] = g.floats(BATCH, LENGTH, g.value("cross_attention_dim"))
    if "class_labels" in g.arguments and g.value("num_embeds_ada_norm"):
        given["class_labels"] = torch.zeros(BATCH, dtype=torch.long, device=g.device)
    return given


RULES: tuple[Callable[[Guess], dict[str, Any]], ...] = (
    _timm_as_built,
    _timm,
    _denoiser,
    _image_in_text,
    _patches_in_text,
    _image_and_text,
    _image,
    _spectrogram,
    _frames_first,
    _waveform,
    _text,
)


def _of(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)
