"""The modelling files beside a non-uniform model, for those who load it without this package."""

from __future__ import annotations

from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from . import layer_init
from .families import layer_class_name


if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODULE = "modeling_structprune"

TEMPLATE = '''"""Layers of different widths, from `per_layer_config` in config.json, as stock {language_model}.

Written by optimum-structprune and independent of it, for `from_pretrained(…, trust_remote_code=True)`.
With optimum-structprune imported, or a transformers that builds such models by itself, this file is not needed.
"""

from {package} import {module} as stock

from .layer_init import own_configs


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


def add_modeling_file(config: PretrainedConfig, folder: str | Path) -> None:
    """Write two files beside a config whose layers differ, and enter the first in the config's `auto_map`.

    The first is `modeling_structprune.py`, which names the stock classes of the model. It imports the second,
    `layer_init.py`, a copy of the file in this package. Whenever transformers copies the first, it also copies
    what that imports from beside it.

    A config that this package did not make, because its layers are alike or its model type is not described, is left
    alone.
    """
    # Only here, because importing the classes of all models takes long.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    layer = layer_class_name(config.model_type) if config.is_heterogeneous else None
    if layer is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    language_model, base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], MODEL_MAPPING[type(config)]
    assert isinstance(language_model, type) and isinstance(base, type)
    package, _, module = language_model.__module__.rpartition(".")
    names = {"language_model": language_model.__name__, "base": base.__name__, "layer": layer}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{MODULE}.py").write_text(TEMPLATE.format(package=package, module=module, **names))
    copyfile(layer_init.__file__, Path(folder) / Path(layer_init.__file__).name)
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
