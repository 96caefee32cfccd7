"""A mechanism as an attention function of transformers: `attn_implementation="reattend:window"`.

The site is made from what the interface hands over: un-repeated k and v, the scale, softcap, sinks, position bias,
dropout, and the structure of the mask. A mechanism sees the same site as in a rewritten graph; what the interface does
not carry (learned tensors, the hidden state) is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.capture import capture
from ..compiler.facts import module_path
from ..compiler.mechanism import Mechanism, mechanism
from ..compiler.place import Place, dropped, run, site_of
from ..compiler.primitives.attend_spec import IN_ORDER, AttendSpec, keep_text
from ..compiler.primitives.tables import Tables
from ..compiler.raising import raise_sites
from ..compiler.refusal import Refused
from ..compiler.symbols import TRUE, Expr, build, name, table
from .hf_masks import FITS, Seen

_CALLS: ContextVar[list[str] | None] = ContextVar("_CALLS", default=None)
I, J = name("i"), name("j")


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the modules' classes that call an attention function inside, one entry a call."""
    calls: list[str] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


@dataclass(frozen=True)
class AttentionFunction:
    """The attention function of one name; the mechanism is looked up at each call: a notebook may define it anew."""

    slug: str
    knobs: tuple[tuple[str, Any], ...] = ()

    @torch.compiler.disable  # its place is worked out in Python: one graph break, and the op is compiled around
    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        calls = _CALLS.get()
        if calls is not None:
            calls.append(type(module).__name__)
        chosen = mechanism(self.slug, **dict(self.knobs))
        place = stand_at(module, query, key, value, attention_mask, **given)
        _carried(chosen, place)
        o, aux = run(chosen, place)
        if aux.losses or aux.buffers:
            found = f"{chosen.slug} gives {', '.join((*aux.losses, *aux.buffers))} beside its output"
            raise Refused(found, where=place.site.path, fits=_elsewhere(chosen))
        return o.transpose(1, 2).contiguous(), None


def _carried(chosen: Mechanism, place: Place) -> None:
    """The interface carries q, k, v and a mask, nothing of the mechanism's own."""
    where = f"attn_implementation: {place.site.path}"
    if chosen.part != "core":
        raise Refused(f"{chosen.slug} is a {chosen.part}", where=where, fits=_elsewhere(chosen))
    own = {**chosen.params(place.site), **chosen.buffers(place.site)}
    if own:
        found = f"{chosen.slug} has tensors of its own ({', '.join(own)}), for which a stock model has no place"
        raise Refused(found, where=where, fits=_elsewhere(chosen))


def _elsewhere(chosen: Mechanism) -> str:
    key = {"gate": "heads", "insert": "insert", "cache": "kv"}.get(chosen.part, "attention")
    rule = f"{{'match': '*', {key!r}: {chosen.slug!r}}}" if chosen.part != "model" else f"passes: {chosen.slug!r}"
    return f"reattend.optimize(model, recipe) with {rule}"


def stand_at(
    module: nn.Module,
    query: Tensor,  # (B, H, N, D)
    key: Tensor,  # (B, Hkv, M, D)
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **_: Any,
) -> Place:
    """The place that a call of an attention function describes."""
    where = type(module).__name__
    if cache is not None:
        fits = "generate(), without generate_batch()"
        raise Refused("a paged cache", where=f"attn_implementation: {where}", fits=fits)
    see = _seen(module, attention_mask, is_causal, sliding_window).on(query.device)
    rows, tables = _Rows(query, key, see), Tables()
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    bias = _added(position_bias, see)
    spec = AttendSpec(
        keep=keep_text(_kept(see, rows, tables)),
        score=_scored(scale, softcap, bias, rows, tables).text,
        align="end" if rows.at_end else "start",
        q_positions=tables.name_of(rows.of_queries()),
        k_positions=tables.name_of(rows.of_keys()),
        sink="" if s_aux is None else tables.settle(table(s_aux.reshape(-1))[name("h")]).text,
        after=dropped(tables, rows.of, dropout, query, key),
    )
    ports = {"q": query, "k": key, "v": value, **_ports_of(see, rows, bias)}
    site = site_of(
        spec,
        ports,
        path=where,
        index=int(getattr(module, "layer_idx", None) or 0),
        pattern=_pattern(module, see, query, key),
        scale=scale,
        window=None if see.back is None else see.back + 1,
    )
    return Place(site, spec, tuple(tables.tensors), ports)


def _ports_of(see: Seen, rows: _Rows, bias: Tensor | None) -> dict[str, Tensor]:
    """The ports beside q, k and v, where there are any."""
    padding = {} if see.padding is None else {"key_padding": rows.at_hand(see.padding)}
    return padding if bias is None else {**padding, "bias": bias}


