"""`attend` as Triton: the source of one spec, from the loop skeletons and what its normaliser lets a row gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.attend_stored import row_spec
from ...compiler.primitives.packed_rows import RowSpec
from ...compiler.refusal import Refused
from ...compiler.spans import Reached, Span, spans
from ...compiler.symbol_text import parse
from ...compiler.symbols import TRUE, Expr, as_expr
from .. import relative
from .folding import Folding
from .printer import triton_text
from .skeleton import filled, text_of
from .walking import Walk, walked, walked_list

SIZES = ("D", "DP", "E", "EP", "BM", "BN", "WIDE", "PRECISION")  # constants that a tile has from its block
EVERYWHERE = (Reached(Span(as_expr(0), None)),)  # where positions are looked up, nothing is known of a tile


@dataclass(frozen=True)
class Attend:
    """What a kernel of one spec is made of. `tables`: "f" or "i" and the number of axes of each, as in "f1 i3"."""

    text: str
    tables: str = ""
    packed: bool = False  # the query heads of a key head are rows of one block
    keeps: bool = False  # each row's number for its gradient comes out as well
    singly: bool = False  # what is stored is read byte by byte: of four, Triton 3.6 makes no code for AMD
    lazily: bool = False  # what was gathered is put right only where a maximum rose far
    shared: bool = False  # a program passes a share of a block's tiles; what it gathered comes out, to be joined

    @cached_property
    def spec(self) -> AttendSpec:
        return AttendSpec.of(self.text)

    @cached_property
    def kinds(self) -> str:
        return "".join(table[0] for table in self.tables.split())

    @cached_property
    def folding(self) -> Folding:
        return Folding(self.spec, self.kinds, self.packed, self.lazily and self.values)

    @cached_property
    def source(self) -> str:
        """The whole module."""
        tiles = (self._tile(n) for n in range(len(self.spec.segments)))
        return "".join(
            [text_of("functions"), *([text_of("stored")] if self.spec.stored else []), *tiles, self._forward()]
        )

    # --- arguments ----------------------------------------------------------------------------------------------------

    @cached_property
    def looked_up(self) -> list[str]:
        """Arguments of the tables that expressions look up: a pointer, sizes and steps each."""
        found: list[str] = []
        for number in sorted(tables_in(self.spec)):
            axes = range(int(self.tables.split()[number][1:]))
            found += [f"t{number}", *(f"t{number}_{what}{axis}" for axis in axes for what in ("size", "step"))]
        return found

    def own(self, segment: int) -> list[str]:
        """Arguments of a segment that its tiles read."""
        found = ["k_n", "k_d", "v_n", "v_d"]
        found += ["row_k", "row_k_n"] if self.spec.rows_of(segment) else []
        found += ["group", "group_n", "LAST"] if self.spec.group_rows else []
        return found + (["at_k", "at_k_n"] if self.spec.segments[segment][2] else [])

    def of_keys(self, segment: int) -> list[str]:
        """Arguments of a segment in the whole kernel."""
        found = [f"{port}{segment}{step}" for port in "KV" for step in ("", "_b", "_h", "_n", "_d")] + [f"M{segment}"]
        found += [] if self.packed or self.spec.kv_heads else [f"G{segment}"]
        for index in ("row_k", "at_k"):
            if index in self.own(segment):
                found += [f"{index}{segment}{step}" for step in ("", "_b", "_h", "_n")]
        found += ["group", "group_b", "group_n", "GROUPS", "TABLED", "LAST"] if self.spec.group_rows else []
        return found

    @property
    def keys(self) -> list[str]:
        found = [a for n in range(len(self.spec.segments)) for a in self.of_keys(n)]
        found += ["at_q", "at_q_b", "at_q_h", "at_q_n"] if self.spec.q_positions else []
        found += ["kv_heads"] if self.spec.kv_heads else []
        return found + self.lists

    @property
    def lists(self) -> list[str]:
        """Arguments of the tiles that are listed for each block."""
        return ["LIST", "COUNT", "list_b", "list_h", "LISTED", "TILES", "PARTS"] if self.spec.tiles else []

    @property
    def values(self) -> bool:
        return "o" in self.spec.outputs

    @property
    def name(self) -> str:
        return "share" if self.shared else "forward" if self.values else "rows_alone"

    @property
    def state(self) -> str:
        return ", ".join([*(name for name, _ in self.folding.state), *(["o"] if self.values else [])])

    # --- text ---------------------------------------------------------------------------------------------------------

    def predicate(self, segment: int = 0) -> Expr:
        keep = self.spec.segments[segment][0]
        return parse(keep) if keep else TRUE

    def kept(self, segment: int, names: dict[str, str]) -> str:
        """The predicate, beside what else a tile has to know of a key."""
        predicate = self.predicate(segment)
        return "" if predicate.text == TRUE.text else f" & {triton_text(predicate, 'b', names, tables=self.kinds)}"

    def _tile(self, segment: int) -> str:
        names = self.folding.names | {"j": "j[None, :]"}
        flags = {
            "NARROW": bool(self.spec.tiles) and segment == 0,
            "GATHERED": bool(self.spec.rows_of(segment)),
            "GROUPED": bool(self.spec.group_rows),
            "MOVED": bool(self.spec.segments[segment][2]),
            "HIDDEN": self.folding.hidden,
            "LAZY": bool(self.folding.lazy),
            "VALUES": self.values,
        }
        said = {
            "segment": str(segment),
            "state": self.state,
            "given": listed(self.folding.leaves),
            "own": listed(self.own(segment)),
            "tables": listed(self.looked_up),
            "keys": self._read("k", 2 * segment, "D"),
            "values": self._read("v", 2 * segment + 1, "E"),
            "score": self.folding.score(parse(self.spec.segments[segment][1]), names),
            "kept": self.kept(segment, names),
            "weigh": self.folding.tile(),
            "weights": self.folding.weights,
            "correction": self.folding.correction("[:, None]"),
            "lazy": self.folding.lazy,
            "moved": self.folding.moved,
        }
        return filled("attend_tile", flags, said)

    def _read(self, port: str, place: int, size: str) -> str:
        """The rows of a tile: numbers, or what their bytes stand for."""
        rows = row_spec(self.spec.stored[place]) if self.spec.stored else None
        if rows is None:
            here, masked = ("held", "True") if self.spec.group_rows else ("here", "MASKED")
            return f"rows({port}, {port}_rows, {here}, {port}_d, {size}, {size}P, {masked})"
        lies = f"{rows.bits}, {rows.codes}, {rows.groups}, {1 if self.singly else aligned(rows)}"
        return f"stored({port}, {port}_rows, here, {size}, {size}P, {lies}, MASKED).to(q.dtype)"

    def _forward(self) -> str:
        said = {
            "name": self.name,
            "results": listed([*self.gathered, "R"] if self.shared else self.results),
            "keys": listed(self.keys),
            "group": self.group,
            "tables": listed(self.looked_up),
            "block": self.block,
            "begin": self.begin,
            "loops": list(self._loops()),
            "end": self._share() if self.shared else self.end,
        }
        return filled("attend_forward", {}, said)

    @property
    def results(self) -> list[str]:
        found = ["O"] if self.values else []
        found += ["LSE"] if "lse" in self.spec.outputs else []
        return found + (["KEPT"] if self.keeps and self.folding.kept else [])

    @property
    def gathered(self) -> list[str]:
        """What a share of the keys leaves behind for each row."""
        return [f"OF_{name}" for name in self.state.split(", ")]

    @property
    def begin(self) -> list[str]:
        """The state of a row that has met no key."""
        running = [f"{name} = tl.full((BM,), {start}, tl.float32)" for name, start in self.folding.state]
        running += ["o = tl.zeros((BM, EP), tl.float32)"] if self.values else []
        return [*self.folding.given, *running]

    @property
    def end(self) -> list[str]:
        """From what a row has gathered to its results."""
        folding = self.folding
        store = [f"tl.store(LSE + row, {folding.lse}, mask=inside)"] if "LSE" in self.results else []
        store += [f"tl.store(KEPT + row, {folding.kept}, mask=inside)"] if "KEPT" in self.results else []
        flags = {"VALUES": self.values, "DIVIDED": bool(folding.divisor)}
        said = {"settle": folding.settled, "divisor": folding.divisor, "store": store}
        return filled("attend_end", flags, said).splitlines()

    def _share(self) -> list[str]:
        store = [f"tl.store(OF_{name} + part, {name}, mask=inside)" for name, _ in self.folding.state]
        return filled("attend_share", {"VALUES": self.values}, {"store": store}).splitlines()

    @property
    def group(self) -> str:
        return "G, " if self.packed else ""

    @property
    def block(self) -> list[str]:
        """Which rows a program has."""
        flags = {
            "PACKED": self.packed,
            "MAPPED": bool(self.spec.kv_heads),
            "MOVED_QUERIES": bool(self.spec.q_positions),
        }
        return filled("attend_block", flags, {}).splitlines()

    def _loops(self) -> Iterator[str]:
        """Past all tiles of all segments, in the order that the normaliser wants."""
        order = range(len(self.spec.segments))
        for segment in reversed(order) if self.folding.backwards else order:
            given = [self.state, *self.folding.leaves, "q", "k", "v", "b", "h", "i", "N", f"M{segment}", "jt"]
            given += [*self.named(segment), *self.looked_up, *SIZES]
            calls = tuple(f"{self.state} = tile{segment}({', '.join(given)}, {masked})" for masked in (True, False))
            yield from self.pointers(segment)
            yield from self.walk(segment, calls)  # type: ignore[arg-type]

    def walk(self, segment: int, calls: tuple[str, str]) -> Iterator[str]:
        """A block of rows past the tiles of one segment."""
        if self.spec.tiles and segment == 0:
            yield from walked_list("jt", calls[0])
            return
        walk = Walk(str(segment), f"M{segment}", "BN", shared=self.shared).past(self._reached(segment))
        yield from walk.lines
        yield from walked(walk.loops, "jt", calls, backwards=self.folding.backwards)

    def pointers(self, segment: int) -> Iterator[str]:
        """Where the keys of this block's head lie."""
        if not (self.packed or self.spec.kv_heads):
            yield f"hk = h // G{segment}"
        sample = "b_ // GROUPS" if self.spec.group_rows else "b_"
        for port in (f"K{segment}", f"V{segment}"):
            yield f"{port[0].lower()} = {port} + {sample} * {port}_b + hk.to(tl.int64) * {port}_h"
        if self.spec.group_rows:
            yield "of_group = group + b % TABLED * group_b"
        for index in ("row_k", "at_k"):
            if index in self.own(segment):
                name, head = f"{index}{segment}", "hk" if self.packed else "h"
                yield f"{index} = {name} + b * {name}_b + {head} * {name}_h"

    def named(self, segment: int) -> list[str]:
        """A tile's own arguments as the whole kernel calls them."""
        names = {"row_k": "row_k", "at_k": "at_k", "row_k_n": f"row_k{segment}_n", "at_k_n": f"at_k{segment}_n"}
        names |= {"group": "of_group", "group_n": "group_n", "LAST": "LAST"}
        return [names.get(a, f"{a[0].upper()}{segment}{a[1:]}") for a in self.own(segment)]

    def _reached(self, segment: int) -> tuple[Reached, ...]:
        moved = self.spec.rows_of(segment) or self.spec.segments[segment][2] or self.spec.q_positions
        return EVERYWHERE if moved else spans(self.predicate(segment), "j")


