"""Moving windows against loops over all pairs: shifts, odd sides, masked wraps, a shift that is set between calls."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

import reattend
from reattend.compiler.functional import attention, attention_and_aux
from reattend.compiler.problem import problem


def written_out(
    q: Tensor, k: Tensor, v: Tensor, h: int, w: int, counts: tuple[int, int], index: int, apart: bool
) -> Tensor:
    q, k, v = (t.double() for t in (q, k, v))
    wh, ww = -(-h // counts[0]), -(-w // counts[1])
    sh, sw = wh // 4 * index, ww // 4 * index

    def window(i: int) -> tuple[object, ...]:
        y, x = (i // w - sh) % h, (i % w - sw) % w
        around = (y + sh >= h, x + sw >= w) if apart else ()
        return y // wh, x // ww, around

    o = torch.zeros_like(q)
    for i in range(h * w):
        seen = [j for j in range(h * w) if window(j) == window(i)]
        o[:, :, i : i + 1] = (q[:, :, i : i + 1] @ k[:, :, seen].mT * q.shape[3] ** -0.5).softmax(-1) @ v[:, :, seen]
    return o


@pytest.mark.parametrize(("h", "w", "counts"), [(8, 8, (2, 2)), (8, 16, (2, 2)), (9, 7, (2, 2)), (8, 12, (1, 3))])
@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_written_out(h: int, w: int, counts: tuple[int, int], index: int, apart: bool) -> None:
    q, k, v = problem(h * w)
    got = attention(q, k, v, "msw_msa", grid=(h, w), windows=counts, shift_index=index, mask_wrapped=apart)
    assert torch.allclose(got.double(), written_out(q, k, v, h, w, counts, index, apart), atol=1e-5)


def test_a_random_shift_is_one_of_four() -> None:
    q, k, v = problem(64)
    four = [attention(q, k, v, "msw_msa", grid=(8, 8), shift_index=n) for n in range(4)]
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        got = attention(q, k, v, "msw_msa", grid=(8, 8), shift_policy="random")
        seen.add([torch.allclose(got, one, atol=1e-6) for one in four].index(True))
    assert len(seen) > 1


def test_a_cycle_goes_on_by_one() -> None:
    q, k, v = problem(64)
    _, aux = attention_and_aux(q, k, v, "msw_msa", grid=(8, 8), shift_policy="cycle", shift_index=3)
    assert int(aux.buffers["shift_index"]) == 0


def test_the_shift_is_set_between_calls_of_one_graph() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "class_token": False}
    model = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **sizes).eval()
    x = torch.randn(2, 3, 64, 64)

    def swapped(index: int) -> torch.nn.Module:
        recipe = {"version": 1, "sites": [{"match": "*", "attention": {"msw_msa": {"shift_index": index}}}]}
        return reattend.optimize(model, recipe, x, measure=False)

    fast, moved = swapped(0), swapped(2)
    assert not torch.allclose(fast(x), moved(x), atol=1e-5)
    (name,) = [name for name, _ in fast.named_buffers() if name.endswith("shift_index")]
    fast.get_buffer(name).fill_(2)
    assert torch.allclose(fast(x), moved(x), atol=1e-6)
    fast(x).square().sum().backward()
