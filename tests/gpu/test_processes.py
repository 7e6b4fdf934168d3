"""Two processes with a simulated GPU each find what one process on the CPU finds, over a stand-in for NCCL."""

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
from gpu.test_processes import RUNS, pruned
from safetensors.torch import save_file
from optimum_structprune.system.processes import across_processes, process_count

rank = int(os.environ["RANK"])
with simulated_gpus(2), nccl(), across_processes():
    assert process_count() == 2
    for name in RUNS:
        model = pruned(name, lambda model: model.to(f"cuda:{rank}"))
        save_file(weights(model), Path(sys.argv[1]) / f"{name}-{rank}.safetensors")
"""


def pruned(name, place=lambda model: model):
    case, fields = RUNS[name]
    return StructPruner(config(**fields)).prune_model(place(build(case)), tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(SCRIPT, folder, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_find_what_one_finds(folder, name):
    by_rank = [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(by_rank[0][key], by_rank[1][key]) for key in by_rank[0])
    expected = {key: tensor for key, tensor in weights(pruned(name)).items() if key in by_rank[0]}
    assert_same(dict(sorted(by_rank[0].items())), dict(sorted(expected.items())))
