"""Lets vLLM run non-uniform models without a flag: the wheel names `register` under `vllm.general_plugins`.

vLLM calls that in each of its processes; importing it has let transformers build such models, see `per_layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from .per_layer import MODULE


def register() -> None:
    """Send non-uniform models to vLLM's Transformers backend, as its own classes build all layers alike."""
    registry = import_module("vllm.model_executor.models").ModelRegistry
    for name in ("inspect_model_cls", "resolve_model_cls"):
        setattr(registry, name, _by_transformers(getattr(registry, name)))


def _by_transformers(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def resolve(architectures: Any, model_config: Any) -> Any:
        if model_config.model_impl == "auto" and MODULE in str(getattr(model_config.hf_config, "auto_map", None)):
            model_config.model_impl = "transformers"
        return original(architectures, model_config)

    return resolve
