"""Describe a model by its family: templates, filled in and checked against the shapes of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..system.errors import StructPruneError, one_line
from ..system.offloading import compute_device
from ..system.placement import check_devices
from .family import TEXT_ONLY, UNDESCRIBED, Family, Template, UndescribedError, family_of
from .meta import check_plain, is_offloaded, is_quantized, meta_model, reads_forward, skeleton
from .spaces import TensorShapes, meets, residual_of, spaces_of, vocabulary_of
from .spec import EXPERT, HIDDEN, LAYER, MODEL, ONE_PER_MODEL, VOCAB, ArchSpec, Space
from .trial import UnsuitedError, tried_vocabulary


def describe(model: PreTrainedModel, arch_file: str | Path | None = None) -> ArchSpec:
    """Return the description of a model: its spaces, and the parameters that depend on them.

    Tokens can be removed from any model that embeds them. All other spaces need the description of a family.

    Args:
        model: The model, with or without weights.
        arch_file: A file with descriptions of further families.

    Raises:
        UndescribedError: If the layers of the model are not described, and it does not embed tokens.
    """
    if is_quantized(model):
        model = skeleton(model, model.config)

    try:
        arch, text_config = _with_layers(model, arch_file)
    except UndescribedError as error:
        return _without_layers(model, error)

    arch = replace(arch, causal=arch.causal and reads_forward(model))
    if VOCAB not in dict(arch.missing):
        vocabulary = vocabulary_of(model, text_config)
        if vocabulary is not None:
            arch = replace(arch, model_spaces=(vocabulary,) + arch.model_spaces)

    if text_config is not model.config:
        arch = replace(arch, model_type=model.config.model_type, uniform=TEXT_ONLY)
    return arch


def _with_layers(model: PreTrainedModel, arch_file: str | Path | None) -> tuple[ArchSpec, PretrainedConfig]:
    """Return the description of a model by its family, without the vocabulary, and the config of its text part."""
    config = model.config
    base = model.base_model_prefix
    prefix = ""
    if base and hasattr(model, base):
        prefix = f"{base}."

    family = family_of(config.model_type, arch_file)
    if family.text is not None:
        config = config.get_text_config()
        prefix = f"{prefix}{family.text}."
        family = family_of(config.model_type, arch_file)
        family = _without_hidden(family, "inputs other than text write to the residual stream too")

    if family.hidden is not None and model.get_output_embeddings() is None:
        reason = "the model has no head that predicts tokens, and the readers of the residual stream are not described"
        family = _without_hidden(family, reason)

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return resolve(family, config, shapes, prefix), config


def _without_hidden(family: Family, reason: str) -> Family:
    """Return a family whose residual stream is not offered, for a reason."""
    missing = dict(family.missing)
    missing[HIDDEN] = reason
    return replace(family, hidden=None, missing=missing)


def _without_layers(model: PreTrainedModel, error: UndescribedError) -> ArchSpec:
    """Return the description of a model that offers the vocabulary only. Raise the error if it embeds no tokens."""
    vocabulary = vocabulary_of(model, model.config.get_text_config())
    if vocabulary is None:
        raise error

    missing = {name: str(error) for name in ("mlp", "attention", EXPERT, HIDDEN, LAYER)}
    arch = ArchSpec(
        model_type=model.config.model_type,
        stacks=(),
        layer_params=(),
        spaces=(),
        missing=tuple(missing.items()),
        causal=reads_forward(model),
        model_spaces=(vocabulary,),
        uniform=UNDESCRIBED,
    )

    try:
        tested_vocabulary = tried_vocabulary(model, arch)
    except UnsuitedError as unsuited:
        missing[VOCAB] = str(unsuited)
        return replace(arch, model_spaces=(), missing=tuple(missing.items()))
    return replace(arch, model_spaces=(tested_vocabulary,))


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a model that do not depend on a pruning config, collected once.

    Attributes:
        arch: The description of the model.
        plain_model: The model. For a quantized model, a model without weights that has the unpacked shapes.
        device: The device that computes the first weights.
        quantized: Whether the model is quantized.
        offloaded: Whether accelerate offloads weights of the model.
    """

    arch: ArchSpec
    plain_model: PreTrainedModel
    device: torch.device
    quantized: bool = False
    offloaded: bool = False

    @property
    def name(self) -> str:
        """Return the name of the model's class."""
        return type(self.plain_model).__name__

    @classmethod
    def of(cls, model: PreTrainedModel, arch_file: str | Path | None = None) -> ModelInfo:
        """Describe a model. Raise if no config can prune it."""
        check_plain(model)
        check_devices(model)

        quantized = is_quantized(model)
        plain_model = model
        if quantized:
            plain_model = skeleton(model, model.config)
            vars(plain_model)["generation_config"] = getattr(model, "generation_config", None)

        arch = describe(plain_model, arch_file)
        _check_generation(plain_model)

        offloaded = is_offloaded(model)
        device = model.device
        if offloaded:
            device = compute_device(model)
        return cls(arch, plain_model, device, quantized, offloaded)

    @classmethod
    def without_weights(
        cls,
        config: PretrainedConfig,
        arch_file: str | Path | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        device: torch.device | None = None,
        offloaded: bool = False,
    ) -> ModelInfo:
        """Describe the model of a config, whose weights will be on a `device`."""
        # `meta_model` raises if the argument is not a config.
        model_dtype = dtype or getattr(config, "dtype", None) or torch.float32
        if isinstance(model_dtype, str):
            model_dtype = getattr(torch, model_dtype)

        model = meta_model(config, arch_file, model_dtype, trust_remote_code)
        if model.can_generate() and config.name_or_path:
            generation_config = _generation_config(config)
            if generation_config is not None:
                model.generation_config = generation_config
                _check_generation(model)

        return cls(describe(model, arch_file), model, device or model.device, offloaded=offloaded)


