"""Which tokens of which sequences run in the next step: continuous batching over a paged cache. No tensor is touched.

Every step is planned anew (Yu et al. 2022, Orca; https://www.usenix.org/conference/osdi22/presentation/yu): a finished
sequence leaves at once and the next one takes its place, nobody waits for a batch to end. The order is that of arrival:

1. each decoding sequence gets its one token;
2. what is left of the step's tokens goes to prompts that are under way, in chunks, so that a long prompt never stops
   the others (Agrawal et al. 2023, SARATHI; https://arxiv.org/abs/2308.16369);
3. then new prompts are let in, as long as their pages are free, beginning behind the longest prefix that the cache has;
4. in a step that reads no prompt, what is left may check drafted tokens (one that does has its arithmetic to do).

Where the pages do not suffice, the youngest sequence gives up its own and is computed again later; the oldest one
never does, so it always finishes, then the next: nobody starves. Recomputing is cheaper than it looks, as sealed
pages stay findable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fettle.engine.paged_cache import PagedCache
from fettle.engine.runner import RunnerShape
from fettle.engine.sequence import Sequence, Stopped
from fettle.errors import ResourceError, UsageError

Lookahead = Callable[[Sequence], int]


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """How much runs at once.

    Attributes:
        max_sequences: how many sequences run at the same time.
        max_step_tokens: how many tokens a step computes; the largest chunk of a prompt.
        reuse_prefixes: whether prompts take over pages of equal prefixes.
    """

    max_sequences: int = 16
    max_step_tokens: int = 512
    reuse_prefixes: bool = True

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            UsageError: a number below 1, or steps that cannot hold a token of every sequence.
        """
        if self.max_sequences < 1:
            raise UsageError(f"max_sequences is {self.max_sequences}; it must be at least 1")
        if self.max_step_tokens < self.max_sequences:
            raise UsageError(
                f"max_step_tokens is {self.max_step_tokens}; it must be at least max_sequences, {self.max_sequences}, "
                "so that each of them gets a token a step"
            )


@dataclass(eq=False)
class Work:
    """What a step does for one sequence: tokens computed … computed + count - 1, and then up to `room` drafted ones."""

    sequence: Sequence
    count: int
    room: int = 0

    @property
    def draws(self) -> bool:
        """Whether the step reaches the last known token, so that a new one is drawn."""
        return self.count == self.sequence.missing


