"""The symmetry groups of a model: which weights may change together so that it computes the same.

residual   x -> R x      what writes to the stream times R, what reads it times R^-1
values     v -> T v      within a key head's values; W_o's columns of its query heads times T^-1
keys       k -> T k      within a key head's keys; its queries times T^-T; with RoPE only per pair of channels
heads                    key heads with their query heads, in another order
ffn                      channels between two linears around an activation
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ..ports import Ports
from ..primitives.attend_spec import AttendSpec
from ..program import Program
from ..refusal import Refused
from ..site import Site
from ..symbol_text import parse
from .follow import Following, follow
from .pairs import partners
from .slots import Slot
from .spaces import Label, Norm

KINDS = ("residual", "values", "keys", "heads", "ffn")
Users = frozenset[tuple[str, str]]  # (operation, weight)
ACTIONS = ("permute", "scale", "rotate", "mix")  # mix: any matrix that can be inverted; average, low rank


@dataclass(frozen=True)
class Absorbed:
    """A norm on the residual stream: its scale goes into what reads its output before the stream is turned."""

    norm: Norm
    reads: tuple[Slot, ...]


@dataclass(frozen=True)
class Group:
    """`blocks` independent bases of `size` units of `width` channels. `writes` take T, `reads` its inverse transposed;
    `diagonals` (norm weights, layer scales) can be permuted only. `refuses`: an action, and why it would not be exact.
    """

    kind: str
    where: str
    size: int
    writes: tuple[Slot, ...]
    reads: tuple[Slot, ...]
    blocks: int = 1
    diagonals: tuple[Slot, ...] = ()
    norms: tuple[Absorbed, ...] = ()
    partners: tuple[int, ...] = ()  # of each channel under RoPE
    scales: tuple[Slot, ...] = ()  # what scales with T where that is not all of `writes`: the branch beside a gate
    refuses: tuple[tuple[str, str], ...] = ()

    @property
    def allows(self) -> tuple[str, ...]:
        closed = {action for action, _ in self.refuses}
        return tuple(action for action in ACTIONS if action not in closed)

    @property
    def keeps_mean(self) -> bool:
        """A LayerNorm takes the mean away: a rotation must leave the vector of ones where it is."""
        return any(one.norm.kind == "layer" for one in self.norms)

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.weight for s in (*self.writes, *self.reads, *self.diagonals)))

    def check(self, action: str) -> None:
        for closed, reason in self.refuses:
            if closed == action:
                raise Refused(
                    reason, where=f"{self.kind} of {self.where}", fits=f"here: {', '.join(self.allows) or 'nothing'}"
                )

    def __str__(self) -> str:
        shape = f"{self.blocks}x{self.size}" if self.blocks > 1 else str(self.size)
        lines = [f"{self.where}: {self.kind}[{shape}] {'+'.join(self.allows) or 'nothing'}"]
        for role in ("writes", "reads", "diagonals"):
            slots: tuple[Slot, ...] = getattr(self, role)
            lines += [f"  {role:<9} {slot}" for slot in slots]
        lines += [f"  no {action}: {reason}" for action, reason in self.refuses]
        return "\n".join(lines)


def find_groups(program: Program) -> tuple[Group, ...]:
    """Every group that a raised program shows, in order: per site keys, values, heads; then spaces between weights.

    Equal groups (a layer that is called twice) are given once.
    """
    found = follow(program.graph.graph, program.ports)
    users: dict[Group, Users] = {}
    at_sites = (pair for site in program.sites for pair in _of_site(found, site, program.ports[site.path]))
    for one, by in (*at_sites, *_between_weights(found)):
        users[one] = users.get(one, frozenset()) | by
    uses = _uses(program.graph)
    return tuple(_only_users(one, by, program.graph, uses) for one, by in users.items())


def group(groups: Iterable[Group], kind: str, where: str = "") -> Group:
    """The one group of a kind at a place."""
    known = [g for g in groups if g.kind == kind]
    for one in known:
        if where in ("", one.where):
            return one
    raise Refused(
        f"no {kind} group at {where!r}", fits=", ".join(g.where for g in known) or f"this graph shows no {kind}"
    )


# --- at a site --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """One of q, k, v, o at a site: its space, and the slots of the weights behind or in front of it."""

    space: int
    slots: tuple[Slot, ...]
    why: str = ""


def _of_site(found: Following, site: Site, ports: Ports) -> list[tuple[Group, Users]]:
    roped = "q_nope" in ports.nodes and "k_nope" in ports.nodes
    q, k = (read_heads(found, ports.nodes[f"{r}_nope" if roped else r], n, site.dim)
            for r, n in (("q", site.heads), ("k", site.kv_heads)))  # fmt: skip
    v = read_heads(found, ports.nodes["v"], site.kv_heads, site.v_dim)
    o = read_heads(found, ports.nodes["o"], site.heads, site.v_dim, reads=True)
    spec = AttendSpec.of(str(ports.attend.args[3]))
    plain = "" if _symmetric(spec) else "scores depend on the number of the head"
    path, groups = site.path.partition("#")[0], list[tuple[Group, Users]]()
    users = {part: found.spaces.users(found.spaces.members(part.space)) for part in (q, k, v, o) if part.slots}
    if (("rope" in site.features) is roped) and k.slots and q.slots:
        groups.append((_keys(site, ports, q, k, roped), users[q] | users[k]))
    if v.slots and o.slots:
        closed = _closed(ACTIONS, v.why or o.why)
        values = Group("values", path, site.v_dim, v.slots, o.slots, site.kv_heads, refuses=closed)
        groups.append((values, users[v] | users[o]))
    if all(part.slots for part in (q, k, v, o)):
        why = next((part.why for part in (q, k, v, o) if part.why), plain)
        closed = _closed(("permute",), why) + _closed(ACTIONS[1:], "the softmax keeps heads apart")
        order = Group("heads", path, site.kv_heads, (*k.slots, *v.slots), (*q.slots, *o.slots), refuses=closed)
        groups.append((order, frozenset().union(*users.values())))
    return groups


def _keys(site: Site, ports: Ports, q: Heads, k: Heads, roped: bool) -> Group:
    paired = partners(ports) if roped else ()
    why = q.why or k.why or ("its rotation by position has no pairs that are known" if roped and not paired else "")
    closed = _closed(ACTIONS, why)
    if not why and roped:
        turned = "only what turns or scales both channels of a pair commutes with RoPE"
        closed = _closed(("permute", "rotate", "mix"), turned)
    return Group(
        "keys", site.path.partition("#")[0], site.dim, k.slots, q.slots, site.kv_heads, partners=paired, refuses=closed
    )


def read_heads(found: Following, node: fx.Node, heads: int, dim: int, *, reads: bool = False) -> Heads:
    label = found.labels.get(node)
    if label is None:
        return Heads(-1, ())
    spaces = found.spaces
    whole = [d for d in label.digits if d[1] > 1] == [d for d in ((dim, heads), (1, dim)) if d[1] > 1]
    members = spaces.members(label.space)
    slots = spaces.reads(members) if reads else spaces.writes(members)
    others = spaces.writes(members) if reads else spaces.reads(members)
    why = next(iter(spaces.pins(members)), next(iter(spaces.kinks(members)), ""))
    why = f"its basis is fixed by {why}" if why else ""
    if not whole or spaces.sizes[label.space] != heads * dim:
        why = "its heads are not one run of channels each"
    elif others:
        why = f"{others[0]} {'writes to' if reads else 'reads'} it too"
    return Heads(label.space, slots, why)


def _symmetric(spec: AttendSpec) -> bool:
    """Whether no formula of an attention asks for the head, and no table is one per head."""
    texts = [t for t in (spec.score, spec.keep, spec.weight, spec.after, spec.sink, spec.empty) if t]
    special = (
        spec.more or spec.rows or spec.relative or spec.tiles or spec.kv_heads or spec.q_positions or spec.k_positions
    )
    return not special and not spec.sink and not any("h" in parse(text).names for text in texts)


def _closed(actions: Iterable[str], why: str) -> tuple[tuple[str, str], ...]:
    return tuple((action, why) for action in actions) if why else ()


# --- between weights --------------------------------------------------------------------------------------------------


def _between_weights(found: Following) -> list[tuple[Group, Users]]:
    """Spaces with writers and readers that no attention divides: the residual stream, channels inside an FFN."""
    spaces, seen, groups = found.spaces, set[int](), list[tuple[Group, Users]]()
    at_sites = {spaces.like(found.labels[n].space) for own in found.attends.values()
                for n in own.nodes.values() if n in found.labels and _headed(found.labels[n])}  # fmt: skip
    for space in range(len(spaces.sizes)):
        root = spaces.like(space)
        if root in seen or root in at_sites:
            continue
        seen.add(root)
        members = spaces.members(space, alike=True)
        writes, reads = spaces.writes(members), spaces.reads(members)
        if writes and reads and len({spaces.sizes[m] for m in members}) == 1:
            groups.append((_between(found, members, writes, reads), spaces.users(members)))
    return groups


def _headed(label: Label) -> bool:
    return len(label.digits) > 1


def _between(found: Following, members: tuple[int, ...], writes: tuple[Slot, ...], reads: tuple[Slot, ...]) -> Group:
    spaces = found.spaces
    norms = [n for n in spaces.norms if n.before in members]
    diagonals = tuple(s for s in spaces.diagonals(members) if s not in writes)
    pins, size = spaces.pins(members), spaces.sizes[members[0]]
    writes = tuple(s for s in writes if s not in spaces.diagonals(members))
    if pins:
        closed = _closed(ACTIONS, f"its basis is fixed: {pins[0]}")
    elif norms:
        why = _why_not_turned(found, members, norms)
        closed = (
            _closed(("scale",), "a norm would undo it")
            + _closed(("rotate",), why)
            + _closed(("mix",), why or "a norm knows the length")
        )
    else:
        scaled = _scalable(found, members)
        kinks = spaces.kinks(members)
        closed = _closed(("rotate", "mix"), kinks[0] if kinks else "")
        closed += _closed(("scale",), "" if scaled or not kinks else kinks[0])
    kind = "residual" if norms else "ffn"
    absorbed = tuple(Absorbed(n, spaces.reads(spaces.members(n.after))) for n in norms)
    scales = _scalable(found, members) if kind == "ffn" and spaces.kinks(members) else ()
    return Group(
        kind, _where(writes, reads), size, writes, reads, 1, diagonals, absorbed, scales=scales, refuses=closed
    )


def _where(writes: tuple[Slot, ...], reads: tuple[Slot, ...]) -> str:
    """The module that all of a group's weights stand in."""
    names = [s.weight.split(".")[:-1] for s in (*writes, *reads)]
    shared = []
    for parts in zip(*names):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or "model"


