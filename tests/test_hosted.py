"""A hosted model is the user's model: class, names, weights, hooks and modes, with captured graphs inside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from hosted_models import CONFIG, Net, identity, ids, llama, unchanged, weights
from torch import Tensor, nn

import reattend
from reattend.compiler.capture import Captured, capture
from reattend.compiler.giving_way import ours
from reattend.compiler.hosted import host
from reattend.compiler.hosting import is_hosted, original
from reattend.compiler.refusal import Refused
from reattend.compiler.signature import Call


def test_it_is_still_the_users_class() -> None:
    model = llama()
    fast = host(model, identity)
    assert isinstance(fast, hf.LlamaForCausalLM) and is_hosted(fast) and not is_hosted(model)
    assert type(fast).__name__ == "LlamaForCausalLM" and type(fast).__module__ == type(model).__module__
    assert list(fast.state_dict()) == list(model.state_dict())
    x = ids(2, 5)
    answer, expected = fast(x, labels=x), model(x, labels=x)
    assert type(answer) is type(expected)
    torch.testing.assert_close(answer.loss, expected.loss)
    torch.testing.assert_close(answer.logits, expected.logits)
    assert list(fast.state_dict()) == list(model.state_dict())


def test_leaf_modules_are_called_under_their_own_paths() -> None:
    fast = host(llama(), identity)
    fast(ids(2, 5))
    calls = {n.target for n in fast.graph.graph.find_nodes(op="call_module")}
    linears = {n for n, m in fast.named_modules() if isinstance(m, nn.Linear)}
    assert linears <= calls and {"model.embed_tokens", "model.norm", "lm_head"} <= calls
    assert not [n for n in fast.graph.graph.nodes if "linear" in str(n.target)]
    assert fast.graph.get_submodule("lm_head") is fast.lm_head


def test_a_gpt2_convolution_of_one_is_a_leaf_too() -> None:
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=60, bos_token_id=0, eos_token_id=0)
    model = hf.GPT2Model(config).eval()
    fast = host(model, identity)
    x = ids(2, 5)
    torch.testing.assert_close(fast(x)[0], model(x)[0])
    assert "h.0.attn.c_attn" in {n.target for n in fast.graph.graph.find_nodes(op="call_module")}


def test_a_leaf_replaced_later_is_used_at_the_next_call() -> None:
    model = llama()
    fast = host(model, identity)
    x = ids(2, 5)
    before = fast(x).logits
    fast.lm_head = nn.Sequential(fast.lm_head, nn.Softmax(-1))
    torch.testing.assert_close(fast(x).logits, before.softmax(-1))
    torch.testing.assert_close(model(x).logits, before)


def test_hooks_of_leaves_and_of_the_root_fire() -> None:
    model = llama()
    seen: list[str] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, o: seen.append("before hosting"))
    fast = host(model, identity)
    fast.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, o: seen.append("leaf"))
    fast.register_forward_hook(lambda m, a, o: seen.append("root"))
    fast(ids(2, 5))
    seen.clear()
    fast(ids(2, 5))
    assert seen == ["leaf", "before hosting", "root"]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_that_cannot_fire_is_refused_by_name(kind: str) -> None:
    fast = host(llama(), identity)
    x = ids(2, 5)
    before = fast(x).logits
    handle = getattr(fast.model.layers[0].mlp, f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(Refused, match=r"hook was added to model\.layers\.0\.mlp, and the graph does not call it"):
        fast(x)
    handle.remove()
    torch.testing.assert_close(fast(x).logits, before)


def test_a_hook_that_was_there_is_traced_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, o: o * 2)
    model.lm_head.register_forward_hook(lambda m, a, o: o + 1)
    fast = host(model, identity)
    x = ids(2, 5)
    torch.testing.assert_close(fast(x).logits, model(x).logits)
    fast(x, attention_mask=torch.ones_like(x))
    said = [r.getMessage() for r in caplog.records if "hooks" in r.getMessage()]
    assert said == ["model.layers.0.mlp: its hooks do not fire; what they do to tensors was traced"]


def test_hooks_inside_a_replaced_leaf_fire() -> None:
    fast = host(llama(), identity)
    x = ids(2, 5)
    fast(x)
    seen: list[str] = []
    fast.lm_head = nn.Sequential(fast.lm_head, nn.Identity()).eval()
    fast.lm_head.register_forward_hook(lambda *_: seen.append("around"))
    fast.lm_head[0].register_forward_hook(lambda *_: seen.append("inside"))
    fast(x)
    assert seen == ["inside", "around"]


class Dropped(nn.Module):
    """Dropout inside fused attention, which no module switches."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0)


