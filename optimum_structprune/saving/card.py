"""Makes the model card of a result, which the Hub shows, and its picture, from the records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from math import isfinite
from pathlib import Path
from shlex import join, quote
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PretrainedConfig, PreTrainedModel

from .. import __version__
from ..arch.meta import model_class
from ..arch.spec import VOCAB
from ..config.domains import IN_MEMORY
from ..config.fields import read_json
from ..config.pruning import CONFIG_NAME, LANGUAGES
from ..domains.manifest import CALIBRATED, EARLIER, JUDGED, MANIFEST_NAME, TRAINED
from ..domains.sources import FORMATS
from ..errors import one_line
from ..record import table
from ..record.answers import Items, outcome, remark, sample_items
from ..record.remarks import LOSES, MOST_SHOWN, judged, known_ratios, remarks, removal_phrases, speed_remark, verdict
from ..record.report import RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, REPORT_NAME
from ..system.disk import CARD, resolved
from ..written import replace_text, warn_on_error, written_files


EVALUATION_NAME, SPEED_NAME = "evaluation.json", "speed.json"
HUB_CACHE = re.compile(r"models--(.+?)--([^/]+)/snapshots")
CHART_NAME = "chart.svg"
LEFT, RIGHT, LINE = 112, 244, 22  # the ends of the scale and the height of a row, in pixels of a picture 360 wide
KINDS, OTHER = "calibrated on: perplexity, × dense", "other text: perplexity, × dense"
NO_XML = re.compile(r"[\0-\b\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # what XML cannot hold
COLOURS = {KINDS: "#2a8f6d", OTHER: "#d9730d"}
STYLE = (
    "text{font:12px sans-serif;fill:#24292f}.group{font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#d1d7de}}"
)
# The classes of sentence-transformers that read a folder with its modules.
SENTENCE_CLASSES = ("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder", "CrossEncoder")
TEMPLATES = Environment(
    loader=PackageLoader("optimum_structprune.saving", "."),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    # Only `|safe` gives a value this attribute.
    finalize=lambda value: value if hasattr(value, "__html__") else table.escaped(str(value)),
)
TEMPLATES.filters["table"] = table.markdown


@dataclass(frozen=True)
class Records:
    """The records of a result, each empty where there is none, and the name of the dense model.

    `report` has the numbers of the run, with those of a training as `recovery`, and `domains` the text. `training` is
    the config of one that is no part of the pruning's. `evaluation` and `speed` were measured later.
    """

    report: Mapping[str, Any]
    config: Mapping[str, Any]
    domains: Sequence[Mapping[str, Any]]
    training: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    speed: Mapping[str, Any]
    dense: str

    @classmethod
    def read(cls, folder: str | Path, dense: str = "") -> Records:
        """Read the records in a folder."""
        names = [REPORT_NAME, RECOVERY_REPORT_NAME, CONFIG_NAME, MANIFEST_NAME, RECOVERY_CONFIG_NAME]
        names += [EVALUATION_NAME, SPEED_NAME]
        found = {name: {**read_json(path)} if (path := Path(folder, name)).is_file() else {} for name in names}
        report = found[REPORT_NAME]
        report["recovery"] = found[RECOVERY_REPORT_NAME] or report.get("recovery") or {}
        return cls(
            report=report,
            config=found[CONFIG_NAME],
            domains=found[MANIFEST_NAME].get("domains") or (),
            training=found[RECOVERY_CONFIG_NAME],
            evaluation=found[EVALUATION_NAME],
            speed=found[SPEED_NAME],
            dense=dense or (report.get("model") or {}).get("name", ""),
        )

    def commands(self, folder: str, dense: str, again: str) -> list[str]:
        """Give the commands that repeat the run from the configs in a folder.

        There are none if a program gave text, or if several trainings followed, of which the folder has one config.
        """
        domains = [domain for config in (self.config, self.training) for domain in config.get("domains") or ()]
        named = all(entry.get("origin") for entry in self.domains if entry.get("use") not in (JUDGED, EARLIER))
        in_memory = any(str(domain.get("source", "")).startswith(IN_MEMORY) for domain in domains)
        if not self.config or not named or in_memory or self.report["recovery"].get("earlier"):
            return []
        dtype = ["--dtype", name] if (name := (self.report.get("model") or {}).get("dtype")) else []
        lines = [["prune", dense, again, "--config", f"{folder}/{CONFIG_NAME}", *dtype]]
        if self.training:
            lines.append(["recover", again, again, "--overwrite", "--config", f"{folder}/{RECOVERY_CONFIG_NAME}"])
            recovery = self.report["recovery"]
            taught = any("dense" in perplexity for perplexity in (recovery.get("perplexity") or {}).values())
            teacher = recovery.get("teacher") or self.dense
            lines[1] += ["--teacher", dense if teacher == self.dense else teacher] if taught else []
            lines[1] += ["--arch", self.config["arch_file"]] if self.config.get("arch_file") else []
        return [join(["structprune", *line]) for line in lines]


def result_text(
    records: Records, title: str, dense: str, dense_path: str, folder: str, again: str, **only_on_card: Any
) -> str:
    """Render a result as Markdown, in which the words of others are nothing but text.

    `dense_path`, `folder` and `again` stand in its commands. Without what is `only_on_card` it is the body of a page.
    """
    report, recovery, evaluation = records.report, records.report["recovery"], records.evaluation
    measured = {"Held out of the calibration": report, "Held out of the training": recovery}
    measured |= {"Measured later": evaluation, "Speed": records.speed}
    rows = {name: [*table.quality_rows(record), *table.speed_rows(record)] for name, record in measured.items()}
    answers: Items = next(filter(None, (record.get("answers") for record in (evaluation, recovery, report))), [])
    seconds = {**(report.get("seconds") or {}), **({"recovery": recovery["seconds"]} if records.training else {})}
    sizes = table.size_rows(report)
    measure = f"structprune evaluate {quote(folder)} --against {quote(dense_path)} --domain NAME=SOURCE --html"
    measure += " --speed" * (not report.get("embeddings"))
    repeat = records.commands(folder, dense_path, again) if report.get("parameters") else []
    # The command reads text, and so must the model.
    has_read = report.get("embeddings") and any(entry.get("origin") for entry in records.domains)
    commands = repeat + [measure] * bool(has_read or report.get("perplexity"))
    text = TEMPLATES.get_template("result.md.jinja").render(
        title=title,
        dense=dense,
        removed=list(removal_phrases(report)),
        counts=report.get("parameters"),
        verdict=[*map(sentence, verdict({**report, "recovery": recovery | {"answers": answers}}))],
        picture=CHART_NAME if chart(report) else "",
        sizes=_table(report, sizes, recovery) if sizes else [],
        tables={name: _table(measured[name], found, recovery) for name, found in rows.items() if found},
        notes=_notes(records),
        answered=list(map(sentence, remark(answers))) if answers else [],
        answers=list(map(_quoted, sample_items(answers))) if answers else [],
        calibrated_on=_domains(records, CALIBRATED),
        trained=recovery,
        trained_on=_domains(records, TRAINED),
        version=__version__,
        spent=timedelta(seconds=round(sum(seconds.values()))) if seconds else "",
        resumed=report.get("resumed"),
        configs=[CONFIG_NAME] * bool(records.config) + [RECOVERY_CONFIG_NAME] * bool(records.training),
        commands=commands,
        shown=", and ".join(["once more"] * bool(repeat) + ["measured on more text"] * (len(commands) > len(repeat))),
        # More backticks than stand together in any text between two fences.
        fence="`" * max(3, *(len(ticks) + 1 for text in (title, *commands) for ticks in re.findall("`+|$", text))),
        **{"card_data": "", **only_on_card},
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _notes(records: Records) -> list[str]:
    """List the remarks on a result as sentences."""
    report, notes = records.report, [*remarks(records.report)]
    notes += [f"warning: {warning}" for warning in records.evaluation.get("warnings") or ()]
    notes += [speed_remark(records.speed)] if records.speed.get("run_memory") else []
    if report.get("perplexity"):
        held, *used = (
            {document for entry in records.domains for document in entry.get(name, ())}
            for name in ("heldout_documents", "documents", "probe_documents")
        )
        shared = held & set().union(*used)
        uses = "some of its documents were" if shared else "none of its documents was"
        notes.append(f"held-out text: {uses} used for {'the pruning too' if shared else 'anything else'}")
    return [sentence(note) for note in notes if note]


def sentence(words: str) -> str:
    """Turn a remark into a sentence."""
    return f"{words[:1].upper()}{words[1:].rstrip('.')}."


def _table(record: Mapping[str, Any], rows: list[table.Row], recovery: Mapping[str, Any]) -> list[list[str]]:
    names = {"before": "dense", "after": "pruned", "model": "recovered" if recovery else "pruned"}
    return table.cells([names.get(model, model) for model in table.models_of(record)], rows)


def _quoted(item: Mapping[str, Any]) -> tuple[str, list[str]]:
    # Such words never begin a line, where Markdown might read them.
    shown = [f"{outcome(answer)} ({name}): {_beginning(answer['text'])}" for name, answer in item["answers"].items()]
    return _beginning(item["prompt"]), shown


def _beginning(text: str) -> str:
    """Cuts a text to 200 characters in one line, also where it has no spaces."""
    line = one_line(text)
    return line if len(line) <= 200 else f"{line[:199]}…"


def _domains(records: Records, use: str) -> list[list[str]]:
    rows = [["domain", "source", "share", "tokens"]]
    for entry in records.domains:
        if entry.get("use", CALIBRATED) == use:
            origin = entry["origin"]
            source = short_name(" ".join(str(origin[key]) for key in ("source", "dataset_config") if origin.get(key)))
            share, tokens = f"{entry['weight']:.2f}", f"{entry['calibration_tokens']:,}"
            rows.append([entry["name"], source or "given inputs", share, tokens])
    return rows if len(rows) > 1 else []


def short_name(source: str) -> str:
    """Give the usual name of a model or text: its id on the Hub, or the name of its file or folder."""
    if cached := HUB_CACHE.search(source):
        return "/".join(cached.groups())
    path = Path(source)
    local = path.is_absolute() or path.exists() or path.suffix in FORMATS
    return path.resolve().name if source and local else source


@dataclass(frozen=True)
class DenseModel:
    """The dense model as a card names it.

    `name` is its id on the Hub or the name of its folder, or empty; `base_model` is its id on the Hub. `licence` has
    the fields of its card that tell the licence, and `card` all of them.
    """

    name: str
    base_model: str | None
    licence: Mapping[str, Any]
    card: Mapping[str, Any]

    @classmethod
    def read(cls, source: str, named: Mapping[str, Any]) -> DenseModel:
        """Read the card of a model; the id and the licence that the user has `named` go before it."""
        folder = Path(source)
        fields: dict[str, Any] = {}
        with suppress(Exception):  # of the network, the Hub, or somebody else's YAML: the licence is unknown then
            if source and (not folder.is_dir() or (folder / CARD).is_file()):
                fields = ModelCard.load(folder / CARD if folder.is_dir() else source).data.to_dict()
        # All that is used are texts and lists of them. In lists of lists, YAML's aliases make any number of few lines.
        lists = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
        fields = {name: fields[name] for name in lists if all(isinstance(each, str) for each in lists[name])}
        licence = {name: value for name, value in fields.items() if name.startswith("license") and value}
        licence = {"license": named["license"]} if named.get("license") else licence
        base: Any = short_name(source)
        if folder.is_dir() and not HUB_CACHE.search(source):
            # A folder has no id. What this package has pruned before says in its card what it comes from.
            base = fields.get("base_model") if written_files(folder) else None
        base = named.get("base_model") or base
        return cls(str(base or short_name(source)), base if _is_id(base) else None, licence, fields)


def loader_of(folder: str | Path, config: PretrainedConfig, arch_file: str | Path | None = None) -> str:
    """Name the callable that loads a result; with modules of its own, a class of sentence-transformers."""
    if not Path(folder, "modules.json").is_file():
        return f"{model_class(config, arch_file).__name__}.from_pretrained"
    path = Path(folder, "config_sentence_transformers.json")
    kind = read_json(path).get("model_type") if path.is_file() else None
    return kind if kind in SENTENCE_CLASSES else SENTENCE_CLASSES[0]


def leave_card(folder: Path, output: str | Path, model: PreTrainedModel, arch_file: str | None) -> None:
    """Write the card of a result in its working folder; if it cannot be made, only warn."""
    with warn_on_error(output, CARD):
        text = model_card(folder, resolved(output).name, model.config, model.name_or_path, arch_file)
        replace_text(folder / CARD, text)
        if picture := chart(Records.read(folder).report):
            replace_text(folder / CHART_NAME, picture)


def model_card(
    folder: Path, name: str, config: PretrainedConfig, dense: str | None = None, arch_file: str | None = None
) -> str:
    """Render the model card of a result."""
    records = Records.read(folder)
    report = records.report
    origin = DenseModel.read(records.dense or dense or "", report.get("model") or {})
    loads = loader_of(folder, config, arch_file)
    kind = loads.removesuffix(".from_pretrained")
    return result_text(
        records,
        title=name,
        dense=origin.name,
        dense_path=origin.base_model or "DENSE",
        folder=".",
        again="again",
        card_data=_fields(records, origin, kind).to_yaml(),
        shell_name=quote(name),
        licence=origin.licence,
        kind=kind,
        loads=loads,
        library="sentence_transformers" if kind == loads else "transformers",
        causal=kind == "AutoModelForCausalLM",
        files={path.name for path in folder.iterdir()},
        heterogeneous=config.get_text_config().is_heterogeneous,
        has_code="auto_map" in read_json(folder / "config.json"),
        is_measured=bool(records.evaluation or (report.get("other") or {}).get("tokens")),
        widths=report.get("widths") or {},
        **_llama_cpp(config, report),
    )


def _fields(records: Records, origin: DenseModel, kind: str) -> ModelCardData:
    # The Hub finds models of sentence-transformers by the fields of the dense one.
    found: dict[str, Any] = {"pipeline_tag": "text-generation" if kind == "AutoModelForCausalLM" else None}
    if kind in SENTENCE_CLASSES:
        found = {"library_name": "sentence-transformers", **origin.card}
    texts = [entry["origin"] for entry in records.domains if not entry.get("place_sha256")]
    sources = {str(text.get("source", "")) for text in (*texts, *(records.training.get("domains") or ()))}
    datasets = (name for name in sources if _is_id(name) and Path(name).suffix not in FORMATS)
    return ModelCardData(
        base_model=origin.base_model,
        library_name=found.get("library_name", "transformers"),
        tags=[*dict.fromkeys(["structured-pruning", "pruned", "optimum-structprune", *found.get("tags", ())])],
        datasets=sorted(name for name in datasets if not os.path.exists(name)) or None,
        language=origin.card.get("language"),
        pipeline_tag=found.get("pipeline_tag"),
        **origin.licence,
    )


def _is_id(name: Any) -> bool:
    with suppress(ValueError):
        validate_repo_id(name)
        return True
    return False


def _llama_cpp(config: PretrainedConfig, report: Mapping[str, Any]) -> dict[str, Any]:
    if not config.get_text_config().is_heterogeneous and {*(report.get("widths") or [""])} <= {"mlp", VOCAB}:
        return {"by_layer": False, "gguf_refusal": ""}
    from ..arch.llama_cpp import BY_LAYER, gguf_architecture, gguf_refusal

    return {"by_layer": gguf_architecture(config) in BY_LAYER.values(), "gguf_refusal": gguf_refusal(config)}


def chart(report: Mapping[str, Any]) -> str:
    """Draws the losses in a report as SVG; empty where nothing was measured."""
    marks = [
        (group, name, value, margin if margin is not None and isfinite(margin) else 0.0)
        for group, name, value, margin in _marks(report)
    ]
    low = min((value - margin for *_, value, margin in marks), default=1.0)
    high = max((value + margin for *_, value, margin in marks), default=1.0)
    low, scale = min(low, 1.0), (RIGHT - LEFT) / (max(high, 1.0, low + 0.01) - min(low, 1.0))
    dense, y, last, drawn = LEFT + (1 - low) * scale, 0, "", ""
    for group, name, value, margin in marks:
        if group != last:
            last, y = group, y + LINE
            drawn += f'<text class="group" x="8" y="{y + 4}">{escape(group)}</text>'
        label = NO_XML.sub("\ufffd", name if len(name) < 16 else f"{name[:14]}…")
        y, x, reach, colour = y + LINE, LEFT + (value - low) * scale, margin * scale, COLOURS.get(group, "#4c7fd1")
        drawn += (
            f'<text x="16" y="{y + 4}">{escape(label)}</text>'
            f'<path d="M{dense:.1f} {y - 9}v18" stroke="#8c959f" stroke-dasharray="3 3"/>'
            f'<path d="M{x - reach:.1f} {y}H{x + reach:.1f}" stroke="{colour}" stroke-width="3" opacity=".5"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{colour}"/>'
            f'<text x="{RIGHT + 14}" y="{y + 4}">{table.as_number(value, margin or None, 2)}</text>'
        )
    size = f'viewBox="0 0 360 {y + 42}" width="360" role="img" aria-label="What was lost"'
    note = f'<text x="8" y="{y + 32}">dashed: dense model; bars hold the truth 9 times in 10</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{drawn}{note}</svg>\n' * bool(marks)


def _marks(report: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """Yields group, name, value and margin of each kind of text and of the languages that lose most."""
    record = judged(report)
    kinds = record.get("perplexity") or {}
    for row in table.quality_rows(record):
        figure, _, name = row.label.partition(" ")
        if figure == "perplexity" and row.change == table.RATIO and row.ratio:
            group, shown = (KINDS, name) if name in kinds else (OTHER, name.removeprefix("other text, "))
            yield group, shown, row.ratio, row.margins[-1] if row.margins else None
    by_domain, by_code = report.get("embeddings") or {}, report.get("languages") or {}
    cosines = {code: figures for code, figures in by_code.items() if figures.get("cosine")}
    lowest = sorted(cosines, key=lambda code: cosines[code]["cosine"])[:MOST_SHOWN]
    vectors = [("cosine to the dense model", name, figures["after"]) for name, figures in by_domain.items()]
    vectors += [("cosine by language, lowest first", LANGUAGES[code], cosines[code]) for code in lowest]
    for group, name, near in vectors:
        if near.get("cosine"):
            yield group, name, near["cosine"], near.get("cosine_margin")
    losing = [pair for pair in known_ratios(by_code).items() if pair[1] > LOSES] if by_code and not cosines else []
    yield from (("languages that lose, × dense", LANGUAGES[code], ratio, None) for code, ratio in losing[:MOST_SHOWN])
