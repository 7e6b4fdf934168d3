"""Answers that are trained on: their prompts, how they are written, and which of their tokens count."""

import json
import re
from copy import deepcopy
from gc import collect
from weakref import ref

import pytest
import torch
from helpers import recovery_config, save_with_tokenizer, unread
from models import CHATML, build, config, real_text_model, token_ids, tokenizer
from transformers import TrainerCallback

from optimum_structprune import DomainConfig, Recovery, StructPruneError, prune_model, recover
from optimum_structprune.evaluation.answers import read_questions
from optimum_structprune.forward.generation import sampled_continuations
from optimum_structprune.forward.metrics import divergence
from optimum_structprune.recovery import answers as module
from optimum_structprune.recovery.answers import Answers, builtin_prompts, prompts_of
from optimum_structprune.recovery.samples import answer_samples, collate, in_parts, logits_at, text_sample
from optimum_structprune.recovery.teacher import Teacher, load_teacher, measure_samples
from optimum_structprune.recovery.trainer import DistillTrainer
from optimum_structprune.system.fingerprint import KeptText
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


MODEL, READER = real_text_model()
READER.chat_template = CHATML


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 8)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.slow
def test_built_in_prompts_are_many_and_differ_from_the_built_in_questions():
    prompts = builtin_prompts(READER)
    assert len(prompts) == len(set(prompts)) >= 2_000
    asked = [words(question.prompt) for question in read_questions()]
    found, other = (prompts_of(None, MODEL, READER, token_ids(), seed) for seed in (0, 1))
    assert len(found) > 2_000 and found != other
    for text in map(READER.decode, found):
        own = words(text.removeprefix("<s>user\n").partition("</s>")[0])
        assert all(len(own & of) < 0.7 * len(own | of) for of in asked), text


def test_prompts_of_a_file(tmp_path):
    rows = [
        {"prompt": "Why do apples fall down?"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"prompt": "What is the capital of France?"},  # a built-in question
        {"prompt": "Why do apples fall down?"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.txt").write_text("Why do apples fall down?\n\nHi\n")
    (tmp_path / "bad.jsonl").write_text('\n{"question": "Why?"}')
    (tmp_path / "number.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": 3}]}))
    (tmp_path / "none.txt").write_text("\n")
    found = [prompts_of(str(tmp_path / f"own.{kind}"), MODEL, READER, token_ids(), 0) for kind in ("jsonl", "txt")]
    texts = [sorted(map(READER.decode, ids)) for ids in found]
    assert texts[0] == texts[1] == [f"<s>user\n{q}</s>\n<s>assistant\n" for q in ("Hi", "Why do apples fall down?")]
    for name, message in (
        ("bad.jsonl", "line 2, is no prompt"),
        ("number.jsonl", "line 1, is no prompt.*a message needs a role and a text"),
        ("none.txt", "no prompts"),
    ):
        with pytest.raises(StructPruneError, match=message):
            prompts_of(str(tmp_path / name), MODEL, READER, token_ids(), 0)
    asked = recovery_config(prompts=str(tmp_path / "gone"), domains=[DomainConfig("a", unread())])
    with pytest.raises(StructPruneError, match="cannot be read"):
        recover(deepcopy(MODEL), READER, asked, MODEL)


def test_openings_are_those_of_the_text_without_a_chat_template():
    texts = token_ids(4, 48)
    texts[:, 0] = 1
    prompts = prompts_of(None, build("llama-tied"), tokenizer(), texts, 0)
    assert len(prompts) == 8 and all(ids[0] == 1 and len(ids) == module.OPENING_TOKENS for ids in prompts)
    flat = texts.flatten().tolist()
    assert all(any(flat[i : i + 20] == ids[2:22] for i in range(len(flat))) for ids in prompts)


def test_writing_in_a_batch_is_writing_alone():
    """With a temperature near 0: neither padding nor answers that end earlier change anything."""
    prompts = [[5, 6, 7], [5, 6, 9, 11, 30, 4], [5, 8], [5, 6, 7, 40, 41]]
    model = deepcopy(MODEL)
    with torch.no_grad():
        model.lm_head.weight[2] = 1.05 * model.lm_head.weight[prompts[0][-1] :].mean(0)  # some answers end
    together = sampled_continuations(model, READER, prompts, 12, 1e-6, seed=0)
    alone = [sampled_continuations(model, READER, [prompt], 12, 1e-6, seed=0)[0] for prompt in prompts]
    assert together == alone and all(text.index(2) == len(text) - 1 for text in together if 2 in text)


def test_answers_are_written_once_and_grow(tmp_path):
    calls = []

    def write(prompts, length, seed):
        calls.append((length, seed))
        return [[*prompt[:1], *[7] * (length - 1)] for prompt in prompts]

    prompts = [[i, i + 1] for i in range(20)]
    samples = list(Answers(prompts, write, KeptText("answers"), 0).samples(8, 64))
    assert [int(sample["targets"].ne(-100).sum()) for sample in samples] == [64] * 8
    assert [length for length, _ in calls] == sorted(length for length, _ in calls) and len({*calls}) == len(calls)
    with KeptText("answers").path.open("a") as file:
        file.write('["16/9", [')
    again = list(Answers(prompts, None, KeptText("answers"), 0).samples(8, 64))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(samples, again, strict=True) for name in a)


