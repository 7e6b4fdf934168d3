"""Let vLLM run non-uniform models without a flag. The wheel lists `register` under `vllm.general_plugins`.

vLLM imports this module and calls `register` in each of its processes. The import of the package enables transformers
to build non-uniform models; see `per_layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from .per_layer import MODULE


def register() -> None:
    """Select vLLM's Transformers backend for non-uniform models. vLLM's own classes build uniform models only."""
    registry = import_module("vllm.model_executor.models").ModelRegistry
    for name in ("inspect_model_cls", "resolve_model_cls"):
        setattr(registry, name, _by_transformers(getattr(registry, name)))


def _by_transformers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of vLLM's registry to select the Transformers backend first."""

    @wraps(original)
    def resolve(architectures: Any, model_config: Any) -> Any:
        auto_map = getattr(model_config.hf_config, "auto_map", None)
        if model_config.model_impl == "auto" and MODULE in str(auto_map):
            model_config.model_impl = "transformers"

        return original(architectures, model_config)

    return resolve
