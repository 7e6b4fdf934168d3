"""Answers that are trained on: their prompts, how they are written, and which of their tokens count."""

import json
import re
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import recovery_config, unread
from models import CHATML, build, config, real_text_model, token_ids, tokenizer
from transformers import TrainerCallback

from optimum_structprune import DomainConfig, Recovery, StructPruneError, prune_model, recover
from optimum_structprune.evaluation.answers import read_questions
from optimum_structprune.forward.generation import sampled_continuations
from optimum_structprune.recovery import answers as module
from optimum_structprune.recovery.answers import AnswerFile, Answers, write_answers
from optimum_structprune.recovery.measure import measure_samples
from optimum_structprune.recovery.prompts import OPENING_TOKENS, builtin_prompts, prompts_of
from optimum_structprune.recovery.samples import SampleCollator, SamplePacker, text_sample
from optimum_structprune.recovery.teacher import Teacher
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


MODEL, READER = real_text_model()
READER.chat_template = CHATML


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "PROMPTS_PER_BATCH", 8)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.slow
def test_built_in_prompts_are_many_and_differ_from_the_built_in_questions():
    prompts = builtin_prompts(READER)
    assert len(prompts) == len(set(prompts)) >= 2_000
    asked = [words(question.prompt) for question in read_questions()]
    found, other = (prompts_of(None, MODEL, READER, token_ids().tolist(), seed) for seed in (0, 1))
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
    (tmp_path / "one.txt").write_text("Why?\n")
    found = [
        prompts_of(str(tmp_path / f"own.{kind}"), MODEL, READER, token_ids().tolist(), 0) for kind in ("jsonl", "txt")
    ]
    texts = [sorted(map(READER.decode, ids)) for ids in found]
    assert texts[0] == texts[1] == [f"<s>user\n{q}</s>\n<s>assistant\n" for q in ("Hi", "Why do apples fall down?")]
    for name, message in (
        ("bad.jsonl", "line 2, is not a prompt"),
        ("number.jsonl", "line 1, is not a prompt.*a message needs a role and a text"),
        ("none.txt", "no prompts"),
        ("one.txt", "one prompt. Add some"),
    ):
        with pytest.raises(StructPruneError, match=message):
            prompts_of(str(tmp_path / name), MODEL, READER, token_ids().tolist(), 0)
    asked = recovery_config(prompts=str(tmp_path / "gone"), domains=[DomainConfig("a", unread())])
    with pytest.raises(StructPruneError, match="cannot be read"):
        recover(deepcopy(MODEL), READER, asked, MODEL)


def test_openings_are_those_of_the_text_without_a_chat_template():
    texts = token_ids(4, 48)
    texts[:, 0] = 1
    prompts = prompts_of(None, build("llama-tied"), tokenizer(), texts.tolist(), 0)
    assert len(prompts) == 8 and all(ids[0] == 1 and len(ids) == OPENING_TOKENS for ids in prompts)
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


def test_rows_without_a_token_are_never_written():
    """A model may have more rows than its tokenizer has tokens."""
    model = deepcopy(MODEL)
    tokens = len(READER)
    model.resize_token_embeddings(tokens + 40)
    with torch.no_grad():
        model.lm_head.weight[tokens:] = 50 * model.lm_head.weight[5]
        model.lm_head.weight[5] *= 2
    prompts = [[5, 6, 7], [5, 8]]
    for text in sampled_continuations(model, READER, prompts, 12, 1.0, seed=0):
        assert max(text) < tokens


