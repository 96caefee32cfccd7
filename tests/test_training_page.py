"""Everything shown on the page about training runs."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import reattend


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's question under an older name
def test_the_page_on_training_runs() -> None:
    page = Path(reattend.__file__).resolve().parent / "docs" / "training.md"
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 30 and found.failed == 0
