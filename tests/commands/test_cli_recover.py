"""`structprune recover` and `structprune prune --recover`."""

import json
import shutil
from unittest.mock import patch

import pytest
from filelock import FileLock, Timeout
from helpers import error_line, save_desk
from models import build, config, tokenizer
from transformers import AutoModelForCausalLM, Trainer

from optimum_structprune import Recovery, StructPruner
from optimum_structprune.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_desk(tmp_path_factory.mktemp("cli"), count=200)
    pruner = StructPruner(config())
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), folder / "pruned", tokenizer=tokenizer())
    return folder


def command(folder, *extra, output="out"):
    flags = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--tokens", "96", "--device", "cpu"]
    training = ["--training", "disable_tqdm=true", "--training", "learning_rate=1e-2", "--lora", "r=2"]
    return ["recover", str(folder / "pruned"), str(folder / output), *flags, *training, *extra]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def interrupted():
    """The training, which is interrupted when it begins."""
    with patch.object(Recovery, "recover_model", autospec=True, side_effect=KeyboardInterrupt) as training:
        yield training


@pytest.mark.parametrize("spelling", ["spelt", "spelt/.", "other/../spelt"])
def test_what_lies_beside_an_output_lies_there_however_it_is_written(folder, monkeypatch, spelling, interrupted):
    monkeypatch.chdir(folder)
    line = command(folder, output="spelt")
    assert main([spelling if word == str(folder / "spelt") else word for word in line]) == 130
    assert interrupted.call_args.args[0].config.training["output_dir"] == str(folder / "spelt.checkpoints")


@pytest.mark.slow
def test_a_training_that_brings_nothing_saves_the_pruned_model_and_says_so(folder, capsys):
    arguments = ["prune", str(folder / "model"), str(folder / "kept"), "--width", "mlp=24", "--num-samples", "6"]
    line = [*arguments, "--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu"]
    assert main(line) == 0
    pruned = files(folder / "kept")["model.safetensors"]
    training = "{tokens: 240, training: {disable_tqdm: true, learning_rate: 0.0}}"
    (folder / "bad.yaml").write_text(f"recovery: {training}\n")
    capsys.readouterr()
    assert main([*line, "--config", str(folder / "bad.yaml"), "--overwrite", "--json"]) == 0
    shown = capsys.readouterr()
    values = json.loads(shown.out)
    assert values["domains"]["a"]["perplexity"]["pruned"] > 0 and values["recovery"]["kept_step"] == 0
    assert f"The pruned model is saved to {folder / 'kept'}" in shown.err
    assert files(folder / "kept")["model.safetensors"] == pruned
    assert json.loads((folder / "kept" / "recovery_report.json").read_text())["tokens"] > 0


def test_a_result_has_the_records_of_the_model_that_was_read(folder, tmp_path, capsys, monkeypatch):
    """Another model takes its place while it is trained."""
    pruned = shutil.copytree(folder / "pruned", tmp_path / "pruned")
    before, original = files(pruned), Trainer.train

    def replacing(*args, **kwargs):
        found = original(*args, **kwargs)
        pruner = StructPruner(config(widths={"mlp": 16}))
        pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), pruned, tokenizer(), overwrite=True)
        return found

    monkeypatch.setattr(Trainer, "train", replacing)
    line = command(folder, output=tmp_path / "out")
    code = main([str(pruned) if word == str(folder / "pruned") else word for word in line])
    assert code == 0 and files(pruned)["pruning_plan.json"] != before["pruning_plan.json"]
    records, out = ("structprune_config.json", "pruning_plan.json", "report.json"), files(tmp_path / "out")
    assert all(out[name] == before[name] for name in records)
    assert {"recovery_report.json", "recovery_config.json"} <= out.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "out"}, "checkpoints are gone"
    shown = capsys.readouterr().out
    assert "Perplexity relative to the pruned model after training: a " in shown and "Recovery: " in shown
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24


def test_a_card_repeats_the_last_pruning_and_no_training_without_those_before(folder, tmp_path, capsys):
    once, twice, smaller = (tmp_path / name for name in ("once", "twice", "smaller"))
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--num-samples", "6", "--seq-length", "24", "--device", "cpu"]
    assert main(["prune", str(folder / "model"), str(once), "--width", "mlp=24", *text, "--recovery-tokens=240"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Verdict: ") == shown.count("Perplexity relative to the original") == 1
    assert f"Report: {once}/report.html" in shown and "Next: structprune evaluate " in shown
    assert main([str(once) if word == str(folder / "pruned") else word for word in command(folder, output=twice)]) == 0
    assert main(["prune", str(once), str(smaller), "--width", "mlp=16", *text]) == 0
    earlier = json.loads((twice / "recovery_report.json").read_text())["earlier"]
    assert earlier == [json.loads((once / "recovery_config.json").read_text())]
    for result, repeats in ((once, {"prune", "recover"}), (twice, set()), (smaller, {"prune"})):
        card = (result / "README.md").read_text()
        assert {name for name in ("prune", "recover") if f"\nstructprune {name}" in card} == repeats
        assert ("## Recovery" in card) == (result is not smaller)


def test_a_second_run_into_the_same_output_is_refused_while_the_first_trains(folder, capsys, monkeypatch):
    def train(*args, **kwargs):
        with pytest.raises(Timeout), FileLock(folder / ".held.lock", timeout=0):
            raise AssertionError
        raise KeyboardInterrupt

    monkeypatch.setattr(Recovery, "recover_model", train)
    assert main(command(folder, output="held")) == 130
    capsys.readouterr()
    with FileLock(folder / ".held.lock"):
        assert main(command(folder, output="held")) == 2
    assert "Another run writes to" in error_line(capsys)


def test_code_of_the_teacher_is_run_where_it_is_allowed(folder, interrupted, capsys):
    prune = ["prune", str(folder / "model"), str(folder / "trusted"), "--width", "mlp=24", "--num-samples", "6"]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu", "--recovery-tokens", "240"]
    (folder / "trusted.checkpoints" / "checkpoint-2").mkdir(parents=True)
    assert main([*prune, *text, "--trust-remote-code"]) == 130
    assert f"--teacher {folder / 'model'} --trust-remote-code --overwrite --resume" in capsys.readouterr().err
    assert main(command(folder, "--teacher", str(folder / "model"), output="distrusted")) == 130
    assert "--resume" not in capsys.readouterr().err, "there is no checkpoint yet, which would be refused"
    assert [call.kwargs["trust_remote_code"] for call in interrupted.call_args_list] == [True, False]
