"""Seeing a rewrite: what the view holds, that every writer says it, and that names from outside stay text."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import at_once
from small_models import stack
from typer.testing import CliRunner

import reattend
from reattend.cli import app
from reattend.compiler.heads.table import Head, HeadTable
from reattend.compiler.recipe_load import load_recipe
from reattend.compiler.showing import markdown, page, picture
from reattend.compiler.showing.computing import computation
from reattend.compiler.showing.layered import Seen, layered
from reattend.compiler.showing.mathml import mathml
from reattend.compiler.showing.view import Layer, Mask, Measure, Module, Operation, Pair, Rule, View
from reattend.compiler.steps import vocabulary
from reattend.compiler.symbol_eval import evaluate
from reattend.compiler.symbol_text import parse

EVIL = "</script><script>alert('x')</script>&\"><img src=x onerror=y>`|[a](javascript:b)"
X = torch.randn(2, 9, 32)


def windows(layers: int = 3) -> Any:
    recipe = {"version": 1, "sites": [
        {"match": {"layer": "0-1"}, "attention": {"window": {"window": 4, "sinks": 1}}},
        {"match": {"layer": "2"}, "attention": "agent"},
    ]}  # fmt: skip
    return reattend.optimize(stack(layers), recipe, (X,), measure=False, name="three layers")


@pytest.fixture(scope="module")
def fast() -> Any:
    return windows()


@pytest.fixture(scope="module")
def view(fast: Any) -> View:
    return fast.report.view()


def test_a_row_a_site_with_both_sides(view: View) -> None:
    one, _, refused = view.layers
    assert [x.status for x in view.layers] == ["rewritten", "rewritten", "refused"]
    assert one.slug == "window" and "window=4" in one.mechanism
    assert one.deviation and one.work and 0 < one.work.after < one.work.before
    assert one.kv and one.kv.after < one.kv.before, "a window's cache is a ring"
    assert refused.deviation is None and "noncausal" in refused.reason and refused.path not in refused.reason
    assert refused.kv and refused.kv.after == refused.kv.before


def test_sites_that_compute_the_same_share_it(view: View) -> None:
    assert len(view.computations) == 2  # causal softmax, and the window
    first, second, _ = view.layers
    assert first.before == second.before != first.after[0] == second.after[0]


def test_the_graph_lies_side_by_side_and_only_the_rewritten_sites_are_marked(view: View) -> None:
    changed = {m.path for m in walked(view.graph) if any(o.mark != "same" for o in m.operations)}
    assert changed == {"layers.0.attn", "layers.1.attn"}
    marked = [o for m in walked(view.graph) for o in m.operations if o.mark != "same"]
    assert Operation("attend", "attend · window", "", "window").mark == "changed"
    assert [(o.before, o.after) for o in marked if o.before == "attend"] == [("attend", "attend · window")] * 2
    assert sum(m.count for m in view.graph) > 3 * 10


def walked(modules: tuple[Module, ...]) -> list[Module]:
    return [m for one in modules for m in (one, *walked(one.inside))]


def test_what_goes_and_what_comes_is_aligned_by_name() -> None:
    seen = lambda *names: tuple(Seen(n, n, "m", "M") for n in names)
    (module,) = layered(seen("a", "b", "c", "d"), seen("a", "x", "y", "d", "z"))
    assert [(o.before, o.after, o.mark) for o in module.operations] == [
        ("a", "a", "same"), ("b", "x", "changed"), ("c", "y", "changed"), ("d", "d", "same"), ("", "z", "new"),
    ]  # fmt: skip


def test_each_rule_names_the_sites_that_it_decided(view: View) -> None:
    assert [rule.sites for rule in view.rules] == [("layers.0.attn", "layers.1.attn"), ("layers.2.attn",)]
    assert "window" in view.rules[0].text


def test_the_mask_is_drawn_as_the_predicate_says() -> None:
    keep = "((i <= j + 5) | (j <= 1)) & (j <= i)"
    (mask,) = computation(json.dumps({"keep": keep, "score": "s"}), 48).masks
    i, j = torch.arange(48).view(-1, 1), torch.arange(48).view(1, -1)
    kept = evaluate(parse(keep), {"i": i, "j": j}, {})
    for y, row in enumerate(mask.rows):
        for x, kind in enumerate(row):
            tile = kept[y * mask.tile : (y + 1) * mask.tile, x * mask.tile : (x + 1) * mask.tile]
            assert kind == ("f" if tile.all() else "p" if tile.any() else "e")


def test_what_tables_decide_is_said_and_not_drawn() -> None:
    (mask,) = computation('{"keep":"t0[b, j] != 0","score":"s"}', 16).masks
    assert mask.rows == () and "t_{0}" in mask.latex
    assert "decided by tables" in picture.mask(mask)


def test_a_computation_has_formulas_its_cascade_and_a_kernel() -> None:
    found = computation('{"keep":"j <= i","score":"s * 0.25"}', 64)
    assert dict(found.formulas)["score"] == r"S_{i, j} = 0.25 q_{i} \cdot k_{j}"
    assert "barriers" in found.cascade and "latex" not in found.cascade
    assert any(k.device == "cpu" and "BM = 48" in k.source for k in found.kernels)


GPU = """
from small_models import stack
import reattend, torch
from reattend.compiler.refusal import Refused
from reattend.compiler.showing.page import BUILT
fast = reattend.optimize(stack(1), "window", torch.randn(2, 9, 32), measure=False)
def taken(*targets):
    kernels = [k for c in fast.report.view(targets=targets).computations for k in c.kernels if k.device == "cuda"]
    return [f for k in kernels for f in k.footprints]
