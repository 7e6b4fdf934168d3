"""Makes the model card of a result from its records, and writes it beside the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig

from .. import __version__
from ..arch.llama_cpp import BY_LAYER, gguf_architecture, gguf_refusal
from ..arch.meta import model_class
from ..config.fields import read_mapping, to_yaml
from ..plain_json import unversioned
from ..record.facts import cells, facts_of, perplexity_facts, quality_rows, size_rows
from ..record.records import Records
from ..record.report import RECOVERY_CONFIG_NAME, REPORT_NAME
from ..record.text import markdown
from ..system.disk import CARD, is_result, is_signed, resolved, signed
from .page import only_warning


TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAGS = ("structured-pruning", "pruned", "optimum-structprune")
HUB_CACHE = re.compile(r"models--(.+?)--([^/]+)/snapshots")
# The line of the snippet that names the model.
NAME_LINE = re.compile(r'^name = ".*"$', re.MULTILINE)


@dataclass(frozen=True)
class Dense:
    """What is known of the dense model.

    Attributes:
        name: Its name as people know it: an id on the Hub, or the name of a folder; empty where nothing is known.
        base_model: Its id on the Hub; None where it has none, or it is not known.
        licence: The fields of a card that tell the licence; empty where its card says nothing or cannot be read.
        language: The languages that its card names.
    """

    name: str
    base_model: str | None
    licence: Mapping[str, str]
    language: Any = None

    @classmethod
    def of(cls, source: str) -> Dense:
        """What the card of a model says."""
        folder = Path(source)
        card = _card(source) if source else None
        fields: dict[str, Any] = {} if card is None else card.to_dict()
        names = ("license", "license_name", "license_link")
        licence = {name: fields[name] for name in names if fields.get(name)}
        base: str | None = source or None
        if cached := HUB_CACHE.search(source):
            base = "/".join(cached.groups())
        elif folder.is_dir():
            # A folder has no id. What this package has pruned before says in its card what it comes from.
            base = fields.get("base_model") if is_result(folder) else None
        name = base or resolved(folder).name if source else ""
        return cls(name, base if isinstance(base, str) else None, licence, fields.get("language"))


def leave_card(
    folder: Path, output: str | Path, config: PretrainedConfig, dense: str | None, arch_file: str | None
) -> None:
    """Write the card of a result that is being saved; one that cannot be made only gives a warning."""
    path = folder / CARD
    if path.exists() and not is_signed(path):
        return
    with only_warning(output, CARD):
        path.write_text(model_card(folder, resolved(output).name, config, dense, arch_file), encoding="utf-8")


def model_card(
    folder: Path, name: str, config: PretrainedConfig, dense: str | None = None, arch_file: str | None = None
) -> str:
    """The model card of a result, signed so that it is known again."""
    records = Records.read(folder) if (folder / REPORT_NAME).is_file() else Records(name, {})
    known = Dense.of(records.dense or dense or "")
    kind, report = model_class(config, arch_file).__name__, records.report
    settings = unversioned(records.config)
    causal = kind == "AutoModelForCausalLM"
    licence: dict[str, Any] = dict(known.licence)
    card_data = ModelCardData(
        base_model=known.base_model,
        library_name="transformers",
        tags=list(TAGS),
        datasets=_datasets(folder, records) or None,
        language=known.language,
        pipeline_tag="text-generation" if causal else None,
        **licence,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=name,
        origin=_origin(known, report),
        use=_use(folder, config),
        snippet=_snippet(folder, name, kind, causal),
        llama_cpp=_llama_cpp(config) if causal else "",
        sizes=_sizes(report),
        perplexity=_perplexity(records),
        calibration=_calibration(records),
        training=_training(records),
        limits=_limits(records, causal),
        licence=_licence(known),
        version=__version__,
        config=to_yaml(settings).strip() if settings else "",
    )
    return signed(re.sub(r"\n{3,}", "\n\n", str(card)))


def renamed(card: str, repo_id: str) -> str:
    """A signed card whose snippet loads the model from the Hub."""
    return signed(NAME_LINE.sub(f'name = "{repo_id}"', card))


def _card(source: str) -> ModelCardData | None:
    """The fields of a model's card; None where there is none, or it cannot be read now."""
    try:
        if Path(source).is_dir():
            return ModelCard.load(Path(source, CARD)).data if Path(source, CARD).is_file() else None
        return ModelCard.load(source).data
    except Exception:  # of the network, of the Hub, or of somebody else's YAML: the licence is unknown then
        return None


def _datasets(folder: Path, records: Records) -> list[str]:
    """The ids of the data sets on the Hub that the model was calibrated or trained on."""
    domains = [entry["origin"] for entry in records.manifest.get("domains", ()) if not entry.get("place_sha256")]
    if (path := folder / RECOVERY_CONFIG_NAME).is_file():
        domains += read_mapping(path, json.loads).get("domains") or []
    return sorted({source for origin in domains if _on_hub(source := str(origin.get("source", "")))})


