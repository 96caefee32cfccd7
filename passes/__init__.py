"""What changes a graph: one file per published mechanism or rewrite, in families."""

from .heads import moh as moh
from .kv import tidal as tidal
from .linear import aaren as aaren
from .linear import agent as agent
from .linear import agent_sd as agent_sd
from .linear import based as based
from .linear import flow as flow
from .linear import inline as inline
from .linear import l2vit as l2vit
from .linear import lightning as lightning
from .linear import linear as linear
from .linear import rat as rat
from .linear import slab as slab
from .mixers import poolformer as poolformer
from .score import retnet_gmm as retnet_gmm
from .score import sigmoid as sigmoid
from .score import softmax as softmax
from .sparse import window as window
from .tokens import tome_like as tome_like
