"""Groups as a graph shows them; each rewrite exact on models of four families, and undone; ties, refusals."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call

import reattend
from reattend.compiler.algebra.groups import Group, find_groups, group
from reattend.compiler.algebra.hadamard import hadamard, rotation
from reattend.compiler.algebra.moves import Absorb, Move, low_rank
from reattend.compiler.algebra.rewrites import Average, Mix, Permute, Rewrite, Rotate, Scale, Turn
from reattend.compiler.algebra.table import group_table
from reattend.compiler.capture import capture
from reattend.compiler.pipeline import raise_program
from reattend.compiler.program import Store
from reattend.compiler.refusal import Refused

TEXT = {"input_ids": torch.tensor([[5, 7, 11, 2, 9, 30, 41], [1, 2, 3, 4, 5, 6, 7]])}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}


def llama(**more: Any) -> Any:
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=60, **more)  # type: ignore[arg-type]
    return hf.LlamaForCausalLM(config), TEXT


def gpt2() -> Any:
    config = hf.GPT2Config(
        n_embd=32, n_head=4, n_layer=2, vocab_size=60, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config), TEXT


def bert() -> Any:
    config = hf.BertConfig(**SMALL, vocab_size=60, max_position_embeddings=32)  # type: ignore[arg-type]
    return hf.BertForSequenceClassification(config), TEXT


def vit() -> Any:
    config = hf.ViTConfig(**SMALL, image_size=32, patch_size=8)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return hf.ViTForImageClassification(config), {"pixel_values": images}


FAMILIES = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit}


def shaken(model: nn.Module) -> nn.Module:
    """Weights of which none is special: norms that scale, biases that shift."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 4 + torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return model.eval()


def groups_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Group, ...]:
    program, _ = raise_program(capture(model.eval(), (), inputs), Store())
    return find_groups(program)


@functools.cache
def groups_in(family: str) -> tuple[Group, ...]:
    return groups_of(*FAMILIES[family]())


