"""Recovery brings quality back, leaves an ordinary model, and says what is wrong with bad input."""

import json
import re
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from helpers import failing, logits, recovery_config, same_weights, with_long
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
from optimum_structprune.errors import StructPruneError
from optimum_structprune.recovery.adapter import adapted, lora_config
from optimum_structprune.recovery.text import TextStream, text_config, validation_text
from optimum_structprune.recovery.training import NothingGainedWarning
from optimum_structprune.system.fingerprint import computing


WAYS = [{}, {"train": "full", "lora": {}}]


@pytest.mark.slow
@needs_shared
def test_recovery_closes_most_of_the_gap_on_a_trained_model(tmp_path, monkeypatch):
    dense, words = stories_model()
    monkeypatch.setattr(StructPruneConfig, "holdout", 0.5)  # a smaller error
    pruning = stories_config()
    pruned = prune_model(dense, pruning, words)
    recovery = Recovery(RecoveryConfig(tokens=32_000, training={"learning_rate": 3e-3}), pruning)
    recovered = recovery.recover_model(pruned, words, dense)
    domains = recovery.report.domains
    for name, share in (("stories", 0.6), ("answers", 0.8), ("validation text", 1.0)):
        assert domains[name].divergence.recovered < share * domains[name].divergence.pruned
    perplexity = domains["stories"].perplexity
    assert recovery.report.kept_step
    assert perplexity.dense < perplexity.recovered and type(recovered) is type(dense) and recovered is pruned
    assert recovery.report.tokens == pytest.approx(32_000, rel=0.02) and recovery.report.seconds > 0
    recovery.save(recovered, tmp_path / "out", words)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.intermediate_size == 96 and same_weights(again, recovered)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("fields", WAYS)
def test_the_result_is_an_ordinary_model_and_callbacks_reach_the_trainer(pruned, small, fields, tmp_path):
    class Watch(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1
            control.should_training_stop = self.steps == 4

    watch, old = Watch(), small.state_dict()
    training = {"save_steps": 2, "gradient_checkpointing": True}
    recovery = Recovery(recovery_config(training=training, **fields), callbacks=[watch])
    recovered = recovery.recover_model(pruned, tokenizer())
    assert watch.steps == recovery.report.steps == 4
    assert recovered is pruned and [*recovered.state_dict()] == [*old]
    changed = [name for name, value in recovered.state_dict().items() if not torch.equal(value, old[name])]
    assert changed if not fields else changed == [*old]
    assert recovered.training == small.training and recovered.lm_head.weight is recovered.model.embed_tokens.weight
    assert computing(recovered.config) == computing(small.config) and recovered.config.use_cache
    assert all(parameter.requires_grad and parameter.grad is None for parameter in recovered.parameters())
    with pytest.raises(StructPruneError, match="`save` takes the model that `recover_model` returned"):
        recovery.save(small, tmp_path / "out")
    recovered.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(again, recovered) and torch.equal(logits(again), logits(recovered))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in recovered.modules())
    hidden = recovered.train().requires_grad_(False).get_input_embeddings()(torch.tensor([[3, 4]]))
    assert not hidden.requires_grad, "no hook is left"


