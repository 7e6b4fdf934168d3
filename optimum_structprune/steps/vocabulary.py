"""Remove tokens before anything else, and read the text again with the smaller tokenizer."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arch.load import describe
from ..arch.spec import MODEL, VOCAB, Widths
from ..domains.load import load_domains
from ..domains.manifest import Manifest, remember_text
from ..domains.packing import USED
from ..forward.metrics import expected_shares, outputs_for, random_inputs
from ..method.shrink import check_same
from ..record.figures import TrimResult
from ..record.plan import Plan
from ..vocabulary.amount import without_tokens
from ..vocabulary.choose import Choice, VocabularyRequest, choose_tokens, rank_tokens
from ..widths.allocation import widths_of
from .division import divide_budget
from .resize import drop_tokens_


if TYPE_CHECKING:
    from ..pruning.measure import Comparison
    from ..pruning.run import Run


# The number of tokens on which the dense model is asked what it expects.
EXPECTED_TOKENS = 2**14


def prune_vocabulary_(run: Run, request: VocabularyRequest, comparison: Comparison) -> Widths:
    """Remove the tokens that the text of a run needs least, and return the widths of the other spaces.

    Later steps treat the model with fewer tokens as the dense model, and bring it to these widths.
    """
    # Held-out text is not counted, because the counted text chooses the tokens.
    uses = run.manifest().uses()
    held_out = {name for name, use in uses.items() if use != USED}

    with run.report.timed("vocabulary"):
        ranking = rank_tokens(request, run.data.domains, held_out, _expected(run))
        if request.number is None:
            number = divide_budget(run, request, ranking)
        else:
            number = request.number

        budget = request.budget
        others = without_tokens(run.config, None if budget is None else budget.budget.limit)
        if number < request.rows:
            choice = choose_tokens(request, ranking, number, run.data.domains)
            _cut_(run, choice, comparison)

        tokens_suffice = budget is not None and budget.is_met_by({VOCAB: number})
        if others is None or tokens_suffice:
            return {}
        run.data = replace(run.data, config=others)
        return widths_of(others, run.arch, run.model)


def _expected(run: Run) -> Tensor | None:
    """Return the share that the dense model expects of each token in 16,384 tokens of the text, shape `(rows,)`.

    It is None where the user names no text, because the model has written part of the built-in text, and where the
    model predicts no tokens.
    """
    if not run.arch.causal or run.config.domains is None:
        return None
    tokens_per_domain = ceil(EXPECTED_TOKENS / len(run.data.domains))
    shares = []
    for domain in run.data.domains:
        rows = domain.samples[: ceil(tokens_per_domain / domain.samples.shape[1])]
        shares.append(expected_shares(run.model, rows))
    return run.data.mean(torch.stack(shares))


def _cut_(run: Run, choice: Choice, comparison: Comparison) -> None:
    """Read the text of a run with the smaller tokenizer, and remove all other tokens from its model.

    Text that the first reading held out is neither counted nor calibrated on after the second reading.
    """
    report, data, writer = run.report, run.data, run.dense_tokenizer
    with report.timed("domains"):
        seen = Manifest.of(data.config, data.domains, writer).after(run.manifest())
        domains = load_domains(data.config, choice.tokenizer, run.model, seen=seen, writer=writer)
        run.data = replace(data, domains=domains)
    if comparison.measure is not None:
        comparison.measure.read_by(choice.tokenizer, run.model)  # raises if samples are too long for it

    run.changed = True
    kept = torch.tensor(choice.keep[: choice.number])
    # Random tokens, most of them replaced by a kept token.
    ids = torch.searchsorted(kept, random_inputs(run.model)) % choice.number
    outputs = outputs_for(run.model, kept[ids])
    if outputs.shape[-1] == run.arch.of(VOCAB)[0].size:
        outputs = outputs[..., kept]
    drop_tokens_(run.model, run.arch, choice.keep)
    check_same("The model", outputs, outputs_for(run.model, ids))

    run.plan = run.plan.then(Plan(run.arch.model_type, {(MODEL, VOCAB): tuple(kept.tolist())}))
    run.arch = describe(run.model, run.config.arch_file)
    run.tokenizer = choice.tokenizer
    remember_text(run.model, choice.tokenizer)
    report.trimmed = TrimResult(**choice.trimmed, scripts=choice.scripts)
    run.entries += choice.counted
