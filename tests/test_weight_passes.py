"""Exact rewrites of weights in recipes: outputs and the original stay, what was to shrink has shrunk; calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.calibration import AbsMax, Gram, Percentile, calibrate
from reattend.compiler.capture import capture
from reattend.compiler.pipeline import raise_program
from reattend.compiler.program import Program, Store
from reattend.compiler.refusal import Refused

IDS = torch.tensor([[5, 7, 11, 2, 9, 30, 41], [1, 2, 3, 4, 5, 6, 7]])


def llama(**more: Any) -> Any:
    """A llama with a few channels that are much larger than the others."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                            num_hidden_layers=2, vocab_size=60, **more)  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 4 + torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[3] *= 12
            layer.mlp.up_proj.weight[5] *= 12
            layer.mlp.down_proj.weight[:, 7] *= 3
        model.model.embed_tokens.weight[:, 2] *= 12
    return model.eval()


def optimized(model: Any, *passes: Any, **more: Any) -> Any:
    recipe = {"version": 1, "passes": list(passes), **more}
    return reattend.optimize(model, recipe, {"input_ids": IDS}, measure=False)


def raised(model: Any) -> Program:
    return raise_program(capture(model, (), {"input_ids": IDS}), Store())[0]


def spread(values: Tensor) -> float:
    """The largest channel against the median one."""
    most = values.detach().abs().reshape(-1, values.shape[-1]).amax(0)
    return float(most.max() / most.median())


def seen(model: Any, port: str, site: int = 0) -> Tensor:
    program = raised(reattend.compiler.hosted.original(model))
    found = calibrate(
        program.graph, [(IDS,)], {"": (program.ports[program.sites[site].path].nodes[port], AbsMax(1, -1))}
    )
    return found[""]


@pytest.mark.parametrize(
    "passes",
    [
        ["smooth_attention"],
        [{"smooth_attention": {"alpha": 0.8, "beta": 0.4}}],
        ["reorder"],
        ["smooth_proj"],
        [{"rotate": {"values": True}}],
        ["rotate", "reorder", "smooth_attention", {"smooth_proj": {"values": True}}],
    ],
    ids=str,
)
def test_outputs_stay_and_so_does_the_original(passes: list[Any]) -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(input_ids=IDS).logits
    fast = optimized(model, *passes)
    logits = fast(input_ids=IDS).logits
    assert bool((logits - wanted).abs().max() < 1e-5 * wanted.abs().max())
    assert len(fast.report.weights) == len(passes)
    assert any(not torch.equal(t, before[n]) for n, t in fast.state_dict().items())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_smoothed_keys_have_smaller_outliers() -> None:
    model = llama()
    fast = optimized(model, {"smooth_attention": {"alpha": 1.0}})
    before, after = seen(model, "k"), seen(fast, "k")
    assert spread(before[0]) > 3
    pairs = torch.maximum(after[:, :4], after[:, 4:])
    assert torch.allclose(pairs, torch.ones_like(pairs), rtol=1e-4), "alpha = 1: every pair's largest key is 1"


def test_a_rotation_spreads_the_stream() -> None:
    model = llama()
    fast = optimized(model, "rotate")
    assert spread(model.model.embed_tokens.weight) > 3 * spread(fast.model.embed_tokens.weight)


def test_reordered_channels_ascend() -> None:
    fast = optimized(llama(), "reorder")
    program = raised(reattend.compiler.hosted.original(fast))
    down = next(n for n in program.graph.graph.nodes if str(n.target) == "model.layers.0.mlp.down_proj.weight")
    (user,) = down.users
    most = calibrate(program.graph, [(IDS,)], {"x": (user.args[0], AbsMax(-1))})["x"]
    assert bool((most.diff() >= -1e-6).all())


