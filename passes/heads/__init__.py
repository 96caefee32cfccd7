"""Rewrites over heads: which ones run, which ones share, and how their outputs are weighed."""
