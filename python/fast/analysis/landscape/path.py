"""The weights of a run, kept at every evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.result import Record, Result
from fast.curvature.card.answers import backbone_parameters
from fast.data.dataset import as_data
from fast.heads import has_batch_norm, source_task, task_head, unwrap
from fast.train.measure import evaluate


@dataclass(kw_only=True)
class WeightPath:
    """The backbone weights of one run at its evaluations.

    Attributes:
        name: for legends, usually the name of the method.
        steps: `[n]` optimizer steps, the first of them 0.
        weights: `[n, P]` backbone weights after those steps, on the CPU; row 0 is pretrained.
        parameters: names of the parameters, in the order in which they are flattened.
        model: the adapted network; it answers both tasks.
        history: the record of `fast.finetune` for each step.
    """

    name: str
    steps: list[int]
    weights: Tensor = field(repr=False)
    parameters: tuple[str, ...] = field(repr=False)
    model: nn.Module = field(repr=False)
    history: list[Record] = field(default_factory=list, repr=False)


class PathRecorder:
    """Measures the source accuracy of a run, and keeps the weights at which it did.

    ```python
    recorder = fast.PathRecorder((x_source, y_source))
    result = fast.finetune(model, train, val, source=recorder)
    path = recorder.path(result)
    ```

    Costs 4 bytes of memory for each backbone weight and evaluation.

    Args:
        source: what `fast.finetune` takes as `source`: `(x, y)`, a Dataset or a DataLoader.
        batch_size: samples of a forward pass.
    """

    def __init__(self, source: Any, batch_size: int = 128) -> None:
        self.data, self.batch_size = as_data(source, "source"), batch_size
        self.parameters: tuple[str, ...] = ()
        self.rows: list[Tensor] = []

    def __call__(self, model: nn.Module) -> float:
        """Source accuracy of `model`, in 0..1; it is left as it was."""
        model = unwrap(model)
        if task_head(model) is not None:  # before the run the model still has its own head
            params = backbone_parameters(model, None)
            self.parameters = tuple(params)
            self.rows.append(flatten(list(params.values())))
        device = next(model.parameters()).device
        with source_task(model):
            return evaluate(model, self.data, self.batch_size, device).accuracy

    def path(self, result: Result, name: str | None = None) -> WeightPath:
        """The path of the run that this recorder was given to.

        Args:
            name: for legends (default: the name of the method).

        Raises:
            ValueError: the recorder was given to another run, to several, or to a resumed one; or
                the run changed the source task's batch norm statistics.
        """
        assert result.plan is not None, "fast.finetune gives its plan back"
        if result.plan.batch_norm == "track" and has_batch_norm(result.model):
            raise ValueError(
                "batch_norm='track' changes the source loss by statistics, which are no place in "
                "a landscape of weights: use 'frozen' or 'per_task'"
            )
        if result.plan.adapter_rank:
            raise ValueError(
                f"method {result.plan.method!r} moves no weight of the source task: there is no "
                "path to draw"
            )
        if len(self.rows) != len(result.history):
            raise ValueError(
                f"the recorder has weights of {len(self.rows)} evaluations, the run made "
                f"{len(result.history)}: give each run a recorder of its own, and do not resume it"
            )
        return WeightPath(
            name=name or result.plan.method,
            steps=[row["step"] for row in result.history],
            weights=torch.stack(self.rows),
            parameters=self.parameters,
            model=result.model,
            history=result.history,
        )


@torch.no_grad()
def flatten(params: list[nn.Parameter]) -> Tensor:
    """Parameters one after the other, `[P]`, on the CPU."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    return torch.cat([p.detach().flatten().to("cpu", dtype) for p in params])