def test_dropout_inside_attention_switches() -> None:
    model = Dropped().eval()
    fast = host(model, identity)
    x = torch.randn(2, 6, 8)
    for _ in range(2):
        torch.testing.assert_close(fast.eval()(x), model(x))
        assert not torch.allclose(fast.train()(x), fast(x))


def test_one_graph_per_signature_whatever_the_spelling() -> None:
    fast = host(llama(), identity)
    x = ids(2, 5)
    for call in (lambda: fast(x), lambda: fast(input_ids=ids(3, 9)), lambda: fast(x, labels=None)):
        call()
    assert len(fast.signatures) == 1
    fast(x, attention_mask=torch.ones_like(x))
    assert [str(s) for s in fast.signatures] == [
        "(input_ids: int64 2d) eval float32",
        "(input_ids: int64 2d, attention_mask: int64 2d) eval float32",
    ]


def test_a_new_signature_is_said(caplog: pytest.LogCaptureFixture) -> None:
    fast = host(Net().eval(), identity)
    fast(torch.randn(3, 4))
    fast(torch.randn(3, 4), scale=2.0)
    said = [r.getMessage() for r in caplog.records if r.name == "reattend"]
    assert said == ["captured new signature (x: float32 2d, scale=2.0) eval float32"]


def test_the_limit_names_what_is_captured() -> None:
    fast = host(Net().eval(), identity, limit=2)
    for scale in (2.0, 3.0):
        fast(torch.randn(3, 4), scale)
    with pytest.raises(Refused, match=r"signature 3 of at most 2.*scale=2.0.*scale=3.0"):
        fast(torch.randn(3, 4), 4.0)


def test_frozen_captures_nothing_more() -> None:
    fast = host(Net().eval(), identity)
    x = torch.randn(3, 4)
    fast(x)
    fast.freeze()
    fast(x)
    with pytest.raises(Refused, match=r"scale=2.0.*frozen|frozen.*scale=2.0"):
        fast(x, 2.0)


def test_another_size_of_a_static_dimension_is_refused() -> None:
    fast = host(Net().eval(), identity)
    fast(torch.randn(3, 4))
    with pytest.raises(Refused, match="x: dim 1 is 5: captured with 4"):
        fast(torch.randn(3, 5))


def test_train_and_eval_really_switch() -> None:
    torch.manual_seed(1)
    model = Net().eval()
    fast = host(model, identity)
    x = torch.randn(64, 4)
    torch.testing.assert_close(fast(x), model(x))
    fast.train()
    assert (fast(x) == 0).any()
    assert not torch.equal(fast.norm.running_mean, model.norm.running_mean)
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    fast.eval()
    assert not (fast(x) == 0).any()
    assert len(fast.signatures) == 2


def test_part_of_a_model_in_eval_is_another_signature() -> None:
    fast = host(Net().train(), identity)
    fast.norm.eval()
    fast.drop.eval()
    x = torch.randn(8, 4)
    fast(x)
    assert torch.equal(fast.norm.running_mean, torch.zeros(4))


# --- the original stays as it was -------------------------------------------------------------------------------------


