"""Load the models of a command, and convert loading errors to one-line messages."""

from __future__ import annotations

import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import ModelInfo
from ..arch.meta import meta_model, model_class
from ..arch.per_layer import enable_heterogeneous
from ..config.pruning import RunOptions, StructPruneConfig
from ..domains.manifest import has_files
from ..method.offloaded import layer_device_map
from ..pruning.cost import check_memory
from ..pruning.request import PruningRequest, check_reads_text, resolve_request
from ..system.errors import StructPruneError, reason_of, some_of
from ..system.offloading import check_reachable
from ..system.placement import check_float64
from ..system.stages import say


logger = logging.getLogger(__name__)

# Values of `--device` that spread a model over all devices.
SPREAD_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class Loading:
    """Loads models by the flags of a command.

    The constructor checks the flags and registers the families of `arch_file`.
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
        """Create a `Loading` from the flags of a command; `values` take precedence."""
        flags: dict[str, Any] = {}
        for item in fields(cls):
            if hasattr(args, item.name):
                flags[item.name] = getattr(args, item.name)

        flags.update(values)
        return cls(**flags)

    def __post_init__(self) -> None:
        self.device = usable_device(self.device)
        if self.offload is not None and self.device in SPREAD_DEVICES:
            raise StructPruneError(f"--device {self.device} spreads the layers itself. Remove --offload.")
        if self.arch_file is not None:
            enable_heterogeneous(self.arch_file)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Return the dtype that `--dtype` names, or None for `auto`."""
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
            StructPruneError: If the model cannot be loaded, or its files do not have all weights.
        """
        say(f"Loading {name} …")
        config = self.config(name)
        device_map: str | dict[str, str] | None = self.device
        if self.offload is not None:
            _check_safetensors(name)
            device_map = layer_device_map(
                config, str(self.device), self.offload, self.arch_file, self.trust_remote_code
            )

        # A pooler that is missing from the files gets the same random weights in each run.
        torch.manual_seed(0)
        try:
            model, loading_info = model_class(config, self.arch_file).from_pretrained(
                name,
                dtype=self.dtype,
                device_map=device_map,
                offload_folder=scratch,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                attn_implementation=self.attn_implementation,
                use_kernels=False,  # kernels are code that transformers would download from the Hub
                ignore_mismatched_sizes=True,  # `_check_weights` raises an error that names both shapes
            )
        except torch.OutOfMemoryError as error:
            raise StructPruneError(f"The model cannot be put on --device {self.device}: {reason_of(error)}") from error
        except Exception as error:  # a damaged file or an unusual config raises errors of many classes
            raise _cannot_load(name, error) from error

        _check_weights(name, loading_info)
        check_reachable(model)
        return model.eval()

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Return a model's tokenizer, which is loaded once.

        Raises:
            StructPruneError: If it cannot be loaded, or the model does not read text.
        """
        if name not in self.tokenizers:
            self.tokenizers[name] = self._load_tokenizer(name)
        return self.tokenizers[name]

    def _load_tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Load a model's tokenizer."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=self.trust_remote_code)
            if not has_files(tokenizer):
                raise OSError("the folder has no tokenizer files; save the model's own tokenizer there")
            return tokenizer
        except Exception as error:  # the library tokenizers raises a bare Exception
            # If the config is wrong, an error about the config is more exact.
            check_reads_text(self.without_weights(name))
            if "trust_remote_code" in str(error):
                raise _cannot_load(name, error) from error
            raise StructPruneError(f"The tokenizer of {name!r} cannot be loaded: {reason_of(error)}") from error

    def config(self, name: str) -> PretrainedConfig:
        """Return a model's config.

        Raises:
            StructPruneError: If it cannot be read.
        """
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # an unusual value raises errors of many classes
            raise _cannot_load(name, error) from error

    def check_attention(self, name: str) -> None:
        """Raise `StructPruneError` if the model or this machine does not support `--attn-implementation`."""
        if self.attn_implementation is None:
            return

        model = meta_model(self.config(name), self.arch_file, self.torch_dtype, self.trust_remote_code)
        try:
            model.set_attn_implementation(self.attn_implementation)
        except (ImportError, ValueError) as error:
            raise StructPruneError(
                f"{name!r} cannot use --attn-implementation {self.attn_implementation}: {reason_of(error)}"
            ) from error

    def without_weights(self, name: str) -> PreTrainedModel:
        """Return a model on the meta device. Only its config is read."""
        self.check_attention(name)
        return meta_model(self.config(name), self.arch_file, self.torch_dtype, self.trust_remote_code)

    def ask(self, name: str, config: StructPruneConfig, options: RunOptions | None = None) -> PruningRequest:
        """Resolve the request of a pruning without weights.

        Raises:
            StructPruneError: If the pruning would refuse it.
        """
        say("Checking the request …")
        self.check_attention(name)
        model_config = self.config(name)
        device = None
        if self.device not in SPREAD_DEVICES:
            device = torch.device(str(self.device))

        with warnings.catch_warnings():
            # The run itself repeats the warnings.
            warnings.simplefilter("ignore")
            model_info = ModelInfo.without_weights(
                model_config,
                config.arch_file,
                self.torch_dtype,
                self.trust_remote_code,
                device,
                self.offload is not None,
            )
            request = resolve_request(config, model_info, self.tokenizer(name), options=options)

        has_dtype = self.torch_dtype or model_config.dtype
        if request.widths and device is not None and has_dtype:
            check_memory(request, inplace=True)
        return request


