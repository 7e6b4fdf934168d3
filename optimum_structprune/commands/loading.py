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
from ..pruning.request import Request, ask, check_reads_text
from ..sources.offloaded import layer_device_map
from ..system.offloading import check_reachable


logger = logging.getLogger(__name__)

# What `--device` takes beside the names of devices: ways to spread a model over all of them.
SPREAD_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class Loading:
    """Loads models as the arguments say. It is checked when it is made, and registers families of a file."""

    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    arch_file: str | None = None
    offload: str | None = None
    attn_implementation: str | None = None
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Namespace, **values: Any) -> Loading:
        """Makes it of the flags of a command, and of values of a config."""
        given = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
        return cls(**{**given, **values})

    def __post_init__(self) -> None:
        self.device = usable_device(self.device)
        if self.offload is not None and self.device in SPREAD_DEVICES:
            raise StructPruneError(f"--device {self.device} spreads the layers itself; leave out --offload.")
        if self.arch_file is not None:
            enable_heterogeneous(self.arch_file)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that `--dtype` names; None for `auto`."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def model_and_tokenizer(
        self, name: str, scratch: Path | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model and its tokenizer; layers that no file holds as they are go to the `scratch` folder."""
        tokenizer = self.tokenizer(name)
        return self.model(name, scratch), tokenizer

    def model(self, name: str, scratch: Path | None = None) -> PreTrainedModel:
        """A model without its tokenizer."""
        config = self.config(name)
        places: str | dict[str, str] | None = self.device
        if self.offload is not None:
            older = next(Path(name).glob("*.bin"), None) if Path(name).is_dir() else None
            if older is not None and not _weight_files(name):
                raise StructPruneError(
                    f"{older} is no safetensors file, and only these are read a layer at a time; convert it where it "
                    f"fits: AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)."
                )
            places = layer_device_map(config, str(self.device), self.offload, self.arch_file, self.trust_remote_code)
        torch.manual_seed(0)  # what the files lack, as a pooler, is the same in each run
        try:
            model, loaded = model_class(config, self.arch_file).from_pretrained(
                name,
                dtype=self.dtype,
                device_map=places,
                offload_folder=scratch,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                attn_implementation=self.attn_implementation,
                ignore_mismatched_sizes=True,  # they are refused below, with both shapes
            )
        except torch.OutOfMemoryError as error:
            raise StructPruneError(f"The model cannot be put on --device {self.device}: {_line(error)}") from error
        except Exception as error:  # whatever a damaged file or an odd config makes of the code that reads it
            raise _cannot_load(name, error) from error
        _check_weights(name, loaded)
        check_reachable(model)
        return model.eval()

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """A model's tokenizer, which is read once."""
        try:
            if name not in self.tokenizers:
                read = AutoTokenizer.from_pretrained(name, trust_remote_code=self.trust_remote_code)
                if not has_files(read):
                    raise OSError("it has no files there; save the model's own beside it")
                self.tokenizers[name] = read
            return self.tokenizers[name]
        except Exception as error:  # tokenizers raises a bare one
            check_reads_text(self.without_weights(name))  # says more where the config is at fault
            raise StructPruneError(f"The tokenizer of {name!r} cannot be loaded: {_line(error)}") from error

    def config(self, name: str) -> PretrainedConfig:
        """A model's config."""
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # whatever an odd value makes of the code that reads it
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

    def ask(self, name: str, config: StructPruneConfig, options: RunOptions | None = None) -> Request:
        """Gives the request of a pruning, or refuses it as the pruning would."""
        self.check_attention(name)
        model_config, known = self.config(name), self.device not in SPREAD_DEVICES
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself says them
            device, offloaded = torch.device(str(self.device)) if known else None, self.offload is not None
            info = ModelInfo.without_weights(
                model_config, config.arch_file, self.torch_dtype, self.trust_remote_code, device, offloaded
            )
            request = ask(config, info, self.tokenizer(name), options=options)
        if request.widths and known and (self.torch_dtype or model_config.dtype):
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
        torch.empty(0, device=name)
    except Exception as error:  # torch raises an AssertionError, a RuntimeError or a NotImplementedError
        have = "cpu" + ("".join(f", cuda:{index}" for index in range(torch.cuda.device_count())))
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StructPruneError(f"--device {name} cannot be used: {reason}; this machine has {have}.") from error
    return name


def weights_bytes(name: str) -> int:
    """The size of the safetensors files in a model's folder."""
    return sum(path.stat().st_size for path in _weight_files(name))


def _check_weights(name: str, loaded: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model whose weights are not all those of its files."""
    poolers = {key for key in loaded["missing_keys"] if key.startswith("pooler.")}
    if poolers:  # sentence-transformers reads none, so that many of its models come without
        logger.warning("%r has no pooler; one that is random and that nobody reads is saved.", name)
    if missing := sorted({*loaded["missing_keys"]} - poolers):
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
    if unexpected := sorted(loaded["unexpected_keys"]):
        logger.warning("%r has weights that the model does not use, which are dropped: %s.", name, some_of(unexpected))


def _cannot_load(name: str, error: Exception) -> StructPruneError:
    """The error that says why a model cannot be loaded: which of its files is damaged, or what transformers says."""
    if damaged := next(_damaged_files(name), None):
        return StructPruneError(f"{damaged} is damaged or cut, so {name!r} cannot be loaded: {_line(error)}")
    if name.endswith(".gguf"):
        return StructPruneError(f"{name} is a GGUF file, which is not pruned; name the model that it was made of.")
    if "trust_remote_code" in str(error):
        return StructPruneError(f"{name!r} runs code of its own; read it, and give --trust-remote-code.")
    kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
    return StructPruneError(f"{name!r} cannot be loaded: {kind}{_line(error)}")


def _weight_files(name: str) -> list[Path]:
    return sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []


def _damaged_files(name: str) -> Iterator[Path]:
    """The safetensors files of a folder that cannot be read, and their index."""
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
    """The message of an error in one line, as far as a sentence."""
    return one_line(error)[:300] or type(error).__name__
