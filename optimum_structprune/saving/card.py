"""Makes the model card of a result, the Markdown that the Hub shows, and writes it beside the model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig

from ..arch.meta import model_class
from ..arch.spec import VOCAB
from ..config.fields import read_json
from ..domains.sources import READERS
from ..record.report import RECOVERY_CONFIG_NAME
from ..system.disk import CARD, resolved
from ..written import replace_text, warn_on_error, written_files
from .page import HUB_CACHE, MARKDOWN, Records, short_name, shown_of


# The classes of sentence-transformers that read a folder with its modules.
SENTENCE_CLASSES = ("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder")


@dataclass(frozen=True)
class Dense:
    """The dense model: its name as people know it (an id on the Hub or the name of a folder, or empty), its id on the
    Hub, the fields of its card that tell the licence, and all of them.
    """

    name: str
    base_model: str | None
    licence: Mapping[str, Any]
    card: Mapping[str, Any]

    @classmethod
    def of(cls, source: str, named: Mapping[str, Any]) -> Dense:
        """What the card of a model says, but for the id and the licence that the user has `named`."""
        folder = Path(source)
        fields: dict[str, Any] = {}
        with suppress(Exception):  # of the network, the Hub, or somebody else's YAML: the licence is unknown then
            if source and (not folder.is_dir() or (folder / CARD).is_file()):
                fields = ModelCard.load(folder / CARD if folder.is_dir() else source).data.to_dict()
        # All that is used are texts and lists of them. In lists of lists, YAML's aliases make any number of few lines.
        lists = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
        fields = {
            name: fields[name] for name, values in lists.items() if all(isinstance(each, str) for each in values)
        }
        names = ("license", "license_name", "license_link")
        licence = {name: fields[name] for name in names if fields.get(name)}
        licence = {"license": named["license"]} if named.get("license") else licence
        base: Any = short_name(source)
        if folder.is_dir() and not HUB_CACHE.search(source):
            # A folder has no id. What this package has pruned before says in its card what it comes from.
            base = fields.get("base_model") if written_files(folder) else None
        base = named.get("base_model") or base
        name = str(base or short_name(source))
        return cls(name, base if _is_id(base) else None, licence, fields)


def loader_of(folder: str | Path, config: PretrainedConfig, arch_file: str | Path | None = None) -> str:
    """The callable that loads a result: where its modules came along, the class of sentence-transformers."""
    if not Path(folder, "modules.json").is_file():
        return f"{model_class(config, arch_file).__name__}.from_pretrained"
    path = Path(folder, "config_sentence_transformers.json")
    kind = read_json(path).get("model_type") if path.is_file() else None
    return kind if kind in SENTENCE_CLASSES else SENTENCE_CLASSES[0]


def leave_card(
    folder: Path, output: str | Path, config: PretrainedConfig, dense: str | None, arch_file: str | None
) -> None:
    """Write the card of a result that is being saved; one that cannot be made only gives a warning."""
    with warn_on_error(output, CARD):
        replace_text(folder / CARD, model_card(folder, resolved(output).name, config, dense, arch_file))


def model_card(
    folder: Path, name: str, config: PretrainedConfig, dense: str | None = None, arch_file: str | None = None
) -> str:
    """The model card of a result."""
    records = Records.read(folder)
    model = records.report.get("model") or {}
    origin = Dense.of(records.dense or dense or "", model)
    loads = loader_of(folder, config, arch_file)
    kind = loads.removesuffix(".from_pretrained")
    shown = shown_of(records, origin.name, origin.base_model or "DENSE", ".", "again")
    causal, texts = kind == "AutoModelForCausalLM", (name, *shown["commands"], *shown["configs"].values())
    card = MARKDOWN.get_template("card.md.jinja").render(
        **shown,
        title=name,
        card_data=_fields(folder, records, origin, kind).to_yaml(),
        shell_name=quote(name),
        # What stands around blocks of code, such that none of the texts in them ends one.
        fence="`" * max(3, *(len(run) + 1 for text in texts for run in re.findall("`+|$", text))),
        licence=origin.licence,
        kind=kind,
        loads=loads,
        library="sentence_transformers" if kind == loads else "transformers",
        causal=causal,
        files={path.name for path in folder.iterdir()},
        heterogeneous=config.get_text_config().is_heterogeneous,
        nemotron_nas=(folder / "configuration_nemotron_nas.py").is_file(),
        has_code="auto_map" in read_json(folder / "config.json"),
        is_measured=bool(records.evaluation or (records.report.get("other") or {}).get("tokens")),
        widths=records.report.get("widths") or {},
        **_llama_cpp(config, records.report),
    )
    return re.sub(r"\n{3,}", "\n\n", card).strip() + "\n"


def _fields(folder: Path, records: Records, origin: Dense, kind: str) -> ModelCardData:
    """The fields that the Hub reads; it finds models of sentence-transformers by those of the dense one."""
    found: dict[str, Any] = {"pipeline_tag": "text-generation" if kind == "AutoModelForCausalLM" else None}
    if kind in SENTENCE_CLASSES:
        found = {"library_name": "sentence-transformers", **origin.card}
    return ModelCardData(
        base_model=origin.base_model,
        library_name=found.get("library_name", "transformers"),
        tags=[*dict.fromkeys(["structured-pruning", "pruned", "optimum-structprune", *found.get("tags", ())])],
        datasets=_datasets(folder, records) or None,
        language=origin.card.get("language"),
        pipeline_tag=found.get("pipeline_tag"),
        **origin.licence,
    )


def _datasets(folder: Path, records: Records) -> list[str]:
    """The ids of the data sets on the Hub that the model was calibrated or trained on."""
    domains = [entry["origin"] for entry in records.domains if not entry.get("place_sha256")]
    if (path := folder / RECOVERY_CONFIG_NAME).is_file():
        domains += read_json(path).get("domains") or []
    sources = {str(origin.get("source", "")) for origin in domains}
    return sorted(
        name for name in sources if _is_id(name) and not os.path.exists(name) and Path(name).suffix not in READERS
    )


def _is_id(name: Any) -> bool:
    """Whether something can be the id of a repository, by its form."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def _llama_cpp(config: PretrainedConfig, report: Mapping[str, Any]) -> dict[str, Any]:
    """Whether only the file that we write runs in llama.cpp, and why not even that, where its own converter fails."""
    if not config.get_text_config().is_heterogeneous and {*(report.get("widths") or [""])} <= {"mlp", VOCAB}:
        return {"by_layer": False, "gguf_refusal": ""}
    from ..arch.llama_cpp import BY_LAYER, gguf_architecture, gguf_refusal

    by_layer = gguf_architecture(config) in BY_LAYER.values()
    return {"by_layer": by_layer, "gguf_refusal": gguf_refusal(config)}
