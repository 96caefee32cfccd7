"""Replacements of a whole attention region by another way of mixing tokens."""
