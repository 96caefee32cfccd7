"""reattend: rewrite how a PyTorch model attends.

    import reattend
    fast = reattend.optimize(model, "recipe.yaml", example_inputs)    # still of the model's own class
    print(fast.report)

before      sites, explain, heads, preview: where a model attends, what each head does, what a recipe would change
rewrite     optimize, recover, save, load; bench, quality: before and after
recipes     plan, plan_bits: recipes written from what was measured
decode      cache_for: the cache of a rewritten model
kernels     kernels, build: their source, compiled ahead
mechanisms  attention, Attention, module: on tensors, as layers; attn_implementation: in transformers
your own    register, Mechanism, Param, Aux, Limit, attend, Segment, table, check
"""

__version__ = "0.1.0"

from typing import Any

from reattend.api import (
    attn_implementation,
    bench,
    build,
    check,
    explain,
    heads,
    intervene,
    kernels,
    load,
    optimize,
    plan,
    plan_bits,
    preview,
    quality,
    recover,
    save,
    sites,
)
from reattend.compiler.decode import cache_for
from reattend.compiler.functional import attention
from reattend.compiler.layers import Attention, module
from reattend.compiler.mechanism import Aux, Limit, Mechanism, Param, mechanism, mechanisms, register
from reattend.compiler.primitives.attend import Segment, attend
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Grid, Site
from reattend.compiler.symbols import table

__all__ = [
    "Attention",
    "Aux",
    "Grid",
    "Limit",
    "Mechanism",
    "Param",
    "Refused",
    "Segment",
    "Site",
    "attend",
    "attention",
    "attn_implementation",
    "bench",
    "build",
    "cache_for",
    "check",
    "explain",
    "heads",
    "intervene",
    "kernels",
    "load",
    "mechanism",
    "mechanisms",
    "module",
    "optimize",
    "plan",
    "plan_bits",
    "preview",
    "quality",
    "recover",
    "register",
    "save",
    "sites",
    "table",
]


def __getattr__(name: str) -> Any:
    """DistillTrainer is a class of transformers, which is imported only when it is asked for."""
    if name == "DistillTrainer":
        from reattend.models.distill_trainer import distill_trainer

        return distill_trainer()
    raise AttributeError(f"module 'reattend' has no attribute {name!r}")
