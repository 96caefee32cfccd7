"""Cascades: what a primitive call computes as extended Einsums over named ranks, and what follows from that alone."""
