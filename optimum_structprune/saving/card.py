"""Writes the model card of a result, which the Hub shows, from its records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PretrainedConfig, PreTrainedModel

from .. import __version__
from ..arch.meta import model_class
from ..arch.spec import VOCAB
from ..config.fields import read_json
from ..domains.sources import FORMATS
from ..record import table
from ..record.report import Report
from ..system.disk import CARD, resolved
from ..system.modules import modules_root
from ..written import replace_text, warn_on_error, written_files
from .chart import loss_chart
from .names import CHART_NAME
from .records import Records
from .view import HUB_CACHE, short_name, view_of


# The classes of sentence-transformers that read a folder with its modules.
SENTENCE_CLASSES = ("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder", "CrossEncoder")
TAGS = ("structured-pruning", "pruned", "optimum-structprune")
FENCE_TICKS = 3


def _escape(value: Any) -> Any:
    """Escape a value for Markdown, unless the template marked it as safe."""
    return value if hasattr(value, "__html__") else table.escaped(str(value))


TEMPLATES = Environment(
    loader=PackageLoader("optimum_structprune.saving", "."),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    finalize=_escape,
)
TEMPLATES.filters["table"] = table.markdown


@dataclass(frozen=True)
class DenseCard:
    """The original model as a card names it.

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
    def read(cls, source: str, report: Report, folder: str | None = None) -> DenseCard:
        """Read the card of the original model.

        Args:
            source: Its id on the Hub, or its folder, as the records name it.
            report: The report, in which the user may have named the id and the licence.
            folder: The folder that the model was loaded from. Records name folders without their path.
        """
        fields = _card_fields(source)
        if not fields and folder is not None:
            fields = _card_fields(folder)

        licence = {name: value for name, value in fields.items() if name.startswith("license") and value}
        if report.model.license:
            licence = {"license": report.model.license}

        base: Any = short_name(source)
        if Path(source).is_dir() and not HUB_CACHE.search(source):
            # A folder has no id, but the card of an earlier result in it names the base model.
            base = fields.get("base_model") if written_files(Path(source)) else None
        base = report.model.base_model or base
        return cls(str(base or short_name(source)), base if _is_id(base) else None, licence, fields)


def _card_fields(source: str) -> dict[str, Any]:
    """Return the fields of a model card that are texts or lists of texts; nothing if it cannot be read."""
    folder = Path(source)
    fields: dict[str, Any] = {}
    # The network, the Hub or the YAML of others may fail. The licence is then unknown.
    with suppress(Exception):
        if source and not folder.is_dir():
            fields = ModelCard.load(source).data.to_dict()
        elif source and (folder / CARD).is_file():
            fields = ModelCard.load(folder / CARD).data.to_dict()
    # Aliases in YAML can turn a few lines into very large nested lists.
    return {name: value for name, value in fields.items() if _is_text(value)}


