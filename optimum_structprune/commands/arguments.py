"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import yaml


def add_path_arguments(parser: ArgumentParser, model: str, output: str) -> None:
    """Declare what a command that changes a model reads and writes; each argument is the help of one."""
    parser.add_argument("model", help=model)
    parser.add_argument("output", help=output)


def add_text_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that say which text is read."""
    parser.add_argument(
        "--domain",
        action="append",
        type=domain,
        metavar="NAME=SOURCE[@WEIGHT]",
        help="Text: a file, glob, folder, builtin:…, preset:…, self:… or Hub dataset; repeatable.",
    )
    parser.add_argument("--seq-length", type=int, help="Tokens per sample.")
    parser.add_argument("--seed", type=int, help="Seed of everything random.")


def add_calibration_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that say what a model is calibrated on."""
    add_text_arguments(parser)
    parser.add_argument("--select", help="Which samples are used: random, length, diverse or perplexity.")
    parser.add_argument("--num-samples", type=int, help="Calibration samples in all.")
    parser.add_argument("--batch-size", type=int, help="Blocks per forward pass.")


def add_config_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that every command with a `StructPruneConfig` has."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with the fields of StructPruneConfig.")
    parser.add_argument("--criterion", help="How units are scored, such as obs or wanda.")
    parser.add_argument("--arch", metavar="FILE", help="YAML file that describes an architecture of your own.")


def add_loading_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that say how a model is loaded."""
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16 or float16.")
    parser.add_argument("--device", help="Such as cpu or cuda; by default cuda where there is one.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Run code that comes with the model.")


def add_model_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that say how a model is loaded and saved."""
    add_loading_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="Replace the output folder.")


def width(text: str) -> tuple[str, int]:
    """`mlp=1152` as a pair."""
    name, _, number = text.partition("=")
    return name, int(number)


def budget(text: str) -> tuple[str, float]:
    """`parameters=110e6` as a pair."""
    name, _, number = text.partition("=")
    return name, float(number)


def setting(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` as a pair, the value read as YAML: `bf16=true`, `lr_scheduler_type=linear`."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    # YAML takes 1e-4 for a string because it has no point.
    try:
        return name, float(value) if "e" in value.lower() else yaml.safe_load(value)
    except ValueError:
        return name, yaml.safe_load(value)


def domain(text: str) -> dict[str, Any]:
    """`NAME=SOURCE[@WEIGHT]` as the fields of a domain."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise ValueError(f"expected NAME=SOURCE[@WEIGHT], got {text!r}")
    head, at, weight = source.rpartition("@")
    try:
        return {"name": name, "source": head, "weight": float(weight)} if at else {"name": name, "source": source}
    except ValueError:
        return {"name": name, "source": source}
