"""Recovery restores quality and returns an ordinary model; mistakes are refused."""

import json
import re
from copy import deepcopy
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import cpu_offload
from helpers import count_hooks, failing, logits, recovery_config, same_weights, with_long
from models import CASES, build, config, documents, real_text_model, tokenizer
from trained import needs_shared, stories_config, stories_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from optimum_structprune import DomainConfig, Recovery, RecoveryConfig, StructPruner, evaluate, prune_model, recover
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import EXPERT
from optimum_structprune.config.pruning import StructPruneConfig
from optimum_structprune.config.recovery import LEARNING_RATES
from optimum_structprune.domains.load import texts_of
from optimum_structprune.domains.manifest import JUDGED, TRAINED, Manifest
from optimum_structprune.measure.languages import cost_by_language
from optimum_structprune.record.report import REPORT_NAME, Report
from optimum_structprune.recovery.adapter import adapted, lora_config
from optimum_structprune.recovery.text import TextStream, text_config, validation_text
from optimum_structprune.recovery.training import NothingGainedWarning
from optimum_structprune.system.errors import StructPruneError
from optimum_structprune.system.fingerprint import computing


FULL = {"train": "full", "lora": {}}


@pytest.mark.slow
@needs_shared
def test_recovery_closes_most_of_the_gap_on_a_trained_model(tmp_path, monkeypatch):
    original, words = stories_model()
    monkeypatch.setattr(StructPruneConfig, "holdout", 0.5)  # for more precise measurements
    pruning = stories_config()
    pruned = prune_model(original, pruning, words)
    # A training on fewer tokens is measured on fewer stories.
    recovery = Recovery(RecoveryConfig(tokens=52_000, training={"learning_rate": 3e-3}), pruning)
    recovered = recovery.recover_model(pruned, words, original)
    report = recovery.report

    for name, share in (("stories", 0.6), ("answers", 0.8), ("validation text", 1.0)):
        divergence = report.domains[name].divergence
        assert divergence.recovered < share * divergence.pruned
    perplexity = report.domains["stories"].perplexity
    assert perplexity.original < perplexity.recovered
    assert report.kept_step
    assert report.tokens == pytest.approx(52_000, rel=0.02)
    assert report.seconds > 0

    assert recovered is pruned
    assert type(recovered) is type(original)
    recovery.save(recovered, tmp_path / "out", words)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.config.intermediate_size == 96
    assert same_weights(reloaded, recovered)