def test_answers_are_written_once_and_grow(tmp_path):
    calls = []

    def write(prompts, length, seed):
        calls.append((length, seed))
        return [[*prompt[:1], *[7] * (length - 1)] for prompt in prompts]

    prompts = [[i, i + 1] for i in range(40)]
    packer = SamplePacker(64, counts_prompts=False)
    path = tmp_path / "answers.jsonl"
    answers = Answers(prompts, write, AnswerFile(path), 0)
    counts = write_answers(answers, packer, 8)
    samples = list(answers.samples(packer, counts))
    assert counts == [2, 2, 2, 2] and [len(sample["input_ids"]) for sample in samples] == [64] * 8
    lengths = [length for length, _ in calls]
    assert lengths == sorted(lengths) and len({*calls}) == len(calls)
    with path.open("a") as file:
        file.write('["16/9", [')  # a process was killed
    again = Answers(prompts, None, AnswerFile(path), 0)
    assert list(again.samples(packer, counts)) == samples


def test_each_prompt_is_answered_at_most_four_times(tmp_path):
    def write(prompts, length, seed):
        return [[7, 2] for _ in prompts]

    prompts = [[i, i + 1] for i in range(16)]
    packer = SamplePacker(16, counts_prompts=True)
    answers = Answers(prompts, write, AnswerFile(tmp_path / "answers.jsonl"), 0)
    with pytest.warns(UserWarning, match="16 prompts are answered at most 4 times each"):
        counts = write_answers(answers, packer, 1_000)
    # Conversations of four tokens: four to a sample.
    assert sum(counts) == 4 * 16 // 4
    assert sum(len(sample["input_ids"]) for sample in answers.samples(packer, counts)) == 4 * 16 * 4


@torch.no_grad()
def test_answers_alone_count_and_conversations_do_not_see_each_other():
    model = build("llama-tied").eval()
    pairs = [([5, 6, 7], [8, 9, 2]), ([5, 10], [11, 2]), ([12, 13, 14], [15, 16, 17, 18])]
    (sample,) = SamplePacker(17, counts_prompts=False).conversations(pairs)
    assert [label for label in sample["labels"] if label != -100] == [8, 9, 2, 11, 2, 15, 16, 17, 18]
    (counted,) = SamplePacker(17, counts_prompts=True).conversations(pairs)
    assert counted["labels"] == [-100, 6, 7, 8, 9, 2, -100, 10, 11, 2, -100, 13, 14, 15, 16, 17, 18]
    batch = SampleCollator(None, 64)([sample, text_sample(token_ids(1, 9)[0])])
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    start = 0
    for prompt, answer in pairs:
        alone = model(torch.tensor([prompt + answer])).logits[0]
        torch.testing.assert_close(logits[start : start + len(alone)], alone)
        start += len(alone)


def test_conversations_in_fewer_tokens_are_as_far_from_the_dense_model_together_as_alone():
    pairs = [([5, 80, 7, 61, 20], [70, 9, 2]), ([5, 80, 90], [11, 95]), ([5, 80, 12, 13], [15, 66, 17, 18])]
    spelled = [(token % 8, token % 5, token % 3) for token in range(36)]
    alignment = TokenAlignment([*((token,) for token in range(60)), *spelled], 60)
    AcceleratorState._reset_state()  # a training in bf16 in the same process leaves its precision to all Accelerators
    accelerator = Accelerator(cpu=True)
    for case in ("llama-tied", "gemma2"):
        student = build(case, seed=1)
        student.resize_token_embeddings(60)
        teacher = Teacher(build(case), tokenizer(), alignment)
        found = []
        for chosen in (pairs, *([pair] for pair in pairs)):
            length = sum(len(prompt) + len(answer) for prompt, answer in chosen)
            samples = list(SamplePacker(length, counts_prompts=False).conversations(chosen))
            collator = SampleCollator(alignment, 64)
            found.append(measure_samples(student, samples, collator, teacher, accelerator))
        together, *alone = found
        for name in ("kl", "loss", "teacher"):
            expected = sum(one["tokens"] * one[name] for one in alone) / sum(one["tokens"] for one in alone)
            torch.testing.assert_close(together[name], expected, atol=1e-5, rtol=1e-5)
        assert together["tokens"].tolist() == [9] and together["kl"] > 0.01


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
    assert min(distances) == pytest.approx(mixed, rel=0.1)
