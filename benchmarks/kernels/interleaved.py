"""Methods timed in turn, round by round, so that a busy machine is busy for all of them alike."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

# A round counts as quiet when other processes had less than this share of one core in it.
QUIET_SHARE = 0.12
QUIET_ROUNDS = 5


def other_seconds() -> float:
    """CPU seconds of all other processes since boot; 0 where the system has no /proc/stat."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(x) for x in file.readline().split()[1:]]
    except OSError:
        return 0.0
    busy = (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    this = resource.getrusage(resource.RUSAGE_SELF)
    return busy - this.ru_utime - this.ru_stime


@dataclass(kw_only=True)
class Round:
    """Seconds of each method in one round; `others`: the load of other processes, as a share of one
    core."""

    wall: dict[str, float]
    cpu: dict[str, float]
    others: float


def _round(methods: dict[str, Callable[[], object]]) -> Round:
    result = Round(wall={}, cpu={}, others=0.0)
    others, begin = other_seconds(), time.perf_counter()
    for name, step in methods.items():
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        result.wall[name] = time.perf_counter() - wall
        result.cpu[name] = time.process_time() - cpu
    result.others = (other_seconds() - others) / (time.perf_counter() - begin)
    return result


class Rounds:
    """Rounds until `seconds` have passed, at least `least` of them.

    The figures are those of the quiet rounds, if there are enough of them.
    """

    def __init__(
        self, methods: dict[str, Callable[[], object]], seconds: float, least: int
    ) -> None:
        self.all: list[Round] = []
        end = time.perf_counter() + seconds
        while len(self.all) < least or time.perf_counter() < end:
            self.all.append(_round(methods))
        quiet = [r for r in self.all if r.others < QUIET_SHARE]
        self.only_quiet = len(quiet) >= QUIET_ROUNDS
        self.quiet_count = len(quiet)
        self.sample = quiet if self.only_quiet else self.all

    def wall(self, name: str) -> list[float]:
        return [r.wall[name] for r in self.sample]

    def cpu(self, name: str) -> float:
        """Median process CPU time of one step, all threads together."""
        return median(r.cpu[name] for r in self.sample)

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of the ratio of wall times within a round."""
        return median(r.wall[name] / r.wall[base] for r in self.sample)

    def cpu_ratio(self, name: str, base: str) -> float:
        return median(r.cpu[name] / max(r.cpu[base], 1e-9) for r in self.sample)

    def others(self) -> float:
        return median(r.others for r in self.sample)
