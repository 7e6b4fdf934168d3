"""Find the transformer in a folder of sentence-transformers, which may be in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import StructPruneError


# The list of modules in the root of a folder, and the config of every model and module.
MODULES = "modules.json"
CONFIG = "config.json"
# The classes that pass texts to one of several models.
ROUTERS = ("Router", "Asym")


def transformer_folder(folder: Path) -> Path:
    """Return the folder of the transformer in a folder of sentence-transformers. Any other folder is returned itself.

    Raises:
        StructPruneError: If the folder holds several models.
    """
    for path in ("", *_paths(folder)):
        if _is_model(folder / path):
            return folder / path

    modules = _modules(folder)
    if any(str(module.get("type")).rpartition(".")[2] in ROUTERS for module in modules):
        parts = [path.parent.name for path in sorted(folder.glob(f"*/{CONFIG}")) if _is_model(path.parent)]
        raise StructPruneError(
            f"{folder} holds several models behind a Router of sentence-transformers. Prune one of them "
            f"({', '.join(parts) or 'its folder'}), and put the result in its place. Do not remove tokens, because "
            "all models use the same token ids."
        )
    return folder


def modules_root(folder: Path) -> Path:
    """Return the folder of sentence-transformers around the folder of its transformer, or `folder` itself."""
    resolved = folder.resolve()
    if not (folder / MODULES).is_file() and resolved.name in _paths(resolved.parent):
        return resolved.parent
    return folder


def _is_model(folder: Path) -> bool:
    """Return whether the config in a folder is the config of a model."""
    with suppress(OSError, ValueError):
        return "model_type" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return False


def _modules(folder: Path) -> list[dict[str, Any]]:
    """Return the entries in the list of modules of a folder, or no entries without such a list."""
    with suppress(OSError, ValueError):
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        if isinstance(modules, list):
            return [module for module in modules if isinstance(module, dict)]
    return []


def _paths(folder: Path) -> Iterator[str]:
    """Yield the names of the modules' folders directly inside a folder."""
    for module in _modules(folder):
        path = str(module.get("path", ""))
        if Path(path).name == path:
            yield path
