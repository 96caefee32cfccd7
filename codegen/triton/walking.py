"""The loops of a kernel past the tiles that a predicate can keep: those it cuts ask it, those in between do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...compiler.spans import NOTHING, Reached, Span
from ...compiler.symbols import TRUE, Expr
from .printer import triton_text


@dataclass(frozen=True)
class Loop:
    """Tiles low, ..., high - 1, by the names of these numbers."""

    low: str
    high: str
    cut: bool


@dataclass
class Walk:
    """Ranges of indices as ranges of tiles: statements that compute them, then the loops over them.

    `size` is how many indices there are, `block` how many a tile has, `shift` what an index is ahead of its place;
    `shared`: of each range only a share is passed, by the program's place on the second axis.
    """

    name: str
    size: str
    block: str
    shift: str = ""
    shared: bool = False
    lines: list[str] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)

    def past(self, found: Sequence[Reached], *, always_cut: bool = False) -> Walk:
        suffixes = [f"{self.name}_{number}" if len(found) > 1 else self.name for number in range(len(found))]
        for number, (suffix, reached) in enumerate(zip(suffixes, found, strict=True)):
            self._range(suffix, f"high{suffixes[number - 1]}" if number else "", reached.some)
        for suffix in suffixes if self.shared else ():
            self._share(suffix)
        for suffix, reached in zip(suffixes, found, strict=True):
            if reached.every is NOTHING or always_cut:
                self.loops.append(Loop(f"low{suffix}", f"high{suffix}", True))
            else:
                self._whole(suffix, reached)
        return self

    def _range(self, suffix: str, before: str, span: Span) -> None:
        low = f"tl.maximum({self._place(span.low)}, 0) // {self.block}" if span.starts_late else "0"
        if before:
            low = before if low == "0" else f"tl.maximum({low}, {before})"
        self.lines.append(f"low{suffix} = {low}")
        end = self._guarded(span.guard, f"tl.cdiv(tl.maximum({self._end(span)}, 0), {self.block})")
        self.lines.append(f"high{suffix} = {end if low == '0' else f'tl.maximum({end}, low{suffix})'}")

    def _share(self, suffix: str) -> None:
        low, high, share = f"low{suffix}", f"high{suffix}", f"share{suffix}"
        self.lines.append(f"{share} = tl.cdiv({high} - {low}, tl.num_programs(1))")
        self.lines.append(f"{low} = {low} + {share} * tl.program_id(1)")
        self.lines.append(f"{high} = tl.maximum(tl.minimum({low} + {share}, {high}), {low})")

    def _whole(self, suffix: str, reached: Reached) -> None:
        """Between the tiles that are cut at the beginning and at the end."""
        low, high, first = f"low{suffix}", f"high{suffix}", f"low{suffix}"
        if reached.every.low.text != reached.some.low.text:
            first = f"whole{suffix}"
            start = f"tl.cdiv(tl.maximum({self._place(reached.every.low)}, 0), {self.block})"
            self.lines.append(f"{first} = tl.minimum(tl.maximum({start}, {low}), {high})")
            self.loops.append(Loop(low, first, True))
        end = self._guarded(reached.every.guard, f"tl.maximum({self._end(reached.every)}, 0) // {self.block}")
        self.lines.append(f"cut{suffix} = tl.minimum(tl.maximum({end}, {first}), {high})")
        self.loops += [Loop(first, f"cut{suffix}", False), Loop(f"cut{suffix}", high, True)]

    def _end(self, span: Span) -> str:
        return self.size if span.high is None else f"tl.minimum({self._place(span.high)}, {self.size})"

    def _place(self, e: Expr) -> str:
        text = triton_text(e, "i", {"M": "M0"})
        return f"{text} - {self.shift}" if self.shift else text

    @staticmethod
    def _guarded(guard: Expr, text: str) -> str:
        return text if guard.text == TRUE.text else f"tl.where({triton_text(guard, 'b', {'M': 'M0'})}, {text}, 0)"


def walked_list(at: str, call: str) -> Iterator[str]:
    """The loop over the tiles that are listed for a block, each in PARTS."""
    yield "tile_ = b * list_b + h * list_h + first // TILES"
    yield "for t in tl.range(0, tl.load(COUNT + tile_) * PARTS, num_stages=STAGES):"
    yield f"    {at} = tl.load(LIST + tile_ * LISTED + t // PARTS) * PARTS + t % PARTS"
    yield f"    {call}"


def walked(loops: Sequence[Loop], at: str, calls: tuple[str, str], *, backwards: bool = False) -> Iterator[str]:
    """The loops as text; `calls`: what is done with a tile that is cut, with one that is whole."""
    for loop in reversed(loops) if backwards else loops:
        call = calls[0] if loop.cut else calls[1]
        if backwards:
            yield f"for t in tl.range({loop.low}, {loop.high}, num_stages=STAGES):"
            yield f"    {at} = {loop.low} + {loop.high} - 1 - t"
        else:
            yield f"for {at} in tl.range({loop.low}, {loop.high}, num_stages=STAGES):"
        yield f"    {call}"
