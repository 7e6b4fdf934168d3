"""Place a teacher for a Trainer: on a device, offloaded, or sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.meta import is_offloaded
from ..system.errors import StructPruneError


ON_CPU = "offload"


def check_device(device: str | torch.device | int | None) -> None:
    """Raise `StructPruneError` if `teacher_device` names no device."""
    if device is None or device == ON_CPU:
        return
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise StructPruneError(
            f"`teacher_device` must be a device such as 'cuda:1' or 'cpu', or {ON_CPU!r}, got {device!r}."
        ) from error

    num_gpus = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= num_gpus:
        raise StructPruneError(f"`teacher_device`={device!r} does not exist. The number of GPUs is {num_gpus}.")


def check_movable(model: nn.Module, device: str | torch.device | int | None) -> None:
    """Raise `StructPruneError` if accelerate would move the inputs of a teacher back from `teacher_device`."""
    is_moved = device is not None and not (device == ON_CPU and is_offloaded(model))
    if is_moved and _has_hooks(model):
        raise StructPruneError(
            f"`teacher_device`={device!r} cannot be used with a teacher that accelerate has spread over devices or "
            "offloaded. Load the teacher without `device_map`, or remove `teacher_device`."
        )


def _has_hooks(model: nn.Module) -> bool:
    """Return whether accelerate moves the inputs of modules of a model to their devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _is_placed(model: PreTrainedModel) -> bool:
    """Return whether a model has been placed by a `device_map` or offloaded."""
    return hasattr(model, "hf_device_map") or _has_hooks(model)


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether every process holds a part of the weights: FSDP, or stage 3 of DeepSpeed's ZeRO."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin: Any = accelerator.state.deepspeed_plugin
        return int(plugin.zero_stage) == 3
    return accelerator.distributed_type == DistributedType.FSDP


@contextmanager
def gathered(weight: Any) -> Iterator[Tensor]:
    """Gather a weight that FSDP2 or ZeRO-3 shards, in every process. Other weights are unchanged."""
    if hasattr(weight, "full_tensor"):
        yield weight.detach().full_tensor()
    elif hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.detach()
    else:
        yield weight.detach()


def place_teacher(
    model: PreTrainedModel, accelerator: Accelerator, device: str | torch.device | int | None = None
) -> Any:
    """Prepare a frozen teacher for the processes and devices of an Accelerator.

    Under FSDP and stage 3 of DeepSpeed's ZeRO the weights are sharded like the student's. Otherwise each process holds
    the whole teacher.

    Args:
        model: The teacher. It is changed in place.
        accelerator: The Accelerator that trains the student.
        device: A device. `"offload"` keeps the weights in CPU memory and moves each layer to the Accelerator's device
            while it runs. By default a model that accelerate has placed is not moved, and any other model is moved to
            the Accelerator's device.

    Returns:
        The teacher to call.

    Raises:
        StructPruneError: If the teacher is sharded and `device` is set.
    """
    model.eval()

    if is_sharded(accelerator):
        if device is not None:
            raise StructPruneError(
                f"`teacher_device`={device!r} cannot be used with {accelerator.distributed_type}, which shards the "
                "teacher over the processes. Remove `teacher_device`."
            )
        model.requires_grad_(False)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return _zero_3(model, accelerator)
        return _fsdp(model, accelerator)

    if device == ON_CPU and _has_hooks(model):
        return model
    if device == ON_CPU:
        return cpu_offload(model, execution_device=accelerator.device)
    if device is None and _is_placed(model):
        return model
    if device is None:
        device = accelerator.device
    return model.to(device)  # type: ignore[arg-type]


def _fsdp(model: PreTrainedModel, accelerator: Accelerator) -> Any:
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(model, evaluation_mode=False)

    # `Accelerator.prepare` shards a model under FSDP2 only together with an optimizer.
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    # accelerate keeps the wrap policy of the first model, and the teacher's layers may be of another class.
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.auto_wrap_policy
    try:
        return fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.auto_wrap_policy = policy


def reshard(model: Any) -> None:
    """Free the weights that FSDP2 keeps gathered after a forward pass, because no backward pass follows."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def _zero_3(model: PreTrainedModel, accelerator: Accelerator) -> Any:
    import deepspeed

    plugin: Any = accelerator.state.deepspeed_plugin
    config = deepcopy(plugin.deepspeed_config)
    # DeepSpeed builds an optimizer for these settings, and a frozen model has nothing to optimize.
    config.pop("optimizer", None)
    config.pop("scheduler", None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


class Placed:
    """A teacher that is placed before its first use.

    Args:
        model: The teacher.
        device: Its device; see `place_teacher`.

    Attributes:
        sharded: Whether every process holds a part of the weights.
    """

    def __init__(self, model: Any, device: str | torch.device | int | None = None):
        self.model = model
        self.device = device
        self.sharded = False
        self._placed: Any = None

    def place(self, accelerator: Accelerator) -> None:
        """Place the teacher for an Accelerator before the first use; see `place_teacher`."""
        if self._placed is None:
            self.sharded = is_sharded(accelerator)
            self._placed = place_teacher(self.model, accelerator, self.device)

    @contextmanager
    def called(self) -> Iterator[Any]:
        """Give the teacher to call, and free the weights that the call has gathered."""
        yield self.model if self._placed is None else self._placed
        if self.sharded:
            reshard(self.model)
