"""optimize() on small models: same class, same numbers where exact, a report where not, nothing harmed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_models import stack
from torch import Tensor, nn

import reattend
from reattend import Mechanism, Refused, register
from reattend.compiler import mechanism as registry
from reattend.compiler.peak_memory import peak_bytes

X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


def recipe(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": 1, "sites": list(rules), **more}


def optimized(model: nn.Module, wanted: Any, **more: Any) -> Any:
    return reattend.optimize(model, wanted, X, measure=False, **more)


@pytest.fixture
def scratch_registry() -> Iterator[None]:
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def test_exact_gives_the_same_numbers_at_other_sizes_and_the_same_gradients() -> None:
    model = stack()
    fast = optimized(model, "exact")
    assert isinstance(fast, type(model))
    x = torch.randn(3, 17, 32, requires_grad=True)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad(fast(x).square().sum(), [x, *fast.parameters()])
    meant = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for a, b in zip(got, meant, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


class Picks(nn.Module):
    """Attention, and a layer for those samples only that their data choose."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.more = stack(1), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(x)
        chosen = (x[:, 0, 0] > 0).nonzero().squeeze(1)
        return y.index_add(0, chosen, self.more(y.index_select(0, chosen)))


def test_sizes_that_only_the_data_tell_are_no_obstacle() -> None:
    model = Picks().eval()
    fast = optimized(model, "exact")
    for x in (X, -X.abs(), torch.randn(4, 5, 32)):
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


def test_the_original_is_bit_identical_afterwards_and_after_a_failure() -> None:
    model = stack()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    y = model(X)
    optimized(model, recipe({"match": "*", "attention": "linear"}))
    with pytest.raises(Refused):
        optimized(model, recipe({"match": "*", "attention": "agent"}))
    assert torch.is_grad_enabled()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(X), y)
    assert not hasattr(model.layers[0].attn, "reattend")


def test_the_same_recipe_gives_the_same_graph_and_the_same_report() -> None:
    wanted = recipe(
        {"match": {"layer": "0"}, "attention": "keep"}, {"match": "*", "attention": {"window": {"window": 4}}}
    )
    one, two = optimized(stack(), wanted), optimized(stack(), wanted)
    assert one.graph.code == two.graph.code
    assert one.report.text() == two.report.text()
    statuses = [row.status for row in one.sites]
    assert statuses == ["kept", "rewritten", "rewritten"]


def test_what_a_window_does_to_the_output_is_reported_and_right() -> None:
    model = stack(1)
    fast = optimized(model, recipe({"match": "*", "attention": {"window": {"window": 3, "sinks": 1}}}))
    layer = model.layers[0]
    h = layer.norm1(X)
    B, N, _ = X.shape
    q = layer.attn.q_proj(h).view(B, N, 4, 8).transpose(1, 2)
    k, v = (
        p(h).view(B, N, 2, 8).transpose(1, 2).repeat_interleave(2, 1) for p in (layer.attn.k_proj, layer.attn.v_proj)
    )
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    keep = (j <= i) & ((i - j < 3) | (j < 1))
    o = (q @ k.mT * 8**-0.5).masked_fill(~keep, -torch.inf).softmax(-1) @ v
    x = X + layer.attn.o_proj(o.transpose(1, 2).reshape(B, N, 32))
    torch.testing.assert_close(fast(X), x + layer.mlp(layer.norm2(x)), atol=1e-5, rtol=1e-5)
    row = fast.sites["layers.0.attn"]
    assert row.kind == "approximate" and row.deviation.relative > 0.01
    assert "1 of 1 sites rewritten" in fast.report.verdict()
    assert "random inputs: correctness only, not quality" in fast.report.verdict()


