"""The view as one page, or as part of one: markup, style and script of its own, nothing from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

from ..cost import human
from . import picture
from .markup import Markup, el, join, raw
from .mathml import mathml
from .view import Computation, Kernel, Layer, Module, Pair, Rule, View

OPEN_COLOURS = 8  # mechanisms beyond begin again with the first
BUILT = (
    "registers, spills and shared memory: reattend report MODEL RECIPE --target cuda:90 (cuda:80, cuda:100, hip:gfx942)"
)


@lru_cache(maxsize=4)
def _file(name: str) -> Markup:
    return raw((resources.files(__package__) / name).read_text(encoding="utf-8"))


def document(view: View) -> str:
    """A whole page."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"reattend: {view.title}"),
    )
    return "<!doctype html>\n" + el("html", head, el("body", raw(part(view))), lang="en")


def part(view: View) -> str:
    """For a notebook: everything inside one element, whose style and script touch nothing else."""
    inside = (
        el("style", _file("page.css")),
        _header(view),
        el("main", _summary(view), _table(view), _next(view), _said(view), _facts_of(view), *_folded(view)),
        el("script", _file("page.js")),
    )
    return el("div", *inside, class_="reattend")


# --- what is seen first -----------------------------------------------------------------------------------------------


def _header(view: View) -> Markup:
    search = el("input", type="search", placeholder="Find a site", aria_label="Find a site", data_search=True)
    theme = el("button", "◐", type="button", title="Light or dark", aria_label="Light or dark", data_theme_button=True)
    name = el("p", el("b", "reattend"), el("span", view.title, class_="model"), class_="name")
    return el("header", name, el("p", search, theme, class_="tools"))


def _summary(view: View) -> Markup:
    first, mark, rest = view.verdict.partition(";")
    strip = [
        el("a", href=f"#site-{n}", title=f"{x.path}: {x.mechanism or x.status}", class_=_colour(view, x), tabindex="-1")
        for n, x in enumerate(view.layers)
    ]
    return el(
        "section",
        el("h1", el("strong", first), f"{mark}{rest}"),
        el("p", *strip, class_="strip", aria_hidden="true"),
        class_="summary",
    )


def _facts_of(view: View) -> Markup:
    known = [join((el("dt", name), el("dd", value))) for name, value in view.facts]
    return el("section", el("h2", "Measured and predicted"), el("dl", *known, class_="facts")) if known else join(())


def _colour(view: View, layer: Layer) -> str:
    """A class of the style sheet: one for each mechanism, others for what stayed."""
    if layer.slug in view.slugs and layer.status == "rewritten":
        return f"m{view.slugs.index(layer.slug) % OPEN_COLOURS}"
    return {"refused": "no", "rolled back": "no"}.get(layer.status, "kept")


def _next(view: View) -> Markup:
    if not view.next:
        return join(())
    steps = [el("li", _with_code(step)) for step in view.next]
    return el("section", el("h2", "What to do next"), el("ol", *steps), class_="next")


def _with_code(text: str) -> Markup:
    """What stands between backticks is code."""
    return join([el("code", part) if n % 2 else part for n, part in enumerate(text.split("`"))])


def _said(view: View) -> Markup:
    lists = [
        join((el("h2", title[0].upper() + title[1:]), el("ul", *(el("li", entry) for entry in entries))))
        for title, entries in view.lists
    ]
    return el("section", *lists, class_="said") if lists else join(())


# --- the table --------------------------------------------------------------------------------------------------------

_HEADS = (
    ("site", ""),
    ("what stands there", ""),
    ("deviation", "measured, relative"),
    ("work", "FLOPs, predicted"),
    ("time", "predicted"),
    ("KV bytes", "predicted"),
)


def _table(view: View) -> Markup:
    if not view.layers:
        return join(())
    heads = [el("th", name, el("small", note) if note else None, scope="col") for name, note in _HEADS]
    most = max((x.deviation or 0.0 for x in view.layers), default=0.0)
    peaks = {n: max((_most(getattr(x, n)) for x in view.layers), default=0.0) for n in ("work", "time", "kv")}
    rows = [_row(view, n, x, most, peaks) for n, x in enumerate(view.layers)]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows), class_="layers")
    foot = f"Predicted times: {view.device}. " if view.device else ""
    note = el("p", foot, "A bar's outline is the original, its filling what stands there now.", class_="note")
    empty = el("p", "No site by that name.", hidden=True, data_empty=True, class_="note")
    return el("section", el("h2", "Sites"), table, empty, note)


