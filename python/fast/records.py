"""Options as fields of dataclasses."""

from __future__ import annotations

import types
import typing
from typing import Any


def field_types(record: type) -> dict[str, Any]:
    """The type of each field apart from None: `int | None` -> `int`.

    Of a union of several types it is the first.
    """
    return {name: _plain(hint) for name, hint in typing.get_type_hints(record).items()}


def _plain(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint
