"""What changes a graph: one file per published mechanism or rewrite, in families."""

from .linear import linear as linear
from .mixers import poolformer as poolformer
from .score import sigmoid as sigmoid
from .score import softmax as softmax
from .sparse import window as window
