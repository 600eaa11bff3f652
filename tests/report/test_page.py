"""The page: one file, offline, inert, readable; looked at in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess

import pytest

from fettle.errors import UsageError
from fettle.report.page import read_document, render, write_report

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def sample() -> dict:
    """The summary of a compression, as the pipeline writes it, with a hostile text inside."""
    evaluation = {
        "schema": 1, "perplexity": 23.42, "perplexity_standard_error": 0.5, "reference_perplexity": 23.27,
        "reference_perplexity_standard_error": 0.5, "bits_per_byte": 1.42, "reference_bits_per_byte": 1.41,
        "kl_mean": 0.0147, "kl_median": 0.0103, "kl_p99": 0.085, "kl_max": 0.48, "top1_agreement": 0.9159,
        "probability_rms_change": 0.0255, "output_relative_error": 0.1, "output_cosine": 0.994,
        "bits_per_weight": 4.626, "model_bits_per_weight": 6.9, "reference_model_bits_per_weight": 16.0,
        "bytes": 4_511_176, "reference_bytes": 10_367_384, "parameters": 5_183_744, "tokens": 16_384,
        "text_source": EVIL, "text_sha256": "0" * 64, "text_note": "", "window_tokens": 512,
        "worst_tokens": [
            {"kl": 0.48, "context": "a = b " + EVIL, "token": EVIL, "following": "x", "predicted": EVIL,
             "reference_predicted": "\n", "probability": 0.1, "reference_probability": 0.2}
        ],
        "kl_histogram": {"edges": [0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0], "counts": [10, 50, 200, 90, 3]},
        "error_by_block": [0.077, 0.074, 0.08], "seconds": 6.0, "peak_memory_bytes": 500_000_000,
    }  # fmt: skip
    line = {"linear": f"model.layers.0.{EVIL}", "block": 0, "role": "query", "method": "gptq", "scheme": "int4",
            "error": 0.004, "objective": "output_error", "bits_per_weight": 4.6, "seconds": 0.1, "note": EVIL}  # fmt: skip  # noqa: E501
    return {
        "schema": 1, "kind": "compression", "model": EVIL, "base": {"name": "m", "bytes": 10_367_384, "hashes": {"a": "1" * 64}},  # noqa: E501
        "output": {"folder": "out", "bytes": 4_511_176, "hashes": {"b": "2" * 64}}, "recipe": {"name": "gptq-4bit"},
        "recipe_yaml": "name: gptq-4bit\n", "command": "fettle compress demo -o out", "calibration": None,
        "ledger": [line], "versions": {"torch": "2"}, "evaluation": evaluation,
        "completions": [{"prompt": "def f():", "original": EVIL, "compressed": "pass"}], "seconds": 20.0,
        "peak_memory_bytes": 300_000_000,
    }  # fmt: skip


def test_everything_is_told_and_nothing_is_asked_of_the_network():
    page = render([sample()])
    assert "91.6%" in page and "4.626" in page and "0.01470 nats" in page
    assert "10.4 MB" in page and "4.51 MB" in page
    assert "fettle compress demo -o out" in page
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:)?//""", page)
    assert "<link" not in page and "@import" not in page and "url(" not in page


def test_hostile_text_stays_text():
    page = render([sample()])
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;/script&gt;" in page


@pytest.mark.parametrize(
    "missing", ["evaluation", "ledger", "completions", "calibration", "recipe_yaml", "base", "versions"]
)
def test_missing_pieces_do_not_break_the_page(missing):
    document = sample()
    document[missing] = None
    assert "<h1>" in render([document])


def test_an_evaluation_without_a_reference():
    evaluation = {
        k: v
        for k, v in sample()["evaluation"].items()
        if not k.startswith(("kl_", "reference_", "worst", "error_", "output_", "top1"))
    }
    page = render([{"schema": 1, "kind": "evaluation", "model": "m", "evaluation": evaluation}])
    assert "with no original to compare" in page
    assert "KL to the original" not in page


def test_several_results_side_by_side():
    other = sample() | {"model": "other"}
    page = render([sample(), other])
    assert 'id="comparison"' in page
    assert page.count("<article>") == 2
    with pytest.raises(UsageError, match="at least one"):
        render([])


def test_result_files_are_read_and_others_refused(tmp_path):
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(sample()))
    assert read_document(whole)["model"] == EVIL
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(sample()["evaluation"]))
    assert read_document(bare)["evaluation"]["kl_mean"] == 0.0147
    for name, content, told in (
        ("none.json", None, "No such file"), ("text.json", "hello", "no JSON"), ("list.json", "[1]", "no result"),
        ("later.json", json.dumps(sample() | {"schema": 7}), "schema 1"),
    ):  # fmt: skip
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(UsageError, match=told):
            read_document(path)


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_report(path, [sample()])
    before = path.read_text()
    broken = sample()
    del broken["seconds"]
    with pytest.raises(KeyError):
        write_report(path, [broken])
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",  # noqa: E501
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
]  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; .ci/run installs Debian's")
@pytest.mark.parametrize("width", [1100, 500])
def test_the_page_in_a_browser(tmp_path, width):
    path, picture = tmp_path / "report.html", tmp_path / "page.png"
    probe = "<script>document.body.dataset.overflow = document.documentElement.scrollWidth - window.innerWidth</script>"
    page = render([sample()])
    path.write_text(re.sub(r"<meta http-equiv.*?>", "", page).replace("</body>", probe + "</body>"))
    run = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom", path.as_uri()],  # noqa: E501
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert 'data-overflow="0"' in run.stdout  # nothing is wider than the window
    assert "Before and after" in run.stdout
    assert "<title>owned" not in run.stdout
    assert "CONSOLE" not in run.stderr
    subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200", f"--screenshot={picture}", path.as_uri()],  # noqa: E501
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (width, 1200)
    assert len(data) > 20_000  # a blank page compresses to less
