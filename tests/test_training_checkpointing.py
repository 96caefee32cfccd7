"""Gradient checkpointing of an optimized model: the same losses and gradients, and much less kept for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers as hf
from small_models import stack
from torch import Tensor, nn

import reattend
from reattend.compiler.capture import Captured, capture
from reattend.compiler.checkpointing import run_graph
from reattend.compiler.hosted import host
from reattend.compiler.refusal import Refused
from reattend.compiler.signature import Call

# transformers 5 renames its switch; both names must work
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
LINEAR = {"version": 1, "sites": [{"match": "*", "attention": "linear"}]}


def identity(model: nn.Module, call: Call) -> Captured:
    return capture(model, call.args, call.kwargs)


def llama() -> Any:
    torch.manual_seed(0)
    config = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=60)
    config |= dict(num_hidden_layers=3, use_cache=False, attention_dropout=0.1, pad_token_id=0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config)).eval()


def step(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss and gradients of one call, and the bytes of the tensors that it kept, weights aside."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    alive = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor.untyped_storage())
        if alive[-1]._cdata not in own:
            kept[alive[-1]._cdata] = alive[-1].nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = model(*args, **kwargs)
        loss = answer.loss if hasattr(answer, "loss") else answer.square().mean()
    loss.backward()
    return (
        loss.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        sum(kept.values()),
    )


def test_layers_of_a_llama_are_run_again_dropout_included() -> None:
    model, x = llama(), torch.randint(1, 60, (2, 24))
    fast = reattend.optimize(model, "exact", {"input_ids": x}, measure=False).train()
    loss, gradients, whole = step(fast, x, labels=x)
    fast.gradient_checkpointing_enable()
    again, others, less = step(fast, x, labels=x)
    assert torch.equal(loss, again) and gradients.keys() == others.keys()
    torch.testing.assert_close(others, gradients)
    assert less < 0.2 * whole
    model.train().gradient_checkpointing_enable()
    assert less < 1.2 * step(model, x, labels=x)[2]  # what the original keeps, checkpointed
    assert model.is_activation_checkpointing and fast.is_activation_checkpointing
    fast.gradient_checkpointing_disable()
    assert step(fast, x, labels=x)[2] > 0.8 * whole
    assert len(fast.signatures) == 2


def test_tracing_with_the_flag_set_is_tracing_without_it() -> None:
    model, x = llama().train(), torch.randint(1, 60, (2, 24))
    model.gradient_checkpointing_enable()
    fast = host(model, identity)
    _, gradients, less = step(fast, x, labels=x)
    assert model.is_activation_checkpointing
    fast.gradient_checkpointing_disable()
    _, others, whole = step(fast, x, labels=x)
    torch.testing.assert_close(others, gradients)
    assert less < 0.2 * whole


def test_blocks_of_a_timm_model_with_new_parameters() -> None:
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=10)
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    fast = reattend.optimize(model, LINEAR, (x,), measure=False).train()
    loss, gradients, whole = step(fast, x)
    fast.set_grad_checkpointing(True)
    again, others, less = step(fast, x)
    assert torch.equal(loss, again) and less < 0.35 * whole
    torch.testing.assert_close(others, gradients)


def test_an_evaluation_is_not_cut() -> None:
    model, x = stack(), torch.randn(2, 6, 32)
    model.gradient_checkpointing = True  # type: ignore[assignment]
    fast = host(model, identity)
    fast(x)
    assert "cuts" not in fast.graph.meta
    fast.train()
    fast(x)
    assert [piece.path for cut in fast.graph.meta["cuts"].values() for piece in cut.pieces if piece.path] == [
        "layers.0", "layers.1", "layers.2"
    ]  # fmt: skip


class Twisted(nn.Module):
    """Two layers, each called twice in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return x


def test_a_layer_called_twice_is_two_pieces() -> None:
    model, x = Twisted().train(), torch.randn(3, 4)
    fast = host(model, identity)
    _, gradients, _ = step(fast, x)
    fast.gradient_checkpointing = True  # type: ignore[assignment]
    _, others, _ = step(fast, x)
    torch.testing.assert_close(others, gradients)


def test_layers_that_are_computed_in_turns_are_refused() -> None:
    fast = host(stack(2), identity).train()
    x = torch.randn(2, 6, 32)
    fast(x)
    nodes = [n for n in fast.graph.graph.nodes if n.op == "call_module"]
    nodes[0].meta["nn_module_stack"] = nodes[-1].meta["nn_module_stack"]  # the first linear as if of the last layer
    fast.gradient_checkpointing = True
    with pytest.raises(Refused, match=r"layers\.1 and layers\.0 are computed in turns"):
        run_graph(fast.graph, fast, (x,))