def _kept(see: Seen, rows: _Rows, tables: Tables) -> Expr:
    """Which keys a query sees."""
    keep: Expr = IN_ORDER if see.causal else TRUE
    keep = keep if see.back is None else keep & (J + see.back >= I)
    keep = keep if see.ahead is None else keep & (I + see.ahead >= J)
    if see.padding is not None:
        keep = keep & tables.settle(table(see.padding)[name("b"), J] != 0)
    if see.whole is not None and see.whole.dtype == torch.bool:
        keep = keep & tables.settle(rows.of(see.whole) != 0)
    return keep


def _added(position_bias: Tensor | None, see: Seen) -> Tensor | None:
    """What is added to the scores: the model's bias, and a mask that is made of numbers."""
    if see.whole is None or see.whole.dtype == torch.bool:
        return position_bias
    return see.whole if position_bias is None else position_bias + see.whole


def _scored(scale: float, softcap: float | None, bias: Tensor | None, rows: _Rows, tables: Tables) -> Expr:
    score: Expr = name("s") * scale
    if softcap is not None:
        score = build("tanh", score * (1.0 / softcap)) * float(softcap)
    return score if bias is None else score + tables.settle(rows.of(bias))


def _seen(module: nn.Module, mask: Any, is_causal: bool | None, window: int | None) -> Seen:
    """The mask as structure: ours, a tensor of four dimensions of the user's, or none at all."""
    if isinstance(mask, Seen):
        return mask
    if isinstance(mask, Tensor):
        if mask.ndim != 4:
            found = f"a mask of shape {tuple(mask.shape)}"
            raise Refused(found, where=f"attn_implementation: {type(module).__name__}", fits="four dimensions")
        return Seen(whole=mask)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    return Seen(causal, back=window - 1 if window and causal else None)


class _Rows:
    """Where queries and keys stand: at the same places, queries at the end of the keys, or at given positions."""

    def __init__(self, query: Tensor, key: Tensor, see: Seen) -> None:
        self.n, self.m, self.see = query.shape[2], key.shape[2], see
        self.device = query.device
        first = self.m - self.n if see.q_offset is None else see.q_offset
        plain = isinstance(first, int | torch.SymInt) and isinstance(see.kv_offset, int) and see.kv_offset == 0
        across = not see.causal and see.whole is None  # no row knows where it stands
        same = across or (plain and first == 0)
        self.first = first
        self.at_end = not same and plain and first + self.n == self.m
        self.told = not same and not self.at_end

    def of_queries(self) -> Tensor | None:
        """Positions that the spec must be told."""
        return torch.arange(self.n, device=self.device) + self.first if self.told else None

    def of_keys(self) -> Tensor | None:
        return torch.arange(self.m, device=self.device) + self.see.kv_offset if self.told else None

    def at_hand(self, padding: Tensor) -> Tensor:
        """The part of (B, keys from the start on) that is of the keys at hand."""
        first = int(self.see.kv_offset)
        return padding[:, first : first + self.m] if first else padding

    def of(self, tensor: Tensor) -> Expr:
        """A lookup of (B | 1, H | 1, N | 1, M | 1) by position; dimensions of size one are not indexed."""
        row, column = I, J
        if self.at_end:
            row = I - name("M") + name("N")
        elif self.told:
            if isinstance(self.first, Tensor) or isinstance(self.see.kv_offset, Tensor):
                fits = "cache_implementation='dynamic'"
                raise Refused("a mask or bias of its own under a static cache", where="attn_implementation", fits=fits)
            row, column = I - self.first, J - self.see.kv_offset
        places = zip(tensor.shape, (name("b"), name("h"), row, column), strict=True)
        return table(tensor)[tuple(0 if size == 1 else place for size, place in places)]


def _pattern(module: nn.Module, see: Seen, query: Tensor, key: Tensor) -> str:
    if see.causal:
        return "causal-self"
    told = getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__
    decoder = bool(getattr(module, "is_decoder", False)) and see.whole is None
    cross = told or decoder or (query.shape[2] != key.shape[2] and see.whole is None)
    return f"noncausal-{'cross' if cross else 'self'}"


def unrouted(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """The modules in which a call of the model attends without asking transformers' interface; best: none.

    Some models never ask it, and a name given as `attn_implementation` changes nothing in them: `refuse_unrouted` says
    so. Counted are the attentions in the captured graph that no function of ours has put there.
    """
    captured = capture(model, args, kwargs)
    return tuple(module_path(node) for node in raise_sites(captured.graph).nodes)


def refuse_unrouted(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Raise where a call of the model attends beside transformers' interface."""
    beside = unrouted(model, *args, **kwargs)
    if beside:
        found = f"{len(beside)} attentions are not routed through transformers' interface: {', '.join(beside)}"
        raise Refused(found, where=f"attn_implementation: {type(model).__name__}", fits=FITS)
