"""Pictures: a mask in tiles, heads as small multiples, the table of sites as one drawing that stands alone."""

from __future__ import annotations

from collections.abc import Sequence

from ..cost import human
from .markup import Markup, el, join
from .view import Layer, Mask, Measure, View

TILE = 5  # pixels of a tile
_NAMES = {"e": "never visited", "p": "cut", "f": "whole"}
_CELL, _BETWEEN = 9, 1


def mask(m: Mask) -> Markup:
    """Queries downwards, keys to the right; runs of equal tiles are one rectangle."""
    if not m.rows:
        return el("p", "decided by tables, not by positions alone: ", el("code", m.says), class_="note")
    wide, high = len(m.rows[0]) * TILE, len(m.rows) * TILE
    cells = [
        el("rect", x=str(at * TILE), y=str(y * TILE), width=str(length * TILE), height=str(TILE), class_=kind)
        for y, row in enumerate(m.rows)
        for at, length, kind in _runs(row)
    ]
    drawn = el("svg", el("title", m.says), *cells, viewBox=f"0 0 {wide} {high}", width=str(wide), height=str(high),
               role="img", class_="mask", shape_rendering="crispEdges")  # fmt: skip
    legend = [el("span", el("i", class_=kind), name) for kind, name in _NAMES.items()]
    return el("div", drawn, el("p", *legend, class_="legend"), el("p", m.share, class_="note"), class_="mask-box")


def _runs(row: str) -> list[tuple[int, int, str]]:
    found: list[tuple[int, int, str]] = []
    for at, kind in enumerate(row):
        if found and found[-1][2] == kind:
            start, length, _ = found[-1]
            found[-1] = start, length + 1, kind
        else:
            found.append((at, 1, kind))
    return found


def heads(m: Measure) -> Markup:
    """A square a head, a row a site; darker is more."""
    values = [v for row in m.rows for v in row if v is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    step = _CELL + _BETWEEN
    wide, tall = max((len(row) for row in m.rows), default=1) * step, len(m.rows) * step
    cells = [
        el("rect", el("title", f"{site}, head {h}: {_said(v)}"), x=str(h * step), y=str(y * step), width=str(_CELL),
           height=str(_CELL), class_="head", fill_opacity=f"{_share(v, low, high):.3f}")
        for y, (site, row) in enumerate(zip(m.sites, m.rows))
        for h, v in enumerate(row)
    ]  # fmt: skip
    drawn = el("svg", el("title", m.name), *cells, viewBox=f"0 0 {wide} {tall}", width=str(wide * 2), role="img")
    return el("figure", el("figcaption", m.name), drawn, el("p", f"{low:.3g} to {high:.3g}", class_="note"),
              class_="heads")  # fmt: skip


def _share(value: float | None, low: float, high: float) -> float:
    return 0.0 if value is None else 0.08 + 0.92 * ((value - low) / (high - low) if high > low else 0.0)


def _said(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4g}"


# --- the table as one drawing -----------------------------------------------------------------------------------------

WIDTH, LINE, TOP, BAR = 960, 24, 84, 150
_COLOURS = ("#3b6fb6", "#b5651d", "#3d8b6e", "#8a5fb0", "#b04a6a", "#6f7d1e", "#2f8fa8", "#a07d28")
_STYLE = """
svg{--page:#fff;--ink:#1d2329;--soft:#66707a;--line:#dfe3e8;font:12px system-ui,sans-serif}
@media(prefers-color-scheme:dark){svg{--page:#14171b;--ink:#e8ebee;--soft:#98a2ac;--line:#2c333a}}
.page{fill:var(--page)}text{fill:var(--ink)}.title{font-size:15px;font-weight:600}.soft{fill:var(--soft)}
.line{stroke:var(--line)}.number{font-variant-numeric:tabular-nums;text-anchor:end}
"""


def table(view: View) -> str:
    """The verdict, then a line a site with its deviation and its work, as a picture for a slide or a README."""
    height = TOP + LINE * max(1, len(view.layers)) + 16
    most = max((x.deviation or 0.0 for x in view.layers), default=0.0)
    peak = max((max(x.work.before, x.work.after) for x in view.layers if x.work), default=0.0)
    titles = ((24, "site"), (330, "what stands there"), (560, "deviation, measured"), (770, "work, predicted"))
    parts: list[Markup] = [
        el("style", Markup(_STYLE)),
        el("rect", class_="page", width=str(WIDTH), height=str(height)),
        el("text", el("title", view.verdict), _cut(view.verdict, 120), x="24", y="32", class_="title"),
        *(el("text", name, x=str(x), y=str(TOP - 18), class_="soft") for x, name in titles),
        *(_line(view, n, x, most, peak) for n, x in enumerate(view.layers)),
    ]
    drawn = el("svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", role="img")
    return drawn + "\n"


def _line(view: View, n: int, x: Layer, most: float, peak: float) -> Markup:
    y = TOP + LINE * n
    colour = _COLOURS[view.slugs.index(x.slug) % len(_COLOURS)] if x.status == "rewritten" else "#98a2ac"
    said = x.mechanism if x.status == "rewritten" else f"{x.status}: {x.reason}" if x.reason else x.status
    parts = [
        el("path", class_="line", d=f"M24 {y - 12}H{WIDTH - 24}"),
        el("text", el("title", x.path), _cut(x.path, 42), x="24", y=str(y + 4)),
        el("circle", cx="322", cy=str(y), r="4", fill=colour),
        el("text", el("title", said), _cut(said, 30), x="332", y=str(y + 4)),
        *_bars(560, y, [x.deviation] if x.deviation is not None else [], most, colour, lambda v: f"{v:.2g}"),
        *_bars(770, y, [x.work.before, x.work.after] if x.work else [], peak, colour, lambda v: human(v).strip()),
    ]
    return join(parts)


def _bars(left: int, y: int, values: Sequence[float], most: float, colour: str, said: object) -> list[Markup]:
    if not values:
        return []
    assert callable(said)
    wide = [110 * v / most if most else 0.0 for v in values]
    outline = [el("rect", x=str(left), y=str(y - 5), width=f"{wide[0]:.1f}", height="10", fill="none", stroke=colour)]
    filled = el("rect", x=str(left), y=str(y - 5), width=f"{wide[-1]:.1f}", height="10", fill=colour)
    number = el("text", said(values[-1]), x=str(left + 165), y=str(y + 4), class_="number")
    return [*(outline if len(values) > 1 else []), filled, number]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
