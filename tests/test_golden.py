"""Plans and weights of a set of prunings are reproduced bit by bit."""

import json

import golden
import pytest
import torch
from helpers import on_two_ranks


KNOWN = json.loads(golden.FILE.read_text())
# Another version of torch may sum in another order, and another processor has other instructions.
known_bits = pytest.mark.skipif(
    not torch.__version__.startswith("2.13.") or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason=f"the hashes are those of torch 2.13 on x86 with AVX2; here is torch {torch.__version__}",
)


# These runs cover each kind of unit, a budget, rounds and an offloaded model. The other runs take long.
SHORT = ("uniform", "attention", "budget", "hidden", "vocab", "rounds", "experts", "offload")
LONG = tuple(name for name in golden.RUNS if name not in SHORT)


@known_bits
@pytest.mark.parametrize("names", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_plans_and_weights_match_the_recorded_hashes(names):
    hashes = golden.portable(list(names))
    assert hashes == {name: KNOWN[name] for name in names}


TWO = ("uniform", "sensitivity", "rounds", "experts", "vocab")
SCRIPT = """
import json, sys
from pathlib import Path
import golden
import torch
from accelerate import PartialState

PartialState(cpu=True)
torch.set_num_threads(1)
for name in sys.argv[2:]:
    print("HASHES", name, json.dumps(golden.run(name, Path(sys.argv[1]))))
"""


@known_bits
@pytest.mark.slow
def test_two_processes_compute_the_same_bits(tmp_path, monkeypatch):
    for variable, value in golden.PORTABLE.items():
        monkeypatch.setenv(variable, value)
    process = on_two_ranks(SCRIPT, tmp_path, tmp_path, *TWO)

    names = []
    for line in process.stdout.splitlines():
        if line.startswith("HASHES"):
            _, name, hashes = line.split(maxsplit=2)
            assert json.loads(hashes) == KNOWN[name], name
            names.append(name)
    assert sorted(names) == sorted(TWO * 2)
