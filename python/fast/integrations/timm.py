"""timm's training scripts: the optimizers in its registry, and the method as a training task.

Importing this module registers `anchoredadamw` and `anchoredsgd`. Their names have no underscore,
because timm reads the part before an underscore as a wrapper (`lookahead_adamw`), and would turn
`anchored_adamw` into a plain AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from timm.task import ClassificationTask
from torch import Tensor, nn

from fast.adapt.adaptation import Adaptation
from fast.optim import SGD, AdamW


class AnchoredAdamW(AdamW):
    """`fast.AdamW`, after a check that no new head is anchored; `anchoredadamw` in timm.

        create_optimizer_v2(model, "anchoredadamw", param_group_fn=functools.partial(
            fast.param_groups, lr=1e-3, anchor_decay=5.0, layer_decay=0.75))

    Raises:
        ValueError: a weight matrix of zeros would be pulled back to zero.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(_checked(params, options), **options)


class AnchoredSGD(SGD):
    """`fast.SGD`, after the same check; `anchoredsgd` in timm."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(_checked(params, options), **options)


def _checked(params: Iterable[Any], options: dict[str, Any]) -> list[Any]:
    params = list(params)
    default = options.get("anchor_decay", 0.0)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    for group in groups:
        group["params"] = list(group["params"])
        if not group.get("anchor_decay", default):
            continue
        for p in group["params"]:
            if p.dim() > 1 and p.requires_grad and not p.any():
                raise ValueError(
                    f"anchor_decay: a weight of shape {list(p.shape)} is zero, as that of a new "
                    "head is, and would be pulled back to zero. timm's groups do not tell head "
                    "and backbone apart; pass param_group_fn=functools.partial(fast.param_groups, "
                    "lr=..., anchor_decay=...) to create_optimizer_v2"
                )
    return params


for _info in (
    OptimInfo(
        name="anchoredadamw",
        opt_class=AnchoredAdamW,
        description="fast.AdamW: AdamW with a pull towards the pretrained weights",
        has_betas=True,
    ),
    OptimInfo(
        name="anchoredsgd",
        opt_class=AnchoredSGD,
        description="fast.SGD: SGD with momentum and a pull towards the pretrained weights",
        has_eps=False,
        has_momentum=True,
    ),
):
    default_registry.register(_info)


class AdaptationTask(ClassificationTask):
    """`fast.Adaptation` as a task of timm's training loop.

        adaptation = fast.Adaptation(model, train, source_inputs=kept, steps=1000, augmented=True)
        task = AdaptationTask(adaptation, criterion_kwargs={"smoothing": 0.1})
        for inputs, target in loader:
            task(inputs, target)["loss"].backward()
            adaptation.optimizer.step(); adaptation.optimizer.zero_grad()

    The task's checkpoints hold the state of the adaptation. `prepare_distributed`, `compile` and
    `setup_ema` are timm's.

    Args:
        adaptation: adapts a classifier; its optimizer takes the steps.
        criterion: a loss of logits `[B, C]` and targets, a mean over the batch.
        criterion_kwargs: in place of a criterion, the arguments of timm's
            `create_classification_loss`.
        verbose: log which loss is used.
    """

    def __init__(
        self,
        adaptation: Adaptation,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
    ) -> None:
        first = next(adaptation.model.parameters())
        super().__init__(
            adaptation.model,
            criterion,
            criterion_kwargs=criterion_kwargs,
            device=first.device,
            dtype=first.dtype,
            verbose=verbose,
        )
        self.adaptation = adaptation

    def forward(
        self, input: Tensor, target: Tensor, rows: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss with the penalty.

        Args:
            input: `[B, ...]`.
            target: what the criterion takes: classes `[B]`, or soft labels `[B, C]`.
            rows: see `fast.Adaptation.forward`.

        Returns:
            `loss`, which is `task_loss` and `penalty` together, `[]` each; and `output`, the target
            logits `[B, C]`.
        """
        output, penalty = self.adaptation.forward(input, rows, model=self.trainable_module)
        loss = self.criterion(output, target)
        return {
            "loss": loss + penalty,
            "output": output,
            "task_loss": loss.detach(),
            "penalty": penalty.detach(),
        }

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {} if ema else self.adaptation.state_dict()

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Go on from a state.

        Raises:
            ValueError: there is no state, or it belongs to another adaptation.
        """
        if ema or (state is None and not strict):
            return
        if state is None:
            raise ValueError("the checkpoint has no task state: it is of another task")
        self.adaptation.load_state_dict(state)