def _why_not_turned(found: Following, members: tuple[int, ...], norms: list[Norm]) -> str:
    """A rotation passes through the stream and its norms alone."""
    spaces = found.spaces
    streams = {spaces.same(n.before) for n in norms}
    after = {spaces.same(n.after) for n in norms}
    if len(streams) > 1 or streams & after:
        return "a norm's output is part of the stream (norms behind the addition)"
    kinks = spaces.kinks(members)
    if kinks:
        return kinks[0]
    if any(spaces.same(m) not in streams | after for m in members):
        return "channels of it are used in another way"
    return ""


def _scalable(found: Following, members: tuple[int, ...]) -> tuple[Slot, ...]:
    """Writers whose scale passes to the readers: up beside a gate, or all of them where there is no kink."""
    spaces = found.spaces
    for left, right, result in spaces.products:
        if result in members and spaces.reads(spaces.members(result)):
            for side in (right, left):
                own = spaces.members(side)
                if spaces.writes(own) and not spaces.reads(own) and len(spaces.kinks(own)) == 1:
                    return spaces.writes(own)
    return ()


# --- weights that others use too --------------------------------------------------------------------------------------


def _only_users(one: Group, by: Users, graph: fx.GraphModule, uses: Mapping[int, int]) -> Group:
    """Closed where a weight of the group is also used in a way that the group does not know."""
    mine = Counter(id(_tensor(graph, name)) for _, name in by)
    for name in one.weights:
        held = id(_tensor(graph, name))
        if uses[held] > mine[held]:
            why = f"{name} is used {uses[held]} times, and only {mine[held]} of them are in this group"
            return replace(one, refuses=_closed(ACTIONS, why))
    return one


def _uses(graph: fx.GraphModule) -> Counter[int]:
    """How many operations use each tensor, under any of its names."""
    counted: Counter[int] = Counter()
    for node in graph.graph.find_nodes(op="get_attr"):
        counted[id(_tensor(graph, str(node.target)))] += len(node.users)
    return counted


def _tensor(graph: fx.GraphModule, name: str) -> object:
    found: object = graph
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
