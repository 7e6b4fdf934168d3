"""What pruning would give, from the model's config alone: nothing is loaded, and nothing is calibrated."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .arch.load import describe
from .arch.meta import meta_model, model_class
from .arch.shrink import legal_sizes, shrunk_config, text_config
from .arch.spec import ArchSpec, Widths
from .config.pruning import StructPruneConfig
from .forward.generation import cached_values, flops_per_token, why_not_counted
from .plain_json import replace_json
from .pruner import AutoStructPruner
from .pruning.checks import DRY_RUN, check
from .pruning.room import Need, Text, Workload
from .record.text import table
from .system.memory import readable_size
from .widths.budget import biased_spaces


RANKED = "the widths of single layers follow from calibration; these remove as much in all"
PACKED = "the model is quantized: it has to be unpacked before pruning, and this is its size unpacked"


@dataclass(frozen=True)
class Change:
    """A number before and after pruning."""

    before: int
    after: int

    def times(self, factor: int) -> Change:
        """Both numbers multiplied."""
        return Change(self.before * factor, self.after * factor)

    def row(self, label: str) -> tuple[str, str, str, str]:
        """A line of the table."""
        change = f"{self.after / self.before - 1:+.1%}" if self.before else ""
        return label, f"{self.before:,}", f"{self.after:,}", change


@dataclass(frozen=True)
class SpaceChoice:
    """The width of one space.

    Attributes:
        name: The name of the space.
        before: The full width.
        after: How many units are kept: one number, or one per layer where layers differ.
        nearest: The legal widths next to the chosen one, below and above; empty where layers differ.
        legal: The number of legal widths.
    """

    name: str
    before: int
    after: int | Mapping[int, int]
    nearest: tuple[int, ...]
    legal: int

    def row(self) -> tuple[str, str, str, str]:
        """A line of the table."""
        widths = [self.after] if isinstance(self.after, int) else list(self.after.values())
        low, high = min(widths), max(widths)
        after = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        return f"width {self.name}", f"{self.before:,}", after, f"{fmean(widths) / self.before - 1:+.1%}"

    def __str__(self) -> str:
        """How many widths there are to choose from, and the nearest ones."""
        others = f"; next to {self.after}: {' and '.join(map(str, self.nearest))}" if self.nearest else ""
        return f"{self.name}: {self.legal:,} legal widths{others}"


@dataclass(frozen=True)
class DryRun:
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
    need: Need | None = None
    flops_per_token: Change | None = None

    @property
    def widths(self) -> dict[str, int | Mapping[int, int]]:
        """The chosen width of each space: one number, or one per layer."""
        return {space.name: space.after for space in self.spaces}

    @property
    def sparsity(self) -> float:
        """The share of the layers' parameters that is removed."""
        return 1 - self.layer_parameters.after / self.layer_parameters.before

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "widths": self.widths, "sparsity": self.sparsity}

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        replace_json(path, self.to_dict())

    def __str__(self) -> str:
        """Widths, parameters, memory and cache, as a table."""
        rows = [("", "before", "after", "")]
        rows += [space.row() for space in self.spaces]
        rows += [self.parameters.row("parameters"), self.layer_parameters.row("  in the layers")]
        rows.append(self.memory.row(f"bytes in {self.dtype}"))
        if self.cache_per_token is None or self.cache_per_token.before:
            unknown = ("cache bytes per token", "?", "?", "")
            rows.append(unknown if self.cache_per_token is None else self.cache_per_token.row(unknown[0]))
        if self.flops_per_token is not None:
            rows.append(self.flops_per_token.row("operations per token"))
        loads = map("loads with {}".format, self.reload)
        needs = [] if self.need is None else [f"the pruning takes at its peak\n{table(_needed(self.need))}"]
        return "\n".join([table(rows), *map(str, self.spaces), *self.notes, *loads, *needs])


