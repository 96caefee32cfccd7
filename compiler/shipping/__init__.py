"""Leaving the process: a rewritten model as a folder, as a stock checkpoint, or as a package that torch runs alone."""
