"""Small pictures with names: shapes at places, counts, orders and textures, drawn by formula from a seed and an index.

Which shape, where, how many and in what order decide the name; colour, size, tilt, clutter, light and noise do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels a side

Field = np.ndarray  # (SIZE, SIZE) float32: how far inside something a pixel lies, in pixels
Generator = np.random.Generator

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


@dataclass(frozen=True)
class Spot:
    """A place for a shape: its centre and its radius, in pixels."""

    x: float
    y: float
    radius: float


def picture(seed: int, index: int) -> tuple[np.ndarray, int]:
    """Picture `index` of the endless row that `seed` names, as (3, SIZE, SIZE) float32 around 0, and its class."""
    rng = np.random.default_rng((seed, index))
    label = int(rng.integers(len(CLASSES)))
    fields = _SCENES[CLASSES[label]](rng)
    return _painted(rng, fields), label


def pictures(seed: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures in a row, (count, 3, SIZE, SIZE), and their classes (count,)."""
    images = np.empty((count, 3, SIZE, SIZE), np.float32)
    labels = np.empty(count, np.int64)
    for place in range(count):
        images[place], labels[place] = picture(seed, first + place)
    return images, labels


# shapes: distance inside the edge, after a turn by a small angle


def _disc(spot: Spot, turn: float) -> Field:
    return spot.radius - np.hypot(_X - spot.x, _Y - spot.y)


def _ring(spot: Spot, turn: float) -> Field:
    return spot.radius * 0.3 - np.abs(spot.radius * 0.8 - np.hypot(_X - spot.x, _Y - spot.y))


def _square(spot: Spot, turn: float) -> Field:
    x, y = _turned(spot, turn)
    return spot.radius * 0.85 - np.maximum(np.abs(x), np.abs(y))


def _cross(spot: Spot, turn: float) -> Field:
    x, y = (np.abs(part) for part in _turned(spot, turn))
    arm = spot.radius * 0.32
    return np.maximum(np.minimum(arm - x, spot.radius - y), np.minimum(arm - y, spot.radius - x))


def _triangle(spot: Spot, turn: float) -> Field:
    x, y = _turned(spot, turn)
    return np.minimum(spot.radius * 0.6 - y, (spot.radius + y) * 0.5 - np.abs(x) * 0.87)


def _turned(spot: Spot, turn: float) -> tuple[Field, Field]:
    x, y = _X - spot.x, _Y - spot.y
    return x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)


Form = Callable[[Spot, float], Field]


def _tilt(rng: Generator) -> float:
    return float(rng.uniform(-0.3, 0.3))


def _place(rng: Generator, margin: float) -> tuple[float, float]:
    x, y = rng.uniform(margin, SIZE - margin, 2)
    return x, y


# scenes: the fields of one picture, each to be painted in a colour of its own


Scene = Callable[[Generator], list[Field]]


def _in_quarter(right: bool, low: bool) -> Scene:
    """One disc, wholly in one quarter."""

    def scene(rng: Generator) -> list[Field]:
        x, y, radius = *rng.uniform(10, 22, 2), rng.uniform(5.5, 10)
        return [_disc(Spot(SIZE - x if right else x, SIZE - y if low else y, radius), 0.0)]

    return scene


def _in_order(first: Form, second: Form, across: bool) -> Scene:
    """One shape left of another, or above it."""

    def scene(rng: Generator) -> list[Field]:
        along = np.sort(rng.uniform(11, SIZE - 11, 2))
        while along[1] - along[0] < 20:
            along = np.sort(rng.uniform(11, SIZE - 11, 2))
        aside = rng.uniform(14, SIZE - 14) + rng.uniform(-5, 5, 2)
        places = list(zip(along, aside)) if across else list(zip(aside, along))
        return [form(Spot(*place, rng.uniform(6.5, 9)), _tilt(rng)) for form, place in zip((first, second), places)]

    return scene


def _many(count: int) -> Scene:
    """So many crosses, none touching another."""

    def scene(rng: Generator) -> list[Field]:
        spots: list[Spot] = []
        while len(spots) < count:
            spot = Spot(*_place(rng, 9), rng.uniform(5.5, 8))
            if all(np.hypot(spot.x - o.x, spot.y - o.y) > spot.radius + o.radius + 3 for o in spots):
                spots.append(spot)
        return [np.max([_cross(spot, _tilt(rng)) for spot in spots], axis=0)]

    return scene


def _stripes(angle: float) -> Scene:
    def scene(rng: Generator) -> list[Field]:
        turn, period, phase = angle + rng.uniform(-0.2, 0.2), rng.uniform(6, 14), rng.uniform(0, 6.3)
        return [_wave(_X * np.sin(turn) + _Y * np.cos(turn), period, phase)]

    return scene


