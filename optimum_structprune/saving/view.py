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
from ..errors import capitalized, one_line
from ..record.answers import answers_line, answers_warning, outcome, sample_questions
from ..record.evaluation import MeasuredModel, Measurement
from ..record.figures import DENSE, AnsweredQuestion
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
        outcome: Whether it is right, and its faults.
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
    """The content of a card or a page. A table is a list of rows; the first row is the head.

    Attributes:
        title: The name of the result.
        introduction: A description of the result in a few sentences.
        verdict: The verdict; empty where no loss was measured.
        sizes: The table of sizes.
        losses: The table of losses by domain.
        notes: Sentences about the losses.
        evaluation: The table of the figures that `evaluate` has added to the result.
        evaluation_notes: Sentences about these figures.
        answers_notes: Sentences about the answers.
        questions: Some questions with their answers.
        calibrated_on: The table of calibration domains.
        trained_on: The table of training text.
        training: The cost of the training; empty where there was none.
        duration: The duration of the run; empty where it is unknown.
        is_resumed: Whether the run continued an interrupted one.
        configs: The names of the config files.
        commands: The commands that repeat the run and evaluate the result.
    """

    title: str
    introduction: str
    verdict: str = ""
    sizes: list[list[str]] = field(default_factory=list)
    losses: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    evaluation: list[list[str]] = field(default_factory=list)
    evaluation_notes: list[str] = field(default_factory=list)
    answers_notes: list[str] = field(default_factory=list)
    questions: list[ShownQuestion] = field(default_factory=list)
    calibrated_on: list[list[str]] = field(default_factory=list)
    trained_on: list[list[str]] = field(default_factory=list)
    training: str = ""
    duration: str = ""
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
    view = View(title, _introduction(records, dense))
    view.sizes = size_table(report)
    view.losses = loss_table(report)
    view.notes = _notes(records)
    view.is_resumed = report.resumed

    later_answers = None if records.evaluation is None else records.evaluation.answers
    verdict = judge(report, later_answers)
    if verdict is not None:
        view.verdict = sentence(str(verdict))

    answers = later_answers or report.latest_answers
    if answers is not None:
        lines = [answers_line(answers)]
        lines += answers_warning(answers)
        view.answers_notes = [sentence(line) for line in lines]
        view.questions = [_shown_question(question) for question in sample_questions(answers)]

    if records.evaluation is not None or records.speed is not None:
        view.evaluation = _evaluation_table(records)
        view.evaluation_notes = _evaluation_notes(records)

    view.calibrated_on = _domain_table(records, CALIBRATED)
    view.trained_on = _domain_table(records, TRAINED)
    if report.recovery is not None:
        view.training = sentence(training_line(report.recovery))
    view.duration = _duration(records)

    if records.config:
        view.configs.append(CONFIG_NAME)
    if records.training:
        view.configs.append(RECOVERY_CONFIG_NAME)
    view.commands = records.commands(folder, dense_path, output)
    view.commands += _evaluate_command(records, folder, dense_path)
    return view


def _introduction(records: Records, dense: str) -> str:
    """Return a description of the result: `This is NAME, pruned and recovered. …`."""
    report = records.report
    recovery = report.recovery
    steps = "pruned"
    if recovery is not None and recovery.kept_step:
        steps = "pruned and recovered"

    sentences = [f"This is {dense or 'a model'}, {steps}."]
    if report.dense.parameters:
        sentences.append(
            f"It has {report.removed:.1%} fewer parameters "
            f"({report.dense.parameters:,} → {report.pruned.parameters:,})."
        )
    sentences += [sentence(phrase) for phrase in width_phrases(report).values()]
    return " ".join(sentences)


def _notes(records: Records) -> list[str]:
    """Return sentences about the losses."""
    report = records.report
    notes = []
    if report.changed:
        notes.append(f"warning: {CHANGED}")

    request = request_line(report)
    if request:
        notes.append(request)
    notes += loss_notes(report)
    notes += vocabulary_lines(report)
    notes += language_lines(report.languages)
    notes += details(report)

    if any(domain.perplexity is not None for domain in report.domains.values()):
        notes.append(_overlap(records))
    return [sentence(note) for note in notes]


