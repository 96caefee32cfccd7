"""By how much an index changes from one key to the next: where by one at most, both its ends tell whether it runs on.

>>> from .symbol_text import parse
>>> [steps(parse(text)) for text in ("i - j + 511", "abs(i - 2 * j)", "maximum(j // 4, 3)", "i % 7", "j % 7")]
[(-1, -1), (-2, 2), (0, 1), (0, 0), (-inf, inf)]
"""

from __future__ import annotations

import math

from .symbols import Expr

ANY = (-math.inf, math.inf)


def steps(e: Expr) -> tuple[float, float]:
    """The least and the largest change of a whole number between positions j and j + 1, as far as known."""
    if not e.names & {"j", "s", "w"}:
        return 0, 0
    parts = [a for a in e.args if isinstance(a, Expr)]
    match e.op:
        case "name" if e.args[0] == "j":
            return 1, 1
        case "add":
            return sum(steps(a)[0] for a in parts), sum(steps(a)[1] for a in parts)
        case "abs":
            largest = max(map(abs, steps(parts[0])))
            return -largest, largest
        case "minimum" | "maximum":
            return min(steps(a)[0] for a in parts), max(steps(a)[1] for a in parts)
        case "mul":
            numbers = [a.args[0] for a in parts if a.op == "const"]
            moving = [a for a in parts if a.op != "const"]
            if len(moving) == 1 and all(isinstance(number, int) for number in numbers):
                low, high = sorted(math.prod(numbers) * step for step in steps(moving[0]))
                return low, high
        case "floordiv" if parts[1].op == "const" and isinstance(parts[1].args[0], int) and parts[1].args[0] > 0:
            low, high = steps(parts[0])
            return (math.floor(low / parts[1].args[0]), math.ceil(high / parts[1].args[0])) if high < math.inf else ANY
    return ANY
