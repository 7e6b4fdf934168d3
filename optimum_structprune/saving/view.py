"""The content that the model card and the page of a result share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from shlex import quote

from ..config.pruning import CONFIG_NAME
from ..domains.manifest import CALIBRATED, TRAINED
from ..domains.sources import FORMATS
from ..errors import one_line
from ..record.answers import answers_line, answers_warning, outcome, sample_questions
from ..record.evaluation import MeasuredModel, Measurement
from ..record.figures import AnsweredQuestion, AnswersResult
from ..record.measured import measurement_table, speed_note
from ..record.report import RECOVERY_CONFIG_NAME
from ..record.summary import (
    CHANGED,
    details,
    language_lines,
    loss_notes,
    loss_table,
    request_line,
    size_table,
    training_line,
    vocabulary_lines,
    width_phrases,
)
from ..record.verdict import judge
from .records import Records


MAX_ANSWER = 200
# A folder of the Hub's cache, with the owner and the name of a model.
HUB_CACHE = re.compile(r"models--(.+?)--([^/]+)/snapshots")


@dataclass(frozen=True)
class ShownAnswer:
    """The answer of one model as the card and the page show it.

    Attributes:
        model: The name of the model.
        text: The beginning of the answer.
        outcome: Whether it is right, and its other faults.
        is_right: Whether it is right.
    """

    model: str
    text: str
    outcome: str
    is_right: bool


@dataclass(frozen=True)
class ShownQuestion:
    """A question and its answers as the card and the page show them."""

    prompt: str
    answers: list[ShownAnswer]


@dataclass
class View:
    """The content of a card or a page.

    Attributes:
        title: The name of the result.
        introduction: What the result is, in one sentence.
        verdict: What the model can be used for; empty where no loss was measured.
        sizes: The table of sizes; tables are lists of rows, the first of which is the head.
        losses: The table of losses by domain.
        notes: Sentences about the losses.
        later: The table of what was measured later.
        later_notes: Sentences about it.
        answers_notes: Sentences about the answers.
        questions: Some questions with their answers.
        calibrated_on: The table of calibration domains.
        trained_on: The table of training text.
        training: The cost of the training; empty where there was none.
        has_training_config: Whether the training has a config of its own.
        spent: The duration of the run; empty where it is unknown.
        is_resumed: Whether the run continued an interrupted one.
        configs: The names of the config files.
        commands: The commands that repeat the run and measure more.
    """

    title: str
    introduction: str
    verdict: str = ""
    sizes: list[list[str]] = field(default_factory=list)
    losses: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    later: list[list[str]] = field(default_factory=list)
    later_notes: list[str] = field(default_factory=list)
    answers_notes: list[str] = field(default_factory=list)
    questions: list[ShownQuestion] = field(default_factory=list)
    calibrated_on: list[list[str]] = field(default_factory=list)
    trained_on: list[list[str]] = field(default_factory=list)
    training: str = ""
    spent: str = ""
    is_resumed: bool = False
    configs: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def view_of(records: Records, title: str, dense: str, dense_path: str, folder: str, output: str) -> View:
    """Return the content about a result.

    Args:
        records: The records of the result.
        title: The name of the result.
        dense: The name of the original model.
        dense_path: The original model in commands.
        folder: The folder of the result in commands.
        output: The folder of a repeated result in commands.
    """
    report = records.report
    recovery = report.recovery
    evaluation = records.evaluation
    later_answers = None if evaluation is None else evaluation.answers
    answers = later_answers or (None if recovery is None else recovery.answers) or report.answers
    verdict = judge(report, later_answers)

    view = View(title, _introduction(records, dense))
    view.verdict = "" if verdict is None else sentence(str(verdict))
    view.sizes = size_table(report)
    view.losses = loss_table(report)
    view.notes = _notes(records)
    if evaluation is not None or records.speed is not None:
        view.later = _later_table(records)
        view.later_notes = _later_notes(records)
    if answers is not None:
        view.answers_notes = [sentence(line) for line in [answers_line(answers), *answers_warning(answers)]]
        view.questions = _questions(answers)
    view.calibrated_on = _domain_table(records, CALIBRATED)
    view.trained_on = _domain_table(records, TRAINED)
    if recovery is not None:
        view.training = sentence(training_line(recovery))

    seconds = sum(report.seconds.values())
    if records.training and recovery is not None:
        seconds += recovery.seconds
    view.spent = str(timedelta(seconds=round(seconds))) if seconds else ""
    view.is_resumed = report.resumed
    view.configs = [CONFIG_NAME] if records.config else []
    view.configs += [RECOVERY_CONFIG_NAME] if records.training else []
    view.commands = [*records.commands(folder, dense_path, output), *_measure_command(records, folder, dense_path)]
    return view


def _introduction(records: Records, dense: str) -> str:
    """Return what the result is: `This is NAME, pruned and recovered: …`."""
    report = records.report
    recovery = report.recovery
    is_recovered = recovery is not None and bool(recovery.kept_step)
    text = f"This is {dense or 'a model'}, pruned{' and recovered' if is_recovered else ''}."
    if report.dense.parameters:
        share = f"{report.removed:.1%} fewer parameters ({report.dense.parameters:,} → {report.pruned.parameters:,})"
        text += f" It has {share}."
    phrases = [sentence(phrase) for phrase in width_phrases(report).values()]
    return " ".join([text, *phrases])


def _notes(records: Records) -> list[str]:
    """Return sentences about the losses."""
    report = records.report
    notes = [f"warning: {CHANGED}"] if report.changed else []
    notes += [request_line(report), *loss_notes(report), *vocabulary_lines(report)]
    notes += [*language_lines(report.languages), *details(report)]
    if any(domain.perplexity is not None for domain in report.domains.values()):
        notes.append(_overlap(records))
    return [sentence(note) for note in notes if note]


def _overlap(records: Records) -> str:
    """Return whether held-out documents were used for anything else."""
    held_out: set[str] = set()
    used: set[str] = set()
    for entry in records.domains:
        held_out.update(entry.heldout_documents)
        used.update(entry.documents)
        used.update(entry.probe_documents)
    if held_out & used:
        return "Some held-out documents were used for the pruning too"
    return "No held-out document was used for anything else"


def _later_table(records: Records) -> list[list[str]]:
    """Return the table of what was measured later."""
    models = {}
    if records.evaluation is not None:
        models["pruned"] = MeasuredModel("", evaluation=records.evaluation)
    elif records.speed is not None:
        models = {name: MeasuredModel(name) for name in records.speed.models}
    return measurement_table(Measurement(models, records.speed))


def _later_notes(records: Records) -> list[str]:
    """Return sentences about what was measured later."""
    notes = []
    if records.evaluation is not None:
        notes += [f"warning: {warning}" for warning in records.evaluation.warnings]
    if records.speed is not None:
        notes.append(speed_note(records.speed))
    return [sentence(note) for note in notes]


def _questions(answers: AnswersResult) -> list[ShownQuestion]:
    """Return a few questions with the answers of all models."""
    return [_shown(question) for question in sample_questions(answers)]


def _shown(question: AnsweredQuestion) -> ShownQuestion:
    """Return a question as the card and the page show it."""
    names = {"dense": "original"}
    shown = []
    for name, answer in question.answers.items():
        shown.append(ShownAnswer(names.get(name, name), _beginning(answer.text), outcome(answer), answer.right))
    return ShownQuestion(_beginning(question.prompt), shown)


def _beginning(text: str) -> str:
    """Return the first 200 characters of a text in one line."""
    line = one_line(text)
    return line if len(line) <= MAX_ANSWER else f"{line[: MAX_ANSWER - 1]}…"


def _domain_table(records: Records, use: str) -> list[list[str]]:
    """Return the domains that were used in one way."""
    rows = [["domain", "source", "share", "tokens"]]
    for entry in records.of_use(use):
        parts = [str(entry.origin[key]) for key in ("source", "dataset_config") if entry.origin.get(key)]
        source = short_name(" ".join(parts)) or "given inputs"
        rows.append([entry.name, source, f"{entry.weight:.2f}", f"{entry.calibration_tokens:,}"])
    return rows if len(rows) > 1 else []


def _measure_command(records: Records, folder: str, dense: str) -> list[str]:
    """Return the command that measures more text, for models that read text."""
    report = records.report
    has_vectors = any(domain.vectors is not None for domain in report.domains.values())
    has_loss = any(domain.perplexity is not None for domain in report.domains.values())
    read_text = any(entry.origin for entry in records.domains)
    if not has_loss and not (has_vectors and read_text):
        return []

    command = f"structprune evaluate {quote(folder)} --against {quote(dense)} --domain NAME=SOURCE --html"
    return [command if has_vectors else f"{command} --speed"]


def sentence(text: str) -> str:
    """Return a remark as a sentence."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def short_name(source: str) -> str:
    """Return the usual name of a model or text: its id on the Hub, or the name of its file or folder."""
    cached = HUB_CACHE.search(source)
    if cached is not None:
        return "/".join(cached.groups())
    path = Path(source)
    is_local = path.is_absolute() or path.exists() or path.suffix in FORMATS
    return path.resolve().name if source and is_local else source
