"""Test that two processes share a pruning or a training and get the result of one process."""

import json
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers import on_two_ranks, save_desk
from models import build, config, documents, real_text_model, three_layers, tokenizer
from safetensors.torch import load_file

from optimum_structprune import DomainConfig, StructPruner
from optimum_structprune.commands.cli import main
from optimum_structprune.domains import generated
from optimum_structprune.record.report import Report


pytestmark = pytest.mark.slow
# One launch makes all of these runs, because a launch takes longer than a run.
RUNS = {
    "llama-tied": {"widths": {"mlp": 24, "attention": 2}},
    "llama-bias": {"criterion": "flap"},
    "qwen3": {"criterion": "flap", "rounds": 2},
    "mixtral": {"widths": {"expert": 3, "mlp": 24}},
    "deepseek_v2": {"widths": {"expert": 2}},
    "gemma2": {"widths": None, "sparsity": 0.25, "allocation": "sensitivity", "round_to": 1, "targets": ("mlp",)},
    "three layers": {"widths": None, "sparsity": 0.25, "allocation": "sensitivity", "round_to": 4},
    "granite": {"widths": {"layer": 1, "hidden": 24, "mlp": 24}},
    "olmoe": {"widths": None, "sparsity": 0.1, "allocation": "sensitivity", "round_to": 1, "targets": ("mlp",)},
    "olmo2": {"criterion": "block_influence", "widths": {"layer": 1}},
    "t5": {},
    "writes itself": {"num_samples": 4},
    "fewer tokens": {"widths": {"vocab": 320, "mlp": 24}},
    "fewer tokens or channels": {
        "widths": None,
        "budget": {"parameters": 0.9},
        "targets": ("vocab", "mlp"),
        # The losses of single layers of a random model differ only by rounding.
        "allocation": "uniform",
    },
}
SCRIPT = """
import json, os, sys
from copy import deepcopy
from pathlib import Path
import torch
import torch.distributed as dist
from helpers import logits, recovery_config
from models import build, config, tokenizer
from safetensors.torch import save_file
from optimum_structprune import StructPruneError, prune_model, recover
from optimum_structprune.commands.cli import main
from optimum_structprune.system.disk import Output
from optimum_structprune.system.fingerprint import fingerprint
from optimum_structprune.system.processes import across_processes, process_count, process_index
from system.test_processes import RUNS, prune_case, prune_command

folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])

# One of several processes saves a folder, and the others get the same outcome.
saver, small = prune_case("llama-tied")

def save_two_folders(parent):
    model_folder = parent / "small"
    for _ in range(2):
        saver.save(small, model_folder, tokenizer(), overwrite=True)
    with Output(parent / "more").staged() as staging:
        (staging / "rank.txt").write_text(str(rank))
    assert (model_folder / "model.safetensors").is_file()
    assert (parent / "more" / "rank.txt").read_text() == "0"

save_two_folders(folder / "saved" / "apart")
with across_processes():
    assert process_count() == 2
    for case in RUNS:
        pruner, model = prune_case(case)
        part = folder / f"{case}-{process_index()}"
        part.mkdir()
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, part / "weights")
        (part / "plan").write_text(json.dumps(pruner.result.plan.to_dict()))
        (part / "report").write_text(json.dumps(pruner.result.report.to_dict()))
save_two_folders(folder / "saved" / "together")
if rank == 0:
    saver.save(small, folder / "saved" / "first" / "small")

user_folder = folder / "saved" / "error" / "small"
(user_folder / "mine").mkdir(parents=True, exist_ok=True)
try:
    saver.save(small, user_folder, overwrite=True)
except StructPruneError as error:
    print(f"rank {rank} saved none: {error}", flush=True)
assert main(prune_command(folder, folder / "printed" / "out")) == 0

# Several processes train one model.
small = prune_model(build("llama-tied"), config(), tokenizer())
WAYS = {"lora": {}, "full": {"train": "full", "lora": {}}}

def train(way, resume=False, **fields):
    training = {"output_dir": str(folder / way), "save_steps": 2, "save_total_limit": 9} | fields
    settings = recovery_config(tokens=288, training=training, validation=str(folder / "a.jsonl"), **WAYS[way])
    return recover(deepcopy(small), tokenizer(), settings, build("llama-tied", seed=1), resume=resume)

for way in WAYS:
    trained = train(way)
    print(f"rank {rank} trained {way}: {fingerprint(trained)}", flush=True)
    # The first process may still write its checkpoint.
    dist.barrier()
    if rank == 0:
        # A kill during the last checkpoint leaves a cut file.
        last = max((folder / way).iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
        (last / "trainer_state.json").write_text("{")
    dist.barrier()
    torch.testing.assert_close(logits(train(way, resume=True)), logits(trained))
    try:
        train(way, resume=True, learning_rate=0.5)
    except StructPruneError as error:
        print(f"rank {rank} refused {way}: {error}", flush=True)
"""


