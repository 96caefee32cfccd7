"""A place to attend, made by hand: the site that bare tensors describe, and a mechanism's meaning there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .facts import features
from .from_seed import from_seed
from .mechanism import Aux, Mechanism, Param, mechanism
from .memory import room_for
from .primitives.attend_spec import IN_ORDER, AttendSpec, keep_text
from .primitives.tables import Tables
from .refusal import Refused, nearest
from .site import Grid, Site
from .symbols import TRUE, Expr, build, const, name, table
from .tracing import Setting, forward

GridLike = Grid | tuple[int, int] | tuple[int, int, int] | None
_PLACE = "attention"


@dataclass(frozen=True)
class Place:
    """A site with its tensors, made by hand: what raising finds in a graph."""

    site: Site
    spec: AttendSpec
    tables: tuple[Tensor, ...]
    ports: Mapping[str, Tensor]

    def with_port(self, port: str, tensor: Tensor) -> Place:
        return Place(self.site, self.spec, self.tables, {**self.ports, port: tensor})


def stand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ports: Mapping[str, Tensor] = {},
    causal: bool = False,
    scale: float | None = None,
    grid: GridLike = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Place:
    """The site that q, k, v, a mask, a bias and dropout of the weights describe."""
    _check_given(q, k, mask, bias)
    tables = Tables()
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    spec = AttendSpec(
        keep=keep_text(_kept(tables, causal, mask)),
        score=_scored(tables, factor, bias).text,
        after=dropped(tables, _broadcast, dropout, q, k),
    )
    given = {"q": q} | dict(ports) | {"q": q, "k": k, "v": v}  # q comes first: own tensors start in its type
    if mask is not None and mask.ndim == 2:
        given["key_padding"] = mask
    if bias is not None:
        given["bias"] = bias
    pattern = f"{'causal' if causal else 'noncausal'}-{'self' if str(q.shape[2]) == str(k.shape[2]) else 'cross'}"
    site = site_of(spec, {**given, "o": q}, path=_PLACE, pattern=pattern, scale=factor, grid=as_grid(grid))
    return Place(site, spec, tuple(tables.tensors), given)


def site_of(
    spec: AttendSpec, ports: Mapping[str, Tensor], *, path: str, pattern: str, scale: float, **facts: Any
) -> Site:
    """What a spec and the tensors of its ports tell of a site; `facts` are those that they do not tell."""
    q, k, v = ports["q"], ports["k"], ports["v"]
    return Site(
        path=path,
        index=facts.pop("index", 0),
        heads=max(q.shape[1], v.shape[1]),  # queries and keys may be shared by groups of heads with values of their own
        kv_heads=k.shape[1],
        dim=q.shape[3],
        v_dim=v.shape[3],
        scale=scale,
        pattern=pattern,
        mask=spec.keep,
        features=features(spec),
        ports=tuple(ports),
        queries=str(q.shape[2]),
        keys=str(k.shape[2]),
        width=ports["x"].shape[-1] if "x" in ports else 0,
        **facts,
    )


def stand_alone(
    x: Tensor, heads: int = 1, *, causal: bool = False, grid: Grid | None = None, key_padding: Tensor | None = None
) -> Place:
    """The site of a region or an inserted mechanism, which sees nothing but x (B, N, C)."""
    ports = {"x": x} if key_padding is None else {"x": x, "key_padding": key_padding}
    site = replace(
        layer_site(x.shape[2], heads, heads, causal=causal, grid=grid),
        ports=tuple(ports),
        features=frozenset() if key_padding is None else frozenset({"padding"}),
    )
    return Place(site, AttendSpec(score=f"s * {site.scale!r}"), (), ports)


def dropped(tables: Tables, at: Callable[[Tensor], Expr], p: float, q: Tensor, k: Tensor) -> str:
    """What dropout does to the weights; drawn here, because primitives are pure, and looked up by `at`."""
    if not p:
        return ""
    drawn = torch.rand(*q.shape[:3], k.shape[2], device=q.device, dtype=torch.float32)
    kept = build("lt", tables.settle(at(drawn)), 1.0 - p)
    return build("where", kept, build("truediv", name("w"), 1.0 - p) if p < 1.0 else const(0.0), 0.0).text


def layer_site(width: int, heads: int, kv_heads: int, *, causal: bool, grid: Grid | None) -> Site:
    """What is known of a layer's site before it has seen a tensor."""
    size = width // heads
    return Site(
        path="layer",
        index=0,
        heads=heads,
        kv_heads=kv_heads,
        dim=size,
        v_dim=size,
        scale=size**-0.5 if size else 1.0,
        pattern="causal-self" if causal else "noncausal-self",
        grid=grid,
        ports=("q", "k", "v", "o", "x", "x_kv"),
        queries="N",
        keys="N",
        width=width,
    )


