"""Methods that give a model another shape: fewer blocks, neurons, heads, channels, words, experts. One import line
registers a method.
"""

from __future__ import annotations

from fettle.methods.reshape.drop_layers import DropLayers as DropLayers
from fettle.methods.reshape.experts import FewerExperts as FewerExperts
from fettle.methods.reshape.narrow import Narrow as Narrow
from fettle.methods.reshape.resize import Resize as Resize
from fettle.methods.reshape.share_blocks import ShareBlocks as ShareBlocks
from fettle.methods.reshape.vocabulary import TrimVocabulary as TrimVocabulary