def few_words():
    """Return documents of a few different words."""
    texts = []
    for i in range(60):
        words = [f"w{3 + (i * j) % 5}" for j in range(30)]
        texts.append(" ".join(words))
    return texts


def prune_real_text_model(case):
    model, reader = real_text_model()
    source = "builtin:math"
    if case == "writes itself":
        source = "self:any"
    pruner = StructPruner(config(domains=[DomainConfig(name="a", source=source)], **RUNS[case]))

    # A separate home hides the generated text from other tests.
    short = patch.multiple(generated, FIRST_BATCH=2, MAX_BATCH=4, MAX_TOKENS=40, MIN_TOKENS=8)
    with TemporaryDirectory() as home, patch("huggingface_hub.constants.HF_HOME", home), short:
        return pruner, pruner.prune_model(model, reader)


def prune_case(case):
    """Return the pruner and the pruned model of an entry of `RUNS`."""
    if case in ("writes itself", "fewer tokens", "fewer tokens or channels"):
        return prune_real_text_model(case)

    domains = [
        DomainConfig(name="a", source=documents()),
        DomainConfig(name="few", source=few_words(), weight=0.2),
    ]
    if case == "three layers":
        model = three_layers()
    else:
        model = build(case)
    pruner = StructPruner(config(domains=domains, **RUNS[case]))
    return pruner, pruner.prune_model(model, tokenizer())


def prune_command(folder, out):
    line = ["prune", str(folder / "model"), str(out), "--width", "mlp=24", "--width", "attention=2"]
    line += ["--domain", f"a={folder / 'a.jsonl'}", "--num-samples", "6", "--seq-length", "24"]
    # An offloaded model writes no general text. A run in memory must not write one either.
    line += ["--general-share", "0", "--offload", "disk", "--device", "cpu"]
    return line


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Run the script in two processes, and return its folder, standard output and standard error."""
    folder = tmp_path_factory.mktemp("processes")
    save_desk(folder)
    process = on_two_ranks(SCRIPT, folder, folder)
    return SimpleNamespace(folder=folder, output=process.stdout, errors=process.stderr)


def assert_same_perplexity(perplexity, expected):
    # An encoder-decoder is measured by its vectors.
    if expected is None:
        assert perplexity is None
        return

    assert perplexity.values == pytest.approx(expected.values, rel=1e-5)
    # The margin of a single document is unknown.
    if expected.margin is None:
        assert perplexity.margin is None
    else:
        assert perplexity.margin == pytest.approx(expected.margin, rel=1e-3)


@pytest.mark.parametrize("case", RUNS)
def test_two_processes_prune_like_one_process(case, launch):
    pruner, model = prune_case(case)

    for rank in (0, 1):
        part = launch.folder / f"{case}-{rank}"
        assert json.loads((part / "plan").read_text()) == pruner.result.plan.to_dict()

        weights = load_file(part / "weights")
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5)

        report = Report.from_dict(json.loads((part / "report").read_text()))
        for name, domain in pruner.result.report.domains.items():
            assert_same_perplexity(report.domains[name].perplexity, domain.perplexity)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_process_saves_and_all_get_its_outcome(launch):
    saved = launch.folder / "saved"
    assert names_in(saved / "apart") == ["more", "small"]
    assert names_in(saved / "together") == ["more", "small"]
    assert names_in(saved / "first") == ["small"]
    for name in ("apart", "together", "first"):
        assert (saved / name / "small" / "report.json").is_file()

    for rank in (0, 1):
        assert f"rank {rank} saved none: " in launch.output
    assert launch.output.count("is not a result of structprune") == 2
    assert names_in(saved / "error" / "small") == ["mine"]


def test_the_command_gets_the_result_of_one_process_and_prints_it_once(launch, tmp_path):
    assert launch.output.count("FFN channels: ") == 1
    assert launch.output.count("Saved to ") == 1
    assert names_in(launch.folder / "printed") == ["out"]

    shared = launch.folder / "printed" / "out"
    single = tmp_path / "alone"
    assert main(prune_command(launch.folder, single)) == 0
    assert (shared / "pruning_plan.json").read_text() == (single / "pruning_plan.json").read_text()
    weights = load_file(shared / "model.safetensors")
    expected = load_file(single / "model.safetensors")
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)


def test_two_processes_train_one_model_and_resume(launch):
    lines = launch.output.splitlines()
    for way in ("lora", "full"):
        hashes = [line.split()[-1] for line in lines if f"trained {way}: " in line]
        assert len(hashes) == 2
        assert hashes[0] == hashes[1]
        for rank in (0, 1):
            assert f"rank {rank} refused {way}: " in launch.output

    assert launch.output.count("belongs to another training: training ") == 4
    assert launch.errors.count("is skipped: ") >= 4
