"""Build a network that the user's Python file defines."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from fast.errors import first_line


def network_from_file(path: Path, name: str, args: list[Any], kwargs: dict[str, Any]) -> nn.Module:
    """Call `name(*args, **kwargs)` of a Python file; the file may import what lies beside it.

    Returns:
        the network that the factory `name` makes.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the file cannot be imported.
        ValueError: the file has no such factory, or the factory fails or returns no network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model file {path}: no such file")
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = _import_file(path)
        factory = getattr(module, name, None)
        if not callable(factory):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ValueError(f"{path}: has no {name}; it has {', '.join(names) or 'no callables'}")
        try:
            model = factory(*args, **kwargs)
        except TypeError as err:
            raise ValueError(f"{path}: {name} does not take these arguments: {err}") from err
        except Exception as err:  # the user's code may raise anything
            kind = type(err).__name__
            raise ValueError(f"{path}: {name}() raised {kind}: {first_line(err)}") from err
    finally:
        sys.path.remove(folder)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path}: {name}() returned {type(model).__name__}, not a torch nn.Module")
    return model


def _import_file(path: Path) -> Any:
    """Import a file under a unique name, so that one called `json.py` shadows nothing."""
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
    except Exception as err:  # the user's code may raise anything
        del sys.modules[name]
        kind = type(err).__name__
        raise ImportError(f"model file {path} raised {kind}: {first_line(err)}") from err
    return module
