"""Greedy answers of a model to questions, or text behind openings: is it right, does it end, does it repeat itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import check_positions, predicts_next
from ..domains.packing import prompt_ids
from ..domains.templates import question_messages, read_lines
from ..errors import StructPruneError, one_line, warn
from ..forward.generation import continuations
from ..forward.metrics import evaluating
from ..record.figures import Answer, AnsweredQuestion, AnswersResult
from ..system.stages import progress, stage
from ..vocabulary.token_alignment import TokenAlignment, divergence_from_dense


BUILTIN = "builtin"
QUESTIONS = Path(__file__).with_name("questions.jsonl")
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
# An answer loops if the same run of tokens occurs more often than this.
RUN_TOKENS = 4
MAX_REPEATS = 3
# The form of a line of a file of questions, for a refusal.
FORM = 'is no question, which has a "prompt" or "messages", and in "right" a regular expression ("" accepts all)'
AT_ONCE = 32  # answers that are written together at least
# The short check of `prune` and `recover` asks the first questions. A run that reads fewer tokens is a trial of the
# command and asks nothing, because it would spend most of its time on answers.
SHORT_CHECK_QUESTIONS = 16
SHORT_CHECK_TOKENS = 64
SHORT_CHECK_MIN_READ = 4_096


@dataclass
class WrittenAnswer(Answer):
    """An answer with its token ids, which no record holds."""

    ids: list[int] = field(default_factory=list)

    def record(self) -> Answer:
        """Return the answer without its token ids."""
        return Answer(self.text, self.right, self.loops, self.stopped, self.tokens)


@dataclass(frozen=True)
class Question:
    """A question, as messages and as an opening for a base model, each with a pattern for correct answers."""

    kind: str
    messages: tuple[Mapping[str, str], ...]
    right: re.Pattern[str]
    opening: str
    continues: re.Pattern[str]

    @property
    def prompt(self) -> str:
        """Return the text of the question."""
        return self.messages[-1]["content"]

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids of the prompt."""
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
) -> list[WrittenAnswer]:
    """Return the greedy answers of a model."""
    prompts = [question.ids(tokenizer) for question in questions]
    check_positions(model, max_new_tokens, f"max_new_tokens={max_new_tokens}", max(map(len, prompts)))

    # Prompts of similar length run together, so that little is padded.
    ids: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    settings = {**GREEDY, "max_new_tokens": max_new_tokens}
    with evaluating(model), stage("answers"):
        for start in progress(range(0, len(order), batch_size), desc="Answering questions", unit="batch"):
            batch = order[start : start + batch_size]
            continued = continuations(model, tokenizer, [prompts[number] for number in batch], settings)
            for number, tokens in zip(batch, continued, strict=True):
                ids[number] = tokens

    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    is_chat = bool(tokenizer.chat_template)
    return [
        _judged(question, tokens, text, len(tokens) < max_new_tokens, is_chat)
        for question, tokens, text in zip(questions, ids, texts, strict=True)
    ]


def _judged(question: Question, ids: list[int], text: str, stopped: bool, is_chat: bool) -> WrittenAnswer:
    """Return an answer with its figures. If a base model continues an opening, only the first line is judged."""
    if is_chat:
        match = question.right.search(text.strip())
    else:
        match = question.continues.search(text.strip().partition("\n")[0].strip())

    runs = Counter(tuple(ids[start : start + RUN_TOKENS]) for start in range(len(ids) - RUN_TOKENS + 1))
    loops = max(runs.values(), default=0) > MAX_REPEATS
    return WrittenAnswer(text, match is not None, loops, stopped, len(ids), ids)


def answer_divergence(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    parts: TokenAlignment,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[WrittenAnswer],
) -> float:
    """Return the mean KL(dense‖model) in nats per token of the original model's answers."""
    rows = []
    starts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer.ids:
            rows.append([*prompt, *answer.ids])
            starts.append(len(prompt))
    if not rows:
        return 0.0

    with evaluating(dense, model):
        total = float(divergence_from_dense(parts, dense, model, rows, starts).sum())
    return total / sum(len(row) - start for row, start in zip(rows, starts, strict=True))


def answers_result(questions: Sequence[Question], answers: Mapping[str, Sequence[WrittenAnswer]]) -> AnswersResult:
    """Return questions with the answers of each model."""
    items = []
    for number, question in enumerate(questions):
        by_model = {name: written[number].record() for name, written in answers.items()}
        items.append(AnsweredQuestion(question.kind, question.prompt, by_model))
    return AnswersResult(items)


class ShortCheck:
    """Asks the models of a run the same few questions.

    Args:
        tokenizer: The tokenizer of the model that is asked next.
        tokens: The number of tokens that the run reads. With fewer than `SHORT_CHECK_MIN_READ`, nothing is asked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int):
        self.tokenizer = tokenizer
        count = SHORT_CHECK_QUESTIONS if tokens >= SHORT_CHECK_MIN_READ else 0
        self.questions = read_questions(tokenizers=[tokenizer])[:count]
        self._answers: dict[str, list[WrittenAnswer]] = {}

    def ask(self, name: str, model: PreTrainedModel) -> None:
        """Ask one model. An error only causes a warning, and no further model is asked."""
        if not self.questions or not predicts_next(model):
            return
        try:
            self._answers[name] = ask(model, self.tokenizer, self.questions, SHORT_CHECK_TOKENS)
        except Exception as error:  # a few answers are not worth hours of work
            self.questions = []
            if not isinstance(error, StructPruneError):  # a model with too few positions needs no warning
                warn(f"There are no answers of the {name} model: {one_line(error)}")

    def result(self, earlier: AnswersResult | None = None) -> AnswersResult | None:
        """Return the answers of all models, or None if none was asked.

        Args:
            earlier: The answers of an earlier run, which come first if its questions are the same.
        """
        if not self.questions or not self._answers:
            return None
        result = answers_result(self.questions, self._answers)
        prompts = [question.prompt for question in result.questions]
        if earlier is None or [question.prompt for question in earlier.questions] != prompts:
            return result

        for before, question in zip(earlier.questions, result.questions, strict=True):
            question.answers = {**before.answers, **question.answers}
        return result
