"""Several processes of one run, as `torchrun` or `accelerate launch` start them: who writes, and who waits for whom.

Only the first process writes; what it writes the others read after they have waited. With one process all of this is
nothing.
"""

from __future__ import annotations

import os
from typing import Any


def process_group(device: str) -> Any:
    """Accelerate's state of the processes, begun where it has not been; gloo on CPUs."""
    from accelerate import PartialState  # type: ignore[import-untyped]

    return PartialState(cpu=device.startswith("cpu"))


def process_count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the only process, or the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def first_says(value: float) -> float:
    """The first process's word, where each has its own, such as of a clock; all processes must ask."""
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

    return float(broadcast_object_list([value])[0])


def wait_for_all() -> None:
    """Waits until every process is here; the group must have been begun."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