@lru_cache(maxsize=1024)
def joining(of: Attend) -> str:
    """The module that joins the shares of a spec's rows: the steps of a tile, between what two ranges of keys gave."""
    folding, values = of.folding, of.values
    load = [f"{name}_part = tl.load(OF_{name} + part, mask=inside, other={start})" for name, start in folding.state]
    said = {
        "results": listed(of.results),
        "gathered": listed(of.gathered),
        "keys": "at_q, at_q_b, at_q_h, at_q_n, " if of.spec.q_positions else "",
        "tables": listed(of.looked_up),
        "begin": of.begin,
        "load": load,
        "joined": folding.joined,
        "correction": folding.correction("[:, None]"),
        "correction_of_part": folding.correction("[:, None]", of="_part"),
        "moved": folding.moved,
        "end": of.end,
    }
    flags = {"VALUES": values, "MOVED_QUERIES": bool(of.spec.q_positions)}
    return text_of("functions") + filled("attend_join", flags, said)


def aligned(rows: RowSpec) -> int:
    """Of what every row of bytes begins at a multiple, where the first one and the steps between them are."""
    return 4 if rows.bytes % 4 == 0 else 2


def listed(words: list[str]) -> str:
    return "".join(f"{word}, " for word in words)


@lru_cache(maxsize=1024)
def tables_in(spec: AttendSpec) -> dict[int, int]:
    """The tables that expressions look up, and with how many axes."""
    texts = [part for segment in spec.segments for part in segment[:2]] + [spec.weight, spec.sink, spec.after]
    found = [e for text in texts if text for e in parse(text).walk() if e.op == "lookup"]
    return {int(e.args[0][1:]): len(e.args) - 1 for e in found}


