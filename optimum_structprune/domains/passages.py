"""Samples of tokens as text, which models of different tokenizers are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, nan

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..errors import StructPruneError
from .packing import check_vocabulary, prefix_token


class Passages:
    """The text of samples of token ids, each of shape `(seq_length,)`, and its `bytes`.

    The first token of a sample is context only, and left out. So is a character that the edge of a sample cuts in two.
    """

    def __init__(self, samples: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase):
        self.seq_length = len(samples[0])
        self.texts = [_documents(ids[1:].tolist(), tokenizer) for ids in samples]
        self.bytes = sum(len(text.encode()) for texts in self.texts for text in texts)

    def bits_per_byte(self, losses: Tensor) -> float:
        """The bits per byte that the samples cost, from the total loss of each in nats, shape `(samples,)`."""
        return float(losses.mean()) * len(self.texts) / log(2) / self.bytes if self.bytes else nan

    def rows(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[Tensor]:
        """The samples as ids of another tokenizer in packed text, shape `(tokens,)`, in numbers that differ."""
        prefix, eos = prefix_token(tokenizer), tokenizer.eos_token_id
        if prefix is None:
            raise StructPruneError(
                f"{type(tokenizer).__name__} has neither a BOS nor an EOS token to stand before a text, so the first "
                "token of a sample cannot be predicted; set its eos_token."
            )
        every = [text for texts in self.texts for text in texts]
        encoded = iter(tokenizer(every, add_special_tokens=False, verbose=False)["input_ids"])
        rows = []
        for texts in self.texts:
            ids = [prefix, *next(encoded)]
            for _ in texts[1:]:
                ids += [*([] if eos is None else [eos]), *next(encoded)]
            rows.append(torch.tensor(ids))
        most, longest = max(map(len, rows)), positions_of(model)
        check_vocabulary(max(int(row.max()) for row in rows), model.config.get_text_config().vocab_size)
        if most > longest:
            raise StructPruneError(
                f"A sample of seq_length={self.seq_length} takes {most} tokens of the model's own tokenizer, and the "
                f"model has {longest} positions; try seq_length={self.seq_length * longest // most}."
            )
        return rows


def _documents(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of a sample, which lie between EOS tokens, as text."""
    eos = tokenizer.eos_token_id
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == eos:
            parts.append([])
        else:
            parts[-1].append(token)
    texts = [str(tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in parts]
    texts[0] = texts[0].lstrip("\ufffd")
    texts[-1] = texts[-1].rstrip("\ufffd")
    return texts
