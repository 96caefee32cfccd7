"""Rewrites of projections and of the attention product into few bits."""
