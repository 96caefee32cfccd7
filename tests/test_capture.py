"""Capture gives the model's numbers and gradients at sizes it has not seen, and leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from reattend.compiler.capture import Captured, capture
from reattend.compiler.refusal import Refused
from reattend.compiler.signature import Call, forward_signature

TINY = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 60,
    "num_hidden_layers": 2,
}


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(1, 60, (batch, length))


def run(captured: Captured, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = Call.of(forward_signature(model), args, kwargs)
    tensors = captured.inputs(call)
    captured.check(tensors)
    return captured.result(call, captured.graph(*tensors))


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            same(one[name], other[name])
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            same(a, b)


@dataclass
class Family:
    make: Callable[[], nn.Module]
    call: Callable[[int, int], dict[str, Any]]  # batch, length
    lengths: tuple[int, int] = (7, 11)


FAMILIES = {
    "llama": Family(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, num_key_value_heads=2, use_cache=False)),
        lambda b, n: {"input_ids": ids(b, n), "attention_mask": torch.ones(b, n, dtype=torch.long)},
    ),
    "bert": Family(lambda: hf.BertModel(hf.BertConfig(**TINY)), lambda b, n: {"input_ids": ids(b, n)}),
    "gpt2": Family(
        lambda: hf.GPT2Model(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, bos_token_id=0, eos_token_id=0)
        ),
        lambda b, n: {"input_ids": ids(b, n)},
    ),
    "t5": Family(
        lambda: hf.T5Model(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=60)),
        lambda b, n: {"input_ids": ids(b, n), "decoder_input_ids": ids(b, n - 2)},
    ),
    "vit": Family(
        lambda: hf.ViTModel(
            hf.ViTConfig(**{k: v for k, v in TINY.items() if k != "vocab_size"}, image_size=8, patch_size=4)
        ),
        lambda b, n: {"pixel_values": torch.randn(b, 3, 8, 8)},
    ),
    "encoder layer": Family(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        lambda b, n: {"src": torch.randn(b, n, 16)},
    ),
}


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)


FAMILIES["timm vit"] = Family(timm_vit, lambda b, n: {"x": torch.randn(b, 3, 32, 32)})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_captured_model_gives_the_same_numbers_at_other_sizes(family: Family) -> None:
    model = family.make().eval()
    weights = copy.deepcopy(model.state_dict())
    captured = capture(model, kwargs=family.call(1, family.lengths[0]))
    for batch, length in ((2, family.lengths[0]), (3, family.lengths[1]), (1, family.lengths[1])):
        given = family.call(batch, length)
        with torch.no_grad():
            same(run(captured, model, **given), model(**given))
    assert captured.notes == ()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "vit", "encoder layer"])
def test_a_captured_model_has_the_same_gradients(name: str) -> None:
    family = FAMILIES[name]
    model = family.make().eval()
    captured = capture(model, kwargs=family.call(2, 5))
    given = family.call(3, 6)
    gradients = []
    for answer in (run(captured, model, **given), model(**given)):
        model.zero_grad()
        (answer if isinstance(answer, Tensor) else answer[0]).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for path in gradients[0]:
        torch.testing.assert_close(gradients[0][path], gradients[1][path], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch itself, where it packs
def test_an_encoder_that_packs_gives_zeros_where_its_input_is_padding() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(16)).eval()
    x, length = torch.randn(2, 7, 16), torch.arange(7)
    right, middle = length >= torch.tensor([[7], [3]]), (length == 2).expand(2, 7)
    with torch.no_grad():
        captured = capture(model, (x,), {"src_key_padding_mask": right})
        for padding in (right, middle):  # the second is not packed
            wanted = model(x, src_key_padding_mask=padding)
            assert (captured.graph(x, padding)[0] - wanted).abs().max() <= 1e-5


def test_the_graph_is_over_the_models_own_tensors_under_their_own_names() -> None:
    model = FAMILIES["llama"].make().eval()
    graph = capture(model, kwargs={"input_ids": ids(2, 5)}).graph
    own = dict(model.named_parameters())
    named = {n.target for n in graph.graph.find_nodes(op="get_attr")}
    assert "model.layers.0.self_attn.q_proj.weight" in named
    assert own.keys() <= named
    assert all(graph.get_parameter(path) is own[path] for path in own)
    assert [n.name for n in graph.graph.find_nodes(op="placeholder")] == ["input_ids"]
    assert not [n for n in graph.graph.nodes if "assert" in str(n.target)]
    assert all("val" in n.meta for n in graph.graph.nodes if n.op != "output")
    linear = next(n for n in graph.graph.nodes if "linear" in str(n.target))
    assert [path for path, _ in linear.meta["nn_module_stack"].values()][-1] == "model.layers.0.self_attn.q_proj"


class Containers(nn.Module):
    """Dicts and tuples in, a dataclass out, a number among the answers."""

    @dataclass
    class Answer:
        total: Tensor
        parts: tuple[Tensor, ...]
        length: int

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.offset = torch.arange(4.0)

    def forward(self, batch: dict[str, Any], *, twice: bool = False) -> Answer:
        x, (y, z) = batch["x"], batch["pair"]
        total = self.linear(x) + y + self.offset + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return self.Answer(total * 2 if twice else total, (y + z, z), x.shape[1])


@pytest.mark.parametrize("twice", [True, False])
def test_containers_go_in_and_come_out(twice: bool) -> None:
    model = Containers()

    def batch(b: int, n: int) -> dict[str, Any]:
        return {"x": torch.randn(b, n, 4), "pair": (torch.randn(b, n, 4), torch.randn(b, n, 4))}

    captured = capture(model, (batch(2, 5),), {"twice": twice})
    given = batch(3, 7)
    answer, expected = run(captured, model, given, twice=twice), model(given, twice=twice)
    assert type(answer) is Containers.Answer and answer.length == 7
    torch.testing.assert_close(answer.total, expected.total)
    torch.testing.assert_close(answer.parts, expected.parts)
    names = {str(n.target) for n in captured.graph.graph.find_nodes(op="get_attr")}
    assert names == {"linear.weight", "linear.bias", "offset", "_reattend_constants.c0"}


def test_running_statistics_move_as_in_the_original() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).train()
    other, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    captured = capture(model, (torch.randn(5, 3, 6),))
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert set(captured.writes) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    x = torch.randn(8, 3, 6)
    same(run(captured, model, x), other(x))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    x = torch.randn(2, 3)
    captured = capture(Two(), (x, x))
    y, z = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(run(captured, Two(), y, z), y - 2 * z)


def test_tied_weights_keep_both_names() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, tie_word_embeddings=True)).eval()
    graph = capture(model, kwargs={"input_ids": ids(2, 5), "use_cache": False}).graph
    assert graph.lm_head.weight is graph.model.embed_tokens.weight is model.lm_head.weight


def test_a_shared_module_is_one_module_called_often() -> None:
    model = hf.AlbertModel(hf.AlbertConfig(**TINY, embedding_size=16)).eval()
    captured = capture(model, kwargs={"input_ids": ids(2, 5)})
    query = "encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"
    assert len([n for n in captured.graph.graph.find_nodes(op="get_attr") if n.target == query]) == 1
    users = next(n for n in captured.graph.graph.find_nodes(op="get_attr") if n.target == query).users
    assert len(users) == 2
    given = ids(3, 9)
    same(run(captured, model, input_ids=given)[0], model(given)[0])


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_size_outside_the_captured_range_is_refused_with_both_sizes() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.view(-1, 2, 8).sum(1) @ torch.ones(8, 3) + y.sum()

    captured = capture(Fixed(), (torch.randn(4, 16), torch.randn(4, 3)))
    with pytest.raises(Refused, match="x: dim 1 is 8: captured with 16"):
        captured.check((torch.randn(4, 8), torch.randn(4, 3)))
    with pytest.raises(Refused, match="y dim 0 is 5: captured as equal to x dim 0, which is 4"):
        captured.check((torch.randn(4, 16), torch.randn(5, 3)))
    with pytest.raises(Refused, match=r"y: dtype torch.float64: captured with torch.float32"):
        captured.check((torch.randn(4, 16), torch.randn(4, 3).double()))


def test_a_relation_between_sizes_is_checked() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], -1, 2, 3).sum(2)

    captured = capture(Halves(), (torch.randn(4, 6, 3),))
    captured.check((torch.randn(3, 8, 3),))
    with pytest.raises(Refused, match="x dim 1 is 7"):
        captured.check((torch.randn(3, 7, 3),))


class Biased(nn.Module):
    """T5's way: a bias of all rows comes in, and sizes are read from what it is added to."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        scores = q @ q.mT + bias
        o = scores.softmax(-1) @ q
        return o.transpose(1, 2).reshape(*x.shape[:2], -1)


