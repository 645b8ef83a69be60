"""Load networks of timm, torchvision and transformers, with what they declare about their input."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fast.data.images.library import timm_description
from fast.data.images.preprocessing import from_config, from_preset
from fast.data.images.processor import measure
from fast.data.sources.connection import quick_offline
from fast.errors import counted, first_line, import_library, other_build, printable, some
from fast.models.loaded import LoadedModel


def load_library(
    library: str, name: str, pretrained: bool, args: list[Any], kwargs: dict[str, Any]
) -> LoadedModel:
    """The network `name` of a library.

    Raises:
        ValueError: the library has no network of this name, the arguments do not fit, or the
            weights cannot be downloaded; the message names the way out.
        ImportError: the library, or one that it needs, is not installed.
    """
    load = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[library]
    return load(name, pretrained, args, dict(kwargs))


def _timm(name: str, pretrained: bool, args: list[Any], kwargs: dict[str, Any]) -> LoadedModel:
    timm = import_library("timm", "models by timm need")
    with_weights = bool(kwargs.pop("pretrained", True))
    pretrained = pretrained and with_weights
    name = name.replace("hf_hub:", "hf-hub:", 1)
    if ":" not in name and not timm.is_model(name):
        raise _unknown(f"timm:{name}", name.split(".")[0], timm.list_models())
    with _naming(f"timm:{name}", pretrained):
        model = timm.create_model(name, *args, pretrained=pretrained, **kwargs)
    config = dict(timm.data.resolve_model_data_config(model))
    notes = [] if with_weights else [_untrained(f"timm:{name}")]
    height, width = config["input_size"][-2:]
    if config["crop_mode"] == "border" or height != width or config["crop_pct"] > 1:
        notes.append(
            f"timm:{name}: prepares images by {config['crop_mode']!r} to {width}x{height} "
            f"(crop_pct {config['crop_pct']:g}); from arrays, and with options for images, the "
            "central square is cut out"
        )
    if kwargs.get("in_chans") == 1:
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),)
    says = from_config(config, "timm")
    if kwargs.get("in_chans", 3) == 3:
        says = replace(says, library=timm_description(config))
    return LoadedModel(model=model, preprocessing=says, notes=notes)


def _torchvision(
    name: str, pretrained: bool, args: list[Any], kwargs: dict[str, Any]
) -> LoadedModel:
    models = import_library("torchvision.models", "models by torchvision need")
    if name not in models.list_models():
        raise _unknown(f"torchvision:{name}", name, models.list_models())
    choice = kwargs.pop("weights", "DEFAULT" if kwargs.pop("pretrained", True) else None)
    with _naming(f"torchvision:{name}", pretrained):
        # A network without weights takes images that are prepared as for the default weights.
        weights = models.get_model_weights(name)[str(choice or "DEFAULT").split(".")[-1]]
        loads = pretrained and choice
        model = models.get_model(name, *args, weights=weights if loads else None, **kwargs)
    return LoadedModel(
        model=model,
        preprocessing=from_preset(weights.transforms(), "torchvision"),
        notes=[] if choice else [_untrained(f"torchvision:{name}")],
    )


def _transformers(
    name: str, pretrained: bool, args: list[Any], kwargs: dict[str, Any]
) -> LoadedModel:
    transformers = import_library("transformers", "models by transformers need")
    with_weights = bool(kwargs.pop("pretrained", True))
    pretrained = pretrained and with_weights
    notes = [] if with_weights else [_untrained(f"transformers:{name}")]
    missing: list[str] = []
    # Without this, transformers would ask about repositories with their own code, and wait.
    trust = {"trust_remote_code": bool(kwargs.pop("trust_remote_code", False))}
    with _naming(f"transformers:{name}", True), quiet(transformers):
        config = transformers.AutoConfig.from_pretrained(name, **trust)
        of_images = transformers.AutoModelForImageClassification
        of_sounds = transformers.AutoModelForAudioClassification
        kinds = (of_images, of_sounds)
        auto = next(
            (kind for kind in kinds if type(config) in kind._model_mapping),
            transformers.AutoModelForSequenceClassification,
        )
        if pretrained:
            model, info = auto.from_pretrained(
                name, *args, output_loading_info=True, **trust, **kwargs
            )
            missing = sorted(info["missing_keys"])
            notes += _missing(f"transformers:{name}", missing)
        else:
            for key, value in kwargs.items():
                setattr(config, key, value)
            model = auto.from_config(config, **trust)
        result = LoadedModel(model=model, missing=missing, notes=notes)
        if auto is of_sounds:
            result.extractor = transformers.AutoFeatureExtractor.from_pretrained(name, **trust)
        elif auto is of_images:
            processor = transformers.AutoImageProcessor.from_pretrained(name, **trust)
            result.preprocessing = measure(processor)
        else:
            result.tokenizer = transformers.AutoTokenizer.from_pretrained(name, **trust)
            notes += _pad(result.tokenizer, model.config)
        return result


def _missing(spec: str, names: list[str]) -> list[str]:
    if not names:
        return []
    lacks = f"lacks {counted(len(names), 'tensor')}, left random"
    return [f"{spec}: its checkpoint {lacks}: {some(names)}"]


def _pad(tokenizer: Any, config: Any) -> list[str]:
    """Give both a padding token, which texts of different lengths need; returns notes on it."""
    notes = []
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("its tokenizer has neither a padding token nor one that ends a text")
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"no padding token: texts are padded with {printable(tokenizer.eos_token)}")
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return notes


def _untrained(spec: str) -> str:
    return f"{spec}: without pretrained weights, as asked"


def _unknown(spec: str, name: str, names: Sequence[str]) -> ValueError:
    library = spec.partition(":")[0]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"see {library}'s list_models()"
    return ValueError(f"model {spec}: unknown model; {hint}")


@contextmanager
def _naming(spec: str, downloads: bool) -> Iterator[None]:
    """Name the model in errors: libraries report a bad name or a failed download in many ways."""
    try:
        with quick_offline():
            yield
    except Exception as err:
        if message := other_build(err):
            raise ImportError(message) from err
        hint = "; weights that are on this machine: --weights FILE" if downloads else ""
        if spec.startswith("transformers:"):
            hint = "; a network that is on this machine: transformers:FOLDER, and --weights FILE"
        reason = printable(first_line(err)).rstrip(".")
        raise ValueError(f"model {spec}: {reason}{hint}") from err


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and loading reports; our own notes say what matters in them."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
