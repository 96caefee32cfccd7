"""Bad input gets one line that says where, what was found and what would fit; nothing of the user's is harmed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Attend, stack
from torch import Tensor, nn

import reattend
from reattend import Refused

X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
WINDOW = {"window": {"window": 3, "sinks": 0}}


def everywhere(attention: Any, **more: Any) -> dict[str, Any]:
    return {"version": 1, "sites": [{"match": "*", "attention": attention, **more}]}


def optimized(model: Any, recipe: Any = "exact", inputs: Any = X, **more: Any) -> Any:
    return reattend.optimize(model, recipe, inputs, measure=False, **more)


def refusal(work: Callable[[], Any]) -> str:
    """What a refusal says: one line; grad mode is as it was."""
    with pytest.raises(Refused) as caught:
        work()
    assert torch.is_grad_enabled()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def in_order(text: str, *parts: str) -> None:
    """Every part is there, each behind the one before."""
    place = 0
    for part in parts:
        assert part in text[place:], f"{part!r} is not in {text[place:]!r}"
        place = text.index(part, place) + len(part)


class Outer(nn.Module):
    """A block inside a forward of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack(1)


# --- the model --------------------------------------------------------------------------------------------------------


def test_a_model_without_attention_has_no_sites_and_is_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    assert reattend.sites(model, X) == ()
    in_order(refusal(lambda: optimized(model)), "Sequential", "no attention found", "softmax")


def test_what_only_looks_like_attention_is_the_nearest_miss() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.expert = nn.Linear(32, 4), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            return self.expert(x) * weights.amax(-1, keepdim=True)

    found = reattend.explain(Routed(), X)
    assert found.sites == () and len(found.misses) == 1
    in_order(refusal(lambda: optimized(Routed())), "Routed", "no attention found", found.misses[0])


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (torch.randn(2, 9, 31), ("Stack", "float32[2, 9, 31]", "normalized_shape", "forward(x")),
        (torch.randn(32), ("Stack", "float32[32]", "forward(x")),
        (X.long(), ("Stack", "int64[2, 9, 32]", "forward(x")),
        ("hello", ("Stack", "'hello'", "forward(x")),
        ((X, X), ("too many positional arguments", "forward(x")),
        ({"y": X}, ("missing a required argument: 'x'", "forward(x")),
    ],
    ids=["width", "rank", "dtype", "text", "too many", "unknown name"],
)
def test_inputs_that_the_model_does_not_take(inputs: Any, says: tuple[str, ...]) -> None:
    in_order(refusal(lambda: optimized(stack(), inputs=inputs)), *says)
    in_order(refusal(lambda: reattend.sites(stack(), inputs)), *says)


def test_sites_need_inputs_where_nothing_says_what_they_are() -> None:
    found = refusal(lambda: reattend.sites(stack()))
    in_order(found, "Stack", "nothing in its signature", "example_inputs", "forward(x")


def test_a_model_that_writes_to_its_input_is_refused_and_the_input_is_as_before() -> None:
    class Writes(Outer):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1.0)
            return self.inner(x)

    mine = X.clone()
    in_order(refusal(lambda: optimized(Writes(), inputs=mine)), "writes to its input x", "x = x + 1")
    assert torch.equal(mine, X)


