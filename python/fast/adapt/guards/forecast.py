"""From how far the weights have moved to what the source has lost, between two measurements."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fast.curvature.card.calibrate import EXPONENTS, Calibration

# Two checks tell the exponent of the forecast where the energy grew by this factor between them.
APART = 1.3
# The energy is that of the drift where there is no card, and the first check sets its scale.
UNKNOWN = Calibration(scale=math.nan, exponent=1.0, spread=math.inf, coherence=math.nan)


class Forecast:
    """`lost = scale * energy ** exponent`, through the last checks.

    Args:
        calibration: of the card, or `UNKNOWN` where there is none.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.checked: tuple[float, float] | None = None

    def __call__(self, energy: float) -> float:
        return self.calibration.nats(energy) if math.isfinite(energy) else math.nan

    def update(self, energy: float, measured: float) -> None:
        """Go through a new measurement from now on; one that shows no loss tells nothing."""
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
