"""torch.compile of an optimized model: one graph, like the original's, also where its call was never captured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from small_models import stack
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import reattend
from reattend.compiler import hosted
from reattend.compiler.capture import Captured, capture
from reattend.compiler.compiling import BESIDE_A_TRACE
from reattend.compiler.hosted import host
from reattend.compiler.signature import Call

MOH = {"version": 1, "sites": [{"match": "*", "heads": {"moh": {"shared_heads": 2, "routed_heads": 1}}}]}
SIZES: dict[str, Any] = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=60)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def identity(model: nn.Module, call: Call) -> Captured:
    return capture(model, call.args, call.kwargs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if y is None else x + y


@pytest.mark.skipif(not BESIDE_A_TRACE, reason="from torch 2.13 on; before, a call without a graph breaks the trace")
def test_a_call_without_a_graph_gets_one_during_the_trace() -> None:
    model = Net()
    fast = host(model, identity)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for mode in (True, False):
        model.train(mode), fast.train(mode)
        torch.testing.assert_close(compiled(x, y=y), model(x, y=y))
    assert [str(s) for s in fast.signatures] == [
        f"(x: float32 2d, y: float32 2d) {mode} float32" for mode in ("train", "eval")
    ]


def test_new_tensors_of_one_shape_compile_nothing_new() -> None:
    fast = host(Net(), identity)
    fast.prepare(torch.randn(3, 4), torch.randn(3, 4))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, backend=counter, fullgraph=True)
    for _ in range(4):
        compiled(torch.randn(3, 4), torch.randn(3, 4)).sum().backward()
    assert counter.frame_count == 1
    for batch in (5, 6, 7):  # then one more, with the batch open
        compiled(torch.randn(batch, 4), torch.randn(batch, 4))
    assert counter.frame_count == 2


def test_inside_a_larger_function() -> None:
    model = Net()
    fast = host(model, identity)
    x = torch.randn(3, 4)
    fast.prepare(x)
    step = torch.compile(lambda x: fast(x).square().mean(), backend="aot_eager", fullgraph=True)
    loss = step(x)
    loss.backward()
    model(x).square().mean().backward()
    for (name, p), q in zip(fast.named_parameters(), model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_checkpointed_layers_compile_whole() -> None:
    model = Net().train()
    fast = host(model, identity)
    fast.gradient_checkpointing = True  # type: ignore[assignment]
    x = torch.randn(3, 4)
    fast.prepare(x)
    torch.compile(fast, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    model(x).square().mean().backward()
    for p, q in zip(fast.parameters(), model.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_replaced_leaf_is_compiled_next_time() -> None:
    fast = host(Net().eval(), identity)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4)
    fast.prepare(x)
    before = compiled(x)
    fast.layers[1][0] = nn.Sequential(fast.layers[1][0], nn.Identity()).eval()
    fast.layers[1][0][0].weight.data *= 2
    torch.testing.assert_close(compiled(x), fast(x))
    assert not torch.allclose(compiled(x), before)


@pytest.mark.slow
def test_losses_have_gradients_under_compile() -> None:
    fast = reattend.optimize(stack(1), MOH, (torch.randn(2, 6, 32),), measure=False).train()
    x = torch.randn(2, 6, 32)
    losses = []
    for run in (fast, torch.compile(fast, backend="aot_eager", fullgraph=True)):
        fast.zero_grad()
        run(x)
        (loss,) = fast.losses().values()
        loss.backward()
        # a compiled graph gives zeros where eager gives None
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in fast.named_parameters()}
        losses.append((loss.detach(), found))
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0][1]["layers.0.attn.reattend.moh.w_router"].abs().sum() > 0


def llama() -> Any:
    config = hf.LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2, use_cache=False, pad_token_id=0)
    return hf.LlamaForCausalLM(config)


def bert() -> Any:
    return hf.BertModel(hf.BertConfig(**SIZES, num_hidden_layers=1, hidden_dropout_prob=0.0), add_pooling_layer=False)


def vit() -> Any:
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=10)
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def ids() -> Tensor:
    return torch.randint(1, 60, (2, 12))


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "llama": (llama, lambda: {"input_ids": (x := ids()), "labels": x}),
    "bert": (bert, lambda: {"input_ids": ids(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}),
    "vit": (vit, lambda: {"x": torch.randn(2, 3, 32, 32)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_no_graph_breaks_beyond_the_originals(family: str, mode: str) -> None:
    torch.manual_seed(0)
    make, inputs = FAMILIES[family]
    model, given = make().eval(), inputs()
    fast = reattend.optimize(model, "exact", given, measure=False).train(mode == "train")
    other = copy.deepcopy(model).train(mode == "train")
    ours = torch._dynamo.explain(fast)(**given)
    torch._dynamo.reset()
    theirs = torch._dynamo.explain(other)(**given)
    assert (ours.graph_count, ours.graph_break_count) == (1, 0), ours.break_reasons
    assert theirs.graph_break_count == 0


@pytest.mark.parametrize("breaks", [False, True], ids=["prepared by the trace", "at a graph break"])
def test_a_batch_of_one_is_asked_about_once(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace holds for batches of 2 and more; whether for one too is asked, and was asked again at each call of a
    compiled graph that had taken the answer for missing: 2 s a call of a small llama."""
    asked: list[Any] = []
    ask = hosted.operations_at
    monkeypatch.setattr(hosted, "operations_at", lambda *of: asked.append(of) or ask(*of))
    if breaks:
        monkeypatch.setattr(hosted, "make_ready", lambda *call: None)
    model, call = llama(), {"input_ids": torch.randint(0, 50, (1, 8)), "use_cache": False}
    fast = reattend.optimize(model, "exact", call, measure=False)
    compiled = torch.compile(fast, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(**call).logits, model(**call).logits)
    assert len(asked) == 1
