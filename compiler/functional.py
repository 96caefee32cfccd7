"""Mechanisms without a model: one call on tensors, and the meaning by which their papers' own code can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from .mechanism import Aux, Mechanism, mechanism
from .place import as_mechanism, run, stand
from .refusal import Refused
from .site import Grid


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slug: str | Mechanism,
    *,
    params: Mapping[str, Tensor] = {},
    ports: Mapping[str, Tensor] = {},
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    grid: Grid | Sequence[int] | None = None,
    mask: Tensor | None = None,
    bias: Any = None,
    **knobs: Any,
) -> Tensor:
    """The output o (B, H, N, Dv) of a mechanism on q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv).

    params  the mechanism's own tensors by name. A learned tensor that is not given starts as in a rewritten model:
            closest to softmax attention, and the same at every call. One given without its leading dimensions is
            shared along them. One named like a switch among the knobs turns it on.
    ports   further tensors by port: x, x_kv (B, N, C), o, positions, ... A gate reads o; without it, softmax attention.
            A tensor given like a knob, under the name of a port that the mechanism asks for, is that port.
    causal  keeps j <= i, both counted from the start; one value per axis is the knob of that name.
    scale   of q . k; D ** -0.5 where it is not given.
    mask    boolean, true where a key is seen: (B, M) is padding, four dimensions broadcast to (B, H, N, M).
    bias    a tensor that broadcasts to (B, H, N, M) is added to the scores; a number or text is the knob of that name.
    grid    (h, w) or (h, w, prefix) where the tokens are a picture; (n,) or (t, h, w) is the knob of that name.

    >>> from .problem import problem
    >>> q, k, v = problem()
    >>> o = attention(q, k, v, "window", causal=True, window=4, sinks=1)
    >>> bool((o[:, :, :4] - attention(q, k, v, "softmax", causal=True)[:, :, :4]).abs().max() < 1e-6)
    True
    """
    return attention_and_aux(q, k, v, slug, params=params, ports=ports, causal=causal, scale=scale, grid=grid,
                             mask=mask, bias=bias, **knobs)[0]  # fmt: skip


def attention_and_aux(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slug: str | Mechanism,
    *,
    params: Mapping[str, Tensor] = {},
    ports: Mapping[str, Tensor] = {},
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    grid: Grid | Sequence[int] | None = None,
    mask: Tensor | None = None,
    bias: Any = None,
    **knobs: Any,
) -> tuple[Tensor, Aux]:
    """`attention` together with its losses and new buffer values."""
    _check_rows({"q": q, "k": k, "v": v})
    picture = _picture(grid, q.shape[2])
    if grid is not None and picture is None:
        knobs["grid"] = grid
    if bias is not None and not isinstance(bias, Tensor):
        knobs["bias"], bias = bias, None
    if not isinstance(causal, bool):
        knobs["causal"], causal = tuple(causal), False
    chosen, ports = _asked(slug, params, ports, knobs)
    if chosen.part not in ("core", "gate"):
        raise Refused(f"{chosen.slug} is a {chosen.part}", where="attention", fits=f"reattend.module({chosen.slug!r})")
    place = stand(q, k, v, ports=ports, causal=causal, scale=scale, grid=picture, mask=mask, bias=bias)
    if chosen.part == "gate" and "o" not in ports:
        place = place.with_port("o", run(mechanism("softmax"), place)[0])
    return run(chosen, place, params)


def _check_rows(given: Mapping[str, Tensor]) -> None:
    for what, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise Refused(f"{what} of {found}", where="attention", fits="(batch, heads, tokens, features)")


def _asked(
    slug: str | Mechanism, params: Mapping[str, Tensor], ports: Mapping[str, Tensor], knobs: Mapping[str, Any]
) -> tuple[Mechanism, Mapping[str, Tensor]]:
    """The mechanism, and the ports; of a name, tensors among the knobs may be ports, and params turn switches on."""
    if not isinstance(slug, str):
        return as_mechanism(slug, **knobs), ports
    known = mechanism(slug)
    may_be_ports = sum(type(known).asked_ports(), ())
    meant = {n: t for n, t in knobs.items() if isinstance(t, Tensor) and n in may_be_ports}
    own = {n: value for n, value in knobs.items() if n not in meant}
    switched = {n: True for n in params if n not in own and known.knobs().get(n, ("", None))[1] is False}
    return mechanism(slug, **own, **switched), {**ports, **meant}


def _picture(grid: Grid | Sequence[int] | None, tokens: int) -> Grid | None:
    """A grid that is a picture: h, w and prefix tokens, not the sides of a box that has as many tokens."""
    if grid is None or isinstance(grid, Grid):
        return grid
    box = len(grid) == 3 and grid[0] * grid[1] + grid[2] != tokens and prod(grid) == tokens
    return Grid(*grid) if len(grid) in (2, 3) and not box else None
