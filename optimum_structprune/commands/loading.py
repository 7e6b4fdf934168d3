"""Loads what a command line names, and turns failures into one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer

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

    Raises:
        StructPruneError: If either cannot be loaded, with the reason.
    """
    load_dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, config = (_load(kind, name, trust_remote_code) for kind in (AutoTokenizer, AutoConfig))
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


def _load(kind: Any, name: str, trust_remote_code: bool) -> Any:
    try:
        return kind.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> StructPruneError:
    return StructPruneError(f"{name!r} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