def _on_hub(source: str) -> bool:
    try:
        validate_repo_id(source)
    except ValueError:
        return False
    return not Path(source).exists() and Path(source).suffix not in (".txt", ".jsonl", ".json", ".parquet", ".csv")


def _origin(known: Dense, report: Mapping[str, Any]) -> str:
    link = f"[{known.base_model}](https://huggingface.co/{known.base_model})" if known.base_model else known.name
    text = f"This is {link or 'a model'} after structured pruning: whole channels, heads or layers are gone"
    if counts := report.get("parameters"):
        before, after = counts["before"], counts["after"]
        text += f", and {after:,} of {before:,} parameters are left ({after / before - 1:+.1%})"
    return f"{text}. It is a dense model of the same architecture."


def _use(folder: Path, config: PretrainedConfig) -> str:
    if config.get_text_config().is_heterogeneous:
        return (
            "The layers differ in width, which the classes of transformers do not build by themselves. Either "
            "`trust_remote_code=True`, as here, runs the code in this folder, or after `import optimum_structprune` "
            "the model loads without it. Nothing else is needed but transformers."
        )
    if _code(folder):
        return "The code of the architecture is not part of transformers, hence `trust_remote_code=True`."
    return "It loads with transformers alone; optimum-structprune is not needed."


def _code(folder: Path) -> bool:
    return "auto_map" in read_mapping(folder / "config.json", json.loads)


def _snippet(folder: Path, name: str, kind: str, causal: bool) -> str:
    more = ", trust_remote_code=True" if _code(folder) else ""
    reads = causal and (folder / "tokenizer_config.json").is_file()
    lines = [
        f"from transformers import {kind}{', AutoTokenizer' if reads else ''}",
        "",
        f"name = {json.dumps(name)}",
        f"model = {kind}.from_pretrained(name{more})",
    ]
    if reads:
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))",
        ]
    return "\n".join(lines)


def _llama_cpp(config: PretrainedConfig) -> str:
    """Which converter makes a file for llama.cpp that runs."""
    architecture, refusal = gguf_architecture(config), gguf_refusal(config)
    if architecture is None:
        return f"For llama.cpp: {refusal}"
    if architecture != BY_LAYER:
        return "For llama.cpp, its own `convert_hf_to_gguf.py` works as it does for the dense model."
    return (
        "For llama.cpp, `structprune export FOLDER OUT.gguf` writes a file that runs. llama.cpp's own "
        "`convert_hf_to_gguf.py` does not: it takes the folder and ends without an error, but its file does not load."
    )


def _sizes(report: Mapping[str, Any]) -> str:
    if not report.get("parameters"):
        return ""
    return markdown(cells(["dense", "this model"], size_rows([*facts_of(report).values()])))


def _perplexity(records: Records) -> str:
    """The perplexities of the training, which measures all models anew, or else those of the pruning."""
    models = perplexity_facts(records.recovery.get("perplexity") or {})
    if not models and records.report:
        models = dict(zip(("dense", "pruned"), facts_of(records.report).values(), strict=True))
    rows = [row for row in quality_rows([*models.values()]) if row.change]
    return markdown(cells([*models], rows)) if rows else ""


def _calibration(records: Records) -> str:
    if not records.manifest:
        return ""
    rows = [["domain", "source", "share", "tokens"]]
    for entry in records.manifest["domains"]:
        origin = entry["origin"]
        source = " ".join(str(origin[key]) for key in ("source", "dataset_config") if origin.get(key))
        source = (source or "given inputs").replace("`", "'")
        rows.append([entry["name"], f"`{source}`", f"{entry['weight']:.2f}", f"{entry['calibration_tokens']:,}"])
    return markdown(rows)


def _training(records: Records) -> str:
    recovery = records.recovery
    if not recovery:
        return ""
    return f"Trained on {recovery['tokens']:,} tokens in {recovery['steps']:,} steps to make up for the pruning."


def _limits(records: Records, causal: bool) -> Iterable[str]:
    if records.manifest:
        yield "On kinds of text that it was not calibrated on it has lost more than the numbers here show."
    if causal:
        yield (
            "Perplexity is not ability: what was not measured, such as tasks, other languages, long contexts, "
            "following instructions and refusing harmful ones, may have suffered more. Measure what you need."
        )
    yield "Biases and limits of the dense model are still there."


def _licence(known: Dense) -> str:
    name = known.name or "the dense model"
    if not known.licence:
        return f"Unknown: the card of {name} names no licence, or could not be read. The dense model's licence holds."
    licence = known.licence.get("license_name") or known.licence.get("license") or known.licence["license_link"]
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    return f"That of {name}, as its card names it: {licence}."