def _most(pair: Pair | None) -> float:
    return max(pair.before, pair.after) if pair else 0.0


def _row(view: View, n: int, x: Layer, most: float, peaks: dict[str, float]) -> Markup:
    said = x.mechanism or {"found": "attention", "kept": "kept as it was"}.get(x.status, x.status)
    what = [el("span", class_=f"dot {_colour(view, x)}"), el("span", said)]
    what += [el("span", x.status, class_="badge no")] if x.status in ("refused", "rolled back") and x.mechanism else []
    what += [el("span", x.kind, class_="badge")] if x.kind else []
    reason = el("p", x.reason, class_="reason") if x.reason else None
    bar = _bar(x.deviation / most if most else 0.0, None) if x.deviation is not None else None
    deviation = el("span", f"{x.deviation:.2g}", class_="number") if x.deviation is not None else None
    cells = [
        el("td", el("a", x.path, href=f"#site-{n}"), data_label=None, class_="path"),
        el("td", el("p", *what, class_="what"), reason),
        el("td", bar, deviation, data_label="deviation", title=x.says or None, class_="measured"),
        *(_pair_cell(name, getattr(x, key), peaks[key], said) for name, key, said in _PAIRS),
    ]
    return el("tr", *cells, class_=_colour(view, x), data_site=x.path)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


_PAIRS = (
    ("work", "work", lambda v: human(v).strip()),
    ("time", "time", _seconds),
    ("KV bytes", "kv", lambda v: f"{human(v)}B"),
)


def _pair_cell(name: str, pair: Pair | None, peak: float, said: object) -> Markup:
    if pair is None or not callable(said):
        return el("td", data_label=None, class_="nothing")
    bar = _bar(pair.after / peak if peak else 0.0, pair.before / peak if peak else 0.0)
    return el("td", bar, el("span", _change(pair, said), class_="number"), data_label=name)


def _change(pair: Pair, said: object) -> Markup:
    assert callable(said)
    before, after = said(pair.before), said(pair.after)
    return el("span", after) if before == after else join((el("span", f"{before} → ", class_="before"), after))


def _bar(filled: float, outline: float | None) -> Markup:
    """Shares of the widest bar in the column."""
    style = f"--filled:{filled:.3f}" + (f";--outline:{outline:.3f}" if outline is not None else "")
    return el("span", el("i"), class_="bar" if outline is None else "bar pair", style=style, aria_hidden="true")


# --- what is folded ---------------------------------------------------------------------------------------------------


def _folded(view: View) -> list[Markup]:
    found = [
        (_fold("Cards", _count(view.layers, "site"), *_cards(view), id_="cards"), bool(view.layers)),
        (_fold("What is computed", _count(view.computations, "different attention"),
               *(_computation(c) for c in view.computations), id_="computations"), bool(view.computations)),
        (_fold("Graph", _changes(view.graph), *(_module(m) for m in view.graph), id_="graph"), bool(view.graph)),
        (_fold("Recipe", _count(view.rules, "rule"), *(_rule(r) for r in view.rules), id_="recipe"), bool(view.rules)),
        (_fold("Heads", ", ".join(m.name for m in view.heads), *map(picture.heads, view.heads), id_="heads"),
         bool(view.heads)),
        (_fold("Quality against cost", "", _plot(view), id_="quality"), bool(view.plot)),
    ]  # fmt: skip
    return [fold for fold, shown in found if shown]


def _plot(view: View) -> Markup:
    """As a picture of its own: its style is for it alone."""
    data = b64encode(view.plot.encode()).decode()
    shown = el("img", src=f"data:image/svg+xml;base64,{data}", alt="quality against cost", class_="plot")
    return el("figure", shown)


def _fold(title: str, note: str, *inside: Markup, id_: str) -> Markup:
    return el("details", el("summary", el("h2", title), el("small", note)), *inside, class_="fold", id=id_)


def _count(things: Sequence[object], one: str) -> str:
    return f"{len(things)} {one}{'s' * (len(things) != 1)}"


def _cards(view: View) -> list[Markup]:
    return [_card(view, n, x) for n, x in enumerate(view.layers)]


def _card(view: View, n: int, x: Layer) -> Markup:
    known = {c.key: c for c in view.computations}
    facts = [join((el("dt", name), el("dd", value))) for name, value in _facts(x)]
    head = el("summary", el("span", class_=f"dot {_colour(view, x)}"), el("code", x.path), " ",
              el("small", x.mechanism or x.status))  # fmt: skip
    sides = [("before" if x.after else "", x.before), *(("after", key) for key in x.after)]
    drawn = [_side(side, known[key]) for side, key in sides if key in known]
    body = el("div", el("dl", *facts, class_="facts"), el("div", *drawn, class_="sides"), class_="card")
    return el("details", head, body, class_="site", id=f"site-{n}", data_site=x.path)


