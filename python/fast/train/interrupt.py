"""Ctrl-C and SIGTERM wait for the end of a step, so that what the run is then can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from fast.ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside of the block the first signal is kept, and `waiting` says so; a second one acts at
    once.

    Where signals cannot be caught (in another thread than the main one) or are ignored, nothing is
    done. The handlers from before the block have the last word: `deliver` calls them.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: int | None = None

    @property
    def waiting(self) -> bool:
        return self._came is not None

    def waits_on_any(self, ranks: Ranks) -> bool:
        """Whether a signal came to one of the ranks: it has then come to all of them."""
        came = ranks.largest(self._came or 0)
        if came:
            self._came = came
        return bool(came)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._keep)
        return self

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.waiting:
            self._act(number)
        else:
            self._came = number

    def deliver(self) -> None:
        """Do now what the signal that came asks for; usually this does not return."""
        came, self._came = self._came, None
        if came is not None:
            self._act(came)

    def _act(self, number: int) -> None:
        if number not in self._before:  # ignored here, and not where it came
            raise KeyboardInterrupt
        signal.signal(number, self._before[number])
        signal.raise_signal(number)
        signal.signal(number, self._keep)  # a handler of the user's, which returned

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if error is None:
            self.deliver()
