"""Quality against cost as one self-contained picture: predicted on the left, measured on the right, better is up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .row import MEASURED, ORIGINAL, Row
from .task import Measure

WIDTH, PANEL, HEIGHT = 880, 350, 300  # of the picture, and of the inside of one panel
LEFT, GAP, TOP = 70, 70, 50
LEGEND_LINE, LEGEND_COLUMNS = 18, 3


@dataclass(frozen=True)
class Axis:
    """From values to pixels; a value beyond either end is drawn at it."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (self._scaled(v) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value

    def ticks(self) -> list[float]:
        """Between four and nine round values."""
        if self.log and self.high / self.low > 4:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
            found = [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [t for t in found if self.low <= t <= self.high]


def svg(model: str, measure: Measure, rows: Sequence[Row]) -> str:
    """The rows that were measured, numbered as in the legend below."""
    shown = [row for row in rows if row.status == MEASURED and measure.name in row.measures]
    lines = math.ceil(max(len(shown), 1) / LEGEND_COLUMNS)
    height = TOP + HEIGHT + 90 + LEGEND_LINE * lines
    quality = _upward(measure, [row.measures[measure.name] for row in shown])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(measure.says)} of {escape(model)} against cost">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(model)}: {escape(measure.says)} (up is better)</text>',
        *_panel(shown, measure, quality, LEFT, "FLOPs predicted, original = 1", lambda row: row.predicted),
        *_panel(shown, measure, quality, LEFT + PANEL + GAP, "time measured, original = 1", lambda row: row.measured),
        *_legend(shown, TOP + HEIGHT + 70),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _upward(measure: Measure, values: Sequence[float]) -> Axis:
    """From the worst row, or from where knowing nothing ends, at the bottom to the best at the top."""
    bottom, top = TOP + HEIGHT, TOP
    if measure.up:
        best, worst = max(values, default=1.0), max(min(values, default=0.0), measure.worst)
        room = (best - worst) * 0.06 or 0.05
        return Axis(worst - room, best + room, bottom, top, log=False)
    best, worst = max(min(values, default=0.1), 1e-6), min(max(values, default=1.0), measure.worst)
    room = max(worst / best, 1.05) ** 0.06
    return Axis(best / room, max(worst, best) * room, top, bottom, log=True)


def _panel(
    rows: Sequence[Row], measure: Measure, quality: Axis, left: float, says: str, cost_of: Callable[[Row], float | None]
) -> Iterable[str]:
    costs = {row.name: 1.0 if row.name == ORIGINAL else cost_of(row) for row in rows}
    known = [cost for cost in costs.values() if cost] or [1.0]
    room = max(max(known) / min(known), 1.2) ** 0.08
    across = Axis(min(known) / room, max(known) * room, left, left + PANEL, log=True)
    bottom = TOP + HEIGHT
    yield f'<rect class="frame" x="{left}" y="{TOP}" width="{PANEL}" height="{HEIGHT}"/>'
    for tick in across.ticks():
        x = across(tick)
        yield f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
    for tick in quality.ticks():
        y = quality(tick)
        yield f'<path class="grid" d="M{left} {y:.1f}H{left + PANEL}"/>'
        yield f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    yield f'<text class="says" x="{left + PANEL / 2}" y="{bottom + 36}" text-anchor="middle">{says}</text>'
    taken: list[tuple[float, float]] = []
    for number, row in enumerate(rows, 1):
        cost = costs[row.name]
        if cost:
            x, y = across(cost), quality(row.measures[measure.name])
            told = f"{row.name}: {row.measures[measure.name]:{measure.form}} at {cost:.3g}"
            yield f"<g><title>{escape(told)}</title>{_mark(row, x, y)}{_number(number, x, y, taken)}</g>"


def _number(number: int, x: float, y: float, taken: list[tuple[float, float]]) -> str:
    """Beside its mark, where no other number stands."""
    places = [(x + dx, y + dy) for dx, dy in _BESIDE]
    free = (p for p in places if all(abs(p[0] - a) > 13 or abs(p[1] - b) > 10 for a, b in taken))
    at = next(free, places[0])
    taken.append(at)
    return f'<text class="number" x="{at[0]:.1f}" y="{at[1] + 4:.1f}" text-anchor="middle">{number}</text>'


_BESIDE = [(dx * far, dy * far) for far in (12, 20, 28) for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (0.8, -0.8),
           (-0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))]  # fmt: skip


def _mark(row: Row, x: float, y: float) -> str:
    """A disc for the original and what equals it, a square for an approximation, a triangle for what is untrained."""
    if row.untrained:
        return f'<path class="untrained" d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>'
    if row.kind in ("", "exact"):
        return f'<circle class="{"exact" if row.kind else "original"}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    shape = "trained" if row.kind == "needs recovery" else "approximate"
    return f'<rect class="{shape}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'


def _legend(rows: Sequence[Row], top: float) -> Iterable[str]:
    lines = math.ceil(max(len(rows), 1) / LEGEND_COLUMNS)
    for place, row in enumerate(rows):
        x = LEFT + (WIDTH - LEFT) / LEGEND_COLUMNS * (place // lines)
        y = top + LEGEND_LINE * (place % lines)
        tail = ", untrained" if row.untrained else ""
        yield _mark(row, x, y - 4)
        yield f'<text class="says" x="{x + 12:.0f}" y="{y}">{place + 1} {escape(row.name[:36])}{tail}</text>'


_STYLE = """
svg{--page:#fff;--ink:#1f2328;--soft:#59636e;--line:#d8dee4;--exact:#1a7f37;--approximate:#0969da;--untrained:#bc4c00;
--trained:#8250df;font:12px system-ui,sans-serif}
@media(prefers-color-scheme:dark){svg{--page:#0d1117;--ink:#f0f6fc;--soft:#9198a1;--line:#30363d;--exact:#3fb950;
--approximate:#4493f8;--untrained:#f0883e;--trained:#ab7df8}}
.page{fill:var(--page)}.title{fill:var(--ink);font-size:14px;font-weight:600}.says{fill:var(--ink)}.tick{fill:var(--soft)}
.number{fill:var(--ink);font-size:10px}.frame{fill:none;stroke:var(--line)}.grid{stroke:var(--line);stroke-width:.6}
.original{fill:var(--ink)}.exact{fill:var(--exact)}.approximate{fill:var(--approximate)}.trained{fill:var(--trained)}
.untrained{fill:none;stroke:var(--untrained);stroke-width:1.6}
"""
