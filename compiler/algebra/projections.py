"""The matrices behind a site's queries and keys, head by head, however the model stores them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..program import Program
from ..site import Site
from .follow import follow
from .groups import read_heads


def projections(program: Program, site: Site) -> Mapping[str, Tensor]:
    """{"q": (H, D, C), "k": (Hkv, D, C)} before any rotation; {} where they are not single matrices that read x."""
    ports = program.ports[site.path]
    if ports.nodes.get("x") is None or ports.nodes["x"] is not ports.nodes.get("x_kv"):
        return {}
    found, made = follow(program.graph.graph, program.ports), {}
    for role, heads in (("q", site.heads), ("k", site.kv_heads)):
        node = ports.nodes.get(f"{role}_nope", ports.nodes[role])
        read = read_heads(found, node, heads, site.dim)
        tensors = {slot: program.graph.get_parameter(slot.weight) for slot in read.slots}
        matrices = [slot.take(t.detach()) for slot, t in tensors.items() if t.ndim == 2]
        if len(matrices) != 1 or matrices[0].is_meta or read.why:
            return {}
        made[role] = matrices[0].unflatten(0, (heads, site.dim))
    return made
