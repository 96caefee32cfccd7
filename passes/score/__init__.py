"""Mechanisms that keep the full support and change how a score becomes a weight."""
