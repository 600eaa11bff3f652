"""What `fettle bench` measures, as its flags say it; without what measures, so that the flags are there at once."""

from __future__ import annotations

from dataclasses import dataclass

from fettle.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What is measured.

    Attributes:
        prompt_tokens: of the prompt that is read.
        new_tokens: of every sequence that decodes.
        batches: how many sequences decode at the same time.
        repetitions: how often all of it is measured.
        seed: draws the prompts' tokens.
    """

    prompt_tokens: int = 512
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 4, 8, 16)
    repetitions: int = 5
    seed: int = 0

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            UsageError: a number that measures nothing.
        """
        if self.new_tokens < 2:
            raise UsageError(f"new_tokens is {self.new_tokens}; it must be at least 2: the first belongs to the prompt")
        for name, counts in (
            ("prompt_tokens", (self.prompt_tokens,)), ("repetitions", (self.repetitions,)), ("batches", self.batches)
        ):  # fmt: skip
            if not counts or min(counts) < 1:
                raise UsageError(f"{name} is {min(counts, default='empty')}; it must be at least 1")

    @property
    def cache_tokens(self) -> int:
        """What the cache has to hold, whatever the size of a page up to 64 tokens."""
        most = max(self.batches)
        return max(self.prompt_tokens + 1, most * (self.start_tokens + self.new_tokens + 1)) + 128 * most

    @property
    def start_tokens(self) -> int:
        """Of the prompts of sequences that decode."""
        return min(16, self.prompt_tokens)
