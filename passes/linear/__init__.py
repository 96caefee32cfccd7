"""Mechanisms whose cost grows linearly, because keys and values are summed into a state before a query reads them."""
