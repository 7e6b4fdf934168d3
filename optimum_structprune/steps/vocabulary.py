"""The step that removes tokens. It chooses them by the calibration text, and reads the text again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import cast

import torch
from torch import Tensor

from ..arch.inference import outputs_for, random_inputs
from ..arch.spec import MODEL, VOCAB, Widths
from ..config.pruning import StructPruneConfig
from ..domains.load import load_domains
from ..domains.manifest import Manifest, remember_text
from ..domains.packing import USED
from ..measure.losses import expected_shares
from ..method.plan import Plan
from ..method.resize import drop_tokens_
from ..method.shrink import check_same
from ..record.figures import TrimResult
from ..vocabulary.amount import without_tokens
from ..vocabulary.choose import Choice, Ranking, VocabularyRequest, choose_tokens, rank_tokens
from .base import RunState, Step


# The number of positions at which the original model predicts the next token.
EXPECTED_TOKENS = 2**12


# A function that chooses the widths of all spaces after the tokens have been ranked.
ChooseWidths = Callable[[RunState, VocabularyRequest, Ranking], Widths]


class TrimVocabulary(Step):
    """Remove the tokens that the calibration text needs least. Later steps treat the trimmed model as the original.

    Args:
        request: The tokens to choose from.
        choose: A function that chooses the widths of all spaces if other spaces share the budget.
    """

    def __init__(
        self,
        request: VocabularyRequest,
        choose: ChooseWidths,
    ):
        super().__init__({VOCAB: request.rows})
        self.request = request
        self.choose = choose

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Choose tokens, remove all others, and return the kept tokens. The plan is empty if all tokens are kept."""
        request = self.request
        domains = state.data.domains

        # Held-out text is not counted, because the counted text chooses the tokens.
        uses = state.manifest().uses()
        held_out = {name for name, use in uses.items() if use != USED}

        with state.report.timed("vocabulary"):
            ranking = rank_tokens(request, domains, held_out, _expected(state))
            request = request.ranked(ranking.order, state.arch, state.model)
            number = request.number
            if number is None:
                state.chosen = self.choose(state, request, ranking)
                number = cast("int", state.chosen.get(VOCAB, request.rows))
            if number >= request.rows:
                return Plan(state.arch.model_type, {})
            return self._cut_(state, choose_tokens(request, ranking, number, domains))

    def _cut_(self, state: RunState, choice: Choice) -> Plan:
        """Read the text of a run with the smaller tokenizer, and remove all other tokens from its model.

        Text that the first reading held out is neither counted nor used for calibration after the second reading.
        """
        data = state.data
        with state.report.timed("domains"):
            seen_text = Manifest.of(data.config, data.domains, state.tokenizer).after(state.manifest())
            domains = load_domains(
                data.config, choice.tokenizer, state.model, earlier=seen_text, writer=state.tokenizer
            )
            state.data = replace(data, domains=domains)

        # The kept tokens, except tokens without rows.
        rows = torch.tensor(choice.keep[: choice.number])

        state.changed = True
        ids = torch.searchsorted(rows, random_inputs(state.model)) % choice.number
        outputs = outputs_for(state.model, rows[ids])
        if outputs.shape[-1] == state.arch.of(VOCAB)[0].size:
            outputs = outputs[..., rows]
        drop_tokens_(state.model, state.arch, choice.keep)
        check_same("The model", outputs, outputs_for(state.model, ids))

        state.tokenizer = choice.tokenizer
        remember_text(state.model, choice.tokenizer)
        state.report.trimmed = TrimResult(**choice.trimmed, scripts=choice.scripts)
        state.entries += choice.entries
        return Plan(state.arch.model_type, {(MODEL, VOCAB): tuple(rows.tolist())})


def config_of_the_rest(request: VocabularyRequest, state: RunState) -> StructPruneConfig | None:
    """Return the config of all other spaces after tokens were removed, or None if they keep their widths."""
    if request.budget is None:
        return without_tokens(state.config)

    config = replace(state.config, targets=tuple(state.chosen or {VOCAB: request.rows}))
    return without_tokens(config, request.budget.budget.limits)


def _expected(state: RunState) -> Tensor | None:
    """Return the share of each token in the predictions of the original model, over 4,096 tokens of text.

    Returns:
        The shares, shape `(rows,)`. None if the model does not predict tokens, or if the config does not set domains,
        because the model has generated part of the built-in text itself.
    """
    if not state.arch.causal or state.config.domains is None:
        return None

    tokens_per_domain = ceil(EXPECTED_TOKENS / len(state.data.domains))
    shares = []
    for domain in state.data.domains:
        rows = domain.samples[: ceil(tokens_per_domain / domain.samples.shape[1])]
        shares.append(expected_shares(state.model, rows))

    return state.data.mean(torch.stack(shares))