def test_a_core_split_over_heads_is_its_parts_side_by_side() -> None:
    model = stack(1)
    fast = optimized(model, _split())
    whole = optimized(model, recipe({"match": "*", "attention": {"window": {"window": 2, "sinks": 0}}}))
    with torch.no_grad():
        outputs = [_heads(m) for m in (fast, model, whole)]
    split, plain, windowed = outputs
    torch.testing.assert_close(split[:, 2:], plain[:, 2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(split[:, :2], windowed[:, :2], atol=1e-5, rtol=1e-5)


def _split() -> dict[str, Any]:
    window = {"window": {"window": 2, "sinks": 0}}
    return recipe({"match": "*", "attention": {"split": {"2-3": "softmax", "rest": window}}})


def _heads(model: nn.Module) -> Tensor:
    """What feeds the output projection, as heads (B, H, N, D)."""
    seen: list[Tensor] = []
    hook = model.layers[0].attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(X)
    hook.remove()
    return seen[0].unflatten(-1, (4, 8)).transpose(1, 2)


def test_a_split_that_cuts_a_kv_group_is_refused() -> None:
    with pytest.raises(Refused, match="kv|group"):
        optimized(stack(1), recipe({"match": "*", "attention": {"split": {"0": "softmax", "rest": "window"}}}))


def test_a_gate_reads_what_the_core_before_it_gives() -> None:
    gate = {"moh": {"shared_heads": 4, "routed_heads": 0}}
    wanted = recipe({"match": "*", "attention": {"window": {"window": 4}}, "heads": gate})
    fast = optimized(stack(), wanted)
    assert "window" in fast.sites[0].mechanism and "moh" in fast.sites[0].mechanism
    assert any("reattend.moh" in name for name, _ in fast.new_parameters())
    fast(X).sum().backward()
    assert any(p.grad is not None for _, p in fast.new_parameters())


def test_losses_are_collected_at_every_call() -> None:
    fast = optimized(stack(), recipe({"match": "*", "heads": {"moh": {"shared_heads": 1, "routed_heads": 2}}}))
    fast(X)
    assert sorted(fast.losses()) == [f"layers.{k}.attn.load_balance" for k in range(3)]


def test_a_region_replaces_the_whole_attention() -> None:
    model = stack(1)
    fast = optimized(model, recipe({"match": "*", "attention": {"poolformer": {"pool_size": 3}}}))
    h = model.layers[0].norm1(X)
    pooled = reattend.module("poolformer", causal=True, pool_size=3)(h)
    x = X + pooled
    torch.testing.assert_close(fast(X), x + model.layers[0].mlp(model.layers[0].norm2(x)), atol=1e-5, rtol=1e-5)


def test_a_later_recipe_stacks_on_an_earlier_one() -> None:
    model = stack()
    first = optimized(model, recipe({"match": {"layer": "0"}, "attention": {"window": {"window": 4}}}))
    second = optimized(first, recipe({"match": {"layer": "1"}, "attention": "linear"}))
    assert [row.mechanism.split("(")[0] for row in second.sites] == ["window", "linear", ""]
    both = optimized(model, recipe({"match": {"layer": "0"}, "attention": {"window": {"window": 4}}},
                                   {"match": {"layer": "1"}, "attention": "linear"}))  # fmt: skip
    torch.testing.assert_close(second(X), both(X))


@pytest.mark.parametrize(("otherwise", "rewritten"), [("rollback", 0), ("warn", 3)])
def test_bounds_roll_sites_back_or_warn(otherwise: str, rewritten: int) -> None:
    wanted = recipe(
        {"match": "*", "attention": {"window": {"window": 3}}}, verify={"max_error": 1e-6, "else": otherwise}
    )
    fast = optimized(stack(), wanted)
    assert sum(row.status == "rewritten" for row in fast.sites) == rewritten
    if not rewritten:
        torch.testing.assert_close(fast(X), stack()(X), atol=1e-5, rtol=1e-5)
        assert fast.sites[0].reason.startswith("rolled back: max_error")


def test_bounds_can_refuse() -> None:
    wanted = recipe(
        {"match": "*", "attention": {"window": {"window": 3}}}, verify={"max_error": 1e-6, "else": "refuse"}
    )
    with pytest.raises(Refused, match="max_error"):
        optimized(stack(), wanted)


def test_quality_bounds_ask_for_data_and_use_it() -> None:
    wanted = recipe({"match": "*", "attention": {"window": {"window": 3}}}, verify={"max_kl": 1e-9})
    with pytest.raises(Refused, match="max_kl without data"):
        optimized(stack(), wanted)
    fast = optimized(stack(), wanted, data=[X, torch.randn(1, 12, 32)])
    assert "2 batches given" in fast.report.verdict()
    assert all(row.status == "rolled back" for row in fast.sites)


def test_a_mechanism_that_lies_about_being_exact_is_rolled_back(scratch_registry: None) -> None:
    @register("liar")
    @dataclass(frozen=True)
    class Liar(Mechanism):
        kind = "exact"

        def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return reattend.attend(q, k, v, site=site) * 1.001

    fast = optimized(stack(), recipe({"match": "*", "attention": "liar"}))
    assert all(row.status == "rolled back" and "exact in name only" in row.reason for row in fast.sites)


def test_a_mechanism_of_ones_own_with_a_learned_tensor(scratch_registry: None) -> None:
    @register("tempered")
    @dataclass(frozen=True)
    class Tempered(Mechanism):
        """A learned temperature per head."""

        start: float = 1.0

        def params(self, site: Any) -> Any:
            return {"t": reattend.Param((site.heads,), lambda t: t.fill_(self.start))}

        def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return reattend.attend(q * p.t.view(-1, 1, 1), k, v, site=site)

    model = stack()
    fast = optimized(model, recipe({"match": "*", "attention": "tempered"}))
    torch.testing.assert_close(fast(X), model(X), atol=1e-5, rtol=1e-5)
    assert [n for n, _ in fast.new_parameters()] == [f"layers.{k}.attn.reattend.tempered.t" for k in range(3)]
    fast(X).sum().backward()
    assert all(p.grad.abs().sum() > 0 for _, p in fast.new_parameters())


class Padded(nn.Module):
    """Attention with a mask of whole numbers: `real` stands where a key is one."""

    def __init__(self, real: int) -> None:
        super().__init__()
        self.inner, self.real = stack(1, causal=False).layers[0].attn, real

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        a, B, N = self.inner, *x.shape[:2]
        q = a.q_proj(x).view(B, N, 4, 8).transpose(1, 2)
        k, v = (p(x).view(B, N, 2, 8).transpose(1, 2).repeat_interleave(2, 1) for p in (a.k_proj, a.v_proj))
        kept = mask[:, None, None, :] == self.real
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        return a.o_proj(o.transpose(1, 2).reshape(B, N, 32))


PADDED = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def test_padding_reaches_a_mechanism_as_the_port_key_padding() -> None:
    fast = reattend.optimize(
        Padded(1).eval(), recipe({"match": "*", "attention": "linear"}), (X, PADDED), measure=False
    )
    assert "padding" in fast.sites[0].site.features
    other = X.clone()
    other[1, 6:] += 1.0  # what stands behind the padding cannot matter to the rows before it
    torch.testing.assert_close(fast(X, PADDED)[:, :6], fast(other, PADDED)[:, :6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("real", [1, 0])
def test_padding_is_verified_as_what_a_mechanism_gets(real: int, scratch_registry: None) -> None:
    """True where a key is real, whatever the table says it with; one table read as it lies would be rolled back."""

    @register("softmax_of_real_keys")
    @dataclass(frozen=True)
    class SoftmaxOfRealKeys(Mechanism):
        kind = "exact"
        honours = frozenset({"padding"})

        def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor) -> Tensor:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            scores = (q @ k.mT * site.scale).masked_fill(~key_padding[:, None, None], -torch.inf)
            return scores.softmax(-1) @ v

    model, mask = Padded(real).eval(), PADDED if real else 1 - PADDED
    wanted = recipe({"match": "*", "attention": "softmax_of_real_keys"})
    fast = reattend.optimize(model, wanted, (X, mask), measure=False)
    assert fast.sites[0].mechanism == "softmax_of_real_keys()"
    torch.testing.assert_close(fast(X, mask), model(X, mask), atol=1e-5, rtol=1e-5)


def test_explain_lists_sites_with_their_masks() -> None:
    found = reattend.explain(stack(), X)
    assert [s.path for s in found.sites] == ["layers.0.attn", "layers.1.attn", "layers.2.attn"]
    assert found.sites[0].causal and found.sites[0].kv_heads == 2
    assert "keeps     j <= i" in found.text("layers.1.attn")
    with pytest.raises(Refused, match="layers.9"):
        found.text("layers.9")


def test_a_model_that_cannot_be_captured_whole_is_rewritten_in_islands(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = stack(1), stack(1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(-x if x.sum() > 0 else x)

    model = Branching().eval()
    wanted = recipe(
        {"match": "first.layers.0.*", "attention": {"window": {"window": 3}}}, {"match": "*", "attention": "softmax"}
    )
    fast = optimized(model, wanted)
    assert [row.site.path for row in fast.sites] == ["first.layers.0.attn", "last.layers.0.attn"]
    assert fast.sites["first.layers.0.attn"].mechanism.startswith("window")
    assert "captured in 2 islands" in fast.report.text() and not fast.report.warnings
    exact = optimized(model, "exact")
    for x in (X, -X, torch.randn(3, 12, 32)):
        torch.testing.assert_close(exact(x), model(x), atol=1e-5, rtol=1e-5)
    assert "def forward" not in capfd.readouterr().err


def test_an_exact_swap_is_verified_without_all_scores_at_once() -> None:
    q = torch.randn(1, 2048, 64)
    model = nn.TransformerEncoderLayer(64, 8, 64, batch_first=True).eval()
    peak = peak_bytes(lambda: reattend.optimize(model, "exact", q, measure=False), warm=False)
    assert peak < 8 * 2048 * 2048 * 8, "a float64 number for every score"


class Drawing(nn.Module):
    """Attention behind a random projection, as hashes are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x @ torch.randn(32, 32))
        return y


def test_a_graph_that_draws_as_its_model_does_is_not_called_another() -> None:
    fast = reattend.optimize(Drawing().eval(), "exact", torch.randn(2, 7, 32), measure=False)
    assert not fast.report.warnings
