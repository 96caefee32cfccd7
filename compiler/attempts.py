"""Ways to export one call, from every open dimension to none: example tensors, and which of their sizes stay open."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .containers import Leaf, copied
from .refusal import Refused
from .signature import Call
from .untouched import unchanged

# set while a call is captured whose sizes of 0 and 1 make the model compute something else than larger ones do
AS_GIVEN: ContextVar[bool] = ContextVar("AS_GIVEN", default=False)
_KEPT = ("past", "cache")  # in the names of arguments that are keys and values of earlier calls, as plain tensors
_QUERIES, _PAST = 3, 10  # sizes of a decoder's example call: none of them 0 or 1, which torch.export takes as constants


@dataclass(frozen=True)
class Attempt:
    """One way to export: the example's tensors and which of their dimensions are left open."""

    tensors: tuple[Tensor, ...]
    open: tuple[frozenset[int], ...]


def filled(model: nn.Module, call: Call) -> tuple[Tensor, ...]:
    """The call's tensors; a cache that is empty is filled by one run, to learn its shapes."""
    if AS_GIVEN.get():
        return _as_given(model, call)
    if not any(leaf.cached for leaf in call.leaves):
        return call.tensors  # type: ignore[return-value]
    if any(leaf.path.endswith(".cumulative_length") for leaf in call.leaves):
        fits = "past_key_values=DynamicCache(), whose layers keep everything: the window is in the mask as well"
        raise Refused("a cache whose layers keep a sliding window", where="past_key_values", fits=fits)
    leaves = call.leaves
    if any(leaf.tensor is None for leaf in leaves):
        leaves = _after_one_run(model, call)
    if any(_crosses(leaf) for leaf in leaves):
        return tuple(_resized_decoder(leaf, ours) for leaf, ours in zip(leaves, call.leaves, strict=True))
    batch, queries, past = _decoder_sizes(call)
    lengths = [_length(leaf) for leaf in call.leaves]
    return tuple(_resized(leaf, n - past, batch, queries, past) for leaf, n in zip(leaves, lengths, strict=True))


def _as_given(model: nn.Module, call: Call) -> tuple[Tensor, ...]:
    """The call's own sizes, a cache that is empty with length 0."""
    if all(t is not None for t in call.tensors):
        return call.tensors  # type: ignore[return-value]
    shown = (after.tensor for after in _after_one_run(model, call))
    return tuple(t if t is not None else s[:, :, :0] for t, s in zip(call.tensors, shown, strict=True))  # type: ignore[index]


def _after_one_run(model: nn.Module, call: Call) -> tuple[Leaf, ...]:
    """The call's tensors after a run; what stays empty, as other layers' in a part of a model, is as what does not."""
    args, kwargs = copied((call.args, dict(call.kwargs)))
    with torch.no_grad(), unchanged(model):
        model(*args, **kwargs)
    after = Call.of(call.signature, args, kwargs)
    if len(after.leaves) != len(call.leaves):
        raise Refused("a cache without layers", where="past_key_values", fits="DynamicCache(config=model.config)")
    shown = {leaf.path.rpartition(".")[2]: leaf.tensor for leaf in after.leaves if leaf.cached and _length(leaf)}
    for leaf in after.leaves:
        if leaf.tensor is None and leaf.path.rpartition(".")[2] not in shown:
            raise Refused("a cache that stays empty", where=leaf.path, fits="use_cache=False, also in generate")
    return tuple(
        leaf if leaf.tensor is not None else replace(leaf, tensor=shown[leaf.path.rpartition(".")[2]])
        for leaf in after.leaves
    )


def _decoder_sizes(call: Call) -> tuple[int, int, int]:
    first = of_tokens([leaf.tensor for leaf in call.leaves if not leaf.cached and leaf.tensor is not None])
    return first.shape[0], first.shape[1], min(_length(leaf) for leaf in call.leaves if leaf.path.endswith(".keys"))


def of_tokens(tensors: Sequence[Tensor]) -> Tensor:
    """The first that has a batch and tokens as its first two sizes."""
    found = [t for t in tensors if t.ndim > 1]
    return next((t for t in found if not _on_axes(t)), found[0])


def _on_axes(tensor: Tensor) -> bool:
    """Whole numbers in three dimensions: positions of tokens along several axes (axes, B, N)."""
    return tensor.ndim == 3 and not tensor.is_floating_point() and tensor.dtype != torch.bool


def _length(leaf: Leaf) -> int:
    """How many rows a part of a cache holds: a part of a model finds the layers before it one call ahead."""
    return leaf.tensor.shape[2] if leaf.cached and leaf.tensor is not None and leaf.tensor.ndim == 4 else 0


def _crosses(leaf: Leaf) -> bool:
    """Keys and values of the encoder's answer: written at the first call, of length 0 before."""
    return leaf.cached and ".cross_attention_cache." in leaf.path


def _resized_decoder(leaf: Leaf, ours: Leaf) -> Tensor:
    """In an encoder-decoder only what belongs to the decoder grows."""
    tensor = leaf.tensor
    assert tensor is not None
    sizes = list(tensor.shape)
    if leaf.cached:
        sizes[2] = _PAST if not _crosses(leaf) else sizes[2] if ours.tensor is not None else 0
    elif leaf.path.startswith("decoder_") and len(sizes) > 1:
        sizes[1] = _QUERIES + _PAST if "mask" in leaf.path else _QUERIES
    return tensor if sizes == list(tensor.shape) else torch.ones(sizes, dtype=tensor.dtype, device=tensor.device)


