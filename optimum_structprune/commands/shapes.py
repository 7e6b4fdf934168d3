"""`structprune inspect` and `structprune plan`: describe a model, and its size after a pruning, from its config."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..arch.load import describe
from ..arch.shrink import legal_sizes
from ..arch.spec import VOCAB, ArchSpec
from ..config.pruning import FILE, StructPruneConfig
from ..pruning.dryrun import dry_run
from ..record.view import target_line
from ..system.errors import StructPruneError
from .checks import prune_configs
from .loading import SPREAD_DEVICES, Loading, loading_without_weights
from .output import Result


# Spaces with more legal widths than this are described by ranges.
MAX_LISTED_WIDTHS = 1_000_000
# Ranges with fewer widths than this are listed, unless the steps between the widths are equal.
MIN_RANGE = 12


def inspect(args: Namespace) -> Result:
    """Describe a model, which is built on the meta device."""
    model = Loading.of(args).without_weights(args.model)
    arch = describe(model, args.arch_file)
    num_parameters = model.num_parameters()
    num_layers = arch.num_layers or None  # unknown without a description of the layers

    head = [arch.model_type]
    if num_layers is not None:
        head.append(f"{num_layers} layers")
    head.append(f"{num_parameters:,} parameters")
    lines = [
        f"{args.model}: {', '.join(head)}",
        f"{'space':<12}{'units':>8}{'parameters':>16}{'share':>8}  legal widths",
    ]

    spaces: dict[str, dict[str, Any]] = {}
    for name in arch.offered:
        space = _space(model.config, arch, name)
        spaces[name] = space
        units = "-".join(map(str, dict.fromkeys([space["units"][0], space["units"][-1]])))
        parameters = space["parameters"]
        widths = _ranges(legal_sizes(model.config, arch, name))
        lines.append(f"{name:<12}{units:>8}{parameters:>16,}{parameters / num_parameters:>8.1%}  {widths}")

    lines += _missing_lines(arch)
    values = {
        "model": args.model,
        "model_type": arch.model_type,
        "layers": num_layers,
        "parameters": num_parameters,
        "spaces": spaces,
        "missing": dict(arch.missing),
    }
    return Result("\n".join(lines), values)


def _missing_lines(arch: ArchSpec) -> list[str]:
    """Return the spaces that cannot be pruned, by reason."""
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in arch.missing:
        names_by_reason.setdefault(reason, []).append(name)

    lines = []
    for reason, names in names_by_reason.items():
        lines.append(f"{', '.join(names):<11} cannot be pruned: {reason}")
    return lines


def _space(config: PretrainedConfig, arch: ArchSpec, name: str) -> dict[str, Any]:
    """Return the numbers of units, the parameters and the legal widths of a space as plain values for JSON."""
    legal = legal_sizes(config, arch, name)
    is_long = name == VOCAB or len(legal) > MAX_LISTED_WIDTHS

    return {
        "units": sorted({space.width for space in arch.of(name)}),
        "parameters": sum(space.size * space.unit_params for space in arch.of(name)),
        "legal": _ranges(legal) if is_long else list(legal),
    }


def _ranges(sizes: Sequence[int]) -> str:
    """Return `1, 2, 6` for `[1, 2, 6]`, `1-3` for `[1, 2, 3]`, and `9-27 in steps of 9` for `[9, 18, 27]`."""
    if len(sizes) < 3:
        return ", ".join(map(str, sizes))

    step = sizes[1] - sizes[0]
    is_even = sizes[-1] - sizes[0] == step * (len(sizes) - 1)
    if not step or (len(sizes) < MIN_RANGE and not is_even):
        return ", ".join(map(str, sizes))
    if step > 1:
        return f"{sizes[0]}-{sizes[-1]} in steps of {step}"
    return f"{sizes[0]}-{sizes[-1]}"


def plan(args: Namespace) -> Result:
    """Compare the original and the pruned model, both on the meta device."""
    if args.tokens:
        from .tokens import plan_tokens

        return plan_tokens(args)

    config, recovery, options = prune_configs(args)
    config = replace(config, recovery=recovery)
    loading = loading_without_weights(args, config.arch_file)

    device = args.device
    if device in SPREAD_DEVICES:
        device = None
    outcome = dry_run(
        loading.config(args.model),
        config,
        loading.torch_dtype,
        args.trust_remote_code,
        args.cost,
        args.offload,
        options,
        _tokenizer(loading, args.model, config),
        device,
    )

    if config.sparsity is None:
        summary = f"Removes {outcome.sparsity:.1%} of the layer parameters."
    else:
        share = 1 - outcome.parameters.after / outcome.parameters.before
        summary = target_line(config.sparsity, outcome.sparsity, share)
    return Result(f"{args.model}: {outcome.model_type}\n{summary}\n{outcome}", outcome.to_dict())


def _tokenizer(loading: Loading, name: str, config: StructPruneConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model if tokens may be removed. The possible numbers of tokens depend on it."""
    if config.keep_tokens is not None or FILE in (config.budget or {}):
        return loading.tokenizer(name)

    if config.removes_tokens is not False:
        # A folder with only a config has no tokenizer.
        with suppress(StructPruneError):
            return loading.tokenizer(name)
    return None
