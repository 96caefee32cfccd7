"""Mechanisms in which a query sees only some of the keys."""
