"""Write a pruned model and its records to disk, and check that `from_pretrained` reads the model back."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.devices import free_bytes
from ..arch.family import with_former_rope
from ..arch.inference import outputs_for, random_inputs
from ..arch.meta import is_offloaded, is_quantized
from ..arch.per_layer import heterogeneous
from ..arch.settings import own_settings
from ..arch.spec import MODEL, VOCAB
from ..arch.token_space import MODULE_IDS
from ..config.pruning import CONFIG_NAME
from ..domains.manifest import MANIFEST_NAME, Manifest, check_tokens
from ..method.offloaded import layer_device_map
from ..method.plan import PLAN_NAME
from ..record.report import REPORT_NAME, PruneRecords
from ..record.view import CHANGED
from ..system.disk import OFFLOAD, Output, used_paths
from ..system.errors import StructPruneError, some_of, warn
from ..system.fingerprint import checksums
from ..system.modules import MODULES, modules_root
from ..system.offloading import declared, places
from ..system.placement import bytes_by_device
from ..system.processes import is_first_rank
from ..system.stages import model_bytes
from ..system.written import replace_json, without_folders, written_files
from .file_size import folder_bytes


logger = logging.getLogger(__name__)
# The records of a pruning.
RECORD_NAMES = (CONFIG_NAME, PLAN_NAME, REPORT_NAME, MANIFEST_NAME)
# Files that a result writes itself: records, configs, a card, a page, weights of any format and their index.
OWN_FILES = re.compile(
    r"\..*|__pycache__|additional_chat_templates|README\.md|chart\.svg|report\.(html|json)|"
    r"(config|generation_config|evaluation|speed|written_files)\.json|"
    r"(structprune|pruning|recovery|calibration)_\w+\.json|"
    r"(?!\w+_linear\.pt).+\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|ot|tflite|index\.json)"
)
# Heads of other libraries, which read the channels of the model.
HEAD_FILES = re.compile(r"\w+_linear\.pt")
# Files that a tokenizer writes in addition to its vocabulary.
TOKENIZER_FILES = re.compile(r"(special_tokens_map|added_tokens|tokenizer(_config)?)\.json|chat_template\.jinja")
# The vocabulary in other forms, which still have removed tokens.
VOCABULARY_FILES = re.compile(r".*\.(model|tiktoken)|vocab.*\.(json|txt)|merges\.txt|(tekken|unigram)\.json")
SIZE_FIELD = re.compile(r'"(vocab_size|hidden_size)": *(\d+)')
# The field of a module's config with the number of its inputs, which are channels or logits of the model.
WIDTH_FIELD = re.compile(r'("(?:word_)?embedding_dimension": *)(\d+)')
# The records of this package, which may name files of the user.
RECORDS = re.compile(r"(structprune_config|recovery_config|report|recovery_report|calibration_manifest)\.json")
# The files that are downloaded of a model on the Hub. Its weights may be there in several formats.
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*_linear.pt", "LICENSE*", "NOTICE*", "[0-9]_*"]


def save_pruned(
    model: PreTrainedModel,
    save_directory: str | Path,
    records: PruneRecords,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> None:
    """Save a pruned model with its records, its card and its tokenizer.

    The report notes if the weights have changed since they were measured.
    """
    from .card import write_card  # imported here because its libraries take long to import

    config = records.config
    report = replace(records.report, pruned=replace(records.report.pruned, bytes=model_bytes(model)))
    if records.checksums is not None and checksums(model) != records.checksums:
        warn(f"{save_directory}: {CHANGED}; run `structprune evaluate` to measure the saved weights.")
        report.changed = True

    def write_records(folder: Path) -> None:
        config.save_pretrained(folder)
        if report.file is not None and config.gguf is None:
            report.file.measured = folder_bytes(folder)
        records.plan.save(folder / PLAN_NAME)
        report.save(folder / REPORT_NAME)
        # A model that was trained after pruning has a manifest that includes the training text.
        manifest = Manifest.seen_by(model) or records.manifest
        manifest.save(folder / MANIFEST_NAME)
        write_card(folder, save_directory, model, config.arch_file)

    input_paths: list[str | Path | None] = [model.name_or_path]
    input_paths.extend(used_paths(config))
    kept_tokens = records.plan.keep.get((MODEL, VOCAB))
    save_checked(model, save_directory, tokenizer, overwrite, write_records, input_paths, kept_tokens=kept_tokens)


def save_checked(
    model: PreTrainedModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    write_records: Callable[[Path], None],
    input_paths: Iterable[str | Path | None] = (),
    like: PreTrainedModel | None = None,
    kept_tokens: Sequence[int] | None = None,
) -> None:
    """Save a model, read it back and compare its outputs. One of several processes saves.

    Args:
        model: The model.
        save_directory: The folder, which appears only after the check; see `Output`.
        tokenizer: The tokenizer to save with the model.
        overwrite: Whether to replace an existing folder.
        write_records: A function that writes the other files of the result into a folder.
        input_paths: Files and folders that the run reads. The output must not replace them.
        like: The model whose outputs the saved model must have; by default `model`.
        kept_tokens: The ids in the original model of the tokens that a trimming has kept.

    Raises:
        StructPruneError: If the folder cannot be written, the tokenizer does not fit, or the outputs differ.
    """
    check_tokens(model, tokenizer)

    with Output(save_directory, overwrite, input_paths).staged(model_bytes(model)) as staging:
        if not is_first_rank():
            return

        _save_model(model, staging)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, staging)
        if model.name_or_path:
            copy_extra_files(model, staging, tokenizer, kept_tokens)
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            make_portable(staging / name, type(model.config))

        write_records(staging)
        _remove_folders(staging)
        check_reload(like or model, staging)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a tokenizer."""
    # LlamaTokenizer reads this field and does not write it.
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.save_pretrained(folder)


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the config and the weights of a model."""
    options: dict[str, Any] = {}
    device_map: AbstractContextManager[None] = nullcontext()

    if is_offloaded(model):
        # Offloaded weights are read into memory shard by shard, and tied weights once.
        tied_names = getattr(model, "all_tied_weights_keys", {})
        weights = model.state_dict()
        options["max_shard_size"] = "2GB"
        options["state_dict"] = {name: tensor for name, tensor in weights.items() if name not in tied_names}
        device_map = declared(model)

    if is_quantized(model):
        # transformers 5 cannot convert bitsandbytes' tensors back to the original format.
        options["save_original_format"] = False

    with heterogeneous(), device_map, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(str(folder), **options)


def make_portable(path: Path, kind: type[PretrainedConfig]) -> None:
    """Make a saved config readable for other versions of transformers and independent of missing files.

    Code files that the config names are dropped unless they are in its folder or on the Hub. Fields that transformers
    4 knows by other names are added under these names, if this does not change how transformers 5 reads the config.

    Args:
        path: The file of the config.
        kind: The class of the model's config.
    """
    if not path.is_file():
        return

    config = json.loads(path.read_text(encoding="utf-8"))
    cleaned = _without_missing_files(config, path.parent)
    if cleaned.get("tokenizer_class") == "TokenizersBackend":
        cleaned["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(cleaned.get("extra_special_tokens"), list):
        cleaned["additional_special_tokens"] = cleaned.pop("extra_special_tokens")
    if cleaned != config:
        replace_json(path, cleaned)

    extended = with_former_rope(cleaned)
    if extended != cleaned:
        fields = kind.from_json_file(path).to_dict()
        replace_json(path, extended)
        extended_fields = kind.from_json_file(path).to_dict()
        if not fields.items() <= extended_fields.items():
            replace_json(path, cleaned)


def _without_missing_files(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a config without the code files that are missing from a folder, and without its own origin."""
    fields = dict(config)

    # A tokenizer notes in these fields from where it was loaded.
    for name in ("is_local", "local_files_only"):
        fields.pop(name, None)

    if isinstance(fields.get("auto_map"), dict):
        auto_map = _present_code(fields.pop("auto_map"), folder)
        if auto_map:
            fields["auto_map"] = auto_map
    return fields


