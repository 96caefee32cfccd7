"""Kernels for GPUs: Triton generated from a spec, readable, and checked on machines without a GPU."""

from ...compiler.primitives.attend import attend_op
from ...compiler.primitives.merge import merge_op
from ...compiler.primitives.operator import Kernel
from ...compiler.primitives.qlinear import qlinear_op
from ...compiler.primitives.scan import scan_op
from . import attend, footprints, launch, launch_gradient, launch_scan, launch_scan_gradient, merge, qlinear

NAME = "generated Triton"

_attend = Kernel(
    NAME,
    launch.refuses,
    launch.run,
    gradients=launch_gradient.gradients,
    reads_stored=True,
    source=attend.shown,
    footprints=footprints.footprints,
)
attend_op.kernels.setdefault("cuda", []).insert(1, _attend)  # behind torch's own dense one, before slices of keys
_scan = Kernel(NAME, launch_scan.refuses, launch_scan.run, gradients=launch_scan_gradient.gradients)
scan_op.kernels.setdefault("cuda", []).insert(0, _scan)
merge_op.kernels.setdefault("cuda", []).insert(0, Kernel(NAME, merge.refuses, merge.run))
qlinear_op.kernels.setdefault("cuda", []).insert(0, Kernel(NAME, qlinear.refuses, qlinear.run, source=qlinear.shown))