def _grid(combine: Callable[[Field, Field], Field]) -> Scene:
    """Two waves across each other."""

    def scene(rng: Generator) -> list[Field]:
        turn, period = _tilt(rng), rng.uniform(9, 17)
        x, y = _turned(Spot(0, 0, 0), turn)
        return [combine(_wave(x, period, rng.uniform(0, 6.3)), _wave(y, period, rng.uniform(0, 6.3)))]

    return scene


def _target(rng: Generator) -> list[Field]:
    """Rings in rings."""
    x, y = rng.uniform(20, SIZE - 20, 2)
    return [_wave(np.hypot(_X - x, _Y - y), rng.uniform(7, 13), rng.uniform(0, 6.3))]


def _wave(along: Field, period: float, phase: float) -> Field:
    return np.sin(along * (2 * np.pi / period) + phase) * (period / 4)


def _alone(form: Form) -> Scene:
    def scene(rng: Generator) -> list[Field]:
        radius = rng.uniform(7, 13)
        return [form(Spot(*_place(rng, radius + 2), radius), _tilt(rng))]

    return scene


def _ring_and_disc(inside: bool) -> Scene:
    """A small disc in a ring, or beside it."""

    def scene(rng: Generator) -> list[Field]:
        radius = rng.uniform(11, 14)
        ring = Spot(*_place(rng, radius + 2), radius)
        x, y = ring.x + rng.uniform(-2, 2), ring.y + rng.uniform(-2, 2)
        while not inside and np.hypot(x - ring.x, y - ring.y) < radius + 8:
            x, y = rng.uniform(7, SIZE - 7, 2)
        return [_ring(ring, 0.0), _disc(Spot(x, y, rng.uniform(4, 5)), 0.0)]

    return scene


_SCENES: dict[str, Scene] = {
    "disc upper left": _in_quarter(False, False),
    "disc upper right": _in_quarter(True, False),
    "disc lower left": _in_quarter(False, True),
    "disc lower right": _in_quarter(True, True),
    "disc left of square": _in_order(_disc, _square, True),
    "square left of disc": _in_order(_square, _disc, True),
    "disc above triangle": _in_order(_disc, _triangle, False),
    "triangle above disc": _in_order(_triangle, _disc, False),
    "two crosses": _many(2),
    "three crosses": _many(3),
    "four crosses": _many(4),
    "five crosses": _many(5),
    "level stripes": _stripes(0.0),
    "upright stripes": _stripes(np.pi / 2),
    "rising stripes": _stripes(np.pi / 4),
    "falling stripes": _stripes(-np.pi / 4),
    "checker": _grid(lambda x, y: np.sign(x * y) * np.minimum(np.abs(x), np.abs(y))),
    "dots": _grid(np.minimum),
    "target": _target,
    "square": _alone(_square),
    "triangle": _alone(_triangle),
    "ring": _alone(_ring),
    "disc in ring": _ring_and_disc(True),
    "disc beside ring": _ring_and_disc(False),
}
CLASSES: tuple[str, ...] = tuple(_SCENES)


def _painted(rng: Generator, fields: list[Field]) -> np.ndarray:
    """The fields in colours that stand out, over a ground with specks, under light from one side, with noise."""
    ground = rng.uniform(0, 1, 3)
    image = np.broadcast_to(ground[:, None, None], (3, SIZE, SIZE)).astype(np.float32)
    for _ in range(int(rng.integers(0, 7))):
        speck = Spot(*_place(rng, 0), rng.uniform(1, 2.6))
        image = _over(image, _disc(speck, 0.0), ground + rng.uniform(-0.3, 0.3, 3))
    for field in fields:
        image = _over(image, field, _standing_out(rng, ground))
    way, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.25)
    light = (np.cos(way) * (_X / SIZE - 0.5) + np.sin(way) * (_Y / SIZE - 0.5)) * strength
    noise = rng.standard_normal((3, SIZE, SIZE), dtype=np.float32) * rng.uniform(0.01, 0.08)
    return (2 * (image + light + noise) - 1).astype(np.float32)


def _over(image: np.ndarray, field: Field, colour: np.ndarray) -> np.ndarray:
    cover = np.clip(field + 0.5, 0, 1)
    return image + cover * (colour[:, None, None].astype(np.float32) - image)


def _standing_out(rng: Generator, ground: np.ndarray) -> np.ndarray:
    colour = rng.uniform(0, 1, 3)
    while np.abs(colour - ground).max() < 0.45:
        colour = rng.uniform(0, 1, 3)
    return colour