def _generation_config(config: PretrainedConfig) -> GenerationConfig | None:
    """Read the generation config of a model as `from_pretrained` does, or return None if the model has no files.

    A model without a readable `generation_config.json` may have its settings in `config.json`.

    Raises:
        StructPruneError: If a value is not legal.
    """
    name: Any = config.name_or_path
    revision: Any = getattr(config, "_commit_hash", None)

    # A value that is not legal may cause an error of any kind.
    try:
        with suppress(OSError):
            return GenerationConfig.from_pretrained(name, revision=revision)
        with suppress(OSError):
            return GenerationConfig.from_pretrained(
                name, config_file_name="config.json", _from_model_config=True, revision=revision
            )
    except Exception as error:
        raise StructPruneError(f"The generation config of {name!r} cannot be read: {one_line(error)}") from error
    return None


def _check_generation(model: PreTrainedModel) -> None:
    """Raise if the generation config could not be saved."""
    try:
        if model.can_generate() and model.generation_config is not None:
            # transformers only warns at save if the generation config is as it was loaded.
            loaded = getattr(model.generation_config, "_original_object_hash", None)
            model.generation_config.validate(strict=loaded != hash(model.generation_config))
    except ValueError as error:
        raise StructPruneError(
            f"The generation config of this {type(model).__name__} could not be saved, so correct "
            f"`model.generation_config` first: {one_line(error)}"
        ) from error


