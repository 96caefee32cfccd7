"""A softmax over multiples of logarithms has powers for weights: neither the logarithm nor its exponential is needed.

    exp(n log y - m) = (y / exp(m / n))^n        and -inf, where y is not above 0, is what 0 has

>>> from .symbol_text import parse
>>> power(parse("where(0 < s - 1, log(where(0 < s - 1, s - 1, 1.0)) * 15, -inf)"))
(where(0 < s - 1, s - 1, 0.0), 15)
"""

from __future__ import annotations

import math

from .symbols import Expr, as_expr, build

_MOST = 64  # beyond it a product's roundings would be more than the logarithm's


def power(score: Expr) -> tuple[Expr, int] | None:
    """y, 0 where it would not be above 0, and n of a score n log y; None of another one."""
    if score.op != "where" or score.args[2].text != as_expr(-math.inf).text:
        return None
    above, multiple, _ = score.args
    factors = multiple.args if multiple.op == "mul" else (multiple,)
    log = next((factor for factor in factors if factor.op == "log"), None)
    if log is None or len(factors) > 2:
        return None
    n = next((factor.args[0] for factor in factors if factor.op == "const"), 1)
    y = log.args[0]
    if y.op == "where" and y.args[0].text == above.text:
        y = y.args[1]
    known = above.text == build("lt", as_expr(0), y).text
    return (build("where", above, y, 0.0), int(n)) if known and n in range(1, _MOST + 1) else None
