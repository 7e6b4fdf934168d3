"""Answers that a recovery trains on: the prompts, and a model that writes behind them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import count, islice, product, zip_longest
from pathlib import Path
from random import Random

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..config.domains import template_fields
from ..config.fields import read_yaml
from ..domains.packing import prompt_ids
from ..domains.templates import question_messages, read_lines
from ..errors import StructPruneError
from ..forward.generation import sampled_continuations
from ..forward.metrics import evaluating
from ..system.fingerprint import KeptText
from ..system.processes import is_first_rank
from ..system.stages import stage
from ..vocabulary.languages import tokens_by_language
from ..written import whole_lines
from .samples import Sample, answer_samples


QUESTIONS = Path(__file__).parents[1] / "evaluation" / "questions.jsonl"
# The tokens of an opening, with which a model without a chat template begins, and of a prompt at most.
OPENING_TOKENS, MAX_PROMPT_TOKENS = 24, 128
# An equal share of the training has answers of up to so many tokens each: short ones first, which hardly go astray.
ANSWER_TOKENS = (16, 32, 64, 128)
TEMPERATURE = 0.7
PROMPTS_AT_ONCE = 32
# Writes behind prompts of token ids, so many tokens at most, by a seed.
Write = Callable[[Sequence[Sequence[int]], int, int], list[list[int]]]


def builtin_prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Gives the built-in prompts in languages that take few tokens, of all kinds in turn."""
    spelt, kinds = {code: len(ids) for code, ids in tokens_by_language(tokenizer).items()}, []
    for entry in read_yaml(Path(__file__).with_name("prompts.yaml")).values():
        if spelt[entry.get("language", "en")] <= 1.6 * spelt["en"]:
            slots = [(form, dict.fromkeys(template_fields(form))) for form in entry["ask"]]
            rows = [(form, names, values) for form, names in slots for values in product(*(entry[n] for n in names))]
            Random(0).shuffle(rows)
            kinds.append([form.format(**dict(zip(names, values, strict=True))) for form, names, values in rows[:400]])
    return list(dict.fromkeys(prompt for turn in zip_longest(*kinds) for prompt in turn if prompt is not None))


def read_prompts(path: str) -> list[list[dict[str, str]]]:
    """Reads the conversations of a file: JSON lines with `messages` or a `prompt`, else lines of questions."""
    is_json = path.endswith((".jsonl", ".json"))

    def conversation(line: str) -> list[dict[str, str]]:
        messages = question_messages(json.loads(line) if is_json else {"prompt": line})
        while messages and messages[-1]["role"] == "assistant":  # what is to be answered comes last
            messages.pop()
        return messages

    form = 'is no prompt, which has a "prompt" or "messages"'
    conversations = [*filter(None, read_lines(Path(path), conversation, form))]
    if not conversations:
        raise StructPruneError(f"The file {path} has no prompts.")
    return conversations


def prompts_of(
    path: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Tensor, seed: int
) -> list[list[int]]:
    """Gives the token ids of prompts in an order that the seed chooses; none is like a built-in question.

    They are those of a file, built in, or without a chat template openings of `texts`, shape `(samples, seq_length)`.
    """
    if path is None and not tokenizer.chat_template:
        rows = [row.tolist() for sample in texts for row in sample.split(OPENING_TOKENS)]
        read = [(str(tokenizer.decode(row)), [*texts[0, :1].tolist(), *row][:OPENING_TOKENS]) for row in rows]
    else:
        builtin = [] if path else [[{"role": "user", "content": text}] for text in builtin_prompts(tokenizer)]
        conversations = read_prompts(path) if path else builtin
        asking = [(messages, messages[-1]["content"]) for messages in conversations]
        read = [(text, prompt_ids(messages, text, tokenizer)) for messages, text in asking]
    questions, fields = whole_lines(QUESTIONS), ("prompt", "opening")
    asked = [_words(question[name]) for question in questions for name in fields if name in question]
    longest = min(MAX_PROMPT_TOKENS, positions_of(model) // 2)
    kept = [ids for text, ids in read if 1 < len(ids) <= longest and not _is_like(_words(text), asked)]
    kept = [list(ids) for ids in dict.fromkeys(map(tuple, kept))]
    if not kept:
        raise StructPruneError(
            f"Of {len(read)} prompts none can be trained on: they have more than {longest} tokens, or are like the "
            "built-in questions; add others, or leave answers out (answer_share=0)."
        )
    Random(seed).shuffle(kept)
    return kept


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _is_like(words: set[str], questions: Sequence[set[str]]) -> bool:
    return any(len(words & asked) >= 0.7 * len(words | asked) for asked in questions)  # the Jaccard index


def writer_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Write:
    """Makes the function by which a model writes behind prompts, without a gradient."""

    def write(prompts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
        room = int(min(length, positions_of(model) - max(map(len, prompts))))
        with evaluating(model), stage("writing"):
            return sampled_continuations(model, tokenizer, prompts, room, TEMPERATURE, seed)

    return write


class Answers:
    """Asks a writer prompts, `PROMPTS_AT_ONCE` at a time, and keeps its answers for the next time."""

    def __init__(self, prompts: Sequence[Sequence[int]], write: Write, kept: KeptText, seed: int):
        self.prompts, self.write, self.kept, self.seed = prompts, write, kept, seed
        self.known = kept.read()

    def conversations(self, length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Give prompts and answers of so many tokens at most, without end."""
        start = ANSWER_TOKENS.index(length) * len(self.prompts) // len(ANSWER_TOKENS)
        for number in count():
            places = range(start + number * PROMPTS_AT_ONCE, start + (number + 1) * PROMPTS_AT_ONCE)
            prompts, key = [self.prompts[place % len(self.prompts)] for place in places], f"{length}/{number}"
            if key not in self.known:
                seed = int(sha256(f"{self.seed}/{key}".encode()).hexdigest()[:12], 16)
                self.known[key] = self.write(prompts, length, seed)
                if is_first_rank():
                    self.kept.add(key, self.known[key])
            yield from zip(prompts, self.known[key], strict=True)

    def samples(self, number: int, places: int) -> Iterator[Sample]:
        """Give so many samples, each with `places` tokens of answers, which grow; see `answer_samples`."""
        ends = [number * part // len(ANSWER_TOKENS) for part in range(len(ANSWER_TOKENS) + 1)]
        for length, start, end in zip(ANSWER_TOKENS, ends, ends[1:], strict=False):
            yield from islice(answer_samples(self.conversations(length), places), end - start)


def kept_answers(weights: str, ends: Sequence[int], prompts: Sequence[Sequence[int]], seed: int) -> KeptText:
    """Names the file with the answers of the model of these weights (a `fingerprint`), for all trainings."""
    return KeptText("answers", weights, ANSWER_TOKENS, TEMPERATURE, PROMPTS_AT_ONCE, seed, ends, prompts)
