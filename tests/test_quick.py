"""Pointwise work in kernels gives the numbers of the graph's own nodes, and gives way where something watches."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from kernel_calls import must_build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reattend
from reattend.codegen.cpu import pointwise
from reattend.compiler import joined_products, quick
from reattend.compiler.faster import Faster, agree
from reattend.compiler.hosting import hosting
from reattend.compiler.pointwise import FULL, ROW, VECTOR, Entering, Given, Made, Piece, Step, rows_apart
from reattend.compiler.quick import NEVER
from reattend.models.vision_ops import declare_missing_vision_ops

declare_missing_vision_ops()


@pytest.fixture(autouse=True)
def _built(monkeypatch: pytest.MonkeyPatch) -> None:
    must_build(monkeypatch, pointwise)
    for name in ("_pieces", "_products"):  # what is right is used, however long it takes beside other work
        monkeypatch.setattr(quick if name == "_pieces" else joined_products, name, Faster(worth=math.inf))


IDENTITY = {"version": 1, "sites": [{"match": "*", "attention": "softmax"}]}


def bert(width: int = 64, act: str = "gelu") -> tuple[Any, dict[str, Any]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width,
                        vocab_size=100, hidden_act=act)  # fmt: skip
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.randint(0, 100, (2, 70))}


def llama() -> tuple[Any, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=96, vocab_size=100)  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 100, (2, 70)), "use_cache": False}


def gpt2() -> tuple[Any, dict[str, Any]]:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=128)
    return GPT2Model(config), {"input_ids": torch.randint(0, 100, (2, 70)), "use_cache": False}


def vit() -> tuple[Any, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=60, num_hidden_layers=2, num_attention_heads=4, intermediate_size=129,
                       image_size=32, patch_size=4)  # fmt: skip
    return ViTModel(config), {"pixel_values": torch.randn(3, 3, 32, 32)}


def hosted(case: Any) -> tuple[Any, Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = case()
    model = model.eval()
    return model, reattend.optimize(model, IDENTITY, inputs, measure=False), inputs


def calls(fast: Any, inputs: dict[str, Any], times: int = 4) -> Any:
    """The last of some calls without gradients: the graph, the noting, the first of the kernels, the kernels."""
    with torch.no_grad():
        for _ in range(times):
            answer = fast(**inputs)
    return answer[0]


def twin(fast: Any) -> Any:
    state = next(iter(hosting(fast).graphs.values())).graph.meta.get("quick")
    return getattr(state, "graph", state)


def runs(fast: Any) -> list[Any]:
    made = twin(fast)
    found = [n.target for n in made.graph.nodes if getattr(n.target, "__name__", "").startswith("pointwise_")]
    return [function.__closure__[0].cell_contents for function in found]


def joined(fast: Any) -> list[Any]:
    return [n for n in twin(fast).graph.nodes if getattr(n.target, "__name__", "") == "side_by_side"]


CASES = {"bert": (bert, 4), "bert gelu_new": (lambda: bert(72, "gelu_new"), 4), "llama": (llama, 5), "gpt2": (gpt2, 4),
         "vit": (vit, 4)}  # fmt: skip


@pytest.mark.parametrize(("case", "least"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_models_pointwise_work_runs_in_kernels(case: Any, least: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = case()
    model = model.eval().to(dtype)
    inputs = {n: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    fast = reattend.optimize(model, IDENTITY, inputs, measure=False)
    expected, got = calls(model, inputs, 1), calls(fast, inputs)
    assert len(runs(fast)) >= least and all(run.kernel is not None for run in runs(fast))
    assert agree(got, expected)


def test_other_sizes_take_the_same_twin() -> None:
    model, fast, inputs = hosted(bert)
    calls(fast, inputs)
    longer = {"input_ids": torch.randint(0, 100, (3, 91))}
    assert agree(calls(fast, longer, 1), calls(model, longer, 1))
    assert len(hosting(fast).graphs) == 1


def test_a_call_with_gradients_runs_the_graph() -> None:
    model, fast, inputs = hosted(llama)
    calls(fast, inputs)
    loss = fast(**inputs).logits.square().mean()
    loss.backward()
    expected = model(**inputs).logits.square().mean()
    assert loss.requires_grad and torch.equal(loss, expected)


def test_a_hook_put_there_later_fires_and_counts() -> None:
    model, fast, inputs = hosted(bert)
    calls(fast, inputs)
    for both in (model, fast):
        both.encoder.layer[0].output.LayerNorm.register_forward_hook(lambda module, args, output: output * 2)
        both.encoder.layer[1].intermediate.dense.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert agree(calls(fast, inputs, 1), calls(model, inputs, 1))


def test_a_leaf_replaced_or_changed_later_is_used() -> None:
    model, fast, inputs = hosted(bert)
    calls(fast, inputs)
    before = calls(fast, inputs, 1)
    new = nn.LayerNorm(64, eps=0.5)
    for both in (model, fast):
        both.encoder.layer[0].output.LayerNorm = new
        both.encoder.layer[1].output.LayerNorm.eps = 0.25
        both.encoder.layer[1].output.dense = nn.Sequential(both.encoder.layer[1].output.dense, nn.Tanh())
    got = calls(fast, inputs, 1)
    assert agree(got, calls(model, inputs, 1)) and not agree(got, before)


def test_weights_are_read_at_every_call() -> None:
    model, fast, inputs = hosted(bert)
    calls(fast, inputs)
    with torch.no_grad():
        for both in {id(p): p for p in (*model.parameters(), *fast.parameters())}.values():
            both.mul_(1.1)
    assert agree(calls(fast, inputs, 1), calls(model, inputs, 1))


def test_who_looks_at_operations_sees_the_graphs_own() -> None:
    _, fast, inputs = hosted(bert)
    with FlopCounterMode(display=False) as first:
        calls(fast, inputs, 1)
    calls(fast, inputs)
    with FlopCounterMode(display=False) as later:
        calls(fast, inputs, 1)
    assert first.get_total_flops() == later.get_total_flops() > 0


def test_a_copy_has_the_same_numbers() -> None:
    model, fast, inputs = hosted(bert)
    calls(fast, inputs)
    twin_of_it = copy.deepcopy(fast)
    assert agree(calls(twin_of_it, inputs), calls(model, inputs, 1))


def test_a_recipe_for_eager_has_no_kernels() -> None:
    torch.manual_seed(0)
    model, inputs = bert()
    fast = reattend.optimize(model.eval(), IDENTITY | {"target": "eager"}, inputs, measure=False)
    calls(fast, inputs)
    assert twin(fast) is NEVER


def test_short_calls_run_the_graph_and_are_not_looked_at_for_ever() -> None:
    _, fast, _ = hosted(gpt2)
    calls(fast, {"input_ids": torch.randint(0, 100, (2, 3)), "use_cache": False}, 140)
    assert twin(fast) is NEVER


def test_a_twin_of_short_calls_is_made_anew_for_long_ones() -> None:
    model, fast, inputs = hosted(bert)
    calls(fast, {"input_ids": torch.randint(0, 100, (2, 3))})
    assert joined(fast) and not runs(fast)
    assert agree(calls(fast, inputs), calls(model, inputs, 1)) and joined(fast) and runs(fast)


def test_a_kernel_with_other_numbers_is_not_used(monkeypatch: Any, caplog: Any) -> None:
    def wrong(piece: Piece) -> Any:
        return lambda entering, leaving: [t.fill_(7.0) for t in leaving], None

    monkeypatch.setitem(quick.KERNELS, "cpu", wrong)
    model, fast, inputs = hosted(bert)
    with caplog.at_level(logging.WARNING, logger="reattend"):
        got = calls(fast, inputs)
    assert agree(got, calls(model, inputs, 1)) and "other numbers" in caplog.text


def test_without_a_compiler_torch_runs(monkeypatch: Any) -> None:
    monkeypatch.setitem(quick.KERNELS, "cpu", lambda piece: (None, "no C++ compiler"))
    monkeypatch.setitem(quick.ATTENDS, "cpu", lambda *call: None)
    model, fast, inputs = hosted(bert)
    assert agree(calls(fast, inputs), calls(model, inputs, 1))


def test_the_source_of_pointwise_kernels_is_shown() -> None:
    torch.manual_seed(0)
    model, inputs = bert()
    shown = [str(each) for each in reattend.kernels(model.eval(), IDENTITY, inputs)]
    assert any("gelu" in text and "static void one(" in text for text in shown)


# --- single pieces ----------------------------------------------------------------------------------------------------

ONE = {
    "neg": torch.neg, "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu,
    "silu": nn.functional.silu, "gelu": nn.functional.gelu, "square": torch.square, "cube": lambda x: x**3,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"), "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.abs() + 0.5).rsqrt(), "cast": lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize("op", ONE)
@pytest.mark.parametrize("width", [1, 7, 64, 129])
def test_every_step_gives_torchs_numbers(op: str, width: int) -> None:
    x = torch.randn(5, width, dtype=torch.float32) * 4
    if op in ("sqrt", "rsqrt"):  # of numbers that have one
        x = x.abs() + (0.5 if op == "rsqrt" else 0.0)
        expected = torch.sqrt(x) if op == "sqrt" else torch.rsqrt(x)
    else:
        expected = ONE[op](x)
    piece = Piece((Entering(FULL, x.dtype),), (Step(op, (Given(0),), FULL, x.dtype),), (0,))
    assert agree(ran(piece, [x])[0], expected)


def test_numbers_that_are_none_stay_none_in_their_row() -> None:
    x = torch.randn(4, 33)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    f = torch.float32
    steps = (
        Step("mean", (Given(0),), ROW, f),
        Step("sub", (Given(0), Made(0)), FULL, f),
        Step("gelu", (Made(1),), FULL, f),
    )
    got = ran(Piece((Entering(FULL, f),), steps, (2,)), [x])[0]
    expected = nn.functional.gelu(x - x.mean(-1, keepdim=True))
    assert torch.allclose(got, expected, atol=1e-5, equal_nan=True) and got[[0, 3]].isfinite().all()


def test_rows_vectors_and_several_results() -> None:
    f, h = torch.float32, torch.bfloat16
    x, row, vector = torch.randn(2, 9, 37).to(h), torch.randn(2, 9, 1), torch.randn(37)
    entering = (Entering(FULL, h), Entering(ROW, f), Entering(VECTOR, f))
    steps = (Step("mul", (Given(0), Given(1)), FULL, f), Step("add", (Made(0), Given(2)), FULL, f),
             Step("mul", (Given(0), 2.5), FULL, h))  # fmt: skip
    got = ran(Piece(entering, steps, (1, 2)), [x, row, vector])
    assert agree(got[0], x * row + vector) and torch.equal(got[1], x * 2.5)


def ran(piece: Piece, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    kernel, reason = quick.KERNELS["cpu"](piece)
    assert kernel is not None, reason
    leaving = [torch.full(tensors[0].shape, float("nan")).to(piece.steps[k].dtype) for k in piece.leaving]
    kernel(tensors, leaving)
    return leaving


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", [0, 20])
def test_generated_attention_is_torchs_and_lies_as_torchs(causal: bool, hidden: int) -> None:
    q, k, v = (torch.randn(2, 70, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    row = torch.zeros(2, 1, 1, 70) if hidden else None
    if row is not None:
        row[0, ..., :hidden], row[1] = -torch.inf, -torch.inf
    later = torch.full((70, 70), -torch.inf).triu(1) if causal else torch.zeros(70, 70)
    mask = None if row is None else row + later
    got = quick.ATTENDS["cpu"](q, k, v, row, causal, 0.3)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=0.3,
                                                          enable_gqa=True)  # fmt: skip
    assert got is not None and got.stride() == expected.stride()
    assert torch.allclose(got, expected.nan_to_num(), atol=2e-6)


def test_a_row_of_the_least_number_is_left_to_torch() -> None:
    """Where every key has it, torch gives all keys equal weights: hiding them would give nothing."""
    q, k, v = (torch.randn(2, 2, 70, 16) for _ in range(3))
    assert quick.ATTENDS["cpu"](q, k, v, torch.full((2, 1, 1, 70), torch.finfo(torch.float32).min), False, None) is None


def test_rows_of_a_wider_tensor_are_read_where_they_lie() -> None:
    wide = torch.randn(2, 1, 5, 12)
    for t in (wide, wide[..., 4:9], wide[:, 0, :, :7], wide[:1], wide[:1, :, 2:3, 3:6]):
        rows = t.reshape(-1, t.shape[-1])
        step, start = rows_apart(t), t.storage_offset()
        where = (start + torch.arange(len(rows))[:, None] * step + torch.arange(t.shape[-1])).flatten()
        assert torch.equal(wide.flatten()[where].view_as(rows), rows)
    assert rows_apart(wide.mT) is None and rows_apart(wide[:, :, 1:4]) is None


# --- linear layers of one input ---------------------------------------------------------------------------------------


def copies(fast: Any) -> list[Any]:
    return [node.target.__closure__[0].cell_contents.copy for node in joined(fast)]


@pytest.mark.parametrize(("case", "groups"), [(bert, 2), (vit, 2), (llama, 4)])
def test_layers_of_one_input_are_one_product(case: Any, groups: int) -> None:
    model, fast, inputs = hosted(case)
    got = calls(fast, inputs, 6)
    assert len(joined(fast)) == groups and all(copies(fast))
    assert agree(got, calls(model, inputs, 1))


def _in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.add_(0.5 * torch.randn_like(weight))


def _behind_its_back(weight: torch.Tensor) -> None:
    weight.data += torch.randn_like(weight)


def _by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[:] += torch.randn(weight.shape).numpy()


def _by_an_optimizer(weight: torch.Tensor) -> None:
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


WRITERS = [_in_place, _behind_its_back, _by_numpy, _by_an_optimizer]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__.strip("_"))
def test_a_product_of_layers_sees_every_write(write: Any) -> None:
    model, fast, inputs = hosted(bert)
    before = calls(fast, inputs, 6)
    write(model.encoder.layer[0].attention.self.query.weight)
    write(model.encoder.layer[1].attention.self.value.bias)
    assert torch.equal(calls(fast, inputs, 1), before)
    for layer, name, part in ((0, "query", "weight"), (1, "value", "bias")):
        write(getattr(getattr(fast.encoder.layer[layer].attention.self, name), part))
        for _ in range(6):  # before a new copy and behind it
            got = calls(fast, inputs, 1)
            assert not agree(got, before)
        assert all(copies(fast))
        before = got


def test_a_product_of_layers_gives_way_to_what_they_became() -> None:
    model, fast, inputs = hosted(bert)
    calls(fast, inputs, 6)
    for both in (model, fast):
        both.encoder.layer[0].attention.self.query.register_forward_hook(lambda module, args, output: output * 2)
        both.encoder.layer[1].attention.self.key = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh())
    fast.encoder.layer[1].attention.self.key.load_state_dict(model.encoder.layer[1].attention.self.key.state_dict())
    assert agree(calls(fast, inputs, 1), calls(model, inputs, 1))
    fast.to(torch.bfloat16), model.to(torch.bfloat16)
    assert agree(calls(fast, inputs, 6), calls(model, inputs, 1))


def test_copies_of_a_model_take_turns_with_weights_of_their_own() -> None:
    _, fast, inputs = hosted(bert)
    before = calls(fast, inputs, 6)
    other = copy.deepcopy(fast)
    _in_place(other.encoder.layer[0].attention.self.query.weight)
    after = calls(other, inputs, 6)
    assert not agree(after, before)
    for _ in range(4):
        assert agree(calls(fast, inputs, 1), before) and agree(calls(other, inputs, 1), after)


class Wrapper(nn.Module):
    """Hands on what it is asked for."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def __getattr__(self, name: str) -> Any:
        return self._modules["held"] if name == "held" else getattr(self._modules["held"], name)


