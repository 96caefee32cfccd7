"""Processes that do the same work at the same moment: one pays for the imports and forks before it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FORKED = """
import os, sys
{ready}
born = []
while len(born) < {others} and 0 not in born:
    born.append(os.fork())
{work}
sys.stdout.flush()
os._exit(0 not in born and any([os.waitpid(child, 0)[1] for child in born]))
"""


def at_once(count: int, ready: str, work: str, *, cache: Path) -> list[str]:
    """The lines that so many processes print; `ready` is run once, `work` by each."""
    code = FORKED.format(ready=ready, work=work, others=count - 1)
    environment = {"REATTEND_CACHE": str(cache), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
