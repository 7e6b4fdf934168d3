"""Writes a pruned model and its records to disk, and checks that `from_pretrained` reads it back."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.family import with_former_rope
from ..arch.meta import is_offloaded, is_quantized
from ..arch.per_layer import heterogeneous
from ..arch.spec import MODEL, VOCAB
from ..arch.token_space import MODULE_IDS
from ..config.pruning import CONFIG_NAME
from ..domains.manifest import MANIFEST_NAME, Manifest, check_tokens
from ..errors import StructPruneError, some_of, warn
from ..forward.metrics import outputs_for, own_settings, random_inputs
from ..record.plan import PLAN_NAME
from ..record.remarks import CHANGED
from ..record.report import REPORT_NAME, PruneResult
from ..system.disk import OFFLOAD, Output, used_paths
from ..system.fingerprint import checksums
from ..system.offloading import declared, places
from ..system.processes import is_first_rank
from ..system.stages import model_bytes
from ..written import replace_json, without_folders, written_files


logger = logging.getLogger(__name__)
# What a pruning leaves beside its model.
RECORD_NAMES = (CONFIG_NAME, PLAN_NAME, REPORT_NAME, MANIFEST_NAME)
# What a result has of its own: records, configs, a card, a page, weights of any format and their index.
OWN_FILES = re.compile(
    r"\..*|__pycache__|additional_chat_templates|README\.md|chart\.svg|report\.(html|json)|"
    r"(config|generation_config|evaluation|speed|written_files)\.json|"
    r"(structprune|pruning|recovery|calibration)_\w+\.json|"
    r"(?!\w+_linear\.pt).+\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|ot|tflite|index\.json)"
)
# Heads of another library beside a model, which read its channels; what a tokenizer writes beside its vocabulary; and
# a vocabulary in other forms, which hold tokens that a smaller one has not.
HEAD_FILES = re.compile(r"\w+_linear\.pt")
TOKENIZER_FILES = re.compile(r"(special_tokens_map|added_tokens|tokenizer(_config)?)\.json|chat_template\.jinja")
VOCABULARY_FILES = re.compile(r".*\.(model|tiktoken)|vocab.*\.(json|txt)|merges\.txt|(tekken|unigram)\.json")
SIZE_FIELD = re.compile(r'"(vocab_size|hidden_size)": *(\d+)')
# The fields of a module's config that say what it reads of the model: channels or logits.
WIDTH_FIELD = re.compile(r'("(?:word_)?embedding_dimension": *)(\d+)')
# The files that are fetched of a model on the Hub, where weights lie in more formats than can be told.
# The records of this package, which may hold the names of files of the user.
RECORDS = re.compile(r"(structprune_config|recovery_config|report|recovery_report|calibration_manifest)\.json")
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*_linear.pt", "LICENSE*", "NOTICE*", "[0-9]_*"]


def save_pruned(
    model: PreTrainedModel,
    save_directory: str | Path,
    result: PruneResult,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> None:
    """Save a pruned model with its records, card and tokenizer; they say if weights have changed since."""
    from .card import leave_card  # imported here, since only a save needs it

    config, report = result.config, result.report
    used = [model.name_or_path, *used_paths(config)]
    if checksums(model) != result.checksums:
        warn(f"{save_directory}: {CHANGED}; `structprune evaluate` measures those that are saved.")
        report = replace(report, changed=True)

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        result.plan.save(folder / PLAN_NAME)
        replace(report, weights={**report.weights, "after": model_bytes(model)}).save(folder / REPORT_NAME)
        (Manifest.seen_by(model) or result.manifest).save(folder / MANIFEST_NAME)  # with what trained it since
        leave_card(folder, save_directory, model, config.arch_file)

    save_checked(model, save_directory, tokenizer, overwrite, write, used)


def save_checked(
    model: PreTrainedModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    write: Callable[[Path], None],
    used: Iterable[str | Path | None] = (),
    like: PreTrainedModel | None = None,
) -> None:
    """Save a model that gives the outputs of `like`, or its own; see `Output`. Of several processes one saves."""
    check_tokens(model, tokenizer)
    with Output(save_directory, overwrite, used).staged(model_bytes(model)) as staging:
        if not is_first_rank():
            return
        options: dict[str, Any] = {}
        device_map: AbstractContextManager[None] = nullcontext()
        if is_offloaded(model):  # its weights are read into memory shard by shard, and none of them twice
            tied = getattr(model, "all_tied_weights_keys", {})
            state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
            options = {"max_shard_size": "2GB", "state_dict": state}
            device_map = declared(model)
        if is_quantized(model):  # transformers 5 cannot bring back bitsandbytes' tensors from the form that it runs
            options["save_original_format"] = False
        with heterogeneous(), device_map, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")  # see above
            model.save_pretrained(str(staging), **options)
        if tokenizer is not None:
            if hasattr(tokenizer, "legacy"):  # LlamaTokenizer reads it and does not write it
                tokenizer.init_kwargs["legacy"] = tokenizer.legacy
            tokenizer.save_pretrained(staging)
        if model.name_or_path:
            copy_extra_files(model, staging, tokenizer)
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):  # which may name code
            settle(staging / name, type(model.config))
        write(staging)
        _remove_folders(staging)
        check_reload(like or model, staging)


def settle(path: Path, kind: type[PretrainedConfig]) -> None:
    """Drop the code files that a saved config names and its folder lacks; those on the Hub stay.

    Fields that transformers 4 knows by other names get those too, as long as transformers 5 reads the same.
    """
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Without what a tokenizer notes of where it was loaded.
    settled = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}

    def is_there(reference: str | None) -> bool:
        return reference is None or "--" in reference or (path.parent / f"{reference.rpartition('.')[0]}.py").is_file()

    if isinstance(named := settled.get("auto_map"), dict):
        files = {name: value if isinstance(value, list) else [value] for name, value in named.items()}
        del settled["auto_map"]
        if kept := {name: named[name] for name, references in files.items() if all(map(is_there, references))}:
            settled["auto_map"] = kept
    if settled.get("tokenizer_class") == "TokenizersBackend":
        settled["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settled.get("extra_special_tokens"), list):
        settled["additional_special_tokens"] = settled.pop("extra_special_tokens")
    if settled != config:
        replace_json(path, settled)
    if (former := with_former_rope(settled)) != settled:
        known = kind.from_json_file(path).to_dict()
        replace_json(path, former)
        again = kind.from_json_file(path).to_dict()
        if again | known != again:
            replace_json(path, settled)


@own_settings()
@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: str | Path) -> None:
    """Load a saved model and compare logits, or hidden states."""
    # A config on disk does not say which kernels ran, and those of another attention round differently.
    names = ("attn_implementation", "experts_implementation")
    kernels: dict[str, Any] = {name: _kernels(model.config, name) for name in names}
    where: Any = places(model) if is_offloaded(model) else model.device
    # Beside the folder, where there is room for weights.
    with tempfile.TemporaryDirectory(prefix=f".{OFFLOAD}.", dir=Path(folder).resolve().parent) as scratch:
        with heterogeneous():
            again = type(model).from_pretrained(
                folder, dtype=model.dtype, device_map=where, offload_folder=scratch, **kernels
            )
        inputs = random_inputs(model)
        outputs, reloaded = (outputs_for(loaded, inputs) for loaded in (model, again))
        del again  # before the folder that it may read from is gone
    difference = float((outputs.float() - reloaded.float()).abs().max())
    # Every result is rounded by half a step of the dtype, eps times its size. Kernels that sum in another order take
    # the logits of SmolLM2 (30 layers) apart by 2 to 3 steps of the largest one, in bf16 and in fp16; one matrix that
    # is zero takes them apart by 25.
    rounding = torch.finfo(model.dtype).eps * float(outputs.abs().max())
    if not difference <= max(1e-4, 4 * rounding):
        raise StructPruneError(f"The model saved to {folder} gives other outputs: they differ by {difference:.2g}.")


def _kernels(config: PretrainedConfig, name: str) -> dict[str, Any]:
    kernels: dict[str, Any] = {"": getattr(config, f"_{name}", None)}
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None:
            kernels[key] = _kernels(part, name)
    return kernels


def _remove_folders(staging: Path) -> None:
    """Replace the absolute paths in the records of a result by names."""
    for path in staging.glob("*.json"):
        if RECORDS.fullmatch(path.name):
            replace_json(path, without_folders(json.loads(path.read_text(encoding="utf-8"))))


def copy_extra_files(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy the other files beside the dense model into a result, and warn of those that are not copied."""
    source = Path(name := str(model.name_or_path))
    if not source.is_dir():
        with suppress(Exception):  # of the network or of the Hub, which the model may not need any more
            commit = getattr(model.config, "_commit_hash", None)
            source = Path(snapshot_download(name, revision=commit, allow_patterns=SMALL_FILES))
    new = [name for name in _extra_files(source) if not (folder / name).exists()]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        own = [*filter(VOCABULARY_FILES.fullmatch, tokenizer.vocab_files_names.values())]
        new = [name for name in new if name not in own and not TOKENIZER_FILES.fullmatch(name)]
    sizes = _sizes(source)
    changed = {name for name, _ in sizes ^ _sizes(folder)}
    if "vocab_size" in changed:
        new = [name for name in new if not VOCABULARY_FILES.fullmatch(name)]
    # Code is copied by transformers, where it is used. What a user has put into a result is not part of it.
    carried = [name for name in new if (source / name).is_file() and not name.endswith(".py")]
    listed = written_files(source) or carried
    carried = [name for name in carried if name in listed]
    if "hidden_size" in changed:
        carried = [name for name in carried if not HEAD_FILES.fullmatch(name)]
    if others := [name for name in new if name not in carried]:
        logger.warning("Not copied from %s: %s.", source, some_of(others))
    for name in carried:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if modules := [name for name in carried if "/" in name]:
        _fit_modules(model, folder, modules, sizes)


