"""The smaller vocabulary of a run: the text chooses it before anything else, and is then read again in its tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import dequantized
from ..arch.shrink import text_config
from ..arch.spec import MODEL, VOCAB, ArchSpec, Space, Widths
from ..arch.vocabulary import named_ids
from ..config.domains import written_by_model
from ..config.pruning import StructPruneConfig
from ..domains.load import Domain
from ..domains.manifest import COUNTED, Entry, Manifest
from ..domains.resolve import texts_of
from ..errors import StructPruneError
from ..record.report import Report
from ..surgery.plan import Plan
from ..surgery.resize import drop_tokens_
from ..vocabulary.choose import keep_tokens, predicted_shares, removal_order, token_shares, unread
from ..vocabulary.languages import scripts_of, tokens_per_word
from ..vocabulary.tokens import Vocabulary, with_needs
from ..widths.budget import beside_tokens
from .evidence import Evidence
from .joint import best_number
from .measure import Measure
from .run import Run


# A report counts the tokens that the text never shows where the rows of tokens are more than this share of a model.
MUCH = 0.2


@dataclass(frozen=True)
class SmallerVocabulary:
    """The ids of the tokens that stay, ascending, the tokenizer that has no others, the text in dense tokens, and how
    many of the tokens that go are of each script.
    """

    keep: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase
    dense_domains: tuple[Domain, ...]
    scripts: Mapping[str, int]


def read_text(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: Mapping[str, Tensor] | None,
    widths: Widths,
    report: Report,
) -> tuple[Evidence, SmallerVocabulary | None, Widths]:
    """Read the text that a config names, and choose the tokens that stay where the vocabulary gets smaller; the widths
    that are returned are those of all other spaces.

    The calibration text chooses the tokens, and is then read again in those that stay. The second evidence is for a
    model without the other tokens, and its config no longer asks for fewer. What the first reading held out is neither
    counted nor, in the second, calibrated on.
    """
    model = _readable(model, config)
    if tokenizer is None or VOCAB not in widths:
        return Evidence.read(config, model, tokenizer, inputs), None, widths
    vocabulary, rows = Vocabulary.of(tokenizer), arch.of(VOCAB)[0].size
    number = arch.of(VOCAB)[0].width_in(widths)
    others: Widths = {name: width for name, width in widths.items() if name != VOCAB}
    # A tokenizer may name tokens that the model has no rows for; they are kept, with ids after all others.
    most, beyond = min(rows, vocabulary.size), range(rows, vocabulary.size)
    always = _always(config, model, tokenizer, vocabulary) - {*beyond}
    competing = config.searches and config.widths is None and bool(others)  # else the number is given
    if not competing and not len(always) <= number <= most:
        raise StructPruneError(
            f"vocab={number:,} is no number of tokens that this model can keep: {len(always):,} of {most:,} always "
            "stay."
        )
    first, again = _for_two_readings(config)
    dense = Evidence.read(first, model, tokenizer, counts=True)
    shares = token_shares(dense.domains, vocabulary.size)
    predicted = predicted_shares(model, dense.domains, vocabulary.size) if arch.causal else None
    order = removal_order(vocabulary, shares, {*always, *beyond}, predicted)

    def keep_of(number: int) -> tuple[int, ...]:
        return keep_tokens(vocabulary.size, order, number + len(beyond))

    if competing:
        number = best_number(config, arch, model, dense, vocabulary, keep_of, range(len(always), most + 1), report)
        rest = beside_tokens(again, arch, model, number)
        again = again if rest is None else replace(again, targets=rest.targets, budget=rest.budget)
        others = {} if rest is None else others
        if number == rows:
            return replace(dense, config=again), None, others
    keep = keep_of(number)
    smaller = vocabulary.smaller(keep)
    texts = (str(tokenizer.decode(ids)) for domain in dense.domains for ids in domain.pool)
    vocabulary.check(smaller, keep, texts)
    gone = scripts_of(vocabulary, {*range(vocabulary.size)} - {*keep})
    seen = dense.manifest(tokenizer).after(Manifest.seen_by(model))
    evidence = Evidence.read(again, model, tokenizer, reader=smaller, seen=seen)
    evidence.memory.update(dense.memory)
    return evidence, SmallerVocabulary(keep[:number], smaller, tuple(dense.domains), gone), others


def _readable(model: PreTrainedModel, config: StructPruneConfig) -> PreTrainedModel:
    """The model that writes text and that stored moments are compared with.

    A quantized model is unpacked for that in a copy, so that it is still packed where a run ends for lack of text.
    """
    tried = config.searches and VOCAB in config.shrinking
    asked = tried or config.stats is not None or any(map(written_by_model, texts_of(config)))
    return dequantized(model, inplace=False) if asked else model


def remove_tokens_(run: Run, vocabulary: SmallerVocabulary) -> None:
    """Leave the model of a run the tokens of a smaller vocabulary; later steps take the result as dense."""
    if run.measure is not None and run.arch.causal:
        run.measure.read_by(vocabulary.tokenizer, run.model)  # refuses samples that are too long for it
    with run.report.timed("vocabulary"):
        run.changed = True
        drop_tokens_(run.model, run.arch, vocabulary.keep)
    run.plan = run.plan.then(Plan(run.arch.model_type, {(MODEL, VOCAB): vocabulary.keep}))
    run.arch, run.tokenizer = run.described(), vocabulary.tokenizer
    report, dense, after = run.report, run.dense_tokenizer, tokens_per_word(vocabulary.tokenizer)
    assert dense is not None
    report.words = {code: {"before": of, "after": after[code]} for code, of in tokens_per_word(dense).items()}
    report.scripts = dict(vocabulary.scripts)
    run.counted = [Entry.of(domain, COUNTED) for domain in vocabulary.dense_domains]
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


def _for_two_readings(config: StructPruneConfig) -> list[StructPruneConfig]:
    """The config for the dense vocabulary and for the smaller one; a generator gives both the same text."""
    widths = {name: width for name, width in (config.widths or {}).items() if name != VOCAB}
    domains = [
        [replace(domain, source=source) for source in tee(domain.source)]
        if isinstance(domain.source, Iterator)
        else [domain] * 2
        for domain in config.domains or ()
    ]
    configs = [replace(config, domains=[*of]) for of in zip(*domains, strict=True)] or [config] * 2
    return [configs[0], replace(configs[1], widths=widths) if widths else configs[1]]


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
