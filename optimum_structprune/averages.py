"""Averages of a model's weights, such as an EMA, which follow the model when it shrinks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from .arch.load import describe
from .arch.spec import ArchSpec
from .errors import StructPruneError
from .plan import Plan
from .surgery import resize_, slice_tensors


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
    def follow_(self, model: PreTrainedModel, spec: ArchSpec, plan: Plan) -> None:
        """Take the model's new widths. Every kept weight stays as far from the model's as it was, so that the refit
        moves both alike.

        Args:
            model: The model, shrunk.
            spec: Its description before that.
            plan: What was kept.
        """
        state = model.state_dict()
        resize_(self.inner, describe(self.inner, self.arch_file), state)
        self.inner.load_state_dict(state)
        ahead = slice_tensors(self.ahead, spec.spaces, plan)
        for name, parameter in self.inner.named_parameters():
            parameter.add_(ahead[name])