def test_what_is_said_once_for_a_batch_stays_one_where_the_batch_is_open() -> None:
    model, bias = Biased(), torch.randn(1, 2, 5, 5)
    captured = capture(model, (torch.randn(2, 5, 8), bias))
    assert [shape[0] for shape in captured.dims.shapes][1] == 1
    for batch in (2, 3):
        x = torch.randn(batch, 5, 8)
        torch.testing.assert_close(run(captured, model, x, bias), model(x, bias))


@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        ("b n n", 1),
        ("b n n", 2),
        ("n n", 1),
        ("n n", 2),
        ("b 1 n n", 1),
        ("b 1 n n", 2),
        ("1 1 n n", 2),
        ("1 h n n", 2),
    ],
)
@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_over_pairs_grows_with_the_tokens_whatever_it_is_called(shape: str, batch: int, boolean: bool) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            q = x.unflatten(-1, (2, -1)).transpose(1, 2)
            over = bias[:, None] if bias.ndim == 3 else bias
            scores = (q @ q.mT).masked_fill(over, -1e9) if bias.dtype == torch.bool else q @ q.mT + over
            return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)

    def call(b: int, n: int) -> tuple[Tensor, Tensor]:
        sizes = {"b": b, "n": n, "h": 2, "1": 1}
        over = torch.randn([sizes[letter] for letter in shape.split()])
        return torch.randn(b, n, 8), over > 1 if boolean else over

    captured = capture(Masked(), call(batch, 5))
    assert not captured.notes, captured.notes
    for b, n in ((batch, 7), (3, 4), (2, 5)):
        x, over = call(b, n)
        torch.testing.assert_close(run(captured, Masked(), x, over), Masked()(x, over))


