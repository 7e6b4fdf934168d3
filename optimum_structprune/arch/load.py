"""From a model to its `ArchSpec`: the family's templates, filled in and checked against the weights' shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import StructPruneError, one_line
from ..system.offloading import compute_device
from .family import TEXT_ONLY, UNDESCRIBED, Family, Template, UndescribedError, family_of
from .meta import check_plain, is_offloaded, is_quantized, meta_model, reads_forward, skeleton
from .spaces import TensorShapes, meets, residual_of, spaces_of, vocabulary_of
from .spec import EXPERT, HIDDEN, LAYER, MODEL, ONE_PER_MODEL, VOCAB, ArchSpec, Space
from .trial import UnsuitedError, tried_vocabulary


def describe(model: PreTrainedModel, arch_file: str | Path | None = None) -> ArchSpec:
    """Finds the spaces of a model. Tokens can go from any model that embeds them; other spaces take a description."""
    if is_quantized(model):
        model = skeleton(model, model.config)
    config = model.config
    base = model.base_model_prefix
    prefix = f"{base}." if base and hasattr(model, base) else ""
    try:
        family = family_of(config.model_type, arch_file)
        if family.text is not None:
            config, prefix = config.get_text_config(), f"{prefix}{family.text}."
            family = family_of(config.model_type, arch_file)
            reason = "what is not text writes to the residual stream too"
            family = replace(family, hidden=None, missing={**family.missing, HIDDEN: reason})
        if family.hidden is not None and model.get_output_embeddings() is None:
            reason = "the model has no head that predicts tokens, and what reads the residual stream is not described"
            family = replace(family, hidden=None, missing={**family.missing, HIDDEN: reason})
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        arch = resolve(family, config, shapes, prefix)
    except UndescribedError as error:  # a model without described layers may embed tokens
        if (vocabulary := vocabulary_of(model, model.config.get_text_config())) is None:
            raise
        missing = {name: str(error) for name in ("mlp", "attention", EXPERT, HIDDEN, LAYER)}
        kind, causal = model.config.model_type, reads_forward(model)
        arch = ArchSpec(kind, (), (), (), tuple(missing.items()), causal, (vocabulary,), uniform=UNDESCRIBED)
        try:
            return replace(arch, model_spaces=(tried_vocabulary(model, arch),))
        except UnsuitedError as unsuited:
            missing[VOCAB] = str(unsuited)
            return replace(arch, model_spaces=(), missing=tuple(missing.items()))
    arch = replace(arch, causal=arch.causal and reads_forward(model))
    if VOCAB not in family.missing and (vocabulary := vocabulary_of(model, config)) is not None:
        arch = replace(arch, model_spaces=(vocabulary, *arch.model_spaces))
    if config is model.config:
        return arch
    return replace(arch, model_type=model.config.model_type, uniform=TEXT_ONLY)


@dataclass(frozen=True)
class ModelInfo:
    """The facts that are asked of a model alone, once, before it is used."""

    arch: ArchSpec
    plain_model: PreTrainedModel  # the model itself; for a quantized one the shapes that it has unpacked, no weights
    device: torch.device  # the one that computes the first weights
    quantized: bool = False
    offloaded: bool = False

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return type(self.plain_model).__name__

    @classmethod
    def of(cls, model: PreTrainedModel, arch_file: str | Path | None = None) -> ModelInfo:
        """Describe a model, and refuse what cannot be pruned whatever is asked for."""
        check_plain(model)
        quantized, offloaded = is_quantized(model), is_offloaded(model)
        plain_model = model
        if quantized:
            plain_model = skeleton(model, model.config)
            vars(plain_model)["generation_config"] = getattr(model, "generation_config", None)
        arch = describe(plain_model, arch_file)
        _check_generation(plain_model)
        device = compute_device(model) if offloaded else model.device
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
        """Describe the model of a config, whose weights are to be on a `device`."""
        saved = dtype or getattr(config, "dtype", None) or torch.float32  # what is no config is refused next
        dtype = getattr(torch, saved) if isinstance(saved, str) else saved
        model = meta_model(config, arch_file, dtype, trust_remote_code)
        return cls(describe(model, arch_file), model, device or model.device, offloaded=offloaded)


def _check_generation(model: PreTrainedModel) -> None:
    """Refuse a generation config that could not be saved."""
    try:
        if model.can_generate() and model.generation_config is not None:
            # As transformers does at save: what is as it was loaded is only warned of.
            loaded = getattr(model.generation_config, "_original_object_hash", None)
            model.generation_config.validate(strict=loaded != hash(model.generation_config))
    except ValueError as error:
        raise StructPruneError(
            f"The generation config of this {type(model).__name__} could not be saved, so correct "
            f"`model.generation_config` first: {one_line(error)}"
        ) from error


def resolve(family: Family, config: PretrainedConfig, shapes: TensorShapes, prefix: str = "") -> ArchSpec:
    """Fill in a family's templates for one model."""
    stacks: list[tuple[str, int]] = []
    layer_params: list[int] = []
    spaces: list[Space] = []
    for path in family.layer_path:
        full_path = f"{prefix}{path}"
        params_here = _layer_params(full_path, shapes)
        for index in range(len(params_here)):
            for name, template in family.spaces.items():
                if template.within in (None, path):
                    layer = len(layer_params) + index
                    layer_config = config.per_layer_config[layer] if config.is_heterogeneous else config
                    spaces += spaces_of(name, template, layer, f"{full_path}.{index}.", shapes, layer_config)
        if params_here:  # half of an encoder-decoder has one list of the two
            stacks.append((full_path, len(params_here)))
        layer_params += params_here
    if not stacks:
        raise UndescribedError(
            f"A model of type {config.model_type!r} has its layers at {full_path!r}; nothing is there."
        )
    places = [f"{path}.{index}." for path, count in stacks for index in range(count)]
    residual = residual_of(family.hidden, shapes, config, prefix, places) if family.hidden is not None else None
    whole_layers = _depth(family.layer, config, layer_params, places, shapes)
    return ArchSpec(
        model_type=config.model_type,
        stacks=tuple(stacks),
        layer_params=tuple(layer_params),
        spaces=tuple(spaces),
        missing=(*family.missing.items(), *_refused(family, config)),
        causal=family.causal,
        model_spaces=(*whole_layers, *([residual.space] if residual else [])),
        residual=residual,
        uniform="" if config.model_type in family.layer_class else family.uniform or UNDESCRIBED,
    )