def _fit_modules(model: PreTrainedModel, folder: Path, names: list[str], sizes: Set[tuple[str, str]]) -> None:
    """Write the present sizes and token ids into the configs of modules; name weights that do not fit."""
    narrower, config, result = False, model.config.get_text_config(), getattr(model, "prune_result", None)
    kept = None if result is None else result.plan.keep.get((MODEL, VOCAB))
    new = {str(old): number for number, old in enumerate(kept or ())}
    for path in (folder / name for name in names if name.endswith(".json")):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        of_tokens = any(("vocab_size", number) in sizes for _, number in WIDTH_FIELD.findall(text))
        fitted = WIDTH_FIELD.sub(rf"\g<1>{config.vocab_size if of_tokens else config.hidden_size}", text)
        narrower |= fitted != text and not of_tokens
        fitted = MODULE_IDS.sub(lambda ids: re.sub(r"\d+", lambda old: str(new.get(old[0], old[0])), ids[0]), fitted)
        path.write_text(fitted, encoding="utf-8", errors="surrogateescape")
    if narrower and (weights := [name for name in names if name.endswith((".safetensors", ".bin"))]):
        logger.warning("Made for more channels than the model has now, so fit them again: %s.", some_of(weights))


def _sizes(folder: Path) -> set[tuple[str, str]]:
    path = folder / "config.json"
    return {*SIZE_FIELD.findall(path.read_text("utf-8", "replace"))} if path.is_file() else set()


def _extra_files(source: Path) -> Iterator[str]:
    """List the files that may come along, those of modules around the model too; folders end in a slash."""
    modules: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError):  # only sentence-transformers has any
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        modules = {str(module["path"]).partition("/")[0] for module in listed}
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if path.is_dir() and path.name in modules:
            yield from (file.relative_to(source).as_posix() for file in sorted(path.rglob("*")) if file.is_file())
        elif not OWN_FILES.fullmatch(path.name):
            yield path.name + "/" * path.is_dir()
