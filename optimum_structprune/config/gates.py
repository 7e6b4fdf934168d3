"""The config of gates that are learned."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict, validated_field

from .fields import Number, Serialisable, config_class, positive


@config_class
@strict
@dataclass(kw_only=True)
class GatesConfig(Serialisable):
    """How gates are learned, for `criterion="ddp"` and `allocation="learned"`.

    Args:
        steps: The number of training steps.
        learning_rate: The largest learning rate of the gates.
        tokens_per_step: The number of calibration tokens in a step, rounded down to whole samples, of which there is
            at least one.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type or lies outside of its range; the message
            names the field and the value.
    """

    steps: int = validated_field(positive, default=300)
    learning_rate: Number = validated_field(positive, default=0.02)
    tokens_per_step: int = validated_field(positive, default=1024)

    def samples_per_step(self, seq_length: int) -> int:
        """The number of samples of so many tokens in a step."""
        return max(1, self.tokens_per_step // seq_length)