class Branches(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e9 else x


def test_a_branch_on_values_leaves_islands_and_the_report_says_so() -> None:
    model = Branches().eval()
    assert [s.path for s in reattend.sites(model, X)] == ["inner.layers.0.attn"]
    fast = optimized(model)
    torch.testing.assert_close(fast(X), model(X), atol=1e-5, rtol=1e-5)
    assert any("islands" in note and "data-dependent" in note for note in fast.report.notes)


def test_a_branch_on_values_with_no_part_to_capture_says_what_stood_in_the_way() -> None:
    class Bare(Attend):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > -1e9 else x

    in_order(refusal(lambda: optimized(Bare())), "Bare", "data-dependent", "no branches on tensor values")


class Pipeline:
    def __init__(self) -> None:
        self.components = {"unet": stack(1), "text_encoder": nn.Linear(2, 2), "tokenizer": object()}


def test_of_a_pipeline_the_parts_are_named() -> None:
    in_order(refusal(lambda: optimized(Pipeline())), "a Pipeline", "optimize(pipeline.unet)", "text_encoder")
    assert "tokenizer" not in refusal(lambda: optimized(Pipeline()))


@pytest.mark.parametrize("thing", [None, "llama", 3], ids=str)
def test_what_is_no_model(thing: Any) -> None:
    in_order(refusal(lambda: optimized(thing)), type(thing).__name__, "torch.nn.Module")


# --- wrapped models ---------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_unwrapped_and_the_notes_say_so() -> None:
    model = stack(1)
    fast = optimized(torch.compile(model, backend="eager"), everywhere(WINDOW))
    assert type(fast).__name__ == "Stack" and any("OptimizedModule" in note for note in fast.report.notes)
    torch.testing.assert_close(fast(X), optimized(model, everywhere(WINDOW))(X))


def test_a_model_compiled_in_place_runs_the_rewritten_graph() -> None:
    plain, compiled = stack(1), stack(1)
    compiled.compile(backend="eager")
    fast = optimized(compiled, everywhere(WINDOW))
    torch.testing.assert_close(fast(X), optimized(plain, everywhere(WINDOW))(X))
    assert any("model.compile()" in note for note in fast.report.notes)
    assert compiled._compiled_call_impl is not None, "the original stays compiled"


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # torch.export's own hooks meet a compiled module
def test_a_compiled_layer_inside_is_noted() -> None:
    model = stack(2)
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    assert any("layers.1" in note and "compiled inside" in note for note in optimized(model).report.notes)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_distributed_model_is_unwrapped_and_the_notes_say_so(one_process: None) -> None:
    model = stack(1)
    fast = optimized(nn.parallel.DistributedDataParallel(model))
    assert type(fast).__name__ == "Stack" and any("DistributedDataParallel" in note for note in fast.report.notes)
    torch.testing.assert_close(fast(X), model(X), atol=1e-5, rtol=1e-5)


def test_device_map_hooks_are_refused_by_name() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = stack(2)
    hooks.add_hook_to_module(model.layers[1], hooks.AlignDevicesHook(execution_device="cpu"))
    in_order(refusal(lambda: optimized(model)), "layers.1", "device_map", "load without device_map")


def test_a_peft_wrapper_is_refused_by_name_and_adapters_inside_are_handled() -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that peft imports
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(stack(1), config)
        injected = peft.inject_adapter_in_model(config, stack(1))
    in_order(refusal(lambda: optimized(wrapped)), "PeftModel", "merge_and_unload()")
    fast = optimized(injected)
    assert len(fast.sites) == 1
    assert not torch.allclose(injected(X), stack(1)(X)), "the adapter does something"
    torch.testing.assert_close(fast(X), injected(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Params4bit", "Int8Params"])
def test_bitsandbytes_weights_are_refused_by_name(name: str) -> None:
    model, kind = stack(1), type(name, (nn.Parameter,), {})
    linear = model.layers[0].attn.q_proj
    linear.weight = kind(linear.weight.data)
    in_order(refusal(lambda: optimized(model)), "layers.0.attn.q_proj.weight", name, "load in float")


def test_tied_weights_stay_tied_in_the_result_and_free_of_the_original() -> None:
    class Tied(Outer):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.embed(ids)))

    model, ids = Tied().eval(), torch.arange(8).view(2, 4)
    fast = optimized(model, inputs=ids)
    assert fast.head.weight is fast.embed.weight
    before = model.head.weight.clone()
    fast.own_weights()
    with torch.no_grad():
        fast.head.weight.mul_(2.0)
    assert fast.head.weight is fast.embed.weight and torch.equal(model.head.weight, before)
    torch.testing.assert_close(model(ids), optimized(model, inputs=ids)(ids), atol=1e-5, rtol=1e-5)


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_a_recipe_that_matches_nothing_warns_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = stack()
    rule = {"match": {"layer": "7"}, "attention": "linear"}
    fast = optimized(model, {"version": 1, "sites": [rule]})
    assert "0 of 3 sites rewritten, NOTHING CHANGED" in fast.report.verdict()
    (warning,) = fast.report.warnings
    in_order(warning, "sites[0]", "no site has layer 7", "0 to 2")
    assert warning in caplog.text
    torch.testing.assert_close(fast(X), model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (everywhere("windw"), ("sites[0].attention", "'windw'", "'window'", "softmax")),
        (everywhere({"window": {"widow": 3}}), ("sites[0].attention.window", "'widow'", "'window'", "sinks")),
        (everywhere({"window": {"window": "big"}}), ("sites[0].attention.window.window", "'big'", "whole number")),
        (everywhere("softmax") | {"pases": []}, ("pases", "'passes'")),
        (everywhere("moh"), ("sites[0].attention", "moh", "`heads`")),
        ({"version": 9, "sites": []}, ("version", "9", "1")),
        ("nope.yaml", ("nope.yaml", "no such file", "exact")),
        ("sites: [", ("recipe",)),
        (everywhere("softmax") | {"model": {"type": "llama"}}, ("model", "llama")),
    ],
    ids=["mechanism", "knob", "value", "key", "part", "version", "no file", "broken YAML", "guard"],
)
def test_words_that_a_recipe_does_not_know(recipe: Any, says: tuple[str, ...]) -> None:
    if recipe == "sites: [":
        recipe, says = "version: 1\nsites: [", ("2",)  # the line that is broken
    in_order(refusal(lambda: optimized(stack(1), recipe)), *says)


