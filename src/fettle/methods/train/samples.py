"""Whether relations and distances have enough samples to compare: told before the first step, with the numbers.

    samples at once = windows at once · samples a window
    windows at once = batch_windows / (processes · accumulate), or what is left for the last look's batch
    samples a window = length / 16 of a decoder (outputs.py), 1 of an encoder: its sentence

With fewer than `signals.LEAST_SAMPLES` the loss is nothing, or no number, whatever the models say.
"""

from __future__ import annotations

from collections.abc import Collection

from fettle.methods.train.options import LoopFields
from fettle.methods.train.processes import process_count
from fettle.methods.train.signals import LEAST_SAMPLES, require_samples


def check_samples(asked: Collection[str], loop: LoopFields, *, held_back: int, each: int) -> None:
    """Checks the parts of a step, and the batches of a look at what is held back.

    Args:
        asked: the signals that count.
        loop: how a step is divided.
        held_back: how many windows no step sees.
        each: samples a window.

    Raises:
        RecipeError: too few; says the numbers.
    """
    processes = process_count()
    part = loop.batch_windows // (processes * loop.accumulate)
    left = held_back % part if part and processes == 1 else 0  # several processes fill their last batches up
    for name in LEAST_SAMPLES:
        if name not in asked or not part:  # that a step has parts, the loop tells
            continue
        step = f"batch_windows={loop.batch_windows} over processes={processes} and accumulate={loop.accumulate} are "
        step += f"{part} windows with {each} samples each (length={loop.length})"
        require_samples(name, part * each, step)
        if left:
            look = f"held_back={held_back} leaves {left} windows for the last of batches of {part}, with {each} "
            require_samples(name, left * each, f"{look}samples each (length={loop.length})")
