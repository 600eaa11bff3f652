"""`fettle plan`: what a run will write, take and need, before any work."""

from __future__ import annotations

from typing import Any

from fettle.cli.classifiers import show_plan
from fettle.cli.flags import with_flags
from fettle.cli.options import (
    AllocationChoice,
    Dense,
    Device,
    Generic,
    Json,
    MethodChoice,
    Model,
    RecipeChoice,
    Threads,
)
from fettle.cli.output import console, duration, emit_json, show, size, table
from fettle.cli.progress import progress
from fettle.cli.recipe_choice import checked_choice, chosen_recipe, recipe_flags, with_masks
from fettle.models.source import resolve


@with_flags(recipe_flags())
def run(
    model: Model,
    recipe: RecipeChoice = None,
    method: MethodChoice = None,
    dense: Dense = False,
    allocation: AllocationChoice = None,
    device: Device = "cpu",
    threads: Threads = None,
    generic: Generic = False,
    json: Json = False,
    **fields: Any,
) -> None:
    """Predict output bytes (exactly), peak memory and time, and send one block through the whole path, save included.

    \b
    Example:
      fettle plan ./llama --recipe gptq-4bit
    """
    checked_choice(recipe, method, fields)
    resolve(model)  # before the imports, which take seconds
    from fettle import api
    from fettle.vision.plan import ClassifierPlan

    chosen = with_masks(chosen_recipe(recipe, method, fields), dense=dense, allocation=allocation)
    plan = api.plan(model, chosen, device=device, threads=threads, generic=generic, progress=progress(json=json))
    if json:
        emit_json("plan", plan.to_json())
        return
    if isinstance(plan, ClassifierPlan):
        show_plan(plan.to_json())
        return
    rows = [
        ("model", plan.model),
        ("recipe", plan.recipe),
        ("bytes before", f"{plan.base_bytes:,} ({size(plan.base_bytes)})"),
        ("bytes after, exactly", f"{plan.output_bytes:,} ({size(plan.output_bytes)})"),
        ("bits per weight, compressed linears", f"{plan.bits_per_weight:.3f}"),
        ("linears compressed, kept", f"{plan.linears}, {plan.kept_linears}"),
        ("time, estimated from one block", duration(plan.seconds)),
        ("peak memory, of one block and the start", f"{size(plan.peak_memory_bytes)} of {size(plan.memory_bytes)}"),
        ("free disk here", size(plan.free_disk_bytes)),
    ]
    out = console()
    show(out, table("", ("what", "prediction"), rows))
    show(out, table("", ("scheme", "linears"), [(k, str(v)) for k, v in plan.schemes.items()], right=(1,)))
    if plan.calibration_note:
        out.print(plan.calibration_note)
