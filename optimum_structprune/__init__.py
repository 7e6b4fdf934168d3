"""Structured pruning for the Hugging Face stack: physically smaller models that plain `from_pretrained` loads.

The modules in this folder have the public functions. Each folder imports only from earlier folders in this list:
`system`, `config`, `arch`, `domains`, `method`, `widths`, `criteria`, `record`, `vocabulary`, `measure`,
`saving`, `recovery`, `steps`, `pruning`, `search`, `evaluation`, `commands`. Start reading at `method`.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any


__version__ = "0.1.0"

# Each public name is imported when it is first used: `optimum-cli` imports this package on every call.
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {name: module for module, name in re.findall(r"^from (\S+) import \w+ as (\w+)$", _STUB, re.MULTILINE)}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()).union(__all__))


# Non-uniform models load with plain from_pretrained once this package is imported; see arch/per_layer.py.
if os.environ.get("OPTIMUM_STRUCTPRUNE_PATCH", "1") != "0":
    import_module(".arch.per_layer", __name__).enable_heterogeneous()
