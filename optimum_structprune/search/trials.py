"""Trials of shapes: prune the model of a run for a measurement, and restore it afterwards.

A search proposes candidates, measures the loss of each in a trial, and takes a candidate with a small loss. A judge
measures the loss: `Divergence` or `SeveralTexts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf, isnan
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..arch.modules import copy_with_shared_weights
from ..arch.spec import VOCAB, Width, Widths
from ..config.domains import OTHER
from ..domains.unseen import texts_for_choices
from ..measure.losses import measure_all, totals
from ..measure.text import ROW, Text
from ..measure.vectors import embed
from ..method.resize import drop_tokens_
from ..record.report import Report
from ..steps.base import RunState
from ..steps.temporary import temporarily_pruned
from ..system.processes import broadcast_object
from .probe import Probe


# A function from a number of tokens to the kept tokens and the tokenizer that has only these tokens.
Keep = Callable[[int], tuple[Sequence[int], PreTrainedTokenizerBase]]
# The number of held-out tokens that compare models with different tokens.
HELDOUT_TOKENS = 4096


class Candidate(NamedTuple):
    """A shape that may be chosen.

    Attributes:
        name: The origin of the shape.
        widths: The widths, with the number of tokens as `vocab`. All other spaces keep their full width.
        predicted_loss: The loss that the search expects.
        gguf: The data type to which the weights are rounded, or None to keep them.
    """

    name: str
    widths: Widths
    predicted_loss: float | None = None
    gguf: str | None = None


def record_shapes(report: Report, candidates: Sequence[Candidate], losses: Sequence[float]) -> Candidate:
    """Return the candidate with the smallest loss, and record all candidates in a report."""
    best = losses.index(min(losses))
    for index, candidate in enumerate(candidates):
        report.shapes.append(
            {
                "proposed_by": candidate.name,
                "widths": candidate.widths,
                "predicted_loss": candidate.predicted_loss,
                "loss": losses[index],
                "chosen": index == best,
            }
        )
    return candidates[best]


class Judge(Protocol):
    """A measurement of the loss of a changed model. The smallest loss is the best."""

    def loss(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> float:
        """Return the loss of a model that reads text with a tokenizer."""
        ...


class Trials:
    """Trials on the model of a run. The model is original again after each trial.

    Args:
        state: The state of the run.
        judge: The measurement.
        tokens: The approximate number of calibration tokens that prune the layers.
        keep: The kept tokens by their number. It is needed for candidates with fewer tokens.
    """

    def __init__(
        self,
        state: RunState,
        judge: Judge,
        tokens: int,
        keep: Keep | None = None,
    ):
        self.state = state
        self.judge = judge
        self.tokens = tokens
        self.keep = keep
        # The last model with fewer tokens, by its number of tokens.
        self._smaller: dict[int, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}

    def loss(self, widths: Widths, gguf: str | None = None) -> float:
        """Return the loss of a shape, which is infinite if it is not a number.

        Args:
            widths: The widths.
            gguf: The data type to which the weights are rounded, or None to keep them.
        """
        state = self.state
        layer_widths = {name: width for name, width in widths.items() if name != VOCAB}
        model = state.model
        tokenizer = state.tokenizer
        if VOCAB in widths:
            model, tokenizer = self._with_tokens(widths[VOCAB])

        pruned: AbstractContextManager[None] = nullcontext()
        if layer_widths:
            pruned = temporarily_pruned(state.model, state.arch, state.data, layer_widths, self.tokens)
        rounded: AbstractContextManager[None] = nullcontext()
        if gguf is not None:
            from ..saving.gguf_file import rounded_to  # most runs write no GGUF file

            rounded = rounded_to(model, gguf)
        with pruned, rounded:
            loss = broadcast_object(self.judge.loss(model, tokenizer))
        return inf if isnan(loss) else loss

    def _with_tokens(self, number: Width) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return a copy of the model with fewer tokens. It shares its weights, so it is pruned with the model."""
        assert self.keep is not None and isinstance(number, int)
        if number not in self._smaller:
            keep, tokenizer = self.keep(number)
            smaller = copy_with_shared_weights(self.state.model)
            drop_tokens_(smaller, self.state.arch, keep)
            self._smaller = {number: (smaller, tokenizer)}
        return self._smaller[number]


class Divergence:
    """Judge shapes by KL(original‖model) on text that is neither calibrated on nor held out."""

    def __init__(self, state: RunState):
        self.data = state.data
        self.probe = Probe.of(state.model, state.arch, state.data)

    def loss(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> float:
        """Return the mean divergence over the domains in nats per token."""
        return float(self.data.mean(self.probe.losses(model)))


class SeveralTexts:
    """The judge of shapes with different tokens: texts that each model reads with its own tokenizer.

    The loss of a causal language model is

        loss = mean over the sources of (loss on the source - loss of the original model on the source)

    in nats per token of the original model. The sources are held-out text of the domains (the mean by their weights),
    built-in text that the run has not read, and text that the original model writes. A short run has no written text.
    For another model, a piece of held-out text has the loss 1 - cos, from the mean last hidden states of both models,
    and the loss is the mean over pieces.
    """

    def __init__(self, state: RunState, tokenizer: PreTrainedTokenizerBase):
        self.data = state.data
        self.causal = state.arch.causal
        tokens = HELDOUT_TOKENS // len(state.data.domains)
        self.texts: dict[str, Text] = {}
        for domain in state.data.domains:
            self.texts[domain.name] = Text.short(domain.probe_or_heldout, tokenizer, tokens)

        self.original_losses = torch.zeros(0)
        self.original_states: list[Tensor] = []
        if not self.causal:
            self.original_states = self._states(state.model, tokenizer)
            return

        # Choices do not depend on unseen text, whether it is measured or not.
        _ = state.unseen
        for text in texts_for_choices(state.config, state.model, tokenizer, state.data.domains, state.manifest()):
            self.texts[f"{OTHER} {text.source}"] = Text(text.rows, tokenizer=tokenizer)
            state.entries += text.entries
        self.texts = {name: text.cut(positions_of(state.model)) for name, text in self.texts.items()}
        self.original_losses = self._losses(state.model, tokenizer)

    def loss(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> float:
        """Return the mean loss of a smaller model over the sources."""
        assert tokenizer is not None
        if self.causal:
            increases = self._losses(model, tokenizer) - self.original_losses
            num_domains = len(self.data.domains)
            return float(torch.cat([self.data.mean(increases[:num_domains])[None], increases[num_domains:]]).mean())

        losses = []
        for states, original_states in zip(self._states(model, tokenizer), self.original_states, strict=True):
            losses.append(1 - cosine_similarity(states, original_states).mean())
        return float(self.data.mean(torch.stack(losses)))

    def _losses(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return the loss on each text in nats per original token, shape `(texts,)`."""
        texts = {name: text.for_tokenizer(tokenizer, model) for name, text in self.texts.items()}
        losses = []
        for name, measured in measure_all(model, texts).items():
            losses.append(totals(measured.loss).sum() / texts[name].tokens.sum())
        return torch.stack(losses)

    def _states(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
        """Return the mean last hidden state of each row by domain, shape `(rows, channels)` each."""
        max_length = int(min(positions_of(model) - 2, 4 * ROW))
        by_domain = []
        for text in self.texts.values():
            documents = ["\n".join(strings) for strings in text.strings]
            rows = [torch.tensor(ids[:max_length]) for ids in tokenizer(documents, verbose=False)["input_ids"]]
            by_domain.append(embed(model, rows))
        return by_domain