"""
ASKED = """
assert not taken() and BUILT in fast.report.html()
asked = taken("cuda:90")
for f in asked:
    assert f.target == "cuda:90" and 0 < f.registers <= 255 and 0 < f.shared <= f.limit, f
assert taken() == asked and "227 KB" in fast.report.html() and BUILT not in fast.report.html()
try:
    taken("cuda:91")
except Refused as refused:
    print(len(asked), refused)
"""


def test_a_kernel_tells_what_it_takes_of_a_gpu_once_it_was_compiled(tmp_path: Path) -> None:
    """Compiled on request, remembered after it; a page alone never waits for a compiler."""
    pytest.importorskip("triton")
    (said,) = at_once(1, GPU, ASKED, cache=tmp_path)  # here kernels are interpreted
    assert re.fullmatch("2 .*cuda:91.*cuda:90.*", said)


@pytest.mark.parametrize(
    ("latex", "says"),
    [
        (r"\frac{a}{b}", "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>"),
        (r"\sum_{j} x", "<munder><mo movablelimits=\"false\">∑</mo>"),
        (r"\left\lfloor \frac{i}{4} \right\rfloor", '<mo stretchy="true">⌊</mo>'),
        (r"\begin{aligned}a &= b \\ c &= d\end{aligned}", "</mtd></mtr><mtr><mtd>"),
        (r"a \quad \text{if } b \le c", "<mtext> if </mtext>"),
        (r"\begin{cases} a & \text{if } b \\ c & \text{otherwise} \end{cases}", 'class="cases"'),
        (r"\operatorname{sigmoid}\left(x\right)", '<mi mathvariant="normal">sigmoid</mi>'),
    ],
)  # fmt: skip
def test_latex_becomes_mathml(latex: str, says: str) -> None:
    found = mathml(latex)
    assert says in found
    ET.fromstring(found)


def test_every_formula_of_every_mechanism_is_well_formed() -> None:
    sink, gate = '{"score":"s","sink":"t0[h]"}', '{"score":"s","weight":"sigmoid(s)","normaliser":"none"}'
    for spec in (sink, gate, '{"score":"tanh(s / 30.0) * 30.0"}', '{"score":"s - t0[h] * abs(i - j)"}'):
        for _, latex in computation(spec, 32).formulas:
            ET.fromstring(mathml(latex))


# --- every writer -----------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """What stands in a page as markup, and what stands there as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def evil() -> View:
    """Every text of a view from someone who wishes no good."""
    layer = Layer(EVIL, "rewritten", EVIL, EVIL, EVIL, EVIL, 0.5, EVIL, Pair(1, 2), Pair(1, 2), Pair(1, 2), Pair(1, 2),
                  EVIL, ((EVIL, EVIL),))  # fmt: skip
    inside = Module(EVIL, EVIL, (Operation(EVIL, EVIL, EVIL, EVIL),))
    heads = (Measure(EVIL, (EVIL,), ((0.5, None),)),)
    return View(
        EVIL, EVIL, EVIL, ((EVIL, EVIL),), (layer, replace(layer, status="refused")), (EVIL,), ((EVIL, (EVIL,)),),
        graph=(inside,), rules=(Rule(EVIL, EVIL, (EVIL,)),), heads=heads, device=EVIL,
    )  # fmt: skip