def _resized(leaf: Leaf, ahead: int, batch: int, queries: int, past: int) -> Tensor:
    tensor = leaf.tensor
    assert tensor is not None
    sizes = list(tensor.shape)
    if leaf.cached:
        sizes[0], sizes[2] = 2, _PAST + _QUERIES if ahead else _PAST
        return torch.zeros(sizes, dtype=tensor.dtype, device=tensor.device)
    if _on_axes(tensor) and sizes[1:] == [batch, queries]:
        return torch.ones([sizes[0], 2, _QUERIES], dtype=tensor.dtype, device=tensor.device)
    if sizes and sizes[0] == batch:
        sizes[0] = 2
    keys_too = "mask" in leaf.path
    for dim in range(1, len(sizes)):
        if sizes[dim] == queries + past and (past or (keys_too and dim == len(sizes) - 1)):
            sizes[dim] = _QUERIES + _PAST
        elif sizes[dim] == queries and dim < max(2, len(sizes) - 1):
            sizes[dim] = _QUERIES
    return torch.ones(sizes, dtype=tensor.dtype, device=tensor.device)


def attempts(call: Call, example: tuple[Tensor, ...]) -> list[Attempt]:
    """From everything open to nothing; sizes of 1 doubled first, since torch.export takes them as constants."""
    pairs = [_over_pairs(k, call, example) for k in range(len(example))]
    opened = [p or _open(leaf, t) for leaf, t, p in zip(call.leaves, example, pairs, strict=True)]
    matrix = [bool(p) and t.ndim == 2 for t, p in zip(example, pairs, strict=True)]  # whose first size is no batch
    batched = [0 in o and not leaf.cached and not m for leaf, o, m in zip(call.leaves, opened, matrix, strict=True)]
    both = _without_broadcast(example, opened, batched)
    batch = tuple(o & {0} for o in both)
    as_given = AS_GIVEN.get()
    doubled = example if as_given else _doubled(example, both)
    batches = example if as_given else _doubled(example, batch)
    ways = [Attempt(doubled, both), Attempt(batches, both), Attempt(batches, batch)]
    ways = [w for k, w in enumerate(ways) if not any(_alike(w, before) for before in ways[:k])]
    return [*ways, Attempt(example, (frozenset(),) * len(example))]


def _without_broadcast(
    example: tuple[Tensor, ...], opened: list[frozenset[int]], asked: list[bool]
) -> tuple[frozenset[int], ...]:
    """A first size of 1 beside larger ones is said for all rows of a batch: it stays 1 where the batch is open."""
    if all(t.shape[0] <= 1 for t, first in zip(example, asked, strict=True) if first):
        return tuple(opened)
    alone = [first and t.shape[0] == 1 for t, first in zip(example, asked, strict=True)]
    return tuple(o - {0} if one else o for o, one in zip(opened, alone, strict=True))


def _over_pairs(k: int, call: Call, example: tuple[Tensor, ...]) -> frozenset[int]:
    """The open sizes of a mask or bias over queries and keys, whatever it is called: two lengths of other tensors."""
    tensor, path = example[k], call.leaves[k].path
    if call.leaves[k].cached or not 2 <= tensor.ndim <= 4:
        return frozenset()
    others = [t for n, t in enumerate(example) if n != k and not call.leaves[n].cached]
    hidden = [t for t in others if t.ndim == 3 and t.is_floating_point() and t.shape[1] != t.shape[2]]
    lengths = {t.shape[1] for t in hidden} | {t.shape[1] for t in others if t.ndim == 2 and not t.is_floating_point()}
    named = any(word in path for word in ("mask", "bias"))
    sure = tensor.dtype == torch.bool or named or (tensor.ndim < 4 and bool(hidden))
    if not sure or not set(tensor.shape[-2:]) <= lengths:
        return frozenset()
    return frozenset({0, tensor.ndim - 2, tensor.ndim - 1})


def _alike(one: Attempt, other: Attempt) -> bool:
    return one.open == other.open and all(a.shape == b.shape for a, b in zip(one.tensors, other.tensors))


def _open(leaf: Leaf, tensor: Tensor) -> frozenset[int]:
    if not tensor.ndim:
        return frozenset()
    if leaf.cached:
        return frozenset({0, 2} if tensor.ndim == 4 and tensor.shape[2] else {0})
    whole = not tensor.is_floating_point()
    if tensor.ndim == 4 and "mask" in leaf.path:
        return frozenset({0, 2, 3})
    if tensor.ndim == 4 and any(word in leaf.path for word in _KEPT):
        return frozenset({0, 1, 2})  # (B, H, N, D) or (B, N, H, D): the model itself fixes its heads
    if _on_axes(tensor):
        return frozenset({0, 1, 2})
    sequence = tensor.ndim >= 2 and (whole or tensor.ndim == 3 or (tensor.ndim == 2 and "mask" in leaf.path))
    return frozenset({0, 1} if sequence else {0})


def _doubled(example: tuple[Tensor, ...], opened: tuple[frozenset[int], ...]) -> tuple[Tensor, ...]:
    def double(tensor: Tensor, dims: frozenset[int]) -> Tensor:
        times = [2 if d in dims and size == 1 else 1 for d, size in enumerate(tensor.shape)]
        return tensor.repeat(times) if 2 in times else tensor

    return tuple(double(t, o) for t, o in zip(example, opened))
