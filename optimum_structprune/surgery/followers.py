"""What follows a model when it shrinks: averages of its weights, such as an EMA, and the state of its optimizer."""

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
    """An average of a model's weights that is shrunk together with the model."""

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
        self.distance: dict[str, Tensor] = {
            name: parameter.detach() - trained[name].detach().to(parameter)
            for name, parameter in inner.named_parameters()
        }

    @torch.no_grad()
    def follow_(self, model: PreTrainedModel, arch: ArchSpec, plan: Plan) -> None:
        """Give the average the model's new widths.

        Every kept weight keeps its distance from the model's weight, so that the refit changes both alike.
        """
        state = model.state_dict()
        resize_(self.inner, describe(self.inner, self.arch_file), state)
        self.inner.load_state_dict(state)
        distance = slice_tensors(self.distance, arch.spaces, plan)
        for name, parameter in self.inner.named_parameters():
            parameter.add_(distance[name])


@torch.no_grad()
def slice_state_(optimizer: Optimizer, model: nn.Module, arch: ArchSpec, plan: Plan) -> None:
    """Cut an optimizer's state down with its parameters, so that every kept weight keeps its state."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    for key in {key for state in states.values() for key in state}:
        tensors = {name: state[key] for name, state in states.items() if isinstance(state.get(key), Tensor)}
        for name, tensor in slice_tensors({n: t for n, t in tensors.items() if t.ndim}, arch.spaces, plan).items():
            states[name][key] = tensor


def check_state(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state does not belong to single weights."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise StructPruneError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot be cut with it; use optim='adamw_torch'."
                )