def test_layers_behind_a_wrapper_are_found() -> None:
    model, fast, inputs = hosted(bert)
    calls(fast, inputs, 6)
    fast.encoder.layer[0] = Wrapper(fast.encoder.layer[0]).eval()
    assert runs(fast) and agree(calls(fast, inputs, 1), calls(model, inputs, 1))


def test_wide_products_and_strange_readers_stay_apart() -> None:
    wide = [nn.Linear(1024, 1024) for _ in range(3)]

    def groups(layers: list[nn.Module], target: Any, *args: Any) -> int:
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        made = [graph.call_module(str(k), (x,)) for k in range(len(layers))]
        graph.output(tuple(graph.call_function(target, (node, *args)) for node in made))
        return len(joined_products.side_by_side(graph, lambda node: layers[int(node.target)], ()))

    aten = torch.ops.aten
    narrow = [nn.Linear(8, 8) for _ in range(3)]
    assert groups(narrow, aten.relu.default) == 1 and groups(wide, aten.relu.default) == 0
    assert groups(narrow, aten.view_as_complex.default) == 0 and groups(narrow, aten.relu_.default) == 0
    assert groups([narrow[0], nn.Linear(8, 8, bias=False)], aten.relu.default) == 0


# --- which way is taken -----------------------------------------------------------------------------------------------


