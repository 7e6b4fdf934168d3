"""Print where a command has saved a result, and how to load it again."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from ..arch.per_layer import is_non_uniform
from ..saving.card import loader_of
from ..saving.names import PAGE_NAME


def result_lines(output: str, config: PretrainedConfig, arch_file: str | None) -> list[str]:
    """Return the call that loads a saved result, and the path of its report.

    Args:
        output: The folder of the result.
        config: The config of the model.
        arch_file: The file that describes the architecture.
    """
    loader = loader_of(output, config, arch_file)
    line = f"Saved to {output}; load it with {loader}({output!r})"
    if is_non_uniform(config):
        line += " after import optimum_structprune, or with trust_remote_code=True"

    lines = [line]
    page = Path(output, PAGE_NAME)
    if page.is_file():
        lines.append(f"Report: {page}")
    return lines


def loading_flags(arch_file: str | None, trust_remote_code: bool) -> list[str]:
    """Return the flags that a next command needs to load the same models."""
    flags = []
    if arch_file is not None:
        flags += ["--arch", arch_file]
    if trust_remote_code:
        flags.append("--trust-remote-code")
    return flags
