"""What pruning would give, from the model's config alone: nothing is loaded, and nothing is calibrated."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from .allocation import target_widths
from .arch.load import describe
from .arch.meta import meta_model, model_class
from .arch.shrink import legal_sizes, shrunk_config
from .arch.spec import ArchSpec
from .checks import biased_spaces, check_blocks
from .config import StructPruneConfig
from .criteria import CRITERIA
from .pruner import AutoStructPruner
from .report import table


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
class SpaceChoice(Change):
    """The width of one space.

    Attributes:
        name: Of the space.
        nearest: The legal widths next to the chosen one, below and above.
        legal: Number of legal widths.
    """

    name: str
    nearest: tuple[int, ...]
    legal: int


@dataclass(frozen=True)
class DryRun:
    """What pruning would give.

    Attributes:
        model_type: Of the model.
        dtype: In which memory is counted.
        spaces: The chosen widths.
        parameters: Number of parameters.
        block_parameters: The same for the blocks alone.
        memory: Bytes of all parameters.
        cache_per_token: Bytes of keys and values that generation keeps per token, over all layers (a layer with a
            sliding window keeps no more than its window); None where the model cannot be run without weights, 0
            where it does not generate.
        reload: What loads the result.
    """

    model_type: str
    dtype: str
    spaces: tuple[SpaceChoice, ...]
    parameters: Change
    block_parameters: Change
    memory: Change
    cache_per_token: Change | None
    reload: tuple[str, ...]

    @property
    def widths(self) -> dict[str, int]:
        """The chosen width of each space."""
        return {space.name: space.after for space in self.spaces}

    @property
    def sparsity(self) -> float:
        """Share of the blocks' parameters that goes."""
        return 1 - self.block_parameters.after / self.block_parameters.before

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "widths": self.widths, "sparsity": self.sparsity}

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        """Widths, parameters, memory and cache, as a table."""
        rows = [("", "before", "after", "")]
        rows += [space.row(f"width {space.name}") for space in self.spaces]
        rows += [self.parameters.row("parameters"), self.block_parameters.row("  in the blocks")]
        rows.append(self.memory.row(f"bytes in {self.dtype}"))
        if self.cache_per_token is None or self.cache_per_token.before:
            unknown = ("cache bytes per token", "?", "?", "")
            rows.append(unknown if self.cache_per_token is None else self.cache_per_token.row(unknown[0]))
        lines = [table(rows)]
        for space in self.spaces:
            nearest = " and ".join(map(str, space.nearest)) or "none"
            lines.append(f"{space.name}: {space.legal} legal widths; next to {space.after}: {nearest}")
        return "\n".join([*lines, *(f"loads with {line}" for line in self.reload)])


def dry_run(
    model_config: PretrainedConfig,
    config: StructPruneConfig,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> DryRun:
    """The widths and parameter counts that pruning with `config` gives, without any weights.

    Args:
        model_config: Of the model to be pruned.
        config: How it is to be pruned.
        dtype: In which memory is counted; None takes what the model's config says.
        trust_remote_code: Run code that comes with the model.

    Raises:
        StructPruneError: If pruning would refuse the config; the message names the nearest legal choice.
    """
    AutoStructPruner.from_config(config)
    CRITERIA.get(config.criterion)

    def build(wanted: PretrainedConfig) -> PreTrainedModel:
        # In any precision but this, the product that runs experts refuses tensors without memory.
        return meta_model(wanted, config.arch_file, torch.bfloat16, trust_remote_code)

    dense = build(model_config)
    check_blocks(config)
    arch = describe(dense, config.arch_file)
    widths = target_widths(config, arch, model_config)
    biased = biased_spaces(config, arch, {name: width for name, width in widths.items() if not arch.of(name)[0].whole})
    small = build(shrunk_config(model_config, arch, widths, biased))
    dtype = dtype or _saved_dtype(model_config)
    parameters = Change(dense.num_parameters(), small.num_parameters())
    before, after = _cached(dense, arch), _cached(small, arch)
    cached = None if before is None or after is None else Change(before, after)
    return DryRun(
        model_type=arch.model_type,
        dtype=str(dtype).removeprefix("torch."),
        spaces=tuple(_choice(name, width, arch, model_config) for name, width in widths.items()),
        parameters=parameters,
        block_parameters=Change(sum(arch.block_params), sum(describe(small, config.arch_file).block_params)),
        memory=parameters.times(dtype.itemsize),
        cache_per_token=cached and cached.times(dtype.itemsize),
        reload=(f"plain transformers, {model_class(model_config, config.arch_file).__name__}.from_pretrained",),
    )


def _saved_dtype(model_config: PretrainedConfig) -> torch.dtype:
    named = model_config.dtype or torch.float32
    return getattr(torch, named) if isinstance(named, str) else named


def _choice(name: str, width: int, arch: ArchSpec, model_config: PretrainedConfig) -> SpaceChoice:
    legal = legal_sizes(model_config, arch, name)
    below, above = legal[: bisect_left(legal, width)][-1:], legal[bisect_right(legal, width) :][:1]
    return SpaceChoice(arch.of(name)[0].size, width, name, (*below, *above), len(legal))


@torch.no_grad()
def _cached(model: PreTrainedModel, arch: ArchSpec) -> int | None:
    """Number of values that generation keeps for one token, read off the cache of a run on the meta device: 0 for a
    model that does not generate, None for one that cannot be run there.
    """
    if not (arch.causal or model.config.is_encoder_decoder):
        return 0
    width = model.get_input_embeddings().get_parameter("weight").shape[1]
    token = torch.zeros(1, 1, width, dtype=model.dtype, device=model.device)
    # The masks of other implementations depend on values.
    model.set_attn_implementation("eager")
    try:
        output = model.get_decoder()(inputs_embeds=token, use_cache=True)
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    # The field has another name in newer releases of transformers.
    cache = next(value for value in output.values() if isinstance(value, Cache))
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers)