def test_python_tags_and_yaml_bombs_are_data_of_nobody() -> None:
    tagged = "version: 1\nsites: !!python/object/apply:os.getcwd []\n"
    assert "python" in refusal(lambda: optimized(stack(1), tagged))
    levels = [f"l{k}: &l{k} [{', '.join([f'*l{k - 1}'] * 9)}]" if k else "l0: &l0 [0]" for k in range(12)]
    bomb = "version: 1\n" + "\n".join(levels) + "\n"
    assert len(refusal(lambda: optimized(stack(1), bomb))) < 500


def test_unknown_tensors_of_a_mechanism_and_unknown_names_at_the_plain_door() -> None:
    q = torch.randn(1, 2, 5, 8)
    in_order(refusal(lambda: reattend.attention(q, q, q, "windw")), "'windw'", "'window'")
    in_order(refusal(lambda: reattend.attention(q, q, q, "window", widow=3)), "window", "'widow'", "'window'")
    in_order(refusal(lambda: reattend.attention(q, q, q, "softmax", params={"w": q})), "softmax", "'w'")


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_mechanism_that_does_not_fit_says_which_do(step: int) -> None:
    text = refusal(lambda: optimized(stack(), everywhere("agent")))
    in_order(text, "layers.0.attn: attention[causal-self h=4 kv=2 d=8]", "agent is noncausal", "causal-self")
    in_order(text, "and 2 more", "fits here: ", "linear", "window", "reattend mechanisms --for")
    listed = text.partition("fits here: ")[2].partition(" (")[0].split(", ")
    assert "agent" not in listed and len(listed) > 20
    listed = listed[::step]
    part = {slug: "heads" if reattend.mechanisms()[slug].part == "gate" else "attention" for slug in listed}
    rules = [{"match": {"layer": str(layer)}, part[slug]: slug} for layer, slug in enumerate(listed)]
    fast = optimized(stack(len(listed)), {"version": 1, "sites": rules})
    assert [row.status for row in fast.sites] == ["rewritten"] * len(listed)


def test_one_site_that_refuses_does_not_keep_the_others_from_being_rewritten() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Attend(causal=True), Attend(causal=False, kv_heads=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    fast = optimized(Mixed().eval(), everywhere({"agent": {"agent_num": 4}}))
    assert [row.status for row in fast.sites] == ["refused", "rewritten"]
    assert "agent is noncausal" in fast.sites["a"].reason
    assert "1 of 2 sites rewritten; 1 refused" in fast.report.verdict()


def test_heads_that_do_not_divide() -> None:
    q, k = torch.randn(1, 8, 5, 4), torch.randn(1, 3, 5, 4)
    in_order(refusal(lambda: reattend.attention(q, k, k, "softmax")), "8", "3", "multiple of kv_heads")
    in_order(refusal(lambda: reattend.Attention("softmax", dim=30, heads=4)), "30", "4")
    split = {"split": {"0": "softmax", "rest": WINDOW}}
    in_order(refusal(lambda: optimized(stack(1), everywhere(split))), "layers.0.attn", "0", "group")


# --- the call ---------------------------------------------------------------------------------------------------------


def test_float16_on_a_cpu_warns() -> None:
    fast = optimized(stack(1).half(), inputs=X.half())
    assert any("float16 on a CPU" in warning for warning in fast.report.warnings)
    assert not optimized(stack(1).bfloat16(), inputs=X.bfloat16()).report.warnings


def test_one_tensor_given_for_several_inputs_stays_several_inputs() -> None:
    class Two(Outer):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x) - 0.5 * y

    model = Two().eval()
    fast = optimized(model, inputs=(X, X))
    other = torch.randn(2, 9, 32)
    torch.testing.assert_close(fast(X, other), model(X, other), atol=1e-5, rtol=1e-5)


