"""The speed of a shape is measured on a simulated GPU, on models that are on it."""

import pytest
import torch
from gpu.simulator import simulated_gpus
from models import build

from optimum_structprune.arch.load import describe
from optimum_structprune.arch.shrink import shrunk_config
from optimum_structprune.widths.speed import USES, clock_for, measured_speed_up, random_model


@pytest.mark.parametrize(("case", "use"), [("llama-tied", "decode"), ("bert", "encode")])
def test_shapes_are_measured_on_the_gpu(case, use):
    with simulated_gpus(1):
        device = torch.device("cuda", 0)
        model = build(case)
        smaller = shrunk_config(model.config, describe(model), {"mlp": 20})

        assert clock_for(device) == "wall"
        assert {weight.device for weight in random_model(model, smaller, device).parameters()} == {device}
        result = measured_speed_up(model, model.config, smaller, USES[use]._replace(batch_size=2), device)
        assert 0 < result.low <= result.value <= result.high
