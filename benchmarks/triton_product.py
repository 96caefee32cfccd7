"""The whole product of the choices that the kernels' numerics are tested on, piece by piece, as long as there is time.

    python benchmarks/triton_product.py [--minutes 60] [--workers 1]

A piece that passed stays done while the generator and its tests are the same: the next run goes on with those that are
left. What is done is kept beside the generated sources ($REATTEND_CACHE).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reattend.codegen.triton.module import folder

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "test_triton_attend.py"
PIECES = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    until, kept = time.monotonic() + 60 * given.minutes, folder() / f"product_{digest()}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    failed = []
    left = [piece for piece in range(PIECES) if str(piece) not in done]
    with ThreadPoolExecutor(given.workers) as pool:
        for piece, seconds, said in pool.map(lambda piece: asked(piece, until), left):
            if said is None:
                continue
            if said:
                failed.append(said)
                print(said, flush=True)
            else:
                done[str(piece)] = seconds
                kept.write_text(json.dumps(done))
                print(f"piece {piece}: {seconds:.0f} s, {len(done)} of {PIECES} done", flush=True)
    spent = sum(done.values())
    print(f"{len(done)} of {PIECES} pieces pass, {len(failed)} fail; {spent / 60:.0f} minutes spent, "
          f"{spent / max(len(done), 1) * (PIECES - len(done)) / 60:.0f} to go")  # fmt: skip
    sys.exit(bool(failed))


def asked(piece: int, until: float) -> tuple[int, float, str | None]:
    """A piece, how long it took, and what went wrong; None: there was no time for it."""
    begun = time.monotonic()
    if begun >= until:
        return piece, 0.0, None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no",
               f"{TESTS}::test_all_combinations[{piece}]"]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return piece, time.monotonic() - begun, "" if ran.returncode == 0 else f"piece {piece}:\n{ran.stdout[-2000:]}"


def digest() -> str:
    """Of everything that the numbers depend on here."""
    files = sorted(p for p in (ROOT / "codegen" / "triton").iterdir() if p.suffix in (".py", ".triton"))
    text = b"".join(p.read_bytes() for p in (*files, TESTS))
    return hashlib.sha256(text).hexdigest()[:16]


if __name__ == "__main__":
    main()
