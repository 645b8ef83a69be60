"""The states of an adaptation through torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fast


def states(adaptation: fast.Adaptation) -> dict[str, Any]:
    """The states of its network, its optimizer, and itself."""
    model, optimizer = get_state_dict(adaptation.model, adaptation.optimizer)
    return {"model": model, "optimizer": optimizer, "adaptation": adaptation.state_dict()}


def load(adaptation: fast.Adaptation, folder: Path) -> None:
    """Go on from what `dcp.save(states(...), checkpoint_id=folder)` has written."""
    loaded = states(adaptation)
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        adaptation.model,
        adaptation.optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    adaptation.load_state_dict(loaded["adaptation"])
