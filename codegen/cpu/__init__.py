"""Kernels for processors: C++ generated from a spec and built by the system's compiler; torch's run without one."""

from . import attend as attend
from . import scan as scan
