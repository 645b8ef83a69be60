"""What the campaigns share: a seed that is printed and can be set, and cases that are counted."""

from __future__ import annotations

import os
import random
from collections import Counter

SEED = int(os.environ.get("FAST_CAMPAIGN_SEED", "0"))


def cases(default: int) -> int:
    """How many; FAST_CAMPAIGN_CASES says otherwise."""
    return int(os.environ.get("FAST_CAMPAIGN_CASES", default))


class Campaign:
    """Counts outcomes; at the end prints them with the seed, and fails where one was wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.random = random.Random(f"{name} {SEED}")
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def count(self, outcome: str, wrong: str | None = None) -> None:
        """One more case; `wrong` describes one that should not have come out so."""
        self.outcomes[outcome] += 1
        if wrong is not None:
            self.wrong.append(f"{outcome}: {wrong}")

    def finish(self, capsys) -> None:
        with capsys.disabled():
            told = ", ".join(f"{count} {what}" for what, count in sorted(self.outcomes.items()))
            print(f"\n{self.name}, seed {SEED}: {self.outcomes.total()} cases: {told}")
            for line in self.wrong:
                print(f"  {line}")
        assert not self.wrong