def test_an_optimized_model_stacks_and_keeps_its_own() -> None:
    model = stack(2)
    rules = [{"match": {"layer": str(k)}, "attention": WINDOW} for k in range(2)]
    first = optimized(model, {"version": 1, "sites": rules[:1]})
    before = first(X)
    second = optimized(first, {"version": 1, "sites": rules[1:]})
    assert [row.status for row in second.sites] == ["rewritten", "rewritten"]
    torch.testing.assert_close(second(X), optimized(model, everywhere(WINDOW))(X))
    assert torch.equal(first(X), before)


@pytest.mark.slow
def test_weights_of_attention_are_refused_where_it_was_rewritten_and_given_where_not() -> None:
    from reattend.models.zoo import zoo

    family = zoo()["bert"]
    kwargs = family.inputs()[1]
    asked = kwargs | {"output_attentions": True}
    sdpa = family.build("sdpa")
    in_order(refusal(lambda: optimized(sdpa, everywhere(WINDOW), kwargs)(**asked)), "BertModel", "output_attentions")
    eager = family.build("eager")
    rewritten = optimized(eager, everywhere(WINDOW), kwargs)
    in_order(refusal(lambda: rewritten(**asked)), "encoder.layer.0.attention.self", "output_attentions=True")
    in_order(refusal(lambda: optimized(eager, everywhere(WINDOW), asked)), "no attention found", "returned")
    kept = optimized(eager, everywhere("keep"), kwargs)
    for got, meant in zip(kept(**asked).attentions, eager(**asked).attentions, strict=True):
        torch.testing.assert_close(got, meant)


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("recipe", "inputs"),
    [(everywhere("agent"), X), (everywhere("nope"), X), ("exact", X[..., :31]), (everywhere(WINDOW), X)],
    ids=["refused at the site", "unknown", "wrong shape", "fine"],
)
def test_the_original_and_grad_mode_are_as_before(recipe: Any, inputs: Tensor, train: bool) -> None:
    model = stack(1).train(train)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    kept = {name: dict(m.__dict__) for name, m in model.named_modules()}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            try:
                optimized(model, recipe, inputs)
            except Refused:
                assert recipe != everywhere(WINDOW)
            assert torch.is_grad_enabled() == grad
    assert model.training == train
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    for name, module in model.named_modules():
        assert module.__dict__.keys() == kept[name].keys()
        assert all(module.__dict__[key] is value for key, value in kept[name].items())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("calls.jsonl", ("data 'calls.jsonl'", "an iterable of calls")),
        (3, ("data 3", "an iterable of calls")),
        ((), ("data without a call", "calls like example_inputs")),
        (iter(()), ("data without a call", "calls like example_inputs")),
        ([3], ("data[0]", "not tensors", "example_inputs")),
        ([X, {"y": X}], ("data[1]", "missing a required argument: 'x'")),
        ([X[..., :5]], ("data[0]", "dim 2 is 5")),
    ],
    ids=["text", "no calls", "none", "read before", "number", "name", "width"],
)
def test_data_that_are_no_calls_of_the_model(data: Any, says: tuple[str, ...]) -> None:
    in_order(refusal(lambda: optimized(stack(1), everywhere(WINDOW), data=data)), *says)


@pytest.mark.parametrize("count", [0, -1])
def test_no_kind_of_call_at_all_is_refused(count: int) -> None:
    in_order(refusal(lambda: optimized(stack(1), max_signatures=count)), f"max_signatures={count}", "at least 1")


def test_sizes_below_nothing_are_refused() -> None:
    in_order(refusal(lambda: reattend.preview(stack(1), "exact", X, tokens=-5)), "inputs: ", "length -5", "0 leaves")


def test_a_number_that_no_tensor_holds_is_no_knob() -> None:
    in_order(refusal(lambda: optimized(stack(1), everywhere({"window": {"window": 10**23}}))), "window", "whole number")


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_a_traced_module_is_refused_by_name() -> None:
    traced = torch.jit.trace(stack(1).eval(), X)
    in_order(refusal(lambda: optimized(traced)), "scripted or traced", "torch.nn.Module that it was made from")


def test_attention_of_three_dimensions_is_refused() -> None:
    in_order(refusal(lambda: reattend.attention(X, X, X, "softmax")), "q of shape (2, 9, 32)", "(batch, heads")
