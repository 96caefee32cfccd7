"""What changes a graph: one file per published mechanism or rewrite, in families."""

from .heads import moh as moh
from .kv import tidal as tidal
from .linear import agent as agent
from .linear import agent_sd as agent_sd
from .linear import linear as linear
from .mixers import poolformer as poolformer
from .score import sigmoid as sigmoid
from .score import softmax as softmax
from .sparse import cca as cca
from .sparse import combiner as combiner
from .sparse import hyper as hyper
from .sparse import landmark as landmark
from .sparse import ls as ls
from .sparse import moa as moa
from .sparse import s2 as s2
from .sparse import seer as seer
from .sparse import window as window
from .tokens import tome_like as tome_like
