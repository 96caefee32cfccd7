"""A rewritten model leaves the process: what is loaded elsewhere computes the same, and what cannot leave says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.refusal import Refused

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 60}
MIXED = {
    "version": 1,
    "sites": [
        {"match": "*", "attention": {"window": {"window": 4, "sinks": 1}}, "heads": {"moh": {"routed_heads": 1}}}
    ],
}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        **SIZES, num_hidden_layers=2, num_key_value_heads=2, use_cache=False, pad_token_id=0, **more
    )
    return hf.LlamaForCausalLM(config).eval()


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def optimized(recipe: Any, **more: Any) -> Any:
    return reattend.optimize(llama(**more), recipe, {"input_ids": ids()}, measure=False)


def elsewhere(code: str, folder: Path) -> str:
    """What a fresh process prints; torchvision's missing schemas are declared by hand where reattend must stay out."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_saved_model_computes_the_same_in_another_process(tmp_path: Path) -> None:
    fast = optimized(MIXED, tie_word_embeddings=True)
    fast.save_pretrained(tmp_path / "model")
    torch.save((ids(), fast(ids()).logits.detach()), tmp_path / "want.pt")
    code = """
import torch, reattend
torch.set_num_threads(THREADS)  # sums are split by threads: with as many, the same numbers to the last place
fast = reattend.load("model")
ids, wanted = torch.load("want.pt")
assert len(fast.signatures) == 1
torch.testing.assert_close(fast(ids).logits, wanted, rtol=0, atol=0)
assert len(fast.signatures) == 1, "the saved graph serves the call"
assert fast.lm_head.weight is fast.model.embed_tokens.weight
print(type(fast).__name__, fast.sites[0].status, len(list(fast.new_parameters())), fast.report.verdict())
"""
    said = elsewhere(code.replace("THREADS", str(torch.get_num_threads())), tmp_path)
    assert said.startswith(f"LlamaForCausalLM rewritten 6 {fast.report.verdict()}")


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    fast = optimized("exact")
    fast.save_pretrained(tmp_path, max_shard_size="10KB")
    fast(ids())
    assert len(fast.signatures) == 1, "what saving notes in the config asks for no new graph"
    again = reattend.load(tmp_path)
    torch.testing.assert_close(again(ids()).logits, fast(ids()).logits, rtol=0, atol=0)


def test_sites_that_were_rolled_back_stay_so(tmp_path: Path) -> None:
    recipe = {
        "version": 1,
        "sites": [{"match": {"layer": "0"}, "attention": {"window": {"window": 2, "sinks": 0}}},
                  {"match": {"layer": "1"}, "attention": "softmax"}],
        "verify": {"max_error": 1e-5},
    }  # fmt: skip
    fast = optimized(recipe)
    assert [row.status for row in fast.sites] == ["rolled back", "rewritten"]
    fast.save_pretrained(tmp_path)
    again = reattend.load(tmp_path)
    mask = torch.ones_like(ids())  # a signature that was not saved
    torch.testing.assert_close(again(ids(), mask).logits, llama()(ids(), mask).logits)
    assert [row.status for row in again.sites] == ["rolled back", "rewritten"]


def test_a_config_of_another_class_makes_nothing(tmp_path: Path) -> None:
    optimized("exact").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for name in ("Trainer", "os", "AutoModel", "__class__"):
        config.write_text(config.read_text().replace("LlamaForCausalLM", name))
        with pytest.raises(Refused, match="architecture"):
            reattend.load(tmp_path)
        config.write_text(config.read_text().replace(f'"{name}"', '"LlamaForCausalLM"'))


@pytest.mark.slow
def test_an_exact_rewrite_is_a_stock_checkpoint(tmp_path: Path) -> None:
    fast = optimized("exact")
    fast.export("hf", tmp_path / "stock")
    torch.save((ids(), fast(ids()).logits.detach()), tmp_path / "want.pt")
    code = """
import sys, torch
lib = torch.library.Library("torchvision", "FRAGMENT")
lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import transformers
ids, want = torch.load("want.pt")
torch.testing.assert_close(transformers.AutoModelForCausalLM.from_pretrained("stock")(ids).logits, want)
assert not any(name.split(".")[0] == "reattend" for name in sys.modules)
print("equal")
"""
    assert "equal" in elsewhere(code, tmp_path)


def test_what_computes_something_else_is_no_stock_checkpoint(tmp_path: Path) -> None:
    fast = optimized(MIXED)
    with pytest.raises(Refused, match=r"2 sites compute something else.*model\.layers\.0\.self_attn \(window\)"):
        fast.export("hf", tmp_path)
    routes = fast.ships()
    assert [route.name for route in routes.all if not route.open] == ["hf"]
    assert str(routes).splitlines()[1].startswith("hf                    no: 2 sites")
    with pytest.raises(Refused, match="did you mean 'torch'"):
        fast.export("troch", tmp_path)


def test_weights_of_few_bits_generate_and_say_so() -> None:
    """Quantized layers see no other tokens than their originals; merged tokens are another matter."""
    fast = optimized("w8")
    assert fast.ships()["generate"].open
    assert fast.generate(ids(1, 5), max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 7)


@pytest.mark.slow
def test_an_exported_program_runs_without_reattend(tmp_path: Path) -> None:
    fast = optimized(MIXED)
    fast.export("torch", tmp_path / "model.pt2")
    torch.save((ids(3, 20), fast(ids(3, 20)).logits.detach()), tmp_path / "want.pt")
    code = """
import sys, torch
ids, want = torch.load("want.pt")
torch.testing.assert_close(torch.export.load("model.pt2").module()(input_ids=ids)["logits"], want)
assert not any(name.split(".")[0] in ("reattend", "transformers") for name in sys.modules)
print("equal")
"""
    assert "equal" in elsewhere(code, tmp_path)


def test_without_a_compiler_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimized("exact")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert fast.ships()["aoti"].reason.startswith("no C++ compiler")
    with pytest.raises(Refused, match=r"no C\+\+ compiler"):
        fast.export("aoti", tmp_path / "model.pt2")


@pytest.mark.slow
def test_a_compiled_package_runs_without_reattend(tmp_path: Path) -> None:
    fast = optimized("exact")
    fast.export("aoti", tmp_path / "model.pt2")
    torch.save((ids(3, 20), fast(ids(3, 20)).logits.detach()), tmp_path / "want.pt")
    code = """
import sys, torch
ids, want = torch.load("want.pt")
got = torch._inductor.aoti_load_package("model.pt2")(input_ids=ids)["logits"]
torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # other orders of summation
assert not any(name.split(".")[0] in ("reattend", "transformers") for name in sys.modules)
print("equal")
"""
    assert "equal" in elsewhere(code, tmp_path)


def test_what_was_not_captured_whole_says_so(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no graph"):
        reattend.save(llama(), tmp_path)
