"""Mechanisms as layers to build a model from: `Attention` with its projections, `module` for what is no attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .mechanism import Aux, Mechanism, mechanism
from .place import GridLike, Place, as_grid, as_mechanism, layer_site, run, stand, stand_alone, started
from .refusal import Refused, nearest
from .rotary import Rotated, rotated
from .site import Grid, Site


class Own(nn.Module):
    """A mechanism's tensors: learned ones as parameters, state as buffers, and the losses of the last forward."""

    def __init__(self, chosen: Mechanism, site: Site) -> None:
        super().__init__()
        like = torch.empty(0)
        for own_name, tensor in started(chosen.params(site), like).items():
            self.register_parameter(own_name, nn.Parameter(tensor))
        for own_name, tensor in started(chosen.buffers(site), like).items():
            self.register_buffer(own_name, tensor)
        self.losses: dict[str, Tensor] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]

    def take(self, aux: Aux) -> None:
        """Keep the losses of this forward; in train() also the new values of buffers."""
        # an exported program gives its outputs alone: a traced tensor must not stay behind in the module
        self.losses = {} if torch.compiler.is_exporting() else dict(aux.losses)
        if self.training:
            for own_name, value in aux.buffers.items():
                self.get_buffer(own_name).copy_(value.detach())


class Attention(nn.Module):
    """A trainable attention layer x (B, N, C) -> (B, N, C) around any core, gate or region mechanism.

    Projections q_proj, k_proj, v_proj, o_proj; the mechanism's own tensors under `.reattend`. A gate stands on softmax
    attention, a region stands alone, without projections.

    kv_heads  key and value heads, each shared by heads / kv_heads query heads.
    rope      rotate queries and keys by their positions; a number is the base of the wavelengths (True: 10000).
    dropout   of the weights, in train(); refused where the mechanism has no weights that it could act on.

    >>> layer = Attention("window", 32, heads=4, causal=True, window=8)
    >>> layer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        slug: str | Mechanism,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        grid: GridLike = None,
        bias: bool = True,
        rope: bool | float = False,
        dropout: float = 0.0,
        **knobs: Any,
    ) -> None:
        super().__init__()
        self.mechanism, self.grid = as_mechanism(slug, **knobs), as_grid(grid)
        self.heads, self.kv_heads, self.causal = heads, kv_heads or heads, causal
        self.rope, self.dropout = (10000.0 if rope is True else float(rope)), dropout
        self._check(dim)
        site = layer_site(dim, heads, self.kv_heads, causal=causal, grid=self.grid)
        if dropout:
            site = replace(site, features=site.features | {"dropout"})
        reason = self.mechanism.refuses(site)
        if reason:
            raise Refused(reason, where="Attention")
        if self.mechanism.part != "region":
            of_keys = self.kv_heads * (dim // heads)
            self.q_proj = nn.Linear(dim, dim, bias)
            self.k_proj = nn.Linear(dim, of_keys, bias)
            self.v_proj = nn.Linear(dim, of_keys, bias)
            self.o_proj = nn.Linear(dim, dim, bias)
        self.reattend = Own(self.mechanism, site)

    def _check(self, dim: int) -> None:
        heads, chosen = self.heads, self.mechanism
        if dim % heads or heads % self.kv_heads:
            fits = "dim a multiple of heads, heads a multiple of kv_heads"
            raise Refused(f"dim={dim}, heads={heads}, kv_heads={self.kv_heads}", where="Attention", fits=fits)
        if chosen.part not in ("core", "gate", "region"):
            fits = f"reattend.module({chosen.slug!r})"
            raise Refused(f"{chosen.slug} is of part {chosen.part}", where="Attention", fits=fits)
        if self.rope and (chosen.part == "region" or dim // heads % 2):
            found = f"rope with {chosen.slug}, dim={dim}, heads={heads}"
            raise Refused(found, where="Attention", fits="queries and keys of an even size per head")

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x_kv: where keys come from, if not from x; key_padding (B, M): true where a key is real; positions: for rope.

        positions (N,) or (B, N) count from 0 where they are not given; with x_kv there is nothing to rotate by.
        """
        if self.mechanism.part == "region":
            return self._mix(x, x, key_padding)
        source = x if x_kv is None else x_kv
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        turned = rotated(q, k, positions, self.rope) if self.rope and x_kv is None else None
        o = self._mix(x, source, key_padding, q, k, v, turned=turned)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    @torch.compiler.disable  # its place is worked out in Python: one graph break, and what is around it is compiled
    def _mix(
        self, x: Tensor, source: Tensor, key_padding: Tensor | None, *qkv: Tensor, turned: Rotated | None = None
    ) -> Tensor:
        """The mechanism where this layer stands; its losses and buffers are taken."""
        if not qkv:
            place = stand_alone(x, self.heads, causal=self.causal, grid=self.grid, key_padding=key_padding)
        else:
            q, k, v = qkv
            ports = {"x": x, "x_kv": source}
            if turned is not None:
                ports |= {"q_nope": q, "k_nope": k, "cos": turned.cos, "sin": turned.sin}
                q, k = turned.q, turned.k
            p = self.dropout if self.training else 0.0
            place = stand(q, k, v, ports=ports, causal=self.causal, grid=self.grid, mask=key_padding, dropout=p)
        if self.mechanism.part == "gate":
            place = place.with_port("o", run(mechanism("softmax"), place)[0])
        answer, aux = run(self.mechanism, _in_train(self, place), self.reattend.tensors)
        self.reattend.take(aux)
        return answer

    def losses(self) -> dict[str, Tensor]:
        """The auxiliary losses of the last forward, by name."""
        return dict(self.reattend.losses)

    def extra_repr(self) -> str:
        return f"{self.mechanism!r}, heads={self.heads}, causal={self.causal}"

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (-1, self.q_proj.out_features // self.heads)).transpose(1, 2)  # (B, H, N, D)


class Module(nn.Module):
    """A region or inserted mechanism on x (B, N, C), or on a feature map (B, C, h, w), which is its own grid.

    Further ports that the mechanism asks for are given by name.
    """

    def __init__(self, chosen: Mechanism, *, dim: int, heads: int, causal: bool, grid: Grid | None) -> None:
        super().__init__()
        self.mechanism, self.heads, self.causal, self.grid = chosen, heads, causal, grid
        site = layer_site(dim, heads, heads, causal=causal, grid=grid)
        self.reattend = Own(chosen, site)

    def forward(
        self, x: Tensor, grid: GridLike = None, key_padding: Tensor | None = None, **ports: Tensor | None
    ) -> Tensor:
        image = x.ndim == 4
        chosen_grid = Grid(*x.shape[2:]) if image else as_grid(grid) or self.grid
        tokens = x.flatten(2).mT if image else x
        place = stand_alone(tokens, self.heads, causal=self.causal, grid=chosen_grid, key_padding=key_padding)
        asked = sum(self.mechanism.wanted_ports(), ())
        for port, tensor in ports.items():
            if port not in asked:
                raise Refused(f"port {port!r}", where=self.mechanism.slug, fits=nearest(port, asked, kind="its ports"))
            place = place if tensor is None else place.with_port(port, tensor)
        y, aux = run(self.mechanism, _in_train(self, place), self.reattend.tensors)
        self.reattend.take(aux)
        return y.mT.unflatten(2, x.shape[2:]) if image else y

    def losses(self) -> dict[str, Tensor]:
        """The auxiliary losses of the last forward, by name."""
        return dict(self.reattend.losses)

    def extra_repr(self) -> str:
        return repr(self.mechanism)


def module(
    slug: str | Mechanism, *, dim: int = 0, heads: int = 1, causal: bool = False, grid: GridLike = None, **knobs: Any
) -> Module:
    """A region or inserted mechanism as a module; `dim` is its width C where it has learned tensors that depend on it.

    `heads` is also the knob of that name, where the mechanism has one.

    >>> module("poolformer", pool_size=3)(torch.ones(1, 8, 4, 4)).abs().max()
    tensor(0.)
    """
    if isinstance(slug, str) and "heads" in mechanism(slug).knobs():
        knobs["heads"] = heads
    chosen = as_mechanism(slug, **knobs)
    if chosen.part not in ("region", "insert"):
        fits = f"reattend.attention(q, k, v, {chosen.slug!r}) or reattend.Attention({chosen.slug!r}, dim, heads)"
        raise Refused(f"{chosen.slug} is of part {chosen.part}", where="module", fits=fits)
    shape: dict[str, Any] = {"heads": heads, "causal": causal, "grid": as_grid(grid)}
    if dim < 1 and _learned(chosen, 64 * heads, **shape) != _learned(chosen, 128 * heads, **shape):
        fits = f"module({chosen.slug!r}, dim=C): its learned tensors depend on it"
        raise Refused(f"{chosen.slug} without a width", where="module", fits=fits)
    return Module(chosen, dim=dim, **shape)


def _in_train(layer: nn.Module, place: Place) -> Place:
    """The place with the port `train`, while its layer trains."""
    return place.with_port("train", next(iter(place.ports.values())).new_ones(())) if layer.training else place


def _learned(chosen: Mechanism, dim: int, *, heads: int, causal: bool, grid: Grid | None) -> list[tuple[int, ...]]:
    """The shapes of a mechanism's learned tensors at a width."""
    params = chosen.params(layer_site(dim, heads, heads, causal=causal, grid=grid))
    return [tuple(param.shape) for param in params.values()]
