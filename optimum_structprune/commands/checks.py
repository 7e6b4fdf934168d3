"""Check the flags of a command before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ..config.domains import GENERAL, DomainConfig, as_domain
from ..config.pruning import AUTO, RunOptions, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.sources import check_source, resolve
from ..saving.gguf_types import BLOCKS, GGUF_TYPES
from ..system.disk import GGUF, GGUFOutput, Output
from ..system.errors import StructPruneError, reason_of
from ..system.modules import transformer_folder
from .arguments import pruning_config, recovery_config, run_options, tokens_config
from .output import check_file


def check_flags(args: Namespace) -> None:
    """Raise `StructPruneError` if a value is not legal, a model or a file is missing, or an output exists."""
    flags = vars(args)
    configs: list[Any] = []
    if args.command.config is not None:
        configs = [config for config in CONFIGS[args.command.name](args) if config is not None]

    if flags.get("base_model") and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.base_model):
        raise StructPruneError(f"--base-model {args.base_model!r} is not an id on the Hub. Pass OWNER/NAME.")
    _check_models(args)
    _check_texts(args, configs)

    if isinstance(flags.get("json"), str):
        check_file(args.json, f"--json {args.json}", args.overwrite)
    if "pad_uniform" in flags:
        _check_form(args)
    kinds = [config.gguf for config in configs if getattr(config, "gguf", None)]
    if kinds:
        _check_gguf(args)
    if args.command.name == "plan":
        return  # it writes no output

    # The output of any other command may exist.
    if "--overwrite" in args.command.flags:
        _check_output(args, kinds)


def _check_models(args: Namespace) -> None:
    """Check the models that the arguments name, and replace a folder of modules by the folder of its transformer."""
    for name in args.command.models:
        value = getattr(args, name)
        if isinstance(value, str):
            setattr(args, name, _checked_model(value))
        elif value:
            setattr(args, name, [_checked_model(model) for model in value])


def _check_texts(args: Namespace, configs: Iterable[Any]) -> None:
    """Raise `StructPruneError` if there is no text at the source of a domain, or no file of questions."""
    texts = [getattr(args, "domain", ())]
    texts += [_texts(config) for config in configs]

    for domains in texts:
        for domain in resolve(as_domain(domain) for domain in domains):
            check_source(domain)

    questions = getattr(args, "answers", None)
    if questions not in (None, "builtin") and not Path(questions).is_file():
        raise StructPruneError(f"There is no file {questions}.")


def _check_output(args: Namespace, kinds: Sequence[str]) -> None:
    """Raise `StructPruneError` if the output and the GGUF files of these types cannot be written."""
    if AUTO in kinds:
        kinds = BLOCKS
    for kind in kinds:
        GGUFOutput(gguf_file(args.output, kind), args.overwrite).check()

    is_file = hasattr(args, "pad_uniform") and args.output.endswith(GGUF)
    if is_file:
        GGUFOutput(args.output, args.overwrite).check()
    else:
        Output(args.output, args.overwrite).check()


def _check_form(args: Namespace) -> None:
    """Raise `StructPruneError` if the output of `export` does not fit `--dtype` or `--pad-uniform`."""
    is_file = args.output.endswith(GGUF)
    if args.dtype in GGUF_TYPES and not is_file:
        raise StructPruneError(f"--dtype {args.dtype} requires a file for llama.cpp. Pass an output OUT{GGUF}.")
    if is_file == args.pad_uniform:
        raise StructPruneError(
            f"Name a file OUT{GGUF} for llama.cpp, or a folder with --pad-uniform for runtimes that take one width."
        )


def _check_gguf(args: Namespace) -> None:
    """Raise `StructPruneError` if `--gguf` does not fit `--offload`."""
    if args.offload is not None:
        raise StructPruneError(
            f"--gguf takes a whole model in memory, and --offload {args.offload} is for those that do not fit. Leave "
            f"out either, or run `structprune export {args.output} OUT{GGUF}` where there is room."
        )


def gguf_file(output: str, kind: str) -> str:
    """Return the path of the GGUF file that `--gguf` writes next to an output folder."""
    return f"{os.path.normpath(output)}-{kind.upper()}{GGUF}"


def _texts(config: Any) -> list[DomainConfig]:
    """Return the domains of a config, and its general text."""
    domains = list(getattr(config, "domains", None) or ())
    general_text = getattr(config, "general_text", None)
    if general_text:
        domains.append(DomainConfig(GENERAL, general_text))
    return domains


def prune_configs(args: Namespace) -> tuple[StructPruneConfig, RecoveryConfig | None, RunOptions]:
    """Return the settings of a pruning and of its recovery.

    They are separate, because `prune` saves the pruned model before the recovery begins.
    """
    config = pruning_config(args)
    options = run_options(args)
    recovery = config.recovery
    if recovery is not None:
        config = replace(config, recovery=None)
    if args.resume and options.checkpoint_dir is None:
        options = replace(options, checkpoint_dir=str(progress_folder(args.output)))

    if args.offload is not None and recovery is not None:
        raise StructPruneError(
            f"--offload {args.offload} prunes a model that does not fit, and recovery trains it in memory. Leave out "
            f"recovery, and afterwards run `structprune recover {args.output} OUT --teacher {args.model}`."
        )
    return config, recovery, options


def progress_folder(output: str) -> Path:
    """Return the hidden folder with the checkpoints of `--resume`, which is next to the output."""
    path = Path(output).resolve()
    return path.with_name(f".{path.name}.progress")


# The functions that read the configs of each command.
CONFIGS: dict[str, Callable[[Namespace], Iterable[Any]]] = {
    "prune": prune_configs,
    "plan": lambda args: [tokens_config(args, 1)] if args.tokens else prune_configs(args),
    "recover": lambda args: [recovery_config(args)],
}


def _checked_model(name: str) -> str:
    """Return the folder or the id of a model.

    For a folder of sentence-transformers it is the folder of the transformer, which may be inside the named one.

    Raises:
        StructPruneError: If the name is neither the folder of a model nor a model of the Hub or its cache.
    """
    folder = Path(name)
    if folder.is_dir():
        return _checked_folder(folder, name)
    if folder.is_file():
        raise StructPruneError(
            f"{name!r} is a file. A model is a folder or an id, and GGUF files cannot be pruned. Pass the folder of "
            "the original model, with its safetensors files."
        )

    try:
        hf_hub_download(name, "config.json")
    except Exception as error:  # the network, the Hub and the check of the name raise errors of many classes
        raise StructPruneError(
            f"{name!r} cannot be loaded: there is no such folder, and the Hub has no config of such a model: "
            f"{reason_of(error)}"
        ) from error
    return name


def _checked_folder(folder: Path, name: str) -> str:
    """Return the folder of the transformer in a folder.

    Args:
        folder: The folder.
        name: The folder as the user has named it.

    Raises:
        StructPruneError: If there is no model.
    """
    inside = transformer_folder(folder)
    if inside != folder:
        folder = inside
        name = str(inside)

    if not (folder / "config.json").is_file():
        raise StructPruneError(_no_model(folder, name))
    return name


def _no_model(folder: Path, name: str) -> str:
    """Return the error for a folder without a config, which names the nearest folder with a model."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{name} holds an adapter and no model. In Python, `peft.AutoPeftModelForCausalLM.from_pretrained("
            f"{name!r}).merge_and_unload().save_pretrained(…)` writes a folder for this command."
        )

    text = f"{name!r} cannot be loaded: the folder holds no config.json"
    subfolders = sorted(path.parent for path in folder.glob("*/config.json"))
    if subfolders:
        text += f", and {subfolders[0]} does"
    return f"{text}."
