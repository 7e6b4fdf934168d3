"""Load the teacher of a recovery, a frozen causal language model, and compute its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import input_device, on_device
from ..arch.meta import predicts_next
from ..domains.manifest import tokenizer_of
from ..measure.predictions import Predictor, accepted_inputs
from ..system.errors import StructPruneError, reason_of
from ..system.placement import is_spread
from ..vocabulary.token_alignment import TokenAlignment
from .placement import Placed, check_device, check_movable, gathered


class SameModelError(StructPruneError):
    """A teacher that has nothing to teach, because it has the weights of the trained model."""

    def __init__(self, advice: str = ""):
        super().__init__(
            "`teacher` and the trained model are the same model. Pass the original model, or remove `teacher`."
            f"{advice}"
        )


def check_weights(temperature: float, task_weight: float) -> None:
    """Raise `StructPruneError` if a weight of the loss is out of range."""
    if not isinstance(temperature, (int, float)) or not 0 < temperature < inf:
        raise StructPruneError(f"`temperature` must be a number above 0, got {temperature!r}.")
    if not isinstance(task_weight, (int, float)) or not 0 <= task_weight <= 1:
        raise StructPruneError(f"`task_weight` must be a number from 0 to 1, got {task_weight!r}.")


def load_teacher(
    teacher: PreTrainedModel | str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | int | None = None,
    is_pruned_later: bool = False,
) -> Teacher:
    """Return the teacher of a model.

    Args:
        teacher: A causal language model, or its id or folder.
        model: The model that is trained.
        tokenizer: The tokenizer of `model`.
        teacher_tokenizer: The tokenizer of the teacher. By default it is read from the teacher's folder.
        trust_remote_code: Whether a teacher that is loaded may run code from its folder.
        dtype: The dtype of the teacher's weights. By default a model in memory keeps its dtype, and a teacher is
            loaded in the dtype of `model`. It also gets the attention implementation of `model` if both models have
            the same type, and it is spread over several devices if `model` is.
        device: The device of the teacher; see `place_teacher`.
        is_pruned_later: Whether the model is pruned in the training. The teacher may have the same weights then.

    Raises:
        StructPruneError: If the teacher cannot be loaded, is not a causal language model, is `model` itself, or has
            tokens that `model` cannot spell.
    """
    check_device(device)
    if isinstance(teacher, (str, Path)):
        device_map = None
        if device is None and is_spread(model):
            # One device cannot hold the model, so the teacher needs several devices too.
            device_map = "auto"
        teacher = _loaded(teacher, dtype or model.dtype, trust_remote_code, device_map)
        if teacher.config.model_type == model.config.model_type:
            teacher.set_attn_implementation(model.config._attn_implementation)
    elif dtype is not None and isinstance(teacher, nn.Module):
        teacher = teacher.to(dtype)  # type: ignore[arg-type]

    teacher = getattr(teacher, "_orig_mod", teacher)  # of a compiled teacher
    if not (isinstance(teacher, nn.Module) and hasattr(teacher, "config") and predicts_next(teacher)):
        raise StructPruneError(
            f"`teacher` must be a causal language model, or its id or folder, got {type(teacher).__name__}."
        )

    check_movable(teacher, device)
    check_differs(teacher, model, is_pruned_later)

    reader, alignment = tokens_of_teacher(teacher, model, tokenizer, teacher_tokenizer, trust_remote_code)
    return Teacher(teacher, reader, alignment, device)


def _loaded(name: str | Path, dtype: torch.dtype, trust_remote_code: bool, device_map: str | None) -> PreTrainedModel:
    with loading_errors(name):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, device_map=device_map, use_kernels=False
        )
    return model


@contextmanager
def loading_errors(name: str | Path) -> Iterator[None]:
    """Raise `StructPruneError` for an error of the libraries that load a teacher."""
    try:
        yield
    except Exception as error:
        # The libraries raise errors of many types for files that are damaged or hold code.
        raise StructPruneError(f"The teacher {str(name)!r} cannot be loaded: {reason_of(error)}.") from error


def check_differs(teacher: nn.Module, model: nn.Module, is_pruned_later: bool) -> None:
    """Raise `StructPruneError` if a teacher is the model itself or has its weights."""
    if teacher is model or (not is_pruned_later and _same_weights(teacher, model)):
        raise SameModelError(" If the model is pruned in this training, pass a copy, and call `attach_pruner` first.")


def _same_weights(teacher: nn.Module, model: nn.Module) -> bool:
    """Return whether two models have the same weights. Every process must call it, because weights may be sharded."""
    weights = dict(model.named_parameters())
    teacher_weights = dict(teacher.named_parameters())
    # Shapes are compared first, because values of offloaded or large models take time to copy.
    if _shapes(teacher_weights) != _shapes(weights):
        return False

    # The comparison ends at the first difference.
    results = [all(_equal(weight, teacher_weights[name]) for name, weight in weights.items())]
    # FSDP's RAM-efficient loading reads the weights in the first process only.
    if distributed.is_initialized():
        distributed.broadcast_object_list(results)
    return results[0]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the shapes of whole weights. ZeRO-3 leaves an empty tensor in place of a sharded weight."""
    return {name: getattr(weight, "ds_shape", weight.shape) for name, weight in weights.items()}


