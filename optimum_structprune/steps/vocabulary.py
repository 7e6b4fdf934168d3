"""The step that removes tokens: calibration text chooses them, and is then read again in the kept tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.spec import MODEL, VOCAB, Widths
from ..config.pruning import StructPruneConfig
from ..domains.load import load_domains
from ..domains.manifest import Manifest, remember_text
from ..domains.packing import USED
from ..forward.metrics import expected_shares, outputs_for, random_inputs
from ..method.shrink import check_same
from ..record.plan import Plan
from ..vocabulary.amount import without_tokens
from ..vocabulary.choose import Choice, VocabularyRequest, choose_tokens
from .base import RunState, Step
from .resize import drop_tokens_


# Tokens of calibration text on which the dense model's predictions are added to the counts.
PREDICTED_TOKENS = 2**14


class TrimVocabulary(Step):
    """Remove the tokens that the calibration text needs least. Later steps take the trimmed model as the dense one.

    Args:
        request: The tokens to choose from.
        on_tokenizer: A function that gets the new tokenizer and the model before any token is removed. It may raise
            if the measurements cannot be made with this tokenizer.
    """

    def __init__(
        self,
        request: VocabularyRequest,
        on_tokenizer: Callable[[PreTrainedTokenizerBase, PreTrainedModel], None] = lambda tokenizer, model: None,
    ):
        super().__init__({VOCAB: request.rows})
        self.request = request
        self.on_tokenizer = on_tokenizer

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Choose tokens, remove all others, and return the kept tokens; the plan is empty if all of them stay."""
        with state.report.timed("vocabulary"):
            # Held-out text and text of choices are not counted, so that they still say something new.
            uncounted = {name for name, use in state.manifest().uses().items() if use != USED}
            choice = choose_tokens(self.request, state.data.domains, uncounted, _expected(state))
            if choice is None:
                return Plan(state.arch.model_type, {})
            return self._cut_(state, choice)

    def _cut_(self, state: RunState, choice: Choice) -> Plan:
        """Read the text again in the kept tokens, and remove all others from the model.

        Text that the first reading held out is not counted, and the second reading does not calibrate on it.
        """
        data, report = state.data, state.report
        with report.timed("domains"):
            seen = Manifest.of(data.config, data.domains, state.tokenizer).after(state.manifest())
            domains = load_domains(data.config, choice.tokenizer, state.model, seen=seen, writer=state.tokenizer)
            state.data = replace(data, domains=domains)
        self.on_tokenizer(choice.tokenizer, state.model)

        state.changed = True
        kept = choice.keep[: choice.number]
        tokens = torch.tensor(kept)
        # The same tokens before and after, as far as they are kept.
        ids = torch.searchsorted(tokens, random_inputs(state.model)) % choice.number
        outputs = outputs_for(state.model, tokens[ids])
        predicts_tokens = outputs.shape[-1] == state.arch.of(VOCAB)[0].size
        drop_tokens_(state.model, state.arch, choice.keep)
        check_same("The model", outputs[..., kept] if predicts_tokens else outputs, outputs_for(state.model, ids))

        state.tokenizer = choice.tokenizer
        remember_text(state.model, choice.tokenizer)
        report.scripts, report.trimmed = choice.scripts, choice.trimmed
        state.entries += choice.counted
        return Plan(state.arch.model_type, {(MODEL, VOCAB): kept})


def config_of_the_rest(request: VocabularyRequest, state: RunState) -> StructPruneConfig | None:
    """Return the config of all other spaces after tokens were removed, or None if they keep their widths."""
    room = request.room
    rest = without_tokens(state.config, None if room is None else room.budget.limit)
    if rest is None:
        return None
    kept = state.plan.keep.get((MODEL, VOCAB))
    number = request.rows if kept is None else len(kept)
    if room is not None and room.met_by(number):
        return None
    return rest


def _expected(state: RunState) -> Tensor | None:
    """Return the mean probability of each token in the dense model's predictions on calibration text.

    The result is None if the user names no text, because built-in text says little about other text, or if the model
    does not predict the next token.
    """
    if not state.arch.causal or state.config.domains is None:
        return None
    domains = [domain.samples for domain in state.data.domains]
    tokens = ceil(PREDICTED_TOKENS / len(domains))
    shares = [expected_shares(state.model, rows[: ceil(tokens / rows.shape[1])]) for rows in domains]
    return state.data.mean(torch.stack(shares))
