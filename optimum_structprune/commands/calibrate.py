"""`structprune calibrate`: the statistics of a model, once, for any number of prunings."""

from __future__ import annotations

from argparse import Namespace

from .arguments import LOADING, OFFLOAD, OVERWRITE, Command, pruning_config, valued
from .output import Result


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


FLAGS = {
    "model": valued("Model id or folder."),
    "output": valued("Folder for the statistics."),
    **OVERWRITE,
    **LOADING,
    **OFFLOAD,
}
HELP = (
    "Store the statistics of a dense model, from which `prune --stats` prunes without running text. It takes the "
    "settings of `prune`; how much is removed plays no part."
)
COMMANDS = (Command("calibrate", HELP, run, FLAGS, config="StructPruneConfig"),)