def test_what_cannot_be_dynamic_is_static_and_said() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    captured = capture(Positions(), (torch.randn(2, 5, 4),))
    assert captured.dims.shapes[0][1] == 5
    assert captured.notes == ("sequence static (x dim 1 = 5) because the model fixes it",)


def test_static_capture_is_static() -> None:
    captured = capture(nn.Linear(4, 4), (torch.randn(2, 4),), dynamic=False)
    assert captured.dims.shapes == ((2, 4),)


# --- refusals ---------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if x.sum() > 0:
            return x
        return -x


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x * 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Branches(), r"test_capture.py:\d+, in forward"), (Writes(), "writes to its input x")],
)
def test_what_cannot_be_captured_is_refused_and_left_alone(model: nn.Module, reason: str) -> None:
    model.train()
    before, attributes = copy.deepcopy(model.state_dict()), dict(model.__dict__)
    with pytest.raises(Refused, match=reason):
        capture(model, (torch.randn(3, 4),))
    assert torch.is_grad_enabled() and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.__dict__ == attributes


def test_capture_keeps_grad_mode_and_random_state() -> None:
    state = torch.get_rng_state()
    with torch.no_grad():
        capture(
            nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), (torch.randn(2, 4, generator=torch.Generator()),)
        )
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not torch.equal(state, torch.zeros_like(state))


def test_dropout_is_live_in_train_and_gone_in_eval() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(64, 4)
    assert (run(capture(model.train(), (x,)), model, x) == 0).any()
    assert not (run(capture(model.eval(), (x,)), model, x) == 0).any()


def test_tensors_kept_on_a_module_are_not_kept_and_said() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x * 2
            return self.seen + 1

    model = Remembers()
    captured = capture(model, (torch.randn(2, 3),))
    assert model.seen is None and captured.notes == ("seen is not set by the captured forward",)
    x = torch.randn(4, 5)
    torch.testing.assert_close(run(captured, model, x[:, :3]), x[:, :3] * 2 + 1)


def test_data_of_a_tensor_is_read_without_its_gradient() -> None:
    """As the annotated transformer makes its masks."""

    class OldStyle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[0], 1).type_as((x > 0).data)
            return self.layer(x) * self.layer.weight.data.sum() * mask

    model = OldStyle()
    captured = capture(model, (torch.randn(3, 4),))
    assert not captured.notes
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        found, wanted = run(captured, model, x), model(x)
        same(found, wanted)
        ours, theirs = (torch.autograd.grad(y.sum(), model.layer.weight)[0] for y in (found, wanted))
        torch.testing.assert_close(ours, theirs)


def test_hooks_that_a_library_puts_on_at_the_first_run_are_not_left_half_done() -> None:
    model = FAMILIES["bert"].make().eval()
    other = copy.deepcopy(model)
    given = ids(2, 5)
    capture(model, kwargs={"input_ids": given})
    same(model(given, output_hidden_states=True), other(given, output_hidden_states=True))
