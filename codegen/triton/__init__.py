"""Kernels for GPUs: Triton generated from a spec, readable, and checked on machines without a GPU."""

from ...compiler.primitives.attend import attend_op
from ...compiler.primitives.operator import Kernel
from . import attend, launch, launch_gradient

NAME = "generated Triton"

# behind torch's own dense attention, before what reads keys in slices
attend_op.kernels.setdefault("cuda", []).insert(
    1, Kernel(NAME, launch.refuses, launch.run, gradients=launch_gradient.gradients, source=attend.shown)
)
