"""Convert records of version 2, which called the original model `dense` and had a record of its own for vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


NEW_NAMES = {"dense": "original", "dense_widths": "original_widths", "wish": "loss_search"}
# Figures that were plain numbers of the pruned model.
NUMBERS = ("cosine_p5", "cosine_worst")


def converted(value: Any, has_fields: bool = True) -> Any:
    """Return the plain values of a record of version 2 as values of version 3.

    Args:
        value: The plain values.
        has_fields: Whether the keys of a mapping are names of fields, and not names that users gave.
    """
    if isinstance(value, list):
        return [converted(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if not has_fields:
        return {name: converted(item) for name, item in value.items()}

    values = {NEW_NAMES.get(name, name): converted(item, name != "domains") for name, item in value.items()}
    for name in NUMBERS:
        if name in values:
            values[name] = {"pruned": values[name]}
    values.update(values.pop("vectors", {}))

    search = values.pop("loss_search", None)
    if search:
        search["limit"] = search.pop("loss")
        values["loss_search"] = search
    return values
