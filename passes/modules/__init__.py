"""Modules that are inserted beside attention rather than put in its place."""
