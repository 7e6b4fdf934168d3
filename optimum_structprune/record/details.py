"""What a run saw while it pruned, in summary: counts and means, never whole tensors."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..config.fields import read_json
from ..errors import StructPruneError, one_line
from ..plain_json import Record


DETAILS_NAME = "pruning_details.json"


@strict
@dataclass
class Details(Record):
    """What a run saw while it pruned: the `name` and `dtype` of the dense model and the `bytes` of the weights
    "before" and "after", the most bytes that this process had held when a stage ended, by kind of memory, and whether
    the run went on where another was stopped, so that its times are those of the rest.
    """

    model: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    resumed: bool = False

    @classmethod
    def load(cls, path: str | Path) -> "Details":
        """Read what `save` wrote."""
        data = read_json(path)
        try:
            return cls(**data)
        except (TypeError, StrictDataclassError) as error:
            raise StructPruneError(f"{path} is not the record of a pruning: {one_line(error)}") from error
