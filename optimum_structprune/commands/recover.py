"""`structprune recover`: a pruned model in, the same model trained to make up for the loss out."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_model_arguments, add_path_arguments, add_text_arguments, setting


if TYPE_CHECKING:
    from ..config.pruning import StructPruneConfig
    from ..config.recovery import RecoveryConfig

NAME = "recover"
HELP = "Train a pruned model with LoRA, with or without a teacher, and save it."
# Flags that are fields of RecoveryConfig under the same name.
FIELDS: dict[str, tuple[type, str]] = {
    "tokens": (int, "Training tokens in all."),
    "kl_weight": (float, "Share of the divergence from the teacher in the loss."),
    "hidden_weight": (float, "Weight of the distance between hidden states."),
    "temperature": (float, "Divides the logits before they are compared."),
    "direction": (str, "forward (teacher's view) or reverse (the model's)."),
    "top_k": (int, "Compare the teacher's k likeliest tokens only."),
    "teacher_logits": (str, "Folder for the teacher's likeliest predictions, written before the model is loaded."),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; each one given overrides the config file."""
    add_path_arguments(parser, "Folder or id of the pruned model.", "Folder for the recovered model.")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the fields of RecoveryConfig.")
    parser.add_argument("--teacher", metavar="MODEL", help="Model to agree with, usually the dense one.")
    for name, (kind, meaning) in FIELDS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=meaning)
    add_text_arguments(parser)
    for flag, owner in (("--lora", "peft.LoraConfig"), ("--training", "TrainingArguments")):
        meaning = f"Field of {owner}; repeatable."
        parser.add_argument(flag, action="append", type=setting, metavar="NAME=VALUE", help=meaning)
    parser.add_argument("--adapter", action="store_true", help="Save the adapter instead of merging it.")
    parser.add_argument("--resume", action="store_true", help="Go on from the last checkpoint of the same command.")
    add_model_arguments(parser)


def run(args: Namespace) -> int:
    """Train, save, and show what came of it."""
    from ..config.pruning import CONFIG_NAME, StructPruneConfig
    from ..recovery.recover import Recovery
    from ..saving.staging import check_target
    from .loading import load_model_and_tokenizer, load_tokenizer

    config = config_from(args)
    check_target(args.output, args.overwrite)
    pruned = (Path(args.model) / CONFIG_NAME).is_file()
    pruning = StructPruneConfig.from_pretrained(args.model) if pruned else None
    if config.teacher_logits is not None and args.teacher is not None:
        # Before the model is loaded, so that the two are never in memory together.
        Recovery(config, pruning).write_teacher_logits(
            args.teacher, load_tokenizer(args.model, args.trust_remote_code)
        )
    model, tokenizer = load_model_and_tokenizer(args.model, args.dtype, args.device, args.trust_remote_code)
    return heal(args, config, pruning, model, tokenizer, args.teacher, args.model, args.overwrite)


def heal(
    args: Namespace,
    config: RecoveryConfig,
    pruning: StructPruneConfig | None,
    model: Any,
    tokenizer: Any,
    teacher: str | None,
    pruned: str,
    overwrite: bool,
) -> int:
    """Train a loaded model and save it, with checkpoints beside the output while it is under way.

    Args:
        args: The arguments, of which `output` and `resume` are read.
        config: How to train.
        pruning: How the model was pruned.
        model: The pruned model.
        tokenizer: Its tokenizer.
        teacher: Model to agree with.
        pruned: Folder of the pruned model.
        overwrite: Replace the output folder.
    """
    import shutil
    from dataclasses import replace

    from ..recovery.recover import Recovery

    beside = f"{args.output.rstrip('/')}.checkpoints"
    own = "output_dir" not in config.training
    recovery = Recovery(replace(config, training={"output_dir": beside, **config.training}), pruning)
    try:
        recovered = recovery.recover_model(model, tokenizer, teacher, resume=getattr(args, "resume", False))
    except KeyboardInterrupt:
        words = ["structprune recover", pruned, args.output, *(["--teacher", teacher] if teacher else [])]
        again = " ".join([*words, *(["--overwrite"] if overwrite else []), "--resume"])
        sys.stderr.write(f"structprune: interrupted; go on with `{again}` and the same settings.\n")
        raise
    recovery.save(recovered, args.output, tokenizer=tokenizer, overwrite=overwrite, pruned=pruned)
    if own:
        shutil.rmtree(beside, ignore_errors=True)
    print(recovery.report)
    print(f"saved to {args.output}")
    return 0


def config_from(args: Namespace) -> RecoveryConfig:
    """The config file, if any, with the flags laid over it."""
    from ..config.fields import read_yaml
    from ..config.recovery import RecoveryConfig

    values: dict[str, Any] = dict(read_yaml(args.config)) if args.config else {}
    flags = {"domains": args.domain, **{name: getattr(args, name) for name in (*FIELDS, "seq_length", "seed")}}
    values.update({name: value for name, value in flags.items() if value is not None})
    for name, pairs in (("lora", args.lora), ("training", args.training)):
        if pairs:
            values[name] = {**values.get(name, {}), **dict(pairs)}
    if args.adapter:
        values["merge"] = False
    return RecoveryConfig.from_dict(values)
