"""The report: its verdict first, the same facts as text, page and JSON; a model's names never run in a page."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from small_models import stack

import reattend
from reattend import Refused, Site
from reattend.compiler.report import Report, Row, SiteList, Timing
from reattend.compiler.verification import Deviation

EVIL = "<script>alert('x')</script>&\"><img src=x onerror=y>"
SITE = Site("layers.0.attn", 0, heads=4, kv_heads=2, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
OWN_SCRIPT = (Path(reattend.__path__[0]) / "compiler/showing/page.js").read_text(encoding="utf-8")
FAR = Deviation(0.5, 0.25, 0.97, top1=0.5, kl=0.125)


def row(status: str = "rewritten", **more: object) -> Row:
    return Row(SITE, status, **more)  # type: ignore[arg-type]


def report(*rows: Row, **more: object) -> Report:
    return Report("net", "window", rows, **more)  # type: ignore[arg-type]


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data
        self.script += data if self.cdata_elem == "script" else ""


def test_names_from_outside_are_text_on_the_page_and_never_markup() -> None:
    evil = replace(SITE, path=EVIL)
    page = Page(
        Report(
            EVIL, EVIL, (Row(evil, "refused", EVIL, reason=EVIL, dropped=(EVIL,)),), passes=(EVIL,), misses=(EVIL,),
            data=EVIL, timing=Timing(1.0, 1.0, 3, EVIL), warnings=(EVIL,), notes=(EVIL,), output=FAR,
        ).html()
    )  # fmt: skip
    assert page.tags.count("script") == 1 and page.script == OWN_SCRIPT and "img" not in page.tags
    assert not {"onerror", "src"} & set(page.attributes)
    assert page.text.count(EVIL) >= 9


def test_the_page_asks_nothing_of_the_network() -> None:
    page = Page(report(row(deviation=FAR)).html())
    assert not {"link", "img", "iframe"} & set(page.tags) and "http" not in page.text
    assert "url(" not in page.text and "@import" not in page.text and "import(" not in page.text


def test_a_path_with_markup_goes_through_optimize_as_text() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>", stack(1).layers[0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._modules["<b>"](x)

    fast = reattend.optimize(Odd().eval(), "exact", torch.randn(2, 5, 32), measure=False, name="<i>net</i>")
    plain = set(Page(reattend.optimize(stack(1), "exact", torch.randn(2, 5, 32), measure=False).report.html()).tags)
    page = Page(fast.report.html())
    assert set(page.tags) == plain and "<i>net</i>" not in fast.report.html()
    assert "<b>" in page.text


@pytest.mark.parametrize(
    ("found", "says", "never"),
    [
        (report(row()), "1 of 1 sites rewritten", "CHANGED"),
        (report(row("kept")), "0 of 1 sites rewritten, NOTHING CHANGED", "UNTRAINED"),
        (report(row("kept"), passes=("tome_like()",)), "0 of 1 sites rewritten; 1 whole-model pass", "CHANGED"),
        (report(row(), row("refused"), row("rolled back")), "1 of 3 sites rewritten; 1 refused; 1 rolled back", "x as"),
        (report(row(), timing=Timing(2.0, 1.0, 5, "")), "measured here: 2.00 x as fast (2.00 .. 2.00)", "SLOWER"),
        (
            report(row(), timing=Timing(1.0, 2.0, 5, "")),
            "measured here: 0.50 x as fast (0.50 .. 0.50), SLOWER THAN THE ORIGINAL",
            "UNTR",
        ),
        (report(row(), timing=Timing(1.0, 1.02, 5, "")), "measured here: 0.98 x as fast", "SLOWER"),
        (report(row(kind="needs recovery")), "UNTRAINED: needs recovery", "SLOWER"),
        (report(row("refused", kind="needs recovery")), "0 of 1 sites", "UNTRAINED"),
        (report(row(), output=FAR), "top-1 0.5000 KL 0.125 (random inputs: correctness only, not quality)", "SLOWER"),
        (report(row(), output=FAR, data="4 batches given"), "(4 batches given)", "random inputs"),
    ],
    ids=["plain", "nothing", "pass", "counts", "faster", "slower", "tie", "untrained", "refused", "random", "data"],
)
def test_the_verdict_is_one_line_that_says(found: Report, says: str, never: str) -> None:
    assert says in found.verdict() and never not in found.verdict()
    assert "\n" not in found.verdict()
    assert found.text().splitlines()[0] == found.verdict()
    assert found.verdict() in Page(found.html()).text


def test_slower_is_a_warning_too() -> None:
    slow = report(row(), timing=Timing(1.0, 2.0, 5, "(2, 9)"))
    assert "slower" in slow.text().partition("warnings")[2]
    assert "slower" not in report(row(), timing=Timing(2.0, 1.0, 5, "(2, 9)")).text()


def test_measured_and_predicted_stand_apart() -> None:
    lines = report(row(), timing=Timing(2.0, 1.0, 5, "(2, 9, 32)")).text().splitlines()
    measured = [line for line in lines if " ms" in line]
    assert len(measured) == 1 and "predicted" not in measured[0]
    assert any("predicted" in line and " ms" not in line for line in lines)


def test_facts_as_json_are_whole_and_come_back_equal(tmp_path: Path) -> None:
    found = report(row(deviation=FAR, kind="approximate", dropped=("bias",)), timing=Timing(2.0, 1.0, 5, "(2, 9)"),
                   warnings=(EVIL,), output=FAR)  # fmt: skip
    target = found.write(tmp_path / "deep" / "report.json")
    read = json.loads(target.read_text(encoding="utf-8"))
    assert read == found.to_dict()
    assert read["verdict"] == found.verdict() and read["warnings"] == [EVIL]
    (site,) = read["rows"]
    assert Deviation(**site["deviation"]) == FAR and Deviation(**read["output"]) == FAR
    assert Site.from_json(json.dumps(site["site"])) == SITE
    assert json.loads(json.dumps(read)) == read


def test_numbers_that_are_not_finite_are_still_json() -> None:
    broken = report(row("rolled back"), output=Deviation(float("inf"), float("nan"), 0.0))
    text = json.dumps(broken.to_dict(), allow_nan=False)
    assert json.loads(text)["output"]["max_abs"] == "inf"


def test_a_report_is_written_by_the_ending_of_its_name(tmp_path: Path) -> None:
    found = report(row())
    assert found.write(tmp_path / "a.html").read_text(encoding="utf-8") == found.html()
    assert found.write(tmp_path / "a.txt").read_text(encoding="utf-8") == found.text()


def test_sites_are_found_by_number_and_by_path() -> None:
    sites = SiteList((row(), row("kept")))
    assert sites["layers.0.attn"] is sites[0] and len(sites) == 2
    assert [r.status for r in sites[0:2]] == ["rewritten", "kept"]
    with pytest.raises(Refused, match=r"did you mean 'layers\.0\.attn'"):
        sites["layers.0.atn"]


def test_a_row_prints_its_site_and_what_is_known_of_it() -> None:
    told = str(row("rewritten", mechanism="window(window=8)", deviation=FAR, rule="r.yaml:4", dropped=("bias",)))
    assert told.splitlines() == [
        "layers.0.attn: attention[causal-self h=4 kv=2 d=8] rewritten window(window=8)",
        "    deviation  0.25 cos 0.97000",
        "    rule       r.yaml:4",
        "    note       drop=bias",
    ]
    assert str(SiteList((row("kept"),))) == str(row("kept"))
