"""Runs that are killed without warning, and two runs into one output."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_with_tokenizer
from models import GROUPED, documents
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


# Forks once the libraries are loaded, so that kills meet the work and not the imports.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from optimum_structprune import pruner
from optimum_structprune.commands import loading, prune
from optimum_structprune.commands.cli import main
from transformers.models.llama import modeling_llama

model, folder, text = map(Path, sys.argv[1:])

def run(out, killed_after=None):
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        flags = "--width mlp=24 --width attention=2 --num-samples 6 --seq-length 24 --device cpu --quiet"
        more = ["--domain", f"a={text}", "--offload", "disk", "--resume", "--overwrite"]
        os._exit(main(["prune", str(model), str(folder / out), *flags.split(), *more]))
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, time.monotonic() - begun

run("whole")
code, length = run("whole")
assert code == 0
draw = random.Random(0)
for number in range(10):
    out = f"out-{number}"
    left = 0
    code, _ = run(out, draw.uniform(0.0, length))
    print(number, code, (folder / out).exists(), sorted(path.name for path in folder.glob(f".{out}.*")), flush=True)
    while code:
        assert code == -signal.SIGKILL, code
        # The half of a run, the next time all of it.
        left += 1
        code, _ = run(out, draw.uniform(0.0, length) if left == 1 else None)
"""


def entries(path: Path) -> dict:
    """A record of a run, without what depends on the clock."""
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if "seconds" not in name}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    torch.manual_seed(0)
    fields = {**GROUPED, "num_hidden_layers": 8}
    save_with_tokenizer(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)), folder / "model")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(80)))
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_moment_comes_to_the_same_result(dense, tmp_path):
    command = [sys.executable, "-c", SCRIPT, dense / "model", tmp_path, dense / "a.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" -{signal.SIGKILL:d} " in done.stdout
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    # What was killed has left nothing behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["whole", *(f"out-{n}" for n in range(10))])
    for number in range(10):
        out = tmp_path / f"out-{number}"
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        for name in ("pruning_plan.json", "report.json"):
            assert entries(out / name) == entries(tmp_path / "whole" / name)
