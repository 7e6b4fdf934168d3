"""Measure the loss of models that predict missing text: masked language models and encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import ceil
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of, predicts_gaps
from .batches import IGNORED
from .losses import measure, totals
from .predictions import Predictor
from .text import Text


# The maximum number of tokens of a text.
MAX_GAP_TOKENS = 512
# The share of the words of a text that are masked, as in BERT.
MASKED_SHARE = 0.15
# The maximum number of tokens of a masked word. Some scripts do not have spaces between words.
MAX_WORD_TOKENS = 4


def fills_gaps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Return whether the loss of a model in the gaps of text can be measured with this tokenizer."""
    if tokenizer is None or not predicts_gaps(model):
        return False
    if model.config.is_encoder_decoder:
        return True
    return tokenizer.is_fast and tokenizer.mask_token_id is not None


class Gaps:
    """The missing parts of texts: 15 % of the words for a masked language model, or the targets of an encoder-decoder.

    The words are defined by the tokenizer of the original model. The same words are masked for every tokenizer.

    Args:
        texts: The texts.
        model: The original model.
        tokenizer: The tokenizer of the original model.
        targets: The target of each text for an encoder-decoder, such as its translation. By default the text is the
            first half of each text, and the target is the second half.

    Attributes:
        tokens: The number of missing tokens of the original tokenizer in each text, shape `(texts,)`.
    """

    def __init__(
        self,
        texts: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        targets: Sequence[str] | None = None,
    ):
        self.has_decoder = bool(model.config.is_encoder_decoder)
        self.texts = texts
        self.targets = targets
        if not self.has_decoder:
            self.masked_words = _masked_words(texts, tokenizer)
        elif targets is None:
            halves = [_halves(text) for text in texts]
            self.texts = [start for start, _ in halves]
            self.targets = [end for _, end in halves]

        counts = [int((labels != IGNORED).sum()) for _, labels in self.rows(model, tokenizer)]
        self.tokens = torch.tensor(counts)

    def losses(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return the loss per token of the original tokenizer, as one value for each text.

        The value of a text is the mean loss per token, plus the difference between its total loss and the mean loss
        of as many tokens, scaled by the mean length of a text. The mean of the values is then the loss per token, and
        their spread takes the lengths of the texts into account.

        Args:
            model: The model.
            tokenizer: The tokenizer of the model. It may lack tokens of the original tokenizer.

        Returns:
            Losses in nats, shape `(texts,)`, in fp64 on the CPU.
        """
        inputs, labels = zip(*self.rows(model, tokenizer), strict=True)
        # An encoder-decoder makes the inputs of its decoder from the labels.
        predictor = Predictor(model, whole=self.has_decoder)
        losses = totals(measure(predictor, Text(inputs, labels=labels, has_gaps=True)).loss)

        mean = losses.sum() / self.tokens.sum()
        excess = losses - mean * self.tokens
        return mean + excess * len(losses) / self.tokens.sum()

    def rows(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
        """Return the inputs and the labels of each text as token ids, each of shape `(tokens,)`."""
        max_tokens = int(min(positions_of(model), MAX_GAP_TOKENS))
        if self.targets is not None:
            inputs = tokenizer(list(self.texts), verbose=False)["input_ids"]
            targets = tokenizer(text_target=list(self.targets), verbose=False)["input_ids"]
            pairs = zip(inputs, targets, strict=True)
            return [(torch.tensor(ids[:max_tokens]), torch.tensor(target[:max_tokens])) for ids, target in pairs]

        encoded = tokenizer(list(self.texts), verbose=False, return_offsets_mapping=True)
        mask_id = int(tokenizer.mask_token_id)
        rows: list[tuple[Tensor, Tensor]] = []
        for index, words in enumerate(self.masked_words):
            ids = torch.tensor(encoded["input_ids"][index][:max_tokens])
            offsets = encoded["offset_mapping"][index][:max_tokens]
            is_masked = torch.tensor([_overlaps(start, end, words) for start, end in offsets])
            labels = ids.masked_fill(~is_masked, IGNORED)
            rows.append((ids.masked_fill(is_masked, mask_id), labels))

        return rows


def _halves(text: str) -> tuple[str, str]:
    """Return the two halves of a text, divided at the first space of the second half if it has one."""
    middle = len(text) // 2
    cut = max(text.find(" ", middle), middle)
    return text[:cut], text[cut:].lstrip()


def _overlaps(start: int, end: int, words: Sequence[tuple[int, int]]) -> bool:
    """Return whether the characters from `start` to `end` overlap one of the words."""
    return any(start < word_end and word_start < end for word_start, word_end in words)


def _masked_words(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[int, int]]]:
    """Return the start and the end of each masked word in characters, by text."""
    encoded = tokenizer(list(texts), verbose=False, return_offsets_mapping=True)
    masked_words: list[list[tuple[int, int]]] = []
    for index, offsets in enumerate(encoded["offset_mapping"]):
        words = _words(encoded.word_ids(index))
        sample = Random(index).sample(words, ceil(MASKED_SHARE * len(words)))
        masked_words.append([(offsets[word[0]][0], offsets[word[-1]][1]) for word in sample])
    return masked_words


def _words(word_ids: Sequence[int | None]) -> list[list[int]]:
    """Return the token indices of each word. A word with more than `MAX_WORD_TOKENS` tokens is divided.

    `word_ids` are the words of the tokens, None for special tokens.
    """
    words: list[list[int]] = []
    for word_id, group in groupby(range(len(word_ids)), word_ids.__getitem__):
        if word_id is None:
            continue

        tokens = list(group)
        for start in range(0, len(tokens), MAX_WORD_TOKENS):
            words.append(tokens[start : start + MAX_WORD_TOKENS])
    return words
