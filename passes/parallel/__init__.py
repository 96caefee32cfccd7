"""Rewrites that spread one attention over several devices."""
