"""The loss on text of models that predict what is missing in it: masked language models and encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import ceil
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.hooks import in_fast_dtype
from ..arch.meta import positions_of, predicts_gaps
from ..arch.modules import blocks
from ..method.layers import input_device
from .metrics import evaluating, tokens_at_once


MOST_MASKED = 4  # tokens of a word, as some scripts have no spaces between words
NOT_PREDICTED = -100  # the label that cross entropy passes over by default


def fills_gaps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Tells whether a model predicts masked words, or a text behind another one; its vectors alone do not tell."""
    if tokenizer is None or not predicts_gaps(model):
        return False
    return bool(model.config.is_encoder_decoder) or (tokenizer.is_fast and tokenizer.mask_token_id is not None)


class Gaps:
    """Holds what is missing in texts: 15 % of the words, or of an encoder-decoder all second parts.

    These are `targets`, such as translations, or else second halves. The dense model's tokenizer says what a word is,
    and `tokens` has the number of its tokens that are missing in each text, shape `(texts,)`.
    """

    def __init__(
        self,
        texts: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        targets: Sequence[str] | None = None,
    ):
        self.has_decoder, self.texts, self.targets = bool(model.config.is_encoder_decoder), texts, targets
        if not self.has_decoder:
            self.places = [*_masked_words(texts, tokenizer)]
        elif targets is None:
            middle = [max(text.find(" ", len(text) // 2), len(text) // 2) for text in texts]
            self.texts = [text[:cut] for text, cut in zip(texts, middle, strict=True)]
            self.targets = [text[cut:].lstrip() for text, cut in zip(texts, middle, strict=True)]
        labels = (row[1] for row in self.rows(model, tokenizer))
        self.tokens = torch.tensor([int((label != NOT_PREDICTED).sum()) for label in labels])

    @torch.no_grad()
    def losses(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """The loss per dense token in nats, plus what each text has more of it than its tokens' share.

        Its mean is that loss, and its spread that of texts with different numbers of tokens. It has the shape
        `(texts,)`, fp64, on the CPU. Texts run with others of their length, so nothing is padded.
        """
        rows, device = self.rows(model, tokenizer), input_device(model)
        sizes = [(len(inputs), len(labels)) for inputs, labels in rows]
        losses = torch.zeros(len(rows), dtype=torch.float64)
        tokens = tokens_at_once(device, model.config.get_text_config().vocab_size)
        with evaluating(model), in_fast_dtype(blocks(model)):
            for size, alike in groupby(sorted(range(len(rows)), key=sizes.__getitem__), sizes.__getitem__):
                for some in torch.tensor([*alike]).split(max(tokens // max(*size), 1)):
                    batch = zip(*(rows[n] for n in some), strict=True)
                    inputs, labels = (torch.stack(part).to(device) for part in batch)
                    # From labels an encoder-decoder makes what its decoder reads.
                    read = {"input_ids": inputs, **({"labels": labels} if self.has_decoder else {})}
                    logits = model(**read).logits.float().transpose(1, 2)
                    losses[some] = cross_entropy(logits, labels, reduction="none").double().sum(1).cpu()
        mean = losses.sum() / self.tokens.sum()
        return mean + (losses - mean * self.tokens) * len(losses) / self.tokens.sum()

    def rows(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
        """Gives the inputs and the labels of each text, as token ids."""
        most = int(min(positions_of(model), 512))
        if self.targets is not None:
            ids = (tokenizer([*self.texts], verbose=False), tokenizer(text_target=[*self.targets], verbose=False))
            pairs = zip(*(each["input_ids"] for each in ids), strict=True)
            return [(torch.tensor(one[:most]), torch.tensor(other[:most])) for one, other in pairs]
        encoded = tokenizer([*self.texts], verbose=False, return_offsets_mapping=True)
        rows = []
        for ids, offsets, places in zip(encoded["input_ids"], encoded["offset_mapping"], self.places, strict=True):
            masked = [any(start < last and first < end for first, last in places) for start, end in offsets]
            inputs, hidden = torch.tensor(ids[:most]), torch.tensor(masked[:most])
            labels = inputs.masked_fill(~hidden, NOT_PREDICTED)
            rows.append((inputs.masked_fill(hidden, int(tokenizer.mask_token_id)), labels))
        return rows


def _masked_words(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[tuple[int, int]]]:
    """Yields for each text where words that are masked begin and end, in characters."""
    encoded = tokenizer([*texts], verbose=False, return_offsets_mapping=True)
    for number, offsets in enumerate(encoded["offset_mapping"]):
        word_of = encoded.word_ids(number)
        words = [[*tokens] for word, tokens in groupby(range(len(word_of)), word_of.__getitem__) if word is not None]
        parts = [word[n : n + MOST_MASKED] for word in words for n in range(0, len(word), MOST_MASKED)]
        chosen = Random(number).sample(parts, ceil(0.15 * len(parts)))
        yield [(offsets[part[0]][0], offsets[part[-1]][1]) for part in chosen]
