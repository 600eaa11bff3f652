"""The page: one file, offline, inert, readable; looked at in a real browser where there is one."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from fettle.errors import UsageError
from fettle.report.page import nearest, read_document, render, visible, write_report
from fettle.report.tables import kl_shares, warning
from tests.report.sample import compression, evaluation, hostile

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def test_everything_is_told_and_nothing_is_asked_of_the_network():
    page = render([compression()])
    assert "91.6%" in page and "4.626" in page and "0.01468 nats" in page
    assert "10.4 MB" in page and "4.51 MB" in page
    assert "fettle compress demo -o demo-small --recipe gptq-4bit" in page
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:)?//""", page)
    assert "<link" not in page and "@import" not in page and "url(" not in page


class Structure(HTMLParser):
    """What a parser sees: the elements with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    "evil", [EVIL, "'\"><b onmouseover=x>", "{{ 7 * 7 }}{% raw %}", "</svg></style></title>", "\u202e\x1b]0;x"]
)
def test_hostile_text_stays_text(evil):
    found = Structure(render([hostile(evil), hostile(evil)]))
    harmless = Structure(render([hostile("word"), hostile("word")]))
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]  # it made no element
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert {"script", "img", "link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in found.elements)
    assert evil in found.text  # and it is there to read


@pytest.mark.parametrize(
    "missing", ["evaluation", "ledger", "completions", "calibration", "recipe_yaml", "base", "versions"]
)
def test_missing_pieces_do_not_break_the_page(missing):
    document = compression()
    whole = render([document])
    document[missing] = None
    page = render([document])
    assert "</html>" in page and len(page) < len(whole)
    del document[missing]
    assert render([document]) == page
    assert ">None<" not in page


def test_an_evaluation_without_a_reference():
    alone = {
        k: v
        for k, v in evaluation().items()
        if not k.startswith(("kl_", "reference_", "worst", "error_", "output_", "top1"))
    }
    page = render([{"schema": 1, "kind": "evaluation", "model": "m", "evaluation": alone}])
    assert "with no original to compare" in page
    assert "KL to the original" not in page
    assert ">original<" not in page  # no column of dashes
    assert "<svg" not in page


def test_several_results_side_by_side():
    other = compression(recipe="round-to-nearest-4bit", loss=1.9)
    page = render([compression(), other, other])
    assert 'id="comparison"' in page
    assert page.count("<article>") == 3
    assert "demo, round-to-nearest-4bit (2)" in page and "demo, round-to-nearest-4bit (3)" in page
    assert page.count("<polyline") == 3
    row = next(line for line in page.splitlines() if "KL to the original, mean" in line)
    assert re.findall(r"0\.\d+ nats", row) == ["0.01468 nats", "0.02789 nats", "0.02789 nats"]
    assert page.count("<h1") == 1
    with pytest.raises(UsageError, match="at least one"):
        render([])


def test_result_files_are_read_and_others_refused(tmp_path):
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(compression()))
    assert read_document(whole)["model"] == "demo"
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(evaluation()))
    assert read_document(bare)["evaluation"]["kl_mean"] == 0.01468
    for name, content, told in (
        ("none.json", None, "No such file"), ("text.json", "hello", "no JSON"), ("list.json", "[1]", "no result"),
        ("later.json", json.dumps(compression() | {"schema": 7}), "schema 1"),
        ("number.json", '{"schema": 1, "kind": "evaluation", "evaluation": 5}', "no result"),
        ("summary.json", '{"schema": 1, "summary": 5}', "no result"), ("deep.json", "[" * 100_000, "no JSON"),
    ):  # fmt: skip
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(UsageError, match=told):
            read_document(path)


@pytest.mark.parametrize(
    "odd",
    [
        {"kl_histogram": {"edges": [], "counts": [1]}}, {"kl_mean": "x"}, {"error_by_block": [float("nan")]},
        {"worst_tokens": [5]}, {"bytes": 10**400}, {"kl_histogram": {"edges": [0, 0], "counts": [0]}},
        {"reference_bytes": []},
    ],
)  # fmt: skip
def test_odd_values_inside_of_a_result_are_a_usage_error_or_a_page(odd):
    document = compression()
    document["evaluation"] = document["evaluation"] | odd
    try:
        assert "</html>" in render([document])
    except UsageError as error:
        assert "not whole" in str(error)


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_report(path, [compression()])
    before = path.read_text()
    broken = compression()
    del broken["seconds"]
    with pytest.raises(UsageError, match=r"not whole \(KeyError: 'seconds'\)"):
        write_report(path, [broken])
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_worst_token_is_shown_with_its_nearest_lines():
    assert nearest("a\n\n\nb\n\nc\n    d = ") == "b\nc\n    d = "
    assert nearest("one\n") == "one\n"
    assert nearest("x" * 500) == "…" + "x" * 180
    assert nearest("") == ""
    assert [visible(token) for token in (" str", "\n    ", "  ", "a b", "\t", "x ")] == [
        "·str",
        "↵····",
        "··",
        "a b",
        "⇥",
        "x·",
    ]


def test_shares_are_the_histogram_in_words():
    histogram = {"edges": [0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0], "counts": [10, 40, 50, 899, 1]}
    assert kl_shares(histogram) == [
        ("0.0001", "1.0%"),
        ("0.001", "5.0%"),
        ("0.01", "10.0%"),
        ("0.1", "99.9%"),
        ("1", "all"),
    ]
    assert kl_shares({}) == []


@pytest.mark.parametrize(
    ("agreement", "scheme", "expected"),
    [
        (0.9, "ternary 2 bits, group 32, bfloat16 scale", ""),
        (
            0.31,
            "ternary 2 bits, group 32, bfloat16 scale",
            "on 69% of the tokens: as it is, it is of no use. Ternary levels",
        ),
        (0.31, "int2, group 32, bfloat16 scale", "Give it more bits, smaller groups"),
    ],
)
def test_a_model_that_lost_too_much_is_called_so(agreement, scheme, expected):
    document = compression()
    document["evaluation"]["top1_agreement"] = agreement
    document["ledger"] = [{**line, "scheme": scheme} for line in document["ledger"]]
    assert expected in warning(document)
    assert ('class="warning"' in render([document])) == bool(expected)
