"""The engine over the native runner: the torch runner's tokens, through batching, short caches and guesses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fettle.cli.main import main
from fettle.engine.engine import Engine
from fettle.engine.native_runner import NativeRunner
from fettle.engine.runners import RunnerOptions, choose_engine, open_engine, open_native_runner
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request
from fettle.engine.speculative import PromptLookup
from fettle.errors import UsageError
from fettle.kernels import native
from fettle.models.source import demo_folder

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 41, 17, 9, 30)
    return [
        Request(prompt=tuple(torch.randint(5, 4000, (n,), generator=generator).tolist()), max_tokens=10)
        for n in lengths
    ]


def test_greedy_tokens_are_those_of_the_torch_runner() -> None:
    expected = [made.tokens for made in open_engine("demo", engine="torch").generate(requests())]
    exact = NativeRunner.open(demo_folder(), pages=12, page_size=8, threads=2, integer=False, cache_type="float32")
    options = SchedulerOptions(max_sequences=3, max_step_tokens=16)  # 96 positions: sequences are thrown out again
    assert [made.tokens for made in Engine(exact, options=options).generate(requests())] == expected
    guessing = Engine(exact, options=options, drafter=PromptLookup())
    assert [made.tokens for made in guessing.generate(requests())] == expected


def test_it_is_opened_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "demo", "--prompt", "def add(a, b):", "--max-tokens", "8"]
    assert main([*command, "--engine", "native", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert main(command) == 0
    assert said == capsys.readouterr().out


def test_what_it_does_not_run_is_refused() -> None:
    with pytest.raises(UsageError, match="--device cuda"):
        open_native_runner(Path(), RunnerOptions(device="cuda"))
    with pytest.raises(UsageError, match="--generic"):
        open_native_runner(Path(), RunnerOptions(generic=True))


def test_auto_takes_it_where_it_can_and_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, options = demo_folder(), RunnerOptions()
    assert choose_engine("auto", demo, options) == ("native", None)
    assert choose_engine("torch", demo, options) == ("torch", None)
    chosen, reason = choose_engine("auto", demo, RunnerOptions(generic=True))
    assert (chosen, reason) == ("torch", "the native engine does not run with --generic")
    with pytest.raises(UsageError, match="auto"):
        choose_engine("naitve", demo, options)
    monkeypatch.setitem(sys.modules, "fettle._native", None)
    monkeypatch.delattr("fettle._native", raising=False)
    chosen, reason = choose_engine("auto", demo, options)
    assert chosen == "torch" and reason is not None and "not built" in reason
    assert main(["generate", "demo", "--prompt", "def", "--max-tokens", "2"]) == 0
    assert "--engine torch runs this: the native data plane is not built" in capsys.readouterr().err


def test_auto_looks_at_what_a_model_needs_before_it_is_opened(tmp_path: Path) -> None:
    for key, value in (
        ("hidden_act", "relu6"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ):
        folder = tmp_path / key
        shutil.copytree(demo_folder(), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        chosen, reason = choose_engine("auto", folder, RunnerOptions(threads=1))
        assert chosen == "torch" and reason is not None
        assert ("relu6" in reason) == (key == "hidden_act")
