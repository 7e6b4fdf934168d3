"""`structprune inspect` and `structprune plan`: what may shrink in a model, and what would, from its config alone."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from ..arch.load import describe
from ..arch.shrink import legal_sizes
from ..arch.spec import VOCAB
from ..dryrun import dry_run
from ..errors import StructPruneError
from ..record.summary import target_line
from .arguments import pruning_config, run_options
from .loading import Loading
from .output import Result


def inspect(args: Namespace) -> Result:
    """Build the model on the meta device and describe it."""
    model = Loading.of(args).without_weights(args.model)
    arch = describe(model, args.arch_file)
    total, layers = model.num_parameters(), arch.num_layers or None  # they are unknown where nothing describes them
    lines = [
        f"{args.model}: {arch.model_type}, {f'{layers} layers, ' if layers else ''}{total:,} parameters",
        f"{'space':<12}{'units':>8}{'parameters':>16}{'share':>8}  legal widths",
    ]
    offered = {}
    for name in arch.offered:
        spaces = arch.of(name)
        parameters = sum(space.size * space.unit_params for space in spaces)
        legal, units = legal_sizes(model.config, arch, name), sorted({space.width for space in spaces})
        shown = "-".join(map(str, dict.fromkeys((units[0], units[-1]))))
        lines.append(f"{name:<12}{shown:>8}{parameters:>16,}{parameters / total:>8.1%}  {_ranges(legal)}")
        # There may be very many, such as all numbers of tokens.
        listed = _ranges(legal) if name == VOCAB or len(legal) > 1_000_000 else [*legal]
        offered[name] = {"units": units, "parameters": parameters, "legal": listed}
    for reason in dict.fromkeys(reason for _, reason in arch.missing):
        names = ", ".join(name for name, why in arch.missing if why == reason)
        lines.append(f"{names:<11} cannot be pruned: {reason}")
    values = {"model": args.model, "model_type": arch.model_type, "layers": layers, "parameters": total}
    return Result("\n".join(lines), {**values, "spaces": offered, "missing": dict(arch.missing)})


def _ranges(sizes: Sequence[int]) -> str:
    """`[1, 2, 6]` as it is, `[1, 2, 3]` as `1-3`, and `[9, 18, 27]` as `9-27 in steps of 9`."""
    step = sizes[1] - sizes[0] if len(sizes) > 2 else 0
    if not step or (len(sizes) < 12 and sizes[-1] - sizes[0] != step * (len(sizes) - 1)):
        return ", ".join(map(str, sizes))
    return f"{sizes[0]}-{sizes[-1]}" + f" in steps of {step}" * (step > 1)


def plan(args: Namespace) -> Result:
    """Build the dense and the pruned model on the meta device and compare them."""
    if args.tokens:
        from .tokens import plan_tokens

        return plan_tokens(args)
    config = pruning_config(args)
    if args.offload is not None and not args.cost:
        raise StructPruneError("--offload says where a cost is counted for; add --cost.")
    loading = Loading.of(args, arch_file=config.arch_file, offload=None)  # no layer is moved here
    model_config = loading.config(args.model)
    dtype, options = loading.torch_dtype, run_options(args)
    reader = None if config.keep_tokens is None else loading.tokenizer(args.model)
    outcome = dry_run(model_config, config, dtype, args.trust_remote_code, args.cost, args.offload, options, reader)
    removed = f"removes {outcome.sparsity:.1%} of the layer parameters."
    if config.sparsity is not None:
        share = 1 - outcome.parameters.after / outcome.parameters.before
        removed = target_line(config.sparsity, outcome.sparsity, share)
    lines = [f"{args.model}: {outcome.model_type}. {removed[:1].upper()}{removed[1:]}", str(outcome)]
    return Result("\n".join(lines), outcome.to_dict())
