"""The lines of a command that saved a result: how it is loaded, and where its report is."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from ..saving.card import loader_of
from ..saving.names import PAGE_NAME


def result_lines(output: str, config: PretrainedConfig, arch_file: str | None) -> list[str]:
    """Return how a saved result is loaded, and where its report is."""
    loader = loader_of(output, config, arch_file)
    lines = [f"Saved to {output}; load it with {loader}({output!r})"]
    if config.get_text_config().is_heterogeneous:
        lines[0] += " after import optimum_structprune, or with trust_remote_code=True"
    page = Path(output, PAGE_NAME)
    if page.is_file():
        lines.append(f"Report: {page}")
    return lines
