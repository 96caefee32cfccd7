"""A torchvision wheel built for CUDA on a CPU build of torch: its Python imports, once two operator schemas exist.

The wheel on the package index is linked against CUDA; beside torch's CPU build its compiled part does not load, and
`import torchvision` (hence timm, and the image side of transformers) fails: "operator torchvision::nms does not exist".
No image operator is needed to build a model, so the two missing schemas are declared and everything else works.
"""

from __future__ import annotations

import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # a Library takes its definitions away when it is collected


def declare_missing_vision_ops() -> bool:
    """Declare the operators that torchvision's failed extension would have; true if there was anything to do."""
    if _declared or not importlib.util.find_spec("torchvision") or torch.version.cuda is not None:
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)
    return True
