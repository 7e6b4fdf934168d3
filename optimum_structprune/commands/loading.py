"""Loads the models that a command line names; every failure is one sentence."""

from __future__ import annotations

import json
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import ModelInfo
from ..arch.meta import meta_model, model_class
from ..arch.per_layer import enable_heterogeneous
from ..config.pruning import RunOptions, StructPruneConfig
from ..domains.manifest import has_files
from ..errors import StructPruneError, one_line, some_of
from ..pruning.memory import check_memory
from ..pruning.request import PruningRequest, check_reads_text, resolve_request
from ..sources.offloaded import layer_device_map
from ..system.disk import check_regular_files
from ..system.offloading import check_reachable
from ..system.placement import check_float64


logger = logging.getLogger(__name__)

# What `--device` takes beside the names of devices: ways to spread a model over all of them.
SPREAD_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class Loading:
    """Loads models by the flags of a command.

    The flags are checked at construction, which also registers the families of `arch_file`.
    """

    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    arch_file: str | None = None
    offload: str | None = None
    attn_implementation: str | None = None
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Namespace, **values: Any) -> Loading:
        """Construct it from the flags of a command; `values` take precedence."""
        flags = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
        flags |= values
        return cls(**flags)

    def __post_init__(self) -> None:
        self.device = usable_device(self.device)
        if self.offload is not None and self.device in SPREAD_DEVICES:
            raise StructPruneError(f"--device {self.device} spreads the layers itself; leave out --offload.")
        if self.arch_file is not None:
            enable_heterogeneous(self.arch_file)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that `--dtype` names; None for `auto`."""
        if self.dtype == "auto":
            return None
        return getattr(torch, self.dtype)

    def model_and_tokenizer(
        self, name: str, scratch: Path | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a model and its tokenizer; see `model`."""
        tokenizer = self.tokenizer(name)
        return self.model(name, scratch), tokenizer

    def model(self, name: str, scratch: Path | None = None) -> PreTrainedModel:
        """Load a model in eval mode.

        Args:
            name: Its id or folder.
            scratch: A folder for offloaded layers that no file holds in the form of the model.

        Raises:
            StructPruneError: If the model cannot be loaded, or its weights are not all those of its files.
        """
        config = self.config(name)
        places: str | dict[str, str] | None = self.device
        if self.offload is not None:
            _check_safetensors(name)
            places = layer_device_map(config, str(self.device), self.offload, self.arch_file, self.trust_remote_code)
        torch.manual_seed(0)  # a pooler that the files lack is the same in each run
        try:
            model, loaded = model_class(config, self.arch_file).from_pretrained(
                name,
                dtype=self.dtype,
                device_map=places,
                offload_folder=scratch,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                attn_implementation=self.attn_implementation,
                ignore_mismatched_sizes=True,  # `_check_weights` refuses them, with both shapes
            )
        except torch.OutOfMemoryError as error:
            raise StructPruneError(f"The model cannot be put on --device {self.device}: {_line(error)}") from error
        except Exception as error:  # a damaged file or an odd config raises errors of many kinds
            raise _cannot_load(name, error) from error
        _check_weights(name, loaded)
        check_reachable(model)
        return model.eval()

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Return a model's tokenizer, which is read once.

        Raises:
            StructPruneError: If it cannot be loaded, or the model does not read text.
        """
        check_regular_files(name)
        try:
            if name not in self.tokenizers:
                read = AutoTokenizer.from_pretrained(name, trust_remote_code=self.trust_remote_code)
                if not has_files(read):
                    raise OSError("it has no files there; save the model's own beside it")
                self.tokenizers[name] = read
            return self.tokenizers[name]
        except Exception as error:  # tokenizers raises a bare Exception
            # Its errors are more exact where the config is at fault.
            check_reads_text(self.without_weights(name))
            raise StructPruneError(f"The tokenizer of {name!r} cannot be loaded: {_line(error)}") from error

    def config(self, name: str) -> PretrainedConfig:
        """Return a model's config.

        Raises:
            StructPruneError: If it cannot be read.
        """
        check_regular_files(name)
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # an odd value raises errors of many kinds
            raise _cannot_load(name, error) from error

    def check_attention(self, name: str) -> None:
        """Raise an error if a model or this machine has no `--attn-implementation` of that name."""
        if self.attn_implementation is None:
            return
        model = meta_model(self.config(name), self.arch_file, self.torch_dtype, self.trust_remote_code)
        try:
            model.set_attn_implementation(self.attn_implementation)
        except (ImportError, ValueError) as error:
            raise StructPruneError(
                f"{name!r} cannot use --attn-implementation {self.attn_implementation}: {_line(error)}"
            ) from error

    def without_weights(self, name: str) -> PreTrainedModel:
        """Return a model on the meta device, made from its config alone."""
        self.check_attention(name)
        return meta_model(self.config(name), self.arch_file, self.torch_dtype, self.trust_remote_code)

    def ask(self, name: str, config: StructPruneConfig, options: RunOptions | None = None) -> PruningRequest:
        """Resolve the request of a pruning without weights.

        Raises:
            StructPruneError: If the pruning would refuse it.
        """
        self.check_attention(name)
        model_config = self.config(name)
        is_one_device = self.device not in SPREAD_DEVICES
        device = torch.device(str(self.device)) if is_one_device else None
        offloaded = self.offload is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself repeats the warnings
            info = ModelInfo.without_weights(
                model_config, config.arch_file, self.torch_dtype, self.trust_remote_code, device, offloaded
            )
            request = resolve_request(config, info, self.tokenizer(name), options=options)
        has_dtype = self.torch_dtype or model_config.dtype
        if request.widths and is_one_device and has_dtype:
            check_memory(request, inplace=True)
        return request


def usable_device(name: str | None) -> str:
    """The device that `--device` names; without one, a GPU of the process's own if there is one, else the CPU."""
    if name is None:
        cuda = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
        return cuda if torch.cuda.is_available() else "cpu"
    if name in SPREAD_DEVICES:
        return name
    try:
        if torch.device(name).type == "meta":
            raise ValueError("it holds no weights")
        check_float64(name)
        torch.empty(0, device=name)
    except StructPruneError:
        raise
    except Exception as error:  # torch raises an AssertionError, a RuntimeError or a NotImplementedError
        have = "cpu" + ("".join(f", cuda:{index}" for index in range(torch.cuda.device_count())))
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StructPruneError(f"--device {name} cannot be used: {reason}; this machine has {have}.") from error
    return name


