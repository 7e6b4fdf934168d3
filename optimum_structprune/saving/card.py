"""Write the model card of a result from its records."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.meta import model_class
from ..arch.per_layer import is_non_uniform
from ..arch.spec import VOCAB
from ..config.fields import read_json
from ..domains.sources import FORMATS
from ..record import table
from ..record.report import Report
from ..system.disk import CARD, resolved
from ..system.modules import modules_root
from ..system.written import replace_text, warn_on_error, written_files
from .records import Records
from .view import HUB_CACHE, content, short_name, templates


# The classes of sentence-transformers that read a folder with its modules.
SENTENCE_CLASSES = ("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder", "CrossEncoder")
TAGS = ("structured-pruning", "pruned", "optimum-structprune")
FENCE_TICKS = 3


def _escape(value: Any) -> Any:
    """Escape a value for Markdown, unless the template marked it as safe."""
    if hasattr(value, "__html__"):
        return value
    return table.escaped(str(value))


TEMPLATES = templates(finalize=_escape)
TEMPLATES.filters["table"] = table.markdown


@dataclass(frozen=True)
class OriginalCard:
    """The facts that a card states about the original model.

    Attributes:
        name: Its id on the Hub or the name of its folder; empty where it is unknown.
        base_model: Its id on the Hub; None where it has none.
        licence: The fields of its card about the licence.
        fields: All fields of its card.
    """

    name: str
    base_model: str | None
    licence: Mapping[str, Any]
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, source: str, report: Report, folder: str | None = None) -> OriginalCard:
        """Read the card of the original model.

        Args:
            source: Its id on the Hub, or its folder, from the records.
            report: The report, which has the id and the licence if the user has given them.
            folder: The folder that the model was loaded from. Records have only the names of folders.
        """
        # The name of a folder without its path is no id, so the Hub is not asked for it.
        is_from_folder = folder is not None and Path(folder).is_dir()
        is_folder_name = is_from_folder and "/" not in source and not Path(source).is_dir()
        fields: dict[str, Any] = {}
        if not is_folder_name:
            fields = _card_fields(source)
        if not fields and folder is not None:
            fields = _card_fields(folder)

        licence = {name: value for name, value in fields.items() if name.startswith("license") and value}
        if report.model.license:
            licence = {"license": report.model.license}

        base: Any = report.model.base_model or _base_model(source, fields)
        name = str(base or short_name(source))
        if not _is_id(base):
            base = None
        return cls(name, base, licence, fields)


def _base_model(source: str, fields: Mapping[str, Any]) -> Any:
    """Return the id of the original model on the Hub, or None if it has none.

    Args:
        source: Its id, or its folder.
        fields: The fields of its card.
    """
    if not Path(source).is_dir() or HUB_CACHE.search(source):
        return short_name(source)

    # A folder has no id, but the card of an earlier result in it names the base model.
    if written_files(Path(source)):
        return fields.get("base_model")
    return None


def _card_fields(source: str) -> dict[str, Any]:
    """Return the fields of a model card that are texts or lists of texts, or nothing if it cannot be read."""
    folder = Path(source)
    fields: dict[str, Any] = {}

    # The network or the Hub may fail, and the YAML may be invalid. The licence is then unknown.
    with suppress(Exception):
        if source and not folder.is_dir():
            fields = ModelCard.load(source).data.to_dict()
        elif source and (folder / CARD).is_file():
            fields = ModelCard.load(folder / CARD).data.to_dict()

    # Aliases in YAML can turn a few lines into very large nested lists.
    return {name: value for name, value in fields.items() if _is_text(value)}


def _is_text(value: Any) -> bool:
    """Return whether a value is a text or a list of texts."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def loader_of(folder: str | Path, config: PretrainedConfig, arch_file: str | Path | None = None) -> str:
    """Return the callable that loads a result.

    It is a `from_pretrained`, or a class of sentence-transformers if the folder has modules around the model.
    """
    if not Path(folder, "modules.json").is_file():
        return f"{model_class(config, arch_file).__name__}.from_pretrained"

    path = Path(folder, "config_sentence_transformers.json")
    if path.is_file():
        kind = read_json(path).get("model_type")
        if kind in SENTENCE_CLASSES:
            return str(kind)
    return SENTENCE_CLASSES[0]


