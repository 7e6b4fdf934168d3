"""Test `structprune recover` and `structprune prune --recover`."""

import json
import shutil
from unittest.mock import Mock, patch

import pytest
from filelock import FileLock, Timeout
from helpers import error_line, save_desk, save_with_tokenizer
from models import build, config, real_text_model, tokenizer
from transformers import AutoModelForCausalLM, Trainer

from optimum_structprune import Recovery, StructPruneError, StructPruner
from optimum_structprune.commands.cli import main
from optimum_structprune.measure.languages import cost_by_language


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model, a text, and the model pruned in memory."""
    folder = save_desk(tmp_path_factory.mktemp("cli"), count=200)
    pruner = StructPruner(config())
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), folder / "pruned", tokenizer=tokenizer())
    return folder


def text_flags(folder):
    return ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu"]


def prune_command(folder, model, output, width=24):
    """Return the arguments that prune `model` into `output`, on the text of `folder`."""
    line = ["prune", str(model), str(output), "--width", f"mlp={width}", "--num-samples", "6"]
    return line + text_flags(folder)


def recover_command(folder, *flags, pruned="pruned", output="out"):
    """Return the arguments that train the model `pruned` into `output`, by their paths from `folder`."""
    line = ["recover", str(folder / pruned), str(folder / output), "--tokens", "96"]
    training = ["--training", "disable_tqdm=true", "--training", "learning_rate=1e-2", "--lora", "r=2"]
    return line + text_flags(folder) + training + list(flags)


def read_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture
def interrupted_training():
    """Interrupt every training at its beginning."""
    with patch.object(Recovery, "recover_model", autospec=True, side_effect=KeyboardInterrupt) as training:
        yield training


@pytest.mark.parametrize("flags", [[], ["--teacher-cache", "cache"]])
def test_a_teacher_with_the_weights_of_the_model_is_refused(folder, flags, capsys, tmp_path):
    shutil.copytree(folder / "pruned", tmp_path / "copy")
    for teacher in (folder / "pruned", tmp_path / "copy"):
        assert main(recover_command(folder, "--teacher", str(teacher), *flags, output="same")) == 2
        assert "are the same model. Pass the original model" in error_line(capsys)
    assert not (folder / "same").exists()


@pytest.mark.parametrize("spelling", ["spelt", "spelt/.", "other/../spelt"])
def test_checkpoints_are_next_to_the_output_for_any_spelling(folder, monkeypatch, spelling, interrupted_training):
    monkeypatch.chdir(folder)
    line = recover_command(folder)
    line[2] = spelling

    assert main(line) == 130

    recovery = interrupted_training.call_args.args[0]
    assert recovery.config.training["output_dir"] == str(folder / "spelt.checkpoints")


@pytest.mark.slow
def test_a_training_without_a_gain_saves_the_pruned_model_and_reports_it(folder, capsys):
    output = folder / "kept"
    line = prune_command(folder, folder / "model", output)
    assert main(line) == 0
    pruned_weights = read_files(output)["model.safetensors"]
    recovery = "{tokens: 240, training: {disable_tqdm: true, learning_rate: 0.0}}"
    (folder / "bad.yaml").write_text(f"recovery: {recovery}\n")
    capsys.readouterr()

    assert main(line + ["--config", str(folder / "bad.yaml"), "--overwrite", "--json"]) == 0

    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["domains"]["a"]["perplexity"]["pruned"] > 0
    assert values["recovery"]["kept_step"] == 0
    assert f"The pruned model is saved to {output}" in printed.err
    assert read_files(output)["model.safetensors"] == pruned_weights
    assert read_json(output / "recovery_report.json")["tokens"] > 0


def test_a_result_has_the_records_of_the_model_that_was_loaded(folder, tmp_path, capsys, monkeypatch):
    """Another model replaces the loaded one on disk during the training."""
    pruned = shutil.copytree(folder / "pruned", tmp_path / "pruned")
    files_before = read_files(pruned)
    train = Trainer.train

    def train_and_replace(*args, **kwargs):
        training_output = train(*args, **kwargs)
        pruner = StructPruner(config(widths={"mlp": 16}))
        pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), pruned, tokenizer(), overwrite=True)
        return training_output

    monkeypatch.setattr(Trainer, "train", train_and_replace)
    assert main(recover_command(folder, pruned=pruned, output=tmp_path / "out")) == 0

    assert read_files(pruned)["pruning_plan.json"] != files_before["pruning_plan.json"]
    output = read_files(tmp_path / "out")
    for name in ("structprune_config.json", "pruning_plan.json", "report.json"):
        assert output[name] == files_before[name]
    assert {"recovery_report.json", "recovery_config.json"} <= output.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "out"}, "the checkpoints are removed"

    printed = capsys.readouterr().out
    assert "Perplexity relative to the pruned model after training: a " in printed
    assert "Recovery: " in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24


def test_a_report_has_the_configs_of_earlier_trainings(folder, tmp_path, capsys):
    once = tmp_path / "once"
    twice = tmp_path / "twice"
    smaller = tmp_path / "smaller"

    assert main(prune_command(folder, folder / "model", once) + ["--recovery-tokens=240"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Verdict: ") == 1
    assert printed.count("Perplexity relative to the original") == 1
    assert f"Report: {once}/report.html" in printed
    assert "Next: structprune evaluate " in printed

    assert main(recover_command(folder, pruned=once, output=twice)) == 0
    assert main(prune_command(folder, once, smaller, width=16)) == 0
    earlier = read_json(twice / "recovery_report.json")["earlier"]
    assert earlier == [read_json(once / "recovery_config.json")]

    for result in (once, twice, smaller):
        card = (result / "README.md").read_text()
        assert ("## Recovery" in card) == (result is not smaller)


def test_a_second_run_into_the_same_output_is_refused_during_the_training(folder, capsys, monkeypatch):
    def train(*args, **kwargs):
        with pytest.raises(Timeout), FileLock(folder / ".held.lock", timeout=0):
            raise AssertionError
        raise KeyboardInterrupt

    monkeypatch.setattr(Recovery, "recover_model", train)
    assert main(recover_command(folder, output="held")) == 130
    capsys.readouterr()

    with FileLock(folder / ".held.lock"):
        assert main(recover_command(folder, output="held")) == 2
    assert "Another run writes to" in error_line(capsys)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StructPruneError("has 3.0 kB left")])
def test_a_training_whose_result_was_not_saved_resumes_to_it(folder, tmp_path, capsys, monkeypatch, error):
    line = recover_command(folder, "--training", "save_steps=1")
    line[2] = str(tmp_path / "whole")
    assert main(line) == 0

    line[2] = str(tmp_path / "out")
    with monkeypatch.context() as patches:
        patches.setattr(Recovery, "save", Mock(side_effect=error))
        assert main(line) in (2, 130)
    assert f"recover {folder / 'pruned'} {tmp_path / 'out'} --resume` and the same settings" in capsys.readouterr().err

    assert main([*line, "--resume"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_training_after_pruning_reads_the_text_of_the_saved_config(folder, interrupted_training):
    line = prune_command(folder, folder / "model", folder / "general") + ["--general-share", "0.3"]
    assert main(line + ["--recovery-tokens", "240"]) == 130

    pruning = interrupted_training.call_args.args[0].pruning
    saved = read_json(folder / "general" / "structprune_config.json")
    assert pruning.general_text is not None
    assert pruning.general_text == saved["general_text"]


def test_too_little_training_text_is_refused_before_the_pruning(folder, capsys):
    line = prune_command(folder, folder / "model", folder / "small-text")

    assert main(line + ["--recovery-tokens", "200000"]) == 2

    assert "more than 4 passes" in error_line(capsys)
    assert not (folder / "small-text").exists()


@pytest.mark.slow
def test_prune_reports_the_languages_of_the_recovered_model(tmp_path, capsys):
    original, words = real_text_model()
    save_with_tokenizer(original, tmp_path / "model", words)
    output = tmp_path / "out"
    line = ["prune", str(tmp_path / "model"), str(output), "--width", "mlp=256", "--languages", "en", "--json"]
    line += ["--domain", "math=builtin:math", "--num-samples", "6", "--seq-length", "32", "--general-share", "0"]
    training = "{tokens: 960, answer_share: 0.0, training: {disable_tqdm: true, learning_rate: 0.0003}}"
    (tmp_path / "run.yaml").write_text(f"recovery: {training}\n")

    assert main([*line, "--config", str(tmp_path / "run.yaml"), "--device", "cpu"]) == 0

    printed = json.loads(capsys.readouterr().out)
    recovered = AutoModelForCausalLM.from_pretrained(output)
    assert printed["recovery"]["kept_step"]
    cost = cost_by_language(recovered, words, ["en"], ["en"])["en"]
    for report in (printed, read_json(output / "report.json")):
        assert report["languages"]["en"]["cost"]["pruned"] == pytest.approx(cost)


def test_code_of_the_teacher_runs_only_with_the_flag(folder, interrupted_training, capsys):
    (folder / "trusted.checkpoints" / "checkpoint-2").mkdir(parents=True)
    line = prune_command(folder, folder / "model", folder / "trusted")
    assert main(line + ["--recovery-tokens", "240", "--trust-remote-code"]) == 130
    assert f"--teacher {folder / 'model'} --trust-remote-code --overwrite --resume" in capsys.readouterr().err

    line = recover_command(folder, "--teacher", str(folder / "model"), output="distrusted")
    assert main(line) == 130
    assert "--resume" not in capsys.readouterr().err, "the command refuses --resume without a checkpoint"

    trusted = [call.kwargs["trust_remote_code"] for call in interrupted_training.call_args_list]
    assert trusted == [True, False]


@pytest.mark.slow
def test_a_second_recovery_from_a_teacher_cache_needs_no_teacher(folder, tmp_path):
    cache = ["--teacher-cache", str(tmp_path / "cache")]
    line = recover_command(folder, *cache, output=tmp_path / "first")
    assert main(line + ["--teacher", str(folder / "model")]) == 0
    assert main(recover_command(folder, *cache, "--seed", "1", output=tmp_path / "second")) == 0
    assert (tmp_path / "second" / "model.safetensors").is_file()
