"""Loads the models that a command line names; every failure is one sentence."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from ..arch.meta import meta_model, model_class
from ..arch.per_layer import enable_heterogeneous
from ..errors import StructPruneError, one_line, some_of
from ..forward.placement import layer_device_map


if TYPE_CHECKING:
    from argparse import Namespace

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Where `--offload` keeps layers while they do not run: in the CPU's memory, or in the model's files on the disk.
OFFLOADS = ("cpu", "disk")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What `--device` takes beside the names of devices: ways to spread a model over all of them.
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def load_offloaded(
    args: Namespace, arch_file: str | None, scratch: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer that the flags of `add_model_arguments` name; see `load_model_and_tokenizer`."""
    return load_model_and_tokenizer(
        args.model, args.dtype, args.device, args.trust_remote_code, arch_file, args.offload, scratch
    )


def load_model_and_tokenizer(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    arch_file: str | None = None,
    offload: str | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer."""
    _prepared(name, dtype, device, arch_file, offload)
    tokenizer = load_tokenizer(name, trust_remote_code)
    return load_model(name, dtype, device, trust_remote_code, arch_file, offload, offload_folder), tokenizer


def load_model(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    arch_file: str | None = None,
    offload: str | None = None,
    offload_folder: str | Path | None = None,
) -> PreTrainedModel:
    """A model without its tokenizer; see `load_model_and_tokenizer`."""
    device = _prepared(name, dtype, device, arch_file, offload)
    config = load_config(name, trust_remote_code)
    try:
        model, loaded = model_class(config, arch_file).from_pretrained(
            name,
            dtype=dtype,
            device_map=_places(config, device, offload, trust_remote_code, arch_file),
            offload_folder=offload_folder,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with both shapes
        )
    except torch.OutOfMemoryError as error:
        raise StructPruneError(f"The model cannot be put on --device {device}: {_line(error)}") from error
    except Exception as error:  # whatever a damaged file or an odd config makes of the code that reads it
        raise _cannot_load(name, error, trust_remote_code, arch_file) from error
    _check_weights(name, loaded)
    return model.eval()


def _prepared(name: str, dtype: str, device: str | None, arch_file: str | None, offload: str | None) -> str:
    """The device, once the flags have been checked; non-uniform models of the file's families load from then on."""
    load_dtype(dtype)
    found = load_device(device)
    check_offload(offload, found, name)
    if arch_file is not None:
        enable_heterogeneous(arch_file)
    return found


def check_offload(offload: str | None, device: str, name: str) -> None:
    """Refuse a way to offload that is not known, or that has no effect."""
    if offload is None:
        return
    if offload not in OFFLOADS:
        raise StructPruneError(f"--offload {offload} is not known; choose one of {', '.join(OFFLOADS)}.")
    if device in SPREAD:
        raise StructPruneError(
            f"--device {device} spreads the layers itself, over the disk too where it has to; leave out --offload."
        )
    if offload == "cpu" and torch.device(device).type == "cpu":
        raise StructPruneError(
            "--offload cpu keeps layers in the CPU's memory while another device computes them, and --device is the "
            "CPU here; leave it out, or use --offload disk."
        )
    if Path(name).is_dir() and not _weight_files(name) and (old := next(Path(name).glob("*.bin"), None)):
        raise StructPruneError(
            f"{old} is no safetensors file, and only these are read a layer at a time; convert it once where it fits "
            f"into memory: AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)."
        )


def _places(
    config: PretrainedConfig, device: str, offload: str | None, trust_remote_code: bool, arch_file: str | None
) -> str | dict[str, str]:
    """The `device_map` for a device, and for where the layers are offloaded to."""
    if offload is None:
        return device
    return layer_device_map(config, device, offload, arch_file, trust_remote_code)


def load_device(name: str | None) -> str:
    """The device that `--device` names; without a name, cuda where there is one, and the CPU otherwise. Of several
    processes on a machine, each gets a GPU of its own.
    """
    if name is None:
        own = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
        return own if torch.cuda.is_available() else "cpu"
    if name in SPREAD:
        return name
    try:
        if torch.device(name).type == "meta":
            raise ValueError("it holds no weights")
        torch.empty(0, device=name)
    except Exception as error:  # torch raises an AssertionError, a RuntimeError or a NotImplementedError
        have = "cpu" + ("".join(f", cuda:{index}" for index in range(torch.cuda.device_count())))
        raise StructPruneError(
            f"--device {name} cannot be used: {_first_line(error)}; this machine has {have}."
        ) from error
    return name


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises a bare one
        load_config(name, trust_remote_code)  # says more where the config is at fault
        raise StructPruneError(f"The tokenizer of {name!r} cannot be loaded: {_line(error)}") from error


def load_dtype(name: str) -> torch.dtype | None:
    """The dtype that `--dtype` names; None for `auto`."""
    if name not in DTYPES:
        raise StructPruneError(f"--dtype {name} is not known; choose one of {', '.join(DTYPES)}.")
    return None if name == "auto" else getattr(torch, name)


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's config."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever an odd value makes of the code that reads it
        raise _cannot_load(name, error, trust_remote_code) from error


def load_shapes(name: str, arch_file: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without weights, on the meta device, from its config alone."""
    return meta_model(load_config(name, trust_remote_code), arch_file, trust_remote_code=trust_remote_code)


def weights_bytes(name: str, config: PretrainedConfig | None = None, arch_file: str | None = None) -> int:
    """The size of a model's weights: that of the safetensors files in its folder, or what its config says."""
    if size := sum(path.stat().st_size for path in _weight_files(name)):
        return size
    if config is None:
        return 0
    model = meta_model(config, arch_file)
    return model.num_parameters() * model.dtype.itemsize


def _check_weights(name: str, loaded: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model whose weights are not all those of its files."""
    if missing := sorted(loaded["missing_keys"]):
        raise StructPruneError(
            f"{name!r} lacks weights that its config asks for, which would be random: {some_of(missing)}. The config "
            "and the weights have to be of the same model."
        )
    if mismatched := sorted(loaded["mismatched_keys"]):
        key, there, here = mismatched[0]
        more = f", and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        raise StructPruneError(
            f"{name!r} has weights of other shapes than its config says: {key} is {tuple(there)} in the file and "
            f"{tuple(here)} by the config{more}."
        )
    if errors := loaded.get("error_msgs"):
        raise StructPruneError(f"{name!r} cannot be loaded: {one_line(next(iter(errors)))}")
    if unexpected := sorted(loaded["unexpected_keys"]):
        logger.warning(
            "%r has weights that the model does not use, and they are dropped: %s.", name, some_of(unexpected)
        )


def _cannot_load(
    name: str, error: Exception, trust_remote_code: bool, arch_file: str | None = None
) -> StructPruneError:
    """The error that says why a model or its config cannot be loaded: which file is damaged, or which key is odd."""
    if broken := next(_broken_files(name), None):
        return StructPruneError(f"{broken} is damaged or cut, so {name!r} cannot be loaded: {_line(error)}")
    fields = _config_fields(name)
    if fields is not None and not isinstance(fields, dict):
        return StructPruneError(f"The config.json of {name!r} has to hold a mapping, found {type(fields).__name__}.")
    if fields and not (trust_remote_code and "auto_map" in fields) and (key := _odd_key(fields, arch_file)):
        return StructPruneError(
            f"{name!r} cannot be loaded: {key}={fields[key]!r} in its config.json cannot be used ({_line(error)})."
        )
    reason = _line(error) if isinstance(error, (OSError, ValueError, ImportError)) else _described(error)
    return StructPruneError(f"{name!r} cannot be loaded: {reason}")


def _weight_files(name: str) -> list[Path]:
    return sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []


def _broken_files(name: str) -> Iterator[Path]:
    """The safetensors files of a folder that cannot be read, and their index."""
    for path in Path(name).glob("*.safetensors.index.json"):
        try:
            json.loads(path.read_text())["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield path
    for path in _weight_files(name):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (OSError, SafetensorError):
            yield path


def _config_fields(name: str) -> Any:
    """What the config.json of a model holds; None where it cannot be read."""
    try:
        path = cached_file(name, "config.json", local_files_only=True)
        return None if path is None else json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _odd_key(fields: Mapping[str, Any], arch_file: str | None) -> str | None:
    """The key of a config without which a model can be built; None where there is no such key, or no need for it."""
    if not isinstance(model_type := fields.get("model_type"), str) or model_type not in CONFIG_MAPPING:
        return None
    # A config that is refused as it is; if none is, a model that cannot be built from it.
    for build in (CONFIG_MAPPING[model_type].from_dict, lambda data: _built(model_type, data, arch_file)):
        if _works(build, fields):
            continue
        for key in fields:
            if key != "model_type" and _works(build, {name: fields[name] for name in fields if name != key}):
                return key
        return None
    return None


def _built(model_type: str, fields: dict[str, Any], arch_file: str | None) -> None:
    meta_model(CONFIG_MAPPING[model_type].from_dict(fields), arch_file)


def _works(build: Any, fields: Mapping[str, Any]) -> bool:
    try:
        build(dict(fields))
    except Exception:  # that it fails is the answer
        return False
    return True


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    """The message of an error in one line, as far as a sentence."""
    return one_line(error)[:300] or type(error).__name__


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
