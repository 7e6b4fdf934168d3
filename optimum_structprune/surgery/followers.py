"""Averages of a model's weights, such as an EMA, which follow the model when it shrinks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from ..arch.load import describe
from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from .cut import slice_tensors
from .plan import Plan
from .resize import resize_


class Average:
    """One average, from before the model shrinks to after it.

    Args:
        average: A copy of the model, or the `AveragedModel` around one.
        model: The model, not yet shrunk.
        arch_file: YAML file that describes architectures of your own.

    Raises:
        StructPruneError: If the average is not one of this model.
    """

    def __init__(self, average: nn.Module, model: PreTrainedModel, arch_file: str | None):
        inner = average.module if isinstance(average, AveragedModel) else average
        if not isinstance(inner, type(model)):
            raise StructPruneError(
                f"averages takes copies of the {type(model).__name__}, or AveragedModel around one; "
                f"got {type(inner).__name__}."
            )
        self.inner: PreTrainedModel = inner
        self.arch_file = arch_file
        trained = dict(model.named_parameters())
        self.ahead: dict[str, Tensor] = {
            name: parameter.detach() - trained[name].detach().to(parameter)
            for name, parameter in inner.named_parameters()
        }

    @torch.no_grad()
    def follow_(self, model: PreTrainedModel, arch: ArchSpec, plan: Plan) -> None:
        """Take the model's new widths. Every kept weight stays as far from the model's as it was, so that the refit
        moves both alike.

        Args:
            model: The model, shrunk.
            arch: Its description before that.
            plan: What was kept.
        """
        state = model.state_dict()
        resize_(self.inner, describe(self.inner, self.arch_file), state)
        self.inner.load_state_dict(state)
        ahead = slice_tensors(self.ahead, arch.spaces, plan)
        for name, parameter in self.inner.named_parameters():
            parameter.add_(ahead[name])


@torch.no_grad()
def slice_state_(optimizer: Optimizer, model: nn.Module, arch: ArchSpec, plan: Plan) -> None:
    """Cut an optimizer's state down with its parameters, so that a kept weight keeps its moments.

    Args:
        optimizer: Its state is a number, or a tensor of the parameter's own shape, as `check_state` found.
        model: The model, already shrunk.
        arch: Its description before that.
        plan: What was kept.
    """
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    for key in {key for state in states.values() for key in state}:
        tensors = {name: state[key] for name, state in states.items() if isinstance(state.get(key), Tensor)}
        for name, tensor in slice_tensors({n: t for n, t in tensors.items() if t.ndim}, arch.spaces, plan).items():
            states[name][key] = tensor


def check_state(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state does not go with single weights.

    Raises:
        StructPruneError: If a tensor of its state has another shape than its parameter.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise StructPruneError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot be cut with it; use optim='adamw_torch'."
                )
