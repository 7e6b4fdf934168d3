"""`structprune calibrate`: the statistics of a model, once, for any number of prunings."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .arguments import Command, add_config_arguments, add_loading_arguments, add_path_arguments, pruning_config
from .output import Result, add_output_arguments


HELP = (
    "Store the statistics of a dense model, from which `prune --stats` prunes without running text. It takes the "
    "settings of `prune`; how much is removed plays no part."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; each one that is given overrides the config file."""
    from ..config.pruning import StructPruneConfig

    add_path_arguments(parser, "Model id or folder.", "Folder for the statistics.")
    add_loading_arguments(parser, offload=True)
    add_output_arguments(parser, reads_text=True)
    add_config_arguments(parser, StructPruneConfig)


def run(args: Namespace) -> Result:
    """Run the text through the model and store what pruning needs of it."""
    from ..calibrator import calibrate
    from ..system.disk import OFFLOAD, Output, used_paths
    from ..system.processes import across_processes
    from .loading import Loading

    # How much is removed plays no part here, but a config has to say it.
    config = pruning_config(args, sparsity=0.5)
    loading = Loading.of(args, arch_file=config.arch_file)
    output = Output(args.output, args.overwrite, [args.model, *used_paths(config)])
    with across_processes(), output.locked(), output.beside(OFFLOAD) as scratch:
        output.check()
        model, tokenizer = loading.model_and_tokenizer(args.model, scratch)
        statistics = calibrate(model, tokenizer, config, args.output, args.overwrite)
    return Result(
        f"{statistics}\nsaved to {args.output}; prune with `structprune prune {args.model} OUT --stats {args.output}`",
        {
            "model_type": statistics.model_type,
            "calibration_tokens": statistics.tokens,
            "bytes": sum(file.size for file in statistics.files.values()),
            "output": args.output,
        },
    )


COMMANDS = (Command("calibrate", HELP, add_arguments, run),)
