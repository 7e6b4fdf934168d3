"""Measure the cost of text in 30 languages, in bits per byte or in tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf, log
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..domains.languages import texts, tokens_by_language
from ..domains.packing import tokenize_with_prefix
from ..system.errors import warn
from .losses import measure_all, totals
from .text import Text


# A model knows a language if the text costs at most this many times the bits of its best language.
MAX_KNOWN_RATIO = 2.0
# The number of tokens in all languages together that measure the original model.
LANGUAGE_TOKENS = 4096
# The part of the text in a language that is not to be kept. In a smaller vocabulary, the whole text would have up to
# ten times as many tokens.
OTHER_SHARE = 1 / 3


def measured_texts(kept_codes: Collection[str]) -> dict[str, str]:
    """Return the text of each language by its code: all of it in the languages to keep, else its beginning."""
    measured = dict(texts())
    for code in measured.keys() - set(kept_codes):
        measured[code] = measured[code][: round(OTHER_SHARE * len(measured[code]))]
    return measured


def cost_by_language(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    codes: Collection[str],
    kept_codes: Collection[str],
    max_tokens: float = inf,
) -> dict[str, float]:
    """Return the bits per byte of text by language, or its number of tokens if `model` is None.

    Languages are measured in the order of `codes`, on at most `max_tokens` tokens in all. Text that is longer than the
    positions of the model is skipped.
    """
    if model is None:
        ids_by_code = tokens_by_language(tokenizer)
        return {code: len(ids_by_code[code]) for code in codes}

    strings = measured_texts(kept_codes)
    measured: dict[str, Text] = {}
    tokens = 0
    for code in codes:
        ids = tokenize_with_prefix(strings[code], tokenizer)
        tokens += len(ids)
        if len(ids) <= positions_of(model) and tokens <= max_tokens:
            measured[code] = Text([torch.tensor(ids)])

    costs: dict[str, float] = {}
    for code, losses in measure_all(model, measured).items():
        nats = float(totals(losses.loss).sum())
        costs[code] = nats / log(2) / len(strings[code].encode())
    return costs


def costs_before(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, codes: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Measure the original model by language.

    The languages to keep come first. The other languages follow by their number of tokens, up to `LANGUAGE_TOKENS`. No
    language is measured if all texts are longer than the positions of the model.

    Args:
        model: The original model, or None to count tokens instead.
        tokenizer: Its tokenizer.
        codes: The codes of the languages to keep.
    """
    lengths = {code: len(ids) for code, ids in tokens_by_language(tokenizer).items()}
    order = sorted(lengths, key=lambda code: (code not in codes, lengths[code]))
    max_tokens = max(LANGUAGE_TOKENS, sum(lengths[code] for code in codes))
    costs = cost_by_language(model, tokenizer, order, codes, max_tokens)

    skipped = sorted(set(codes) - set(costs))
    if skipped and model is not None:
        warn(
            f"The sample text of {', '.join(skipped)} has more tokens than the model has positions "
            f"({positions_of(model):.0f}), so the model is not measured in these languages."
        )

    languages = {}
    for code, cost in costs.items():
        languages[code] = {"before": cost, "wanted": code in codes}

    if model is not None:
        known_codes = known_languages(costs)
        for code, figures in languages.items():
            figures["known"] = code in known_codes
    return languages


def with_costs_after(
    languages: Mapping[str, Mapping[str, Any]], model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """Add the costs of the smaller model in the languages to keep and the languages that the original model knows."""
    codes = [code for code, figures in languages.items() if figures["wanted"] or figures.get("known", True)]
    kept_codes = [code for code in codes if languages[code]["wanted"]]
    costs = cost_by_language(model, tokenizer, codes, kept_codes)

    with_costs = {}
    for code, figures in languages.items():
        with_costs[code] = dict(figures, after=costs.get(code))
    return with_costs


def known_languages(bits: Mapping[str, float]) -> set[str]:
    """Return the languages whose text costs at most `MAX_KNOWN_RATIO` times the bits of the best language.

    `bits` are the bits per byte by language. All languages have the same text, so the total bits are compared. If none
    was measured, none is known.
    """
    if not bits:
        return set()

    totals = {code: per_byte * len(texts()[code].encode()) for code, per_byte in bits.items()}
    limit = MAX_KNOWN_RATIO * min(totals.values())

    return {code for code, total in totals.items() if total <= limit}