def test_another_dtype_is_another_signature() -> None:
    model = llama()
    fast = host(model, identity)
    x = ids(2, 5)
    fast(x)
    fast.bfloat16()
    answer = fast(x).logits
    assert answer.dtype is torch.bfloat16 and len(fast.signatures) == 2
    torch.testing.assert_close(answer, copy.deepcopy(model).bfloat16()(x).logits)


def test_tied_weights_stay_tied() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG, tie_word_embeddings=True)).eval()
    fast = host(model, identity)
    assert fast.lm_head.weight is fast.model.embed_tokens.weight
    assert fast.lm_head.weight is not model.lm_head.weight
    x = ids(2, 5)
    fast(x, labels=x, use_cache=False).loss.backward()
    assert fast.lm_head.weight is fast.model.embed_tokens.weight


def test_the_config_is_the_twins_own_and_part_of_the_signature() -> None:
    model = llama()
    fast = host(model, identity)
    x = ids(2, 5)
    assert fast(x).past_key_values is None
    fast.config.use_cache = True
    assert fast(x).past_key_values is not None and model.config.use_cache is False
    assert "config.use_cache=True" in str(fast.signatures[1])


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_run_and_are_independent(way: str) -> None:
    fast = host(llama(), identity)
    x = ids(2, 5)
    expected = fast(x).logits
    other = copy.deepcopy(fast) if way == "deepcopy" else pickle.loads(pickle.dumps(fast))
    assert isinstance(other, hf.LlamaForCausalLM) and is_hosted(other)
    torch.testing.assert_close(other(x).logits, expected)
    assert len(other.signatures) == 1
    assert other.graph.lm_head.weight is other.lm_head.weight
    with torch.no_grad():
        other.lm_head.weight.zero_()
    torch.testing.assert_close(fast(x).logits, expected)
    other(x, labels=x)
    assert len(fast.signatures) == 1


def test_what_cannot_be_copied_is_shared() -> None:
    import threading

    model = Net().eval()
    model.lock = threading.Lock()  # type: ignore[assignment]
    fast = host(model, identity)
    assert fast.lock is model.lock and fast.first is not model.first


def test_a_failed_capture_leaves_everything_as_it_was() -> None:
    def refuse(model: nn.Module, call: Call) -> Captured:
        raise Refused("no")

    model = llama()
    before = weights(model)
    fast = host(model, refuse)
    with pytest.raises(Refused):
        fast(ids(2, 5))
    assert unchanged(model, before) and torch.is_grad_enabled() and fast.signatures == ()


# --- what rewrites add ------------------------------------------------------------------------------------------------


def gated(model: nn.Module, call: Call) -> Captured:
    """Scales the output by a new parameter and reports its square as a loss and twice it as a new buffer value."""
    captured = capture(model, call.args, call.kwargs)
    graph, root = captured.graph.graph, captured.graph
    root.add_submodule("first.reattend", nn.Module())
    holder = root.get_submodule("first.reattend")
    holder.register_parameter("gate", nn.Parameter(torch.full((4,), 3.0)))
    holder.register_buffer("doubled", torch.zeros(4))
    output = next(iter(graph.find_nodes(op="output")))
    with graph.inserting_before(output):
        gate = graph.get_attr("first.reattend.gate")
        value = graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], gate))
        loss = graph.call_function(torch.ops.aten.sum.default, (gate,))
        double = graph.call_function(torch.ops.aten.mul.Tensor, (gate, 2))
    output.args = ((value, loss, double),)
    captured.losses, captured.buffers = ("first.gate_sum",), ("first.reattend.doubled",)
    root.recompile()
    return captured


