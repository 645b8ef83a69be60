"""`fast audit`."""

from __future__ import annotations

import torch

from fast.cli.failures import FAILED
from fast.cli.spec import AuditSpec
from fast.curvature import audit
from fast.models.load import load_model


def run(spec: AuditSpec) -> int:
    """Print the table. The exit code is 0 if each of our products is exact or refused."""
    assert spec.model is not None
    assert spec.input is not None
    torch.manual_seed(spec.seed)
    model = load_model(spec.model, pretrained=False).model.train(spec.train)
    x = torch.randint(spec.tokens, spec.input) if spec.tokens else torch.randn(spec.input)
    report = audit(model, x, seed=spec.seed)
    print(report)
    names = ", ".join(report.wrong) or "none"
    print(f"\nmodules with a wrong second derivative in torch {report.torch}: {names}")
    return 0 if report.ok else FAILED
