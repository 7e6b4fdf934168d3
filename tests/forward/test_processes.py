"""Two processes that share a pruning find what one process finds."""

import json
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
from helpers import assert_same_choices, on_two_ranks
from models import build, config, documents, real_text_model, three_layers, tokenizer
from safetensors.torch import load_file

from optimum_structprune import DomainConfig, StructPruner
from optimum_structprune.domains import generated
from optimum_structprune.record.details import Details


# One launch for all of them, because a launch takes longer than they do.
RUNS = {
    "llama-tied": {"widths": {"mlp": 24, "attention": 2}},
    "llama-bias": {"criterion": "flap", "refit": "bias"},
    "qwen3": {"criterion": "flap", "rounds": 2, "objective": "worst"},
    "mixtral": {"widths": {"expert": 3, "mlp": 24}},
    "gemma2": {"widths": None, "sparsity": 0.25, "allocation": "sensitivity", "round_to": 1, "targets": ("mlp",)},
    "three layers": {"widths": None, "sparsity": 0.25, "allocation": "search", "round_to": 4},
    "granite": {"widths": {"layer": 1, "hidden": 24, "mlp": 24}},
    "olmoe": {"widths": None, "sparsity": 0.1, "allocation": "sensitivity", "round_to": 1, "targets": ("mlp",)},
    "mistral": {"criterion": "wanda", "refit": "bias", "allocation": "global", "round_to": 1},
    "olmo2": {"criterion": "loss_increase", "widths": {"layer": 1}},
    "t5": {},
    "writes itself": {},
}
SCRIPT = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from forward.test_processes import RUNS, pruned
from optimum_structprune.pruning import trials
from optimum_structprune.system.processes import across_processes, process_count, process_index

folder, measure, tried = Path(sys.argv[1]), trials.trial_losses, []

def counted(sweep, refits, probe):
    tried.append(probe.layer)
    return measure(sweep, refits, probe)

trials.trial_losses = counted
with across_processes():
    assert process_count() == 2
    for case in RUNS:
        tried.clear()
        pruner, model = pruned(case)
        part = folder / f"{case}-{process_index()}"
        part.mkdir()
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, part / "weights")
        (part / "plan").write_text(json.dumps(pruner.plan.to_dict()))
        (part / "report").write_text(json.dumps(pruner.report.to_dict()))
        pruner.report.details.save(part / "details")
        (part / "tried").write_text(json.dumps(tried))
"""


def pruned(case):
    if case == "writes itself":
        return on_text_of_its_own()
    few = [" ".join(f"w{3 + (i * j) % 5}" for j in range(30)) for i in range(60)]
    domains = [DomainConfig(name="a", source=documents()), DomainConfig(name="few", source=few, weight=0.2)]
    pruner = StructPruner(config(**{"domains": domains, **RUNS[case]}))
    return pruner, pruner.prune_model(three_layers() if case == "three layers" else build(case), tokenizer())


def on_text_of_its_own():
    model, reader = real_text_model()
    short = patch.multiple(generated, BATCH=2, MAX_TOKENS=40, MIN_TOKENS=8)
    with TemporaryDirectory() as home, patch.object(generated.constants, "HF_HOME", home), short:
        pruner = StructPruner(config(domains=[DomainConfig(name="own", source="self:code")], num_samples=4))
        return pruner, pruner.prune_model(model, reader)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    done = on_two_ranks(SCRIPT, folder, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", RUNS)
def test_two_processes_find_what_one_finds(case, together):
    pruner, model = pruned(case)
    for rank in (0, 1):
        part = together / f"{case}-{rank}"
        assert json.loads((part / "plan").read_text()) == pruner.plan.to_dict()
        theirs = load_file(part / "weights")
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-5)
        assert_same_choices(Details.load(part / "details"), pruner.report.details)
        report = json.loads((part / "report").read_text())
        for name, values in pruner.report.perplexity.items():
            assert report["perplexity"][name] == pytest.approx(values, rel=1e-5)


def test_each_process_makes_the_trials_of_its_own_layers(together):
    """Of three layers two; of experts, the FFN alone."""
    expected = {"three layers": [[0, 0, 2, 2], [1, 1]], "gemma2": [[0], [1]], "olmoe": [[0], [1]], "t5": [[], []]}
    for case, of_ranks in expected.items():
        assert [json.loads((together / f"{case}-{rank}" / "tried").read_text()) for rank in (0, 1)] == of_ranks


DYING = """
import os
from forward.test_processes import pruned
from optimum_structprune.pruning.sweep import Sweep
from optimum_structprune.system.processes import across_processes

if os.environ["RANK"] == "1":
    Sweep.gather = lambda *args: os._exit(9)
with across_processes():
    pruned("llama-tied")
"""


@pytest.mark.nightly
def test_a_process_that_dies_ends_the_others(tmp_path):
    assert on_two_ranks(DYING, tmp_path).returncode != 0