class StopAfterFour(TrainerCallback):
    """Stops a training after four steps."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        control.should_training_stop = self.steps == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("fields", [{}, FULL])
def test_the_result_is_an_ordinary_model_and_callbacks_reach_the_trainer(pruned, small, fields, tmp_path):
    callback = StopAfterFour()
    training = {"save_steps": 2, "gradient_checkpointing": True}
    recovery = Recovery(recovery_config(training=training, **fields), callbacks=[callback])
    recovered = recovery.recover_model(pruned, tokenizer())
    # accelerate would not prepare a model with these attributes for the next training.
    assert {"forward", "_is_accelerate_prepared"}.isdisjoint(vars(recovered))
    assert callback.steps == 4
    assert recovery.report.steps == 4

    weights = recovered.state_dict()
    original = small.state_dict()
    changed = [name for name in weights if not torch.equal(weights[name], original[name])]
    assert recovered is pruned
    assert list(weights) == list(original)
    if fields == FULL:
        assert changed == list(original)
    else:
        assert changed

    assert recovered.training == small.training
    assert recovered.lm_head.weight is recovered.model.embed_tokens.weight
    assert computing(recovered.config) == computing(small.config)
    assert recovered.config.use_cache
    assert all(parameter.requires_grad for parameter in recovered.parameters())
    assert all(parameter.grad is None for parameter in recovered.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in recovered.modules())

    with pytest.raises(StructPruneError, match="`save` takes the model that `recover_model` returned"):
        recovery.save(small, tmp_path / "out")
    recovered.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(reloaded, recovered)
    assert torch.equal(logits(reloaded), logits(recovered))

    hidden = recovered.train().requires_grad_(False).get_input_embeddings()(torch.tensor([[3, 4]]))
    assert not hidden.requires_grad, "the training left a hook in the model"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_a_model_with_activation_checkpointing_keeps_its_hooks_and_gets_no_others(pruned):
    pruned.gradient_checkpointing_enable()
    original_hooks = count_hooks(pruned)

    recovered = recover(pruned, tokenizer(), recovery_config())
    assert recovered.is_gradient_checkpointing
    assert count_hooks(recovered) == original_hooks


class Spoiler(TrainerCallback):
    """Sets a trained weight to NaN before one step, and records the trained weights before every step."""

    def __init__(self, step: int):
        self.step = step
        self.history = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.history.append({name: p.detach().clone() for name, p in trained.items()})
        if state.global_step == self.step:
            next(iter(trained.values())).data.fill_(float("nan"))


@pytest.mark.slow
class Recorder(TrainerCallback):
    """Collects the logs of a Trainer, as the integrations of `report_to` do."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_training_shows_its_steps_tokens_and_divergence(pruned, terminal, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr("optimum_structprune.system.stages.MAX_SILENT_SECONDS", 0)
    recorder = Recorder()
    training = {"logging_steps": 1, "eval_steps": 4, "save_steps": 4, "disable_tqdm": None}
    recovery = Recovery(recovery_config(training=training), callbacks=[recorder])
    recovery.recover_model(deepcopy(pruned), tokenizer(), build("llama-tied"))

    printed = capsys.readouterr()
    lines = re.split(r"[\r\n]+", printed.err)
    assert printed.out == ""
    assert "{" not in printed.err
    assert "train_runtime" not in printed.err

    losses = [logs["kl"] for logs in recorder.logs if "kl" in logs]
    assert len(losses) == 10
    training_lines = [line for line in lines if line.startswith("Training:")]
    pattern = r"\d of 10 steps, (\d+) tokens, KL ([\d.]+), about"
    if terminal:
        pattern = r"\d/10 .*?(\d+) tokens, KL ([\d.]+)"
    shown = re.findall(pattern, "\n".join(training_lines))
    assert shown
    for tokens, loss in shown:
        # A step has two samples of 24 tokens. Its loss is logged after it was counted.
        number = int(tokens) // 48 - 1
        assert float(loss) == pytest.approx(sum(losses[:number]) / number, abs=1e-4)

    evaluations = [line for line in lines if re.fullmatch(r"Step \d+ of 10: validation KL [\d.]+", line)]
    assert len(evaluations) == 3
    assert any(line.startswith("Evaluating the checkpoint:") for line in lines)
    assert any("train_runtime" in logs for logs in recorder.logs), "callbacks get every log"


