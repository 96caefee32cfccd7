"""reattend: rewrite how a PyTorch model attends.

import reattend
fast = reattend.optimize(model, "recipe.yaml")
"""

__version__ = "0.1.0"

from reattend.api import attn_implementation, bench, check, explain, load, optimize, preview, quality, save, sites
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
    "check",
    "explain",
    "load",
    "mechanism",
    "mechanisms",
    "module",
    "optimize",
    "preview",
    "quality",
    "register",
    "save",
    "sites",
    "table",
]
