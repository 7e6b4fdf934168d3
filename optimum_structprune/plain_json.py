"""Values as JSON that every reader takes: Python's own would write `NaN` and `Infinity`, which JSON does not have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from math import isfinite
from typing import Any


def plain(value: Any) -> Any:
    """A value as JSON knows it.

    Args:
        value: Mappings, sequences and sets (sorted) of values; a number that is not finite becomes None, and what JSON
            does not know becomes its text.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(str, value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def to_json(value: Any) -> str:
    """The JSON document of a value, see `plain`."""
    return json.dumps(plain(value), indent=2, allow_nan=False)
