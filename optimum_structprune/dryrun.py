"""What pruning would give, from the model's config alone: nothing is loaded, and nothing is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .arch.load import ModelInfo, describe
from .arch.meta import meta_model, model_class
from .arch.modules import blocks
from .arch.spec import CHANNEL, EXPERT, GROUP, VOCAB, ArchSpec, Widths
from .config.domains import written_by_model
from .config.pruning import RunOptions, StructPruneConfig
from .domains.resolve import texts_of, with_written_text
from .forward.generation import active_parameters, cached_values, flops_per_token, why_not_counted
from .pruning.memory import MemoryEstimate, estimate_memory
from .pruning.request import DRY_RUN, Request, ask, check_config_kind
from .record.table import PERCENT, Row, aligned, cells
from .vocabulary.amount import large_vocabulary
from .written import Record


# Widths of channels have to be multiples of the number; where a matrix is spread over devices, of as many more.
KERNELS = (
    (8, True, "tensor cores in half precision"),
    (32, False, "llama.cpp's Q8_0 and Q4_0, which leave other rows in 16 bits"),
    (64, True, "Marlin, the 4-bit kernel of vLLM and SGLang"),
    (128, True, "GPTQ and AWQ in groups of 128"),
    (256, False, "llama.cpp's K-quants, which leave other rows in more bits"),
)
# The rows of the table, by field of `DryRun`.
SIZES = {
    "parameters": "parameters",
    "layer_parameters": "  in the layers",
    "memory": "bytes in {}",
    "cache_per_token": "cache bytes per token",
    "flops_per_token": "operations per token",
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

    @classmethod
    def of(cls, name: str, widths: Widths, arch: ArchSpec) -> SpaceChoice:
        """What `widths` chooses for the space of a name."""
        spaces, width = arch.of(name), widths[name]
        after = width if isinstance(width, int) else {space.layer: space.width_in(widths) for space in spaces}
        return cls(name, max(space.width for space in spaces), after)


@dataclass(frozen=True)
class DryRun(Record):
    """What pruning would give.

    Attributes:
        model_type: The model type.
        dtype: The dtype in which memory is counted.
        spaces: The chosen widths.
        parameters: The number of parameters.
        layer_parameters: The number of parameters in the layers alone.
        memory: The bytes of all parameters.
        cache_per_token: The bytes of keys and values that generation keeps per token, over all layers (a layer with a
            sliding window keeps no more than its window); None where the model cannot be run without weights, 0
            where it does not generate.
        reload: The ways to load the result.
        notes: What the numbers do not say.
        need: The memory that the pruning itself takes at its peak; None where it was not asked for.
        flops_per_token: The operations per token to read a prompt of `seq_length` tokens; None where they were not
            asked for, or parameters do not say them.
        operations: About how many operations the pruning itself takes; None like those.
    """

    model_type: str
    dtype: str
    spaces: tuple[SpaceChoice, ...]
    parameters: Change
    layer_parameters: Change
    memory: Change
    cache_per_token: Change | None
    reload: tuple[str, ...]
    notes: tuple[str, ...] = ()
    need: MemoryEstimate | None = None
    flops_per_token: Change | None = None
    operations: int | None = None

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
        """JSON-able form."""
        return {**super().to_dict(), "widths": self.widths, "sparsity": self.sparsity}

    def __str__(self) -> str:
        """Widths, parameters, memory and cache, as a table."""
        rows = []
        for space in self.spaces:
            after = [space.after] if isinstance(space.after, int) else [*space.after.values()]
            rows.append(Row(f"width {space.name}", ([space.before], after), change=PERCENT))
        for name, label in SIZES.items():
            size: Change | None = getattr(self, name)
            values = (None, None) if size is None else (size.before, size.after)
            # A model that does not generate has no cache, and operations are not always asked for.
            if values[0] or name == "cache_per_token" and size is None:
                rows.append(Row(label.format(self.dtype), values, change=PERCENT))
        loads = map("loads with {}".format, self.reload)
        needs = [] if self.need is None else [f"the pruning takes at its peak\n{self.need}"]
        return "\n".join([aligned(cells(["before", "after"], rows)), *self.notes, *loads, *needs])


def ask_without_weights(
    model_config: PretrainedConfig,
    config: StructPruneConfig,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    use: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | None = None,
    offloaded: bool = False,
    options: RunOptions | None = None,
) -> Request:
    """Gives what is asked of a model that is not loaded, checked as with weights, which are to be on a `device`."""
    check_config_kind(config)
    saved_dtype = dtype or model_config.dtype or torch.float32
    dtype = getattr(torch, saved_dtype) if isinstance(saved_dtype, str) else saved_dtype
    dense = meta_model(model_config, config.arch_file, dtype, trust_remote_code)
    described = ModelInfo(describe(dense, config.arch_file), dense, device or dense.device, offloaded=offloaded)
    return ask(config, described, tokenizer, use=use, options=options)


def dry_run(
    model_config: PretrainedConfig,
    config: StructPruneConfig,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    cost: bool = False,
    offload: str | None = None,
    options: RunOptions | None = None,
) -> DryRun:
    """The widths and parameter counts that pruning with `config` gives, without any weights.

    Args:
        model_config: The config of the model to be pruned.
        config: How it is to be pruned.
        dtype: The dtype in which memory is counted; None takes what the model's config says.
        trust_remote_code: Whether code that comes with the model is run.
        cost: Whether the memory that the pruning takes, and the operations of both models, are counted as well.
        offload: Where the layers are while they do not run: `cpu`, `disk`, or None for the device itself.
        options: How the machine is to prune it; None stands for the defaults.

    With any other allocation than `uniform` the widths of single layers follow from calibration; those given here
    remove as much in all, to within one step of one layer.

    Raises:
        StructPruneError: If pruning would refuse the config; the message names the nearest legal choice.
    """
    request = ask_without_weights(model_config, config, dtype, trust_remote_code, DRY_RUN, options=options)
    config, arch, widths = request.config, request.model_info.arch, request.widths
    dense, small, dtype = request.model_info.plain_model, request.smaller, request.model_info.plain_model.dtype

    def change(count: Callable[[PreTrainedModel], int | None]) -> Any:
        before, after = count(dense), count(small)
        return None if before is None or after is None else Change(before, after)

    def cached_bytes(model: PreTrainedModel) -> int | None:
        values = cached_values(model, arch)
        return None if values is None else values * dtype.itemsize

    counts_operations = cost and not why_not_counted(dense, arch)
    return DryRun(
        model_type=arch.model_type,
        dtype=str(dtype).removeprefix("torch."),
        spaces=tuple(SpaceChoice.of(name, widths, arch) for name in widths),
        parameters=change(lambda model: model.num_parameters()),
        layer_parameters=change(lambda model: sum(describe(model, config.arch_file).layer_params)),
        memory=change(lambda model: model.num_parameters() * dtype.itemsize),
        cache_per_token=change(cached_bytes),
        reload=_reload(small, model_class(model_config, config.arch_file).__name__),
        notes=(*_notes(model_config, config, dense, arch), *lost_kernels(config, arch, widths)),
        need=estimate_memory(request, offload) if cost else None,
        flops_per_token=change(
            lambda model: flops_per_token(model, arch, config.seq_length) if counts_operations else None
        ),
        operations=_operations(config, arch, dense) if counts_operations else None,
    )


def _operations(config: StructPruneConfig, arch: ArchSpec, dense: PreTrainedModel) -> int:
    """About how many operations a pruning takes; what reads, writes and judges text comes on top."""
    weights = (parameter for block in blocks(dense) for parameter in block.parameters())
    # Two forward passes of the layers over the text, and one of the dense layers for error feedback; where losses are
    # measured, four times as much. See docs/benchmarks.md.
    passes = (2 + (config.feedback > 0)) * config.rounds * (4 if config.searches else 1)
    return 2 * passes * config.num_samples * config.seq_length * active_parameters(dense, arch, weights)


def _notes(
    model_config: PretrainedConfig, config: StructPruneConfig, dense: PreTrainedModel, arch: ArchSpec
) -> Iterator[str]:
    if (tokens := large_vocabulary(arch, dense.num_parameters())) and not config.trims:
        part = tokens.size * tokens.unit_params / dense.num_parameters()
        yield f"{tokens.size:,} tokens have {part:.0%} of the parameters; widths={{{VOCAB!r}: N}} keeps N of them"
    if config.trims and len(config.shrinking) > 1 and config.budget is not None:
        yield "the text says how many tokens go; the other widths are those with all tokens"
    if config.allocation != "uniform":
        yield "the widths of single layers follow from calibration; these remove as much in all"
    if getattr(model_config, "quantization_config", None):
        yield "the model is quantized: it is unpacked before anything but tokens goes, and this is its size unpacked"
    elif arch.causal:
        texts = texts_of(with_written_text(config))
        written = sum(text.weight for text in texts if written_by_model(text)) / sum(text.weight for text in texts)
        # A token takes 1.8 times as long to write as to read, and all weights write, those of the head too.
        passes = 1.8 * written * (1 + config.holdout) * dense.num_parameters() / sum(arch.layer_params)
        if written:
            yield (
                f"writing: {written:.0%} of the text is the model's own, which takes about as long as {passes:.1f} "
                "forward passes over all of it; further runs use it again"
            )


def lost_kernels(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> Iterator[str]:
    """What runs with the present widths of each kind of space and not with `widths`, in one sentence for each kind."""
    parts = config.tensor_parallel
    for name in widths:
        spaces = arch.of(name)
        pairs = {(space.width, space.width_in(widths)) for space in spaces}
        needs = [
            (number * (parts if spread else 1), loss) for number, spread, loss in KERNELS if spaces[0].unit == CHANNEL
        ]
        if spaces[0].unit == GROUP:
            needs = [(parts, "tensor parallelism")]
        if spaces[0].unit == EXPERT:  # such as vLLM's, whose issue 51521 has counts that one of them refuses
            needs = [(parts, "expert parallelism"), (8, "fused router kernels of some engines")]
        lost = {
            f"{loss} (multiples of {number})": min(after for full, after in pairs if after % number)
            for number, loss in needs
            if any(after % number and not full % number for full, after in pairs)
        }
        if lost:
            yield f"warning: {name} {min(lost.values())} has no {', no '.join(lost)}; see round_to and tensor_parallel"


def _reload(small: PreTrainedModel, auto: str) -> tuple[str, ...]:
    if not small.config.get_text_config().is_heterogeneous:
        return (f"plain transformers, {auto}.from_pretrained",)
    return (
        f"transformers, {auto}.from_pretrained, once optimum_structprune has been imported",
        f"transformers without it, {auto}.from_pretrained(..., trust_remote_code=True)",
        "runtimes that take one width for all layers, after `structprune export IN OUT --pad-uniform`",
    )
