"""Two processes that share a pruning or a training find what one process finds."""

import json
from tempfile import TemporaryDirectory
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
# One launch for all of them, because a launch takes longer than they do.
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
        "allocation": "uniform",  # the losses of single layers of a random model differ by rounding alone
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
from system.test_processes import RUNS, command, pruned

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

# One of several processes saves a folder, and the others get the same outcome.
saver, small = pruned("llama-tied")

def save_both(out):
    for _ in range(2):
        saver.save(small, out, tokenizer(), overwrite=True)
    with Output(out.parent / "more").staged() as staging:
        (staging / "rank.txt").write_text(str(rank))
    assert (out / "model.safetensors").is_file() and (out.parent / "more" / "rank.txt").read_text() == "0"

save_both(folder / "saved" / "apart" / "small")
with across_processes():
    assert process_count() == 2
    for case in RUNS:
        pruner, model = pruned(case)
        part = folder / f"{case}-{process_index()}"
        part.mkdir()
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, part / "weights")
        (part / "plan").write_text(json.dumps(pruner.plan.to_dict()))
        (part / "report").write_text(json.dumps(pruner.report.to_dict()))
save_both(folder / "saved" / "together" / "small")
if rank == 0:
    saver.save(small, folder / "saved" / "first" / "small")
(folder / "saved" / "error" / "small" / "mine").mkdir(parents=True, exist_ok=True)
try:
    saver.save(small, folder / "saved" / "error" / "small", overwrite=True)
except StructPruneError as error:
    print(f"rank {rank} saved none: {error}", flush=True)
assert main(command(folder, folder / "printed" / "out")) == 0

# Several processes train one model.
small = prune_model(build("llama-tied"), config(), tokenizer())
WAYS = {"lora": {}, "full": {"train": "full", "lora": {}}}

def trained(way, resume=False, **training):
    kept = {"output_dir": str(folder / way), "save_steps": 2, "save_total_limit": 9, **training}
    settings = recovery_config(tokens=288, training=kept, validation=str(folder / "a.jsonl"), **WAYS[way])
    return recover(deepcopy(small), tokenizer(), settings, build("llama-tied", seed=1), resume=resume)

for way in WAYS:
    whole = trained(way)
    print(f"rank {rank} trained {way}: {fingerprint(whole)}", flush=True)
    dist.barrier()  # the first process may still be writing
    if rank == 0:
        # What a kill while the last checkpoint is written leaves.
        last = max((folder / way).iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
        (last / "trainer_state.json").write_text("{")
    dist.barrier()
    torch.testing.assert_close(logits(trained(way, resume=True)), logits(whole))
    try:
        trained(way, resume=True, learning_rate=0.5)
    except StructPruneError as error:
        print(f"rank {rank} refused {way}: {error}", flush=True)
dist.destroy_process_group()
"""


def pruned(case):
    if case == "writes itself" or case.startswith("fewer tokens"):
        model, reader = real_text_model()
        source = "self:code" if case == "writes itself" else "builtin:math"
        pruner = StructPruner(config(domains=[DomainConfig(name="a", source=source)], **RUNS[case]))
        short = patch.multiple(generated, MIN_BATCH=2, MAX_BATCH=4, MAX_TOKENS=40, MIN_TOKENS=8)
        with TemporaryDirectory() as home, patch("huggingface_hub.constants.HF_HOME", home), short:
            return pruner, pruner.prune_model(model, reader)
    few = [" ".join(f"w{3 + (i * j) % 5}" for j in range(30)) for i in range(60)]
    domains = [DomainConfig(name="a", source=documents()), DomainConfig(name="few", source=few, weight=0.2)]
    pruner = StructPruner(config(**{"domains": domains, **RUNS[case]}))
    return pruner, pruner.prune_model(three_layers() if case == "three layers" else build(case), tokenizer())


def command(folder, out):
    """A model that is streamed writes no text beside the domain, so none is written in memory either."""
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--general-share", "0", "--num-samples", "6", "--seq-length", "24"]
    flags = ["--width", "mlp=24", "--width", "attention=2", "--offload", "disk", "--device", "cpu"]
    return ["prune", str(folder / "model"), str(out), *flags, *text]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of a launch, and what it said on the standard output and error."""
    folder = tmp_path_factory.mktemp("processes")
    save_desk(folder)
    done = on_two_ranks(SCRIPT, folder, folder)
    return folder, done.stdout, done.stderr


@pytest.mark.parametrize("case", RUNS)
def test_two_processes_find_what_one_finds(case, together):
    pruner, model = pruned(case)
    for rank in (0, 1):
        part = together[0] / f"{case}-{rank}"
        assert json.loads((part / "plan").read_text()) == pruner.plan.to_dict()
        theirs = load_file(part / "weights")
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-5)
        report = Report.from_dict(json.loads((part / "report").read_text()))
        for name, domain in pruner.report.domains.items():
            if domain.perplexity is None:  # an encoder-decoder is measured by its vectors
                assert report.domains[name].perplexity is None
                continue

            perplexity = report.domains[name].perplexity
            assert perplexity.by_model() == pytest.approx(domain.perplexity.by_model(), rel=1e-5)
            # The margin of a single document is unknown.
            if domain.perplexity.margin is None:
                assert perplexity.margin is None
            else:
                assert perplexity.margin == pytest.approx(domain.perplexity.margin, rel=1e-3)


def test_one_process_saves_and_all_get_its_outcome(together):
    folder, said = together[0] / "saved", together[1]
    for mode, names in {"apart": ["more", "small"], "together": ["more", "small"], "first": ["small"]}.items():
        assert sorted(path.name for path in (folder / mode).iterdir()) == names
        assert (folder / mode / "small" / "report.json").is_file()
    assert all(f"rank {rank} saved none: " in said for rank in (0, 1))
    assert said.count("is not a result of structprune") == 2
    assert [path.name for path in (folder / "error" / "small").iterdir()] == ["mine"]


def test_the_command_gives_what_one_process_gives_and_says_it_once(together, tmp_path):
    folder, said, _ = together
    assert said.count("FFN channels: ") == said.count("Saved to ") == 1
    assert [path.name for path in (folder / "printed").iterdir()] == ["out"]
    assert main(command(folder, tmp_path / "alone")) == 0
    ours, theirs = (at / "pruning_plan.json" for at in (folder / "printed" / "out", tmp_path / "alone"))
    assert ours.read_text() == theirs.read_text()
    found, expected = (load_file(path.with_name("model.safetensors")) for path in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_two_processes_train_one_model_and_resume(together):
    _, said, warned = together
    for way in ("lora", "full"):
        hashes = [line.split()[-1] for line in said.splitlines() if f"trained {way}: " in line]
        assert len(hashes) == 2 and hashes[0] == hashes[1]
        assert all(f"rank {rank} refused {way}: " in said for rank in (0, 1))
    assert said.count("belongs to another training: training ") == 4
    assert warned.count("is skipped: ") >= 4