def write_card(folder: Path, output: str | Path, model: PreTrainedModel, arch_file: str | None) -> None:
    """Write the card of a result. An error only causes a warning.

    Args:
        folder: The working folder of the result.
        output: The folder that the result is moved to.
        model: The model.
        arch_file: The file that describes the architecture.
    """
    with warn_on_error(output, CARD):
        original = model.name_or_path
        if original and Path(original).is_dir():
            original = str(modules_root(Path(original)))
        text = model_card(folder, resolved(output).name, model.config, original, arch_file)
        replace_text(folder / CARD, text)


def model_card(
    folder: Path, name: str, config: PretrainedConfig, original: str | None = None, arch_file: str | None = None
) -> str:
    """Return the model card of a result as Markdown.

    Args:
        folder: The folder of the result.
        name: The name of the result.
        config: The config of the model.
        original: The id or the folder of the original model, where the report does not name it.
        arch_file: The file that describes the architecture.
    """
    records = Records.read(folder)
    report = records.report
    origin = OriginalCard.read(records.original or original or "", report, original)
    loader = loader_of(folder, config, arch_file)
    kind = loader.removesuffix(".from_pretrained")
    values = content(records, name, origin.name)
    needs_writer, gguf_refusal = _llama_cpp(config, report)

    text = TEMPLATES.get_template("result.md.jinja").render(
        **values,
        card_data=_card_data(records, origin, kind).to_yaml(),
        original=origin.name,
        licence=origin.licence,
        kind=kind,
        loader=loader,
        library="sentence_transformers" if kind == loader else "transformers",
        causal=kind == "AutoModelForCausalLM",
        files={path.name for path in folder.iterdir()},
        heterogeneous=is_non_uniform(config),
        uneven=any(len(set(widths.values())) > 1 for widths in report.widths.values()),
        has_code="auto_map" in read_json(folder / "config.json"),
        trims_vocabulary=VOCAB in report.widths,
        fence=_fence(name),
        by_layer=needs_writer,
        gguf_refusal=gguf_refusal,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _fence(text: str) -> str:
    """Return a code fence with more backticks than any sequence of backticks in a text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(FENCE_TICKS, longest + 1)


def _card_data(records: Records, origin: OriginalCard, kind: str) -> ModelCardData:
    """Return the metadata of the card.

    For a model of sentence-transformers, the card has the fields of the original card, because the Hub uses them to
    find such models.

    Args:
        records: The records of the result.
        origin: The original model.
        kind: The class that loads the result.
    """
    fields: Mapping[str, Any] = {}
    library = "transformers"
    pipeline = None
    if kind == "AutoModelForCausalLM":
        pipeline = "text-generation"
    elif kind in SENTENCE_CLASSES:
        fields = origin.fields
        library = fields.get("library_name", "sentence-transformers")
        pipeline = fields.get("pipeline_tag")

    tags = list(TAGS)
    for tag in fields.get("tags", ()):
        if tag not in tags:
            tags.append(tag)

    return ModelCardData(
        base_model=origin.base_model,
        library_name=library,
        tags=tags,
        datasets=_datasets(records) or None,
        language=origin.fields.get("language"),
        pipeline_tag=pipeline,
        **origin.licence,
    )


def _datasets(records: Records) -> list[str]:
    """Return the datasets of the Hub that the run read."""
    sources = {str(entry.origin.get("source", "")) for entry in records.domains if not entry.place_sha256}
    for domain in records.training.get("domains") or ():
        sources.add(str(domain.get("source", "")))

    datasets = []
    for name in sorted(sources):
        is_file = Path(name).suffix in FORMATS or os.path.exists(name)
        if _is_id(name) and not is_file:
            datasets.append(name)
    return datasets


def _is_id(name: Any) -> bool:
    """Return whether a name can be an id on the Hub."""
    with suppress(ValueError):
        validate_repo_id(name)
        return True
    return False


def _llama_cpp(config: PretrainedConfig, report: Report) -> tuple[bool, str]:
    """Return whether a GGUF file requires our own writer, and the reason if llama.cpp cannot run the model."""
    spaces = set(report.widths)
    is_uniform = not is_non_uniform(config)
    if is_uniform and spaces and spaces <= {"mlp", VOCAB}:
        return False, ""

    from ..arch.llama_cpp import BY_LAYER, gguf_architecture, gguf_refusal  # imported here, as few cards need it

    needs_writer = gguf_architecture(config) in BY_LAYER.values()
    return needs_writer, gguf_refusal(config) or ""
