"""Masks that a graph computes as tensors, raised to predicates over (b, h, i, j)."""

from .fold import MaskVerdict as MaskVerdict
from .fold import fold_masks as fold_masks
from .index_space import simplify_indices as simplify_indices
