"""`scan`: attention whose keys are summed into a state, so that a row costs the same however many came before it.

    S_t = a_t * S_{t-1} + phi(k_t) v_t^T,   o_t = phi(q_t)^T S_t        (a_t over the rows of S: one number or D)

With normaliser "sum" o_t is divided by phi(q_t) . z_t + eps, z_t being the same recurrence over phi(k_t) alone; it
travels as one more column of the state. Noncausal rows all read the last state. Fewer queries than keys, when causal,
are those of the last rows: what a cache holds comes in front of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..refusal import Refused, nearest
from ..symbols import name
from .operator import Primitive
from .scan_meaning import scan_meaning, scan_shapes
from .scan_spec import NORMALISERS, OUTPUTS, READS, ScanSpec
from .tables import Tables

scan_op = Primitive("scan", ("q", "kv*", "tables*"), scan_meaning, scan_shapes)

Feature = Callable[[Any], Any]


def scan(
    q: Tensor,  # (B, H, N, D)
    k: Tensor,  # (B, Hkv, M, D), H a multiple of Hkv
    v: Tensor,  # (B, Hkv, M, Dv)
    *,
    causal: bool = True,
    feature: Feature | tuple[Feature | None, Feature | None] | None = None,
    decay: Tensor | None = None,
    log_decay: Tensor | None = None,
    normaliser: str = "none",
    eps: float = 0.0,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    state: Tensor | None = None,
    read: str = "after",
    outputs: Sequence[str] = ("o",),
) -> Any:
    """Returns the output rows, or a tuple where several `outputs` (o, state, norm) are asked for.

    feature(x)        phi, elementwise, on q and k alike; a pair (of q, of k) where they differ. Maps that mix channels
                      are applied before.
    decay             the factors a_t: (H,) or (H, D) for all rows, (B, H, N) or (B, H, N, D) row by row.
    log_decay         the same as logarithms, better for factors near 1.
    reset             ids of documents (N,) or (B, N): the state starts at 0 where they change; a given `state` is
                      that of the first document. Noncausal rows read the state of their document.
    valid             (M,) or (B, M): a row that is not valid leaves the state as it is.
    state             where to start: the `state` output of the rows before.
    read="before"     o_t is read before its own row is added (and before a_t is applied).
    """
    _check(q, k, v, causal, normaliser, read, outputs)
    given = _one_decay(decay, log_decay, causal)
    ahead = k.shape[2] - q.shape[2] if causal and q.shape[2] != k.shape[2] else None
    if ahead is not None:
        q = pad(q, (0, 0, ahead, 0))  # the past has no queries: what these rows read is left out
    tables = Tables()
    features = feature if isinstance(feature, tuple) else (feature, feature)
    spec = ScanSpec(
        causal=causal,
        feature_q=tables.text(features[0], {"x": name("x")}, "feature"),
        feature_k=tables.text(features[1], {"x": name("x")}, "feature"),
        decay=tables.name_of(None if given is None else _as_rows(given, q, k)),
        log_decay=log_decay is not None,
        normaliser=normaliser,
        eps=float(eps),
        documents=tables.name_of(_by_row(reset, k, "reset")),
        valid=tables.name_of(_by_row(valid, k, "valid")),
        state=tables.name_of(_start(state, q, v, normaliser)),
        read=read,
        outputs=tuple(outputs),
    )
    results = scan_op(q, [k, v], tables.tensors, spec.text)
    if ahead is not None:
        results = [t if which == "state" else t[:, :, ahead:] for which, t in zip(spec.outputs, results, strict=True)]
    return results[0] if len(spec.outputs) == 1 else tuple(results)


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, **how: Any) -> tuple[Tensor, Tensor]:
    """The next row or rows after a state: (output, new state). `how` as in `scan`."""
    o, after = scan(q, k, v, state=state, outputs=("o", "state"), **how)
    return o, after


def _one_decay(decay: Tensor | None, log_decay: Tensor | None, causal: bool) -> Tensor | None:
    if decay is not None and log_decay is not None:
        raise Refused("decay and log_decay", where="scan", fits="one of them")
    given = decay if log_decay is None else log_decay
    if given is not None and not causal:
        raise Refused("a decay without an order of the rows", where="scan", fits="causal=True")
    return given


def _as_rows(decay: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A decay of any accepted form as (B|1, H|Hkv|1, N|1, D|1)."""
    match decay.ndim:
        case 1:
            rows = decay[None, :, None, None]
        case 2:
            rows = decay[None, :, None, :]
        case 3:
            rows = decay[..., None]
        case 4:
            rows = decay
        case _:
            fits = "(H,), (H, D), (B, H, N), (B, H, N, D)"
            raise Refused(f"a decay of {decay.ndim} dimensions", where="scan", fits=fits)
    heads, width = rows.shape[1], rows.shape[3]
    if decay.ndim > 2 and rows.shape[2] != 1 and rows.shape[2] != k.shape[2]:
        fits = "one of every key's row; rows before these come as `state`"
        raise Refused(f"a decay of {rows.shape[2]} rows, {k.shape[2]} keys", where="scan", fits=fits)
    if heads not in (1, k.shape[1], q.shape[1]) or width not in (1, q.shape[-1]):
        found = f"a decay of shape {tuple(decay.shape)}"
        raise Refused(found, where="scan", fits=f"H = {q.shape[1]} or {k.shape[1]}, D = {q.shape[-1]}")
    return rows