def _equal(weight: Tensor, other: Tensor) -> bool:
    if weight.is_meta or other.is_meta:
        return False
    with gathered(weight) as whole, gathered(other) as other_whole:
        # A teacher may be loaded in a dtype of less precision.
        dtype = min(whole.dtype, other_whole.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        return torch.equal(whole.to(dtype).cpu(), other_whole.to(dtype).cpu())


def tokens_of_teacher(
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedTokenizerBase | None, TokenAlignment | None]:
    """Return the tokenizer of a teacher, and the alignment of its tokens if the model lacks some of them.

    The models need no weights. If a tokenizer is unknown, vocabularies of equal size are assumed to be equal.

    Raises:
        StructPruneError: If the teacher has other tokens, or its tokens are unknown.
    """
    reader = teacher_tokenizer or tokenizer_of(teacher, trust_remote_code)
    if reader is None or tokenizer is None:
        check_sizes(teacher, model)
        return tokenizer, None

    alignment = TokenAlignment.between(teacher, reader, model, tokenizer)
    if alignment.is_identity():
        return tokenizer, None
    return reader, alignment


def check_sizes(teacher: Any, model: Any) -> None:
    """Raise `StructPruneError` if models whose tokenizers are unknown have vocabularies of different sizes."""
    teacher_size = getattr(teacher.config.get_text_config(), "vocab_size", 0)
    size = getattr(model.config.get_text_config(), "vocab_size", 0)
    if teacher_size != size:
        raise StructPruneError(
            f"The teacher has a vocabulary of {teacher_size} tokens and the model one of {size}, and the tokenizer of "
            "one of them is not known. Save the teacher's tokenizer into its folder, or pass `teacher_tokenizer`."
        )


class Teacher(Placed, Predictor):
    """A frozen causal language model that predicts next tokens.

    Attributes:
        model: The teacher.
        tokenizer: Its tokenizer, or the tokenizer of the trained model if both have the same tokens.
        alignment: The spelling of the teacher's tokens if the trained model lacks some of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        alignment: TokenAlignment | None = None,
        device: str | torch.device | int | None = None,
    ):
        Placed.__init__(self, model, device)
        Predictor.__init__(self, model)
        self.tokenizer = tokenizer
        self.alignment = alignment

    def place(self, accelerator: Accelerator) -> None:
        """Place the teacher for an Accelerator before the first use; see `place_teacher`."""
        super().place(accelerator)
        # The weights of a sharded head are only gathered while the model runs.
        self.whole = self.whole or self.sharded

    def run(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the teacher on a batch in its own tokens, and return its logits; see `Predictor.run`."""
        arguments = accepted_inputs(self.model, inputs)
        if not self.sharded:
            arguments = on_device(arguments, input_device(self.model))
        with self.called() as model:
            logits: Tensor = model(**arguments).logits
        return logits
