"""A new mechanism's file: small, whole, and passing `reattend check` before a line of it is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .mechanism import mechanisms
from .refusal import Refused
from .vocabulary import WORDS

_HEAD = '''"""{title}: what it does in one sentence (its paper).

Its formula:
    w_ij = exp(scale * q_i . k_j) over the j with |i - j| < reach,   o_i = sum_j w_ij v_j / sum_j w_ij
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
'''

_OUTSIDE = """
from {face} import Limit, Mechanism, Refused, Site, attend, attention, register
from {face}.compiler.live import KEPT
from {face}.compiler.problem import problem
"""

_INSIDE = """
from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
"""

_BODY = '''

@register("{slug}")
@dataclass(frozen=True)
class {title}(Mechanism):
    """A query sees the keys less than `reach` away.

    >>> q, k, v = problem(6)
    >>> attention(q, k, v, "{slug}", causal=True, reach=2).shape
    torch.Size([2, 4, 6, 8])

    reach  how far a query looks, itself included.
    """

    reach: int = 64  # fields are the knobs: keys of a recipe, options, the table of the docs

    part = "core"  # q, k, v -> o
    kind = "approximate"  # exact | approximate (training-free) | needs recovery
    honours = KEPT  # what attend(..., site=site) carries over by itself: padding, bias, softcap, sinks, ...
    paper = "arXiv 0000.00000"
    tries = ({{}}, {{"reach": 3}})  # knobs that `reattend check` asks with

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise Refused(f"reach={{self.reach}}", where="{slug}", fits="reach >= 1")

    def fits(self, site: Site) -> str | None:
        """Why it cannot stand at a site, or None."""
        return None if site.self_attention else "{slug} compares positions, this site is cross-attention"

    def keep(self, i: Any, j: Any) -> Any:
        return (i - j < self.reach) & (j - i < self.reach)

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, keep=self.keep, site=site)

    def limits(self) -> Iterable[Limit]:
        """Cases whose answer is known exactly; they are its tests."""
        q, k, v = problem(5)
        yield Limit(
            "a reach over everything is full attention",
            lambda: attention(q, k, v, {title}(reach=5), causal=True),
            lambda: attention(q, k, v, "softmax", causal=True),
        )
        yield Limit("reach 1 sees the token itself", lambda: attention(q, k, v, {title}(reach=1)), lambda: v)
'''


def new_mechanism(name: str, *, family: str = "", folder: Path | None = None) -> tuple[Path, ...]:
    """Write NAME.py here, or with a family its file under passes/ and the import line; the files that were written.

    Nothing is overwritten, and a name that is registered is refused.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in WORDS:
        raise Refused(f"name {name!r}", where="new-mechanism", fits="small letters, digits and _, as in 'near_and_far'")
    if name in mechanisms():
        raise Refused(f"mechanism {name!r} is registered", where="new-mechanism", fits="another name")
    here = Path.cwd() if folder is None else folder
    text = _text(name, inside=bool(family))
    if not family:
        return (_written(here / f"{name}.py", text),)
    passes = here / "passes" / "__init__.py"
    if not passes.is_file():
        raise Refused(f"--family {family} in {here}", where="new-mechanism", fits="the root of reattend's repository")
    folders = sorted(p.parent.name for p in passes.parent.glob("*/__init__.py"))
    if family not in folders:
        raise Refused(f"family {family!r}", where="new-mechanism", fits=", ".join(folders))
    made = _written(passes.parent / family / f"{name}.py", text)
    passes.write_text(_with_import(passes.read_text(encoding="utf-8"), family, name), encoding="utf-8")
    return made, passes


def _text(name: str, *, inside: bool) -> str:
    title = "".join(part.capitalize() for part in name.split("_"))
    return (_HEAD + (_INSIDE if inside else _OUTSIDE) + _BODY).format(title=title, slug=name, face="reattend")


def _written(path: Path, text: str) -> Path:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise Refused(f"{path} exists", where="new-mechanism", fits="another name, or another folder") from None
    return path


def _with_import(text: str, family: str, name: str) -> str:
    """One more import line, where the order of lines puts it."""
    line = f"from .{family} import {name} as {name}"
    lines = text.splitlines()
    imports = [number for number, known in enumerate(lines) if known.startswith("from .")]
    after: Iterable[int] = (number for number in imports if lines[number] > line)
    lines.insert(next(iter(after), imports[-1] + 1), line)
    return "\n".join(lines) + "\n"
