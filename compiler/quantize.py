"""The stage `quantize`: linear layers of a graph become `qlinear` calls, each by the first pattern that matches it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calibration import Gram, Reducer, calibrate
from .leaves import Stamp, stamp_text
from .mechanism import Mechanism
from .nodes import args_of, op_name
from .path_glob import glob
from .primitives.qlinear import qlinear_op
from .primitives.qlinear_spec import QLinearSpec
from .program import Program, get_attr, mount
from .quantized_linear import QuantizedLinear
from .refusal import Refused


class Scheme(Mechanism):
    """Base of the quantization schemes: what a layer's weights become."""

    part = "model"
    stage = "quantize"
    kind = "approximate"

    @property
    def fitted(self) -> bool:
        """Whether its codes depend on what a layer reads: `tensors` is then given the Gram matrix of that."""
        return False

    def spec(self, inputs: int, *, bias: bool) -> QLinearSpec:
        """The text of a layer of so many inputs; refused where they do not fit the scheme's groups."""
        raise Refused(
            f"{self.slug} has no spec(inputs, bias)", where="quantize", fits="a scheme says what its layers are"
        )

    def tensors(self, weight: Tensor, gram: Tensor | None = None) -> Sequence[Tensor]:
        """The tensors that the spec names, of float32 weights (N, K) without holes."""
        raise Refused(
            f"{self.slug} has no tensors(weight)", where="quantize", fits="a scheme says what its layers hold"
        )

    def layer(self, weight: Tensor, bias: Any = None, gram: Tensor | None = None) -> QuantizedLinear:
        """A layer of these weights (N, K), its inputs' Gram matrix (K, K) beside them where it is fitted."""
        spec = self.spec(weight.shape[1], bias=bias is not None)
        wide = weight.detach().float().contiguous()
        if not weight.is_meta and not bool(wide.isfinite().all()):
            count = int((~wide.isfinite()).sum())
            raise Refused(f"{count} weights that are no finite numbers", fits="mend the weights, or `keep` this layer")
        if self.fitted and gram is None and not weight.is_meta:
            fits = "`data: {calibrate: FILE}`, and calls that reach this layer"
            raise Refused("nothing is known of what it reads", where=repr(self), fits=fits)
        tensors = self.tensors(wide, gram) if self.fitted and not weight.is_meta else self.tensors(wide)
        return QuantizedLinear(spec, tensors, scheme=repr(self), dtype=weight.dtype, bias=bias)


def divisible(inputs: int, group: int, scheme: str) -> int:
    """A group size as a spec holds it (0: one group), refused where it does not divide the inputs."""
    if group in (-1, inputs):
        return 0
    if group < 1 or inputs % group:
        least = [d for d in range(min(inputs, max(group, 1)), 0, -1) if inputs % d == 0][:1]
        fits = f"{scheme}: {{group_size: {least[0] if least else -1}}}, or -1: one group an output"
        raise Refused(f"group_size {group} does not divide {inputs} inputs", fits=fits)
    return group


@dataclass(frozen=True, repr=False)
class QuantizeLayers(Mechanism):
    """What a recipe's `quantize` section asks for, as one pass over the whole model."""

    choices: tuple[tuple[str, Scheme | None], ...] = ()

    slug = "quantize"
    part = "model"
    stage = "quantize"
    kind = "approximate"

    def __repr__(self) -> str:
        return "quantize(" + ", ".join(f"{pattern}: {chosen or 'keep'!r}" for pattern, chosen in self.choices) + ")"

    def chosen(self, path: str) -> tuple[str, Scheme | None]:
        """The first pattern that matches a layer, and its scheme."""
        return next(((p, s) for p, s in self.choices if glob(p).matches(path)), ("", None))

    def fit(self, program: Program, batches: Callable[[], Sequence[Sequence[Tensor]]]) -> bool:
        """Take the Gram matrices of what the layers read whose scheme is fitted to that; whether there are any."""
        wanted: dict[str, tuple[fx.Node, Reducer]] = {}
        for path, calls in linear_layers(program.graph).items():
            scheme = self.chosen(".".join(part for part in (program.prefix, path) if part))[1]
            if scheme is not None and scheme.fitted:
                wanted[path] = (_ends(calls[0])[0], Gram())
        if wanted:
            program.store.grams = calibrate(program.graph, batches(), wanted)
        return bool(wanted)

    def apply(self, program: Program, paths: Sequence[str]) -> None:
        layers, refused, done = linear_layers(program.graph), dict[str, Refused](), dict[str, list[str]]()
        matched: set[str] = set()
        for path, calls in layers.items():
            full = ".".join(part for part in (program.prefix, path) if part)
            pattern, scheme = self.chosen(full)
            matched.add(pattern)
            if scheme is None:
                continue
            try:
                _quantize(program, path, calls, scheme)
                done.setdefault(repr(scheme), []).append(path)
            except Refused as reason:
                if pattern == full:  # asked for by name
                    raise reason.at(full) from None
                refused[full] = reason
        if refused and not done:
            path, first = next(iter(refused.items()))
            raise Refused(f"no layer could be quantized; {path}: {first.found}", where="quantize", fits=first.fits)
        if not done and any(scheme for _, scheme in self.choices):
            raise Refused("no linear layer matches", where="quantize", fits=_some(layers) or "this model has none")
        program.notes += _told(program, done, refused, [p for p, _ in self.choices if p not in matched])


