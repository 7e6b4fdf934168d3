"""Several processes save one folder: the first one writes, the others get the same outcome."""

import pytest
from helpers import on_two_ranks


SCRIPT = """
import sys, os
import torch.distributed as dist
from pathlib import Path
from models import build, config, tokenizer
from optimum_structprune import StructPruneError, StructPruner
from optimum_structprune.system.disk import Output

folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])
pruner = StructPruner(config())
pruned = pruner.prune_model(build("llama-tied"), tokenizer())

def save_both(out):
    for _ in range(2):
        pruner.save(pruned, out, tokenizer(), overwrite=True)
    with Output(out.parent / "more").staged() as staging:
        (staging / "rank.txt").write_text(str(rank))
    assert (out / "model.safetensors").is_file() and (out.parent / "more" / "rank.txt").read_text() == "0"

save_both(folder / "apart" / "small")
dist.init_process_group("gloo")
save_both(folder / "together" / "small")
if rank == 0:
    pruner.save(pruned, folder / "first" / "small")
(folder / "error" / "small" / "mine").mkdir(parents=True, exist_ok=True)
try:
    pruner.save(pruned, folder / "error" / "small", overwrite=True)
except StructPruneError as error:
    print(f"rank {rank}: {error}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_process_saves_and_all_get_its_outcome(tmp_path):
    done = on_two_ranks(SCRIPT, tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for mode, names in {"apart": ["more", "small"], "together": ["more", "small"], "first": ["small"]}.items():
        assert sorted(path.name for path in (tmp_path / "out" / mode).iterdir()) == names
        assert (tmp_path / "out" / mode / "small" / "report.json").is_file()
    for rank in (0, 1):
        assert f"rank {rank}: " in done.stdout
    assert done.stdout.count("rank") == done.stdout.count("is no result of structprune") == 2
    assert [path.name for path in (tmp_path / "out" / "error" / "small").iterdir()] == ["mine"]
