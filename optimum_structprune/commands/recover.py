"""`structprune recover`: a pruned model in, the same model trained to make up for the loss out."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..config.pruning import CONFIG_NAME, StructPruneConfig
from ..recovery.recover import check_recovery
from ..recovery.teacher import tokens_of_teacher
from ..system.disk import Output, check_apart, unchanging, used_paths
from .arguments import recovery_config
from .loading import Loading, weights_bytes
from .output import Result
from .recovering import pushed, recover_and_save, recovery_for


def recover(args: Namespace) -> Result:
    """Train, save, and show what came of it."""
    config, folder = recovery_config(args), Path(args.model)
    pruning = StructPruneConfig.from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else None
    used = [args.teacher, args.arch_file, *used_paths(config, pruning)]
    output = Output(args.output, args.overwrite, used)
    output.check(weights_bytes(args.model))
    check_apart(args.output, config)
    with output.locked():
        with unchanging(folder):
            recovery = recovery_for(config, args, pruning)
            loading = Loading.of(args)
            small = loading.without_weights(args.model)
            check_recovery(config, recovery.pruning, small)
            if args.teacher is not None:
                tokens_of_teacher(loading.without_weights(args.teacher), small, loading.tokenizer(args.model))
            model, tokenizer = loading.model_and_tokenizer(args.model)
        return pushed(args, recover_and_save(args, recovery, model, tokenizer))