def output(model: nn.Module, inputs: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        answer = functional_call(model, state, (), inputs, tie_weights=False)
    return next(iter(answer.values()))  # type: ignore[no-any-return]


def far(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


def rewrites(g: Group) -> Iterator[Rewrite]:
    """One of each kind that a group allows, with an own one for every block."""
    draw = torch.Generator().manual_seed(0)
    if "permute" in g.allows:
        yield Permute.of(*(torch.arange(g.size).roll(b % (g.size - 1) + 1).tolist() for b in range(g.blocks)))
    if "scale" in g.allows:
        factors = torch.rand(g.blocks, g.size, generator=draw) + 0.5
        if g.partners:
            factors = torch.maximum(factors, factors[:, list(g.partners)])
            yield Turn(factors, g.partners)
        yield Scale(factors)
    if "rotate" in g.allows:
        yield Rotate(rotation(g.size, "random", keeps_mean=g.keeps_mean))
        if not g.keeps_mean:
            yield Rotate(rotation(g.size))
    if "mix" in g.allows:
        turns = torch.stack([rotation(g.size, "random", seed=b) for b in range(g.blocks)])
        yield Mix(turns * (torch.rand(g.size, generator=draw) + 0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rewrite_that_is_allowed_is_exact_and_can_be_undone(family: str) -> None:
    model, inputs = FAMILIES[family]()
    shaken(model)
    if family == "gpt2":  # its head is tied to the embedding, so that this norm cannot be absorbed
        model.transformer.ln_f.weight.data.fill_(1.0)
    state = dict(model.state_dict())
    wanted = output(model, inputs, state)
    done = set()
    for g in groups_of(model, inputs):
        for rewrite in rewrites(g):
            before = dict(state)
            absorbed = Absorb.of(g, before) if isinstance(rewrite, Rotate) else None
            if absorbed is not None:
                before |= absorbed.forward(before)
            move = Move(g, rewrite)
            changed = move.forward(before)
            moved = before | changed
            assert any(not torch.equal(moved[name], state[name]) for name in changed)
            assert far(output(model, inputs, moved), wanted) < 1e-5, str(move)
            back = moved | move.inverse(moved)
            if absorbed is not None:
                back |= absorbed.inverse(back)
            assert all(torch.allclose(back[name], state[name], atol=1e-5) for name in state), str(move)
            done.add((g.kind, str(rewrite)))
    expected = {("heads", "permute"), ("values", "mix"), ("values", "rotate"), ("keys", "scale"), ("ffn", "permute"),
                ("residual", "permute")}  # fmt: skip
    expected |= {("residual", "rotate")} if family != "bert" else set()
    expected |= {("keys", "turn"), ("ffn", "scale")} if family == "llama" else {("keys", "mix")}
    assert expected <= done


def test_the_page_shows_what_is_found() -> None:
    page = Path(reattend.__path__[0]) / "docs" / "weights.md"
    table = group_table({family: groups_in(family) for family in FAMILIES})
    assert table in page.read_text(encoding="utf-8"), table


def test_a_group_prints() -> None:
    g = group(groups_in("vit"), "values", "vit.layers.0.attention")
    assert str(g).splitlines() == [
        "vit.layers.0.attention: values[4x8] permute+scale+rotate+mix",
        "  writes    vit.layers.0.attention.v_proj.weight[0: 0..31]",
        "  writes    vit.layers.0.attention.v_proj.bias[0: 0..31]",
        "  reads     vit.layers.0.attention.o_proj.weight[1: 0..31]",
    ]


def test_spaces_of_fused_weights_are_parts_of_them() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=64, num_heads=4).eval()
    x = torch.randn(2, 3, 32, 32)
    program, _ = raise_program(capture(model, (x,)), Store())
    found = find_groups(program)
    values = group(found, "values")
    assert [str(s) for s in values.writes] == [
        "blocks.0.attn.qkv.weight[0: 128..191]",
        "blocks.0.attn.qkv.bias[0: 128..191]",
    ]
    state = dict(model.state_dict())
    with torch.no_grad():
        for g in found:
            for rewrite in rewrites(g):
                before = state | (Absorb.of(g, state).forward(state) if isinstance(rewrite, Rotate) else {})
                moved = before | Move(g, rewrite).forward(before)
                assert far(functional_call(model, moved, (x,)), model(x)) < 1e-5, (g.kind, rewrite)


@pytest.mark.parametrize(
    ("family", "kind", "action", "reason"),
    [
        ("llama", "keys", "mix", "commutes with RoPE"),
        ("llama", "residual", "scale", "a norm would undo it"),
        ("bert", "residual", "rotate", "a norm's output is part of the stream"),
        ("vit", "ffn", "rotate", "goes channel by channel"),
        ("gpt2", "heads", "mix", "the softmax keeps heads apart"),
    ],
)
def test_what_is_not_exact_is_refused_with_its_reason(family: str, kind: str, action: str, reason: str) -> None:
    g = group(groups_in(family), kind)
    with pytest.raises(Refused, match=reason):
        g.check(action)


def test_an_output_pins_the_basis_it_shows() -> None:
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**SMALL, vocab_size=60, max_position_embeddings=32)).eval()  # type: ignore[arg-type]
    g = group(groups_of(model, TEXT), "residual")
    assert g.allows == ()
    with pytest.raises(Refused, match="is an output"):
        Move(g, Permute.of(range(31, -1, -1)))


def test_values_that_break_a_group_are_refused() -> None:
    found = groups_in("llama")
    keys, heads, residual = group(found, "keys"), group(found, "heads"), group(found, "residual")
    with pytest.raises(Refused, match="differ within a pair"):
        Move(keys, Scale(torch.arange(1.0, 9.0)))
    with pytest.raises(Refused, match="no zeros"):
        Move(keys, Scale(torch.zeros(8)))
    with pytest.raises(Refused, match="not an order"):
        Move(heads, Permute.of([0, 0]))
    with pytest.raises(Refused, match="an orthogonal one of 32"):
        Move(residual, Rotate(torch.ones(32, 32)))
    with pytest.raises(Refused, match="a divisor of 2"):
        Move(heads, Average(3))
    gpt = group(groups_in("gpt2"), "residual")
    with pytest.raises(Refused, match="LayerNorm takes the mean"):
        Move(gpt, Rotate(rotation(32)))


def test_tied_weights_take_what_is_its_own_dual_and_refuse_the_rest() -> None:
    model, inputs = llama(tie_word_embeddings=True)
    shaken(model)
    state = dict(model.state_dict())
    g = group(groups_of(model, inputs), "residual")
    moved = Move(g, Permute.of(torch.randperm(32).tolist())).forward(state)
    assert moved["lm_head.weight"] is moved["model.embed_tokens.weight"], "still tied"
    assert far(output(model, inputs, state | moved), output(model, inputs, state)) < 1e-5
    with pytest.raises(Refused, match="untie lm_head.weight first"):
        Absorb.of(g, state).forward(state)
    model.model.norm.weight.data.fill_(1.0)
    state = dict(model.state_dict())
    absorbed = state | Absorb.of(g, state).forward(state)
    turned = absorbed | Move(g, Rotate(rotation(32))).forward(absorbed)
    assert far(output(model, inputs, turned), output(model, inputs, state)) < 1e-5


def test_a_rotation_waits_for_the_norms() -> None:
    model, inputs = llama()
    shaken(model)
    g = group(groups_of(model, inputs), "residual")
    with pytest.raises(Refused, match="input_layernorm.weight scales channels"):
        Move(g, Rotate(rotation(32))).forward(dict(model.state_dict()))


class Twice(nn.Module):
    """One attention called twice, its output projection once more outside it where `leaks`."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        from small_models import Attend

        self.attend, self.leaks = Attend(causal=False), leaks

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(x + self.attend(x))
        return self.attend.o_proj(y) if self.leaks else y  # type: ignore[no-any-return]


@pytest.mark.parametrize("leaks", [False, True])
def test_a_shared_layer_is_one_group_and_a_weight_used_elsewhere_closes_it(leaks: bool) -> None:
    torch.manual_seed(0)
    model, x = Twice(leaks).eval(), torch.randn(2, 5, 32)
    program, _ = raise_program(capture(model, (x,)), Store())
    (values,) = (g for g in find_groups(program) if g.kind == "values")
    if leaks:
        with pytest.raises(Refused, match=r"o_proj.weight is used 3 times, and only 2"):
            values.check("mix")
        return
    state = dict(model.state_dict())
    moved = Move(values, Mix(torch.randn(2, 8, 8) + 2 * torch.eye(8))).forward(state)
    assert far(functional_call(model, state | moved, (x,)), model(x)) < 1e-5


def test_low_rank_is_exact_from_the_rank_on() -> None:
    model, inputs = gpt2()
    shaken(model)
    g = group(groups_of(model, inputs), "values", "transformer.h.0.attn")
    state = dict(model.state_dict())
    narrow = state | low_rank(g, state, 3).forward(state)
    again = narrow | low_rank(g, narrow, 3).forward(narrow)
    wanted = output(model, inputs, narrow)
    assert far(output(model, inputs, again), wanted) < 1e-5, "what has rank 3 is kept by rank 3"
    assert far(wanted, output(model, inputs, state)) > 1e-3
    v, o = narrow["transformer.h.0.attn.c_attn.weight"][:, 64:72], narrow["transformer.h.0.attn.c_proj.weight"][:8]
    assert int(torch.linalg.matrix_rank(v @ o, rtol=1e-4)) == 3
    full, part = state["transformer.h.0.attn.c_attn.weight"][:, 64:72], state["transformer.h.0.attn.c_proj.weight"][:8]
    lost = torch.linalg.svdvals((full @ part).double())[3:].norm()
    assert torch.allclose((full @ part - v @ o).norm().double(), lost, rtol=0.3), (
        "near the best for weights without bias"
    )


def test_an_average_is_exact_where_heads_are_equal() -> None:
    model, inputs = gpt2()
    shaken(model)
    g = group(groups_of(model, inputs), "heads", "transformer.h.0.attn")
    state = dict(model.state_dict())
    equal = state | Move(g, Average(2)).forward(state)
    assert not torch.equal(equal["transformer.h.0.attn.c_attn.weight"], state["transformer.h.0.attn.c_attn.weight"])
    assert all(
        torch.allclose(value, equal[name], atol=1e-6) for name, value in Move(g, Average(2)).forward(equal).items()
    )


@pytest.mark.parametrize("size", [1, 2, 8, 12, 24, 20, 48, 96])
def test_hadamard_matrices(size: int) -> None:
    H = hadamard(size)
    assert torch.equal(H.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(H @ H.T, size * torch.eye(size, dtype=torch.float64))


def test_sizes_without_a_known_hadamard_matrix_are_refused() -> None:
    with pytest.raises(Refused, match="no Hadamard matrix of 28"):
        hadamard(28)