def loading_without_weights(args: Namespace, arch_file: str | None) -> Loading:
    """Return a `Loading` that reads configs and tokenizers, whatever device and attention the flags name."""
    return Loading.of(args, arch_file=arch_file, device="cpu", offload=None, attn_implementation=None)


def usable_device(name: str | None) -> str:
    """Return the device that `--device` names.

    Without the flag it is a GPU if there is one, and otherwise the CPU. Each of several processes has its own GPU.

    Args:
        name: The value of the flag; None without the flag.

    Raises:
        StructPruneError: If the device cannot be used.
    """
    if name is None:
        return _default_device()
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
        devices = ["cpu"]
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        reason = str(error).strip().partition("\n")[0] or type(error).__name__

        raise StructPruneError(
            f"--device {name} cannot be used: {reason}. This machine has {', '.join(devices)}."
        ) from error
    return name


def _default_device() -> str:
    """Return the GPU of this process, or the CPU without a GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    if "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return "cuda"


def weights_bytes(name: str) -> int:
    """Return the bytes of the safetensors files in a model's folder."""
    return sum(path.stat().st_size for path in _weight_files(name))


def _check_safetensors(name: str) -> None:
    """Raise `StructPruneError` if a folder has no safetensors files, because other files are not read by layers."""
    if not Path(name).is_dir() or _weight_files(name):
        return

    older = next(Path(name).glob("*.bin"), None)
    if older is not None:
        raise StructPruneError(
            f"{older} is not a safetensors file, and only these are read a layer at a time. Convert it on a machine "
            f"with enough memory: AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)."
        )


def _check_weights(name: str, loading_info: Mapping[str, Collection[Any]]) -> None:
    """Raise `StructPruneError` if weights are missing from the files of a model, or have other shapes.

    Args:
        name: The id or the folder of the model.
        loading_info: The loading info of `from_pretrained`.
    """
    poolers = {key for key in loading_info["missing_keys"] if key.startswith("pooler.")}
    if poolers:  # sentence-transformers does not use the pooler, so many of its models lack one
        logger.warning("%r has no pooler; one that is random and that nobody reads is saved.", name)

    missing_keys = sorted(key for key in loading_info["missing_keys"] if key not in poolers)
    if missing_keys:
        raise StructPruneError(
            f"{name!r} lacks weights that its config asks for, which would be random: {some_of(missing_keys)}. The "
            "config and the weights have to be of the same model."
        )

    mismatched_keys = sorted(loading_info["mismatched_keys"])
    if mismatched_keys:
        key, file_shape, config_shape = mismatched_keys[0]
        end = ""
        if len(mismatched_keys) > 1:
            end = f", and {len(mismatched_keys) - 1} more"

        raise StructPruneError(
            f"{name!r} has weights of other shapes than its config says: {key} is {tuple(file_shape)} in the file and "
            f"{tuple(config_shape)} by the config{end}."
        )

    unused_keys = sorted(loading_info["unexpected_keys"])
    if unused_keys:
        logger.warning(
            "%r has weights that the model does not use, which are dropped: %s.", name, some_of(unused_keys)
        )


def _cannot_load(name: str, error: Exception) -> StructPruneError:
    """Return the error for a model that cannot be loaded."""
    if name.endswith(".gguf"):
        return StructPruneError(f"{name} is a GGUF file, which is not pruned. Pass the model that it was made from.")
    if "trust_remote_code" in str(error):
        return StructPruneError(f"{name!r} runs code of its own. Read it, and pass --trust-remote-code.")

    reason = reason_of(error)
    if not isinstance(error, (OSError, ValueError, ImportError)):
        reason = f"{type(error).__name__}: {reason}"
    return StructPruneError(f"{name!r} cannot be loaded: {reason}")


def _weight_files(name: str) -> list[Path]:
    """Return the safetensors files of a folder, or none for an id."""
    if not Path(name).is_dir():
        return []
    return sorted(Path(name).glob("*.safetensors"))
