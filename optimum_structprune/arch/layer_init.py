"""Builds each layer from its own config, where layers differ in width.

It is copied as it is beside every saved model whose layers differ, so it imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any


def built_by_transformers() -> bool:
    """Whether transformers gives layers their own configs by itself, as its pull request 45332 proposes."""
    return hasattr(import_module("transformers.integrations.heterogeneity"), "apply_heterogeneous_modeling")


def with_own_config(init: Callable[..., None]) -> Callable[..., None]:
    """Make the `__init__(config, layer_idx)` of a layer read its sizes from `config.per_layer_config[layer_idx]`.

    Afterwards the layer and its modules hold the config that all layers share, because what is set there later, such
    as the attention implementation, has to reach them. Where all layers are alike, the original `__init__` runs.
    """

    @wraps(init)
    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        layer_idx = kwargs.get("layer_idx", args[0] if args else None)
        if layer_idx is None or not config.is_heterogeneous:
            init(self, config, *args, **kwargs)
            return
        layer_config = config.per_layer_config[layer_idx]
        init(self, layer_config, *args, **kwargs)
        for module in self.modules():
            if vars(module).get("config") is layer_config:
                module.config = config

    build.builds_with_own_config = True  # type: ignore[attr-defined]  # a mark, so that no layer is wrapped twice
    return build


@contextmanager
def own_configs(layer_class: type) -> Iterator[None]:
    """Inside `with`, layers of this class are built from their own configs."""
    original: Any = layer_class.__init__  # type: ignore[misc]
    if hasattr(original, "builds_with_own_config") or built_by_transformers():
        yield
        return
    layer_class.__init__ = with_own_config(original)  # type: ignore[misc]
    try:
        yield
    finally:
        layer_class.__init__ = original  # type: ignore[misc]
