"""Networks by name: `timm:`, `torchvision:`, `transformers:NAME`, or `file.py:Factory(args)`."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fast.errors import distribution, first_line
from fast.train.weights import load_weights

LIBRARIES = ("timm", "torchvision", "transformers")
_SPEC = re.compile(r"(?P<where>[^()]+?):(?P<name>[^():]+)(?:\((?P<args>.*)\))?", re.DOTALL)


@dataclass
class LoadedModel:
    """A network with what is known about its input.

    size, mean, std: of the images it was trained on; None where the network does not say.
    tokenizer: of a text network from transformers.
    notes: what a reader of the run should know, one line each.
    """

    model: nn.Module
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> int | None:
        """Image channels: those of the first convolution; None without one, or not 1 or 3."""
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                return module.in_channels if module.in_channels in (1, 3) else None
        return None


def load_model(
    spec: str,
    weights: str | Path | None = None,
    *,
    allow_missing: bool = False,
    pretrained: bool = True,
) -> LoadedModel:
    """Build the network that `spec` names, on the CPU, and load `weights` into it.

    Without `weights` a library's network comes with its pretrained ones (`pretrained=False`: with
    none), and a factory's as the factory returns it. Arguments in brackets are Python literals:
    `timm:resnet18(num_classes=10)`.

    Raises:
        ValueError: the spec cannot be read, or the weights do not fit.
        FileNotFoundError: no such file.
        ImportError: the library is not installed, or the file cannot be imported.
    """
    where, name, args, kwargs = parse_spec(spec)
    pretrained = pretrained and weights is None
    if where == "timm":
        loaded = _timm(name, pretrained, args, kwargs)
    elif where == "torchvision":
        loaded = _torchvision(name, pretrained, args, kwargs)
    elif where == "transformers":
        loaded = _transformers(name, pretrained, args, kwargs)
    else:
        loaded = LoadedModel(_from_file(Path(where).expanduser(), name, args, kwargs))
        if pretrained:
            loaded.notes.append(f"no --weights: the network is used as {name}() returns it")
    if weights is not None:
        loaded.notes += load_weights(loaded.model, weights, allow_missing=allow_missing)
    return loaded


def parse_spec(spec: str) -> tuple[str, str, list[Any], dict[str, Any]]:
    """`"where:name(1, k=2)"` -> `(where, name, [1], {"k": 2})`; only literals are evaluated."""
    match = _SPEC.fullmatch(spec.strip())
    where = match["where"] if match else ""
    if match is None or not (where in LIBRARIES or where.endswith(".py")):
        raise ValueError(
            f"model {spec!r}: must be timm:NAME, torchvision:NAME, transformers:NAME or "
            "path/file.py:Factory(args)"
        )
    try:
        call = ast.parse(f"f({match['args'] or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or any(k.arg is None for k in call.keywords):
            raise ValueError("not a plain argument list")
        args = [ast.literal_eval(a) for a in call.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as err:
        raise ValueError(
            f"model {spec!r}: arguments must be literals such as (20, width=0.5, name='a'); "
            f"got ({match['args']})"
        ) from err
    return where, match["name"].strip(), args, kwargs


def _timm(name: str, pretrained: bool, args: list[Any], kwargs: dict[str, Any]) -> LoadedModel:
    timm = _library("timm", "timm")
    with _naming(f"timm:{name}"):
        model = timm.create_model(name, *args, pretrained=pretrained, **kwargs)
    config = timm.data.resolve_model_data_config(model)
    return LoadedModel(model, config["input_size"][-1], config["mean"], config["std"])


def _torchvision(
    name: str, pretrained: bool, args: list[Any], kwargs: dict[str, Any]
) -> LoadedModel:
    models = _library("torchvision.models", "torchvision")
    with _naming(f"torchvision:{name}"):
        weights = models.get_model_weights(name).DEFAULT
        model = models.get_model(name, *args, weights=weights if pretrained else None, **kwargs)
    preset = weights.transforms()
    return LoadedModel(model, preset.crop_size[0], tuple(preset.mean), tuple(preset.std))


def _transformers(
    name: str, pretrained: bool, args: list[Any], kwargs: dict[str, Any]
) -> LoadedModel:
    transformers = _library("transformers", "transformers")
    # Else it would ask, or wait for an answer, where a repository brings code of its own.
    kwargs = {"trust_remote_code": False, **kwargs}
    trust = kwargs["trust_remote_code"]
    with _naming(f"transformers:{name}"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust)
        images = type(config) in transformers.AutoModelForImageClassification._model_mapping
        auto = (
            transformers.AutoModelForImageClassification
            if images
            else transformers.AutoModelForSequenceClassification
        )
        if pretrained:
            model = auto.from_pretrained(name, *args, **kwargs)
        else:
            for key, value in kwargs.items():
                if key != "trust_remote_code":
                    setattr(config, key, value)
            model = auto.from_config(config, trust_remote_code=trust)
        if not images:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
            return LoadedModel(model, tokenizer=tokenizer)
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=trust)
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height") or size.get("shortest_edge")
    return LoadedModel(model, side, tuple(processor.image_mean), tuple(processor.image_std))


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        # timm, say, may be there and lack torchvision.
        missing = (err.name or package).split(".")[0]
        raise ImportError(
            f"models by {package} need {missing}: pip install {distribution(missing)}"
        ) from err
    except ImportError as err:
        raise ImportError(
            f"{package} is installed but cannot be imported ({first_line(err)}); its version and "
            "torch's may not fit"
        ) from err


@contextmanager
def _naming(spec: str) -> Iterator[None]:
    """Name the model in errors: libraries report a bad name or failed download in many ways."""
    try:
        yield
    except Exception as err:
        raise ValueError(f"model {spec}: {first_line(err)}") from err


def _from_file(path: Path, name: str, args: list[Any], kwargs: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"model file {path}: no such file")
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = _import_file(path)
        factory = getattr(module, name, None)
        if not callable(factory):
            found = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ValueError(f"{path}: has no {name}; it has {', '.join(found) or 'no callables'}")
        try:
            model = factory(*args, **kwargs)
        except TypeError as err:
            raise ValueError(f"{path}: {name} does not take these arguments: {err}") from err
        except Exception as err:  # whatever the user's code raises
            kind = type(err).__name__
            raise ValueError(f"{path}: {name}() raised {kind}: {first_line(err)}") from err
    finally:
        sys.path.remove(folder)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path}: {name}() returned {type(model).__name__}, not a torch nn.Module")
    return model


def _import_file(path: Path) -> Any:
    """Import under a name of its own, so that a file called `json.py` shadows nothing."""
    name = f"fast_model_{path.stem}_{abs(hash(str(path.resolve()))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"model file {path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as err:
        del sys.modules[name]
        raise ImportError(f"model file {path}: {err}") from err
    except Exception as err:  # whatever the user's code raises
        del sys.modules[name]
        kind = type(err).__name__
        raise ImportError(f"model file {path} raised {kind}: {first_line(err)}") from err
    return module
