"""The search for the best network between two checkpoints, stage by stage."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.guards.budget import AIM
from fast.adapt.guards.forgetting import ForgettingMeter
from fast.data.source_inputs import SourceInputs
from fast.errors import warn
from fast.heads import find_head, task_head
from fast.heads.batch_norm import per_task_norms
from fast.heads.outputs import source_logits
from fast.merge.rewind.checkpoints import both
from fast.merge.rewind.coefficients import reaches
from fast.merge.rewind.features import SourceFeatures
from fast.merge.rewind.restore import restore
from fast.merge.rewind.result import TUNED, RewindConfig, Rewound
from fast.merge.rewind.statistics import MovingStatistics
from fast.merge.rewind.target import Target
from fast.merge.rewind.way import Way

log = logging.getLogger("fast")
LINE, LAYERS, RESTORED = "line", "layers", "restored"
# The target is kept where it loses no more than this, which is two or three of the samples that
# measure it.
KEPT = 0.02
# Looks of a search, and the held-back samples that one takes; the end is measured on all.
LOOKS, SAMPLES = 4, 128
# The loss grows about with the square of the place. Restoring starts further on than the budget
# allows, where the network knows more of the target, and takes back what is over.
EXPONENT, FURTHER = 2.0, 1.4
# Source inputs whose features are brought back.
FEATURES_SAMPLES = 192
# Source inputs that batch norm statistics are moved by.
STATISTICS_SAMPLES = 64


class Search:
    """The stages of one call of `fast.rewind`.

    Args:
        config: the options.
        network: at w0, with its own head.
        state: w1, under the names of `network`.
        sample: source inputs, to find the head by.
        work: source inputs that the stages may use.
        meter: measures what is lost, on others.
        data: of the target task, or None.
    """

    def __init__(
        self,
        config: RewindConfig,
        network: nn.Module,
        state: dict[str, Tensor],
        sample: Any,
        work: SourceInputs,
        meter: ForgettingMeter,
        data: Any,
    ) -> None:
        self.config, self.meter = config, meter
        assert config.budget is not None
        self.budget = config.budget
        layer = find_head(network, sample, config.head_name)
        starts = {n: x.detach().clone() for n, x in network.state_dict().items()}
        self.accuracy_before = self._source_accuracy(network)
        self.model = both(network, state, sample, layer).eval()
        task = task_head(self.model)
        assert task is not None
        apart = {id(p) for m in (task, *per_task_norms(self.model)[0]) for p in m.parameters()}
        self.shared = {
            n: p
            for n, p in self.model.named_parameters()
            if id(p) not in apart and not torch.equal(p, starts[n])
        }
        if not self.shared:
            raise ValueError(
                "tuned: all weights that both tasks share are those of base: there is nothing to "
                "rewind. Is it the same checkpoint twice, or was only the head trained?"
            )
        self.starts = [starts[n] for n in self.shared]
        self.ends = [p.detach().clone() for p in self.shared.values()]
        self.target = None
        if data is not None:
            device = next(self.model.parameters()).device
            self.target = Target(data, task.num_classes, device, config.seed)
        self.target_statistics = MovingStatistics(self.model, [], source=False)
        self.work = work.to(next(self.model.parameters()).device)
        some_inputs = self.work.part(0, STATISTICS_SAMPLES).inputs
        for p, start in zip(self.shared.values(), self.starts, strict=True):
            p.data.copy_(start)
        self.source_statistics = MovingStatistics(self.model, [some_inputs], source=True)
        self.line = self._way()
        self.history: list[dict[str, Any]] = []
        self.best: tuple[nn.Module, dict[str, Any]] | None = None
        self.unknown: list[str] = []

    def run(self) -> Rewound:
        self.line.go(1.0)
        self._look(TUNED, 1.0, whole=True)
        tuned = self.history[-1]
        if self.target is not None:
            tuned["target_accuracy"] = self.target.accuracy(self.model)
        if tuned["forecast"] <= self.budget.amount:
            log.info("the tuned network keeps the budget: it is returned as it is")
            self._settle(tuned)
        else:
            self._stages(tuned)
        return self._result()

    def _stages(self, tuned: dict[str, Any]) -> None:
        target = self.target
        self._land(LINE, self.line, tuned["forecast"])
        if target is None:
            self.unknown.append(
                "no target data were given: how much of the target task is left is not known, and "
                "the stages that would trade it for the source were left out"
            )
            return
        if self._kept(tuned) or self.line.place == 0.0:
            return
        place = self.line.place
        self.line.go(0.0)
        features = SourceFeatures(self.model, self.work.part(0, FEATURES_SAMPLES))
        self.line.go(place)
        differences = dict(
            zip(self.shared, (b - a for a, b in zip(self.starts, self.ends, strict=True)),
                strict=True)
        )  # fmt: skip
        reach = reaches(self.model, self.shared, differences, place=place,
                        features=features, target=target)  # fmt: skip
        best = self.line
        layers = self._way(reach)
        # About as much moves at `place / spread` of this way as on the line at `place`.
        spread = (sum(r * r for r in reach) / len(reach)) ** 0.5
        self._land(LAYERS, layers, AIM * self.budget.amount * (spread / place) ** EXPONENT)
        assert self.best is not None
        if self.best[1]["stage"] == LAYERS:
            best = layers
        if self._kept(tuned):
            return
        best.go(min(1.0, FURTHER * best.place))
        self._restore(features, target)

    def _restore(self, features: SourceFeatures, target: Target) -> None:
        """The third stage; afterwards the line from w0 takes back what is over the budget."""
        source = [p for norm in self.source_statistics.norms for p in norm.parameters()]
        before = [p.detach().clone() for p in source]
        params = [*self.shared.values()]
        restore(self.model, params, features=features, target=target, seed=self.config.seed)
        moved = [*params, *source]
        way = Way(
            params=moved,
            starts=[*self.starts, *before],
            ends=moved,
            statistics=self.source_statistics,
        )
        way.go(1.0)
        lost = self._look(RESTORED, 1.0)
        self._land(RESTORED, way, lost)

    def _way(self, reach: Sequence[float] | None = None) -> Way:
        return Way(
            params=list(self.shared.values()),
            starts=self.starts,
            ends=self.ends,
            reach=reach,
            statistics=self.source_statistics,
        )

    def _land(self, stage: str, way: Way, lost: float) -> None:
        """Go to where the budget is spent, teach the head there, and keep the best of all stages.

        Args:
            lost: at place 1.
        """
        aim = AIM * self.budget.amount
        if lost > aim:
            lost = way.land(
                lambda: self._look(stage, way.place),
                lost=lost,
                aim=aim,
                exponent=EXPONENT,
                checks=LOOKS if stage == LINE else LOOKS // 2,
            )
        if way.place == 0.0 and self.best is not None:
            return
        lost = self._look(stage, way.place, whole=True)
        if lost > self.budget.amount:  # those that were looked at were luckier than the others
            way.go(way.place * (aim / lost) ** (1 / EXPONENT))
            self._look(stage, way.place, whole=True)
        record = self.history[-1]
        if self.target is None:
            self.target_statistics.mix(self.source_statistics, way.place)
        else:  # What the source loses does not depend on the target's head.
            record["target_accuracy"] = self.target.teach_head(self.model)
        self._settle(record)

    def _look(self, stage: str, place: float, *, whole: bool = False) -> float:
        """Measure what is lost where the weights are, and record it.

        Args:
            whole: measure on all samples that were held back.
        """
        lost = self.meter(self.model, None if whole else SAMPLES)
        self.history.append(
            {
                "step": len(self.history),
                "stage": stage,
                "place": place,
                "forecast": lost,
                "target_accuracy": None,
                "source_accuracy": self._source_accuracy(self.model) if whole else None,
            }
        )
        return lost

    def _settle(self, record: dict[str, Any]) -> None:
        """Keep the network of now, if it is the best so far."""
        if self.best is not None:
            kept, is_inside = self.best[1], record["forecast"] <= self.budget.amount
            if not is_inside or record["target_accuracy"] <= kept["target_accuracy"]:
                return
        self.best = copy.deepcopy(self.model), record

    def _kept(self, tuned: dict[str, Any]) -> bool:
        assert self.best is not None
        return self.best[1]["target_accuracy"] >= tuned["target_accuracy"] - KEPT

    def _source_accuracy(self, model: nn.Module) -> float | None:
        """By the source's head, on the samples that were held back, where they have its labels."""
        held = self.meter.samples
        if held.labels is None or self.meter.by_features:
            return None
        answers = source_logits(model, held).argmax(1)
        return (answers == held.labels).double().mean().item()

    def _result(self) -> Rewound:
        assert self.best is not None
        model, record = self.best
        if record["forecast"] > self.budget.amount:
            self.unknown.append(
                f"{record['forecast']:.3g} is lost on all inputs that were held back, and the "
                f"budget of {self.budget} was kept on {SAMPLES} of them only"
            )
        for sentence in self.unknown:
            warn(sentence)
        return Rewound(
            model=model.eval(),
            history=self.history,
            config=self.config,
            source_accuracy_before=self.accuracy_before,
            chosen=record,
            lost=record["forecast"],
            unknown=self.unknown,
        )