class Spoiler(TrainerCallback):
    """Remembers what is trained at the beginning of each step, and makes it and so the loss of one step NaN."""

    def __init__(self, step: int):
        self.step, self.seen = step, []

    def on_step_begin(self, args, state, control, model, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.seen.append({name: p.detach().clone() for name, p in trained.items()})
        if state.global_step == self.step:
            next(iter(trained.values())).data.fill_(float("nan"))


@pytest.mark.slow
def test_a_loss_that_is_no_number_keeps_the_best_checkpoint(pruned):
    spoiler = Spoiler(step=5)
    recovery = Recovery(recovery_config(train="full", lora={}, training={"save_steps": 2}), callbacks=[spoiler])
    recovered = recovery.recover_model(pruned, tokenizer(), build("llama-tied", seed=1))
    assert "loss of step 6 is nan" in recovery.report.stopped and recovery.report.stopped in str(recovery.report)
    kept, step = dict(recovered.named_parameters()), recovery.report.kept_step
    assert step in (2, 4)
    assert all(torch.equal(kept[name], tensor) for name, tensor in spoiler.seen[step].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optimum_structprune.recovery.training.NothingGainedWarning")
def test_a_loss_that_never_was_a_number_and_a_last_step_that_is_none_are_taken_back(pruned, monkeypatch):
    before, recovery = deepcopy(pruned), Recovery(recovery_config(), callbacks=[Spoiler(step=0)])
    assert same_weights(recovery.recover_model(pruned, tokenizer()), before)
    assert "loss of step 1 is nan" in recovery.report.stopped and recovery.report.kept_step == 0
    original = Trainer.training_step

    def spoiled(self, model, inputs, *arguments, **more):
        loss = original(self, model, inputs, *arguments, **more)
        if self.state.global_step == self.state.max_steps - 1:  # its loss is finite, and no loss follows
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", spoiled)
    recovery = Recovery(recovery_config(training={"save_steps": 2}))
    recovered = recovery.recover_model(pruned, tokenizer(), build("llama-tied", seed=1))
    assert 0 < recovery.report.kept_step < recovery.report.steps
    assert all(torch.isfinite(parameter).all() for parameter in recovered.parameters())


@pytest.mark.parametrize(("rate", "fields"), [(0.0, {}), (1e3, {"train": "full", "lora": {}})])
def test_a_training_that_brings_nothing_gives_the_model_back(pruned, small, rate, fields):
    recovery = Recovery(recovery_config(tokens=192, training={"learning_rate": rate}, **fields))
    with pytest.warns(NothingGainedWarning, match="no checkpoint was better"):
        recovered = recovery.recover_model(pruned, tokenizer())
    assert recovery.report.kept_step == 0 and "no checkpoint was better" in str(recovery.report)
    assert torch.equal(logits(recovered), logits(small)) and recovered is pruned


@pytest.mark.filterwarnings("ignore::optimum_structprune.recovery.training.NothingGainedWarning")
def test_a_default_rate_whose_first_step_goes_too_far_is_lowered_and_another_is_as_if_it_were_named(
    pruned, monkeypatch
):
    named, unnamed = (recovery_config(training={"learning_rate": rate}) for rate in (3e-3, None))

    def trained(rate, config, seed):
        monkeypatch.setitem(LEARNING_RATES, "lora", rate)
        recovery = Recovery(config)
        return recovery.recover_model(deepcopy(pruned), tokenizer(), build("llama-tied", seed=seed)), recovery.report

    (model, report), (same, _) = (trained(3e-3, config, 1) for config in (unnamed, named))
    assert report.learning_rate == 3e-3 and report.kept_step and same_weights(model, same)
    far, kept = (trained(10.0, config, 0)[1].learning_rate for config in (unnamed, named))
    assert 0.01 < far < 10 and kept == 3e-3
    assert trained(1e18, unnamed, 0)[1].learning_rate < 1e18  # behind which the loss is no number


def test_a_pruned_model_is_saved_with_the_text_that_has_trained_it_since(tmp_path):
    pruner = StructPruner(config())
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    recover(model, tokenizer(), recovery_config(), build("llama-tied", seed=1))
    with pytest.warns(UserWarning, match="weights have changed since they were measured"):
        pruner.save(model, tmp_path / "out", tokenizer())
    assert Manifest.load(tmp_path / "out").of_use(TRAINED) == Manifest.seen_by(model).of_use(TRAINED) != []


def test_other_text_is_measured_again_and_nothing_is_chosen_by_it(pruned):
    recovery = Recovery(recovery_config(answer_share=0.0))
    recovered = recovery.recover_model(pruned, tokenizer(), build("llama-tied", seed=1))
    report, text = recovery.report, [entry for entry in Manifest.seen_by(recovered).domains if entry.use == JUDGED]
    assert report.unseen.source == "built-in" and "unseen text (built-in)" in str(report)
    assert [*report.unseen.perplexity.by_model()] == ["dense", "pruned", "recovered"] and report.unseen.divergence
    trained = [entry for entry in recovery.entries if entry.use == TRAINED]
    used = {name for entry in trained for name in (*entry.documents, *entry.heldout_documents)}
    assert text and not used & {*text[0].heldout_documents}


@pytest.mark.filterwarnings("ignore")  # an evaluation on text that was calibrated on says so
def test_a_generator_gives_what_the_list_of_its_texts_gives():
    results = []
    for made in (list, iter):
        domains = [DomainConfig(name, made(documents(80, seed))) for seed, name in enumerate("ab")]
        training = recovery_config(domains=None, tokens=96)
        pruner = StructPruner(config(domains=domains, recovery=training))
        model = pruner.prune_model(build("llama-tied"), tokenizer())
        again = Recovery(training, pruner.result.config).recover_model(deepcopy(model), tokenizer())
        found = evaluate(model, tokenizer(), domains, seq_length=24)
        results.append((model, again, pruner.prune_model(build("llama-tied"), tokenizer()), found, pruner.report))
    (*models, found, report), (*same, again, same_report) = results
    assert all(map(same_weights, models, same)) and same_weights(models[0], models[2])
    assert found.domains == again.domains
    assert report.domains == same_report.domains
    assert report.recovery.domains == same_report.recovery.domains


@pytest.mark.slow
def test_code_of_a_teacher_runs_only_where_it_is_trusted(pruned, tmp_path):
    build("llama-tied").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": names}))
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(StructPruneError, match=r"(?s)cannot be loaded.*trust_remote_code"):
        recover(pruned, tokenizer(), recovery_config(), teacher=str(tmp_path))
    recover(pruned, tokenizer(), recovery_config(tokens=96), teacher=str(tmp_path), trust_remote_code=True)


def test_what_cannot_be_trained_on_stays_as_it_was(pruned, small):
    with pytest.raises(StructPruneError, match="'none' is empty"):
        recover(pruned, tokenizer(), recovery_config(domains=[DomainConfig(name="none", source=[])]))
    with pytest.raises(StructPruneError, match="reading them takes a tokenizer"):
        recover(pruned, None, recovery_config())
    with pytest.raises(StructPruneError, match="float16, which is too coarse"):
        recover(deepcopy(pruned).half(), tokenizer(), recovery_config(**WAYS[1]))
    assert same_weights(pruned, small)


@pytest.mark.parametrize(("fields", "message"), [
    ({"answer_share": -0.5}, "`answer_share` must be at least 0 and at most 1, got -0.5"),
    ({"tokens": 0}, "`tokens` must be at least 1, got 0"),
    ({"domains": []}, "`domains` must not be empty"),
    ({"train": "full", "lora": {"r": 4}}, "needs train='lora', got train='full'"),
    ({"merge": False}, "has no field 'merge'"),
])  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(StructPruneError, match=message):
        RecoveryConfig.from_dict(fields)


def test_a_teacher_runs_without_dropout_and_is_as_it_was_after_a_failure(pruned):
    teacher = build("gemma2").train()  # which caps its logits, so that it runs in each step
    modes = []

    class Fail(TrainerCallback):
        def on_step_begin(self, *arguments, **kwargs):
            modes.append(teacher.training)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recovery(recovery_config(), callbacks=[Fail()]).recover_model(pruned, tokenizer(), teacher)
    assert modes == [False] and teacher.training


@pytest.mark.slow
def test_an_offloaded_teacher_teaches_the_same(pruned):
    # Adam makes whole steps of gradients that are no more than the rounding of the states that a teacher keeps.
    few = recovery_config(tokens=96, train="full", lora={}, training={"optim": "sgd", "learning_rate": 0.1})
    teacher, before = build("llama-tied", seed=1), logits(pruned)
    expected = logits(recover(deepcopy(pruned), tokenizer(), few, teacher=teacher))
    cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert teacher.device.type == "meta"
    taught = logits(recover(pruned, tokenizer(), few, teacher=teacher))
    assert (taught - expected).norm() < 0.01 * (expected - before).norm()


def test_samples_are_of_the_domains_by_their_weights_and_read_lazily():
    read = []

    def texts(name):
        for text in documents(400):
            read.append(name)
            yield text

    uneven = [DomainConfig(name="a", source=texts("a"), weight=3.0), DomainConfig(name="b", source=documents(200, 1))]
    config_of_text = text_config(recovery_config(domains=uneven), config(), 24)
    stream = TextStream(config_of_text, tokenizer(), build("llama-tied"))
    samples = list(stream.samples(20))
    assert [len(sample) for sample in samples] == [24] * 20
    again = TextStream(
        text_config(recovery_config(domains=uneven, seed=3), config(), 24), tokenizer(), build("llama-tied")
    )
    assert list(again.samples(20)) == samples
    by_domain = {entry.name: entry.calibration_tokens for entry in stream.entries()}
    assert by_domain == {"a": 15 * 24, "b": 5 * 24}
    held = {name for domain in stream.heldout for name in domain.heldout_documents}
    trained = {name for entry in stream.entries() for name in entry.documents}
    assert held and trained and not held & trained


def test_text_that_ends_is_read_again_and_too_little_is_refused_before_training():
    few = [DomainConfig(name="a", source=documents(30))]
    text = text_config(recovery_config(domains=few, tokens=24 * 400), config(), 24)
    stream = TextStream(text, tokenizer(), build("llama-tied"))
    with pytest.raises(
        StructPruneError, match=r"'a' has \d+ samples of 24 tokens .* more than 4 passes. Add"
    ) as caught:
        stream.check_enough(400)
    with pytest.raises(StructPruneError, match="ended after 4 passes"):
        list(stream.samples(400))
    count = int(re.search(r"has (\d+) samples", str(caught.value))[1])
    stream.check_enough(count)
    with pytest.warns(UserWarning, match="'a' is read 2 times"):
        stream.check_enough(count + 1)


def test_the_text_of_a_recovery_is_the_text_of_the_pruning_without_what_the_model_wrote():
    follows = recovery_config(domains=None, validation=None)
    settings = config(general_share=None, general_text="builtin:general")
    text = text_config(follows, settings, 24)
    assert [domain.name for domain in text.domains] == ["a", "b", "general"]
    assert str(text.domains[-1].source) == "builtin:general-news"
    _, reader = real_text_model()
    assert validation_text(follows, text, reader, (), 3)[0].shape == (3, 24)
    written = config(general_share=None, general_text="self:any")
    assert [domain.name for domain in texts_of(written)] == ["a", "b", "general"]
    assert [domain.name for domain in text_config(follows, written, 24).domains] == ["a", "b"]


def test_documents_that_validate_are_not_trained_on():
    """Also if both are one file."""
    model, reader = real_text_model()
    math = [DomainConfig(name="a", source="builtin:math")]
    text = text_config(recovery_config(domains=math, tokens=96, validation="builtin:math"), config(), 24)
    stream = TextStream(text, reader, model)
    held = stream.heldout[0].heldout_documents
    _, names = validation_text(recovery_config(validation="builtin:math"), text, reader, held, 8)
    before = list(stream.samples(4))
    stream.skip(names)
    assert list(stream.samples(4)) != before
    stream.documents["a"].clear()
    list(stream.samples(4))
    assert not {*names} & {*stream.entries()[0].documents}


# --- adapters: what they train of a model, and what merging makes of them
def trainable(model) -> set[str]:
    """Which kinds of weights are trainable."""
    return {"adapter" if "lora_" in name else "base" for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [
    {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
])  # fmt: skip
def test_tied_weights_are_not_trained_apart_and_merged(pruned, small, lora):
    message = r"would train (model.embed_tokens|lm_head).weight, which shares its tensor"
    with pytest.raises(StructPruneError, match=message):
        recover(pruned, tokenizer(), recovery_config(lora={"r": 2, **lora}))
    assert [*pruned.state_dict()] == [*small.state_dict()] and same_weights(pruned, small)
    assert trainable(pruned) == {"base"}


def test_what_stops_a_training_takes_the_adapter_off(monkeypatch):
    model = build("llama-untied")
    before = deepcopy(model)
    lora = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    monkeypatch.setattr(Trainer, "training_step", failing(Trainer.training_step, 1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        recover(model, tokenizer(), recovery_config(tokens=96, lora=lora))
    assert [*model.state_dict()] == [*before.state_dict()] and torch.equal(logits(model), logits(before))
    assert trainable(model) == {"base"} and not hasattr(model, "peft_config")


# Short: routers of three forms beside stacked experts, and Mamba layers of two kinds; a small zamba2 does not run.
@pytest.mark.parametrize(
    "case", with_long((case for case in CASES if case != "zamba2"), ["gpt_oss", "phimoe", "jamba", "nemotron_h"])
)
def test_the_default_adapter_trains_what_the_merged_model_has(case):
    model = build(case)
    dense, spaces = deepcopy(model), describe(model).of(EXPERT)
    with_adapter = adapted(model, lora_config(recovery_config(lora={}), model))
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = logits(with_adapter.eval())
    merged = with_adapter.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-5)
    matrices = {axis.param for space in spaces for axis in space.axes if "bias" not in axis.param}
    for name in matrices:
        new, old = merged.get_parameter(name), dense.get_parameter(name)
        assert new.ndim < 2 or not torch.equal(new, old)


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "gpt2-tied", "gemma3_text", "codegen"])
def test_where_tokens_have_gone_the_rows_of_the_others_are_trained_and_merged(case):
    """A head that is the embedding moves with it, one of its own too; one with a bias stays."""
    model = build(case).eval()
    before, table, head = logits(model), model.get_input_embeddings(), model.get_output_embeddings()
    old, own = table.weight.clone(), head.weight.clone()
    with_adapter = adapted(model, lora_config(RecoveryConfig(), model, fewer_tokens=True))
    torch.testing.assert_close(logits(with_adapter.eval()), before)
    for parameter in with_adapter.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    trained = logits(with_adapter)
    torch.testing.assert_close(logits(with_adapter.merge_and_unload()), trained)
    assert not torch.equal(table.weight, old) and torch.equal(head.weight, own) is (case == "codegen")
    assert (head.weight is table.weight) is (case not in ("llama-untied", "codegen"))
