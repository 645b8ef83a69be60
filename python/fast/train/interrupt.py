"""Ctrl-C and SIGTERM wait for the end of a step, so that the run can be saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from fast.ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Holds back the first signal inside the block; a second one acts at once.

    `waiting` tells whether a signal is held back, and `deliver` passes it on to the handler that
    was there before. Signals that are ignored, and those in threads other than the main one, are
    left alone.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: int | None = None

    @property
    def waiting(self) -> bool:
        return self._came is not None

    def waits_on_any(self, ranks: Ranks) -> bool:
        """Whether any rank got a signal; all of them then act as if they had got it."""
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
        """Act on the signal that was held back; usually this does not return."""
        came, self._came = self._came, None
        if came is not None:
            self._act(came)

    def _act(self, number: int) -> None:
        if number not in self._before:  # ignored in this process, but not on the rank that got it
            raise KeyboardInterrupt
        signal.signal(number, self._before[number])
        signal.raise_signal(number)
        signal.signal(number, self._keep)  # the user's handler has returned

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