def _is_text(value: Any) -> bool:
    """Return whether a value is a text or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) for item in values)


def loader_of(folder: str | Path, config: PretrainedConfig, arch_file: str | Path | None = None) -> str:
    """Return the callable that loads a result; with modules of its own, a class of sentence-transformers."""
    if not Path(folder, "modules.json").is_file():
        return f"{model_class(config, arch_file).__name__}.from_pretrained"
    path = Path(folder, "config_sentence_transformers.json")
    kind = read_json(path).get("model_type") if path.is_file() else None
    return kind if kind in SENTENCE_CLASSES else SENTENCE_CLASSES[0]


def leave_card(folder: Path, output: str | Path, model: PreTrainedModel, arch_file: str | None) -> None:
    """Write the card of a result and its chart in the working folder; an error only causes a warning."""
    with warn_on_error(output, CARD):
        dense = model.name_or_path
        if dense and Path(dense).is_dir():
            dense = str(modules_root(Path(dense)))
        text = model_card(folder, resolved(output).name, model.config, dense, arch_file)
        replace_text(folder / CARD, text)
        chart = loss_chart(Records.read(folder).report)
        if chart:
            replace_text(folder / CHART_NAME, chart)


def model_card(
    folder: Path, name: str, config: PretrainedConfig, dense: str | None = None, arch_file: str | None = None
) -> str:
    """Return the model card of a result as Markdown.

    Args:
        folder: The folder of the result.
        name: The name of the result.
        config: The config of the model.
        dense: The id or the folder of the original model, where the report does not name it.
        arch_file: The file that describes the architecture.
    """
    records = Records.read(folder)
    report = records.report
    origin = DenseCard.read(records.dense or dense or "", report, dense)
    loader = loader_of(folder, config, arch_file)
    kind = loader.removesuffix(".from_pretrained")
    dense_path = origin.base_model or "ORIGINAL"
    view = view_of(records, name, origin.name, dense_path, folder=".", output="again")

    text = TEMPLATES.get_template("result.md.jinja").render(
        view=view,
        card_data=_card_data(records, origin, kind).to_yaml(),
        dense=origin.name,
        dense_path=dense_path,
        chart=CHART_NAME if loss_chart(report) else "",
        licence=origin.licence,
        kind=kind,
        loader=loader,
        library="sentence_transformers" if kind == loader else "transformers",
        causal=kind == "AutoModelForCausalLM",
        files={path.name for path in folder.iterdir()},
        heterogeneous=config.get_text_config().is_heterogeneous,
        uneven=any(len(set(widths.values())) > 1 for widths in report.widths.values()),
        has_code="auto_map" in read_json(folder / "config.json"),
        trims_vocabulary=VOCAB in report.widths,
        fence=_fence([name, *view.commands]),
        shell_name=quote(name),
        version=__version__,
        **_llama_cpp(config, report),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _fence(texts: Iterable[str]) -> str:
    """Return a code fence with more backticks than stand together in any of the texts."""
    longest = max(len(ticks) for text in texts for ticks in re.findall("`+|$", text))
    return "`" * max(FENCE_TICKS, longest + 1)


def _card_data(records: Records, origin: DenseCard, kind: str) -> ModelCardData:
    """Return the metadata of the card. The Hub finds models of sentence-transformers by the original's fields."""
    fields: Mapping[str, Any] = {}
    pipeline = "text-generation" if kind == "AutoModelForCausalLM" else None
    library = "transformers"
    if kind in SENTENCE_CLASSES:
        fields = origin.fields
        library = fields.get("library_name", "sentence-transformers")
        pipeline = fields.get("pipeline_tag")
    return ModelCardData(
        base_model=origin.base_model,
        library_name=library,
        tags=list(dict.fromkeys([*TAGS, *fields.get("tags", ())])),
        datasets=_datasets(records) or None,
        language=origin.fields.get("language"),
        pipeline_tag=pipeline,
        **origin.licence,
    )


def _datasets(records: Records) -> list[str]:
    """Return the data sets of the Hub that the run read."""
    sources = {str(entry.origin.get("source", "")) for entry in records.domains if not entry.place_sha256}
    sources.update(str(domain.get("source", "")) for domain in records.training.get("domains") or ())
    on_hub = [name for name in sources if _is_id(name) and Path(name).suffix not in FORMATS]
    return sorted(name for name in on_hub if not os.path.exists(name))


def _is_id(name: Any) -> bool:
    """Return whether a name can be an id on the Hub."""
    with suppress(ValueError):
        validate_repo_id(name)
        return True
    return False


def _llama_cpp(config: PretrainedConfig, report: Report) -> dict[str, Any]:
    """Return whether llama.cpp needs our own writer, and why it cannot run the model."""
    spaces = set(report.widths)
    if not config.get_text_config().is_heterogeneous and spaces and spaces <= {"mlp", VOCAB}:
        return {"by_layer": False, "gguf_refusal": ""}
    from ..arch.llama_cpp import BY_LAYER, gguf_architecture, gguf_refusal

    return {"by_layer": gguf_architecture(config) in BY_LAYER.values(), "gguf_refusal": gguf_refusal(config)}
