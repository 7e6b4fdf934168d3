"""The text that a training has shown last, as a domain to calibrate on."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import StructPruneError, warn
from .packing import Domain


@dataclass
class RecentText:
    """The latest training tokens, as many as `num_samples` calibration samples of `seq_length` tokens need."""

    num_samples: int
    seq_length: int
    _rows: deque[Tensor] = field(default_factory=deque)

    def add_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in the token ids that a model is called with."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            self.add(ids, kwargs.get("attention_mask"))

    def add(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Take in token ids, shape `(batch, seq_length)`, without those that a mask of the same shape leaves out."""
        real = ids[mask.bool()] if mask is not None and mask.shape == ids.shape else ids
        self._rows.append(real.detach().flatten().cpu())
        most = self.num_samples * self.seq_length
        while len(self._rows) > 1 and len(self) - len(self._rows[0]) >= most:
            self._rows.popleft()

    def __len__(self) -> int:
        """The number of tokens."""
        return sum(map(len, self._rows))

    def domain(self) -> Domain:
        """The tokens as one domain, of which nothing is held out."""
        tokens = torch.cat([torch.zeros(0, dtype=torch.long), *self._rows])
        samples = tokens[len(tokens) % self.seq_length :].view(-1, self.seq_length)[-self.num_samples :]
        if not len(samples):
            raise StructPruneError(self.shortage())
        if len(samples) < self.num_samples:
            warn(
                f"Units are scored and refitted on {len(samples)} samples of {self.seq_length} tokens, all that "
                f"training has shown, where num_samples={self.num_samples} were asked for; start later, or use "
                "calibration='domains'."
            )
        return Domain("training", 1.0, samples, samples[:0])

    def shortage(self) -> str:
        """How much text there is and how much is needed, as a sentence."""
        return (
            f"calibration takes at least one sample of seq_length={self.seq_length} tokens, but training has shown "
            f"{len(self)} so far; start later, lower seq_length, or use calibration='domains'."
        )
