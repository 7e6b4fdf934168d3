"""Greedy answers of a model to questions, or text behind openings: is it right, does it end, does it repeat itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import check_positions, predicts_next
from ..domains.packing import prompt_ids
from ..domains.templates import question_messages, read_lines
from ..errors import StructPruneError, one_line, warn
from ..forward.generation import continuations
from ..forward.metrics import evaluating, margin_of_share
from ..record.answers import Items
from ..system.stages import progress, stage
from ..vocabulary.token_alignment import TokenAlignment, divergence_from_dense


BUILTIN = "builtin"
QUESTIONS = Path(__file__).with_name("questions.jsonl")
# The figures of an answer that are true or false.
FIGURES = ("right", "stopped", "loops")
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
# An answer loops that has the same run of so many tokens more often than this.
RUN_TOKENS, MAX_REPEATS = 4, 3
# The form of a line of a file of questions, for a refusal.
FORM = 'is no question, which has a "prompt" or "messages", and in "right" a regular expression ("" accepts all)'
AT_ONCE = 32  # answers that are written together at least
# The short check of `prune` and `recover`: the first questions, the tokens of an answer, and those that a run reads at
# least: one that reads fewer is a trial of the command, and would mostly answer.
SHORT_CHECK_QUESTIONS, SHORT_CHECK_TOKENS, SHORT_CHECK_MIN_READ = 16, 64, 4_096


# The text and tokens of an answer, the figures, and the number of tokens.
Answer = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question, as messages and as an opening for a base model, each with a pattern for what is right."""

    kind: str
    messages: tuple[Mapping[str, str], ...]
    right: re.Pattern[str]
    opening: str
    continues: re.Pattern[str]

    @property
    def prompt(self) -> str:
        """The question as people read it."""
        return self.messages[-1]["content"]

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that a model answers."""
        return prompt_ids(self.messages, self.opening, tokenizer)


def read_questions(source: str | Path = BUILTIN, tokenizers: Iterable[PreTrainedTokenizerBase] = ()) -> list[Question]:
    """Read the questions of a file, or the built-in ones.

    A tokenizer without a chat template leaves those that have an opening.
    """
    path = QUESTIONS if source == BUILTIN else Path(source)
    questions = read_lines(path, _question, FORM)
    if not all(tokenizer.chat_template for tokenizer in tokenizers):
        questions = [question for question in questions if question.opening]
    if not questions:
        raise StructPruneError(f"The file {path} has no questions for this model.")
    return questions


def _question(line: str) -> Question:
    row = json.loads(line)
    messages = tuple(question_messages(row))
    right = re.compile(row["right"], re.IGNORECASE)
    continues = re.compile(row.get("continues", row["right"]), re.IGNORECASE)
    # A question of the user's is its own opening, where it gives no other.
    opening = str(row.get("opening", "" if "kind" in row else messages[-1]["content"]))
    return Question(str(row.get("kind", "")), messages, right, opening, continues)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int = AT_ONCE,
) -> list[Answer]:
    """The greedy answers of a model."""
    prompts = [question.ids(tokenizer) for question in questions]
    check_positions(model, max_new_tokens, f"max_new_tokens={max_new_tokens}", max(map(len, prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with evaluating(model), stage("answers"):
        for start in progress(range(0, len(order), batch_size), desc="answering"):
            batch = order[start : start + batch_size]
            settings = {**GREEDY, "max_new_tokens": max_new_tokens}
            texts = continuations(model, tokenizer, [prompts[number] for number in batch], settings)
            for number, ids in zip(batch, texts, strict=True):
                answers[number] = ids
    chats, decoded = bool(tokenizer.chat_template), tokenizer.batch_decode(answers, skip_special_tokens=True)
    rows = zip(questions, answers, decoded, strict=True)
    return [_judged(question, ids, text, len(ids) < max_new_tokens, chats) for question, ids, text in rows]


def _judged(question: Question, ids: list[int], text: str, stopped: bool, chats: bool) -> Answer:
    """The answer as records hold it, with its tokens: of what goes on from an opening, the first line is judged."""
    pattern, judged = (question.right, text) if chats else (question.continues, text.strip().partition("\n")[0])
    right = pattern.search(judged.strip())
    runs = Counter(tuple(ids[start : start + RUN_TOKENS]) for start in range(len(ids) - RUN_TOKENS + 1))
    flags = {"right": right is not None, "stopped": stopped, "loops": max(runs.values(), default=0) > MAX_REPEATS}
    return {"text": text, "ids": ids, "tokens": len(ids), **flags}


def figures_of(answers: Sequence[Answer]) -> dict[str, float]:
    """The figures of a model: shares with their standard errors, and the median length."""
    figures: dict[str, float] = {}
    for name in FIGURES:
        values = torch.tensor([float(answer[name]) for answer in answers])
        figures |= {name: float(values.mean()), f"{name}_margin": margin_of_share(values)}
    return {**figures, "tokens": float(median(answer["tokens"] for answer in answers))}


def answer_divergence(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    parts: TokenAlignment,
    prompts: list[list[int]],
    answers: Sequence[Answer],
) -> float:
    """Gives the mean KL(dense‖model) in nats per token of the dense model's answers, in the tokens that are left."""
    rows = [[*prompt, *answer["ids"]] for prompt, answer in zip(prompts, answers, strict=True)]
    written = [(row, len(prompt)) for row, prompt in zip(rows, prompts, strict=True) if len(row) > len(prompt)]
    if not written:
        return 0.0
    with evaluating(dense, model):
        far = divergence_from_dense(parts, dense, model, *zip(*written, strict=True))
    return float(far.sum()) / sum(len(row) - begin for row, begin in written)


def items_of(questions: Sequence[Question], answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """Questions with the answers of each model, as records hold them."""

    def kept(answer: Answer) -> Answer:
        return {name: value for name, value in answer.items() if name != "ids"}

    items = []
    for number, question in enumerate(questions):
        written = {which: kept(given[number]) for which, given in answers.items()}
        items.append({"kind": question.kind, "prompt": question.prompt, "answers": written})
    return items


class ShortCheck:
    """Asks the models of a run that reads so many tokens the same few questions, until one cannot answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int):
        self.tokenizer = tokenizer
        count = SHORT_CHECK_QUESTIONS if tokens >= SHORT_CHECK_MIN_READ else 0
        self.questions = read_questions(tokenizers=[tokenizer])[:count]
        self._answers: dict[str, list[Answer]] = {}

    def ask(self, name: str, model: PreTrainedModel) -> None:
        """Ask one more model; a failure only gives a warning."""
        if not (self.questions and predicts_next(model)):
            return
        try:
            self._answers[name] = ask(model, self.tokenizer, self.questions, SHORT_CHECK_TOKENS)
        except Exception as error:  # hours of work are not given up for a few answers
            self.questions = []
            if not isinstance(error, StructPruneError):  # it has too few positions
                warn(f"There are no answers of the {name} model: {one_line(error)}")

    def items(self, earlier: Items = ()) -> Items:
        """The questions with the answers of all models, behind those of an earlier run to the same questions."""
        items = items_of(self.questions, self._answers) if self.questions and self._answers else []
        if [item["prompt"] for item in earlier] != [item["prompt"] for item in items]:
            return items
        pairs = zip(earlier, items, strict=True)
        return [{**item, "answers": {**before["answers"], **item["answers"]}} for before, item in pairs]