def dry_run(
    model_config: PretrainedConfig,
    config: StructPruneConfig,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    cost: bool = False,
    offload: str | None = None,
) -> DryRun:
    """The widths and parameter counts that pruning with `config` gives, without any weights.

    Args:
        model_config: The config of the model to be pruned.
        config: How it is to be pruned.
        dtype: The dtype in which memory is counted; None takes what the model's config says.
        trust_remote_code: Whether code that comes with the model is run.
        cost: Whether the memory that the pruning takes, and the operations of both models, are counted as well.
        offload: Where the layers are while they do not run: `cpu`, `disk`, or None for the device itself.

    With any other allocation than `uniform` the widths of single layers follow from calibration; those given here
    remove as much in all, to within one step of one layer.

    Raises:
        StructPruneError: If pruning would refuse the config; the message names the nearest legal choice.
    """
    AutoStructPruner.from_config(config)

    def build(wanted: PretrainedConfig) -> PreTrainedModel:
        # In any precision but this, the product that runs experts refuses tensors without memory.
        return meta_model(wanted, config.arch_file, torch.bfloat16, trust_remote_code)

    dense = build(model_config)
    arch = describe(dense, config.arch_file)
    dtype = dtype or _saved_dtype(model_config)
    widths = check(config, arch, dense, DRY_RUN, itemsize=dtype.itemsize)
    biased = biased_spaces(config, arch, [name for name in widths if arch.of(name)[0].inside])
    small = build(shrunk_config(model_config, arch, widths, biased))
    parameters = Change(dense.num_parameters(), small.num_parameters())
    before, after = cached_values(dense, arch), cached_values(small, arch)
    cached = None if before is None or after is None else Change(before, after)
    return DryRun(
        model_type=arch.model_type,
        dtype=str(dtype).removeprefix("torch."),
        spaces=tuple(_choice(name, widths, arch, model_config) for name in widths),
        parameters=parameters,
        layer_parameters=Change(sum(arch.layer_params), sum(describe(small, config.arch_file).layer_params)),
        memory=parameters.times(dtype.itemsize),
        cache_per_token=cached and cached.times(dtype.itemsize),
        reload=_reload(small, model_class(model_config, config.arch_file).__name__),
        notes=_notes(model_config, config),
        need=Workload(config, arch, dense, widths, dtype.itemsize, Text.of(config)).need(offload) if cost else None,
        flops_per_token=_flops(dense, small, arch, config.seq_length) if cost else None,
    )


def _flops(dense: PreTrainedModel, small: PreTrainedModel, arch: ArchSpec, tokens: int) -> Change | None:
    if why_not_counted(dense, arch):
        return None
    return Change(flops_per_token(dense, arch, tokens), flops_per_token(small, arch, tokens))


def _needed(need: Need) -> list[tuple[str, str]]:
    """The memory of a pruning as the rows of a table."""
    sizes = {"on the device": need.weights + need.above, "  weights": need.weights, "  hidden states": need.hidden}
    sizes |= {f"  {need.stage}": need.working, "in CPU memory": need.host}
    return [(label, readable_size(size)) for label, size in sizes.items()]


def _saved_dtype(model_config: PretrainedConfig) -> torch.dtype:
    named = model_config.dtype or torch.float32
    return getattr(torch, named) if isinstance(named, str) else named


def _choice(name: str, widths: Widths, arch: ArchSpec, model_config: PretrainedConfig) -> SpaceChoice:
    legal, spaces, width = legal_sizes(model_config, arch, name), arch.of(name), widths[name]
    before = max(space.width for space in spaces)
    if not isinstance(width, int):
        return SpaceChoice(name, before, {space.layer: space.width_in(widths) for space in spaces}, (), len(legal))
    nearest = legal[: bisect_left(legal, width)][-1:] + legal[bisect_right(legal, width) :][:1]
    return SpaceChoice(name, before, width, tuple(nearest), len(legal))


def _notes(model_config: PretrainedConfig, config: StructPruneConfig) -> tuple[str, ...]:
    ranked = (RANKED,) if config.allocation != "uniform" else ()
    packed = (PACKED,) if getattr(model_config, "quantization_config", None) else ()
    return ranked + packed


def _reload(small: PreTrainedModel, auto: str) -> tuple[str, ...]:
    if not text_config(small.config).is_heterogeneous:
        return (f"plain transformers, {auto}.from_pretrained",)
    return (
        f"transformers, {auto}.from_pretrained, once optimum_structprune has been imported",
        f"transformers without it, {auto}.from_pretrained(..., trust_remote_code=True)",
        "runtimes that take one width for all layers, after `structprune export IN OUT --pad-uniform`",
    )
