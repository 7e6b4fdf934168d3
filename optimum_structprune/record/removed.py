"""What a pruning has removed, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..arch.spec import LAYER, MODEL, VOCAB


NAMES = {
    "mlp": "FFN channels",
    "attention": "KV groups",
    "expert": "experts",
    "hidden": "channels of the residual stream",
    LAYER: "layers",
    VOCAB: "tokens of the vocabulary",
}


def removed(report: Mapping[str, Any]) -> Iterator[str]:
    """What went of each kind of space, such as "384 of 1,536 FFN channels (25 %) in each of 30 layers"."""
    for kind, by_layer in sorted(report["widths"].items()):
        full, name = report["dense_widths"][kind], NAMES.get(kind, f"units of {kind}")
        gone = [full - width for width in by_layer.values()]
        if not any(gone):
            continue
        share = sum(gone) / (full * len(gone))
        if len({*gone}) > 1:
            count = f"{min(gone):,} to {max(gone):,} of {full:,} {name} ({share:.0%} in the mean)"
        else:
            count = f"{gone[0]:,} of {full:,} {name} ({share:.0%})"
        where = "" if int(next(iter(by_layer))) == MODEL else f" in each of {len(gone)} layers"
        yield f"{count}{where}".replace("%", " %")
