"""Fewer tokens: the text chooses them before anything else goes, and is then read again in those that stay."""

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
from ..vocabulary.choose import Choice, VocabularyRequest, choose_tokens
from ..widths.allocation import widths_of
from .resize import drop_tokens_


if TYPE_CHECKING:
    from ..pruning.measure import Comparison
    from ..pruning.run import Run


def prune_vocabulary_(run: Run, request: VocabularyRequest, comparison: Comparison) -> Widths:
    """Remove the tokens that the text of a run needs least, and return the widths of the other spaces.

    Later steps take the model that is left as dense, and bring it to these widths.
    """
    # What is held out, or choices are made on, tells nothing if it is counted.
    aside = {name for name, use in run.manifest().uses().items() if use != USED}
    with run.report.timed("vocabulary"):
        choice = choose_tokens(request, run.data.domains, aside, _expected(run))
        left = without_tokens(run.config, None if request.room is None else request.room.budget.limit)
        if choice is not None:
            _cut_(run, choice, comparison)
        number = request.rows if choice is None else choice.number
        if left is None or request.room is not None and request.room.met_by(number):
            return {}
        run.data = replace(run.data, config=left)
        return widths_of(left, run.arch, run.model)


def _expected(run: Run) -> Tensor | None:
    """Gives how much the dense model expects each token in 16,384 tokens of the text of a run.

    It is None where the user names no text, as built-in text tells little of other text, or the model predicts none.
    """
    if not run.arch.causal or run.config.domains is None:
        return None
    tokens, domains = ceil(2**14 / len(run.data.domains)), [domain.samples for domain in run.data.domains]
    samples = [rows[: ceil(tokens / rows.shape[1])] for rows in domains]
    return run.data.mean(torch.stack([expected_shares(run.model, rows) for rows in samples]))


def _cut_(run: Run, choice: Choice, comparison: Comparison) -> None:
    """Read the text of a run again in the tokens that stay, and leave its model no others. What the first reading held
    out is neither counted nor, in the second, calibrated on.
    """
    report, data, writer = run.report, run.data, run.dense_tokenizer
    kept = choice.keep[: choice.number]
    with report.timed("domains"):
        seen = Manifest.of(data.config, data.domains, writer).after(run.manifest())
        domains = load_domains(data.config, choice.tokenizer, run.model, seen=seen, writer=writer)
        run.data = replace(data, domains=domains)
    if comparison.measure is not None:
        comparison.measure.read_by(choice.tokenizer, run.model)  # refuses samples that are too long for it
    run.changed = True
    tokens = torch.tensor(kept)
    ids = torch.searchsorted(tokens, random_inputs(run.model)) % choice.number  # the same tokens, where they stay
    outputs = outputs_for(run.model, tokens[ids])
    predicts = outputs.shape[-1] == run.arch.of(VOCAB)[0].size
    drop_tokens_(run.model, run.arch, choice.keep)
    check_same("The model", outputs[..., kept] if predicts else outputs, outputs_for(run.model, ids))
    run.plan = run.plan.then(Plan(run.arch.model_type, {(MODEL, VOCAB): kept}))
    run.arch, run.tokenizer = describe(run.model, run.config.arch_file), choice.tokenizer
    remember_text(run.model, choice.tokenizer)
    report.trimmed = TrimResult(**choice.trimmed, scripts=choice.scripts)
    run.entries += choice.counted
