"""Lets stock transformers classes build models whose layers differ in width.

Transformers reads and writes `config.per_layer_config = {layer: {attribute: value}}`, but its classes cannot build
such a model yet. Importing `optimum_structprune` enables two patches:

- A layer whose class a file in `families` names is built from its own layer's config, whenever a model's config has
  layers that differ. Every other model is built as before.
- `save_pretrained` puts a modelling file beside such a config, for those who load it without this package.

Nothing is imported for this: the patches (of `PreTrainedModel.__init__` and `PreTrainedConfig.save_pretrained`) are
made as soon as transformers' own modelling code is imported. They are left out with `OPTIMUM_STRUCTPRUNE_PATCH=0` in
the environment, and with a transformers that builds such models by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from inspect import getsource
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODELING = "transformers.modeling_utils"
MODULE = "modeling_structprune"

TEMPLATE = '''"""Layers of different widths, from `per_layer_config` in config.json, as stock {language_model}.

Written by optimum-structprune and independent of it, for `from_pretrained(…, trust_remote_code=True)`.
With optimum-structprune imported, or a transformers that builds such models by itself, this file is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

from {package} import {module} as stock


{functions}

class OwnConfigs:
    def __init__(self, config, *args, **kwargs):
        with own_configs(stock.{layer}):
            super().__init__(config, *args, **kwargs)

    @classmethod
    def is_custom_code(cls):
        # The weights have the stock class's names, and are converted as for it.
        return False


class {base}(OwnConfigs, stock.{base}):
    """The stock model without a head."""

    _auto_class = "AutoModel"


class {language_model}(OwnConfigs, stock.{language_model}):
    """The stock language model."""

    _auto_class = "AutoModelForCausalLM"
'''

# What was replaced, in order: the owner, the name of its attribute, and the original value.
_originals: list[tuple[type, str, Any]] = []


def enable_heterogeneous(arch_file: str | None = None) -> None:
    """Let transformers build non-uniform models, from now on or from when its modelling code is imported.

    Args:
        arch_file: A file for models of your own, which are then built as well; see `arch/families`.
    """
    if arch_file is not None:
        _family().user_families(arch_file)
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
    if _originals:
        yield
        return
    enable_heterogeneous()
    try:
        yield
    finally:
        disable_heterogeneous()


def layer_class(model_class: type, config: PretrainedConfig) -> type | None:
    """The class of a model's layers, if a file in `families` names it."""
    name = _family().layer_class_name(config.model_type)
    if name is None:
        return None
    modules = (sys.modules.get(cls.__module__) for cls in model_class.__mro__)
    return next((getattr(module, name) for module in modules if hasattr(module, name)), None)


def _family() -> Any:
    # Imported late, because it imports yaml, and importing the package has to be cheap.
    return import_module(f"{__package__}.family")


class _AfterImport(MetaPathFinder):
    """Waits until transformers' modelling code is imported, and patches it then."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
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
    @wraps(original)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "is_heterogeneous", False):
            layer = layer_class(type(self), config)
            if layer is not None and not hasattr(layer.__init__, "builds_with_own_config"):  # type: ignore[misc]
                _replace_(layer, "__init__", with_own_config)
        original(self, config, *args, **kwargs)

    return init


def _with_modeling_file(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if self.is_heterogeneous:
            add_modeling_file(self, os.fspath(save_directory))
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained


# The modelling file has the next three functions too, as they are, so they use nothing of this package.


def built_by_transformers() -> bool:
    """Tells if transformers gives layers their own configs by itself, as its pull request 45332 proposes."""
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


def add_modeling_file(config: PretrainedConfig, folder: str | Path) -> None:
    """Write `modeling_structprune.py` beside a config whose layers differ, and enter it in its `auto_map`.

    It names the stock classes of the model. A config of layers that are alike or not described is left alone.
    """
    # Only here, because importing the classes of all models takes long.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    layer = _family().layer_class_name(config.model_type) if config.is_heterogeneous else None
    if layer is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    language_model, base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], MODEL_MAPPING[type(config)]
    assert isinstance(language_model, type) and isinstance(base, type)
    package, _, module = language_model.__module__.rpartition(".")
    functions = "\n\n".join(map(getsource, (built_by_transformers, with_own_config, own_configs)))
    names = {"language_model": language_model.__name__, "base": base.__name__, "layer": layer}
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = TEMPLATE.format(package=package, module=module, functions=functions, **names)
    (Path(folder) / f"{MODULE}.py").write_text(text, encoding="utf-8")
    entries = {"AutoModelForCausalLM": f"{MODULE}.{names['language_model']}", "AutoModel": f"{MODULE}.{names['base']}"}
    config.auto_map = {**(getattr(config, "auto_map", None) or {}), **entries}


def forget_modeling_file(config: PretrainedConfig) -> None:
    """Take the entries of `add_modeling_file` out of a config whose layers are alike again."""
    entries = getattr(config, "auto_map", None) or {}
    kept = {name: value for name, value in entries.items() if MODULE not in str(value)}
    if kept:
        config.auto_map = kept
    elif entries:
        del config.auto_map
