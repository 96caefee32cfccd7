"""A block of a model as a whole: kernels launched and bytes moved on a GPU, before and after a rewrite, counted.

    python benchmarks/whole_graph.py [--md docs/whole_graph.md] [--only agent gated]

Nothing here runs on a GPU. Torch's operators are counted where they run, one kernel each, views none; a primitive as
the kernels that its spec becomes for an H100. Beside it the same graph after torch.compile: what inductor's own fusion
leaves, read from its schedule for this processor (where a norm is three loops that a GPU does in one), primitives again
as their kernels. That the rewritten graphs give the same numbers here is asked first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config, ir
from torch._inductor.exc import InductorError
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch.fx.experimental.proxy_tensor import make_fx

import reattend
from reattend.codegen.launches import Launches
from reattend.models.vision_ops import declare_missing_vision_ops

GATED = {"act": "silu_qkv", "norm": "rmsnorm", "gate": "sigmoid"}


@dataclass(frozen=True)
class Case:
    """A model of one block, and what is put at its site."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    attention: dict[str, Any]

    def recipe(self, target: str) -> dict[str, Any]:
        return {"version": 1, "target": target, "sites": [{"match": "*", "attention": self.attention}]}


@dataclass(frozen=True)
class Row:
    case: str
    graph: str
    launches: int
    bytes: int
    fused_launches: int
    fused_bytes: int
    generated: tuple[str, ...]


def vit() -> nn.Module:
    declare_missing_vision_ops()
    import timm

    return timm.create_model("deit_small_patch16_224", depth=1, num_classes=0)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=1, num_attention_heads=16,
                                  num_key_value_heads=16, vocab_size=1000, use_cache=False))  # fmt: skip


CASES = {
    "agent": Case("ViT block, 8 images of 197 tokens, 6 heads of 64", vit,
                  lambda: torch.randn(8, 3, 224, 224).bfloat16(), {"agent": {"agent_num": 49}}),
    "gated": Case("Llama block, 2 texts of 2,048 tokens, 16 heads of 64", llama,
                  lambda: torch.randint(1000, (2, 2048)), {"lightning": GATED}),
}  # fmt: skip
AS_IT_IS, WRITTEN_OUT, GENERATED = "as it is", "{}, written out in torch", "{}, generated kernels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--md", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    given = parser.parse_args()
    found = []
    for name in given.only:
        for row in rows(CASES[name]):
            print(line(row), flush=True)
            found.append(row)
    if given.md:
        given.md.write_text(markdown(found))


def rows(case: Case) -> Iterator[Row]:
    """The block as it is, with its new attention in torch's operators, and with generated kernels."""
    torch.manual_seed(0)
    model, inputs = case.model().eval().bfloat16(), case.inputs()
    (slug,) = case.attention
    yield counted(case.name, AS_IT_IS, model, inputs)
    plain, fast = (reattend.optimize(model, case.recipe(target), (inputs,)) for target in ("eager", "triton"))
    with torch.no_grad():
        wanted, found = first(plain(inputs)).float(), first(fast(inputs)).float()
        assert torch.allclose(wanted, found, atol=0.1, rtol=0.1), (wanted - found).abs().max()
    yield counted(case.name, WRITTEN_OUT.format(slug), plain, inputs)
    yield counted(case.name, GENERATED.format(slug), fast, inputs)


def counted(case: str, graph: str, model: nn.Module, inputs: Tensor) -> Row:
    with torch.no_grad(), Launches() as run:
        model(inputs)
    own = [each for each in run.found if each.generated]
    launches, bytes_ = fused(model, inputs)
    names = tuple(each.name for each in own)
    total = bytes_ + sum(each.bytes for each in own)
    return Row(case, graph, len(run.found), run.bytes, launches + len(own), total, names)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


# --- what inductor makes of it ----------------------------------------------------------------------------------------


# a processor's own choices: reductions in parts for few threads, channels of pictures last
AS_ON_A_GPU: dict[str, Any] = {"split_reductions": False, "layout_optimization": False, "fx_graph_cache": False}


class ScheduledError(Exception):
    """Everything is known: no code need be made."""


def fused(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Kernels and bytes of inductor's schedule, primitives left out."""
    found: list[tuple[int, int]] = []

    def look(nodes: list[Any]) -> list[Any]:
        kernels = [node for node in nodes if is_kernel(node)]
        found.append((len(kernels), sum(node.get_read_write_buffers_sizes() for node in kernels)))
        raise ScheduledError

    torch._dynamo.reset()
    with torch.no_grad(), config.patch(**AS_ON_A_GPU, _post_fusion_custom_pass=look):
        # what primitives mean is traced through; torch.compile sees a call to them
        graph = make_fx(lambda x: first(model(x)))(inputs) if hasattr(model, "report") else model
        try:
            torch.compile(graph, fullgraph=True)(inputs)
        except (InductorError, ScheduledError):
            if not found:
                raise
    return found[0]


def is_kernel(node: Any) -> bool:
    """Neither a part of another's output, nor memory alone, nor a primitive."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return False
    return not str(getattr(node.node, "op_overload", "")).startswith("reattend.")


# --- the page ---------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    cells = [row.graph, str(row.launches), megabytes(row.bytes), str(row.fused_launches), megabytes(row.fused_bytes)]
    return f"| {' | '.join(cells)} | {', '.join(row.generated)} |"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def markdown(found: list[Row]) -> str:
    lines = [
        "# Whole blocks: launches and bytes",
        "",
        *(line.strip() for line in (__doc__ or "").strip().splitlines()[4:]),
        "",
        "Bytes are what each kernel reads and writes, each element once: two kernels that meet in memory pay twice.",
        "The whole model is counted, embedding and last norm included: they are the same in every row.",
        "",
        "    python benchmarks/whole_graph.py --md docs/whole_graph.md",
        "",
        f"torch {torch.__version__}, bfloat16, forward only.",
    ]
    for case in dict.fromkeys(row.case for row in found):
        lines += ["", f"## {case}", "", "| graph | launches | MB | launches, compiled | MB, compiled | generated |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        lines += [line(row) for row in found if row.case == case]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