@dataclass(frozen=True)
class Plan:
    """A step: work in the order of the batch, and pages (from, to) to copy first."""

    work: list[Work]
    copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Sequences that wait and sequences that run, both in the order of arrival."""

    def __init__(self, shape: RunnerShape, options: SchedulerOptions | None = None) -> None:
        self.options = options or SchedulerOptions()
        self.options.check()
        self.shape = shape
        self.cache = PagedCache(shape.pages, shape.page_size, reuse=self.options.reuse_prefixes)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def capacity(self) -> int:
        """The longest sequence that the cache can hold, in tokens."""
        return self.shape.pages * self.shape.page_size

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait for its turn.

        Raises:
            ResourceError: the whole cache is too small for it.
        """
        longest = len(sequence.tokens) + sequence.limit
        if longest > self.capacity:
            raise ResourceError(
                f"a prompt of {len(sequence.tokens)} tokens and {sequence.limit} new ones do not fit into a cache of "
                f"{self.capacity} tokens; ask for fewer tokens or give the cache more"
            )
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence, why: Stopped) -> None:
        """Takes a sequence out, wherever it is; its pages are free at once."""
        sequence.stopped = why
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def schedule(self, lookahead: Lookahead | None = None) -> Plan:
        """Plans a step; `lookahead` says how many drafted tokens a decoding sequence would like to check; None: none.

        Pages for all planned tokens, drafted ones included, are held when this returns.
        """
        for sequence in self.running:
            self._turn_long(sequence)
        before = self.preemptions
        planned: dict[int, Work] = {}
        self._plan_decoding(planned)
        self._plan_prompts(planned)
        copies: list[tuple[int, int]] = []
        if self.preemptions == before:  # else whoever was thrown out would come back at once
            self._admit(planned, copies)
            if lookahead is not None:
                self._plan_drafts(planned, lookahead)
        return Plan([planned[sequence.number] for sequence in self.running if sequence.number in planned], copies)

    def computed(self, work: Work) -> None:
        """Tells that a step's tokens are in the cache; to be called before drawn tokens are appended."""
        self._advance(work.sequence, work.sequence.computed + work.count)

    def accepted(self, sequence: Sequence) -> None:
        """Tells that all tokens but the newest are in the cache: drafted ones were right and have been appended."""
        self._advance(sequence, len(sequence.tokens) - 1)

    def _advance(self, sequence: Sequence, computed: int) -> None:
        sequence.computed = computed
        size, salt = self.shape.page_size, _salt(sequence)
        for index in range(len(sequence.hashes), computed // size):
            before = sequence.hashes[-1] if sequence.hashes else None
            tokens = sequence.tokens[index * size : (index + 1) * size]
            sequence.hashes.append(self.cache.seal(sequence.pages[index], before, tokens, salt))

    def _turn_long(self, sequence: Sequence) -> None:
        """A sequence that has outgrown the short rotary factors is computed again with the long ones."""
        switch = self.shape.rope_switch
        if switch is not None and len(sequence.tokens) > switch and not sequence.long:
            self._give_back(sequence)
            sequence.long = True

    def _left(self, planned: dict[int, Work]) -> int:
        return self.options.max_step_tokens - sum(work.count + work.room for work in planned.values())

    def _plan_decoding(self, planned: dict[int, Work]) -> None:
        for sequence in list(self.running):
            if sequence not in self.running:  # an older one needed its pages
                return
            if sequence.missing == 1 and self._make_room(sequence, sequence.computed + 1, planned):
                planned[sequence.number] = Work(sequence, 1)

    def _plan_prompts(self, planned: dict[int, Work]) -> None:
        for sequence in list(self.running):
            if sequence not in self.running:
                return
            count = min(sequence.missing, self._left(planned))
            if count < 1 or sequence.number in planned:
                continue
            if self._make_room(sequence, sequence.computed + count, planned):
                planned[sequence.number] = Work(sequence, count)

    def _plan_drafts(self, planned: dict[int, Work], lookahead: Lookahead) -> None:
        if all(work.draws and work.count == 1 for work in planned.values()):
            for work in planned.values():
                work.room = self._room_for_drafts(work.sequence, min(lookahead(work.sequence), self._left(planned)))

    def _room_for_drafts(self, sequence: Sequence, wanted: int) -> int:
        """How many drafted tokens get pages; nobody is thrown out for them."""
        known = len(sequence.tokens)
        most = sequence.limit - sequence.made_count - 1  # one more token is always drawn behind the accepted ones
        if self.shape.rope_switch is not None and not sequence.long:
            most = min(most, self.shape.rope_switch - known)
        wanted = max(0, min(wanted, most))
        while wanted and not self._hold_pages(sequence, known + wanted):
            wanted -= 1
        return wanted

    def _admit(self, planned: dict[int, Work], copies: list[tuple[int, int]]) -> None:
        while self.waiting and len(self.running) < self.options.max_sequences and self._left(planned) > 0:
            sequence = self.waiting[0]
            known = len(sequence.tokens)
            switch = self.shape.rope_switch
            sequence.long = switch is not None and known > switch
            found = self.cache.find(sequence.tokens, _salt(sequence))
            # A page more for its next token, one to copy into where it is known whole, and what the others need next.
            needed = self.cache.pages_for(known + 1) - len(found) + (len(found) * self.shape.page_size == known)
            needed += sum(map(self._next_pages, self.running))
            if needed > self.cache.free_after(found):
                if self.running:
                    return
                found = []  # alone it fits, if nothing has to be copied
            self._take_over(sequence, found, copies)
            fits = self._hold_pages(sequence, known)
            assert fits, "a sequence that the cache cannot hold was refused when it came"
            self.running.append(self.waiting.pop(0))
            planned[sequence.number] = Work(sequence, min(sequence.missing, self._left(planned)))

    def _next_pages(self, sequence: Sequence) -> int:
        """How many pages a running sequence will ask for within a page of tokens."""
        longest = len(sequence.request.prompt) + sequence.limit
        return self.cache.pages_for(min(len(sequence.tokens) + self.shape.page_size, longest)) - len(sequence.pages)

    def _take_over(self, sequence: Sequence, found: list[int], copies: list[tuple[int, int]]) -> None:
        """Begins behind a known prefix; of a prompt that is known whole, the last token is computed for its logits."""
        self.cache.hold(found)
        sequence.pages = list(found)
        sequence.computed = len(found) * self.shape.page_size
        salt = _salt(sequence)
        if found and sequence.computed == len(sequence.tokens):
            sequence.computed -= 1
            written = self.cache.writable(found[-1])
            assert written is not None, "a page for the copy was counted"
            sequence.pages[-1], copy = written
            copies.extend([] if copy is None else [copy])
        size = self.shape.page_size
        for index in range(sequence.computed // size):
            before = sequence.hashes[-1] if sequence.hashes else None
            tokens = sequence.tokens[index * size : (index + 1) * size]
            sequence.hashes.append(self.cache.seal(sequence.pages[index], before, tokens, salt))

    def _make_room(self, sequence: Sequence, tokens: int, planned: dict[int, Work]) -> bool:
        """Pages for this many tokens, from younger sequences if need be; False: it was thrown out itself."""
        while not self._hold_pages(sequence, tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            planned.pop(youngest.number, None)
            if youngest is sequence:
                return False
        return True

    def _hold_pages(self, sequence: Sequence, tokens: int) -> bool:
        wanted = self.cache.pages_for(tokens) - len(sequence.pages)
        taken = self.cache.take(wanted) if wanted > 0 else []
        if taken is None:
            return False
        sequence.pages.extend(taken)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        place = sum(other.number < sequence.number for other in self.waiting)
        self.waiting.insert(place, sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.cache.release(sequence.pages)
        sequence.pages, sequence.hashes, sequence.computed = [], [], 0
        sequence.restarts += 1


def _salt(sequence: Sequence) -> bytes:
    return b"long" if sequence.long else b""
