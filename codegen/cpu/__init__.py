"""Kernels for processors: C++ generated from a spec and built by the system's compiler; torch's run without one."""

from ...compiler.pointwise import KERNELS
from ...compiler.primitives.attend import attend_op
from ...compiler.primitives.operator import Kernel
from ...compiler.primitives.prefix import prefix_op
from ...compiler.primitives.qlinear import qlinear_op
from ...compiler.primitives.scan import scan_op
from ...compiler.quick import ATTENDS
from ..of_heads import settling, settling_gradients
from . import attend, attend_backward, one_call, pointwise, prefix, qlinear, qlinear_floats, qlinear_units, scan

NAME = "generated C++"

_attend = Kernel(
    NAME,
    settling(attend.few),
    settling(attend.run),
    gradients=settling_gradients(attend_backward.gradients),
    source=attend.shown,
)
attend_op.kernels.setdefault("cpu", []).insert(0, _attend)
scan_op.kernels.setdefault("cpu", []).insert(0, Kernel(NAME, scan.few, scan.run))
prefix_op.kernels.setdefault("cpu", []).insert(0, Kernel(NAME, prefix.few, prefix.run, gradients=prefix.gradients))
qlinear_op.kernels.setdefault("cpu", []).extend(
    [
        Kernel(f"{NAME}, vectors", qlinear_floats.refuses_few, qlinear_floats.run_few),
        Kernel(f"{NAME}, {qlinear_units.ROADS[qlinear_units.road()]}", qlinear_units.refuses, qlinear_units.run),
        Kernel("numbers with bytes", qlinear.no_bytes, qlinear.by_bytes),
        Kernel(f"{NAME}, panels", qlinear_floats.refuses_panels, qlinear_floats.run_panels),
        Kernel("whole numbers", qlinear.no_whole, qlinear.by_whole),
        Kernel("weights made whole", qlinear.no_numbers, qlinear.by_numbers, plain=True),
    ]
)
KERNELS["cpu"] = pointwise.kernel
ATTENDS["cpu"] = one_call.instead
