"""What was saved under another torch and another Python loads here and answers as it did there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from saved_llama import ids

import reattend

FOLDERS = sorted((Path(__file__).parent / "saved").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_answers_as_where_it_was_saved(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    fast = reattend.load(folder)
    with torch.no_grad():
        logits = fast(input_ids=ids()).logits
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-6, rtol=0)
    assert "LlamaForCausalLM" in {kind.__name__ for kind in type(fast).__mro__}
