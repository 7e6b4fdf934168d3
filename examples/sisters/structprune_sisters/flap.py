"""The refit of FLAP: the mean output of the removed units goes into a bias."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_structprune.config.pruning import REFITS
from optimum_structprune.method.calibrate import Moments


@REFITS.register("bias")
def bias_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Leave the kept columns as they are, and add the mean output of the removed ones to the bias.

    This is eq. 8 of FLAP (An et al. 2023). See `optimum_structprune.method.refit.least_squares` for the arguments.
    """
    assert bias is not None, "refit='bias' needs consumers that have a bias; see `with_biases`"
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[keep] = False
    return weight[:, keep], bias + weight[:, removed] @ moments.mean[removed].to(weight)


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a Llama whose FFN has biases of zero, which compute nothing yet."""
    config = deepcopy(model.config)
    config.mlp_bias = True
    copy = type(model)(config).to(model.device, model.dtype)
    for parameter in copy.parameters():
        parameter.data.zero_()
    copy.load_state_dict(model.state_dict(), strict=False)
    return copy.eval()
