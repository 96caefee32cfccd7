"""Rewrites of the key-value cache: what is kept, for how long, and in how many bits."""
