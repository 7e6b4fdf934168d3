"""Brings along what lies beside a dense model: configs of processors, modules around the model, its licence."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import some_of
from ..written import written_files


logger = logging.getLogger(__name__)

# What a result has of its own: records, configs, a card, a page, weights of any format and their index.
OWN = re.compile(
    r"\..*|__pycache__|additional_chat_templates|README\.md|report\.(html|json)|"
    r"(config|generation_config|evaluation|speed|written_files|statistics)\.json|"
    r"(structprune|pruning|recovery|calibration)_\w+\.json|"
    r".+\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|ot|tflite|index\.json)"
)
# What a tokenizer writes, or leaves out, beside its vocabulary.
TOKENIZER = re.compile(r"(special_tokens_map|added_tokens|tokenizer(_config)?)\.json|chat_template\.jinja")
# A vocabulary in other forms, which hold tokens that a smaller one has not, and what tells that it is smaller.
VOCABULARY = re.compile(r".*\.(model|tiktoken)|vocab.*\.(json|txt)|merges\.txt|tekken\.json")
SIZE = re.compile(r'"vocab_size": *\d+')
# What the config of a module says that it reads of the model.
CHANNELS = re.compile(r'("(?:word_)?embedding_dimension": *)\d+')
# What is fetched of a model on the Hub, where weights lie in more formats than can be told.
SMALL = ["*.json", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "[0-9]_*"]


def copy_extra_files(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy what else lies beside the dense model into a result, and name what is not copied."""
    source = Path(name := str(model.name_or_path))
    if not source.is_dir():
        with suppress(Exception):  # of the network or of the Hub, which the model may not need any more
            commit = getattr(model.config, "_commit_hash", None)
            source = Path(snapshot_download(name, revision=commit, allow_patterns=SMALL))
    files = tokenizer.vocab_files_names.values() if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    beside = [name for name in _extra_files(source) if files is None or not TOKENIZER.fullmatch(name)]
    new = [name for name in beside if name not in (files or ()) and not (folder / name).exists()]
    if _sizes(source) != _sizes(folder):
        new = [name for name in new if not VOCABULARY.fullmatch(name)]
    # Code is copied by transformers, where it is used. What a user has put into a result is not part of it.
    result = written_files(source)
    carried = [name for name in new if (source / name).is_file() and not name.endswith(".py")]
    carried = [name for name in carried if name in result or not result]
    if others := [name for name in new if name not in carried]:
        logger.warning("Not copied from %s: %s.", source, some_of(others))
    for name in carried:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    _fit_modules(model, folder, [name for name in carried if "/" in name])


def _fit_modules(model: PreTrainedModel, folder: Path, names: list[str]) -> None:
    """Write into the configs of modules how many channels the model has now, and name the weights that do not fit."""
    narrower = False
    for path in (folder / name for name in names if name.endswith(".json")):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        fitted = CHANNELS.sub(rf"\g<1>{model.config.get_text_config().hidden_size}", text)
        path.write_text(fitted, encoding="utf-8", errors="surrogateescape")
        narrower |= fitted != text
    if narrower and (weights := [name for name in names if name.endswith((".safetensors", ".bin"))]):
        logger.warning("Made for more channels than the model has now, so fit them again: %s.", some_of(weights))


def _sizes(folder: Path) -> set[str]:
    """What the config in a folder says of vocabularies, as it is written there."""
    with suppress(OSError, UnicodeDecodeError):
        return set(SIZE.findall((folder / "config.json").read_text(encoding="utf-8")))
    return set()


def _extra_files(source: Path) -> Iterator[str]:
    """The files that may come along, with those of modules around the model; other folders end in a slash."""
    modules: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # only sentence-transformers has any
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        modules = {str(module["path"]).partition("/")[0] for module in listed}
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if path.is_dir() and path.name in modules:
            yield from (file.relative_to(source).as_posix() for file in sorted(path.rglob("*")) if file.is_file())
        elif not OWN.fullmatch(path.name):
            yield path.name + "/" * path.is_dir()
