"""Exact rewrites of weights: the symmetry groups that a captured graph shows, and what may be done to each."""
