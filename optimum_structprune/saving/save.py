"""Write a pruned model and its records to disk, and check that `from_pretrained` reads the model back."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
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
from ..method.devices import free_bytes
from ..record.plan import PLAN_NAME
from ..record.report import REPORT_NAME, PruneRecords
from ..record.summary import CHANGED
from ..sources.offloaded import layer_device_map
from ..system.disk import OFFLOAD, Output, used_paths
from ..system.fingerprint import checksums
from ..system.modules import MODULES, modules_root
from ..system.offloading import declared, places
from ..system.placement import bytes_by_device
from ..system.processes import is_first_rank
from ..system.stages import model_bytes
from ..written import replace_json, without_folders, written_files


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
# Files that a tokenizer writes beside its vocabulary.
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
    """Save a pruned model with its records, card and tokenizer. The records say whether weights have changed since."""
    from .card import leave_card  # imported here, since only a save needs it

    config = records.config
    report = records.report
    used = [model.name_or_path, *used_paths(config)]
    if checksums(model) != records.checksums:
        warn(f"{save_directory}: {CHANGED}; `structprune evaluate` measures those that are saved.")
        report = replace(report, changed=True)

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        records.plan.save(folder / PLAN_NAME)
        size = replace(report.pruned, bytes=model_bytes(model))
        replace(report, pruned=size).save(folder / REPORT_NAME)
        # A model that was trained since has a manifest with the training text.
        manifest = Manifest.seen_by(model) or records.manifest
        manifest.save(folder / MANIFEST_NAME)
        leave_card(folder, save_directory, model, config.arch_file)

    kept = records.plan.keep.get((MODEL, VOCAB))
    save_checked(model, save_directory, tokenizer, overwrite, write, used, kept_tokens=kept)


def save_checked(
    model: PreTrainedModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    write: Callable[[Path], None],
    used: Iterable[str | Path | None] = (),
    like: PreTrainedModel | None = None,
    kept_tokens: Sequence[int] | None = None,
) -> None:
    """Save a model, read it back and compare its outputs. One of several processes saves.

    Args:
        model: The model.
        save_directory: The folder, which appears only after the check; see `Output`.
        tokenizer: The tokenizer, which is saved beside the model.
        overwrite: Whether a folder that exists is replaced.
        write: Writes further files into a folder.
        used: Files and folders that the run reads, and that the folder must not replace.
        like: The model whose outputs the saved model must have; by default `model`.
        kept_tokens: The ids in the dense model of the tokens that a trimming has kept.

    Raises:
        StructPruneError: If the folder cannot be written, the tokenizer does not fit, or the outputs differ.
    """
    check_tokens(model, tokenizer)
    with Output(save_directory, overwrite, used).staged(model_bytes(model)) as staging:
        if not is_first_rank():
            return

        _save_model(model, staging)
        if tokenizer is not None:
            if hasattr(tokenizer, "legacy"):  # LlamaTokenizer reads this field and does not write it
                tokenizer.init_kwargs["legacy"] = tokenizer.legacy
            tokenizer.save_pretrained(staging)
        if model.name_or_path:
            copy_extra_files(model, staging, tokenizer, kept_tokens)

        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            settle(staging / name, type(model.config))
        write(staging)
        _remove_folders(staging)
        check_reload(like or model, staging)


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the config and the weights of a model."""
    options: dict[str, Any] = {}
    device_map: AbstractContextManager[None] = nullcontext()
    if is_offloaded(model):
        # Offloaded weights are read into memory shard by shard, and tied weights once.
        tied = getattr(model, "all_tied_weights_keys", {})
        options["max_shard_size"] = "2GB"
        options["state_dict"] = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        device_map = declared(model)
    if is_quantized(model):
        # transformers 5 cannot convert bitsandbytes' tensors back from the form in which it runs them.
        options["save_original_format"] = False

    with heterogeneous(), device_map, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(str(folder), **options)