def run(chosen: Mechanism, place: Place, params: Mapping[str, Tensor] = {}) -> tuple[Tensor, Aux]:
    """A mechanism's meaning at a place; what it lacks or cannot honour is refused."""
    reason = chosen.refuses(place.site)
    if reason:
        raise Refused(reason, where=str(place.site))
    with room_for(chosen, str(place.site)):
        values = values_at(chosen, place, params)
        return forward(chosen, Setting(place.site, place.spec), values)


def values_at(chosen: Mechanism, place: Place, params: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
    """All tensors that a mechanism reads there, by the names under which a traced piece takes them."""
    own = own_tensors(chosen, place.site, params, like=next(iter(place.ports.values())))
    values = dict(place.ports)
    values |= {f"table_{index}": t for index, t in enumerate(place.tables)}
    return values | {f"param_{own_name}": t for own_name, t in own.items()}


def own_tensors(chosen: Mechanism, site: Site, params: Mapping[str, Tensor], *, like: Tensor) -> dict[str, Tensor]:
    """The mechanism's tensors: those given, checked, and the others as they start."""
    declared = {**chosen.params(site), **chosen.buffers(site)}
    checked: dict[str, Tensor] = {}
    for given, tensor in params.items():
        if given not in declared:
            raise Refused(f"params {given!r}", where=chosen.slug, fits=nearest(given, declared, kind="its params"))
        shape = tuple(declared[given].shape)
        if tuple(tensor.shape) != shape[len(shape) - tensor.ndim :]:
            found = f"params[{given!r}] of shape {tuple(tensor.shape)}"
            raise Refused(found, where=chosen.slug, fits=f"shape {shape}")
        checked[given] = tensor.expand(shape)
    missing = {n: d for n, d in declared.items() if n not in params}
    return {**started(missing, like), **checked}


def started(declared: Mapping[str, Param], like: Tensor) -> dict[str, Tensor]:
    """Tensors as their mechanism wants them to start; random starts are the same at every call."""
    made: dict[str, Tensor] = {}
    with from_seed(0, like.device), torch.no_grad():
        for own_name, one in declared.items():
            if not isinstance(one, Param):
                raise Refused(
                    f"{own_name} is a {type(one).__name__}", where="params", fits="reattend.Param(shape, init)"
                )
            made[own_name] = one.started(like)
    return made


def as_mechanism(slug: str | Mechanism, **knobs: Any) -> Mechanism:
    if isinstance(slug, str):
        return mechanism(slug, **knobs)
    if knobs:
        raise Refused(f"knobs {', '.join(knobs)} beside {slug!r}", fits="its own knobs, or a name with knobs")
    return slug


def as_grid(grid: GridLike) -> Grid | None:
    return grid if grid is None or isinstance(grid, Grid) else Grid(*grid)


def _kept(tables: Tables, causal: bool, mask: Tensor | None) -> Expr:
    keep = IN_ORDER if causal else TRUE
    if mask is None:
        return keep
    seen = table(mask)[name("b"), name("j")] if mask.ndim == 2 else _broadcast(mask)
    return keep & tables.settle(seen != 0)


def _scored(tables: Tables, factor: float, bias: Tensor | None) -> Expr:
    score = name("s") * factor
    return score if bias is None else score + tables.settle(_broadcast(bias))


def _broadcast(tensor: Tensor) -> Expr:
    """A lookup in a tensor of four dimensions; dimensions of size one are not indexed."""
    sizes: Sequence[Any] = tensor.shape
    return table(tensor)[
        tuple(0 if isinstance(s, int) and s == 1 else name(n) for s, n in zip(sizes, "bhij", strict=True))
    ]


def _check_given(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    if mask is not None:
        _check_mask(mask, q, k)
    if bias is not None:
        _check_broadcast("bias", bias, q, k)


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise Refused(f"mask of {mask.dtype}", where=_PLACE, fits="a boolean mask, or bias= for numbers to be added")
    if mask.ndim == 2:
        if tuple(mask.shape) != (q.shape[0], k.shape[2]):
            fits = f"(B, M) = {(q.shape[0], k.shape[2])}, or four dimensions"
            raise Refused(f"mask of shape {tuple(mask.shape)}", where=_PLACE, fits=fits)
    else:
        _check_broadcast("mask", mask, q, k)


def _check_broadcast(what: str, tensor: Tensor, q: Tensor, k: Tensor) -> None:
    full = (*q.shape[:3], k.shape[2])
    if tensor.ndim != 4 or any(s != 1 and s != f for s, f in zip(tensor.shape, full, strict=True)):
        raise Refused(f"{what} of shape {tuple(tensor.shape)}", where=_PLACE, fits=f"broadcastable to {tuple(full)}")
