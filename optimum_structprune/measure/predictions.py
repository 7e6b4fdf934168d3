"""Predict next tokens, and compute the logits of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from ..arch.devices import rows_at_once
from ..arch.hooks import in_fast_dtype, replaced_forward
from ..arch.inference import input_device, on_device, run_model
from .kl import Align, aligned_divergence, divergence, estimated_divergence


# On a CPU, the number of tokens in a forward pass, and the number of tokens whose loss is computed at a time. The loss
# copies their logits in fp32.
TOKENS_PER_PASS = 512
LOSS_TOKENS = 128
FP32_BYTES = 4


def tokens_at_once(device: torch.device, vocabulary: int) -> int:
    """Return the number of tokens whose loss is computed at a time on a device."""
    return rows_at_once(device, FP32_BYTES * vocabulary, LOSS_TOKENS)


def tokens_per_pass(model: Any) -> int:
    """Return the default number of tokens in a forward pass, by the size of their logits; see `rows_at_once`."""
    return rows_at_once(input_device(model), model.dtype.itemsize * _vocabulary(model), TOKENS_PER_PASS)


def _vocabulary(model: Any) -> int:
    """Return the number of logits of a model."""
    return int(model.config.get_text_config().vocab_size)


@dataclass
class Predictions:
    """The predictions of a model at some positions.

    Attributes:
        values: The inputs of the head, or logits, shape `(positions, features)`.
        head: The head, or None if `values` are logits.
    """

    values: Tensor
    head: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of the logits. The hooks of accelerate move the inputs of an offloaded head."""
        weight = self.values
        if self.head is not None:
            weight = next(self.head.parameters())
        if weight.is_meta:
            return self.values.device
        return weight.device

    @torch.no_grad()
    def logits(self, start: int, end: int, device: torch.device | None = None) -> Tensor:
        """Return the logits of the positions `start` to `end`, shape `(end - start, vocab)`, on a device."""
        values = self.values[start:end]
        if self.head is not None:
            with in_fast_dtype([self.head]):
                values = self.head(values.to(self.device))
        return values.to(device)

    def divergence(
        self, logits: Tensor, start: int, end: int, temperature: float = 1.0, align: Align | None = None
    ) -> Tensor:
        """Return the KL divergence from the positions `start` to `end` to the logits of another model; see `kl`."""
        return divergence(logits, self.logits(start, end, logits.device), temperature, align)


@dataclass
class StoredPredictions:
    """Parts of the next-token distributions of a model, which a teacher file stores.

    Attributes:
        ids: The ids of the stored tokens, shape `(positions, tokens)`, int64. A token may occur more than once.
        probabilities: Their probabilities, of the same shape, fp32.
        negative_entropy: The negative entropy of the distributions in nats, shape `(positions,)`, fp32.
        losses: The losses of the tokens of the text in nats, shape `(positions,)`, fp32; NaN where they are unknown.
        vocab_size: The number of tokens of the model.
        has_rest: Whether the other tokens count as one more token. Without it, the probabilities sum to 1.
    """

    ids: Tensor
    probabilities: Tensor
    negative_entropy: Tensor
    losses: Tensor
    vocab_size: int
    has_rest: bool = False

    def at(self, places: slice | Tensor, device: torch.device) -> StoredPredictions:
        """Return the predictions at some positions, on a device."""
        return replace(
            self,
            ids=self.ids[places].to(device),
            probabilities=self.probabilities[places].to(device),
            negative_entropy=self.negative_entropy[places].to(device),
            losses=self.losses[places].to(device),
        )

    def divergence(
        self, logits: Tensor, start: int, end: int, temperature: float = 1.0, align: Align | None = None
    ) -> Tensor:
        """Return an estimate of the KL divergence; see `Predictions.divergence`.

        The predictions are stored at the temperature. The estimate has no bias, except with `has_rest`, and at the
        parts of tokens that the model lacks.
        """
        part = self.at(slice(start, end), logits.device)
        if align is None:
            return estimated_divergence(
                logits, part.ids, part.probabilities, part.negative_entropy, temperature, self.has_rest
            )

        whole = part.probabilities.new_zeros(len(part.ids), self.vocab_size)
        whole.scatter_add_(1, part.ids, part.probabilities)
        # With `has_rest`, the stored entropy counts a token that the aligned distributions lack.
        negative_entropy = None if self.has_rest else part.negative_entropy
        return aligned_divergence(logits, whole, align, temperature, negative_entropy)


