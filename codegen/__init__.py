"""What becomes a kernel: implementations registered for the primitives, per device; no mechanism is known here."""

from . import chosen as chosen
from . import cpu as cpu
from . import sdpa as sdpa
from . import sdpa_call as sdpa_call
from . import triton as triton  # behind sdpa: its place among the kernels of a GPU follows the order here
