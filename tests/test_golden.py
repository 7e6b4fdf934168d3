"""Check plans and weights of a set of prunings bit by bit."""

import json

import golden
import pytest
import torch
from helpers import on_two_ranks


KNOWN = json.loads(golden.FILE.read_text())
# Another torch may sum in another order, and a processor of another kind has other instructions.
known_bits = pytest.mark.skipif(
    not torch.__version__.startswith("2.13.") or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason=f"the bits are known of torch 2.13 on x86 with AVX2, not of torch {torch.__version__} here",
)


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