def weights_bytes(name: str) -> int:
    """Return the bytes of the safetensors files in a model's folder."""
    return sum(path.stat().st_size for path in _weight_files(name))


def _check_safetensors(name: str) -> None:
    """Raise an error if a folder has weights in another format alone, which are not read a layer at a time."""
    if not Path(name).is_dir() or _weight_files(name):
        return
    older = next(Path(name).glob("*.bin"), None)
    if older is not None:
        raise StructPruneError(
            f"{older} is no safetensors file, and only these are read a layer at a time; convert it where it "
            f"fits: AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)."
        )


def _check_weights(name: str, loaded: Mapping[str, Collection[Any]]) -> None:
    """Raise an error if weights are missing from the files of a model, or have other shapes."""
    poolers = {key for key in loaded["missing_keys"] if key.startswith("pooler.")}
    if poolers:  # sentence-transformers reads no pooler, so many of its models lack one
        logger.warning("%r has no pooler; one that is random and that nobody reads is saved.", name)
    missing = sorted({*loaded["missing_keys"]} - poolers)
    if missing:
        raise StructPruneError(
            f"{name!r} lacks weights that its config asks for, which would be random: {some_of(missing)}. The config "
            "and the weights have to be of the same model."
        )
    mismatched = sorted(loaded["mismatched_keys"])
    if mismatched:
        key, file_shape, config_shape = mismatched[0]
        rest = f", and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        raise StructPruneError(
            f"{name!r} has weights of other shapes than its config says: {key} is {tuple(file_shape)} in the file and "
            f"{tuple(config_shape)} by the config{rest}."
        )
    unexpected = sorted(loaded["unexpected_keys"])
    if unexpected:
        logger.warning("%r has weights that the model does not use, which are dropped: %s.", name, some_of(unexpected))


def _cannot_load(name: str, error: Exception) -> StructPruneError:
    """Return the error of a model that cannot be loaded: it names a damaged file, or repeats that of transformers."""
    damaged = next(_damaged_files(name), None)
    if damaged is not None:
        return StructPruneError(f"{damaged} is damaged or cut, so {name!r} cannot be loaded: {_line(error)}")
    if name.endswith(".gguf"):
        return StructPruneError(f"{name} is a GGUF file, which is not pruned; name the model that it was made of.")
    if "trust_remote_code" in str(error):
        return StructPruneError(f"{name!r} runs code of its own; read it, and give --trust-remote-code.")
    kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
    return StructPruneError(f"{name!r} cannot be loaded: {kind}{_line(error)}")


def _weight_files(name: str) -> list[Path]:
    """Return the safetensors files of a folder; none of an id."""
    if not Path(name).is_dir():
        return []
    return sorted(Path(name).glob("*.safetensors"))


def _damaged_files(name: str) -> Iterator[Path]:
    """Yield the index files and the safetensors files of a folder that cannot be read."""
    for path in Path(name).glob("*.safetensors.index.json"):
        try:
            "".join(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield path
    for path in _weight_files(name):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            yield path


def _line(error: Exception) -> str:
    """Return the first 300 characters of an error's message, in one line."""
    return one_line(error)[:300] or type(error).__name__
