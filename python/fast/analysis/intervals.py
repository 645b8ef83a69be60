"""Confidence intervals of a mean over few seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def half_interval(values: Sequence[float], confidence: float = 0.95) -> float:
    """Half the width of the confidence interval of the mean of two or more values (Student's t)."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf((1 + confidence) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
