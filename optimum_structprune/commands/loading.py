"""Loads the models that a command line names; every failure is one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ..arch.heterogeneous import enable_heterogeneous
from ..arch.meta import model_class
from ..errors import StructPruneError


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model_and_tokenizer(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    arch_file: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer.

    Args:
        name: The id or the folder of the model.
        dtype: The dtype of its weights, one of `DTYPES`.
        device: The device to put it on; None takes cuda where there is one, and the CPU otherwise.
        trust_remote_code: Whether code that comes with the model is run.
        arch_file: Descriptions of your own, see `families.yaml`; non-uniform models of these load as well.

    Raises:
        StructPruneError: If either cannot be loaded, with the reason.
    """
    load_dtype(dtype)
    if arch_file is not None:
        enable_heterogeneous(arch_file)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, config = (_load(auto, name, trust_remote_code) for auto in (AutoTokenizer, AutoConfig))
    try:
        model = model_class(config, arch_file).from_pretrained(
            name, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(name, error) from error
    except RuntimeError as error:
        raise StructPruneError(f"The model cannot be put on --device {device}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        StructPruneError: If it cannot be loaded, with the reason.
    """
    return _load(AutoTokenizer, name, trust_remote_code)


def load_dtype(name: str) -> torch.dtype | None:
    """The dtype that `--dtype` names; None for `auto`.

    Raises:
        StructPruneError: If it is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise StructPruneError(f"--dtype {name} is not known; choose one of {', '.join(DTYPES)}.")
    return None if name == "auto" else getattr(torch, name)


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's config.

    Raises:
        StructPruneError: If it cannot be loaded, with the reason.
    """
    return _load(AutoConfig, name, trust_remote_code)


def _load(auto_class: Any, name: str, trust_remote_code: bool) -> Any:
    try:
        return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> StructPruneError:
    return StructPruneError(f"{name!r} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
