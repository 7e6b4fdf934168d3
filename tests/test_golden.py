"""What a pruning gives, to the bit, and how much of the package a default one runs through."""

import json
import os
import sys
from pathlib import Path

import golden
import pytest
import torch
from helpers import on_two_ranks, ran


KNOWN = json.loads(golden.FILE.read_text())
# Another torch may sum in another order, and a processor of another kind has other instructions.
known_bits = pytest.mark.skipif(
    not torch.__version__.startswith("2.13.") or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason=f"the bits are known of torch 2.13 on x86 with AVX2, not of torch {torch.__version__} here",
)
# A default pruning that is saved runs through so many files and named functions at most, and an import of the pruner
# loads so many modules of the package; these numbers only fall.
MOST_FILES, MOST_FUNCTIONS = 42, 422
MOST_MODULES = 52


# One run of each kind of thing that is removed, and of what reaches it in another way; the others take long together.
SHORT = ("uniform", "attention", "budget", "hidden", "vocab", "rounds", "experts", "offload")
LONG = tuple(name for name in golden.RUNS if name not in SHORT)


@known_bits
@pytest.mark.parametrize("names", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_plans_and_weights_are_known_to_the_bit(names):
    assert golden.portable([*names]) == {name: KNOWN[name] for name in names}


TWO = ("uniform", "sensitivity", "rounds", "experts", "vocab")
SCRIPT = """
import json, sys
from pathlib import Path
import golden
import torch
import torch.distributed as dist
from accelerate import PartialState

PartialState(cpu=True)
torch.set_num_threads(1)
for name in sys.argv[2:]:
    print("HASHES", name, json.dumps(golden.run(name, Path(sys.argv[1]))))
dist.destroy_process_group()
"""


@known_bits
@pytest.mark.slow
def test_two_processes_give_the_same_bits(tmp_path, monkeypatch):
    for variable, value in golden.PORTABLE.items():
        monkeypatch.setenv(variable, value)
    done = on_two_ranks(SCRIPT, tmp_path, tmp_path, *TWO)
    lines = [line.split(maxsplit=2)[1:] for line in done.stdout.splitlines() if line.startswith("HASHES")]
    both = [(name, json.loads(hashes)) for name, hashes in lines]
    assert sorted(name for name, _ in both) == sorted(TWO * 2)
    for name, hashes in both:
        assert hashes == KNOWN[name], name


# In a process of its own: what other tests leave behind (a cached template, a late finalizer) would count.
TRACED = """
import sys
from inspect import CO_OPTIMIZED
from pathlib import Path
import optimum_structprune.pruner
modules = sum(name.startswith("optimum_structprune") for name in sys.modules)
import golden
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum_structprune import StructPruneConfig, StructPruner

root, seen = str(Path(optimum_structprune.__file__).parent), set()

def see(frame, event, argument):
    code = frame.f_code
    is_function = event == "call" and code.co_flags & CO_OPTIMIZED  # and no body of a class that is imported late
    named = not code.co_name.startswith("<") and code.co_filename.endswith(".py")
    if is_function and named and code.co_filename.startswith(root):
        seen.add((code.co_filename.removeprefix(root), code.co_qualname))

model, reader = AutoModelForCausalLM.from_pretrained(golden.TINY), AutoTokenizer.from_pretrained(golden.TINY)
pruner = StructPruner(StructPruneConfig(sparsity=0.2, num_samples=8, seq_length=64))
sys.setprofile(see)
pruner.save(pruner.prune_model(model, reader), sys.argv[1], tokenizer=reader)
sys.setprofile(None)
print(len({file for file, _ in seen}), len(seen), modules)
"""


def test_a_default_pruning_runs_through_few_files_and_imports_few_modules(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(golden.__file__).parent)}
    shown = ran([sys.executable, "-c", TRACED, tmp_path / "small"], env=environment)
    files, functions, modules = map(int, shown.split()[-3:])
    assert files <= MOST_FILES and functions <= MOST_FUNCTIONS, (files, functions)
    assert modules <= MOST_MODULES
