"""Scores the choices of items in one batch, after prompts that run once; needs lm_eval."""

from __future__ import annotations

from inspect import signature
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


# Items whose prompts run in one pass.
ITEMS_AT_ONCE = 8
# What lm_eval asks: the texts of a context and of what follows it (None for windows of a text), and their token ids.
Request = tuple[Any, list[int], list[int]]


class SharedPrompts(HFLM):
    """A model of lm_eval that runs the prompt of an item once, and all its choices together after it.

    Several items share a pass. Models whose cache holds more than keys and values run every choice with its prompt, as
    lm_eval does.
    """

    def __init__(self, items: ItemFile | None = None, **fields: Any):
        super().__init__(**fields)
        self.items = items
        self.labels: list[tuple[str, int]] = []
        self.last_only = {"logits_to_keep": 1} if last_logits_only(self.model) else {}
        self.cache_name = cache_name(self.model)
        # Prompts of different lengths need padding, and with it positions of their own.
        padded = {"attention_mask", "position_ids"} <= signature(self.model.forward).parameters.keys()
        self.at_once = max(ITEMS_AT_ONCE, self.batch_size) if padded else 1

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """See `HFLM.loglikelihood`."""
        self.labels = [(request.task_name, request.doc_id) for request in requests]
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if requests and requests[0][0] is None:  # windows of a text, which have nothing in common
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        labelled = zip(self.labels, requests, strict=True)
        # An item with several contexts, such as one that is asked without its question as well, is several groups.
        groups = groupby(labelled, key=lambda pair: (pair[0], pair[1][0][0], tuple(pair[1][1])))
        asked = [(label, [request for _, request in group]) for (label, _, _), group in groups]
        found = [None if self.items is None else self.items.get(*_texts(item)) for _, item in asked]
        # Choices of about the same length leave little to fill up; there are more of them than of prompts.
        todo = [index for index, known in enumerate(found) if known is None]
        todo.sort(key=lambda index: _lengths(asked[index][1]), reverse=True)
        for start in tqdm(range(0, len(todo), self.at_once), desc="items", disable=disable_tqdm):
            chunk = todo[start : start + self.at_once]
            for index, answers in zip(chunk, self._answered([asked[index][1] for index in chunk]), strict=True):
                found[index] = answers
                if self.items is not None:
                    label, item = asked[index]
                    self.items.add(label, *_texts(item), answers)
        return [answer for answers in found for answer in answers or ()]

    @torch.no_grad()
    def _answered(self, items: list[list[Request]]) -> list[list[Answer]]:
        """The answers to some items; each is the requests that share its context."""
        contexts, choices = [item[0][1] for item in items], [choice for item in items for _, _, choice in item]
        longest = max(map(len, choices))
        if self.cache_name is None or max(map(len, contexts)) + longest > self.max_length + 1:
            return self._apart(items)  # which cuts a context that is too long
        ids, mask = _filled(contexts, self.device, left=True)
        prompt = self.model(ids, use_cache=True, **self.last_only, **self._places(mask, ids.shape[1]))
        rows = torch.tensor([number for number, item in enumerate(items) for _ in item], device=self.device)
        logits = prompt.logits[:, -1:][rows]
        if longest > 1:
            cache = cache_of(prompt)
            if not _repeats(cache):
                self.cache_name = None  # so that no other prompt runs in vain
                return self._apart(items)
            cache.batch_select_indices(rows)
            # What is filled up on the right lies behind all that counts, where causal attention does not see it.
            rest, _ = _filled([choice[:-1] for choice in choices], self.device, left=False)
            mask = torch.cat([mask[rows], torch.ones_like(rest)], dim=1)
            more = {self.cache_name: cache, **self._places(mask, rest.shape[1])}
            logits = torch.cat([logits, self.model(rest, use_cache=True, **more).logits], dim=1)
        answers = iter([_answer(row[: len(choice)], choice) for row, choice in zip(logits, choices, strict=True)])
        return [[next(answers) for _ in item] for item in items]

    def _apart(self, items: list[list[Request]]) -> list[list[Answer]]:
        return [super(SharedPrompts, self)._loglikelihood_tokens(item, disable_tqdm=True) for item in items]

    def _places(self, mask: Tensor, count: int) -> dict[str, Tensor]:
        """The arguments that say where the last `count` tokens of each row stand; none where nothing is filled up."""
        if mask.all():
            return {}
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]}


def _texts(item: list[Request]) -> tuple[str, list[str]]:
    """The context and the choices of an item."""
    return item[0][0][0], [texts[1] for texts, _, _ in item]


def _lengths(item: list[Request]) -> tuple[int, int]:
    """The length of the longest choice of an item, and that of its context, in tokens."""
    return max(len(choice) for _, _, choice in item), len(item[0][1])


def _filled(rows: list[list[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of token ids filled up to the same length, and where they are, both of shape `(rows, longest)`."""
    longest = max(map(len, rows))

    def filled(values: list[int]) -> list[int]:
        blank = [0] * (longest - len(values))
        return blank + values if left else values + blank

    ids, mask = ([filled(row) for row in kind] for kind in (rows, [[1] * len(row) for row in rows]))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _answer(logits: Tensor, choice: list[int]) -> Answer:
    """The log-likelihood of a choice from the logits of its tokens, shape `(tokens, vocab)`."""
    ids = torch.tensor(choice, device=logits.device)
    likelihoods = logits.float().log_softmax(-1).gather(1, ids[:, None])
    return float(likelihoods.sum()), bool((logits.argmax(-1) == ids).all())


def _repeats(cache: Any) -> bool:
    """Whether a cache is keys and values alone, which several sequences can go on from."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in kinds for layer in cache.layers)