def test_the_faster_way_is_taken_once_it_is_right() -> None:
    slow, asked = torch.randn(300, 300), {"first": 0, "second": 0}

    def first() -> torch.Tensor:
        asked["first"] += 1
        for _ in range(20):
            slow @ slow
        return torch.ones(3)

    def second() -> torch.Tensor:
        asked["second"] += 1
        return torch.ones(3)

    faster = Faster()
    faster("kind", first, second)
    before = dict(asked)
    faster("kind", first, second)
    assert asked["first"] == before["first"] and asked["second"] == before["second"] + 1
    faster("slower", second, first)
    faster("wrong", first, lambda: torch.zeros(3))
    faster("cannot", first, lambda: None)
    assert faster.found == {"kind": True, "slower": False, "wrong": False, "cannot": False}


class Grouped(nn.Module):
    """A norm over groups of channels in front of attention: its channels are not the last axis (HuBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.GroupNorm(16, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(nn.functional.gelu(self.norm(x)).mT)
        return y


def test_a_leaf_that_no_few_rows_can_enter_stays_as_it_is() -> None:
    model, x = Grouped().eval(), torch.randn(4, 16, 200)
    fast = reattend.optimize(model, IDENTITY, x, measure=False)
    assert agree(calls(fast, {"x": x}), calls(model, {"x": x}, 1))
