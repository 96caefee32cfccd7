"""Kernels for GPUs: Triton generated from a spec, readable, checked without a GPU."""
