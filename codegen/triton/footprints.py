"""What an attend's kernels take of a GPU that need not be there: registers, shared memory, matrix instructions."""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.primitives.operator import Footprint, Groups
from . import ahead, launch
from .launching import recorded
from .module import folder
from .remembered import remembered


def footprints(groups: Groups, text: str, targets: Sequence[str] = ()) -> tuple[Footprint, ...]:
    """Compiled for these targets; for the others what an earlier build found."""
    wanted = {ahead.device(name).name for name in targets}
    if (not wanted and not folder().exists()) or launch.refuses(groups, text):
        return ()
    return tuple(
        Footprint(made.kernel, made.target, made.registers, made.spilled, made.shared, ahead.TARGETS[target].shared,
                  made.matrix or made.narrow, made.warps)
        for target in ahead.TARGETS
        for made in _known(groups, text, target, compile=target in wanted)
    )  # fmt: skip


def _known(groups: Groups, text: str, target: str, *, compile: bool) -> list[ahead.Compiled]:
    with recorded(target) as launches:
        launch.run(groups, text)
    found = [remembered(target, one) for one in launches]
    if compile and None in found:
        return ahead.compiled(target, lambda: launch.run(groups, text))
    return [ahead.Compiled(**facts) for facts in found if facts is not None]
