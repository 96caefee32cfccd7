"""What changes a graph: one file per published mechanism or rewrite, in families."""

from .heads import kd_gqa as kd_gqa
from .heads import moh as moh
from .kv import duo as duo
from .kv import tidal as tidal
from .linear import agent as agent
from .linear import agent_sd as agent_sd
from .linear import linear as linear
from .mixers import poolformer as poolformer
from .score import complexformer as complexformer
from .score import gpsa as gpsa
from .score import lssar as lssar
from .score import mma as mma
from .score import music_rel as music_rel
from .score import qk_norm as qk_norm
from .score import sigmoid as sigmoid
from .score import softmax as softmax
from .score import ssa as ssa
from .score import stickbreaking as stickbreaking
from .score import stickbreaking_moa as stickbreaking_moa
from .score import urpe as urpe
from .sparse import window as window
from .tokens import tome_like as tome_like