def test_new_tensors_live_on_the_hosted_tree_once_for_all_signatures() -> None:
    model = Net().eval()
    names = list(model.state_dict())
    fast = host(model, gated)
    x = torch.randn(5, 4)
    torch.testing.assert_close(fast(x), model(x) * 3)
    with torch.no_grad():
        fast.first.reattend.gate.fill_(5.0)
    torch.testing.assert_close(fast(x, 2.0), model(x, 2.0) * 5)
    assert [n for n, _ in fast.new_parameters()] == ["first.reattend.gate"]
    assert set(fast.state_dict()) == {*names, "first.reattend.gate", "first.reattend.doubled"}
    assert list(model.state_dict()) == names
    torch.testing.assert_close(fast.losses()["first.gate_sum"], torch.tensor(20.0))


def test_losses_train_and_buffers_are_written_in_train_only() -> None:
    fast = host(Net().eval(), gated)
    x = torch.randn(5, 4)
    fast(x)
    assert torch.equal(fast.first.reattend.doubled, torch.zeros(4))
    fast.train()
    fast(x)
    assert torch.equal(fast.first.reattend.doubled, torch.full((4,), 6.0))
    fast.losses()["first.gate_sum"].backward()
    torch.testing.assert_close(fast.first.reattend.gate.grad, torch.ones(4))


def test_the_original_view_of_a_hosted_model_is_the_original() -> None:
    model = llama()
    fast = host(model, identity)
    assert type(original(fast)) is hf.LlamaForCausalLM and original(model) is model
    x = ids(2, 5)
    torch.testing.assert_close(original(fast)(x).logits, model(x).logits)


# --- sizes of 0 and 1, which a trace at larger sizes says nothing about -----------------------------------------------


class Alone(nn.Module):
    """Computes something else for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return self.linear(x).exp()
        return self.linear(x)


def test_a_batch_of_one_that_is_computed_otherwise_has_its_own_graph() -> None:
    model = Alone()
    for first, second in ((3, 1), (1, 3)):
        fast = host(model, identity)
        for batch in (first, second, first, 5, 1):
            x = torch.randn(batch, 4)
            torch.testing.assert_close(fast(x), model(x))
        assert len(fast.signatures) == 2
        assert any("x dim 0 = 1" in str(s) for s in fast.signatures)


def test_a_batch_of_one_that_is_computed_alike_shares_the_graph() -> None:
    fast = host(llama(), identity)
    fast(ids(2, 5))
    fast(ids(1, 5))
    fast(ids(1, 1))
    assert len(fast.signatures) == 1


class Named(nn.Module):
    """Its parts are called as what a hosted model can do."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.freeze = nn.Linear(16, 16), nn.LayerNorm(16)
        self.sites = nn.Parameter(torch.ones(16))
        self.register_buffer("traces", torch.zeros(16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.freeze(self.part(x)) * self.sites + self.traces
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


def test_names_of_the_users_modules_stay_theirs() -> None:
    model, x = Named().eval(), torch.randn(2, 5, 16)
    fast = reattend.optimize(model, "exact", {"x": x}, measure=False)
    assert (fast(x) - model(x)).abs().max() <= 1e-5
    assert isinstance(fast.part, nn.Linear) and isinstance(fast.freeze, nn.LayerNorm)
    assert isinstance(fast.sites, nn.Parameter) and torch.equal(fast.traces, torch.zeros(16))
    assert "attention" in fast.report.text() and fast.signatures


class SaysIt(nn.Module):
    """A part of a name that optimize, the command line and recovery ask a hosted model by."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["report", "prepare", "losses", "graph", "code"])
def test_what_is_asked_of_a_hosted_model_is_asked_by_no_name_of_the_users(name: str) -> None:
    model, x = SaysIt(name).eval(), torch.randn(2, 5, 16)
    fast = reattend.optimize(model, "exact", (x,), measure=False)
    assert (fast(x) - model(x)).abs().max() <= 1e-5
    assert isinstance(getattr(fast, name), nn.TransformerEncoderLayer)
    report = ours(fast, "report")
    assert [row.status for row in report.rows] == ["rewritten"] and "attn" in report.text()
    islands = [note for note in report.notes if "island" in note]
    assert bool(islands) == (name in ("graph", "code")), report.notes  # which a captured graph has for itself
