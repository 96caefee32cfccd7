"""Tables in the docs are what the code says; links between pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import reattend
from reattend.models.quality.overview import overview

ROOT = Path(reattend.__path__[0])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_table_is_the_registrys() -> None:
    _, _, rest = README.partition("<!-- mechanisms -->\n")
    again = "python -m reattend.models.quality.overview docs/quality/byte_lm.jsonl"
    assert rest.partition("\n<!-- end -->")[0] == overview(ROOT / "docs/quality/byte_lm.jsonl"), again


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "docs/concepts.md", ROOT / "docs/troubleshooting.md"]
    links = [(p, link) for p in pages for link in re.findall(r"\]\(([^)#]+)\)", p.read_text(encoding="utf-8"))]
    assert len(links) > 20 and [link for page, link in links if not (page.parent / link).exists()] == []
