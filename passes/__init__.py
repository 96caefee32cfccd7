"""What changes a graph: one file per published mechanism or rewrite, in families."""

from .heads import moh as moh
from .kv import tidal as tidal
from .linear import agent as agent
from .linear import agent_sd as agent_sd
from .linear import linear as linear
from .mixers import poolformer as poolformer
from .score import sigmoid as sigmoid
from .score import softmax as softmax
from .sparse import biformer as biformer
from .sparse import davit as davit
from .sparse import halo as halo
from .sparse import hilo as hilo
from .sparse import msw_msa as msw_msa
from .sparse import neighborhood as neighborhood
from .sparse import window as window
from .tokens import tome_like as tome_like
