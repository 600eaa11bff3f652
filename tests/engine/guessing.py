"""A switch that is always on, for laws that must hold whenever something is guessed."""

from __future__ import annotations

from fettle.engine.payoff import Payoff
from fettle.engine.sequence import Sequence
from fettle.engine.speculative import Drafter


class Always(Payoff):
    """Guesses as many as allowed in every step."""

    def wanted(self, sequence: Sequence, drafter: Drafter) -> int:
        return self.most
