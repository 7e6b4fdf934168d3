"""Scores the choices of an item in one batch, after a prompt that runs once; needs lm_eval."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.logging import tqdm

from ..forward.generation import cache_name, cache_of, last_logits_only
from .items import Answer, ItemFile


# What lm_eval asks: the texts of a context and of what follows it (None for windows of a text), and their token ids.
Request = tuple[Any, list[int], list[int]]


class SharedPrompts(HFLM):
    """A model of lm_eval that runs the prompt of an item once, and all its choices together after it.

    Models whose cache holds more than keys and values run every choice with its prompt, as lm_eval does.

    Args:
        items: Keeps the answers to each item; None keeps nothing.
        fields: The arguments of `HFLM`.
    """

    def __init__(self, items: ItemFile | None = None, **fields: Any):
        super().__init__(**fields)
        self.items = items
        self.labels: list[tuple[str, int]] = []
        self.last_only = {"logits_to_keep": 1} if last_logits_only(self.model) else {}
        self.cache_name = cache_name(self.model)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[Answer]:
        """See `HFLM.loglikelihood`."""
        self.labels = [(request.task_name, request.doc_id) for request in requests]
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if requests and requests[0][0] is None:  # windows of a text, which have nothing in common
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: list[Answer] = []
        labelled = zip(self.labels, requests, strict=True)
        # An item with several contexts, such as one that is asked without its question as well, is several groups.
        groups = groupby(labelled, key=lambda pair: (pair[0], pair[1][0][0], tuple(pair[1][1])))
        with tqdm(total=len(requests), desc="choices", disable=disable_tqdm) as bar:
            for (label, context, _), group in groups:
                asked = [request for _, request in group]
                choices = [texts[1] for texts, _, _ in asked]
                found = None if self.items is None else self.items.get(context, choices)
                if found is None:
                    found = self._answered(asked)
                    if self.items is not None:
                        self.items.add(label, context, choices, found)
                answers += found
                bar.update(len(found))
        return answers

    @torch.no_grad()
    def _answered(self, requests: list[Request]) -> list[Answer]:
        context, choices = requests[0][1], [choice for _, _, choice in requests]
        longest = max(map(len, choices))
        if self.cache_name is None or len(context) + longest > self.max_length + 1:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True)  # which cuts a context that is too long
        prompt = self.model(torch.tensor([context], device=self.device), use_cache=True, **self.last_only)
        logits = prompt.logits[:, -1:].expand(len(choices), -1, -1)
        if longest > 1:
            cache = cache_of(prompt)
            if not _repeats(cache):
                return super()._loglikelihood_tokens(requests, disable_tqdm=True)
            cache.batch_repeat_interleave(len(choices))
            # What is filled up lies behind all that counts, where causal attention does not see it.
            rows = [torch.tensor(choice[:-1] + context[:1] * (longest - len(choice))) for choice in choices]
            rest = self.model(torch.stack(rows).to(self.device), use_cache=True, **{self.cache_name: cache}).logits
            logits = torch.cat([logits, rest], dim=1)
        return [_answer(row[: len(choice)], choice) for row, choice in zip(logits, choices, strict=True)]


def _answer(logits: Tensor, choice: list[int]) -> Answer:
    """The log-likelihood of a choice from the logits of its tokens, shape `(tokens, vocab)`."""
    ids = torch.tensor(choice, device=logits.device)
    likelihoods = logits.float().log_softmax(-1).gather(1, ids[:, None])
    return float(likelihoods.sum()), bool((logits.argmax(-1) == ids).all())


def _repeats(cache: Any) -> bool:
    """Whether a cache is keys and values alone, which several sequences can go on from."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in kinds for layer in cache.layers)
