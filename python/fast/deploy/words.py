"""The words by which tasks and formats are named, in Python and on the command line.

This module loads no torch, because the command line reads it for its help.
"""

from __future__ import annotations

from typing import Literal

Task = Literal["target", "source", "both"]
ExportFormat = Literal["onnx", "torch.export", "safetensors", "hf", "timm"]
