"""`structprune sweep`: one model at several sizes, and the curve of quality against size."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import LOADING, Command, pruning_config, switch, valued
from .output import Result, note


if TYPE_CHECKING:
    from ..config.pruning import StructPruneConfig
    from ..evaluation.curve import Size


def run(args: Namespace) -> Result:
    """Check all sizes, then prune to one after the other; each is on disk before the next begins."""
    from ..evaluation.curve import Curve
    from ..system.disk import Output
    from ..system.processes import across_processes, process_index

    configs = _configs(args)
    settings = {**next(iter(configs.values())).to_dict(), "sparsity": None}
    output = Path(args.output)
    with across_processes(), Output(args.output).locked():
        curve = Curve.resume(output, args.model, settings)
        _check(args, configs)
        done = {size.sparsity for size in curve.sizes if args.no_save or _folder(output, size.sparsity).is_dir()}
        for sparsity, config in configs.items():
            if sparsity in done:
                note(args, f"sparsity {sparsity:g} is there already")
                continue
            curve.add(_pruned(args, sparsity, config))
            if process_index() == 0:
                curve.save(output)
    return Result(f"{curve}\nsaved to {args.output}", {**curve.to_dict(), "output": args.output})


def _configs(args: Namespace) -> dict[float, StructPruneConfig]:
    """How to prune to each size, from the largest model to the smallest."""
    from dataclasses import replace

    from ..errors import StructPruneError

    configs = {}
    for sparsity in sorted(set(args.sizes)):
        config = pruning_config(Namespace(**{**vars(args), "sparsity": sparsity}))
        if config.checkpoint_dir is not None:
            raise StructPruneError(
                f"checkpoint_dir={config.checkpoint_dir!r} remembers one run, and a sweep is several; leave it out."
            )
        if config.searches and config.losses_dir is None and config.stats is None:
            config = replace(config, losses_dir=str(Path(args.output) / "losses"))
        configs[sparsity] = config
    return configs


def _check(args: Namespace, configs: dict[float, StructPruneConfig]) -> None:
    """Refuse a size that cannot be reached, before anything is pruned."""
    from ..calibration.stored import Statistics
    from ..dryrun import dry_run
    from ..system.disk import Output
    from .loading import Loading

    loading = Loading.of(args)
    model_config = loading.config(args.model)
    sizes = [
        dry_run(model_config, config, loading.torch_dtype, loading.trust_remote_code).memory.after
        for config in configs.values()
    ]
    Output(args.output).check_place(0 if args.no_save else sum(sizes))
    if (stats := next(iter(configs.values())).stats) is not None:
        Statistics.load(stats)


def _pruned(args: Namespace, sparsity: float, config: StructPruneConfig) -> Size:
    """Prune to one size, and save the model if that is wanted."""
    from time import perf_counter

    from ..evaluation.curve import Size
    from ..pruner import AutoStructPruner
    from .loading import Loading

    start = perf_counter()
    note(args, f"sparsity {sparsity:g}")
    model, tokenizer = Loading.of(args, arch_file=config.arch_file).model_and_tokenizer(args.model)
    pruner = AutoStructPruner.from_config(config)
    pruned = pruner.prune_model(model, tokenizer, inplace=True)
    if not args.no_save:
        folder = _folder(Path(args.output), sparsity)
        # A model without a place on the curve is left from a sweep that was killed.
        pruner.save(pruned, folder, tokenizer, overwrite=True)
    assert pruner.report is not None
    return Size.of(sparsity, pruner.report, perf_counter() - start)


def _folder(output: Path, sparsity: float) -> Path:
    return output / f"sparsity-{sparsity:g}"


FLAGS = {
    "model": valued("Model id or folder."),
    "output": valued("Folder for the curve, and for one pruned model per size."),
    "--sparsity": valued(
        "The shares of the layers' parameters to remove, each between 0 and 1.",
        "X",
        **{"dest": "sizes", "nargs": "+", "type": float, "required": True},
    ),
    "--no-save": switch("Keep the curve only, not the pruned models."),
    **LOADING,
}
HELP = (
    "Prune a model to several sizes, and give the curve of quality against size as CSV, JSON and a picture. A sweep "
    "that was interrupted goes on where it was."
)
OF_ONE_SIZE = ("sparsity", "widths", "budget", "checkpoint_dir")
COMMANDS = (Command("sweep", HELP, run, FLAGS, config="StructPruneConfig", without=OF_ONE_SIZE),)
