"""Every verb, run for real on a tiny model: what it prints, its JSON, its exit code."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fettle.cli.main import main
from fettle.errors import ResourceError

SMALL = ["--windows", "8", "--length", "64"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    assert (found["schema"], found["command"]) == (1, arguments[0])
    return found


@pytest.fixture(scope="module")
def compressed(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "small"
    flags = ["--method", "gptq", "--bits", "4", "--group-size", "32", "--asymmetric", "--no-evaluate"]
    assert main(["compress", str(tiny_llama), "-o", str(folder), *flags, "--calibration", str(text_file), *SMALL]) == 0
    return folder


def test_compress_writes_the_folder_and_says_what_is_next(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", str(tiny_llama), "-o", str(tmp_path / "out"), "--recipe", "round-to-nearest-4bit"]
    assert main([*arguments, "--no-evaluate"]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "fettle.json").is_file()
    assert (tmp_path / "out.run" / "report.html").is_file()
    assert "times smaller" in shown
    assert "Next: fettle evaluate" in shown
    assert main([*arguments, "--no-evaluate"]) == 0
    assert "finished already" in capsys.readouterr().out


def test_compress_says_which_text_it_uses(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "gptq", "--no-evaluate", *SMALL]
    main(["compress", str(tiny_llama), "-o", str(tmp_path / "out"), *flags])
    assert "the embedded text" in capsys.readouterr().err


def test_compress_json_holds_the_summary(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-o", tmp_path / "out", "--method", "round_to_nearest", "--no-evaluate"]
    found = run_json(capsys, "compress", tiny_llama, *flags)
    assert found["already_finished"] is False
    assert found["summary"] == json.loads((tmp_path / "out.run" / "summary.json").read_text(encoding="utf-8"))


def test_a_changed_run_is_refused_by_name(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compress",
        str(tiny_llama),
        "-o",
        str(tmp_path / "out"),
        "--method",
        "round_to_nearest",
        "--no-evaluate",
    ]
    assert main([*arguments, "--bits", "4"]) == 0
    assert main([*arguments, "--bits", "3"]) == 2
    assert "bits" in capsys.readouterr().err
    assert main([*arguments, "--bits", "3", "--fresh"]) == 0


def test_plan_predicts_what_compress_writes(
    tiny_llama: Path, compressed: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--method",
        "gptq",
        "--bits",
        "4",
        "--group-size",
        "32",
        "--asymmetric",
        "--calibration",
        text_file,
        *SMALL,
    ]
    found = run_json(capsys, "plan", tiny_llama, *flags)
    assert found["output_bytes"] == sum(p.stat().st_size for p in compressed.glob("*.safetensors"))
    assert main(["plan", str(tiny_llama), *map(str, flags)]) == 0
    assert f"{found['output_bytes']:,}" in capsys.readouterr().out


def test_evaluate_measures_against_the_original(
    tiny_llama: Path, compressed: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    flags = ["--reference", tiny_llama, "--text", text_file, "--length", 64, "--max-tokens", 512]
    found = run_json(capsys, "evaluate", compressed, *flags, "--report", page)
    stable = (
        "perplexity reference_perplexity bits_per_byte kl_mean kl_median kl_p99 kl_max top1_agreement bits_per_weight"
    )
    assert {*stable.split(), "model_bits_per_weight", "bytes", "tokens"} <= set(found)
    assert 0 < found["kl_mean"] < found["kl_max"]
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")
    assert main(["evaluate", str(compressed), *map(str, flags), "--no-report"]) == 0
    shown = capsys.readouterr().out
    assert "top-1 agreement" in shown
    assert "worst tokens" in shown
    assert "Report:" not in shown


@pytest.mark.parametrize("verb", ["evaluate", "diagnose"])
def test_a_page_that_nobody_asked_for_is_announced_and_named(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    page = {"evaluate": "report.html", "diagnose": "diagnosis.html"}[verb]
    told = " ".join(capsys.readouterr().out.split())
    assert f"{page}, into the current folder. --report PATH puts it elsewhere, --no-report writes none." in told


def test_where_the_page_is_stands_below_the_figures(
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--text", str(text_file), "--length", "64", "--max-tokens", "64"]
    assert main(["evaluate", str(tiny_llama), *flags]) == 0
    shown = capsys.readouterr().out
    assert "Report: report.html (in this folder; --report PATH puts it elsewhere, --no-report writes none)" in shown
    assert main(["evaluate", str(tiny_llama), *flags, "--report", "deep/page.html"]) == 0
    assert capsys.readouterr().out.endswith("Report: deep/page.html\n")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "deep"}


def test_the_gate_opens_and_shuts(
    tiny_llama: Path, compressed: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--reference", str(tiny_llama), "--text", str(text_file), "--length", "64", "--max-tokens", "256"]
    arguments = ["evaluate", str(compressed), *flags, "--no-report", "--json"]
    assert main([*arguments, "--max-kl", "1000"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--max-kl", "1e-9"]) == 5
    said = capsys.readouterr()
    assert json.loads(said.out)["kl_mean"] > 1e-9
    assert "above the allowed 1e-09" in said.err


def test_the_model_against_itself_loses_nothing(
    tiny_llama: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--reference", tiny_llama, "--text", text_file, "--length", 64, "--max-tokens", 256, "--no-report"]
    found = run_json(capsys, "evaluate", tiny_llama, *flags)
    assert found["kl_max"] == 0
    assert found["top1_agreement"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-kl", "1"], "--max-kl needs --reference"),
        (["--reference", "x", "--max-kl", "-1"], "it must be 0 or more"),
        (["--report", "a.html", "--no-report"], "exclude each other"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "~nosuch/x"], "~nosuch/x"),
        (["--report", "/dev/full"], "/dev/full"),
        (["--report", "."], "it is a folder"),
    ],
)
def test_evaluate_refuses(tiny_llama: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny_llama), *flags]) == 2
    assert words in capsys.readouterr().err


def test_the_numbers_are_printed_whatever_becomes_of_the_page(
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(path: Path, documents: object) -> None:
        raise ResourceError(f"no room for the page {path}")

    monkeypatch.setattr("fettle.cli.evaluate.write_report", failing)
    flags = ["--text", str(text_file), "--length", "64", "--max-tokens", "256", "--report", str(tmp_path / "page.html")]
    assert main(["evaluate", str(tiny_llama), *flags, "--json"]) == 3
    said = capsys.readouterr()
    assert json.loads(said.out)["perplexity"] > 1 and json.loads(said.out)["report"] is None
    assert "no room for the page" in said.err


@pytest.mark.parametrize("where", ["/dev/full", ".", "/proc/nowhere/page.html"])
def test_a_page_that_cannot_be_is_told_before_the_work(
    tiny_llama: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "round_to_nearest", "--report", where]
    assert main(["compress", str(tiny_llama), "-o", str(tmp_path / "out"), *flags]) == 2
    assert f"the page {where} cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_prompt_from_standard_input_is_utf8(
    compressed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(compressed), "-", "--max-new-tokens", "1"]
    for raw, code in ((b"def fox", 0), (b"def \xff", 2)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
        assert main(arguments) == code
    assert "byte 4 is 0xff" in capsys.readouterr().err
    assert main(["generate", str(compressed), "def \udcff"]) == 2
    assert "not UTF-8 text" in capsys.readouterr().err


def test_generate_streams_what_json_holds(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(compressed), "def fox(a):", "--max-new-tokens", "8"]
    found = run_json(capsys, *arguments)
    assert len(found["tokens"]) <= 8
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"def fox(a):{found['text']}\n"


def test_generate_refuses_an_impossible_temperature(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(compressed), "x", "--temperature", "-1"]) == 2
    assert "temperature is -1.0" in capsys.readouterr().err


def test_inspect_tells_schemes_and_bytes(
    tiny_llama: Path, compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (run_json(capsys, "inspect", folder) for folder in (tiny_llama, compressed))
    assert [len(block["linears"]) for block in before["blocks"]] == [7, 7]
    assert before["blocks"][0]["linears"][0]["scheme"] == "bfloat16"
    assert "int4" in after["blocks"][0]["linears"][0]["scheme"]
    assert after["bytes"] < before["bytes"]
    assert main(["inspect", str(compressed)]) == 0
    shown = capsys.readouterr().out
    assert "blocks 0 to 1, each" in shown
    assert "172 × 64" in shown


def test_methods_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "methods")
    assert {"gptq", "round_to_nearest"} <= {method["name"] for method in found["methods"]}
    assert main(["methods", "gptq"]) == 0
    shown = capsys.readouterr().out
    fields = next(method["fields"] for method in found["methods"] if method["name"] == "gptq")
    assert all(field["name"] in shown for field in fields)
    assert main(["methods", "gtpq"]) == 2
    assert "did you mean 'gptq'" in capsys.readouterr().err


def test_report_takes_folders_and_json(
    tiny_llama: Path, compressed: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--reference", tiny_llama, "--text", text_file, "--length", 64, "--max-tokens", 256, "--no-report"]
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps(run_json(capsys, "evaluate", compressed, *flags)), encoding="utf-8")
    found = run_json(capsys, "report", compressed, evaluation, "-o", tmp_path / "page.html")
    assert found["results"] == 2
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ('{"schema": 1, "kind": "evaluation", "evaluation": 5}', "is no result"),
        ("[" * 100_000, "is no JSON"),
        ("{", "is no JSON"),
        ('{"a": 1}', "is no result of fettle"),
        ("[]", "is no result"),
    ],
)
def test_report_refuses_what_is_no_result(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert main(["report", str(path), "-o", str(tmp_path / "page.html")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_model_is_exit_code_4(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main(["inspect", str(broken)]) == 4
    assert "model.safetensors" in capsys.readouterr().err


def test_diagnose_tells_json_page_and_words(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--sample", 2, "--max-tokens", 64, "--windows", 2, "--length", 32, "--text", text_file]
    flags = [*few, "--calibration", text_file, "--candidate", "round_to_nearest bits=3"]
    found = run_json(capsys, "diagnose", tiny_llama, *flags, "--report", tmp_path / "page.html")
    assert len(found["effects"]) == 14
    assert sum(effect["kl"] is not None for effect in found["effects"]) == 2
    assert "diagnosis" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main(["diagnose", str(tiny_llama), *map(str, flags), "--no-report"]) == 0
    shown = capsys.readouterr().out
    assert "Keep high" in shown
    assert main(["diagnose", str(tiny_llama), "--report", "x.html", "--no-report"]) == 2
    assert main(["diagnose", str(tiny_llama), "--candidate", "gtpq"]) == 2


def test_compress_keeps_a_budget(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--windows", 4, "--length", 32, "--calibration", text_file, "--candidate", "gptq bits=3"]
    budget = [*few, "--candidate", "round_to_nearest bits=4", "--bits-per-weight", 4, "--no-evaluate"]
    found = run_json(capsys, "compress", tiny_llama, "-o", tmp_path / "out", *budget)
    assert found["summary"]["budget"]["bits_per_weight"] <= 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bits-per-weight", "3", "--method", "gptq"], "leave out --recipe and --method"),
        (["--bits-per-weight", "3", "--size", "2GB"], "one of the two"),
        (["--size", "much"], "such as 2GB"),
        (["--candidate", "gptq"], "belong to a budget"),
        (["--free-fused"], "belong to a budget"),
    ],
)
def test_budgets_that_cannot_be(
    tiny_llama: Path, flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(tiny_llama), "-o", str(tmp_path / "out"), *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--recipe", "round-to-nearest-4bit"], pytest.param([], marks=pytest.mark.exhaustive)]
)
def test_demo_compares_and_completes(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *flags]) == 0
    shown = capsys.readouterr().out
    for word in (
        "bits per weight",
        "perplexity",
        "KL to the original",
        "top-1",
        "seconds",
        "peak memory",
        "original, after",
    ):
        assert word in shown
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "demo-out" / "fettle.json").is_file()


def test_cache_measures_what_codes_of_keys_and_values_cost(
    tiny_llama: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--text", text_file, "--length", "64", "--max-tokens", "256", "--bits", "2", "--residual", "0"]
    found = run_json(capsys, "cache", tiny_llama, *flags)
    assert found["scheme"] == {"bits": 2, "group_size": 32, "residual": 0}
    assert 0 < found["kl_mean"] < found["kl_late"] * 5
    assert found["cache_bytes"] < found["exact_bytes"]
    assert main(["cache", str(tiny_llama), *map(str, flags)]) == 0
    assert "coded cache" in capsys.readouterr().out
    assert main(["cache", str(tiny_llama), "--bits", "3"]) == 2
    assert "kept in 2, 4, 8 bits" in capsys.readouterr().err


def test_generate_with_a_coded_cache(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run_json(capsys, "generate", tiny_llama, "def f", "--max-new-tokens", "12")
    coded = run_json(capsys, "generate", tiny_llama, "def f", "--max-new-tokens", "12", "--cache-bits", "8")
    assert coded["tokens"] == plain["tokens"]  # twelve tokens are all recent
    assert main(["generate", str(tiny_llama), "def f", "--cache-bits", "1"]) == 2


def test_inspect_says_what_runs_models_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_json(capsys, "inspect", "--runtime")["runtime"]
    assert found["threads"] >= 1
    assert main(["inspect", "--runtime"]) == 0
    line = capsys.readouterr().out
    assert (
        f"native, {found['instructions']} kernels" if found["native"] else "the native data plane is not built"
    ) in line
    monkeypatch.setitem(sys.modules, "fettle._native", None)  # as after an install without a compiler
    monkeypatch.delattr("fettle._native", raising=False)
    assert main(["inspect", "--runtime"]) == 0
    assert "torch reference" in (said := capsys.readouterr().out) and said.count("\n") == 1
    assert main(["inspect"]) == 2
    assert "--runtime" in capsys.readouterr().err


def test_generate_takes_its_prompt_in_one_place_and_stops_at_a_text(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = ["--temperature", "1", "--seed", "4", "--max-tokens", "20"]
    free = run_json(capsys, "generate", tiny_llama, "--prompt", "def f", *sampled)
    assert free["token_ids"] == free["tokens"] and free["prefill_tokens_per_second"] > 0
    stop = free["text"][4:6]
    ended = run_json(capsys, "generate", tiny_llama, "def f", *sampled, "--stop", stop)
    assert ended["stopped"] == "stop" and ended["text"] == free["text"][: free["text"].index(stop)]
    guessed = run_json(capsys, "generate", tiny_llama, "def f", *sampled, "--draft", "lookup", "--engine", "torch")
    assert guessed["tokens"] == free["tokens"]
    for wrong, words in (
        (["def f", "--prompt", "x"], "given twice"),
        ([], "there is no prompt"),
        (["--chat", "--json"], "there is no prompt"),
        (["def f", "--chat"], "has no chat template"),
        (["def f", "--engine", "nativ"], "unknown engine 'nativ'"),
        (["def f", "--cache-bits", "8", "--draft", "lookup"], "without --draft"),
    ):
        assert main(["generate", str(tiny_llama), *wrong]) == 2
        assert words in capsys.readouterr().err


def test_a_conversation_is_a_turn_a_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "chatty"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    )
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("def fox\n\nx =\n"))
    assert main(["generate", str(folder), "--chat", "--max-tokens", "6"]) == 0
    answers = capsys.readouterr().out.splitlines()
    first = run_json(capsys, "generate", folder, "--chat", "--prompt", "def fox", "--max-tokens", "6")
    assert first["text"] and "\n".join(answers).startswith(first["text"])


def test_bench_measures_everything_and_says_the_shares(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--prompt-tokens", "32", "--new-tokens", "3", "--batches", "1,4", "--repetitions", "2", "--threads", "1"]
    found = run_json(capsys, "bench", tiny_llama, *small)
    assert set(found["decode_tokens_per_second"]) == {"1", "4"}
    assert all(value > 0 for value in found["decode_tokens_per_second"].values())
    assert found["prefill_tokens_per_second"] == pytest.approx(32 / found["time_to_first_token_seconds"], rel=0.5)
    wanted = found["weight_bytes"] * found["decode_tokens_per_second"]["1"] / found["read_bytes_per_second"]
    assert found["memory_bandwidth_share"] == pytest.approx(wanted)
    assert found["arithmetic_share"] > 0
    page = tmp_path / "speed.html"
    assert main(["bench", str(tiny_llama), *small, "--report", str(page)]) == 0
    assert "decode, 4 at once" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").count("<svg") == 2
    assert "decode, 4 at once" in page.read_text(encoding="utf-8")
    for wrong, words in (
        (["--batches", "1,x"], "no list of numbers"),
        (["--prompt-tokens", "600"], "context holds 512"),
    ):
        assert main(["bench", str(tiny_llama), *wrong]) == 2
        assert words in capsys.readouterr().err


def test_a_budget_and_another_shape_are_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", "demo", "-o", str(tmp_path / "out"), "--parameters", "0.6x", "--bits-per-weight", "4"]
    assert main(command) == 2
    assert "do one after the other" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
