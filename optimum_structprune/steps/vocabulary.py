"""The step that removes tokens: calibration text chooses them, and is then read again with the smaller tokenizer."""

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
from ..record.figures import TrimResult
from ..record.plan import Plan
from ..vocabulary.amount import without_tokens
from ..vocabulary.choose import Choice, VocabularyRequest, choose_tokens, rank_tokens
from .base import RunState, Step
from .division import divide_budget
from .resize import drop_tokens_


# The number of tokens on which the dense model is asked what it expects.
EXPECTED_TOKENS = 2**14


class TrimVocabulary(Step):
    """Remove the tokens that the calibration text needs least. Later steps treat the trimmed model as the dense model.

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
        """Choose tokens, remove all others, and return the kept tokens. The plan is empty if all tokens are kept."""
        request, domains = self.request, state.data.domains
        # Held-out text is not counted, because the counted text chooses the tokens.
        uses = state.manifest().uses()
        held_out = {name for name, use in uses.items() if use != USED}

        with state.report.timed("vocabulary"):
            ranking = rank_tokens(request, domains, held_out, _expected(state))
            number = request.number
            if number is None:
                number = divide_budget(state, request, ranking)
            if number >= request.rows:
                return Plan(state.arch.model_type, {})
            return self._cut_(state, choose_tokens(request, ranking, number, domains))

    def _cut_(self, state: RunState, choice: Choice) -> Plan:
        """Read the text of a run with the smaller tokenizer, and remove all other tokens from its model.

        Text that the first reading held out is neither counted nor calibrated on after the second reading.
        """
        data, report = state.data, state.report
        with report.timed("domains"):
            seen = Manifest.of(data.config, data.domains, state.tokenizer).after(state.manifest())
            domains = load_domains(data.config, choice.tokenizer, state.model, seen=seen, writer=state.tokenizer)
            state.data = replace(data, domains=domains)
        self.on_tokenizer(choice.tokenizer, state.model)

        state.changed = True
        kept = torch.tensor(choice.keep[: choice.number])
        # Random tokens, most of them replaced by a kept token.
        ids = torch.searchsorted(kept, random_inputs(state.model)) % choice.number
        outputs = outputs_for(state.model, kept[ids])
        if outputs.shape[-1] == state.arch.of(VOCAB)[0].size:
            outputs = outputs[..., kept]
        drop_tokens_(state.model, state.arch, choice.keep)
        check_same("The model", outputs, outputs_for(state.model, ids))

        state.tokenizer = choice.tokenizer
        remember_text(state.model, choice.tokenizer)
        report.trimmed = TrimResult(**choice.trimmed, scripts=choice.scripts)
        state.entries += choice.entries
        return Plan(state.arch.model_type, {(MODEL, VOCAB): tuple(kept.tolist())})


def config_of_the_rest(request: VocabularyRequest, state: RunState) -> StructPruneConfig | None:
    """Return the config of all other spaces after tokens were removed, or None if these keep their widths."""
    budget = request.budget
    rest = without_tokens(state.config, None if budget is None else budget.budget.limit)
    kept = state.plan.keep.get((MODEL, VOCAB))
    number = request.rows if kept is None else len(kept)
    if budget is not None and budget.is_met_by({VOCAB: number}):
        return None
    return rest


def _expected(state: RunState) -> Tensor | None:
    """Return the share that the dense model expects of each token in 16,384 tokens of the text, shape `(rows,)`.

    It is None where the user names no text, because the model has written part of the built-in text, and where the
    model predicts no tokens.
    """
    if not state.arch.causal or state.config.domains is None:
        return None
    tokens_per_domain = ceil(EXPECTED_TOKENS / len(state.data.domains))
    shares = []
    for domain in state.data.domains:
        rows = domain.samples[: ceil(tokens_per_domain / domain.samples.shape[1])]
        shares.append(expected_shares(state.model, rows))
    return state.data.mean(torch.stack(shares))
