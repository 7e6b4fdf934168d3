"""`structprune inspect` and `structprune plan`: the spaces of a model and its sizes after a pruning, by its config."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..arch.load import describe
from ..arch.shrink import legal_sizes
from ..arch.spec import VOCAB, ArchSpec
from ..config.pruning import StructPruneConfig
from ..dryrun import dry_run
from ..errors import StructPruneError
from ..record.summary import target_line
from .arguments import pruning_config, run_options
from .loading import Loading
from .output import Result


MOST_LISTED = 1_000_000  # legal widths of a space that are listed one by one


def inspect(args: Namespace) -> Result:
    """Describe a model, which is built on the meta device."""
    model = Loading.of(args).without_weights(args.model)
    arch = describe(model, args.arch_file)
    total = model.num_parameters()
    layers = arch.num_layers or None  # unknown where nothing describes them
    shown_layers = f"{layers} layers, " if layers else ""
    lines = [
        f"{args.model}: {arch.model_type}, {shown_layers}{total:,} parameters",
        f"{'space':<12}{'units':>8}{'parameters':>16}{'share':>8}  legal widths",
    ]

    spaces: dict[str, dict[str, Any]] = {}
    for name in arch.offered:
        space = _space(model.config, arch, name)
        spaces[name] = space
        units = space["units"]
        shown = "-".join(map(str, dict.fromkeys([units[0], units[-1]])))
        parameters = space["parameters"]
        legal = _ranges(legal_sizes(model.config, arch, name))
        lines.append(f"{name:<12}{shown:>8}{parameters:>16,}{parameters / total:>8.1%}  {legal}")

    for reason in dict.fromkeys(reason for _, reason in arch.missing):
        names = ", ".join(name for name, other_reason in arch.missing if other_reason == reason)
        lines.append(f"{names:<11} cannot be pruned: {reason}")

    values = {"model": args.model, "model_type": arch.model_type, "layers": layers, "parameters": total}
    return Result("\n".join(lines), {**values, "spaces": spaces, "missing": dict(arch.missing)})


def _space(config: PretrainedConfig, arch: ArchSpec, name: str) -> dict[str, Any]:
    """Return the numbers of units, the parameters and the legal widths of a space, as JSON takes them."""
    legal = legal_sizes(config, arch, name)
    is_long = name == VOCAB or len(legal) > MOST_LISTED
    return {
        "units": sorted({space.width for space in arch.of(name)}),
        "parameters": sum(space.size * space.unit_params for space in arch.of(name)),
        "legal": _ranges(legal) if is_long else list(legal),
    }


def _ranges(sizes: Sequence[int]) -> str:
    """Return `1, 2, 6` for `[1, 2, 6]`, `1-3` for `[1, 2, 3]`, and `9-27 in steps of 9` for `[9, 18, 27]`."""
    step = sizes[1] - sizes[0] if len(sizes) > 2 else 0
    is_even = sizes[-1] - sizes[0] == step * (len(sizes) - 1)
    if not step or (len(sizes) < 12 and not is_even):
        return ", ".join(map(str, sizes))
    steps = f" in steps of {step}" if step > 1 else ""
    return f"{sizes[0]}-{sizes[-1]}{steps}"


def plan(args: Namespace) -> Result:
    """Compare the original and the pruned model, both on the meta device."""
    if args.tokens:
        from .tokens import plan_tokens

        return plan_tokens(args)

    config = pruning_config(args)
    if args.offload is not None and not args.cost:
        raise StructPruneError("`--offload` changes the memory that `--cost` counts. Add `--cost`.")

    loading = Loading.of(args, arch_file=config.arch_file, offload=None)  # no layer is moved here
    outcome = dry_run(
        loading.config(args.model),
        config,
        loading.torch_dtype,
        args.trust_remote_code,
        args.cost,
        args.offload,
        run_options(args),
        _tokenizer(loading, args.model, config),
    )
    removed = f"Removes {outcome.sparsity:.1%} of the layer parameters."
    if config.sparsity is not None:
        share = 1 - outcome.parameters.after / outcome.parameters.before
        removed = target_line(config.sparsity, outcome.sparsity, share)
    return Result(f"{args.model}: {outcome.model_type}. {removed}\n{outcome}", outcome.to_dict())


def _tokenizer(loading: Loading, name: str, config: StructPruneConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model if tokens may be removed: it says which numbers of tokens are possible."""
    if config.keep_tokens is not None:
        return loading.tokenizer(name)
    if config.removes_tokens is not False:
        with suppress(StructPruneError):  # a config alone has no tokenizer
            return loading.tokenizer(name)
    return None
