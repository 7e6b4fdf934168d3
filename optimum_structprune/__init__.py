"""Structured pruning for the Hugging Face stack: physically smaller models that plain `from_pretrained` loads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

_HOME = {
    "AutoStructPruner": "pruner",
    "DomainConfig": "schema",
    "DryRun": "dryrun",
    "Evaluation": "evaluation",
    "InPlaceError": "errors",
    "Manifest": "calibration.manifest",
    "Plan": "plan",
    "Recovery": "recovery",
    "RecoveryConfig": "recovery_config",
    "SelfTextConfig": "schema",
    "StructPruneCallback": "trainer",
    "StructPruneConfig": "config",
    "StructPruneError": "errors",
    "StructPruner": "pruner",
    "attach_pruner": "trainer",
    "calibrate": "calibration.record",
    "disable_heterogeneous": "heterogeneous",
    "dry_run": "dryrun",
    "enable_heterogeneous": "heterogeneous",
    "evaluate": "evaluation",
    "export_uniform": "export",
    "load_adapter": "adapter",
    "perplexity": "metrics",
    "prune_model": "pruner",
    "recover": "recovery",
    "register_criterion": "criteria",
    "register_pruner": "pruner",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .adapter import load_adapter
    from .calibration.manifest import Manifest
    from .calibration.record import calibrate
    from .config import StructPruneConfig
    from .criteria import register_criterion
    from .dryrun import DryRun, dry_run
    from .errors import InPlaceError, StructPruneError
    from .evaluation import Evaluation, evaluate
    from .export import export_uniform
    from .heterogeneous import disable_heterogeneous, enable_heterogeneous
    from .metrics import perplexity
    from .plan import Plan
    from .pruner import AutoStructPruner, StructPruner, prune_model, register_pruner
    from .recovery import Recovery, recover
    from .recovery_config import RecoveryConfig
    from .schema import DomainConfig, SelfTextConfig
    from .trainer import StructPruneCallback, attach_pruner


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Non-uniform models load with plain from_pretrained once this package is imported; see heterogeneous.py.
import_module(f"{__name__}.heterogeneous").enable_on_import()