def test_the_bar_of_an_interrupted_training_ends(pruned, capsys, monkeypatch):
    """Otherwise the next message would stand behind the bar."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(Recorder, "on_log", failing(Recorder.on_log, 2, KeyboardInterrupt()))
    recovery = Recovery(recovery_config(training={"logging_steps": 1, "disable_tqdm": None}), callbacks=[Recorder()])
    with pytest.raises(KeyboardInterrupt) as caught:
        recovery.recover_model(deepcopy(pruned), tokenizer(), build("llama-tied"))

    assert caught.tb is not None
    last_line = re.split(r"\r", capsys.readouterr().err)[-1]
    assert last_line.startswith("Training:")
    assert last_line.endswith("\n")


def test_a_nan_loss_stops_the_training_and_restores_the_best_checkpoint(pruned):
    spoiler = Spoiler(step=5)
    recovery = Recovery(recovery_config(training={"save_steps": 2}, **FULL), callbacks=[spoiler])
    recovered = recovery.recover_model(pruned, tokenizer(), build("llama-tied", seed=1))

    report = recovery.report
    assert "loss of step 6 is nan" in report.stopped
    assert report.stopped in str(report)
    assert report.kept_step in (2, 4)

    weights = dict(recovered.named_parameters())
    for name, tensor in spoiler.history[report.kept_step].items():
        assert torch.equal(weights[name], tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optimum_structprune.recovery.training.NothingGainedWarning")
def test_a_nan_loss_in_the_first_step_restores_the_model(pruned):
    original = deepcopy(pruned)
    recovery = Recovery(recovery_config(), callbacks=[Spoiler(step=0)])
    recovered = recovery.recover_model(pruned, tokenizer())

    assert same_weights(recovered, original)
    assert "loss of step 1 is nan" in recovery.report.stopped
    assert recovery.report.kept_step == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optimum_structprune.recovery.training.NothingGainedWarning")
def test_nan_weights_of_the_last_step_are_not_kept(pruned, monkeypatch):
    training_step = Trainer.training_step

    def spoiled_step(self, model, inputs, *args, **kwargs):
        loss = training_step(self, model, inputs, *args, **kwargs)
        # The loss of the last step is finite, and no later loss could show that the weights are not.
        if self.state.global_step == self.state.max_steps - 1:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", spoiled_step)
    recovery = Recovery(recovery_config(training={"save_steps": 2}))
    recovered = recovery.recover_model(pruned, tokenizer(), build("llama-tied", seed=1))

    assert 0 < recovery.report.kept_step < recovery.report.steps
    assert all(torch.isfinite(parameter).all() for parameter in recovered.parameters())


@pytest.mark.parametrize(("rate", "fields"), [(0.0, {}), (1e3, FULL)])
def test_a_training_without_gain_returns_the_model_unchanged(pruned, small, rate, fields):
    recovery = Recovery(recovery_config(tokens=192, training={"learning_rate": rate}, **fields))
    with pytest.warns(NothingGainedWarning, match="no checkpoint was better"):
        recovered = recovery.recover_model(pruned, tokenizer())

    assert recovered is pruned
    assert torch.equal(logits(recovered), logits(small))
    assert recovery.report.kept_step == 0
    assert "no checkpoint was better" in str(recovery.report)


@pytest.fixture
def recover_at(pruned, monkeypatch):
    """Return a function that recovers a copy of the pruned model, where the default learning rate is another one."""

    def recover_copy(default_rate, settings, seed):
        monkeypatch.setitem(LEARNING_RATES, "lora", default_rate)
        recovery = Recovery(settings)
        teacher = build("llama-tied", seed=seed)
        recovered = recovery.recover_model(deepcopy(pruned), tokenizer(), teacher)
        return recovered, recovery.report

    return recover_copy


def test_a_good_default_learning_rate_is_used_like_a_named_one(recover_at):
    model, report = recover_at(3e-3, recovery_config(training={"learning_rate": None}), seed=1)
    explicit, _ = recover_at(3e-3, recovery_config(training={"learning_rate": 3e-3}), seed=1)

    assert report.learning_rate == 3e-3
    assert report.kept_step
    assert same_weights(model, explicit)


@pytest.mark.filterwarnings("ignore::optimum_structprune.recovery.training.NothingGainedWarning")
def test_a_default_learning_rate_is_lowered_if_its_first_step_is_too_large(recover_at):
    unnamed = recovery_config(training={"learning_rate": None})
    named = recovery_config(training={"learning_rate": 3e-3})

    _, report = recover_at(10.0, unnamed, seed=0)
    assert 0.01 < report.learning_rate < 10

    _, report = recover_at(10.0, named, seed=0)
    assert report.learning_rate == 3e-3, "a named rate is not lowered"

    _, report = recover_at(1e18, unnamed, seed=0)  # the loss after such a step is NaN
    assert report.learning_rate < 1e18


def test_a_pruned_model_is_saved_with_the_text_of_its_recovery(tmp_path):
    pruner = StructPruner(config())
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    recover(model, tokenizer(), recovery_config(), build("llama-tied", seed=1))
    with pytest.warns(UserWarning, match="weights have changed since they were measured"):
        pruner.save(model, tmp_path / "out", tokenizer())

    entries = Manifest.load(tmp_path / "out").with_use(TRAINED)
    assert entries != []
    assert entries == Manifest.seen_by(model).with_use(TRAINED)


def test_too_little_training_text_is_refused_before_the_pruning():
    model = build("llama-tied")
    original = deepcopy(model)
    domains = [DomainConfig("a", documents())]
    pruner = StructPruner(config(domains=domains, recovery=recovery_config(domains=None, tokens=200_000)))

    with pytest.raises(StructPruneError, match="'a' has .* more than 4 passes"):
        pruner.prune(model, tokenizer(), inplace=True)
    assert same_weights(model, original)


def test_the_languages_of_a_recovered_model_are_measured_again(tmp_path):
    original, words = real_text_model()
    result = StructPruner(config(widths={"mlp": 800}, languages=("en",))).prune(original, words)
    result.save(tmp_path / "pruned")
    recovery = Recovery(recovery_config(training={"learning_rate": 1e-3}), pruned=tmp_path / "pruned")

    # Another teacher, so that even a short training is a gain.
    with torch.no_grad():
        original.get_output_embeddings().weight.mul_(4)
    recovered = recovery.recover_model(result.model, words, original)
    recovery.save(recovered, tmp_path / "out", words)

    before = Report.load(tmp_path / "pruned" / REPORT_NAME).languages["en"].cost
    after = Report.load(tmp_path / "out" / REPORT_NAME).languages["en"].cost
    assert after.original == before.original
    assert after.pruned != before.pruned
    assert after.pruned == pytest.approx(cost_by_language(recovered, words, ["en"], ["en"])["en"])


@pytest.mark.parametrize(("answer_share", "text_samples"), [(0.0, 20), (0.5, 10), (1.0, 0)])
def test_the_manifest_does_not_count_answers_as_text_of_domains(pruned, answer_share, text_samples):
    recovery = Recovery(recovery_config(tokens=20 * 24, answer_share=answer_share))
    recovery.recover_model(pruned, tokenizer(), build("llama-tied", seed=1))

    tokens = sum(entry.calibration_tokens for entry in recovery.entries if entry.use == TRAINED)
    assert tokens == text_samples * 24


def test_unseen_text_is_measured_and_excluded_from_the_training(pruned):
    recovery = Recovery(recovery_config(answer_share=0.0))
    recovered = recovery.recover_model(pruned, tokenizer(), build("llama-tied", seed=1))

    report = recovery.report
    assert report.unseen.source == "built-in"
    assert "unseen text (built-in)" in str(report)
    assert list(report.unseen.perplexity.values) == ["original", "pruned", "recovered"]
    assert report.unseen.divergence

    training_documents = set()
    for entry in recovery.entries:
        if entry.use == TRAINED:
            training_documents.update(entry.documents, entry.heldout_documents)
    unseen = [entry for entry in Manifest.seen_by(recovered).domains if entry.use == JUDGED]
    assert unseen
    assert training_documents.isdisjoint(unseen[0].heldout_documents)


def prune_recover_and_evaluate(make_source):
    """Return the results of a pruning, a recovery, an evaluation and a second pruning on the same sources."""
    domains = [DomainConfig(name, make_source(documents(80, seed))) for seed, name in enumerate("ab")]
    training = recovery_config(domains=None, tokens=96)
    pruner = StructPruner(config(domains=domains, recovery=training))

    model = pruner.prune_model(build("llama-tied"), tokenizer())
    recovered = Recovery(training, pruner.result.config).recover_model(deepcopy(model), tokenizer())
    evaluation = evaluate(model, tokenizer(), domains, seq_length=24)
    second_model = pruner.prune_model(build("llama-tied"), tokenizer())
    return SimpleNamespace(
        model=model,
        recovered=recovered,
        second_model=second_model,
        evaluation=evaluation,
        report=pruner.result.report,
    )


@pytest.mark.filterwarnings("ignore")  # an evaluation on calibration text warns
def test_a_generator_of_texts_has_the_same_results_as_a_list():
    from_list = prune_recover_and_evaluate(list)
    from_generator = prune_recover_and_evaluate(iter)

    assert same_weights(from_list.model, from_generator.model)
    assert same_weights(from_list.recovered, from_generator.recovered)
    assert same_weights(from_list.second_model, from_generator.second_model)
    assert same_weights(from_list.model, from_list.second_model)
    assert from_list.evaluation.domains == from_generator.evaluation.domains
    assert from_list.report.domains == from_generator.report.domains
    assert from_list.report.recovery.domains == from_generator.report.recovery.domains


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = 'own'


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_the_code_of_a_teacher_runs_only_if_it_is_trusted(pruned, tmp_path):
    build("llama-tied").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["model_type"] = "own"
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(OWN_CODE)

    with pytest.raises(StructPruneError, match=r"(?s)cannot be loaded.*trust_remote_code"):
        recover(pruned, tokenizer(), recovery_config(), teacher=str(tmp_path))
    recover(pruned, tokenizer(), recovery_config(tokens=96), teacher=str(tmp_path), trust_remote_code=True)


def test_a_refused_training_leaves_the_model_unchanged(pruned, small):
    with pytest.raises(StructPruneError, match="'none' is empty"):
        recover(pruned, tokenizer(), recovery_config(domains=[DomainConfig(name="none", source=[])]))
    with pytest.raises(StructPruneError, match="reading them takes a tokenizer"):
        recover(pruned, None, recovery_config())
    with pytest.raises(StructPruneError, match="float16, which is too coarse"):
        recover(deepcopy(pruned).half(), tokenizer(), recovery_config(**FULL))

    assert same_weights(pruned, small)


def test_a_batch_that_is_not_full_counts_its_own_tokens():
    training = {"per_device_train_batch_size": 7, "save_strategy": "no"}
    recovery = Recovery(recovery_config(tokens=480, answer_share=0.0, training=training))
    recovery.recover_model(build("llama-tied"), tokenizer(), build("llama-tied", seed=1))
    assert recovery.report.steps == 3
    assert recovery.report.tokens == 480

    training["num_train_epochs"] = 2
    recovery = Recovery(recovery_config(tokens=480, answer_share=0.0, training=training))
    recovery.recover_model(build("llama-tied"), tokenizer(), build("llama-tied", seed=1))
    assert recovery.report.steps == 6
    assert recovery.report.tokens == 960


@pytest.mark.parametrize(("fields", "message"), [
    ({"answer_share": -0.5}, "`answer_share` must be at least 0 and at most 1, got -0.5"),
    ({"tokens": 0}, "`tokens` must be at least 1, got 0"),
    ({"domains": []}, "`domains` must not be empty"),
    ({"train": "full", "lora": {"r": 4}}, "needs train='lora', got train='full'"),
    ({"training": {"resume_from_checkpoint": True}}, "must not have `resume_from_checkpoint`.*`resume=True`"),
    ({"lora": {"init_lora_weights": "pissa"}}, "init_lora_weights='pissa'. Choose True or 'gaussian'"),
    ({"merge": False}, "has no field 'merge'"),
])  # fmt: skip
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(StructPruneError, match=message):
        RecoveryConfig.from_dict(fields)


def test_a_teacher_runs_without_dropout_and_regains_its_mode_after_a_failure(pruned):
    teacher = build("gemma2").train()  # gemma2 caps its logits, so the teacher runs in each step
    modes = []

    class Fail(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            modes.append(teacher.training)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recovery(recovery_config(), callbacks=[Fail()]).recover_model(pruned, tokenizer(), teacher)
    assert modes == [False]
    assert teacher.training


@pytest.mark.slow
def test_an_offloaded_teacher_has_the_same_effect(pruned):
    # Adam would make full steps of gradients that are only rounding errors of the teacher's states.
    settings = recovery_config(tokens=96, training={"optim": "sgd", "learning_rate": 0.1}, **FULL)
    teacher = build("llama-tied", seed=1)
    original_logits = logits(pruned)
    expected = logits(recover(deepcopy(pruned), tokenizer(), settings, teacher=teacher))

    cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert teacher.device.type == "meta"
    recovered_logits = logits(recover(pruned, tokenizer(), settings, teacher=teacher))
    assert (recovered_logits - expected).norm() < 0.01 * (expected - original_logits).norm()


def stream_of(settings):
    """Return the training text of a recovery in samples of 24 tokens."""
    text = text_config(settings, config(), 24)
    return TextStream(text, tokenizer(), build("llama-tied"))


def test_samples_follow_the_weights_of_domains_and_exclude_heldout_documents():
    domains = [
        DomainConfig(name="a", source=iter(documents(400)), weight=3.0),
        DomainConfig(name="b", source=documents(200, 1)),
    ]
    stream = stream_of(recovery_config(domains=domains))
    samples = list(stream.samples(20))
    assert [len(sample) for sample in samples] == [24] * 20

    second_stream = stream_of(recovery_config(domains=domains, seed=3))
    assert list(second_stream.samples(20)) == samples

    entries = stream.entries(20)
    token_counts = {entry.name: entry.calibration_tokens for entry in entries}
    assert token_counts == {"a": 15 * 24, "b": 5 * 24}

    training_documents = set()
    for entry in entries:
        training_documents.update(entry.documents)
    heldout_documents = set()
    for domain in stream.heldout:
        heldout_documents.update(domain.heldout_documents)
    assert training_documents
    assert heldout_documents
    assert training_documents.isdisjoint(heldout_documents)


def test_text_that_ends_is_read_again_and_too_little_text_is_refused_before_training():
    domains = [DomainConfig(name="a", source=documents(30))]
    stream = stream_of(recovery_config(domains=domains, tokens=24 * 400))
    message = r"'a' has \d+ samples of 24 tokens .* more than 4 passes. Add"

    with pytest.raises(StructPruneError, match=message) as error:
        stream.check_enough(400)
    with pytest.raises(StructPruneError, match="ended after 4 passes"):
        list(stream.samples(400))

    count = int(re.search(r"has (\d+) samples", str(error.value))[1])
    stream.check_enough(count)
    with pytest.warns(UserWarning, match="'a' is read 2 times"):
        stream.check_enough(count + 1)


def test_too_little_text_is_refused_before_answers_are_written(pruned):
    domains = [DomainConfig(name="a", source=documents(30))]
    settings = recovery_config(domains=domains, tokens=24 * 2_000, answer_share=0.5)

    with patch("optimum_structprune.recovery.training_data.write_answers") as write_answers:
        with pytest.raises(StructPruneError, match="more than 4 passes. Add"):
            recover(pruned, tokenizer(), settings, teacher=build("llama-tied"))
    write_answers.assert_not_called()


def test_a_training_on_answers_alone_needs_no_more_text_than_the_openings(pruned):
    domains = [DomainConfig(name="a", source=documents(30))]
    recovery = Recovery(recovery_config(domains=domains, tokens=24 * 100, answer_share=1.0))
    recovery.recover_model(pruned, tokenizer(), build("llama-tied"))
    assert recovery.report.tokens == pytest.approx(24 * 100, rel=0.1)


def test_a_recovery_reads_the_text_of_the_pruning_except_text_of_the_model():
    settings = recovery_config(domains=None, validation=None)
    pruning = config(general_share=None, general_text="builtin:general")
    text = text_config(settings, pruning, 24)
    assert [domain.name for domain in text.domains] == ["a", "b", "general"]
    assert str(text.domains[-1].source) == "builtin:general-news"

    _, reader = real_text_model()
    assert validation_text(settings, text, reader, (), 3)[0].shape == (3, 24)

    pruning = config(general_share=None, general_text="self:any")
    assert [domain.name for domain in texts_of(pruning)] == ["a", "b", "general"]
    assert [domain.name for domain in text_config(settings, pruning, 24).domains] == ["a", "b"]


def test_validation_documents_are_excluded_from_training():
    """The training and the validation read the same source here."""
    model, reader = real_text_model()
    domains = [DomainConfig(name="a", source="builtin:math")]
    settings = recovery_config(domains=domains, tokens=96, validation="builtin:math")
    text = text_config(settings, config(), 24)
    stream = TextStream(text, reader, model)

    heldout = stream.heldout[0].heldout_documents
    _, validation_documents = validation_text(recovery_config(validation="builtin:math"), text, reader, heldout, 8)
    original_samples = list(stream.samples(4))
    stream.skip(validation_documents)
    assert list(stream.samples(4)) != original_samples

    stream.documents["a"].clear()
    list(stream.samples(4))
    assert not set(validation_documents) & set(stream.entries(4)[0].documents)


# --- adapters: the trained weights of a model, and the merged model
def trainable_kinds(model) -> set[str]:
    """Return whether weights of the adapter, of the base or of both are trainable."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {"adapter" if "lora_" in name else "base" for name in names}


