"""Read the prompts that a teacher answers: built-in prompts, prompts from a file, or openings of the text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..config.domains import template_fields
from ..config.fields import read_yaml
from ..domains.languages import tokens_by_language
from ..domains.packing import prompt_ids
from ..domains.templates import question_messages, read_lines
from ..system.errors import StructPruneError
from ..system.written import whole_lines


Messages = list[dict[str, str]]

ASKED = Path(__file__).parents[1] / "evaluation" / "questions.jsonl"
# The number of tokens in an opening. Openings are the prompts of a model without a chat template.
OPENING_TOKENS = 24
MAX_PROMPT_TOKENS = 128
# The maximum number of built-in prompts of each kind.
MAX_PROMPTS_PER_KIND = 400
# Built-in prompts in a language are used if the tokenizer needs at most this multiple of the tokens for English.
MAX_TOKEN_RATIO = 1.6
# Training on a prompt would make a built-in question useless if the Jaccard index of their words is at least this.
MAX_LIKENESS = 0.7


def builtin_prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the built-in prompts in the languages that need few tokens. The kinds of prompts take turns."""
    tokens = {language: len(ids) for language, ids in tokens_by_language(tokenizer).items()}

    kinds: list[list[str]] = []
    for entry in read_yaml(Path(__file__).with_name("prompts.yaml")).values():
        language = entry.get("language", "en")
        if tokens[language] <= MAX_TOKEN_RATIO * tokens["en"]:
            kinds.append(_filled_templates(entry))

    prompts: dict[str, None] = {}
    for place in range(max(map(len, kinds), default=0)):
        for kind in kinds:
            if place < len(kind):
                prompts[kind[place]] = None
    return list(prompts)


def _filled_templates(entry: dict[str, Any]) -> list[str]:
    """Return a sample of the prompts from the templates of one kind, filled with all combinations of their values."""
    rows: list[tuple[str, dict[str, str]]] = []
    for template in entry["ask"]:
        names = list(dict.fromkeys(template_fields(template)))
        columns = [entry[name] for name in names]
        for values in product(*columns):
            rows.append((template, dict(zip(names, values, strict=True))))

    Random(0).shuffle(rows)
    return [template.format(**values) for template, values in rows[:MAX_PROMPTS_PER_KIND]]


def read_prompts(path: str) -> list[Messages]:
    """Read conversations from a file: JSON lines with `messages` or a `prompt`, or a question in each line.

    A line is JSON if the name of the file says so, or if it begins like a JSON object. Rows without a question are
    skipped.

    Raises:
        StructPruneError: If a line is not a prompt, or the file has fewer than two.
    """
    has_json_name = path.lower().endswith((".jsonl", ".json", ".ndjson"))

    def conversation(line: str) -> Messages:
        row: Any = {"prompt": line}
        if has_json_name or re.match(r'\s*\{\s*"', line):
            row = json.loads(line)
        messages = question_messages(row)
        while messages and messages[-1]["role"] == "assistant":  # the teacher answers the last question
            messages.pop()
        return messages

    message = 'is not a prompt, which has a "prompt" or "messages"'
    conversations = []
    for messages in read_lines(Path(path), conversation, message):
        if messages and messages[-1]["content"].strip():
            conversations.append(messages)

    if len(conversations) < 2:
        count = "no prompts"
        if conversations:
            count = "one prompt"
        raise StructPruneError(
            f"The file {path} has {count}. Add some: some prompts are trained on, and the others measure the result."
        )
    return conversations


def prompts_of(
    path: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Sequence[int]],
    seed: int,
    max_tokens: int = MAX_PROMPT_TOKENS,
) -> list[list[int]]:
    """Return the token ids of prompts in random order.

    Prompts that are like a built-in question are skipped, because the questions measure the result.

    Args:
        path: A file of prompts. The default is the built-in prompts.
        model: The teacher.
        tokenizer: Its tokenizer. Without a chat template and a file, the prompts are openings of `texts`.
        texts: Samples of text as token ids.
        seed: The seed of the order.
        max_tokens: The largest number of tokens in a prompt.

    Raises:
        StructPruneError: If fewer than two prompts are left.
    """
    longest = int(min(max_tokens, positions_of(model) // 2))
    if path is None and not tokenizer.chat_template:
        candidates = _openings(texts, tokenizer, min(OPENING_TOKENS, longest))
    else:
        candidates = _conversation_prompts(path, tokenizer)

    questions = _question_words()
    prompts: dict[tuple[int, ...], None] = {}
    for text, ids in candidates:
        if 1 < len(ids) <= longest and not _is_like(_words(text), questions):
            prompts[tuple(ids)] = None

    if len(prompts) < 2:
        raise StructPruneError(
            f"Of {len(candidates)} prompts, {len(prompts)} can be used: the others have more than {longest} "
            "tokens or are like the built-in questions. Add other prompts, raise `seq_length`, or set `answer_share` "
            "to 0."
        )

    shuffled = [list(ids) for ids in prompts]
    Random(seed).shuffle(shuffled)
    return shuffled


def _conversation_prompts(path: str | None, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Return the last questions of conversations, and the token ids of the conversations up to them."""
    if path is not None:
        conversations = read_prompts(path)
    else:
        conversations = [[{"role": "user", "content": text}] for text in builtin_prompts(tokenizer)]

    prompts = []
    for messages in conversations:
        text = messages[-1]["content"]
        prompts.append((text, prompt_ids(messages, text, tokenizer)))
    return prompts


def _openings(
    texts: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[tuple[str, list[int]]]:
    """Return openings of texts and their token ids. Each opening begins with the first token of its text."""
    openings = []
    for ids in texts:
        for start in range(0, len(ids), length):
            part = list(ids[start : start + length])
            opening = [ids[0]] + part[: length - 1]
            openings.append((str(tokenizer.decode(part)), opening))
    return openings


def _question_words() -> list[set[str]]:
    questions = []
    for question in whole_lines(ASKED):
        for field in ("prompt", "opening"):
            if field in question:
                questions.append(_words(question[field]))
    return questions


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _is_like(words: set[str], questions: Sequence[set[str]]) -> bool:
    """Return whether the Jaccard index of words and a question is at least `MAX_LIKENESS`."""
    for question in questions:
        if len(words & question) >= MAX_LIKENESS * len(words.union(question)):
            return True
    return False
