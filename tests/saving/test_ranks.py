"""Several processes save one folder: the first one writes, the others get the same outcome."""

import pytest
from helpers import on_two_ranks


SCRIPT = """
import sys, os
import torch.distributed as dist
from pathlib import Path
from models import build, config, tokenizer
from optimum_structprune import StructPruneError, StructPruner
from optimum_structprune.saving.staging import staged

out, mode = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
if mode != "apart":
    dist.init_process_group("gloo")
pruner = StructPruner(config())
pruned = pruner.prune_model(build("llama-tied"), tokenizer())
try:
    if mode == "error":
        (out / "mine").mkdir(parents=True, exist_ok=True)
        pruner.save(pruned, out, overwrite=True)
    elif mode == "first only":
        if rank == 0:
            pruner.save(pruned, out)
    else:
        for _ in range(2):
            pruner.save(pruned, out, tokenizer(), overwrite=True)
        with staged(out.parent / "more", False) as folder:
            (folder / "rank.txt").write_text(str(rank))
        assert (out / "model.safetensors").is_file() and (out.parent / "more" / "rank.txt").read_text() == "0"
except StructPruneError as error:
    print(f"rank {rank}: {error}", flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
"""


def launch(tmp_path, mode):
    return on_two_ranks(SCRIPT, tmp_path, tmp_path / "out" / "small", mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["together", "apart", "first only"])
def test_one_process_saves_and_all_go_on(tmp_path, mode):
    done = launch(tmp_path, mode)
    assert done.returncode == 0, done.stderr
    assert "rank" not in done.stdout
    names = {"together": ["more", "small"], "apart": ["more", "small"], "first only": ["small"]}[mode]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "small" / "report.json").is_file()


@pytest.mark.slow
def test_an_error_of_the_first_process_is_one_of_all(tmp_path):
    done = launch(tmp_path, "error")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank}: " in done.stdout
    assert done.stdout.count("is no result of structprune") == 2
    assert [path.name for path in (tmp_path / "out" / "small").iterdir()] == ["mine"]