def _depth(
    template: Template | None, config: PretrainedConfig, params: list[int], layers: Sequence[str], shapes: TensorShapes
) -> Iterator[Space]:
    if template is None or not meets(config, template):
        return
    # A model needs a layer with each of the modules in `kinds`: among `least` layers, one always has it.
    having = [sum(f"{layer}{module}.weight" in shapes for layer in layers) for module in template.kinds]
    least = max((len(layers) - count + 1 for count in having if count), default=1)
    mean, keys = round(sum(params) / len(layers)), ((template.size, 1),)
    yield Space(LAYER, MODEL, len(layers), (), (), keys, (), mean, min_size=least, unit=LAYER, uniform=ONE_PER_MODEL)


def _layer_params(layer_path: str, shapes: TensorShapes) -> list[int]:
    sizes: Counter[int] = Counter()
    for name, shape in shapes.items():
        index = name.removeprefix(f"{layer_path}.").partition(".")[0]
        if name.startswith(f"{layer_path}.") and index.isdecimal():
            sizes[int(index)] += prod(shape)
    return [sizes[index] for index in sorted(sizes)]


def _refused(family: Family, config: PretrainedConfig) -> list[tuple[str, str]]:
    return [
        (name, f"it takes {key} = {' or '.join(map(str, values))}, and this config has {getattr(config, key, None)}")
        for name, template in (*family.spaces.items(), (LAYER, family.layer))
        if template is not None
        for key, values in template.requires.items()
        if getattr(config, key, None) not in values
    ]