def test_malicious_names_are_text_in_every_writer() -> None:
    found = Tags(page.document(evil()))
    assert found.tags.count("script") == 1 and "img" not in found.tags
    assert not {n for n in found.names if n.startswith("on")} | ({"src"} & found.names)
    assert found.text.count("alert('x')") > 20
    drawn = ET.fromstring(picture.table(evil()))
    assert not {e.tag for e in drawn.iter()} & {"script", "img", "{http://www.w3.org/2000/svg}script"}
    written = markdown.document(evil())
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(", written)
    assert len([line for line in written.splitlines() if line.startswith("| ")]) == 7


def test_a_mask_and_a_formula_cannot_carry_markup_either() -> None:
    assert "<script" not in picture.mask(Mask(EVIL, EVIL, 4, ("ep",), EVIL)) + mathml(EVIL) + mathml(
        f"\\text{{{EVIL}}}"
    )


@pytest.mark.parametrize("ending", ["html", "svg", "md", "json", "txt"])
def test_the_report_is_written_by_its_ending(ending: str, fast: Any, tmp_path: Path) -> None:
    text = fast.report.write(tmp_path / f"r.{ending}").read_text(encoding="utf-8")
    assert "layers.1.attn" in text and "2 of 3 sites rewritten" in text


def test_a_notebook_shows_page_text_and_markdown(fast: Any) -> None:
    shown = fast.report._repr_mimebundle_()
    assert set(shown) == {"text/html", "text/plain", "text/markdown"}
    assert shown["text/html"].startswith('<div class="reattend">') and shown["text/plain"] == fast.report.text()
    assert fast._repr_html_() == shown["text/html"] == fast.report.view()._repr_html_()
    for one in (fast.sites, fast.sites[0], reattend.explain(stack(1), (X,)), fast.sites[0].site):
        assert "attn" in Tags(one._repr_html_()).text
    recipe = load_recipe({"version": 1, "sites": [{"match": {"path": "<b>"}, "attention": "softmax"}]}, vocabulary())
    assert "b" not in Tags(recipe._repr_html_()).tags


def test_a_model_that_nothing_was_done_to_shows_its_sites() -> None:
    text = Tags(reattend.explain(stack(2), (X,))._repr_html_()).text
    assert "2 sites; nothing was changed" in text and "window" in text, "what fits is on the card"


def test_heads_are_small_multiples(fast: Any) -> None:
    site = fast.sites[0].site
    heads = tuple(Head(site.path, h, h // 2, {"entropy": v}) for h, v in enumerate((0.5, 1.0, None, 2.0)))
    shown = page.document(fast.report.view(heads=HeadTable("m", (site,), ("entropy",), heads)))
    assert "head 3: 2" in shown and "head 2: not defined" in shown


def test_a_large_model_is_written_in_less_than_two_seconds(view: View) -> None:
    large = replace(view, layers=view.layers * 11, graph=view.graph * 11, rules=view.rules * 11)
    start = time.perf_counter()
    text = page.document(large)
    assert time.perf_counter() - start < 2 and len(text) < 2_000_000


def test_the_command_writes_all_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seen_module.py").write_text("import torch\nfrom small_models import stack\n"
                                             "def made(): return stack(2), (torch.randn(2, 9, 32),)\n")  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    targets = [str(tmp_path / f"deep/r.{ending}") for ending in ("html", "svg", "md", "json")]
    words = [w for name, t in zip(("--html", "--svg", "--md", "--json"), targets) for w in (name, t)]
    answer = CliRunner().invoke(app, ["report", "py:seen_module:made", "exact", *words])
    assert answer.exit_code == 0, answer.output
    assert "2 of 2 sites rewritten" in answer.output and all(Path(t).exists() for t in targets)
    assert json.loads(Path(targets[3]).read_text())["layers"][0]["path"] == "layers.0.attn"
    plain = CliRunner().invoke(app, ["report", "py:seen_module:made"])
    assert plain.exit_code == 0 and "nothing was changed" in plain.output
