"""Fewer tokens: the text chooses them before anything else goes, and is then read again in those that stay."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..arch.spec import MODEL, VOCAB, Widths
from ..config.pruning import StructPruneConfig
from ..domains.manifest import COUNTED, Entry
from ..domains.readers import note_reader
from ..forward.metrics import few_inputs, outputs_for
from ..method.shrink import check_same
from ..record.plan import Plan
from ..vocabulary.choose import Tokens, removal_order, wanted_shares
from ..vocabulary.languages import costs_before, scripts_of
from ..vocabulary.tokens import Vocabulary
from ..widths.allocation import legal_widths, smallest_widths
from ..widths.budget import budget_of, budget_without_vocab, token_numbers, widths_of
from .resize import drop_tokens_


if TYPE_CHECKING:
    from ..pruning.run import Run


def remove_tokens_(run: Run, tokens: Tokens, widths: Widths, best_number: Callable[..., int]) -> Widths:
    """Leave the model of a run the tokens that its text needs most; later steps take that as dense, and bring the
    other spaces to the widths that are returned. `best_number` says how many stay where a budget leaves that open and
    losses can be measured.
    """
    with run.report.timed("vocabulary"):
        assert run.dense_tokenizer is not None
        reader, vocabulary = run.model if run.arch.causal else None, tokens.vocabulary
        shares, predicted = wanted_shares(reader, run.config, run.data.domains, run.dense_tokenizer, vocabulary)
        keep_of = partial(tokens.keep, removal_order(vocabulary, shares, tokens.always, predicted))
        number = tokens.number
        if number is None and run.arch.causal:
            number = best_number(run, vocabulary, keep_of, tokens.may)
        elif number is None:
            number = _number_that_is_read(run, tokens, keep_of, {*shares.nonzero().flatten().tolist()})
        config, widths = _without_tokens(run, widths, number)
        run.data = replace(run.data, config=config)
        if number < tokens.rows:
            _keep_tokens_(run, vocabulary, keep_of(number), number)
    return widths


def _number_that_is_read(run: Run, tokens: Tokens, keep_of: Callable[[int], Sequence[int]], read: set[int]) -> int:
    """How many tokens stay where no loss is measured: all that the text reads, and as many others as a budget leaves;
    fewer only where the other spaces cannot give the rest.
    """
    config, arch, model = run.config, run.arch, run.model
    legal = legal_widths(config, arch, model.config)
    numbers, budget = token_numbers(config, arch, legal, tokens.may), budget_of(config, arch, model, legal)
    all_read = bisect_left(numbers, True, key=lambda number: read <= {*keep_of(number)})

    def within(widths: Widths) -> int:  # the place of the largest number that keeps to the budget
        return bisect_right(numbers, budget.limit, key=lambda number: budget.cost({**widths, VOCAB: number})) - 1

    number = numbers[min(max(within({}), all_read), within(smallest_widths(config, arch, legal)))]
    run.report.trimmed = {"tokens": tokens.rows - number, "used": len(read - {*keep_of(number)})}
    return number


def _without_tokens(run: Run, widths: Widths, number: int) -> tuple[StructPruneConfig, Widths]:
    """The config and the final widths of the other spaces, once so many tokens are there."""
    config = run.config
    others = {name: width for name, width in widths.items() if name != VOCAB}
    if config.widths is not None:
        asked = {name: width for name, width in config.widths.items() if name != VOCAB}
        return (replace(config, widths=asked) if asked else config), others
    rest = budget_without_vocab(config, run.arch, run.model, number)
    if rest is not None and config.allocation == "uniform" and others:
        present = budget_without_vocab(config, run.arch, run.model, number, cut=False)
        assert present is not None
        others = dict(widths_of(present, run.arch, run.model))
    return (config, {}) if rest is None else (rest, others)


def _keep_tokens_(run: Run, vocabulary: Vocabulary, keep: Sequence[int], number: int) -> None:
    """Read the text of a run again in the tokens of `keep`, and leave its model those that have weights: the first
    `number`. What the first reading held out is neither counted nor, in the second, calibrated on.
    """
    report, data, dense_tokenizer = run.report, run.data, run.dense_tokenizer
    assert dense_tokenizer is not None
    tokenizer, kept = vocabulary.smaller(keep), tuple(keep[:number])
    texts = (str(dense_tokenizer.decode(ids)) for domain in data.domains for ids in domain.pool)
    vocabulary.check(tokenizer, keep, texts)
    with report.timed("domains"):
        run.data = data.read_again(run.model, dense_tokenizer, tokenizer, run.seen)
    if run.measure is not None and run.arch.causal:
        run.measure.read_by(tokenizer, run.model)  # refuses samples that are too long for it
    with report.timed("languages"):
        languages = run.config.languages or ()
        report.languages = report.languages or costs_before(run.model, dense_tokenizer, run.arch.causal, languages)
    run.changed = True
    ids, tokens = few_inputs(run.model) % number, torch.tensor(kept)
    outputs = outputs_for(run.model, tokens[ids])
    drop_tokens_(run.model, run.arch, keep)
    predicts = run.model.get_output_embeddings() is not None
    check_same("The model", outputs[..., kept] if predicts else outputs, outputs_for(run.model, ids))
    run.plan = run.plan.then(Plan(run.arch.model_type, {(MODEL, VOCAB): kept}))
    run.arch, run.tokenizer = run.described(), tokenizer
    note_reader(run.model, tokenizer)
    report.scripts = dict(scripts_of(vocabulary, {*range(vocabulary.size)} - {*keep}))
    run.counted = [Entry.of(domain, COUNTED) for domain in data.domains]
    if not run.arch.causal:  # hidden states of other tokens do not compare
        run.measure_anew()
