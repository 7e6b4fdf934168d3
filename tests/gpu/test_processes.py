"""Two processes with simulated GPUs prune as one process on the CPU does. gloo replaces NCCL."""

import pytest
import torch
from gpu.compare import assert_same, weights
from helpers import on_two_ranks
from models import build, config, tokenizer
from safetensors.torch import load_file

from optimum_structprune import StructPruner


RUNS = {
    "channels": ("llama-tied", {"widths": {"mlp": 24}}),
    "layers": ("llama-tied", {"widths": {"layer": 1}}),
    "experts": ("olmoe", {"widths": {"expert": 3}}),
    "units of experts": ("olmoe", {"widths": {"mlp": 24}}),
    "residual stream": ("llama-tied", {"widths": {"hidden": 24}}),
    "sensitivity": ("llama-tied", {"sparsity": 0.2, "allocation": "sensitivity", "round_to": 1}),
}
SCRIPT = """
from gpu import runtime

runtime.load()

import os, sys
from pathlib import Path
from gpu.compare import weights
from gpu.nccl import nccl
from gpu.simulator import simulated_gpus
from gpu.test_processes import RUNS, prune
from safetensors.torch import save_file
from optimum_structprune.system.processes import across_processes, process_count

rank = int(os.environ["RANK"])
with simulated_gpus(2), nccl(), across_processes():
    assert process_count() == 2
    for name in RUNS:
        model = prune(name, f"cuda:{rank}")
        save_file(weights(model), Path(sys.argv[1]) / f"{name}-{rank}.safetensors")
"""


def prune(name, device="cpu"):
    case, fields = RUNS[name]
    model = build(case).to(device)
    return StructPruner(config(**fields)).prune_model(model, tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(SCRIPT, folder, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_weights_of_one(folder, name):
    actual = load_file(folder / f"{name}-0.safetensors")
    second = load_file(folder / f"{name}-1.safetensors")
    for key, tensor in actual.items():
        assert torch.equal(tensor, second[key])

    expected = {key: tensor for key, tensor in weights(prune(name)).items() if key in actual}
    assert_same(dict(sorted(actual.items())), dict(sorted(expected.items())))
