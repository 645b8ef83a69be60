"""Tell whether a resumed run does the same job: hashes of network, data and code.

The environment is recorded too. It may change a run's last bits, so a difference is only a warning.
"""

from __future__ import annotations

import hashlib
import platform
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fast import version
from fast.curvature.card import SourceCard
from fast.curvature.card.file import fingerprint
from fast.data.dataset import Data
from fast.data.generators import find_generators, held, reseed, seeded
from fast.data.reachable import PLAIN, code_of, values_of
from fast.data.source_inputs import SourceInputs
from fast.data.trees import leaves

# Samples that are read and hashed where the data are not in memory.
SAMPLES_READ = 16
PYTHON = ".".join(platform.python_version_tuple()[:2])
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def model_identity(model: nn.Module) -> str:
    """Hash of all weights and buffers, by name."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {list(value.shape)} {fingerprint(value)}\n".encode())
    return digest.hexdigest()


def code_identity(model: nn.Module, transform: Any) -> dict[str, str | None]:
    """Hashes of the network's code and settings and of the transform, by names for messages.

    Bytecode differs between versions of Python, so the version is part of a name: hashes from
    another version have other names, and are not compared.
    """
    text = _ADDRESS.sub("", repr(model)) + values_of(model=model)
    name = getattr(transform, "__qualname__", type(transform).__qualname__)
    return {
        "the network's settings (hash)": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        f"the network's code in Python {PYTHON} (hash)": code_of(model=model),
        "transform": None if transform is None else name,
        f"the transform's code in Python {PYTHON} (hash)": code_of(transform=transform),
    }


def environment(device: torch.device, transform: Any) -> dict[str, str]:
    """What may change a run's result slightly, and is no reason to refuse to resume it."""
    kind = device.type
    if kind == "cuda":
        kind = torch.cuda.get_device_name(device)
    elif kind == "cpu":
        kind = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": torch.__version__,
        "fast": version.__version__,
        "Python": PYTHON,
        "threads": str(torch.get_num_threads()),
        "device": kind,
        "values that the transform holds (hash)": values_of(transform=transform),
    }


def data_identity(data: Any) -> str | None:
    """Hash of the inputs and labels in memory.

    For a data set that is not in memory, it covers the labels that the data set records and
    `SAMPLES_READ` samples. These are read with the data set's generators at a fixed seed, and the
    generators are restored afterwards.

    Args:
        data: `Data`, `SourceInputs`, a function that measures, or None.
    """
    if data is None:
        return None
    if isinstance(data, SourceInputs):
        data = Data(name="source_inputs", inputs=data.inputs, labels=data.labels)
    if not isinstance(data, Data):
        return f"a function, {code_of(function=data)}"
    digest = hashlib.blake2b(digest_size=8)
    if data.inputs is not None:
        for x in leaves(data.inputs):
            digest.update(f"{list(x.shape)} {fingerprint(x)}\n".encode())
        if data.labels is not None:
            digest.update(fingerprint(data.labels).encode())
        return digest.hexdigest()
    targets = data.recorded_targets()
    if isinstance(targets, Tensor):
        targets = targets.tolist()
    labels = None if targets is None else list(targets)
    batches = None if data.loader is None else len(data.loader)
    digest.update(f"{data.num_samples} {batches} {labels}".encode())
    _read_samples(digest, data)
    return digest.hexdigest()


def _read_samples(digest: Any, data: Data) -> None:
    source: Any = data.dataset if data.loader is None else data.loader.dataset
    count = data.num_samples or 0
    own = find_generators(data=source).values()
    for i in np.unique(np.linspace(0, count - 1, min(count, SAMPLES_READ)).astype(int)):
        with held(own), seeded(0):
            for generator in own:
                reseed(generator, 0)
            try:
                # A view shows how the data set augments.
                sample = source.view(int(i), 0) if data.has_views else source[int(i)]
                _feed(digest, sample)
            except (LookupError, ValueError, TypeError, OSError) as error:
                # Its sampler may skip samples that cannot be read, or use keys other than numbers.
                digest.update(type(error).__name__.encode())


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{list(value.shape)} {fingerprint(value)}".encode())
    elif isinstance(value, dict):
        for key, part in value.items():
            digest.update(str(key).encode())
            _feed(digest, part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(digest, part)
    elif isinstance(value, PLAIN):
        digest.update(repr(value).encode())
    elif hasattr(value, "__array__"):  # numpy's and Pillow's
        array = np.asarray(value)
        values = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        digest.update(f"{array.dtype} {array.shape}".encode() + values)
    else:
        digest.update(type(value).__qualname__.encode())


def card_identity(card: SourceCard) -> str:
    """Hash of the weights that a card belongs to, and of what it was estimated from."""
    facts = [sorted(card.fingerprints.items()), card.num_samples, card.labels, card.temperature]
    return hashlib.blake2b(f"{facts} {card.mean!r}".encode(), digest_size=8).hexdigest()
