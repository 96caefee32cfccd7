"""Calls are normalised: equal keys exactly where one graph serves both."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from reattend.compiler.containers import put_together, take_apart
from reattend.compiler.refusal import Refused
from reattend.compiler.signature import Call, SignatureKey, rebuild


def forward(x: Any, mask: Any = None, *rest: Any, scale: float = 1.0, **extra: Any) -> None: ...


def key(*args: Any, **kwargs: Any) -> SignatureKey:
    return Call.of(inspect.signature(forward), args, kwargs).key()


X = torch.zeros(2, 3)


def test_positional_and_keyword_use_are_one_signature() -> None:
    assert key(X, X) == key(X, mask=X) == key(mask=X, x=X)


def test_defaults_and_absent_arguments_are_one_signature() -> None:
    assert key(X) == key(X, mask=None) == key(X, scale=1.0) == key(X, other=None)


def test_sizes_do_not_matter_but_rank_dtype_constants_and_names_do() -> None:
    assert key(X) == key(torch.zeros(5, 7))
    different = [key(X), key(torch.zeros(2)), key(X.double()), key(X, X), key(X, scale=2.0), key(X, flag=True)]
    assert len(set(different)) == len(different)


def test_batches_that_go_apart_are_another_signature() -> None:
    assert key(X, torch.zeros(2, 4)) != key(X, torch.zeros(3, 4))
    assert key(X, torch.zeros(3, 4)) == key(X, torch.zeros(4, 4))


def test_keys_print() -> None:
    printed = str(key({"a": X, "b": [X, 3]}, X.long(), flag=True))
    assert printed == "(x: {a: tensor, b: [tensor, 3]}, mask: int64 2d, flag=True)"


def test_unknown_arguments_are_refused_with_the_signature() -> None:
    def strict(x: Any) -> None: ...

    with pytest.raises(Refused, match=r"unexpected keyword argument 'y'.*forward\(x"):
        Call.of(inspect.signature(strict), (X,), {"y": X})


def test_what_is_no_constant_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="mask: a set"):
        key(X, {1, 2})


@dataclass
class Pair:
    left: Any
    right: Any = None


@pytest.mark.parametrize(
    "value",
    [X, (X, [X, 1]), {"a": X, "b": {"c": (X,)}}, Pair(X, 3), [Pair(X, (X, None))], torch.Size([1, 2]), None],
    ids=repr,
)
def test_values_come_apart_and_together(value: Any) -> None:
    leaves, layout = take_apart(value, "v")
    assert layout.count == len(leaves)
    again, same = take_apart(put_together(layout, [leaf.tensor for leaf in leaves]), "v")
    assert same == layout
    assert [a.tensor is b.tensor for a, b in zip(again, leaves)] == [True] * len(leaves)


def test_an_empty_cache_has_the_key_of_a_filled_one() -> None:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=16)
    empty, filled = DynamicCache(config=config), DynamicCache(config=config)
    for layer in range(2):
        filled.update(torch.zeros(2, 4, 5, 4), torch.zeros(2, 4, 5, 4), layer)
    calls = [Call.of(inspect.signature(forward), (X,), {"past": cache}) for cache in (empty, filled)]
    assert calls[0].key() == calls[1].key()
    assert calls[0].tensors[1:] == (None,) * 4
    assert calls[1].leaves[1].path == "past.layers.0.keys"


def test_a_call_is_rebuilt_around_other_tensors() -> None:
    call = Call.of(inspect.signature(forward), (X, X, X), {"scale": 2.0, "flag": True})
    _, args, kwargs = rebuild(call.signature, call.layouts, [X + 1, X + 2, X + 3])
    assert [float(a[0, 0]) for a in args] == [1.0, 2.0, 3.0]
    assert kwargs == {"scale": 2.0, "flag": True}
