"""Methods that choose what goes: masks, with the shapes left as they are. One import line registers a method.

Movement scores and regrowth, which watch weights while they train, are training's (`methods/train/masks.py`).
"""

from __future__ import annotations

from fettle.methods.prune.activity import ActivationSparsity as ActivationSparsity
from fettle.methods.prune.magnitude import Magnitude as Magnitude
from fettle.methods.prune.sparsegpt import SparseGpt as SparseGpt
from fettle.methods.prune.taylor import Taylor as Taylor
from fettle.methods.prune.wanda import Wanda as Wanda