@lru_cache(maxsize=1024)
def why_not(text: str) -> str | None:
    """Why the skeletons cannot say a spec, whatever the tensors; None where they can."""
    spec = AttendSpec.of(text)
    if spec.empty or relative.why_not(spec):
        return relative.why_not(spec) or "a score for empty rows"
    if any(output not in ("o", "lse") for output in spec.outputs):
        return f"outputs {', '.join(spec.outputs)}"
    if spec.after and not _nothing(parse(spec.after).replace({"w": as_expr(0.0)})):
        return "keys without a weight that get one afterwards"
    return refusal(lambda: of_any_tables(text).source)


def _nothing(e: Expr) -> bool:
    """Whether an expression is 0 whatever it names."""
    match e.op:
        case "const":
            return bool(e.args[0] == 0)
        case "mul":
            return any(map(_nothing, e.args))
        case "truediv" | "relu" | "tanh" | "sin" | "abs" | "sqrt":
            return _nothing(e.args[0])
        case "add" | "minimum" | "maximum":
            return all(map(_nothing, e.args))
        case "where":
            return all(map(_nothing, e.args[1:]))
    return False


def shown(text: str) -> str:
    """The source for a reader, as if all tables held floats; "" where the skeletons cannot say the spec."""
    return "" if why_not(text) else of_any_tables(text).source.removeprefix(text_of("functions")).lstrip()


def of_any_tables(text: str) -> Attend:
    """A spec's kernel as if all tables that it looks up held floats."""
    text = relative.looked_up(text)
    axes = tables_in(AttendSpec.of(text))
    return Attend(text, " ".join(f"f{axes.get(n, 1)}" for n in range(max(axes, default=-1) + 1)))


def refusal(made: Callable[[], object]) -> str | None:
    """Why something cannot be made."""
    try:
        made()
    except Refused as refused:
        return str(refused)
    return None
