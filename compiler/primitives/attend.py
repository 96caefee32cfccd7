"""`attend`: every form of attention over keys that a query can name by position, in one op.

    o_i = sum_j w_ij v_j,   w_i = normalise_j( score(scale * q_i . k_j, b, h, i, j) )  over the j with keep(b, h, i, j)

The front runs `keep`, `score`, `weight` and `after` on symbols; the op sees q, the key/value segments, the tensors that the
functions look up, and the text. Rows that keep nothing give 0 and a log-sum-exp of -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..refusal import Refused
from ..symbols import FALSE, TRUE, Expr, Table, as_expr, build, name, read
from .attend_meaning import attend_meaning, attend_shapes
from .attend_spec import NORMALISERS, OUTPUTS, AttendSpec
from .operator import Primitive

attend_op = Primitive("attend", ("q", "kv*", "tables*"), attend_meaning, attend_shapes)

Predicate = Callable[..., Any]
_INDICES = {n: name(n) for n in ("b", "h", "i", "j", "N", "M")}


@dataclass(frozen=True)
class Segment:
    """One more source of keys under the same normaliser: its own positions, predicate and score."""

    k: Tensor  # (B, Hkv, M, Dq)
    v: Tensor  # (B, Hkv, M, Dv)
    keep: Predicate | None = None
    score: Predicate | None = None
    positions: Tensor | None = None  # (M,) or (B, M): the logical position j of each row; counts from 0 if absent


def attend(
    q: Tensor,  # (B, H, N, Dq)
    k: Tensor,  # (B, Hkv, M, Dq), H a multiple of Hkv
    v: Tensor,  # (B, Hkv, M, Dv)
    *,
    keep: Predicate | None = None,
    score: Predicate | None = None,
    causal: bool = False,
    scale: float | None = None,
    weight: Predicate | None = None,
    normaliser: str = "softmax",
    eps: float = 0.0,
    sink: Predicate | None = None,
    after: Predicate | None = None,
    segments: Sequence[Segment] = (),
    q_positions: Tensor | None = None,  # (N,) or (B, N)
    k_positions: Tensor | None = None,
    align: str = "start",
    site: Any = None,
    outputs: Sequence[str] = ("o",),
) -> Any:
    """Attention of q over k, v. Returns the output tensor, or a tuple where several `outputs` are asked for.

    keep(b, h, i, j)      which keys a query sees; `causal` adds j <= i.
    score(s, b, h, i, j)  the logit from s = scale * q.k (scale: Dq ** -0.5).
    weight(s)             the unnormalised weight where it is not exp: with normaliser "sum" (divided by its sum + eps) or
                          "none"; "stick" is stick-breaking from the most recent key backwards.
    sink(b, h, i)         the logit of a virtual key whose value is 0.
    after(w, b, h, i, j)  the normalised weight, changed before it meets v.
    align="end"           the last query stands at the last key (decoding): i counts from M - N.
    site                  a live site: what its own score and mask had (causal, padding, bias, softcap, sinks, query
                          offset, scale) is kept, and `keep`, `score` refine it.
    """
    if site is not None:
        return site.attend(q, k, v, keep=keep, score=score, weight=weight, normaliser=normaliser, eps=eps, sink=sink,
                           after=after, segments=segments, outputs=outputs)  # fmt: skip
    tables = Tables()
    scaled = name("s") * (q.shape[-1] ** -0.5 if scale is None else float(scale))
    main = Segment(k, v, keep, score, k_positions)
    parts = [segment_texts(tables, part, scaled, causal) for part in (main, *segments)]
    spec = AttendSpec(
        keep=parts[0][0],
        score=parts[0][1],
        k_positions=parts[0][2],
        more=tuple(parts[1:]),
        q_positions=tables.name_of(q_positions),
        weight=tables.text(weight, {"s": name("s")}, "weight"),
        normaliser=normaliser,
        eps=float(eps),
        sink=tables.text(sink, {n: _INDICES[n] for n in ("b", "h", "i")}, "sink"),
        after=tables.text(after, {"w": name("w"), **_INDICES}, "after"),
        align=align,
        outputs=tuple(outputs),
    )
    kv = [t for part in (main, *segments) for t in (part.k, part.v)]
    return run(q, kv, tables.tensors, spec)


def run(q: Tensor, kv: Sequence[Tensor], tables: Sequence[Tensor], spec: AttendSpec) -> Any:
    """The op itself on a ready spec, shapes checked."""
    _check(q, kv, spec)
    results = attend_op(q, list(kv), list(tables), spec.text)
    return results[0] if len(spec.outputs) == 1 else tuple(results)


class Tables:
    """The tensors that a spec's texts look up, named t0, t1, ... in order of first use."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = list(tensors)

    def name_of(self, tensor: Tensor | None) -> str:
        if tensor is None:
            return ""
        for index, known in enumerate(self.tensors):
            if known is tensor:
                return f"t{index}"
        self.tensors.append(tensor)
        return f"t{len(self.tensors) - 1}"

    def settle(self, e: Expr) -> Expr:
        """The expression with its live tables replaced by their names here."""
        if e.op == "lookup":
            which = self.name_of(e.args[0].tensor) if isinstance(e.args[0], Table) else e.args[0]
            return Expr("lookup", (which, *(self.settle(a) for a in e.args[1:])))
        if e.op in ("name", "const"):
            return e
        return build(e.op, *(self.settle(a) for a in e.args))

    def text(self, function: Predicate | None, known: dict[str, Expr], what: str) -> str:
        return "" if function is None else self.settle(read(function, known, what=what)).text


def segment_texts(tables: Tables, part: Segment, scaled: Expr, causal: bool) -> tuple[str, str, str]:
    keep = TRUE if part.keep is None else read(part.keep, _INDICES, what="keep")
    if causal:
        keep = keep & (_INDICES["j"] <= _INDICES["i"])
    score = scaled if part.score is None else read(part.score, {"s": scaled, **_INDICES}, what="score")
    return _predicate(tables.settle(as_expr(keep))), tables.settle(as_expr(score)).text, tables.name_of(part.positions)


def _predicate(keep: Expr) -> str:
    if keep.text == FALSE.text:
        raise Refused("a predicate that keeps no key", where="attend")
    return "" if keep.text == TRUE.text else keep.text


def _check(q: Tensor, kv: Sequence[Tensor], spec: AttendSpec) -> None:
    heads, dim = q.shape[1], q.shape[-1]
    if q.ndim != 4 or any(t.ndim != 4 for t in kv):
        raise Refused(
            f"q of {q.ndim} and k, v of {[t.ndim for t in kv]} dimensions", where="attend", fits="(B, H, N, D)"
        )
    for k, v in zip(kv[::2], kv[1::2], strict=True):
        if k.shape[-1] != dim:
            raise Refused(f"q has D={dim}, k has D={k.shape[-1]}", where="attend", fits="equal dimensions of q and k")
        if heads % k.shape[1] or k.shape[1] != v.shape[1]:
            found = f"{heads} heads, {k.shape[1]} key and {v.shape[1]} value heads"
            raise Refused(found, where="attend", fits="heads must be a multiple of kv_heads")
    if spec.normaliser not in NORMALISERS:
        raise Refused(f"normaliser {spec.normaliser!r}", where="attend", fits=f"one of {', '.join(NORMALISERS)}")
    unknown = [o for o in spec.outputs if o not in OUTPUTS]
    if unknown:
        raise Refused(f"outputs {unknown}", where="attend", fits=f"some of {', '.join(OUTPUTS)}")
