"""Search for the best network between two checkpoints."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.guards.budget import AIM
from fast.adapt.guards.forgetting import ForgettingMeter
from fast.adapt.result import Record
from fast.data.source_inputs import SourceInputs
from fast.errors import warn
from fast.heads import Head, task_head
from fast.heads.batch_norm import per_task_norms
from fast.heads.outputs import source_logits
from fast.models.signature import signature_of
from fast.train.rewind.checkpoints import both
from fast.train.rewind.result import LINE, TUNED, RewindConfig, Rewound, lost_at
from fast.train.rewind.source_head import SourceHead
from fast.train.rewind.statistics import MovingStatistics
from fast.train.rewind.target import Target
from fast.train.rewind.way import Way

log = logging.getLogger("fast")
# The target's head is left alone where its accuracy falls by no more than this, which is two or
# three of the samples that measure it.
TOLERANCE = 0.02
# How many places on the line are measured. The loss grows with the square of the place, or faster.
LOOKS, EXPONENT = 3, 2.0
# How many source inputs move the statistics of batch norms, and how many the source's head is
# fitted to.
STATISTICS_SAMPLES, HEAD_SAMPLES = 64, 256


class Search:
    """One call of `fast.rewind`.

    Args:
        config: the options.
        network: the network at w0, with its own head.
        head: its head.
        state: the weights w1, under the names of `network`.
        sample: a batch of source inputs.
        work: source inputs that the search works with.
        meter: measures what is lost, on other source inputs.
        data: samples of the target task, or None.
    """

    def __init__(
        self,
        config: RewindConfig,
        network: nn.Module,
        head: Head,
        state: dict[str, Tensor],
        *,
        sample: Any,
        work: SourceInputs,
        meter: ForgettingMeter,
        data: Any,
    ) -> None:
        self.config, self.meter = config, meter
        starts = {n: x.detach().clone() for n, x in network.state_dict().items()}
        self.accuracy_before = self._source_accuracy(network)
        self.model = both(network, state, sample, head).eval()
        device = next(self.model.parameters()).device
        params = _moved(self.model, starts)
        self.target = None
        if data is not None:
            self.target = Target(data, self.model, device, config.seed)
        self.way = Way(list(params.values()), [starts[n] for n in params])
        self.way.go(0.0)
        work = work.to(device)
        some = [work.part(0, STATISTICS_SAMPLES).inputs]
        self.source_statistics = MovingStatistics(self.model, some, source=True)
        self.way.followers.append(self.source_statistics)
        if not meter.by_features:  # else nothing depends on the source's head
            part = work.part(0, HEAD_SAMPLES)
            self.way.followers.append(SourceHead(self.model, part))
        self.history: list[Record] = []

    def run(self) -> Rewound:
        """Search the line, fit what belongs to the tasks, and return the network."""
        budget = self.config.budget
        assert budget is not None
        self.way.go(1.0)
        cost = self._look(TUNED)
        at_end = self.history[-1]
        if self.target is not None:
            at_end["target_accuracy"] = self.target.accuracy(self.model)
        if cost > budget.amount:
            self.way.land(
                lambda: self._look(LINE),
                lost=cost,
                aim=AIM * budget.amount,
                exponent=EXPONENT,
                checks=LOOKS,
            )
        record = next(r for r in self.history if r["place"] == self.way.place)
        if record is at_end:
            log.info("the tuned network keeps the budget: its weights are returned as they are")
        elif self.target is not None:
            tuned = at_end["target_accuracy"]
            assert tuned is not None
            least = tuned - TOLERANCE
            record["target_accuracy"] = self.target.fit(self.model, least)
        else:
            statistics = MovingStatistics(self.model, [], source=False)
            statistics.mix(self.source_statistics, self.way.place)
        record["source_accuracy"] = self._source_accuracy(self.model)
        return self._result(record)

    def _look(self, stage: str) -> float:
        """Measure what is lost at the present weights, and record it."""
        cost = self.meter(self.model)
        self.history.append(
            {
                "step": len(self.history),
                "stage": stage,
                "place": self.way.place,
                "forecast": cost,
                "target_accuracy": None,
                "source_accuracy": None,
            }
        )
        return cost

    def _source_accuracy(self, model: nn.Module) -> float | None:
        """The accuracy of the source's head on the held-back samples, if these have its labels."""
        samples = self.meter.samples
        if samples.labels is None or self.meter.by_features:
            return None
        answers = source_logits(model, samples).argmax(1)
        return (answers == samples.labels).double().mean().item()

    def _result(self, record: Record) -> Rewound:
        unknown = []
        if self.target is None and record["stage"] == LINE:
            sentence = (
                "no target data were given: how much of the target task is left is not known, and "
                "its head was not taught again"
            )
            unknown.append(sentence)
            warn(sentence)
        return Rewound(
            model=self.model.eval(),
            history=self.history,
            config=self.config,
            source_accuracy_before=self.accuracy_before,
            chosen=record,
            inputs=signature_of(self.meter.samples.inputs),
            lost=lost_at(record),
            unknown=unknown,
        )


def _moved(model: nn.Module, starts: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that both tasks share and that fine-tuning has moved, by their names.

    Args:
        starts: w0.

    Raises:
        ValueError: there are none.
    """
    head = task_head(model)
    assert head is not None
    apart = {id(p) for m in (head, *per_task_norms(model)[0]) for p in m.parameters()}
    params = {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in apart and not torch.equal(p, starts[name])
    }
    if not params:
        raise ValueError(
            "tuned: all weights that both tasks share are those of base: there is nothing to "
            "rewind. Is it the same checkpoint twice, or was only the head trained?"
        )
    return params
