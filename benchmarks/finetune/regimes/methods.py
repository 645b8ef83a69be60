"""The methods of the table, as data: in which regimes each runs, with which options and rates.

Two regimes are told apart. *Together*: the same weights and statistics answer both tasks in one
pass. *Switched*: what is kept per task (norms, adapters) is exchanged. A row that switches nothing
is allowed in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fast.adapt.methods import METHODS as KNOWN

TOGETHER, SWITCHED = "together", "switched"
REGIMES = {TOGETHER: "one function", SWITCHED: "two functions"}
NORMS = {TOGETHER: "frozen", SWITCHED: "per_task"}
# Batch norm is what most methods can switch; the other networks here have none.
WITH_BATCH_NORM = ("resnet", "efficientnet", "crepe")
WITHOUT_NORMS = ("mobilenet",)
# Learning rates of the baselines. LP-FT's ViT was ruined at 3e-4.
USUAL: tuple[float | None, ...] = (3e-4, 1e-3)
GENTLE: tuple[float | None, ...] = (3e-5, 1e-4)
GENTLE_NETWORKS = ("vit",)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a row of the table is run.

    Attributes:
        runner: the function of `baselines` that trains it.
        options: of `fast.finetune`, or of `fast.Adaptation`.
        regimes: those in which it is run.
        norms_only: it switches batch norms and nothing else, so that a network without them has
            one row for both regimes.
        needs_norms: it is not run on a network without norms of any kind.
        needs_batch_norm: it is run on networks with batch norm alone.
        source_inputs: with (True) and without (False) source inputs; a method that has no use for
            them is run without.
        rates: learning rates, the better of which counts; None is the method's own.
        everywhere: it is also run longer and on few samples. The rest would triple the time, and
            LP-FT, LoRA and the linear probe are the hardest to beat there.
    """

    runner: str = "loop"
    options: Mapping[str, Any] = field(default_factory=dict)
    regimes: tuple[str, ...] = (TOGETHER, SWITCHED)
    norms_only: bool = True
    needs_norms: bool = False
    needs_batch_norm: bool = False
    source_inputs: tuple[bool, ...] = (False,)
    rates: tuple[float | None, ...] = USUAL
    everywhere: bool = False

    def norms(self, regime: str) -> dict[str, str]:
        """The option that keeps batch norms as the regime wants them; adapters have a rule."""
        return {} if self.options.get("method") == "adapter" else {"batch_norm": NORMS[regime]}

    @property
    def available(self) -> bool:
        """Whether `fast` has the method."""
        return self.options.get("method", "fast") in KNOWN


# Adapters and norms are few weights that start from nothing or little, and bear a higher rate.
FEW_WEIGHTS = (1e-3, 3e-3)
OURS = ("fast", "synthetic", "adapter")
METHODS: dict[str, Method] = {
    "fast": Method(
        runner="finetune",
        options={"method": "fast"},
        source_inputs=(False, True),
        rates=(None,),
        everywhere=True,
    ),
    # FAST with inputs in place of source inputs that were made from the network's batch norms.
    "synthetic": Method(
        runner="synthetic",
        options={"method": "fast"},
        needs_batch_norm=True,
        rates=(None,),
        everywhere=True,
    ),
    "adapter": Method(
        runner="finetune",
        options={"method": "adapter"},
        regimes=(SWITCHED,),
        norms_only=False,
        rates=(None,),
        everywhere=True,
    ),
    "lp-ft": Method(runner="lp_ft", options={"method": "lp-ft"}, everywhere=True),
    "vanilla": Method(options={"method": "vanilla"}),
    "linear probe": Method(
        runner="linear_probe", regimes=(TOGETHER,), rates=(None,), everywhere=True
    ),
    # Hu et al. 2021 (arXiv 2106.09685), under a random head.
    "lora": Method(
        options={"method": "adapter", "max_entropy": False, "head_steps": 0},
        regimes=(SWITCHED,),
        norms_only=False,
        rates=FEW_WEIGHTS,
        everywhere=True,
    ),
    # Under LP-FT's head, without which it learns little.
    "norm-only": Method(
        runner="norm_only",
        options={"method": "lp-ft"},
        norms_only=False,
        needs_norms=True,
        rates=FEW_WEIGHTS,
    ),
    "replay": Method(options={"method": "replay"}, source_inputs=(True,)),
    "spd": Method(runner="spd", options={"method": "lp-ft"}),
    "l2-sp": Method(options={"method": "l2-sp"}, regimes=(TOGETHER,)),
    "ewc": Method(options={"method": "ewc"}, regimes=(TOGETHER,), source_inputs=(False, True)),
}


def regimes_of(name: str, pair: str) -> tuple[str, ...]:
    """The regimes in which a method is run on a pair."""
    method = METHODS[name]
    if method.needs_norms and pair.startswith(WITHOUT_NORMS):
        return ()
    if method.needs_batch_norm and not pair.startswith(WITH_BATCH_NORM):
        return ()
    if method.norms_only and not pair.startswith(WITH_BATCH_NORM):
        return method.regimes[:1]
    return method.regimes


def rates_of(name: str, pair: str) -> tuple[float | None, ...]:
    """The learning rates of a method on a pair, the better of which counts."""
    rates = METHODS[name].rates
    return GENTLE if rates == USUAL and pair.startswith(GENTLE_NETWORKS) else rates


def allowed(regime: str, row: Mapping[str, Any], source_inputs: bool) -> bool:
    """Whether a row may be compared in a regime, and without source inputs if there are none."""
    return row["regime"] in (TOGETHER, regime) and (source_inputs or not row["source_inputs"])