@pytest.mark.parametrize("lora", [
    {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
])  # fmt: skip
def test_an_adapter_on_only_one_of_two_tied_weights_is_refused(pruned, small, lora):
    message = r"would train (model.embed_tokens|lm_head).weight, which shares its tensor"
    with pytest.raises(StructPruneError, match=message):
        recover(pruned, tokenizer(), recovery_config(lora={"r": 2, **lora}))

    assert list(pruned.state_dict()) == list(small.state_dict())
    assert same_weights(pruned, small)
    assert trainable_kinds(pruned) == {"base"}


def test_an_interrupted_training_removes_the_adapter(monkeypatch):
    model = build("llama-untied")
    original = deepcopy(model)
    lora = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    monkeypatch.setattr(Trainer, "training_step", failing(Trainer.training_step, 1, KeyboardInterrupt()))

    with pytest.raises(KeyboardInterrupt):
        recover(model, tokenizer(), recovery_config(tokens=96, lora=lora))

    assert list(model.state_dict()) == list(original.state_dict())
    assert torch.equal(logits(model), logits(original))
    assert trainable_kinds(model) == {"base"}
    assert not hasattr(model, "peft_config")


# A small zamba2 does not run.
ADAPTED = [case for case in CASES if case != "zamba2"]


# The short cases have three forms of routers, stacked experts, and two kinds of Mamba layers.
@pytest.mark.parametrize("case", with_long(ADAPTED, ["gpt_oss", "phimoe", "jamba", "nemotron_h"]))
def test_the_merged_model_computes_the_same_as_the_model_with_its_default_adapter(case):
    model = build(case)
    original = deepcopy(model)
    with_adapter = adapted(model, lora_config(recovery_config(lora={}), model))
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    expected = logits(with_adapter.eval())

    merged = with_adapter.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-5)

    matrices = set()
    for space in describe(original).of(EXPERT):
        matrices.update(axis.param for axis in space.axes if "bias" not in axis.param)
    for name in matrices:
        weight = merged.get_parameter(name)
        assert weight.ndim < 2 or not torch.equal(weight, original.get_parameter(name))


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_rows_of_tokens_that_the_adapter_names_are_trained_and_merged(case):
    model = build(case).eval()
    original_embedding = model.get_input_embeddings().weight.clone()
    settings = RecoveryConfig(lora={"trainable_token_indices": [3, 5]})

    with_adapter = adapted(model, lora_config(settings, model))
    for parameter in with_adapter.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    trained_logits = logits(with_adapter.eval())
    torch.testing.assert_close(logits(with_adapter.merge_and_unload()), trained_logits)

    changed = (model.get_input_embeddings().weight != original_embedding).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_with_the_weights_of_the_model_is_refused(pruned, dtype):
    with pytest.raises(StructPruneError, match="are the same model"):
        recover(pruned, tokenizer(), recovery_config(), deepcopy(pruned).to(dtype))


def test_a_teacher_that_computes_nan_ends_before_the_first_step(pruned):
    teacher = build("llama-tied", seed=1)
    teacher.get_input_embeddings().weight.data[30:] = float("nan")
    original = deepcopy(pruned)
    for share, message in (
        (0.0, "NaN before the first step.* float32 or bfloat16"),
        (0.5, "computes NaN for the next"),
    ):
        with pytest.raises(StructPruneError, match=message):
            recover(pruned, tokenizer(), recovery_config(answer_share=share), teacher)
    assert same_weights(pruned, original)
