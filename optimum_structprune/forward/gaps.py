"""The loss in the gaps of text, for models that predict missing text: masked language models and encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import ceil
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.hooks import in_fast_dtype
from ..arch.inference import input_device
from ..arch.meta import positions_of, predicts_gaps
from ..arch.modules import blocks
from .metrics import TOKENS_AT_ONCE, evaluating


MOST_TOKENS = 512  # of a text
MASKED_SHARE = 0.15  # of the words of a text, as in BERT
MOST_MASKED = 4  # tokens of a masked word, because some scripts have no spaces between words
NOT_PREDICTED = -100  # the label that cross entropy ignores by default


def fills_gaps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Return whether the loss of a model in the gaps of text can be measured with this tokenizer."""
    if tokenizer is None or not predicts_gaps(model):
        return False
    if model.config.is_encoder_decoder:
        return True
    return tokenizer.is_fast and tokenizer.mask_token_id is not None


class Gaps:
    """The gaps in texts: 15 % of the words for a masked language model, and whole targets for an encoder-decoder.

    The same words are masked for every tokenizer; the tokenizer of the original model says what a word is.

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
            self.places = _masked_words(texts, tokenizer)
        elif targets is None:
            halves = [_halves(text) for text in texts]
            self.texts = [first for first, _ in halves]
            self.targets = [second for _, second in halves]

        counts = [int((labels != NOT_PREDICTED).sum()) for _, labels in self.rows(model, tokenizer)]
        self.tokens = torch.tensor(counts)

    @torch.no_grad()
    def losses(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return the loss per token of the original tokenizer, as one value for each text.

        The value of a text is the mean loss per token, plus the excess of its loss over the mean loss of as many
        tokens. The mean over texts is then the loss per token, and the spread allows for texts of different lengths.
        Texts of the same length run together, so nothing is padded.

        Args:
            model: The model.
            tokenizer: Its tokenizer, which may lack tokens of the original tokenizer.

        Returns:
            Losses in nats, shape `(texts,)`, in fp64 on the CPU.
        """
        rows = self.rows(model, tokenizer)
        sizes = [(len(inputs), len(labels)) for inputs, labels in rows]
        losses = torch.zeros(len(rows), dtype=torch.float64)
        order = sorted(range(len(rows)), key=sizes.__getitem__)
        with evaluating(model), in_fast_dtype(blocks(model)):
            for size, numbers in groupby(order, sizes.__getitem__):
                texts_at_once = max(TOKENS_AT_ONCE // max(size), 1)
                for batch in torch.tensor(list(numbers)).split(texts_at_once):
                    losses[batch] = self._batch_losses(model, [rows[number] for number in batch.tolist()])

        mean = losses.sum() / self.tokens.sum()
        excess = losses - mean * self.tokens
        return mean + excess * len(losses) / self.tokens.sum()

    def _batch_losses(self, model: PreTrainedModel, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the sum of the losses of each row in a batch of rows of one size, shape `(rows,)`."""
        device = input_device(model)
        inputs = torch.stack([row_inputs for row_inputs, _ in rows]).to(device)
        labels = torch.stack([row_labels for _, row_labels in rows]).to(device)
        # An encoder-decoder makes the inputs of its decoder from the labels.
        read = {"input_ids": inputs}
        if self.has_decoder:
            read["labels"] = labels
        logits = model(**read).logits.float().transpose(1, 2)
        return cross_entropy(logits, labels, reduction="none").double().sum(1).cpu()

    def rows(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
        """Return the inputs and the labels of each text as token ids, each of shape `(tokens,)`."""
        most = int(min(positions_of(model), MOST_TOKENS))
        if self.targets is not None:
            inputs = tokenizer(list(self.texts), verbose=False)["input_ids"]
            labels = tokenizer(text_target=list(self.targets), verbose=False)["input_ids"]
            pairs = zip(inputs, labels, strict=True)
            return [(torch.tensor(ids[:most]), torch.tensor(target[:most])) for ids, target in pairs]

        encoded = tokenizer(list(self.texts), verbose=False, return_offsets_mapping=True)
        rows: list[tuple[Tensor, Tensor]] = []
        for number, places in enumerate(self.places):
            ids = torch.tensor(encoded["input_ids"][number][:most])
            offsets = encoded["offset_mapping"][number][:most]
            is_masked = torch.tensor([_overlaps(start, end, places) for start, end in offsets])
            labels = ids.masked_fill(~is_masked, NOT_PREDICTED)
            rows.append((ids.masked_fill(is_masked, int(tokenizer.mask_token_id)), labels))
        return rows


def _halves(text: str) -> tuple[str, str]:
    """Return the two halves of a text, divided at a space if there is one in the second half."""
    middle = len(text) // 2
    cut = max(text.find(" ", middle), middle)
    return text[:cut], text[cut:].lstrip()


def _overlaps(start: int, end: int, places: Sequence[tuple[int, int]]) -> bool:
    """Return whether the characters from `start` to `end` overlap one of the places."""
    return any(start < last and first < end for first, last in places)


def _masked_words(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[int, int]]]:
    """Return the first character and the end of each masked word, by text."""
    encoded = tokenizer(list(texts), verbose=False, return_offsets_mapping=True)
    places: list[list[tuple[int, int]]] = []
    for number, offsets in enumerate(encoded["offset_mapping"]):
        word_of = encoded.word_ids(number)
        parts: list[list[int]] = []
        for word, group in groupby(range(len(word_of)), word_of.__getitem__):
            if word is None:
                continue
            tokens = list(group)
            parts += [tokens[start : start + MOST_MASKED] for start in range(0, len(tokens), MOST_MASKED)]

        chosen = Random(number).sample(parts, ceil(MASKED_SHARE * len(parts)))
        places.append([(offsets[part[0]][0], offsets[part[-1]][1]) for part in chosen])
    return places
