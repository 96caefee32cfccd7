"""In the environment of `make setup`: the operators that torchvision misses are declared before anything imports it.

Its wheel is linked against CUDA and torch is the CPU build there (models/vision_ops.py), so that `import transformers`
in a script of one's own would fail. Setup copies this file and that one beside the installed packages.
"""

from __future__ import annotations

import sys


class First:
    """Asked before all other finders; once torchvision is looked for, it has done its work."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            from vision_ops_declared import declare_missing_vision_ops

            declare_missing_vision_ops()


sys.meta_path.insert(0, First())
