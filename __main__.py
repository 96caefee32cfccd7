"""`python -m reattend` is the command line."""

from reattend.cli import app

app(prog_name="reattend")