def test_it_ships_as_a_stock_checkpoint_and_saves(tmp_path: Path) -> None:
    model = llama()
    fast = optimized(model, "rotate", "smooth_attention")
    wanted = fast(input_ids=IDS).logits
    fast.export("hf", tmp_path / "hf")
    stock = hf.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.allclose(stock(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    fast.save_pretrained(tmp_path / "own")
    again = reattend.load(tmp_path / "own")
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    longer = torch.arange(1, 12)[None]
    mask = torch.ones_like(longer)
    expected = model(input_ids=longer, attention_mask=mask).logits
    got = again(input_ids=longer, attention_mask=mask).logits
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4), "a new signature: weights are not moved twice"
    assert len(again.report.weights) == 2


def test_beside_other_rewrites_and_after_an_earlier_recipe() -> None:
    model = llama()
    window = [{"match": "*", "attention": {"window": {"window": 3}}}]
    plain = optimized(model, sites=window)(input_ids=IDS).logits
    fast = optimized(model, "rotate", sites=window)
    assert torch.allclose(fast(input_ids=IDS).logits, plain, rtol=1e-4, atol=1e-4)
    turned = fast.model.embed_tokens.weight.clone()
    more = optimized(fast, "smooth_attention")
    assert torch.equal(more.model.embed_tokens.weight, turned), "the first recipe's rotation is not done again"
    assert torch.allclose(more(input_ids=IDS).logits, plain, rtol=1e-4, atol=1e-4)


def test_data_of_the_recipe_calibrates(tmp_path: Path) -> None:
    calls = [{"input_ids": list(range(k, k + 9))} for k in range(3)]
    (tmp_path / "calib.jsonl").write_text("\n".join(map(json.dumps, calls)))
    data = {"calibrate": str(tmp_path / "calib.jsonl")}
    model = llama()
    fast = optimized(model, "smooth_attention", data=data)
    assert not [w for w in fast.report.warnings if "calibrate" in w]
    other = optimized(model, "smooth_attention")
    assert [w for w in other.report.warnings if "fitted to the example inputs" in w]
    assert not torch.allclose(
        fast.model.layers[0].self_attn.k_proj.weight, other.model.layers[0].self_attn.k_proj.weight
    )


def test_a_channel_that_is_never_active_stays() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[[1, 5]] = 0
        model.model.layers[0].mlp.up_proj.weight[4] = 0
    fast = optimized(model, "smooth_attention", "smooth_proj")
    assert bool(torch.isfinite(fast(input_ids=IDS).logits).all())
    query = fast.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(query[[1, 5]], model.model.layers[0].self_attn.q_proj.weight[[1, 5]])


def test_what_cannot_be_done_is_refused_and_the_rest_is_done() -> None:
    tied = llama(tie_word_embeddings=True)
    with pytest.raises(Refused, match=r"rotate: .*lm_head.weight is tied"):
        optimized(tied, "rotate")
    fast = optimized(tied, "rotate", "reorder")
    assert len(fast.report.weights) == 1 and any("lm_head.weight is tied" in w for w in fast.report.warnings)
    assert torch.equal(fast.lm_head.weight, tied.lm_head.weight), "a refused pass leaves nothing behind"
    with pytest.raises(Refused, match="alpha=2"):
        optimized(llama(), {"smooth_attention": {"alpha": 2.0}})


def test_percentiles_and_grams_of_a_stream() -> None:
    values = torch.randn(6, 50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.01])
    shares = {share: Percentile(share, -1) for share in (0.1, 0.5, 0.99)}
    gram = Gram()
    for part in values:
        gram.take(part)
        for reducer in shares.values():
            reducer.take(part)
    rows = values.reshape(-1, 3)
    assert torch.allclose(gram.result(), rows.double().T @ rows.double() / 300, rtol=1e-9)
    for share, reducer in shares.items():
        assert torch.allclose(reducer.result(), rows.abs().quantile(share, 0), rtol=0.05), share
    silent = Percentile(0.5, -1)
    silent.take(torch.zeros(4, 3))
    assert silent.result().tolist() == [0, 0, 0]


def test_statistics_of_no_numbers_are_refused() -> None:
    program = raised(llama())
    node = program.ports[program.sites[0].path].nodes["k"]
    with pytest.raises(Refused, match="no value was seen"):
        calibrate(program.graph, [], {"k": (node, AbsMax(-1))})
    broken = llama()
    broken.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(Refused, match="NaN or infinity"):
        optimized(broken, "smooth_attention")
