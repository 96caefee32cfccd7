"""Kernels for processors: C++ generated from a spec and built by the system's compiler; torch's run without one."""

from ...compiler.primitives.attend import attend_op
from ...compiler.primitives.operator import Kernel
from ...compiler.primitives.scan import scan_op
from . import attend, attend_backward, scan

NAME = "generated C++"

_attend = Kernel(NAME, attend.few, attend.run, gradients=attend_backward.gradients, source=attend.shown)
attend_op.kernels.setdefault("cpu", []).insert(0, _attend)
scan_op.kernels.setdefault("cpu", []).insert(0, Kernel(NAME, scan.few, scan.run))
