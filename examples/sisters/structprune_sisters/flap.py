"""The refit of FLAP, which adds the mean output of the removed units to the bias."""

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
    """Return the kept columns unchanged, and the bias plus the mean output of the removed columns.

    This is eq. 8 of FLAP (An et al. 2023). See `optimum_structprune.method.refit.least_squares` for the arguments.
    """
    assert bias is not None, "refit='bias' needs consumers that have a bias; see `with_biases`"
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_removed[keep] = False

    mean = moments.mean[is_removed].to(weight)
    return weight[:, keep], bias + weight[:, is_removed] @ mean


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a Llama with biases of zero in its FFN. The copy has the same outputs."""
    config = deepcopy(model.config)
    config.mlp_bias = True
    copy = type(model)(config).to(model.device, model.dtype)

    for parameter in copy.parameters():
        parameter.data.zero_()
    copy.load_state_dict(model.state_dict(), strict=False)
    return copy.eval()
