"""`fettle diagnose`: which linears are sensitive to which scheme, and why; nothing is written but a page."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fettle.cli.options import Candidates, Device, Generic, Json, Model, NoReport, Threads, chosen_page, page_note
from fettle.cli.output import console, duration, emit_json, number, show, size, table
from fettle.cli.progress import progress
from fettle.cli.recipe_choice import command_line
from fettle.models.source import resolve
from fettle.report.atomic import require_writable
from fettle.report.diagnosis import write_diagnosis

Sample = Annotated[
    int | None,
    typer.Option(metavar="N", help="Measure N linears exactly, drawn by the seed; estimates cover all. Default: all."),
]
Text = Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text; without it the embedded held-out text.")]
Calibration = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The text that the candidates' methods look at.")
]
Windows = Annotated[int, typer.Option(metavar="N", help="Windows of calibration text.", min=1)]
Length = Annotated[int, typer.Option(metavar="N", help="Tokens a window, of both texts.", min=2)]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="How much of the text is measured.", min=2)]
Draws = Annotated[int, typer.Option(metavar="N", help="Draws of labels for the estimate.", min=1)]
Seed = Annotated[int, typer.Option(metavar="N", help="For windows, labels and the sample.", min=0)]
PagePath = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="PATH", help="Where the HTML page goes; without it diagnosis.html, in this folder."
    ),
]

PAGE = Path("diagnosis.html")
SHOWN = 12


def run(
    model: Model,
    candidate: Candidates = None,
    sample: Sample = None,
    text: Text = None,
    calibration: Calibration = None,
    windows: Windows = 32,
    length: Length = 256,
    max_tokens: MaxTokens = 2048,
    draws: Draws = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    generic: Generic = False,
    report: PagePath = None,
    no_report: NoReport = False,
    json: Json = False,
) -> None:
    """Show where a model is sensitive: for each linear and candidate scheme the KL to the original, measured and
    estimated, signal-to-noise, and what stands out.

    Writes one file: diagnosis.html, into the current folder. --report PATH puts it elsewhere, --no-report writes none.

    \b
    Examples:
      fettle diagnose demo --sample 6 --max-tokens 1024
      fettle diagnose ./llama --candidate "gptq bits=3 group_size=64" --candidate "gptq bits=4" --json
    """
    page = chosen_page(report, no_report, PAGE)
    if page is not None:
        require_writable(page)
    resolve(model)  # before the imports, which take seconds
    from fettle import api

    found = api.diagnose(
        model,
        candidates=candidate or None,
        sample=sample,
        text=text,
        calibration=calibration,
        windows=windows,
        length=length,
        max_tokens=max_tokens,
        draws=draws,
        seed=seed,
        device=device,
        threads=threads,
        generic=generic,
        progress=progress(json=json),
    )
    found["command_line"] = command_line(sys.argv[1:])
    if page is not None:
        write_diagnosis(page, found)
    if json:
        emit_json("diagnose", {**found, "report": page})
    else:
        _print(found, page)


def _print(found: Mapping[str, Any], page: Path | None) -> None:
    out = console()
    rows = [
        (d["candidate"], number(d["kl"]), number(d["kl_estimate_sum"]), f"{d['compressed_inputs'][-1]:.2%}")
        for d in found["depth"]
    ]
    columns = ("all linears with", "KL, measured", "sum of the estimates", "error of the last block")
    show(out, table("", columns, rows, right=(1, 2, 3)))
    worst = sorted(found["effects"], key=lambda e: -e["kl_estimate"])[:SHOWN]
    lines = [
        (
            e["linear"], e["candidate"], number(e["kl"], 3), number(e["kl_estimate"], 3),
            f"{e['weight_snr_db']:.1f}", f"{e['output_snr_db']:.1f}",
        )
        for e in worst
    ]  # fmt: skip
    heads = ("linear, alone", "candidate", "KL, measured", "estimate", "SNR of weights, dB", "of outputs, dB")
    show(out, table("what costs most", heads, lines, right=(2, 3, 4, 5)))
    out.print(found["words"], markup=False)
    out.print(f"In {duration(found['seconds'])} and {size(found['peak_memory_bytes'])} of memory.")
    if page is not None:
        out.print(page_note(page, PAGE), markup=False)
