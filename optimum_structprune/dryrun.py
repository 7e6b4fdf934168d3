"""Dry runs: the sizes that a pruning would give, from the model's config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
        memory: The bytes of all parameters.
        reload: The ways to load the result.
        notes: What the numbers do not say.
        cache_per_token: The bytes of keys and values that generation keeps per token, over all layers (a layer with a
            sliding window keeps no more than its window); None where the model cannot be run without weights, 0
            where it does not generate.
        need: The memory that the pruning itself takes at its peak; None where it was not asked for.
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
            if size is None or size.before:  # a model that does not generate has no cache
                values = (None, None) if size is None else (size.before, size.after)
                rows.append(Row(label.format(self.dtype), values, change=PERCENT))
        loads = map("loads with {}".format, self.reload)
        needs = [] if self.need is None else [f"the pruning takes at its peak\n{self.need}"]
        return "\n".join([aligned(cells(["before", "after"], rows)), *self.notes, *loads, *needs])


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
    """Give the widths and parameter counts that pruning with `config` gives, without any weights.

    With any other allocation than `uniform` the widths of single layers follow from calibration. Those given here
    remove as much in all, to within one step of one layer.

    Args:
        model_config: The config of the model to be pruned.
        config: How it is to be pruned.
        dtype: The dtype in which memory is counted; None takes what the model's config says.
        trust_remote_code: Whether code that comes with the model is run.
        cost: Whether the memory that the pruning takes is counted as well.
        offload: Where the layers are while they do not run: `cpu`, `disk`, or None for the device itself.
        options: How the machine is to prune it; None stands for the defaults.
        tokenizer: The model's; without it, tokens that cannot go are not known.

    Raises:
        StructPruneError: If pruning would refuse the config; the message names the nearest legal choice.
    """
    check_config_kind(config, options)
    info = ModelInfo.without_weights(model_config, config.arch_file, dtype, trust_remote_code)
    request = ask(config, info, tokenizer, use=DRY_RUN, options=options)
    arch, dense = info.arch, info.plain_model
    before, after = (_sizes(request, model) for model in (dense, request.smaller))
    changes = {name: Change(before[name], after[name]) for name in before if name in after}
    spaces = []
    for name, width in request.widths.items():
        by_layer = {space.layer: space.width_in(request.widths) for space in arch.of(name)}
        widest = max(space.width for space in arch.of(name))
        spaces.append(SpaceChoice(name, widest, width if isinstance(width, int) else by_layer))
    return DryRun(
        model_type=arch.model_type,
        dtype=str(dense.dtype).removeprefix("torch."),
        spaces=tuple(spaces),
        reload=_reload(request.smaller, model_class(model_config, config.arch_file).__name__),
        notes=(*_notes(request, model_config), *lost_kernels(config, arch, request.widths)),
        need=estimate_memory(request, offload) if cost else None,
        **changes,
    )


def _sizes(request: Request, model: PreTrainedModel) -> dict[str, int]:
    """The sizes of a model that are known, by field of `DryRun`."""
    arch, itemsize = request.model_info.arch, request.model_info.plain_model.dtype.itemsize
    sizes = {"parameters": model.num_parameters(), "memory": model.num_parameters() * itemsize}
    sizes["layer_parameters"] = sum(describe(model, request.config.arch_file).layer_params)
    if (values := cached_values(model, arch)) is not None:
        sizes["cache_per_token"] = values * itemsize
    return sizes


def _notes(request: Request, model_config: PretrainedConfig) -> Iterator[str]:
    """Yield sentences on all that the numbers do not say."""
    config, arch, parameters = request.config, request.model_info.arch, request.model_info.plain_model.num_parameters()
    if (tokens := large_vocabulary(arch, parameters)) and not config.removes_tokens:
        part = tokens.size * tokens.unit_params / parameters
        yield f"{tokens.size:,} tokens have {part:.0%} of the parameters; widths={{{VOCAB!r}: N}} keeps N of them"
    if config.removes_tokens and len(config.targets_or_default) > 1 and config.budget is not None:
        yield "the text says how many tokens go; the other widths are those with all tokens"
    if config.allocation != "uniform":
        yield "the widths of single layers follow from calibration; these remove as much in all"
    if getattr(model_config, "quantization_config", None):
        yield "the model is quantized: it is unpacked before anything but tokens goes, and this is its size unpacked"
    elif arch.causal:
        texts = texts_of(with_written_text(config))
        written = sum(text.weight for text in texts if written_by_model(text)) / sum(text.weight for text in texts)
        # A token takes 1.8 times as long to write as to read. All weights write, those of the head too.
        passes = 1.8 * written * (1 + config.holdout) * parameters / sum(arch.layer_params)
        if written:
            yield (
                f"writing: {written:.0%} of the text is the model's own, which takes about as long as {passes:.1f} "
                "forward passes over all of it; further runs use it again"
            )


def lost_kernels(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> Iterator[str]:
    """Yield a warning for each kind of space that loses a kernel of the dense widths."""
    parts = config.tensor_parallel
    needs = {
        CHANNEL: [(number * (parts if spread else 1), loss) for number, spread, loss in KERNELS],
        GROUP: [(parts, "tensor parallelism")],
        # Such as those of vLLM, whose issue 51521 has counts that one of them refuses.
        EXPERT: [(parts, "expert parallelism"), (8, "fused router kernels of some engines")],
    }
    for name in widths:
        pairs = {(space.width, space.width_in(widths)) for space in arch.of(name)}
        lost = {}
        for number, loss in needs.get(arch.of(name)[0].unit, ()):
            if after := [after for full, after in pairs if after % number and not full % number]:
                lost[f"{loss} (multiples of {number})"] = min(after)
        if lost:
            yield f"warning: {name} {min(lost.values())} has no {', no '.join(lost)}; see round_to and tensor_parallel"


def _reload(small: PreTrainedModel, auto: str) -> tuple[str, ...]:
    """The ways to load a model."""
    if not small.config.get_text_config().is_heterogeneous:
        return (f"plain transformers, {auto}.from_pretrained",)
    return (
        f"transformers, {auto}.from_pretrained, once optimum_structprune has been imported",
        f"transformers without it, {auto}.from_pretrained(..., trust_remote_code=True)",
        "runtimes that take one width for all layers, after `structprune export IN OUT --pad-uniform`",
    )
