"""Runs that are killed without warning, and two runs into one output."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import save_with_tokenizer, write_texts
from models import GROUPED, documents
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_structprune.commands.cli import main


# Forks once the libraries are loaded, so that kills meet the work and not the imports.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from optimum_structprune import pruner
from optimum_structprune.commands import loading, prune
from optimum_structprune.commands.cli import main
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

model, folder, text = map(Path, sys.argv[1:4])

def killed_after(owner, name, ready):
    before = getattr(owner, name)
    def call(*args, **settings):
        value = before(*args, **settings)
        if ready(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return value
    setattr(owner, name, call)

def kill_at(moment, progress):
    remembered = []
    def third(path, target):
        remembered.extend([target] if progress in Path(target).parents else [])
        return len(remembered) == 3
    if moment == "gathering":
        killed_after(Path, "replace", lambda *paths: third(*paths) and False)
        killed_after(modeling_llama.LlamaMLP, "forward", lambda *inputs: len(remembered) == 3)
    elif moment == "between layers":
        killed_after(Path, "replace", third)
    elif moment == "saving":
        killed_after(PreTrainedModel, "save_pretrained", lambda *args: True)
    elif moment == "replacing":
        killed_after(Path, "rename", lambda path, target: Path(target).name == "former")

def run(out, moment=None):
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        if isinstance(moment, str):
            kill_at(moment, folder / f".{out}.progress")
        flags = "--width mlp=24 --width attention=2 --num-samples 6 --seq-length 24 --device cpu --quiet"
        more = ["--domain", f"a={text}", "--offload", "disk", "--resume", "--overwrite"]
        os._exit(main(["prune", str(model), str(folder / out), *flags.split(), *more]))
    if isinstance(moment, float):
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, time.monotonic() - begun

code, length = run("whole")
assert code == 0
draw = random.Random(0)
# A first run takes longer than those that follow it.
moments = sys.argv[4:] or [draw.uniform(0.0, length := run("whole")[1]) for _ in range(10)]
for number, moment in enumerate(moments):
    out = f"out-{number}"
    if moment == "replacing":
        assert run(out)[0] == 0
    code, _ = run(out, moment)
    print(number, code, (folder / out).exists(), sorted(path.name for path in folder.glob(f".{out}.*")), flush=True)
    assert isinstance(moment, float) or code == -signal.SIGKILL, code
    # The half of a run, the next time all of it.
    again = draw.uniform(0.0, length) if isinstance(moment, float) else None
    while code:
        assert code == -signal.SIGKILL, code
        code, _ = run(out, again)
        again = None
"""


def entries(path: Path) -> dict:
    """A record of a run, without what depends on the clock and on the process."""
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "resumed")}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    torch.manual_seed(0)
    fields = {**GROUPED, "num_hidden_layers": 4}
    save_with_tokenizer(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)), folder / "model")
    write_texts(folder / "a.jsonl", documents(80))
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


MOMENTS = ("gathering", "between layers", "saving", "replacing")


@pytest.mark.slow
@pytest.mark.parametrize("moments", [MOMENTS, pytest.param((), marks=pytest.mark.nightly)], ids=["chosen", "random"])
def test_a_run_that_was_killed_at_any_moment_comes_to_the_same_result(dense, tmp_path, moments):
    command = [sys.executable, "-c", SCRIPT, dense / "model", tmp_path, dense / "a.jsonl", *moments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" -{signal.SIGKILL:d} " in done.stdout
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    # What was killed has left nothing behind.
    names = [f"out-{number}" for number in range(len(moments) or 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "whole"]
    for out in (tmp_path / name for name in names):
        weights = load_file(out / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        for name in ("pruning_plan.json", "report.json"):
            assert entries(out / name) == entries(tmp_path / "whole" / name)


# A model that is streamed writes no text beside the domain, so none is written in memory either.
FLAGS = "--width mlp=24 --width attention=2 --general-share 0 --num-samples 6 --seq-length 24 --device cpu".split()


def launched(arguments) -> list:
    """The command line of `structprune` in two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [sys.executable, *launch, "-m", "optimum_structprune", *map(str, arguments)]


def run(arguments) -> subprocess.CompletedProcess:
    return subprocess.run(launched(arguments), capture_output=True, text=True, env=environment(), timeout=300)


def pruning(dense, out, *flags) -> list:
    return ["prune", dense / "model", out, *FLAGS, "--domain", f"a={dense / 'a.jsonl'}", *flags]


def test_a_run_that_is_asked_to_end_leaves_nothing(dense, tmp_path, monkeypatch):
    save, before = PreTrainedModel.save_pretrained, signal.getsignal(signal.SIGTERM)
    ended = lambda *args, **fields: (save(*args, **fields), os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", ended)
    try:
        assert main([*map(str, pruning(dense, tmp_path / "out", "--offload", "disk"))]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.nightly
def test_two_processes_go_on_where_two_were_killed(dense, tmp_path):
    alone = dense / "alone"
    assert main(list(map(str, pruning(dense, alone)))) == 0
    command = launched(pruning(dense, tmp_path / "out", "--resume"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    progress = tmp_path / ".out.progress"
    while process.poll() is None and not any(progress.glob("layer-*.json")):
        time.sleep(0.002)
    for each in [process.pid, *map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]:
        os.kill(each, signal.SIGKILL)
    process.wait()
    wrong = run(pruning(dense, tmp_path / "wrong", "--criterion", "nope"))
    assert wrong.returncode != 0 and "structprune: error: " in wrong.stderr, "an error of one process ends all"
    assert any(progress.glob("layer-*.json")) and not (tmp_path / "out").exists()
    done = run(pruning(dense, tmp_path / "out", "--resume"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "pruning_plan.json").read_text() == (alone / "pruning_plan.json").read_text()
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", alone))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
