"""The only operations that have kernels: each a Python front over symbols and a registered op that sees a text spec."""
