"""Compute the sizes of a pruned model from the config of the original model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.devices import default_device
from ..arch.generation import cached_values
from ..arch.load import ModelInfo, describe
from ..arch.meta import model_class
from ..arch.per_layer import is_non_uniform
from ..arch.spec import CHANNEL, EXPERT, GROUP, VOCAB, ArchSpec, Space, Widths
from ..config.pruning import AUTO, RunOptions, StructPruneConfig
from ..record.cost import Cost, check_recovery_memory, recovery_cost
from ..record.report import ShapeSpeed
from ..record.table import aligned, change_row
from ..system.stages import saved_bytes
from ..system.written import Record
from ..vocabulary.amount import large_vocabulary
from ..widths.budget import active_parameters
from .cost import pruning_cost
from .request import DRY_RUN, PruningRequest, check_config_kind, resolve_request


# The multiples that kernels need for the width of channels. Each entry has the number, whether tensor parallelism
# multiplies it, because it splits the matrix, and the kernel.
KERNELS = (
    (8, True, "tensor cores in half precision"),
    (32, False, "llama.cpp's Q8_0 and Q4_0"),
    (64, True, "vLLM's 4-bit kernel Marlin"),
    (128, True, "GPTQ and AWQ in groups of 128"),
    (256, False, "llama.cpp's K-quants"),
)
EFFICIENT_WIDTHS = "docs/serving.md#efficient-widths"
# The labels of the sizes in the table, by field of `DryRun`.
SIZES = {
    "parameters": "parameters",
    "layer_parameters": "  in the layers",
    "active_parameters": "  active for a token",
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
    """The width of one space before and after pruning. If layers differ, `after` has one width per layer."""

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
        notes: Remarks on the numbers.
        cache_per_token: The bytes of keys and values per token during generation, over all layers. A layer with a
            sliding window stores at most its window. It is 0 if the model does not generate, and None if the model
            cannot run without weights.
        active_parameters: The number of parameters that a token runs through in a mixture of experts, else 0.
        cost: The memory of the pruning itself, or None without `cost`.
        recovery: The memory of the recovery, or None if the config has no recovery.
        speed: The predicted and the measured speed-up, or None if the budget does not limit the speed.
        depends_on_text: Whether the sizes after pruning are approximate, because text decides how many tokens are
            removed.
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
    active_parameters: Change = Change(0, 0)
    cost: Cost | None = None
    recovery: Cost | None = None
    speed: ShapeSpeed | None = None
    depends_on_text: bool = False

    @property
    def widths(self) -> dict[str, int | Mapping[int, int]]:
        """Return the chosen width of each space: one number, or one per layer."""
        return {space.name: space.after for space in self.spaces}

    @property
    def sparsity(self) -> float:
        """Return the share of the layers' parameters that is removed."""
        layer_parameters = self.layer_parameters
        if not layer_parameters.before:  # the layers have no description
            return 0.0
        return 1 - layer_parameters.after / layer_parameters.before

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can store, with the widths and the sparsity."""
        values = super().to_dict()
        values["widths"] = self.widths
        values["sparsity"] = self.sparsity
        return values

    def __str__(self) -> str:
        """Return a table of widths, parameters, memory and cache."""
        after = "about" if self.depends_on_text else "after"
        rows = [["", "before", after, ""]]
        for space in self.spaces:
            if isinstance(space.after, Mapping):
                new_widths = list(space.after.values())
            else:
                new_widths = [space.after]
            rows.append(change_row(f"width {space.name}", space.before, new_widths))

        for name, label in SIZES.items():
            size: Change | None = getattr(self, name)
            if size is None:
                rows.append(change_row(label.format(self.dtype), None, None))
            elif size.before:  # some models have no cache, or no experts
                rows.append(change_row(label.format(self.dtype), size.before, size.after))

        lines = [aligned(rows)]
        if self.speed is not None:
            lines.append(str(self.speed))
        lines += self.notes
        lines += [f"loads with {way}" for way in self.reload]

        if self.cost is not None:
            lines.append(f"the pruning, estimated:\n{self.cost}")
        if self.recovery is not None:
            lines.append(f"the recovery, estimated:\n{self.recovery}")
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
    device: str | None = None,
) -> DryRun:
    """Compute the widths and the numbers of parameters after a pruning, without any weights.

    With an allocation other than `uniform`, calibration chooses the widths of single layers. The widths in the result
    remove the same number of parameters in all, to within one step of one layer.

    Args:
        model_config: The config of the original model.
        config: The config of the pruning.
        dtype: The dtype in which memory is counted. The default is the dtype in `model_config`.
        trust_remote_code: Whether to run code that comes with the model.
        cost: Whether to estimate the memory of the pruning too.
        offload: The place of the layers between their calls: `cpu`, `disk`, or None for the device.
        options: The runtime options.
        tokenizer: The tokenizer of the model. With it, the number of tokens is checked too.
        device: The device of the run, which need not exist here. The default is the GPU if there is one, and
            otherwise the CPU.

    Raises:
        StructPruneError: If a pruning with this config would raise. The message names the nearest legal choice.
    """
    check_config_kind(config, options)
    run_device = torch.device(device or default_device())
    info = ModelInfo.without_weights(model_config, config.arch_file, dtype, trust_remote_code, run_device)
    request = resolve_request(config, info, tokenizer, use=DRY_RUN, options=options)
    original = info.plain_model

    sizes = _sizes(request, original)
    smaller_sizes = _sizes(request, request.smaller)
    changes = {name: Change(sizes[name], smaller_sizes[name]) for name in sizes if name in smaller_sizes}

    notes = list(_notes(request, model_config))
    if config.gguf == AUTO:
        notes.append(f"trials choose the type of the file; these sizes are those of {request.config.gguf}")
    notes += lost_kernels(config, info.arch, request.widths)
    pruning = None
    if cost:
        pruning = pruning_cost(request, offload)

    return DryRun(
        model_type=info.arch.model_type,
        dtype=str(original.dtype).removeprefix("torch."),
        spaces=tuple(_space_choices(request)),
        reload=_reload(request.smaller, model_class(model_config, config.arch_file).__name__),
        notes=tuple(notes),
        cost=pruning,
        recovery=_recovery(request),
        speed=request.speed_of(request.widths),
        depends_on_text=_depends_on_text(config),
        **changes,
    )


def _space_choices(request: PruningRequest) -> list[SpaceChoice]:
    """Return the widths of the pruned spaces. Spaces with one width for all layers have one number."""
    choices = []
    for name, width in request.widths.items():
        spaces = request.model_info.arch.of(name)
        original_width = max(space.width for space in spaces)

        if isinstance(width, int):
            choices.append(SpaceChoice(name, original_width, width))
        else:
            by_layer = {space.layer: space.width_in(request.widths) for space in spaces}
            choices.append(SpaceChoice(name, original_width, by_layer))
    return choices


def _recovery(request: PruningRequest) -> Cost | None:
    """Check and estimate the recovery of the config, if it has one.

    Raises:
        StructPruneError: If it does not fit into memory.
    """
    config = request.config
    if config.recovery is None:
        return None

    # Training libraries take seconds to import.
    from ..recovery.checks import check_recovery
    from ..recovery.text import sample_length

    original = request.model_info.plain_model
    check_recovery(config.recovery, config, original)
    cost = recovery_cost(config.recovery, original, request.smaller, sample_length(config.recovery, request.smaller))
    check_recovery_memory(cost, request.model_info.device, loaded=False)
    return cost


def _sizes(request: PruningRequest, model: PreTrainedModel) -> dict[str, int]:
    """Return the sizes of a model by field of `DryRun`, without sizes that are unknown."""
    arch = request.model_info.arch
    described = describe(model, request.config.arch_file)
    itemsize = model.dtype.itemsize
    sizes = {
        "parameters": model.num_parameters(),
        "layer_parameters": sum(described.layer_params),
        "memory": saved_bytes(model, itemsize),
    }
    if any(space.unit == EXPERT for space in described.spaces):
        sizes["active_parameters"] = active_parameters(model, described)

    cached = cached_values(model, arch)
    if cached is not None:
        sizes["cache_per_token"] = cached * itemsize
    return sizes


def _depends_on_text(config: StructPruneConfig) -> bool:
    """Return whether text decides how a budget is divided between tokens and other spaces."""
    return config.removes_tokens and len(config.targets_or_default) > 1 and config.budget is not None


def _notes(request: PruningRequest, model_config: PretrainedConfig) -> Iterator[str]:
    """Yield remarks that the numbers do not show."""
    config = request.config
    parameters = request.model_info.plain_model.num_parameters()
    tokens = large_vocabulary(request.model_info.arch, parameters)
    if tokens is not None and not config.removes_tokens:
        share = tokens.size * tokens.unit_params / parameters
        yield f"{tokens.size:,} tokens have {share:.0%} of the parameters; widths={{{VOCAB!r}: N}} keeps N of them"

    if config.budget is not None and not _depends_on_text(config):
        budget = request.budget
        figures = budget.figures(request.widths)
        limits = []
        for name, limit in budget.limits.items():
            limits.append(f"{name} {budget.text(name, figures[name])} of {budget.text(name, limit)}")
        yield f"meets the budget: {', '.join(limits)}"

    if _depends_on_text(config):
        yield (
            "the number of removed tokens depends on the text, so all sizes after pruning are approximate; the other "
            "widths assume that all tokens are kept"
        )
    if config.allocation != "uniform":
        yield (
            "calibration chooses the widths of single layers; these widths remove the same number of parameters in all"
        )

    if getattr(model_config, "quantization_config", None):
        yield "the model is quantized; the sizes are after unpacking, which pruning needs for all spaces but tokens"


def lost_kernels(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> Iterator[str]:
    """Yield a warning for each space whose new width rules out a kernel that the original width allows."""
    num_devices = config.tensor_parallel
    channel_multiples: list[tuple[int, str]] = []
    for number, is_split, kernel in KERNELS:
        if is_split:
            number *= num_devices
        channel_multiples.append((number, kernel))

    multiples = {
        CHANNEL: channel_multiples,
        GROUP: [(num_devices, "tensor parallelism")],
        # One router kernel of vLLM refuses some numbers of experts; see its issue 51521.
        EXPERT: [(num_devices, "expert parallelism"), (8, "fused router kernels of some engines")],
    }

    for name in widths:
        spaces = arch.of(name)
        kernels: list[str] = []
        unfit_widths: list[int] = []
        for number, kernel in multiples.get(spaces[0].unit, ()):
            unfit = _unfit_widths(spaces, widths, number)
            if unfit:
                kernels.append(f"{kernel} (multiples of {number})")
                unfit_widths += unfit

        if kernels:
            yield f"warning: {name} {min(unfit_widths)} rules out {', '.join(kernels)}; see {EFFICIENT_WIDTHS}"


def _unfit_widths(spaces: Sequence[Space], widths: Widths, number: int) -> list[int]:
    """Return the new widths that are not a multiple of a number although the original width is one."""
    unfit = []
    for space in spaces:
        new_width = space.width_in(widths)
        if new_width % number and not space.width % number:
            unfit.append(new_width)
    return unfit


def _reload(model: PreTrainedModel, auto: str) -> tuple[str, ...]:
    """Return the ways to load a pruned model."""
    if not is_non_uniform(model.config):
        return (f"plain transformers, {auto}.from_pretrained",)
    return (
        f"transformers, {auto}.from_pretrained, once optimum_structprune has been imported",
        f"transformers without it, {auto}.from_pretrained(..., trust_remote_code=True)",
        "runtimes that take one width for all layers, after `structprune export IN OUT --pad-uniform`",
    )
