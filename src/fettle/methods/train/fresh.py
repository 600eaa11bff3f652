"""From scratch: a model's shape with weights that know nothing, as transformers would begin its training.

Every module gets what the family's own `_init_weights` gives it (matrices normal with `initializer_range`, biases 0,
norms 1), drawn in the order of the tree from the run's seed. Embedding and head that were one matrix stay one. Numbers
are drawn on the CPU, so that a seed means the same weights on every device.

Cost: one pass over the weights; the checkpoint's own are read before, and thrown away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from fettle.errors import RecipeError
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel, load
from fettle.models.storage import stored_schemes

Begin = Literal["pretrained", "random"]
BEGIN_HELP = "the student's first weights: the model's own, or random ones (from scratch), as transformers draws them"


def load_afresh(model: Path, seed: int, *, device: str, generic: bool) -> LoadedModel:
    """The model of `model` with weights that the seed gives.

    Raises:
        RecipeError: it is stored as codes or masks, which random weights would not have.
    """
    checkpoint = Checkpoint.open(model)
    if stored_schemes(checkpoint, read_anatomy(checkpoint, generic=generic)):
        raise RecipeError(
            f"{model} is stored as codes or masks, and begin: random would throw them away; give the original model, "
            "or leave begin out"
        )
    loaded = load(model, generic=generic)
    tree: Any = loaded.model
    for module in tree.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # set when the tree was built, without any weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tree.init_weights()
    tree.to(device)
    return loaded
