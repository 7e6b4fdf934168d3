"""`structprune sweep`: one model at several sizes, and the curve of quality against size."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from ..calibration.stored import Statistics
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..evaluation.curve import Curve, Size
from ..pruner import AutoStructPruner
from ..system.disk import Output
from ..system.processes import across_processes, process_index
from .arguments import pruning_config
from .loading import Loading
from .output import Result, note


def sweep(args: Namespace) -> Result:
    """Check all sizes, then prune to one after the other; each is on disk before the next begins."""
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
    loading = Loading.of(args)
    sizes = [loading.bytes_after(args.model, config) for config in configs.values()]
    Output(args.output).check_place(0 if args.no_save else sum(sizes))
    if (stats := next(iter(configs.values())).stats) is not None:
        Statistics.load(stats)


def _pruned(args: Namespace, sparsity: float, config: StructPruneConfig) -> Size:
    """Prune to one size, and save the model if that is wanted."""
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
