"""`structprune sweep`: one model at several sizes, and the curve of quality against size."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

from ..arch.load import Described
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..pruner import AutoStructPruner
from ..pruning.checks import check, check_arguments
from ..pruning.units import run_key
from ..record.facts import Facts, as_csv, as_text, facts_of
from ..sources.data import CalibrationData
from ..system.disk import Output
from ..system.processes import across_processes, process_index
from ..system.resume import Resume
from ..widths.budget import widths_of
from ..written import replace_text
from .checks import sweep_configs
from .loading import Loading
from .output import Result, note


def sweep(args: Namespace) -> Result:
    """Check all sizes, then prune to one after the other; each is on disk before the next begins."""
    configs, output = sweep_configs(args), Path(args.output)
    with across_processes(), Output(args.output).locked():
        _check(args, configs)
        finished = _store(args, configs[min(configs)])
        saved = finished.load()
        if saved is None:
            finished.save(0, {})  # so that a sweep which is killed at once goes on too
        with finished.readable():
            models = {} if saved is None else {name: Facts(**facts) for name, facts in saved.values.items()}
        for sparsity, config in configs.items():
            name, folder = str(sparsity), output / f"sparsity-{sparsity}"
            if name in models and (args.no_save or folder.is_dir()):
                note(args, f"sparsity {name} is there already")
            else:
                note(args, f"sparsity {name}")
                models["dense"], models[name] = _pruned(args, config, None if args.no_save else folder)
                models = {size: models[size] for size in ("dense", *sorted(models.keys() - {"dense"}, key=float))}
                finished.save(len(models) - 1, {size: asdict(facts) for size, facts in models.items()})
            if process_index() == 0:
                replace_text(output / "curve.csv", as_csv(models))
    lines = [as_text(models, compared=False), *_coinciding(models), f"saved to {args.output}"]
    values = {"models": {name: asdict(facts) for name, facts in models.items()}, "output": args.output}
    return Result("\n".join(lines), values)


def _check(args: Namespace, configs: Mapping[float, StructPruneConfig]) -> None:
    """Refuse a size that cannot be reached, and a folder of something else, before a model is loaded."""
    loading, output = Loading.of(args), Path(args.output)
    sizes = [loading.check(args.model, config)[1] for config in configs.values()]
    Output(args.output).check_place(0 if args.no_save else sum(sizes))
    if output.exists() and not (output / "size.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise StructPruneError(f"{output} holds something else than a sweep; name another output folder.")


def _store(args: Namespace, config: StructPruneConfig) -> Resume:
    """What remembers the sizes of a sweep; one of another model or text, or with other settings, is refused."""
    model, tokenizer = Loading.of(args, arch_file=config.arch_file).model_and_tokenizer(args.model)
    check_arguments(model, tokenizer, None)
    described = Described.of(model, config.arch_file)
    check(config, described, widths_of(config, described.arch, described.unpacked))
    any_size = replace(
        CalibrationData.read(config, model, tokenizer), config=replace(config, sparsity=0.5, losses_dir=None)
    )
    return Resume(Path(args.output), run_key(any_size, model, {}), "size")


def _pruned(args: Namespace, config: StructPruneConfig, folder: Path | None) -> tuple[Facts, Facts]:
    """Prune to one size, and save the model if there is a folder; the facts of the dense model and of the smaller."""
    model, tokenizer = Loading.of(args, arch_file=config.arch_file).model_and_tokenizer(args.model)
    pruner = AutoStructPruner.from_config(config)
    pruned = pruner.prune_model(model, tokenizer, inplace=True)
    if folder is not None:
        # A model without a place on the curve is left from a sweep that was killed.
        pruner.save(pruned, folder, tokenizer, overwrite=True)
    assert pruner.report is not None
    before, after = facts_of(pruner.report.to_dict()).values()
    for domain, ppl in ({} if pruner.report.recovery is None else pruner.report.recovery.perplexity).items():
        before.perplexity[domain] = ppl.get("dense", before.perplexity.get(domain))
        after.perplexity[domain] = ppl["recovered"]
    return before, after


def _coinciding(models: Mapping[str, Facts]) -> Iterator[str]:
    """The neighbours of equal widths, in sentences."""
    for (name, facts), (other, others) in pairwise(models.items()):
        if (facts.widths, facts.layers) == (others.widths, others.layers):
            yield f"sparsity {name} and {other} come to the same widths, which are multiples (round_to)."