def _facts(x: Layer) -> list[tuple[str, str]]:
    found = [("stands there", x.mechanism), ("kind", x.kind), ("reason", x.reason), ("deviation", x.says), *x.facts]
    for name, pair, said in (("work, predicted", x.work, lambda v: f"{human(v)}FLOP"),
                             ("bytes moved, predicted", x.moved, lambda v: f"{human(v)}B"),
                             ("time, predicted", x.time, _seconds),
                             ("KV cache, predicted", x.kv, lambda v: f"{human(v)}B")):  # fmt: skip
        if pair is not None:
            one, other = said(pair.before), said(pair.after)
            found.append((name, one if one == other else f"{one} → {other}"))
    return [(name, value) for name, value in (*found, ("rule", x.rule)) if value]


def _side(title: str, c: Computation) -> Markup:
    masks = [picture.mask(m) for m in c.masks]
    score = [mathml(tex) for name, tex in c.formulas if name in ("score", "normaliser")]
    link = el("p", el("a", "equations, passes, kernels", href=f"#{c.key}"), class_="note")
    return el("figure", el("figcaption", title) if title else None, *score, *masks, link)


def _computation(c: Computation) -> Markup:
    head = el("summary", el("code", c.key), " ", el("small", c.spec))
    formulas = [join((el("dt", name), el("dd", mathml(tex)))) for name, tex in c.formulas]
    masks = [el("figure", mathml(m.latex), picture.mask(m)) for m in c.masks]
    kernels = [
        el(
            "details",
            el("summary", f"{k.name} ", el("small", k.device)),
            _footprints(k),
            el("pre", el("code", k.source)),
        )
        for k in c.kernels
    ]
    unbuilt = any(k.device == "cuda" and not k.footprints for k in c.kernels)
    built = el("p", BUILT, class_="note") if unbuilt else None
    cascade = el("details", el("summary", "cascade, barriers, passes, loops"), el("pre", c.cascade), open=True)
    body = el("div", el("dl", *formulas, class_="formulas"), *masks, cascade, *kernels, built, class_="card")
    return el("details", head, body, class_="site", id=c.key)


_TAKEN = ("kernel", "target", "registers", "spilled", "shared memory", "matrix instructions", "warps")


def _footprints(kernel: Kernel) -> Markup | None:
    if not kernel.footprints:
        return None
    rows = [
        (
            f.kernel,
            f.target,
            f.registers,
            f"{f.spilled} B",
            f"{_kb(f.shared)} of {_kb(f.limit)} KB",
            f.matrix,
            f.warps,
        )
        for f in kernel.footprints
    ]
    head = el("tr", *(el("th", name, scope="col") for name in _TAKEN))
    body = [el("tr", *(el("td", str(cell)) for cell in row)) for row in rows]
    return el("div", el("table", el("thead", head), el("tbody", *body)), class_="taken")


def _kb(size: int) -> int:
    return -(-size // 1024)


def _changes(graph: tuple[Module, ...]) -> str:
    changed, count = sum(m.changed for m in graph), sum(m.count for m in graph)
    return f"{changed} of {count} operations changed" if changed else f"{count} operations, none changed"


def _module(m: Module) -> Markup:
    note = f"{m.changed} of {m.count} changed" if m.changed else f"{m.count}"
    name = m.path.rpartition(".")[2] or "the model itself"
    head = el("summary", el("code", name), " ", el("small", m.kind), el("small", note, class_="count"))
    lines = [
        el("tr", el("td", o.before), el("td", o.after), el("td", o.shape), class_=o.mark, title=o.mechanism or None)
        for o in m.operations
    ]
    heads = el("tr", *(el("th", h, scope="col") for h in ("before", "after", "shape")))
    table = el("table", el("thead", heads), el("tbody", *lines), class_="operations") if lines else None
    marked = "module changed" if m.changed else "module"
    return el("details", head, *(_module(inner) for inner in m.inside), table, class_=marked, open=not m.path)


def _rule(rule: Rule) -> Markup:
    matched = ", ".join(rule.sites) or "none"
    return el("div", el("p", el("code", rule.text), " ", el("small", rule.where)),
              el("p", f"{_count(rule.sites, 'site')}: {matched}", class_="note"), class_="rule")  # fmt: skip
