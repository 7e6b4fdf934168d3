"""Test runs that are killed without warning, and launches of two processes."""

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

from optimum_structprune.commands.cli import CommandParser, main


# Prune in forks of one process, so that kills happen during the work and not during the imports.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from optimum_structprune import pruner
from optimum_structprune.commands import loading, prune
from optimum_structprune.commands.cli import main
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

model, folder, text = map(Path, sys.argv[1:4])

def kill_after(owner, name, is_due):
    function = getattr(owner, name)

    def call(*args, **settings):
        result = function(*args, **settings)
        if is_due(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)

def kill_at(moment, progress):
    written = []

    def count_file(path, target):
        if progress in Path(target).parents:
            written.append(target)
        return False

    def is_third_file(path, target):
        count_file(path, target)
        return len(written) == 3

    if moment == "gathering":
        kill_after(Path, "replace", count_file)
        kill_after(modeling_llama.LlamaMLP, "forward", lambda *inputs: len(written) == 3)
    elif moment == "between layers":
        kill_after(Path, "replace", is_third_file)
    elif moment == "saving":
        kill_after(PreTrainedModel, "save_pretrained", lambda *args: True)
    elif moment == "replacing":
        kill_after(Path, "rename", lambda path, target: Path(target).name == "former")

def run(out, moment=None):
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        if isinstance(moment, str):
            kill_at(moment, folder / f".{out}.progress")
        line = ["prune", str(model), str(folder / out), "--domain", f"a={text}"]
        line += "--width mlp=24 --width attention=2 --num-samples 6 --seq-length 24 --device cpu --quiet".split()
        line += ["--offload", "disk", "--resume", "--overwrite"]
        os._exit(main(line))

    if isinstance(moment, float):
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begin

code, length = run("whole")
assert code == 0

draw = random.Random(0)
moments = sys.argv[4:]
if not moments:
    # A first run takes longer than the following runs.
    for _ in range(10):
        code, length = run("whole")
        moments.append(draw.uniform(0.0, length))

for number, moment in enumerate(moments):
    out = f"out-{number}"
    if moment == "replacing":
        code, _ = run(out)
        assert code == 0

    code, _ = run(out, moment)
    siblings = sorted(path.name for path in folder.glob(f".{out}.*"))
    print(number, code, (folder / out).exists(), siblings, flush=True)
    assert isinstance(moment, float) or code == -signal.SIGKILL, code

    # After a random moment, kill the second run as well, and let the third run end.
    next_moment = None
    if isinstance(moment, float):
        next_moment = draw.uniform(0.0, length)
    while code:
        assert code == -signal.SIGKILL, code
        code, _ = run(out, next_moment)
        next_moment = None
"""


def read_record(path: Path) -> dict:
    """Return the record of a run without the entries that depend on the clock and on the process."""
    record = json.loads(path.read_text())
    return {name: value for name, value in record.items() if name not in ("seconds", "resumed")}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(GROUPED | {"num_hidden_layers": 4}))
    save_with_tokenizer(AutoModelForCausalLM.from_config(config), folder / "model")
    write_texts(folder / "a.jsonl", documents(80))
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


MOMENTS = ["gathering", "between layers", "saving", "replacing"]


@pytest.mark.slow
@pytest.mark.parametrize("moments", [MOMENTS, pytest.param([], marks=pytest.mark.nightly)], ids=["chosen", "random"])
def test_a_run_that_was_killed_at_any_moment_resumes_to_the_same_result(original, tmp_path, moments):
    command = [sys.executable, "-c", SCRIPT, original / "model", tmp_path, original / "a.jsonl"] + moments
    process = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f" -{signal.SIGKILL:d} " in process.stdout

    # No killed run leaves a working folder.
    outputs = [f"out-{number}" for number in range(len(moments) or 10)]
    assert names_in(tmp_path) == outputs + ["whole"]

    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for output in outputs:
        weights = load_file(tmp_path / output / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        for file in ("pruning_plan.json", "report.json"):
            assert read_record(tmp_path / output / file) == read_record(tmp_path / "whole" / file)


def prune_command(original, out, *flags) -> list[str]:
    line = ["prune", str(original / "model"), str(out), "--domain", f"a={original / 'a.jsonl'}"]
    line += ["--width", "mlp=24", "--width", "attention=2", "--num-samples", "6", "--seq-length", "24"]
    # An offloaded model writes no general text. A run in memory must not write one either.
    line += ["--general-share", "0", "--device", "cpu"]
    return line + list(flags)


def launch_command(line) -> list[str]:
    """Return the command that runs a command line of `structprune` in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return launch + ["-m", "optimum_structprune"] + line


def launch(line) -> subprocess.CompletedProcess:
    return subprocess.run(launch_command(line), capture_output=True, text=True, env=environment(), timeout=300)


def test_a_run_that_receives_a_signal_to_end_leaves_no_file(original, tmp_path, monkeypatch):
    save = PreTrainedModel.save_pretrained
    handler = signal.getsignal(signal.SIGTERM)

    def save_and_end(*args, **fields):
        save(*args, **fields)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_and_end)
    try:
        assert main(prune_command(original, tmp_path / "out", "--offload", "disk")) == 130
    finally:
        signal.signal(signal.SIGTERM, handler)

    assert names_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_a_command_without_a_traceback(original, tmp_path, monkeypatch, number):
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(CommandParser, "parse_known_args", lambda *_: os.kill(os.getpid(), number))
    try:
        assert main(prune_command(original, tmp_path / "out")) == 130
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert names_in(tmp_path) == []


def children_of(process) -> list[int]:
    """Return the ids of the child processes of a process."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return list(map(int, children.split()))


@pytest.mark.nightly
def test_two_processes_resume_a_killed_run_of_two_processes(original, tmp_path):
    single = original / "alone"
    assert main(prune_command(original, single)) == 0

    # Kill the launcher and both processes as soon as one layer is on disk.
    line = prune_command(original, tmp_path / "out", "--resume")
    null = subprocess.DEVNULL
    process = subprocess.Popen(launch_command(line), stdout=null, stderr=null, env=environment())
    progress = tmp_path / ".out.progress"
    while process.poll() is None and not any(progress.glob("layer-*.json")):
        time.sleep(0.002)
    for process_id in [process.pid] + children_of(process):
        os.kill(process_id, signal.SIGKILL)
    process.wait()

    refused = launch(prune_command(original, tmp_path / "wrong", "--criterion", "nope"))
    assert refused.returncode != 0, "an error of one process ends all processes"
    assert "structprune: error: " in refused.stderr
    assert any(progress.glob("layer-*.json"))
    assert not (tmp_path / "out").exists()

    resumed = launch(line)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "out" / "pruning_plan.json").read_text() == (single / "pruning_plan.json").read_text()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(single / "model.safetensors")
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    assert names_in(tmp_path) == ["out"]