def linear_layers(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The calls of linear layers by the path of the layer, quantized ones too; only those with weights of their own."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        weight = _weight(node)
        if weight is not None:
            found.setdefault(str(weight.target).rpartition(".")[0], []).append(node)
    return found


def _weight(node: fx.Node) -> fx.Node | None:
    """The node of a linear call's weight, or codes, where it is a tensor of a module."""
    held: Any = None
    if node.target is qlinear_op.op:
        held = args_of(node)[1][0]
    elif op_name(node) == "linear":
        held = node.args[1]
    elif op_name(node) == "addmm" and not node.kwargs:
        held = node.args[2]
    whole = isinstance(held, fx.Node) and held.op == "get_attr" and str(held.target).endswith((".weight", ".codes"))
    return held if whole else None


def _turned(node: fx.Node) -> bool:
    """Whether the weight lies as (K, N): gpt2's `Conv1D`, rows of x against columns of W."""
    return op_name(node) == "addmm"


def _ends(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What a layer reads and what it gives, views that make rows of x and undo it included."""
    read, given = node.args[1 if _turned(node) else 0], node
    assert isinstance(read, fx.Node)
    after = next(iter(node.users), None)
    if _turned(node) and _is_view(read) and len(node.users) == 1 and after is not None and _is_view(after):
        before = read.args[0]
        assert isinstance(before, fx.Node)
        if before.meta["val"].shape[:-1] == after.meta["val"].shape[:-1]:
            return before, after
    return read, given


def _is_view(node: fx.Node) -> bool:
    return op_name(node) in ("view", "reshape")


def _quantize(program: Program, path: str, calls: Sequence[fx.Node], scheme: Scheme) -> None:
    standing = {str(n.args[2]) for n in calls if n.target is qlinear_op.op}
    if standing:
        spec = QLinearSpec.of(next(iter(standing)))
        if standing != {scheme.spec(spec.inputs, bias=spec.bias).text}:
            fits = "start from the original model"
            raise Refused(f"quantized already ({spec.text}), now {scheme!r} is asked", fits=fits)
        return
    held = _weight(calls[0])
    assert held is not None
    others = [u for node in program.graph.graph.find_nodes(op="get_attr", target=held.target) for u in node.users
              if u not in calls]  # fmt: skip
    if others:
        fits = "`keep`, or a mechanism that reads no weights of this layer"
        raise Refused(f"its weights are also read by %{others[0].name}", fits=fits)
    if path not in program.store.modules:
        bias = _bias(calls[0])
        value = _tensor(program.graph, str(held.target))
        value = value.t() if _turned(calls[0]) else value
        given = None if bias is None else _tensor(program.graph, str(bias.target))
        program.store.modules[path] = scheme.layer(value, given, program.store.grams.get(path))
    layer = program.store.modules[path]
    assert isinstance(layer, QuantizedLinear)
    for node in calls:
        _replace(program, path, node, layer)
    program.replaced[path] = layer


def _bias(node: fx.Node) -> fx.Node | None:
    found: Any = node.args[0] if _turned(node) else node.args[2] if len(node.args) > 2 else None
    return found


def _tensor(graph: nn.Module, target: str) -> Any:
    return operator.attrgetter(target)(graph)


def _replace(program: Program, path: str, node: fx.Node, layer: QuantizedLinear) -> None:
    graph, fake = program.graph.graph, program.fake_mode.from_tensor
    (read, given), held = _ends(node), list[fx.Node]()
    for name in layer.spec.names:
        if name != "bias":
            mount(program.graph, f"{path}.{name}", getattr(layer, name))
            held.append(get_attr(graph, node, f"{path}.{name}", getattr(layer, name), fake))
    if layer.spec.bias:
        bias = _bias(node)
        assert bias is not None
        held.append(bias)
    with graph.inserting_before(node):
        call = graph.call_function(qlinear_op.op, (read, held, layer.spec.text))
        output = graph.call_function(operator.getitem, (call, 0))
    output.meta = dict(given.meta)
    call.meta = dict(given.meta) | {"val": [given.meta["val"]]}
    stamp = node.meta.get("leaf")
    given.replace_all_uses_with(output)
    for left in dict.fromkeys((given, node, *node.all_input_nodes)):  # views of x that nothing reads any more go too
        if not left.users and left.op == "call_function":
            graph.erase_node(left)
    if stamp is not None:
        for made in (call, output):
            made.meta["leaf"] = Stamp(stamp.call, path, 2, stamp_text(made))


def _told(program: Program, done: dict[str, list[str]], refused: dict[str, Refused], idle: list[str]) -> list[str]:
    lines = []
    for scheme, paths in done.items():
        before, after = (sum(_bytes(program, path, now=now) for path in paths) for now in (False, True))
        lines.append(f"quantized {len(paths)} linear layers by {scheme}: {before} bytes of weights are {after}")
    lines += [f"not quantized, {path}: {reason}" for path, reason in refused.items()]
    return lines + [f"quantize: {pattern!r} matches no linear layer that is left" for pattern in idle]


def _bytes(program: Program, path: str, *, now: bool) -> int:
    layer: Any = program.store.modules.get(path)
    if layer is None:
        return 0
    if now:
        return sum(t.numel() * t.element_size() for t in layer.buffers())
    return int(layer.in_features * layer.out_features * torch.empty((), dtype=layer.dtype).element_size())


def _some(layers: dict[str, list[fx.Node]]) -> str:
    names = list(layers)
    return ", ".join(names[:4]) + (f" ... ({len(names)})" if len(names) > 4 else "")
