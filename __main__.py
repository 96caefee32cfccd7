"""`python -m reattend` is the command line."""

from .cli import app

app(prog_name="reattend")
