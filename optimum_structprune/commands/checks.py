"""Refuses mistakes in the flags before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ..arch.family import read_families
from ..config.domains import GENERAL, DomainConfig, as_domain
from ..config.fields import read_mapping
from ..config.pruning import RunOptions, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.sources import check_source, resolve
from ..errors import StructPruneError, one_line
from ..saving.gguf_types import GGUF_TYPES, check_gguf_type
from ..system.disk import GGUF, GGUFOutput, Output, check_regular_files
from .arguments import pruning_config, recovery_config, run_options, tokens_config
from .output import check_file


def check_flags(args: Namespace) -> None:
    """Refuse illegal values, missing models and files, and existing outputs."""
    given = vars(args)
    configs = [*filter(None, CONFIGS[args.command.name](args))] if args.command.config else []
    if given.get("base_model") and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.base_model):
        raise StructPruneError(f"--base-model {args.base_model!r} is no id on the Hub; give OWNER/NAME.")
    for name in args.command.models:
        for model in [given[name]] if isinstance(given[name], str) else given[name] or ():
            _check_model(model)
    for names in (args, *configs):
        if arch_file := getattr(names, "arch_file", None):
            read_families(arch_file)
    for texts in [given.get("domain", ()), *map(_texts, configs)]:
        for domain in resolve(as_domain(text) for text in texts):
            check_source(domain)
    if (file := given.get("answers")) not in (None, "builtin") and not Path(file).is_file():
        raise StructPruneError(f"There is no file {file}.")
    if isinstance(file := given.get("json"), str):
        check_file(file, f"--json {file}", args.overwrite)
    if "pad_uniform" in given:
        _check_form(args)
    if given.get("gguf"):
        _check_gguf(args)
    if {"output", "overwrite"} <= given.keys():
        kind = GGUFOutput if "pad_uniform" in given and args.output.endswith(GGUF) else Output
        kind(args.output, args.overwrite).check()
    if given.get("push_to_hub") is not None:
        from ..saving.push import check_push  # last, as it imports torch

        check_push(args.push_to_hub, args.private)


def _check_form(args: Namespace) -> None:
    if args.dtype in GGUF_TYPES:
        if not args.output.endswith(GGUF):
            raise StructPruneError(f"--dtype {args.dtype} is of files for llama.cpp; name a file OUT{GGUF}.")
        check_gguf_type(args.dtype)
    if args.output.endswith(GGUF) == args.pad_uniform:
        raise StructPruneError(
            f"Name a file OUT{GGUF} for llama.cpp, or a folder with --pad-uniform for runtimes that take one width."
        )


def _check_gguf(args: Namespace) -> None:
    check_gguf_type(args.gguf)
    if args.offload is not None:
        raise StructPruneError(
            f"--gguf takes a whole model in memory, and --offload {args.offload} is for those that do not fit; leave "
            f"out either, or run `structprune export {args.output} OUT{GGUF}` where there is room."
        )
    GGUFOutput(gguf_file(args.output, args.gguf), args.overwrite).check()


def gguf_file(output: str, kind: str) -> str:
    """The GGUF file that `--gguf` writes beside an output folder."""
    return f"{os.path.normpath(output)}-{kind.upper()}{GGUF}"


def _texts(config: Any) -> list[DomainConfig]:
    """The text that a config names."""
    general = getattr(config, "general_text", None)
    return [*(getattr(config, "domains", None) or ()), *([DomainConfig(GENERAL, general)] if general else ())]


def prune_configs(args: Namespace) -> tuple[StructPruneConfig, RecoveryConfig | None, RunOptions]:
    """Read the settings of a pruning and of a training; the model is saved in between, in case of an interruption."""
    config, options = pruning_config(args), run_options(args)
    recovery = config.recovery
    config = config if recovery is None else replace(config, recovery=None)
    if args.resume and options.checkpoint_dir is None:
        options = replace(options, checkpoint_dir=str(progress_folder(args.output)))
    if args.offload is not None and recovery is not None:
        raise StructPruneError(
            f"--offload {args.offload} prunes a model that does not fit, and recovery trains it in memory; leave out "
            f"recovery, and afterwards run `structprune recover {args.output} OUT --teacher {args.model}`."
        )
    return config, recovery, options


def progress_folder(output: str) -> Path:
    """Gives the hidden folder beside the output in which `--resume` remembers a run."""
    path = Path(output).resolve()
    return path.with_name(f".{path.name}.progress")


# How the flags of each command become configs.
CONFIGS: dict[str, Callable[[Namespace], Iterable[Any]]] = {
    "prune": prune_configs,
    "plan": lambda args: [tokens_config(args, 1) if args.tokens else pruning_config(args), run_options(args)],
    "recover": lambda args: [recovery_config(args)],
}


def _check_model(name: str) -> None:
    """Refuse a name that is neither a model's folder nor a model of the Hub or its cache."""
    check_regular_files(name)
    if not Path(name).is_dir():
        try:
            hf_hub_download(name, "config.json")
        except Exception as error:  # of the network, of the Hub, or of the name
            raise StructPruneError(
                f"{name!r} cannot be loaded: there is no such folder, and as a model of the Hub it gives no config: "
                f"{one_line(error)[:300]}"
            ) from error
    elif not Path(name, "config.json").is_file():
        if Path(name, "adapter_config.json").is_file():
            raise StructPruneError(
                f"{name} holds an adapter and no model. In Python, `peft.AutoPeftModelForCausalLM.from_pretrained("
                f"{name!r}).merge_and_unload().save_pretrained(…)` gives a folder that this command takes."
            )
        inside = min((f", and {path.parent} does" for path in Path(name).glob("*/config.json")), default="")
        raise StructPruneError(f"{name!r} cannot be loaded: the folder holds no config.json{inside}.")
    for index in Path(name).glob("*.index.json"):
        outside: list[str] = []
        with suppress(StructPruneError, LookupError, TypeError, AttributeError):  # loading says what is damaged
            files = read_mapping(index, json.loads)["weight_map"].values()
            outside = [file for file in files if os.path.basename(file) != file or file == os.pardir]
        if outside:
            raise StructPruneError(f"{index} names {outside[0]!r}, which is no file of its folder and is not read.")
