"""Build stock transformers models whose layers differ in width.

transformers reads and writes `config.per_layer_config = {layer: {attribute: value}}`, but its classes cannot build
such a model yet. Importing `optimum_structprune` enables two patches:

- If the layers of a config differ, each layer is built from its own layer's config. This requires a description of the
  family that names the layer class. All other models are built as before.
- `save_pretrained` writes a modelling file next to such a config, for users who load it without this package.

The patches (of `PreTrainedModel.__init__` and `PreTrainedConfig.save_pretrained`) are applied when transformers' own
modelling code is imported, so importing this package imports nothing else. They are not applied if the environment has
`OPTIMUM_STRUCTPRUNE_PATCH=0`, or if transformers builds such models by itself.
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

TEMPLATE = '''"""Build {language_model} with layers of different widths, from `per_layer_config` in config.json.

optimum-structprune wrote this file for `from_pretrained(…, trust_remote_code=True)`. It does not import the package.
The file is not needed if optimum-structprune is imported, or if transformers builds such models by itself.
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

# The replaced attributes in order: the owner, the name and the original value.
_originals: list[tuple[type, str, Any]] = []


def enable_heterogeneous(arch_file: str | None = None) -> None:
    """Let transformers build non-uniform models.

    The patches are applied now, or when transformers' modelling code is imported.

    Args:
        arch_file: A YAML file that describes your own architectures, which can then be built as well.
    """
    if arch_file is not None:
        _family().user_families(arch_file)

    if hasattr(sys.modules.get(MODELING), "PreTrainedModel"):
        _patch_()
    elif _WATCH not in sys.meta_path:
        sys.meta_path.insert(0, _WATCH)


def disable_heterogeneous() -> None:
    """Undo the patches. Existing models do not change."""
    if _WATCH in sys.meta_path:
        sys.meta_path.remove(_WATCH)

    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


def is_non_uniform(config: PretrainedConfig) -> bool:
    """Return whether the layers of a model differ in a way that stock classes cannot build.

    Some stock configs, such as the config of Gemma 4, also have values for single layers. Their families describe no
    layer class, because their layers cannot be pruned to different widths.
    """
    text_config = config.get_text_config()
    return text_config.is_heterogeneous and _family().layer_class_name(text_config.model_type) is not None


@contextmanager
def heterogeneous() -> Iterator[None]:
    """Enable the patches inside `with`, and disable them at the end unless they were enabled before."""
    if _originals:
        yield
        return

    enable_heterogeneous()
    try:
        yield
    finally:
        disable_heterogeneous()


def layer_class(model_class: type, config: PretrainedConfig) -> type | None:
    """Return the class of a model's layers, or None if the description of its family does not name it."""
    name = _family().layer_class_name(config.model_type)
    if name is None:
        return None

    for cls in model_class.__mro__:
        module = sys.modules.get(cls.__module__)
        if hasattr(module, name):
            return getattr(module, name)
    return None


def _family() -> Any:
    """Import the families. This is late, because it imports yaml and importing the package must be cheap."""
    return import_module(f"{__package__}.family")


class _AfterImport(MetaPathFinder):
    """Patch transformers' modelling code when it is imported."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the modelling code with a loader that patches it; see `importlib.abc.MetaPathFinder`."""
        if fullname != MODELING:
            return None

        sys.meta_path.remove(self)
        module_spec = find_spec(fullname)
        if module_spec is None or module_spec.loader is None:
            return module_spec

        original_exec_module = module_spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            original_exec_module(module)
            _patch_()

        module_spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return module_spec


_WATCH = _AfterImport()


def _patch_() -> None:
    """Apply the patches, unless they are applied or not needed."""
    if _originals or built_by_transformers():
        return

    modeling: Any = sys.modules[MODELING]
    _replace_(modeling.PreTrainedModel, "__init__", _patching_layers)
    _replace_(modeling.PreTrainedConfig, "save_pretrained", _with_modeling_file)


def _replace_(owner: type, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace an attribute by its wrapped value, and remember the original."""
    original = getattr(owner, name)
    _originals.append((owner, name, original))
    setattr(owner, name, wrap(original))


def _patching_layers(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `PreTrainedModel.__init__` to patch the layer class of a non-uniform model first."""

    @wraps(original)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "is_heterogeneous", False):
            layer = layer_class(type(self), config)
            if layer is not None and not hasattr(layer.__init__, "builds_with_own_config"):  # type: ignore[misc]
                _replace_(layer, "__init__", with_own_config)

        original(self, config, *args, **kwargs)

    return init


def _with_modeling_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedConfig.save_pretrained` to write the modelling file of a non-uniform model too."""

    @wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if self.is_heterogeneous:
            add_modeling_file(self, os.fspath(save_directory))
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained


# The modelling file contains copies of the next three functions, so they use nothing of this package.


def built_by_transformers() -> bool:
    """Return whether transformers builds each layer from its own config, as its pull request 45332 proposes."""
    return hasattr(import_module("transformers.integrations.heterogeneity"), "apply_heterogeneous_modeling")


def with_own_config(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap the `__init__(config, layer_idx)` of a layer to read its sizes from `config.per_layer_config[layer_idx]`.

    Afterwards the layer and its modules refer to the shared config again, so that later changes, such as another
    attention implementation, reach them. In uniform models the original `__init__` runs.
    """

    @wraps(init)
    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        layer_idx = kwargs.get("layer_idx")
        if layer_idx is None and args:
            layer_idx = args[0]
        if layer_idx is None or not config.is_heterogeneous:
            init(self, config, *args, **kwargs)
            return

        layer_config = config.per_layer_config[layer_idx]
        init(self, layer_config, *args, **kwargs)

        for module in self.modules():
            if vars(module).get("config") is layer_config:
                module.config = config

    # The mark prevents wrapping a layer twice.
    build.builds_with_own_config = True  # type: ignore[attr-defined]
    return build


@contextmanager
def own_configs(layer_class: type) -> Iterator[None]:
    """Build layers of a class from their own configs inside `with`."""
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
    """Write `modeling_structprune.py` next to a non-uniform model's config, and add it to the config's `auto_map`.

    The file does nothing else than to build the stock classes of the model. Nothing is written for a uniform model, or
    for a model without a described layer class.
    """
    # This import is late, because it imports the classes of all models.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    if not config.is_heterogeneous or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return

    layer = _family().layer_class_name(config.model_type)
    if layer is None:
        return

    language_model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    base = MODEL_MAPPING[type(config)]
    assert isinstance(language_model, type) and isinstance(base, type)

    package, _, module = language_model.__module__.rpartition(".")
    functions = [getsource(function) for function in (built_by_transformers, with_own_config, own_configs)]
    text = TEMPLATE.format(
        package=package,
        module=module,
        functions="\n\n".join(functions),
        language_model=language_model.__name__,
        base=base.__name__,
        layer=layer,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{MODULE}.py").write_text(text, encoding="utf-8")

    auto_map = dict(getattr(config, "auto_map", None) or {})
    auto_map["AutoModelForCausalLM"] = f"{MODULE}.{language_model.__name__}"
    auto_map["AutoModel"] = f"{MODULE}.{base.__name__}"
    config.auto_map = auto_map


def forget_modeling_file(config: PretrainedConfig) -> None:
    """Remove the entries of `add_modeling_file` from a config that is uniform again."""
    auto_map = getattr(config, "auto_map", None) or {}
    remaining = {name: value for name, value in auto_map.items() if MODULE not in str(value)}

    if remaining:
        config.auto_map = remaining
    elif auto_map:
        del config.auto_map
