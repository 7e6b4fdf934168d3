"""Fewer tokens: the text chooses them before anything else goes, and is then read again in those that stay."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.shrink import text_config
from ..arch.spec import MODEL, VOCAB, ArchSpec, Space, Widths
from ..arch.vocabulary import named_ids
from ..config.pruning import StructPruneConfig
from ..domains.manifest import COUNTED, Entry
from ..errors import StructPruneError
from ..surgery.plan import Plan
from ..surgery.resize import drop_tokens_
from ..vocabulary.choose import keep_tokens, predicted_shares, removal_order, token_shares, unread
from ..vocabulary.languages import scripts_of, tokens_per_word
from ..vocabulary.tokens import Vocabulary, with_needs
from ..widths.budget import beside_tokens
from .joint import best_number
from .measure import Measure
from .run import Run


# A report counts the tokens that the text never shows where the rows of tokens are more than this share of a model.
MUCH = 0.2


@dataclass(frozen=True)
class Tokens:
    """The tokens of a model that is to have fewer: `rows` of them have weights, and `always` stay, among them those
    that only the tokenizer knows. `number` of them with weights are to stay; None where measured losses choose it.
    """

    vocabulary: Vocabulary
    rows: int
    always: frozenset[int]
    number: int | None

    @classmethod
    def of(
        cls,
        config: StructPruneConfig,
        arch: ArchSpec,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        widths: Widths,
    ) -> Tokens:
        """The tokens of a dense model; a number that it cannot keep is refused."""
        assert tokenizer is not None  # `check` has refused that
        vocabulary, space = Vocabulary.of(tokenizer), arch.of(VOCAB)[0]
        competes = config.searches and config.widths is None and len(widths) > 1
        always = _always(config, model, tokenizer, vocabulary) | {*range(space.size, vocabulary.size)}
        tokens = cls(vocabulary, space.size, frozenset(always), None if competes else space.width_in(widths))
        may = tokens.may
        if tokens.number is not None and tokens.number not in may:
            raise StructPruneError(
                f"vocab={tokens.number:,} is no number of tokens that this model can keep: {may.start:,} of "
                f"{may.stop - 1:,} always stay."
            )
        return tokens

    @property
    def beyond(self) -> int:
        """The number of tokens that the tokenizer names and that have no weights; their ids come after all others."""
        return max(self.vocabulary.size - self.rows, 0)

    @property
    def may(self) -> range:
        """The numbers of tokens with weights that the model can keep."""
        return range(len(self.always) - self.beyond, min(self.rows, self.vocabulary.size) + 1)

    def keep(self, order: Sequence[int], number: int) -> tuple[int, ...]:
        """The ascending ids of the tokens of which `number` have weights, once others have gone in an order."""
        return keep_tokens(self.vocabulary.size, order, number + self.beyond)


def remove_tokens_(run: Run, tokens: Tokens, widths: Widths) -> Widths:
    """Leave the model of a run the tokens that its text needs most; later steps take it as dense, and bring the other
    spaces to the widths that are returned.
    """
    with run.report.timed("vocabulary"):
        keep_of = partial(tokens.keep, _removal_order(run, tokens))
        number = best_number(run, tokens.vocabulary, keep_of, tokens.may) if tokens.number is None else tokens.number
        config, widths = _without_tokens(run, widths, number)
        run.evidence = replace(run.evidence, config=config)
        if number < tokens.rows:
            _keep_tokens_(run, tokens.vocabulary, keep_of(number), number)
    return widths


def _removal_order(run: Run, tokens: Tokens) -> list[int]:
    """The ids of the tokens that may go, those first that the text needs least."""
    domains, size = run.evidence.domains, tokens.vocabulary.size
    predicted = predicted_shares(run.model, domains, size) if run.arch.causal else None
    return removal_order(tokens.vocabulary, token_shares(domains, size), tokens.always, predicted)


def _without_tokens(run: Run, widths: Widths, number: int) -> tuple[StructPruneConfig, Widths]:
    """The config and the final widths of the other spaces, once so many tokens are there."""
    config = run.config
    others = {name: width for name, width in widths.items() if name != VOCAB}
    if config.widths is not None:
        asked = {name: width for name, width in config.widths.items() if name != VOCAB}
        return (replace(config, widths=asked) if asked else config), others
    rest = beside_tokens(config, run.arch, run.model, number)
    return (config, {}) if rest is None else (rest, others)


def _keep_tokens_(run: Run, vocabulary: Vocabulary, keep: Sequence[int], number: int) -> None:
    """Read the text of a run again in the tokens of `keep`, and leave its model those that have weights: the first
    `number`. What the first reading held out is neither counted nor, in the second, calibrated on.
    """
    report, dense, evidence = run.report, run.dense_tokenizer, run.evidence
    assert dense is not None
    tokenizer, kept = vocabulary.smaller(keep), tuple(keep[:number])
    texts = (str(dense.decode(ids)) for domain in evidence.domains for ids in domain.pool)
    vocabulary.check(tokenizer, keep, texts)
    with report.timed("domains"):
        run.evidence = evidence.read_again(run.model, dense, tokenizer, run.seen)
    if run.measure is not None and run.arch.causal:
        run.measure.read_by(tokenizer, run.model)  # refuses samples that are too long for it
    run.changed = True
    drop_tokens_(run.model, run.arch, kept)
    run.plan = run.plan.then(Plan(run.arch.model_type, {(MODEL, VOCAB): kept}))
    run.arch, run.tokenizer = run.described(), tokenizer
    after = tokens_per_word(tokenizer)
    report.words = {code: {"before": of, "after": after[code]} for code, of in tokens_per_word(dense).items()}
    report.scripts = dict(scripts_of(vocabulary, {*range(vocabulary.size)} - {*keep}))
    run.counted = [Entry.of(domain, COUNTED) for domain in evidence.domains]
    if not run.arch.causal:  # hidden states of other tokens do not compare
        run.measure = Measure(run.model, run.evidence.domains, run.arch)


def large_vocabulary(arch: ArchSpec, model: PreTrainedModel) -> Space | None:
    """The space of the tokens where their rows are a large part of a model, else None."""
    much = MUCH * model.num_parameters()
    return next((space for space in arch.of(VOCAB) if space.unit_params * space.size > much), None)


def note_unread(run: Run) -> None:
    """Note in the report how many tokens of a large vocabulary are of scripts that the text hardly ever shows."""
    space = large_vocabulary(run.arch, run.model)
    if run.counted or run.tokenizer is None or space is None or run.evidence.statistics is not None:
        return
    with suppress(StructPruneError):  # a kind of tokenizer that cannot lose tokens, such as a slow one
        vocabulary = Vocabulary.of(run.tokenizer)
        tokens = unread(vocabulary, token_shares(run.evidence.domains, vocabulary.size))
        run.report.unread = {"tokens": tokens, "parameters": tokens * space.unit_params}


def _always(
    config: StructPruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> set[int]:
    """The tokens that stay whatever the text is, those of the tokenizer, of the configs and of `keep_tokens`, with all
    that they are formed from.
    """
    always = {*vocabulary.always, *named_ids(model.config), *named_ids(text_config(model.config))}
    if model.can_generate() and model.generation_config is not None:
        always |= named_ids(model.generation_config)
    if config.keep_tokens is not None:
        always |= _kept_by_user(config.keep_tokens, tokenizer, vocabulary)
    return with_needs((token for token in always if 0 <= token < vocabulary.size), vocabulary.needs)


def _lines(path: str) -> list[str]:
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line]
    except (OSError, ValueError) as error:
        raise StructPruneError(f"keep_tokens={path!r} cannot be read as UTF-8: {error}") from error
    if not lines:
        raise StructPruneError(f"keep_tokens={path!r} is empty; write a token or a text in each line.")
    return lines


def _kept_by_user(named: str, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> set[int]:
    path = os.path.expanduser(named)
    if os.path.isfile(path):  # an expression may be longer than a file system allows a name to be
        ids, lines = tokenizer.get_vocab(), _lines(path)
        # Within a text, a word begins with its space.
        spelled = tokenizer([form for line in lines for form in (line, f" {line}")], add_special_tokens=False)
        return {token for of in spelled["input_ids"] for token in of} | {ids[line] for line in lines if line in ids}
    try:
        kept = {token for token in range(vocabulary.size) if re.search(named, vocabulary.surface(token))}
    except re.error as error:
        raise StructPruneError(f"keep_tokens={named!r} is no file and no regular expression: {error}") from error
    if not kept:
        raise StructPruneError(f"keep_tokens={named!r} is no file, and as a regular expression fits no token.")
    return kept
