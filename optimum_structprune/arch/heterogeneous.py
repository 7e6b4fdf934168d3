"""Lets stock transformers classes build models whose layers differ in width.

Transformers reads and writes `config.per_layer_config = {layer: {attribute: value}}`, but its classes cannot build
such a model yet. Importing `optimum_structprune` enables two patches:

- A layer whose class `families.yaml` names is built from its own layer's config, whenever a model's config has layers
  that differ. Every other model is built as before.
- `save_pretrained` puts modelling files beside such a config, for those who load it without this package.

Nothing is imported for this: the patches (of `PreTrainedModel.__init__` and `PreTrainedConfig.save_pretrained`) are
made as soon as transformers' own modelling code is imported. They are left out with `OPTIMUM_STRUCTPRUNE_PATCH=0` in
the environment, and with a transformers that builds such models by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig

VARIABLE = "OPTIMUM_STRUCTPRUNE_PATCH"
MODELING = "transformers.modeling_utils"

# What was replaced, in order: the owner, the name of its attribute, and the original value.
_originals: list[tuple[type, str, Any]] = []


def enable_heterogeneous(arch_file: str | None = None) -> None:
    """Let transformers build non-uniform models, from now on or from when its modelling code is imported.

    Args:
        arch_file: A file in the form of `families.yaml` with models of your own, which are then built as well.
    """
    if arch_file is not None:
        from .families import own_families

        own_families(arch_file)
    if hasattr(sys.modules.get(MODELING), "PreTrainedModel"):
        _patch_()
    elif _WATCH not in sys.meta_path:
        sys.meta_path.insert(0, _WATCH)


def disable_heterogeneous() -> None:
    """Undo the patches; models that exist stay as they are."""
    if _WATCH in sys.meta_path:
        sys.meta_path.remove(_WATCH)
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


@contextmanager
def heterogeneous() -> Iterator[None]:
    """Enable the patches inside `with`, and leave them afterwards as they were before."""
    before = bool(_originals)
    enable_heterogeneous()
    try:
        yield
    finally:
        if not before:
            disable_heterogeneous()


def enable_on_import() -> None:
    """Enable the patches when the package is imported, unless the environment variable says no."""
    if os.environ.get(VARIABLE, "1") != "0":
        enable_heterogeneous()


def layer_class(model_class: type, config: PretrainedConfig) -> type | None:
    """The class of the layers that a model class builds; None where `families.yaml` names none."""
    from .families import layer_class_name

    name = layer_class_name(config.model_type)
    if name is None:
        return None
    modules = (sys.modules.get(cls.__module__) for cls in model_class.__mro__)
    return next((getattr(module, name) for module in modules if hasattr(module, name)), None)


class _AfterImport(MetaPathFinder):
    """Waits until transformers' modelling code is imported, and patches it then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != MODELING:
            return None
        sys.meta_path.remove(self)
        module_spec = find_spec(fullname)
        if module_spec is not None and module_spec.loader is not None:
            run = module_spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _patch_()

            module_spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return module_spec


_WATCH = _AfterImport()


def _patch_() -> None:
    from .layer_init import built_by_transformers

    if _originals or built_by_transformers():
        return
    modeling: Any = sys.modules[MODELING]
    _replace_(modeling.PreTrainedModel, "__init__", _patching_layers)
    _replace_(modeling.PreTrainedConfig, "save_pretrained", _with_modeling_file)


def _replace_(owner: type, name: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    _originals.append((owner, name, original))
    setattr(owner, name, wrap(original))


def _patching_layers(original: Callable[..., None]) -> Callable[..., None]:
    from .layer_init import with_own_config

    @wraps(original)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "is_heterogeneous", False):
            layer = layer_class(type(self), config)
            if layer is not None and not hasattr(layer.__init__, "builds_with_own_config"):  # type: ignore[misc]
                _replace_(layer, "__init__", with_own_config)
        original(self, config, *args, **kwargs)

    return init


def _with_modeling_file(original: Callable[..., Any]) -> Callable[..., Any]:
    from .modeling_file import add_modeling_file

    @wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if self.is_heterogeneous:
            add_modeling_file(self, os.fspath(save_directory))
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained
