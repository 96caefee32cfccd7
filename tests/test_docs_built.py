"""Tables in the docs are what the code says; links between pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import reattend
from reattend.models.quality.overview import overview, put_into

ROOT = Path(reattend.__path__[0])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_table_is_the_registrys() -> None:
    assert put_into(README, overview(ROOT / "docs/quality/byte_lm.jsonl")) == README, "make tables"
    assert "| `window` |" in README


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    to = re.compile(r"\]\((?!https?:)([^)#\s]+)\)")
    links = [(page, link) for page in pages for link in to.findall(page.read_text(encoding="utf-8"))]
    assert len(links) > 20 and [link for page, link in links if not (page.parent / link).exists()] == []
