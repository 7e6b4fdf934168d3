"""Dry runs: the sizes of a pruned model, from the config of the original model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .arch.load import ModelInfo, describe
from .arch.meta import model_class
from .arch.spec import CHANNEL, EXPERT, GROUP, VOCAB, ArchSpec, Widths
from .config.domains import written_by_model
from .config.pruning import RunOptions, StructPruneConfig
from .domains.load import texts_of, with_written_text
from .forward.generation import cached_values
from .pruning.memory import MemoryEstimate, estimate_memory
from .pruning.request import DRY_RUN, PruningRequest, check_config_kind, resolve_request
from .record.table import PERCENT, Row, aligned, cells
from .system.stages import saved_bytes
from .vocabulary.amount import large_vocabulary
from .written import Record


if TYPE_CHECKING:
    from .recovery.memory import RecoveryEstimate


# The multiples that kernels need: the number, whether tensor parallelism multiplies it because it splits the matrix,
# and the kernels.
KERNELS = (
    (8, True, "tensor cores in half precision"),
    (32, False, "llama.cpp's Q8_0 and Q4_0, which leave other rows in 16 bits"),
    (64, True, "Marlin, the 4-bit kernel of vLLM and SGLang"),
    (128, True, "GPTQ and AWQ in groups of 128"),
    (256, False, "llama.cpp's K-quants, which leave other rows in more bits"),
)
# A token takes 1.8 times as long to write as to read.
WRITING_COST = 1.8
# The labels of the sizes in the table, by field of `DryRun`.
SIZES = {
    "parameters": "parameters",
    "layer_parameters": "  in the layers",
    "memory": "bytes in {}",
    "cache_per_token": "cache bytes per token",
}


@dataclass(frozen=True)
class Change:
    """A number before and after pruning."""

    before: int
    after: int


@dataclass(frozen=True)
class SpaceChoice:
    """The width of one space: `after` units of `before` are kept, in each layer where layers differ."""

    name: str
    before: int
    after: int | Mapping[int, int]


@dataclass(frozen=True)
class DryRun(Record):
    """The result of a dry run.

    Attributes:
        model_type: The model type.
        dtype: The dtype in which memory is counted.
        spaces: The chosen widths.
        parameters: The number of parameters.
        layer_parameters: The number of parameters in the layers alone.
        memory: The bytes of the saved weights: all parameters, and the buffers that are saved.
        reload: The ways to load the result.
        notes: What the numbers do not say.
        cache_per_token: The bytes of keys and values that generation keeps per token, over all layers (a layer with a
            sliding window keeps no more than its window); None where the model cannot be run without weights, 0
            where it does not generate.
        need: The memory that the pruning itself takes at its peak; None where it was not asked for.
        recovery: The memory and the time of the recovery; None if the config has none.
    """

    model_type: str
    dtype: str
    spaces: tuple[SpaceChoice, ...]
    parameters: Change
    layer_parameters: Change
    memory: Change
    reload: tuple[str, ...]
    notes: tuple[str, ...]
    cache_per_token: Change | None = None
    need: MemoryEstimate | None = None
    recovery: RecoveryEstimate | None = None

    @property
    def widths(self) -> dict[str, int | Mapping[int, int]]:
        """The chosen width of each space: one number, or one per layer."""
        return {space.name: space.after for space in self.spaces}

    @property
    def sparsity(self) -> float:
        """The share of the layers' parameters that is removed."""
        before = self.layer_parameters.before  # 0 where the layers are not described
        return 1 - self.layer_parameters.after / before if before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the form that JSON takes."""
        return {**super().to_dict(), "widths": self.widths, "sparsity": self.sparsity}

    def __str__(self) -> str:
        """Return a table of widths, parameters, memory and cache."""
        rows: list[Row] = []
        for space in self.spaces:
            after = list(space.after.values()) if isinstance(space.after, Mapping) else [space.after]
            rows.append(Row(f"width {space.name}", ([space.before], after), change=PERCENT))

        for name, label in SIZES.items():
            size: Change | None = getattr(self, name)
            if size is None:
                rows.append(Row(label.format(self.dtype), (None, None), change=PERCENT))
            elif size.before:  # a model that does not generate has no cache
                rows.append(Row(label.format(self.dtype), (size.before, size.after), change=PERCENT))

        lines = [aligned(cells(["before", "after"], rows))]
        lines += self.notes
        lines += [f"loads with {way}" for way in self.reload]
        if self.need is not None:
            lines.append(f"the pruning takes at its peak\n{self.need}")
        if self.recovery is not None:
            lines.append(str(self.recovery))
        return "\n".join(lines)


def dry_run(
    model_config: PretrainedConfig,
    config: StructPruneConfig,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    cost: bool = False,
    offload: str | None = None,
    options: RunOptions | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DryRun:
    """Return the widths and the numbers of parameters after a pruning, without any weights.

    With another allocation than `uniform`, the widths of single layers follow from calibration. The widths in the
    result remove as many parameters in all, to within one step of one layer.

    Args:
        model_config: The config of the original model.
        config: The config of the pruning.
        dtype: The dtype in which memory is counted; by default the dtype in `model_config`.
        trust_remote_code: Whether code that comes with the model is run.
        cost: Whether the memory that the pruning takes is counted too.
        offload: The place of the layers between their calls: `cpu`, `disk`, or None for the device.
        options: The runtime options.
        tokenizer: The tokenizer of the model. With it, impossible numbers of tokens are refused.

    Raises:
        StructPruneError: If pruning would refuse the config; the message names the nearest legal choice.
    """
    check_config_kind(config, options)
    info = ModelInfo.without_weights(model_config, config.arch_file, dtype, trust_remote_code)
    request = resolve_request(config, info, tokenizer, use=DRY_RUN, options=options)
    arch = info.arch
    dense = info.plain_model

    spaces: list[SpaceChoice] = []
    for name, width in request.widths.items():
        after: int | dict[int, int] = {space.layer: space.width_in(request.widths) for space in arch.of(name)}
        if isinstance(width, int):
            after = width
        widest = max(space.width for space in arch.of(name))
        spaces.append(SpaceChoice(name, widest, after))

    sizes = _sizes(request, dense)
    smaller_sizes = _sizes(request, request.smaller)
    changes = {name: Change(sizes[name], smaller_sizes[name]) for name in sizes if name in smaller_sizes}
    return DryRun(
        model_type=arch.model_type,
        dtype=str(dense.dtype).removeprefix("torch."),
        spaces=tuple(spaces),
        reload=_reload(request.smaller, model_class(model_config, config.arch_file).__name__),
        notes=(*_notes(request, model_config), *lost_kernels(config, arch, request.widths)),
        need=estimate_memory(request, offload) if cost else None,
        recovery=_recovery(request),
        **changes,
    )


def _recovery(request: PruningRequest) -> RecoveryEstimate | None:
    """Estimate the recovery of the config, if it has one, and refuse what `prune` would refuse."""
    config = request.config
    if config.recovery is None:
        return None
    # Training libraries take seconds to import.
    from .recovery.checks import check_recovery
    from .recovery.memory import check_recovery_memory, estimate_recovery

    dense = request.model_info.plain_model
    check_recovery(config.recovery, config, dense)
    check_recovery_memory(config.recovery, dense, request.smaller, loaded=False)
    return estimate_recovery(config.recovery, dense, request.smaller)


def _sizes(request: PruningRequest, model: PreTrainedModel) -> dict[str, int]:
    """Return the known sizes of a model, by field of `DryRun`."""
    arch = request.model_info.arch
    itemsize = request.model_info.plain_model.dtype.itemsize
    sizes = {
        "parameters": model.num_parameters(),
        "layer_parameters": sum(describe(model, request.config.arch_file).layer_params),
        "memory": saved_bytes(model, itemsize),
    }
    cached = cached_values(model, arch)
    if cached is not None:
        sizes["cache_per_token"] = cached * itemsize
    return sizes


def _notes(request: PruningRequest, model_config: PretrainedConfig) -> Iterator[str]:
    """Yield remarks that the numbers do not show."""
    config = request.config
    arch = request.model_info.arch
    parameters = request.model_info.plain_model.num_parameters()
    tokens = large_vocabulary(arch, parameters)
    if tokens is not None and not config.removes_tokens:
        share = tokens.size * tokens.unit_params / parameters
        yield f"{tokens.size:,} tokens have {share:.0%} of the parameters; widths={{{VOCAB!r}: N}} keeps N of them"
    if config.removes_tokens and len(config.targets_or_default) > 1 and config.budget is not None:
        yield "the number of removed tokens depends on the text; the other widths assume that all tokens are kept"
    if config.allocation != "uniform":
        yield "the widths of single layers follow from calibration; these widths remove as many parameters in all"
    if getattr(model_config, "quantization_config", None):
        yield "the model is quantized; the sizes are those after unpacking, which all spaces but tokens need"
    elif arch.causal:
        share = _written_share(config)
        # All weights write, those of the head too.
        passes = WRITING_COST * share * (1 + config.holdout) * parameters / sum(arch.layer_params)
        if share:
            yield (
                f"writing: {share:.0%} of the text is written by the model, which takes about as long as {passes:.1f} "
                "forward passes over all of the text; later runs use the same text"
            )


def _written_share(config: StructPruneConfig) -> float:
    """Return the share of the calibration text that the model writes itself."""
    texts = texts_of(with_written_text(config))
    written = sum(text.weight for text in texts if written_by_model(text))
    return written / sum(text.weight for text in texts)


def lost_kernels(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> Iterator[str]:
    """Yield a warning for each kind of space whose new width rules out a kernel of the original width."""
    parts = config.tensor_parallel
    for_channels: list[tuple[int, str]] = []
    for number, is_split, kernel in KERNELS:
        for_channels.append((number * parts if is_split else number, kernel))
    multiples = {
        CHANNEL: for_channels,
        GROUP: [(parts, "tensor parallelism")],
        # One router kernel of vLLM refuses some numbers of experts; see its issue 51521.
        EXPERT: [(parts, "expert parallelism"), (8, "fused router kernels of some engines")],
    }
    for name in widths:
        changes = {(space.width, space.width_in(widths)) for space in arch.of(name)}
        lost: dict[str, int] = {}
        for number, kernel in multiples.get(arch.of(name)[0].unit, ()):
            unfit = [after for before, after in changes if after % number and not before % number]
            if unfit:
                lost[f"{kernel} (multiples of {number})"] = min(unfit)
        if lost:
            yield f"warning: {name} {min(lost.values())} has no {', no '.join(lost)}; see round_to and tensor_parallel"


def _reload(small: PreTrainedModel, auto: str) -> tuple[str, ...]:
    """Return the ways to load a pruned model."""
    if not small.config.get_text_config().is_heterogeneous:
        return (f"plain transformers, {auto}.from_pretrained",)
    return (
        f"transformers, {auto}.from_pretrained, once optimum_structprune has been imported",
        f"transformers without it, {auto}.from_pretrained(..., trust_remote_code=True)",
        "runtimes that take one width for all layers, after `structprune export IN OUT --pad-uniform`",
    )