def _present_code(auto_map: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the entries of an `auto_map` whose code files are in a folder or on the Hub."""

    def is_present(reference: str | None) -> bool:
        if reference is None or "--" in reference:
            return True
        module = reference.rpartition(".")[0]
        return (folder / f"{module}.py").is_file()

    entries = {}
    for name, value in auto_map.items():
        references = value if isinstance(value, list) else [value]
        if all(is_present(reference) for reference in references):
            entries[name] = value
    return entries


@own_settings()
@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: str | Path) -> None:
    """Raise `StructPruneError` if a saved model has other logits, or other hidden states, than the model."""
    # A config on disk does not name the kernels of the model, and other kernels round differently.
    kernels: dict[str, Any] = {"use_kernels": getattr(model, "use_kernels", False)}
    for name in ("attn_implementation", "experts_implementation"):
        kernels[name] = _kernels(model.config, name)

    # Offloaded layers may need room on the disk, so the scratch folder is on the disk of the result.
    with tempfile.TemporaryDirectory(prefix=f".{OFFLOAD}.", dir=Path(folder).resolve().parent) as scratch:
        with heterogeneous():
            reloaded = type(model).from_pretrained(
                folder, dtype=model.dtype, device_map=_placement(model), offload_folder=scratch, **kernels
            )

        inputs = random_inputs(model)
        expected = outputs_for(model, inputs).float()
        actual = outputs_for(reloaded, inputs).float().to(expected.device)
        del reloaded  # it may read from the scratch folder

    difference = float((expected - actual).abs().max())
    # Each result is rounded by half a step of the dtype, eps times its size. Kernels that sum in another order move
    # the logits of SmolLM2 (30 layers) by 2 to 3 steps of the largest logit, in bf16 and in fp16. One matrix of zeros
    # moves them by 25.
    rounding = torch.finfo(model.dtype).eps * float(expected.abs().max())
    if not difference <= max(1e-4, 4 * rounding):
        raise StructPruneError(f"The model saved to {folder} gives other outputs: they differ by {difference:.2g}.")


def _placement(model: PreTrainedModel) -> Any:
    """Return the `device_map` to read a saved model back while the model itself is in memory.

    It is the placement of the model. If the model does not fit twice, layers are read from the disk one at a time.
    """
    if is_offloaded(model):
        return places(model)

    sizes = bytes_by_device(model)
    for device, size in sizes.items():
        available = free_bytes(device)
        if available is not None and size > available and not is_quantized(model):
            # The layers of some models are not described.
            with suppress(StructPruneError):
                return layer_device_map(model.config, str(model.device), "disk")

    if len(sizes) > 1:
        return places(model)
    return model.device


def _kernels(config: PretrainedConfig, name: str) -> dict[str, Any]:
    """Return the implementation of attention or experts in a config and in its parts, by the name of the part."""
    kernels: dict[str, Any] = {"": getattr(config, f"_{name}", None)}

    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None:
            kernels[key] = _kernels(part, name)
    return kernels


def _remove_folders(staging: Path) -> None:
    """Replace the absolute paths in the records of a result by names."""
    for path in staging.glob("*.json"):
        if not RECORDS.fullmatch(path.name):
            continue

        # Another program may have written a copied file of this name.
        with suppress(ValueError):
            replace_json(path, without_folders(json.loads(path.read_text(encoding="utf-8"))))


def copy_extra_files(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    kept_tokens: Sequence[int] | None = None,
) -> None:
    """Copy the other files of the original model's folder into a result, and log the names of the files left out.

    Examples are the files of modules around the model and licences. Files of a vocabulary or of heads that do not fit
    the pruned model are left out. transformers copies the code of the model itself.

    Args:
        model: The model, whose `name_or_path` names the folder.
        folder: The folder of the result.
        tokenizer: The tokenizer that was saved in the folder.
        kept_tokens: The ids in the original model of the tokens that a trimming has kept.
    """
    source = _source_folder(model)
    root = modules_root(source)
    sizes = _sizes(source)
    changed_fields = {name for name, _ in sizes ^ _sizes(folder)}

    folder_of_file = {name: source for name in _extra_files(source)}
    if root != source:
        for name in _extra_files(root):
            if not name.startswith(f"{source.name}/"):
                folder_of_file[name] = root

    candidates = []
    for name in folder_of_file:
        is_tokenizers = isinstance(tokenizer, PreTrainedTokenizerBase) and _belongs_to(tokenizer, name)
        is_outdated = "vocab_size" in changed_fields and VOCABULARY_FILES.fullmatch(name)
        if not ((folder / name).exists() or is_tokenizers or is_outdated):
            candidates.append(name)

    copied = [name for name in candidates if (folder_of_file[name] / name).is_file() and not name.endswith(".py")]
    # Files that a user has added to a result are not part of it.
    result_files = written_files(source)
    if result_files:
        copied = [name for name in copied if name in result_files]
    if "hidden_size" in changed_fields:
        copied = [name for name in copied if not HEAD_FILES.fullmatch(name)]

    omitted = [name for name in candidates if name not in copied]
    if omitted:
        logger.warning("Not copied from %s: %s.", root, some_of(omitted))

    for name in copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder_of_file[name] / name, folder / name)

    if root != source:
        _move_transformer(folder / MODULES, source.name)
    module_files = [name for name in copied if "/" in name]
    if module_files:
        _fit_modules(model, folder, module_files, sizes, kept_tokens)


def _move_transformer(path: Path, original_folder: str) -> None:
    """Change the folder of the transformer in a list of modules to the root of the result.

    Args:
        path: The list of modules.
        original_folder: The folder of the transformer in the original model.
    """
    modules = json.loads(path.read_text(encoding="utf-8"))
    for module in modules:
        if module["path"] == original_folder:
            module["path"] = ""
    replace_json(path, modules)


def _source_folder(model: PreTrainedModel) -> Path:
    """Return the folder that a model was loaded from. The small files of a model on the Hub are downloaded."""
    name = str(model.name_or_path)
    if Path(name).is_dir():
        return Path(name)

    # The network or the Hub may fail. The result is complete without these files.
    with suppress(Exception):
        commit = getattr(model.config, "_commit_hash", None)
        return Path(snapshot_download(name, revision=commit, allow_patterns=SMALL_FILES))
    return Path(name)


def _belongs_to(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Return whether a tokenizer writes a file itself."""
    vocabulary = filter(VOCABULARY_FILES.fullmatch, tokenizer.vocab_files_names.values())
    return name in vocabulary or TOKENIZER_FILES.fullmatch(name) is not None


def _fit_modules(
    model: PreTrainedModel,
    folder: Path,
    names: list[str],
    sizes: Set[tuple[str, str]],
    kept_tokens: Sequence[int] | None,
) -> None:
    """Write the sizes and token ids of the pruned model into the configs of modules, and log weights that do not fit.

    Args:
        model: The pruned model.
        folder: The folder of the result.
        names: The copied files of modules.
        sizes: The sizes in the config of the original model; see `_sizes`.
        kept_tokens: The ids in the original model of the tokens that a trimming has kept.
    """
    config = model.config.get_text_config()
    new_id = _new_ids(kept_tokens)
    is_narrower = False

    for name in names:
        if not name.endswith(".json"):
            continue

        path = folder / name
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        reads_logits = any(("vocab_size", number) in sizes for _, number in WIDTH_FIELD.findall(text))
        width = config.vocab_size if reads_logits else config.hidden_size

        fitted = WIDTH_FIELD.sub(rf"\g<1>{width}", text)
        if fitted != text and not reads_logits:
            is_narrower = True
        fitted = MODULE_IDS.sub(lambda field: re.sub(r"\d+", new_id, field[0]), fitted)
        path.write_text(fitted, encoding="utf-8", errors="surrogateescape")

    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if is_narrower and weights:
        logger.warning("Made for more channels than the model has now, so fit them again: %s.", some_of(weights))


def _new_ids(kept_tokens: Sequence[int] | None) -> Callable[[re.Match[str]], str]:
    """Return a replacement function for `re.sub` that maps token ids of the original model to ids of the pruned model.

    The ids of removed tokens are not changed.
    """
    new_ids = {str(original_id): str(new_id) for new_id, original_id in enumerate(kept_tokens or ())}
    return lambda match: new_ids.get(match[0], match[0])


def _sizes(folder: Path) -> set[tuple[str, str]]:
    """Return the sizes in the config of a folder, as pairs of a field and a number."""
    path = folder / "config.json"
    if not path.is_file():
        return set()
    return set(SIZE_FIELD.findall(path.read_text("utf-8", "replace")))


def _extra_files(source: Path) -> Iterator[str]:
    """Yield the files that may be copied, including files in folders of modules. Other folders end in a slash."""
    if not source.is_dir():
        return
    module_folders = _module_folders(source)

    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in module_folders:
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield file.relative_to(source).as_posix()
        elif not OWN_FILES.fullmatch(path.name):
            yield f"{path.name}/" if path.is_dir() else path.name


def _module_folders(source: Path) -> set[str]:
    """Return the folders with the modules of a model of sentence-transformers; none for other models."""
    try:
        modules = json.loads((source / MODULES).read_text(encoding="utf-8"))
        return {str(module["path"]).partition("/")[0] for module in modules}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
