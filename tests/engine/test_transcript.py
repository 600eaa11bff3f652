"""Text out of tokens: pieces add up, characters stay whole, stop texts never show."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.engine.transcript import Transcript


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def say(text: str, stop: tuple[str, ...] = (), may_stop: bool = True) -> tuple[list[str], Transcript]:
    transcript = Transcript(Letters(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(transcript.push(token, may_stop=may_stop))
        if transcript.stopped:
            break
    pieces.append(transcript.finish())
    return pieces, transcript


class Stripping(Letters):
    """As SentencePiece decoders do, it drops a space at the beginning of all that it is given."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return super().decode(tokens, skip_special_tokens).removeprefix(" ")


def test_a_completion_begins_with_its_space() -> None:
    transcript = Transcript(Stripping(), prompt=tuple(b"Once"))
    assert "".join(map(transcript.push, b" upon")) + transcript.finish() == " upon" == transcript.text
    half = Transcript(Letters(), prompt="aé".encode()[:2])
    assert [half.push(token) for token in b"bc"] == ["b", "c"]


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces, transcript = say("aéz")
    assert pieces == ["a", "", "é", "z", ""]
    assert transcript.text == "aéz"


def test_half_a_character_at_the_end_is_still_told() -> None:
    transcript = Transcript(Letters())
    assert [transcript.push(token) for token in "aé".encode()[:2]] == ["a", ""]
    assert transcript.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_text_and_its_beginning_never_show() -> None:
    pieces, transcript = say("one\n\ntwo", ("\n\n",))
    assert "".join(pieces) == transcript.text == "one"
    assert transcript.stopped
    pieces, transcript = say("one\ntwo", ("\n\n",))
    assert pieces[3] == "" and pieces[4] == "\nt"
    assert "".join(pieces) == "one\ntwo" and not transcript.stopped


def test_what_was_held_back_is_told_at_the_end() -> None:
    pieces, _ = say("abcST", ("STOP",))
    assert pieces[-1] == "ST"


def test_stop_texts_wait_for_the_least_number_of_tokens() -> None:
    assert say("one\n\ntwo", ("\n\n",), may_stop=False)[1].text.startswith("one\n\ntw")


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from("abé€ "), max_size=30), st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=3)))
def test_pieces_add_up_to_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, transcript = say(text, tuple(stops))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first = min(ends)[0] if ends else None  # the stop that is complete first
    wanted = text if first is None else text[: min(place for end, place in ends if end == first)]
    assert "".join(pieces) == transcript.text == wanted


def test_a_real_tokenizer_streams_what_it_decodes(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "def fox_1(the, dog):\n    return 'zwölf Boxkämpfer — 狐狸' + the\n"
    ids = tokenizer(text)["input_ids"]
    transcript = Transcript(tokenizer)
    pieces = [transcript.push(token) for token in ids] + [transcript.finish()]
    assert "".join(pieces) == transcript.text == tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("stop", [(), ("x",)])
def test_nothing_said_is_nothing(stop: tuple[str, ...]) -> None:
    assert Transcript(Letters(), stop).finish() == ""
