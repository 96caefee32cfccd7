"""reattend: rewrite how a PyTorch model attends."""

__version__ = "0.1.0"