def resolve(family: Family, config: PretrainedConfig, shapes: TensorShapes, prefix: str = "") -> ArchSpec:
    """Return the description of a model by the templates of its family.

    Args:
        family: The family of the model.
        config: The text config of the model.
        shapes: The shapes of all parameters.
        prefix: The prefix of the base model's parameters, with the dot.

    Raises:
        UndescribedError: If the model does not have any layer where the family expects them.
        StructPruneError: If a shape does not fit the templates.
    """
    stacks: list[tuple[str, int]] = []
    prefixes: list[str] = []
    layer_params: list[int] = []
    spaces: list[Space] = []
    for path in family.layer_path:
        full_path = f"{prefix}{path}"
        stack_params = _layer_params(full_path, shapes)
        # One half of an encoder-decoder has only one of the two lists of layers.
        if not stack_params:
            continue

        for index in range(len(stack_params)):
            layer = len(prefixes)
            layer_prefix = f"{full_path}.{index}."
            spaces += _layer_spaces(family, path, layer, layer_prefix, shapes, config)
            prefixes.append(layer_prefix)
        stacks.append((full_path, len(stack_params)))
        layer_params += stack_params

    if not stacks:
        raise UndescribedError(
            f"A model of type {config.model_type!r} has its layers at {full_path!r}, and nothing is there."
        )

    model_spaces = list(_depth(family.layer, config, layer_params, prefixes, shapes))
    residual = None
    if family.hidden is not None:
        residual = residual_of(family.hidden, shapes, config, prefix, prefixes)
        model_spaces.append(residual.space)

    # Layers can have their own widths if the family names the class that builds them.
    uniform = ""
    if config.model_type not in family.layer_class:
        uniform = family.uniform or UNDESCRIBED

    missing = list(family.missing.items()) + _refused(family, config)
    return ArchSpec(
        model_type=config.model_type,
        stacks=tuple(stacks),
        layer_params=tuple(layer_params),
        spaces=tuple(spaces),
        missing=tuple(missing),
        causal=family.causal,
        model_spaces=tuple(model_spaces),
        residual=residual,
        uniform=uniform,
    )


def _layer_spaces(
    family: Family, path: str, layer: int, prefix: str, shapes: TensorShapes, config: PretrainedConfig
) -> list[Space]:
    """Return the spaces of one layer, in the list of layers at `path`."""
    layer_config: Any = config
    if config.is_heterogeneous:
        layer_config = config.per_layer_config[layer]

    spaces: list[Space] = []
    for name, template in family.spaces.items():
        if template.within in (None, path):
            spaces += spaces_of(name, template, layer, prefix, shapes, layer_config)
    return spaces


def _depth(
    template: Template | None, config: PretrainedConfig, params: list[int], layers: Sequence[str], shapes: TensorShapes
) -> Iterator[Space]:
    """Yield the space of whole layers, if the family offers it."""
    if template is None or not meets(config, template):
        return

    # A model needs a layer with each of the modules in `kinds`. Any `min_size` layers contain such a layer.
    min_size = 1
    for module in template.kinds:
        count = sum(f"{layer}{module}.weight" in shapes for layer in layers)
        if count:
            min_size = max(min_size, len(layers) - count + 1)

    required: tuple[int, ...] = ()
    if template.keep_first:
        required = (0,)

    yield Space(
        name=LAYER,
        layer=MODEL,
        size=len(layers),
        producers=(),
        consumers=(),
        config=((template.size, 1),),
        pins=(),
        unit_params=round(sum(params) / len(layers)),
        min_size=min_size,
        unit=LAYER,
        uniform=ONE_PER_MODEL,
        required=required,
    )


def _layer_params(layer_path: str, shapes: TensorShapes) -> list[int]:
    """Return the number of parameters of each layer in a list of layers."""
    sizes: Counter[int] = Counter()
    for name, shape in shapes.items():
        index = name.removeprefix(f"{layer_path}.").partition(".")[0]
        if name.startswith(f"{layer_path}.") and index.isdecimal():
            sizes[int(index)] += prod(shape)
    return [sizes[index] for index in sorted(sizes)]


def _refused(family: Family, config: PretrainedConfig) -> list[tuple[str, str]]:
    """Return the spaces that the config of this model rules out, each with the reason."""
    templates = dict(family.spaces)
    if family.layer is not None:
        templates[LAYER] = family.layer

    refused = []
    for name, template in templates.items():
        for key, values in template.requires.items():
            value = getattr(config, key, None)
            if value not in values:
                expected = " or ".join(map(str, values))
                refused.append((name, f"it takes {key} = {expected}, and this config has {value}"))
    return refused
