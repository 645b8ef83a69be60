"""Forecast, between measurements, what the source has lost from how far the weights have moved."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fast.curvature.card.calibrate import EXPONENTS, Calibration

# Two checks determine the exponent if the energy changed by this factor between them.
APART = 1.3
# Without a card the energy is that of the drift, and the first check sets the scale.
UNKNOWN = Calibration(scale=math.nan, exponent=1.0, spread=math.inf, coherence=math.nan)


class Forecast:
    """`lost = scale * energy ** exponent`, fitted to the last checks.

    Args:
        calibration: the card's, or `UNKNOWN` where there is no card.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.checked: tuple[float, float] | None = None

    def __call__(self, energy: float) -> float:
        return self.calibration.nats(energy) if math.isfinite(energy) else math.nan

    def update(self, energy: float, measured: float) -> None:
        """Fit the curve to a new measurement; one that shows no loss is ignored."""
        if not (energy > 0 and measured > 0 and math.isfinite(measured)):
            return
        exponent = self.calibration.exponent
        if self.checked is not None:
            before, lost = self.checked
            if max(energy, before) > APART * min(energy, before):
                slope = math.log(measured / lost) / math.log(energy / before)
                exponent = min(max(slope, EXPONENTS[0]), EXPONENTS[1])
        self.checked = (energy, measured)
        self.calibration = self.calibration.through(energy, measured, exponent)

    def state_dict(self) -> dict[str, Any]:
        c = self.calibration
        return {"scale": c.scale, "exponent": c.exponent, "checked": self.checked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calibration = replace(
            self.calibration, scale=float(state["scale"]), exponent=float(state["exponent"])
        )
        checked = state["checked"]
        self.checked = None if checked is None else (float(checked[0]), float(checked[1]))
