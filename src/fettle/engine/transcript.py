"""Text out: tokens become text piece by piece, and a stop text ends it before anybody saw its beginning.

One token may be half a character, and what a token says may depend on its neighbours, so a piece is what the decoded
text gains by a token, decoded together with the tokens of the last few pieces, the prompt's end included: SentencePiece
decoders drop a space at the beginning of all that they are given. What could still become a stop text is
held back until it cannot. Cost: a token is decoded a few times, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders put for half a character
NEIGHBOURS = 6  # tokens decoded again with each new one


class Transcript:
    """The text of one completion, as it grows.

    Attributes:
        text: all of it so far, held back pieces included, without the stop text.
        stopped: whether a stop text came.
    """

    def __init__(self, tokenizer: Any, stop: Listed[str] = (), *, prompt: Listed[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(prompt[-NEIGHBOURS:])
        if self._decode(self._tokens).endswith(UNFINISHED):  # the prompt's half character is not the completion's
            self._tokens = []
        self._read = len(self._tokens)  # how many tokens are the prompt's or in `text`
        self._given = 0  # how many characters were handed out
        self.text = ""
        self.stopped = False

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Takes a token; returns the text that is new and certain."""
        self._tokens.append(token)
        return self._take_in(self._fresh(), may_stop, last=False)

    def finish(self) -> str:
        """Returns what was held back: no more tokens come."""
        return "" if self.stopped else self._take_in(self._fresh(last=True), True, last=True)

    def _fresh(self, *, last: bool = False) -> str:
        """What the tokens since the last piece say; nothing while a character is half."""
        start = max(0, self._read - NEIGHBOURS)
        before = self._decode(self._tokens[start : self._read])
        after = self._decode(self._tokens[start:])
        if (after.endswith(UNFINISHED) and not last) or not after.startswith(before):
            if not last:
                return ""
            after = before + self._decode(self._tokens[self._read :])
        self._read = len(self._tokens)
        return after[len(before) :]

    def _take_in(self, fresh: str, may_stop: bool, *, last: bool) -> str:
        longest = max(map(len, self._stop), default=0)
        start = max(self._given, len(self.text) - longest + 1)
        self.text += fresh
        if may_stop:
            found = [place for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        held = 0 if last or self.stopped else self._held_back()
        given = max(self._given, len(self.text) - held)
        piece, self._given = self.text[self._given : given], given
        return piece

    def _held_back(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        most = max((len(stop) - 1 for stop in self._stop), default=0)
        for count in range(min(most, len(self.text) - self._given), 0, -1):
            end = self.text[len(self.text) - count :]
            if any(stop.startswith(end) for stop in self._stop):
                return count
        return 0

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""