def _by_row(ids: Tensor | None, k: Tensor, what: str) -> Tensor | None:
    if ids is None:
        return None
    if ids.ndim not in (1, 2) or ids.shape[-1] != k.shape[2]:
        raise Refused(f"{what} of shape {tuple(ids.shape)}", where="scan", fits=f"(N,) or (B, N), N = {k.shape[2]}")
    return ids


def _start(state: Tensor | None, q: Tensor, v: Tensor, normaliser: str) -> Tensor | None:
    if state is None:
        return None
    width = v.shape[-1] + (normaliser == "sum")
    if state.ndim != 4 or state.shape[1:] != (q.shape[1], q.shape[-1], width):
        fits = f"(B, {q.shape[1]}, {q.shape[-1]}, {width})"
        raise Refused(f"a state of shape {tuple(state.shape)}", where="scan", fits=fits)
    return state


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, normaliser: str, read: str, outputs: Sequence[str]) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise Refused(f"q, k, v of {q.ndim}, {k.ndim}, {v.ndim} dimensions", where="scan", fits="(B, H, N, D)")
    if q.shape[0] != k.shape[0] and k.shape[0] != 1:
        fits = f"{q.shape[0]} or 1"
        raise Refused(f"q of a batch of {q.shape[0]}, keys of {k.shape[0]}", where="scan", fits=fits)
    if q.shape[-1] != k.shape[-1]:
        raise Refused(f"q has D={q.shape[-1]}, k has D={k.shape[-1]}", where="scan", fits="equal dimensions")
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        found = f"{q.shape[1]} heads, {k.shape[1]} key and {v.shape[1]} value heads"
        raise Refused(found, where="scan", fits="heads must be a multiple of kv_heads")
    if k.shape[2] != v.shape[2]:
        raise Refused(f"{k.shape[2]} keys, {v.shape[2]} values", where="scan", fits="as many of both")
    if causal and q.shape[2] > k.shape[2]:
        fits = "at most as many queries as keys when causal; rows before these come as `state`"
        raise Refused(f"{q.shape[2]} queries, {k.shape[2]} keys", where="scan", fits=fits)
    for value, known, kind in ((normaliser, NORMALISERS, "normaliser"), (read, READS, "read")):
        if value not in known:
            raise Refused(f"{kind} {value!r}", where="scan", fits=nearest(value, known))
    if not causal and read != "after":
        raise Refused(f"read={read!r} without an order of the rows", where="scan", fits="causal=True")
    for which in outputs:
        if which not in OUTPUTS:
            raise Refused(f"output {which!r}", where="scan", fits=nearest(which, OUTPUTS))
