"""Rewrites that change how many tokens travel through the model."""