class Predictor:
    """A model that predicts tokens without the logits of a whole batch in memory.

    The first forward pass replaces the head by a function that returns its input. If the model returns this input
    unchanged, the head alone computes the logits, and runs later on a few tokens at a time. Otherwise, for example if
    the model caps its logits, the logits of the whole batch are computed.

    Args:
        model: The model.
        whole: Whether the head runs only inside the model, for example because its weights are sharded.
    """

    def __init__(self, model: Any, whole: bool = False):
        self.model = model
        self.head = bare_model(model).get_output_embeddings()
        self.whole = whole or self.head is None or next(self.head.parameters()).is_meta
        # Whether the output of the head is the output of the model, or None before the first forward pass.
        self._is_plain: bool | None = None

    @classmethod
    def of(cls, model: Any) -> Predictor:
        """Return a predictor for a model, or a predictor itself."""
        if isinstance(model, Predictor):
            return model
        return cls(model)

    @property
    def tokens_at_once(self) -> int:
        """Return the number of tokens whose loss is computed at a time."""
        return tokens_at_once(input_device(self.model), _vocabulary(self.model))

    def run(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the model on a batch, and return its logits, shape `(batch, seq_length, vocab)`.

        Args:
            inputs: `input_ids`, shape `(batch, seq_length)`, and further inputs. An encoder-decoder makes the inputs
                of its decoder from `labels`.
        """
        options = accepted_inputs(bare_model(self.model), inputs)
        if not self.model.config.is_encoder_decoder:
            options.pop("labels", None)
        ids = options.pop("input_ids")
        return run_model(self.model, ids, **on_device(options, input_device(self.model))).logits

    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Any], positions: Tensor) -> Predictions:
        """Predict tokens.

        Args:
            inputs: The inputs of `run`.
            positions: The indices of the positions to predict from, in the flattened batch.
        """
        if self.whole or self._is_plain is False:
            return _at(self.run(inputs), positions)

        hidden: list[Tensor] = []

        def keep_hidden(states: Tensor, *_: Any, **__: Any) -> Tensor:
            hidden.append(states)
            return states[..., :1]

        with replaced_forward(self.head, keep_hidden):
            output = self.run(inputs)
        if self._is_plain is None:
            self._is_plain = len(hidden) == 1 and is_same(output, hidden[0][..., :1])
            if not self._is_plain:
                return _at(self.run(inputs), positions)
        return _at(hidden[0], positions, self.head)


def _at(values: Tensor, positions: Tensor, head: nn.Module | None = None) -> Predictions:
    """Return the predictions at some positions of a flattened batch."""
    values = values.flatten(0, 1)
    return Predictions(values[positions.to(values.device)], head)


def is_same(output: Any, expected: Tensor) -> bool:
    """Return whether the output of a model is what its head returned."""
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    return torch.equal(output.detach().float(), expected.detach().to(output.device).float())


def bare_model(model: Any) -> Any:
    """Return a model without the wrappers of torch.compile, DDP and an adapter."""
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "module", model)
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def accepted_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Select the inputs that a model's `forward` takes, and disable its cache.

    transformers can only separate packed documents without a cache.
    """
    parameters = signature(type(model).forward).parameters
    takes_all = any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters.values())
    selected = dict(inputs)
    selected["use_cache"] = False
    if takes_all:
        return selected
    return {name: value for name, value in selected.items() if name in parameters}