def test_answers_alone_count_and_conversations_do_not_see_each_other():
    model = build("llama-tied").eval()
    pairs = [([5, 6, 7], [8, 9, 2]), ([5, 10], [11, 2]), ([12, 13, 14], [15, 16, 17, 18])]
    (sample,) = answer_samples(pairs, 8)
    assert sample["targets"][sample["targets"] != -100].tolist() == [8, 9, 2, 11, 2, 15, 16, 17]
    found = logits_at(model, collate([sample, text_sample(token_ids(1, 9)[0])]))
    alone = [model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] for prompt, answer in pairs]
    torch.testing.assert_close(found[:8], torch.cat(alone)[:8])


def test_conversations_in_the_tokens_that_stay_are_as_far_from_the_dense_model_together_as_alone():
    pairs = [([5, 80, 7, 61, 20], [70, 9, 2]), ([5, 80, 90], [11, 95]), ([5, 80, 12, 13], [15, 66, 17, 18])]
    spelled = [(token % 8, token % 5, token % 3) for token in range(36)]
    parts = TokenAlignment([*((token,) for token in range(60)), *spelled], 60)
    for case in ("llama-tied", "gemma2"):
        student = build(case, seed=1)
        student.resize_token_embeddings(60)
        teacher, found = Teacher(build(case), tokenizer(), parts), []
        for chosen in (pairs, *([pair] for pair in pairs)):
            dense = [*answer_samples(chosen, sum(len(answer) for _, answer in chosen))]
            teacher.keep_states(dense)
            found.append(measure_samples(student, [in_parts(sample, parts) for sample in dense], teacher))
        together, *alone = found
        for name in ("kl", "loss", "teacher"):
            expected = sum(one["tokens"] * one[name] for one in alone) / sum(one["tokens"] for one in alone)
            torch.testing.assert_close(together[name], expected, atol=1e-5, rtol=1e-5)
        assert together["tokens"].tolist() == [9] and together["kl"] > 0.01


@pytest.mark.parametrize("case", ["llama-tied", "gemma2"])
def test_what_a_teacher_predicts_is_the_same_from_what_is_kept(case):
    """A head that caps its logits runs again, any other one on hidden states that were kept."""
    teacher, model = build(case), build(case, seed=1)
    samples = [text_sample(ids) for ids in token_ids(3, 9)]
    kept, files = Teacher(teacher), [dict(sample) for sample in samples]
    assert (kept.head is None) is (case == "gemma2")
    kept.keep_states(samples)
    kept.keep_states(files, torch.bfloat16, mixed=True)
    expected = teacher(token_ids(3, 9)[:, :-1]).logits.flatten(0, 1)
    torch.testing.assert_close(kept.logits(collate(samples)), expected)
    torch.testing.assert_close(kept.logits(collate(files)), expected, atol=0.02, rtol=0.02)
    found = measure_samples(model, samples, kept)
    straight = divergence(logits_at(model, collate(samples)), expected)
    torch.testing.assert_close(found["kl"].mean().float(), straight)


@pytest.mark.slow
def test_a_teacher_that_was_loaded_is_gone_while_the_model_trains(tmp_path, monkeypatch):
    save_with_tokenizer(build("llama-tied", seed=1), tmp_path / "dense")
    loaded, alive = [], []

    def noted(*args, **kwargs):
        teacher = load_teacher(*args, **kwargs)
        loaded.append(ref(teacher.model))
        return teacher

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            collect()
            alive.append(loaded[0]() is not None)

    monkeypatch.setattr("optimum_structprune.recovery.recover.load_teacher", noted)
    pruned = prune_model(build("llama-tied"), config(), tokenizer())
    recovery = Recovery(recovery_config(tokens=96), callbacks=[Watch()])
    recovery.recover_model(pruned, tokenizer(), str(tmp_path / "dense"))
    assert set(alive) == {False}


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_checkpoints_are_compared_by_what_is_trained_on(share):
    distances = []

    class Note(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            distances.append(metrics["eval_loss"])

    pruned = prune_model(build("llama-tied", seed=1), config(), tokenizer())
    recovery = Recovery(recovery_config(tokens=288, answer_share=share), callbacks=[Note()])
    recovery.recover_model(pruned, tokenizer(), build("llama-tied"))
    report = recovery.report
    assert {*report.domains} == {"a", "b", "validation text", "answers"} and report.unseen.divergence
    answers = report.domains["answers"].divergence
    assert report.kept_step and answers.recovered < answers.pruned
    mixed = (1 - share) * report.domains["validation text"].divergence.recovered + share * answers.recovered
    assert min(distances) == pytest.approx(mixed, rel=1e-3)


def test_batches_are_of_texts_or_of_answers_and_none_is_lost(monkeypatch, caplog):
    shares, original = [], DistillTrainer.compute_loss

    def noted(self, model, inputs, *arguments, **more):
        shares.append((inputs["targets"] != -100).float().mean(1).tolist())
        return original(self, model, inputs, *arguments, **more)

    monkeypatch.setattr(DistillTrainer, "compute_loss", noted)
    pruned = prune_model(build("llama-tied", seed=1), config(), tokenizer())
    with caplog.at_level("INFO", "optimum_structprune"):
        recover(pruned, tokenizer(), recovery_config(tokens=24 * 22), build("llama-tied"))
    said = [line for line in caplog.messages if line.endswith(" …")]
    assert len(said) == len({*said}), "a stage is announced once"
    # Of a text every place counts; so many of both that the last batch has one of each.
    kinds = [{share == 1.0 for share in batch} for batch in shares]
    assert sum(map(len, shares)) == 22 and all(len(kind) == 1 for kind in kinds[:-1])
    assert kinds[:4] == [{True}, {False}, {True}, {False}]