def settle(path: Path, kind: type[PretrainedConfig]) -> None:
    """Make a saved config readable for other versions of transformers and without files that are not there.

    Code files that the config names and its folder lacks are dropped, except files on the Hub. Fields that
    transformers 4 knows by other names are added under these names, if transformers 5 goes on to read the same.
    """
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    settled = dict(config)
    for name in ("is_local", "local_files_only"):  # a tokenizer notes here where it was loaded
        settled.pop(name, None)
    if isinstance(settled.get("auto_map"), dict):
        auto_map = _present_code(settled.pop("auto_map"), path.parent)
        if auto_map:
            settled["auto_map"] = auto_map
    if settled.get("tokenizer_class") == "TokenizersBackend":
        settled["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settled.get("extra_special_tokens"), list):
        settled["additional_special_tokens"] = settled.pop("extra_special_tokens")
    if settled != config:
        replace_json(path, settled)

    former = with_former_rope(settled)
    if former != settled:
        before = kind.from_json_file(path).to_dict()
        replace_json(path, former)
        after = kind.from_json_file(path).to_dict()
        if after | before != after:
            replace_json(path, settled)


def _present_code(auto_map: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the entries of an `auto_map` whose code files are in a folder or on the Hub."""

    def is_present(reference: str | None) -> bool:
        if reference is None or "--" in reference:
            return True
        module = reference.rpartition(".")[0]
        return (folder / f"{module}.py").is_file()

    present = {}
    for name, value in auto_map.items():
        references = value if isinstance(value, list) else [value]
        if all(is_present(reference) for reference in references):
            present[name] = value
    return present


@own_settings()
@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: str | Path) -> None:
    """Raise `StructPruneError` if a saved model has other logits, or other hidden states, than the model."""
    # A config on disk does not name the kernels that ran, and other kernels round differently.
    kernels: dict[str, Any] = {}
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
    """Return the `device_map` by which a saved model is read back beside the model itself.

    It is the placement of the model. Where the model does not fit twice, layers are read from the disk one at a time.
    """
    sizes = bytes_by_device(model)
    if is_offloaded(model):
        return places(model)
    for device, size in sizes.items():
        free = free_bytes(device)
        if free is not None and size > free and not is_quantized(model):
            with suppress(StructPruneError):  # its layers may not be described
                return layer_device_map(model.config, str(model.device), "disk")
    return places(model) if len(sizes) > 1 else model.device


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

        # A copied record may be of another program.
        with suppress(ValueError):
            replace_json(path, without_folders(json.loads(path.read_text(encoding="utf-8"))))


def copy_extra_files(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    kept_tokens: Sequence[int] | None = None,
) -> None:
    """Copy the other files of the dense model's folder into a result, and log the names of files that are not copied.

    These are files of modules around the model, licences and the like. Files of a vocabulary or of heads that no
    longer fit are left out. transformers copies code where it is used.
    """
    source = _source_folder(model)
    sizes = _sizes(source)
    changed = {name for name, _ in sizes ^ _sizes(folder)}

    root = modules_root(source)
    files = {name: source for name in _extra_files(source)}
    if root != source:
        inside = f"{source.name}/"
        files.update({name: root for name in _extra_files(root) if not name.startswith(inside)})

    candidates = []
    for name in files:
        is_tokenizers = isinstance(tokenizer, PreTrainedTokenizerBase) and _belongs_to(tokenizer, name)
        is_outdated = "vocab_size" in changed and VOCABULARY_FILES.fullmatch(name)
        if not ((folder / name).exists() or is_tokenizers or is_outdated):
            candidates.append(name)

    copied = [name for name in candidates if (files[name] / name).is_file() and not name.endswith(".py")]
    # Files that a user has added to a result are not part of it.
    written = written_files(source)
    if written:
        copied = [name for name in copied if name in written]
    if "hidden_size" in changed:
        copied = [name for name in copied if not HEAD_FILES.fullmatch(name)]

    omitted = [name for name in candidates if name not in copied]
    if omitted:
        logger.warning("Not copied from %s: %s.", root, some_of(omitted))
    for name in copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[name] / name, folder / name)
    if root != source:
        _move_transformer(folder / MODULES, source.name)
    modules = [name for name in copied if "/" in name]
    if modules:
        _fit_modules(model, folder, modules, sizes, kept_tokens)


def _move_transformer(path: Path, former: str) -> None:
    """Write the root of a result as the folder of the transformer into its list of modules."""
    modules = json.loads(path.read_text(encoding="utf-8"))
    for module in modules:
        if module["path"] == former:
            module["path"] = ""
    replace_json(path, modules)


def _source_folder(model: PreTrainedModel) -> Path:
    """Return the folder that a model was loaded from. The small files of a model on the Hub are downloaded."""
    name = str(model.name_or_path)
    if Path(name).is_dir():
        return Path(name)
    with suppress(Exception):  # errors of the network or of the Hub, which the model may not need any more
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
    """Write the present sizes and token ids into the configs of modules, and log weights that no longer fit."""
    config = model.config.get_text_config()
    number_of = _new_numbers(kept_tokens)

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
        fitted = MODULE_IDS.sub(lambda field: re.sub(r"\d+", lambda old: number_of(old[0]), field[0]), fitted)
        path.write_text(fitted, encoding="utf-8", errors="surrogateescape")

    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if is_narrower and weights:
        logger.warning("Made for more channels than the model has now, so fit them again: %s.", some_of(weights))


def _new_numbers(kept_tokens: Sequence[int] | None) -> Callable[[str], str]:
    """Return a function from the dense model's token ids to the present ids. Other ids stay the same."""
    new = {str(old): str(number) for number, old in enumerate(kept_tokens or ())}
    return lambda old: new.get(old, old)


def _sizes(folder: Path) -> set[tuple[str, str]]:
    """Return the sizes in the config of a folder, as pairs of a field and a number."""
    path = folder / "config.json"
    if not path.is_file():
        return set()
    return set(SIZE_FIELD.findall(path.read_text("utf-8", "replace")))


def _extra_files(source: Path) -> Iterator[str]:
    """Yield the files that may be copied, also from folders of modules. Names of other folders end in a slash."""
    if not source.is_dir():
        return
    modules: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError):  # only sentence-transformers has such a file
        listed = json.loads((source / MODULES).read_text(encoding="utf-8"))
        modules = {str(module["path"]).partition("/")[0] for module in listed}

    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in modules:
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield file.relative_to(source).as_posix()
        elif not OWN_FILES.fullmatch(path.name):
            yield f"{path.name}/" if path.is_dir() else path.name