def _overlap(records: Records) -> str:
    """Return whether held-out documents were used for anything else."""
    heldout_documents: set[str] = set()
    other_documents: set[str] = set()

    for entry in records.domains:
        heldout_documents.update(entry.heldout_documents)
        other_documents.update(entry.documents)
        other_documents.update(entry.probe_documents)

    if heldout_documents & other_documents:
        return "Some held-out documents were used for the pruning too"
    return "No held-out document was used for anything else"


def _evaluation_table(records: Records) -> list[list[str]]:
    """Return the table of the figures that `evaluate` has added to the result."""
    models = {}
    if records.evaluation is not None:
        models["pruned"] = MeasuredModel("", evaluation=records.evaluation)
    elif records.speed is not None:
        models = {name: MeasuredModel(name) for name in records.speed.models}

    return measurement_table(Measurement(models, records.speed))


def _evaluation_notes(records: Records) -> list[str]:
    """Return sentences about the figures that `evaluate` has added to the result."""
    notes = []
    if records.evaluation is not None:
        notes += [f"warning: {warning}" for warning in records.evaluation.warnings]
    if records.speed is not None:
        notes.append(speed_note(records.speed))

    return [sentence(note) for note in notes]


def _shown_question(question: AnsweredQuestion) -> ShownQuestion:
    """Return a question as the card and the page show it."""
    answers = []
    for name, answer in question.answers.items():
        model = "original" if name == DENSE else name
        answers.append(ShownAnswer(model, _beginning(answer.text), outcome(answer), answer.right))

    return ShownQuestion(_beginning(question.prompt), answers)


def _beginning(text: str) -> str:
    """Return the first 200 characters of a text in one line."""
    line = one_line(text)
    if len(line) > MAX_ANSWER:
        line = f"{line[: MAX_ANSWER - 1]}…"
    return line


def _domain_table(records: Records, use: str) -> list[list[str]]:
    """Return the table of the domains that were used in one way, or nothing if there are none."""
    rows = []
    for entry in records.with_use(use):
        fields = [str(entry.origin[name]) for name in ("source", "dataset_config") if entry.origin.get(name)]
        source = short_name(" ".join(fields)) or "given inputs"
        rows.append([entry.name, source, f"{entry.weight:.2f}", f"{entry.calibration_tokens:,}"])

    if rows:
        rows.insert(0, ["domain", "source", "share", "tokens"])
    return rows


def _duration(records: Records) -> str:
    """Return the duration of the pruning and of the training after it, or nothing if it is unknown."""
    report = records.report
    seconds = sum(report.seconds.values())
    # The duration of a training without a config of its own is part of the stages of the pruning.
    if records.training and report.recovery is not None:
        seconds += report.recovery.seconds

    if not seconds:
        return ""
    return str(timedelta(seconds=round(seconds)))


def _evaluate_command(records: Records, folder: str, dense: str) -> list[str]:
    """Return the command that evaluates the result on more text, if the model reads text."""
    domains = records.report.domains.values()
    has_vectors = any(domain.vectors is not None for domain in domains)
    has_loss = any(domain.perplexity is not None for domain in domains)
    has_text = any(entry.origin for entry in records.domains)
    if not has_loss and not (has_vectors and has_text):
        return []

    command = f"structprune evaluate {quote(folder)} --against {quote(dense)} --domain NAME=SOURCE --html"
    if not has_vectors:
        command += " --speed"
    return [command]


def sentence(text: str) -> str:
    """Return a remark as a sentence: with a capital letter and a full stop."""
    return f"{capitalized(text).rstrip('.')}."


def short_name(source: str) -> str:
    """Return the usual name of a model or text: its id on the Hub, or the name of its file or folder."""
    match = HUB_CACHE.search(source)
    if match is not None:
        return "/".join(match.groups())
    if not source:
        return ""

    path = Path(source)
    if path.is_absolute() or path.exists() or path.suffix in FORMATS:
        return path.resolve().name
    return source
