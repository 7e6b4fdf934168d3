"""Answers as training text: their prompts, how models write them, and the tokens that count."""

import json
import re
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import flipped_bytes, recovery_config, unread
from models import CHATML, build, config, real_text_model, token_ids, tokenizer
from transformers import TrainerCallback

from optimum_structprune import DomainConfig, Recovery, StructPruneError, prune_model, recover
from optimum_structprune.arch.generation import sampled_continuations
from optimum_structprune.distillation.teacher import Teacher
from optimum_structprune.evaluation.answers import read_questions
from optimum_structprune.measure.batches import SampleCollator
from optimum_structprune.recovery import answers as module
from optimum_structprune.recovery.answers import AnswerFile, Answers, prompts_per_batch, write_answers
from optimum_structprune.recovery.measure import measure_all
from optimum_structprune.recovery.prompts import OPENING_TOKENS, builtin_prompts, prompts_of, read_prompts
from optimum_structprune.recovery.samples import SamplePacker, text_sample
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


MODEL, READER = real_text_model()
READER.chat_template = CHATML


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "MAX_PROMPTS_PER_BATCH", 8)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.slow
def test_built_in_prompts_are_many_and_differ_from_the_built_in_questions():
    prompts = builtin_prompts(READER)
    assert len(prompts) == len(set(prompts))
    assert len(prompts) >= 2_000

    first_order = prompts_of(None, MODEL, READER, token_ids().tolist(), 0)
    second_order = prompts_of(None, MODEL, READER, token_ids().tolist(), 1)
    assert len(first_order) > 2_000
    assert first_order != second_order

    questions = [words(question.prompt) for question in read_questions()]
    for text in map(READER.decode, first_order):
        prompt = words(text.removeprefix("<s>user\n").partition("</s>")[0])
        for question in questions:
            assert len(prompt & question) < 0.7 * len(prompt | question), text


def prompts_of_file(path):
    return prompts_of(str(path), MODEL, READER, token_ids().tolist(), 0)


def test_prompts_of_a_file_are_distinct_and_exclude_built_in_questions(tmp_path):
    rows = [
        {"prompt": "Why do apples fall down?"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"prompt": "What is the capital of France?"},  # a built-in question
        {"prompt": "Why do apples fall down?"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.txt").write_text("Why do apples fall down?\n\nHi\n")

    expected = ["<s>user\nHi</s>\n<s>assistant\n", "<s>user\nWhy do apples fall down?</s>\n<s>assistant\n"]
    for name in ("own.jsonl", "own.txt"):
        assert sorted(map(READER.decode, prompts_of_file(tmp_path / name))) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.txt"])
def test_json_lines_are_prompts_in_a_file_of_any_name(name, tmp_path):
    """JSON allows a line separator, U+2028, in a string. Rows without a question are skipped."""
    prompts = ["one apple\u2028and a pear", "two apples"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    lines[1] = lines[1].replace('{"', '{ "')
    lines += ['{"messages": null}', '{"prompt": " "}']
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")

    conversations = read_prompts(str(tmp_path / name))
    assert [messages[0]["content"] for messages in conversations] == prompts


def test_files_without_usable_prompts_are_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('\n{"question": "Why?"}')
    (tmp_path / "number.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": 3}]}))
    (tmp_path / "list.json").write_text('["Why?", "When?"]')
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("Why?\n")

    for name, message in (
        ("bad.jsonl", "line 2, is not a prompt"),
        ("number.jsonl", "line 1, is not a prompt.*a message needs a role and a text"),
        ("list.json", "line 1, is not a prompt.*each line must be an object"),
        ("none.txt", "no prompts"),
        ("one.txt", "one prompt. Add some"),
    ):
        with pytest.raises(StructPruneError, match=message):
            prompts_of_file(tmp_path / name)

    settings = recovery_config(prompts=str(tmp_path / "missing"), domains=[DomainConfig("a", unread())])
    with pytest.raises(StructPruneError, match="cannot be read"):
        recover(deepcopy(MODEL), READER, settings, MODEL)


def test_prompts_are_openings_of_the_text_without_a_chat_template():
    texts = token_ids(4, 48)
    texts[:, 0] = 1
    prompts = prompts_of(None, build("llama-tied"), tokenizer(), texts.tolist(), 0)
    assert len(prompts) == 8

    tokens = texts.flatten().tolist()
    for prompt in prompts:
        assert prompt[0] == 1
        assert len(prompt) == OPENING_TOKENS
        assert any(tokens[start : start + 20] == prompt[2:22] for start in range(len(tokens)))


def test_a_batch_has_the_same_answers_as_single_prompts():
    """With a temperature near 0, neither padding nor answers that end earlier change an answer."""
    prompts = [[5, 6, 7], [5, 6, 9, 11, 30, 4], [5, 8], [5, 6, 7, 40, 41]]
    model = deepcopy(MODEL)
    with torch.no_grad():
        model.lm_head.weight[2] = 1.05 * model.lm_head.weight[prompts[0][-1] :].mean(0)  # some answers end

    batch = sampled_continuations(model, READER, prompts, 12, 1e-6, seed=0)
    singles = [sampled_continuations(model, READER, [prompt], 12, 1e-6, seed=0)[0] for prompt in prompts]
    assert batch == singles
    assert all(text.index(2) == len(text) - 1 for text in batch if 2 in text)


def test_rows_without_a_token_are_never_written():
    """A model may have more rows than its tokenizer has tokens."""
    model = deepcopy(MODEL)
    tokens = len(READER)
    model.resize_token_embeddings(tokens + 40)
    with torch.no_grad():
        model.lm_head.weight[tokens:] = 50 * model.lm_head.weight[5]
        model.lm_head.weight[5] *= 2

    for text in sampled_continuations(model, READER, [[5, 6, 7], [5, 8]], 12, 1.0, seed=0):
        assert max(text) < tokens


def test_answers_are_written_once_and_grow(tmp_path):
    calls = []

    def write(prompts, length, seed):
        calls.append((length, seed))
        return [prompt[:1] + [7] * (length - 1) for prompt in prompts]

    prompts = [[i, i + 1] for i in range(40)]
    packer = SamplePacker(64, counts_prompts=False)
    path = tmp_path / "answers.jsonl"
    answers = Answers(prompts, write, AnswerFile(path), 0, 8)
    counts = write_answers(answers, packer, 8)
    samples = list(answers.samples(packer, counts))
    assert counts == [2, 2, 2, 2]
    assert [len(sample["input_ids"]) for sample in samples] == [64] * 8

    lengths = [length for length, _ in calls]
    assert lengths == sorted(lengths)
    assert len(set(calls)) == len(calls)

    with path.open("a") as file:
        file.write('["16/9", [')  # the last line of a killed process
    reopened = Answers(prompts, None, AnswerFile(path), 0, 8)
    assert list(reopened.samples(packer, counts)) == samples

    for _ in flipped_bytes(path):  # a batch that is damaged is written again
        repaired = Answers(prompts, write, AnswerFile(path), 0, 8)
        assert list(repaired.samples(packer, counts)) == samples


def test_a_small_training_writes_few_answers_at_once():
    assert prompts_per_batch(num_tokens=100, length=128) == 4
    assert prompts_per_batch(num_tokens=375, length=128) == 6
    assert prompts_per_batch(num_tokens=1_000_000, length=128) == 8  # the maximum of these tests


def test_each_prompt_is_answered_at_most_four_times(tmp_path):
    def write(prompts, length, seed):
        return [[7, 2] for _ in prompts]

    prompts = [[i, i + 1] for i in range(16)]
    packer = SamplePacker(16, counts_prompts=True)
    answers = Answers(prompts, write, AnswerFile(tmp_path / "answers.jsonl"), 0, 8)
    with pytest.warns(UserWarning, match="16 prompts are answered at most 4 times each"):
        counts = write_answers(answers, packer, 1_000)

    # A conversation has four tokens, so a sample has four conversations.
    assert sum(counts) == 4 * 16 // 4
    assert sum(len(sample["input_ids"]) for sample in answers.samples(packer, counts)) == 4 * 16 * 4


def test_only_answers_count_unless_prompts_count_too():
    pairs = [([5, 6, 7], [8, 9, 2]), ([5, 10], [11, 2]), ([12, 13, 14], [15, 16, 17, 18])]

    (sample,) = SamplePacker(17, counts_prompts=False).conversations(pairs)
    assert [label for label in sample["labels"] if label != -100] == [8, 9, 2, 11, 2, 15, 16, 17, 18]

    (sample,) = SamplePacker(17, counts_prompts=True).conversations(pairs)
    assert sample["labels"] == [-100, 6, 7, 8, 9, 2, -100, 10, 11, 2, -100, 13, 14, 15, 16, 17, 18]


@torch.no_grad()
def test_packed_conversations_do_not_attend_to_each_other():
    model = build("llama-tied").eval()
    pairs = [([5, 6, 7], [8, 9, 2]), ([5, 10], [11, 2]), ([12, 13, 14], [15, 16, 17, 18])]
    (sample,) = SamplePacker(17, counts_prompts=False).conversations(pairs)
    batch = SampleCollator(None, 64)([sample, text_sample(token_ids(1, 9)[0])])
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]

    start = 0
    for prompt, answer in pairs:
        expected = model(torch.tensor([prompt + answer])).logits[0]
        torch.testing.assert_close(logits[start : start + len(expected)], expected)
        start += len(expected)


@pytest.mark.parametrize("case", ["llama-tied", "gemma2"])
def test_packed_conversations_in_fewer_tokens_have_the_same_divergence_as_single_ones(case):
    pairs = [([5, 80, 7, 61, 20], [70, 9, 2]), ([5, 80, 90], [11, 95]), ([5, 80, 12, 13], [15, 66, 17, 18])]
    spellings = [(token,) for token in range(60)]
    spellings += [(token % 8, token % 5, token % 3) for token in range(36)]
    alignment = TokenAlignment(spellings, 60)
    AcceleratorState._reset_state()  # a training in bf16 in the same process leaves its precision to all Accelerators
    accelerator = Accelerator(cpu=True)
    student = build(case, seed=1)
    student.resize_token_embeddings(60)
    teacher = Teacher(build(case), tokenizer(), alignment)

    def measure(conversations):
        """Measure the divergence in one sample of all conversations."""
        length = sum(len(prompt) + len(answer) for prompt, answer in conversations)
        samples = list(SamplePacker(length, counts_prompts=False).conversations(conversations))
        return measure_all(student, {"a": samples}, teacher, accelerator)["a"]

    packed = measure(pairs)
    singles = [measure([pair]) for pair in pairs]
    for name in ("kl", "loss", "other"):
        expected = torch.cat([torch.cat(getattr(single, name)) for single in singles])
        torch.testing.assert_close(torch.cat(getattr(packed, name)), expected, atol=1e-5, rtol=1e-5)
    assert [len(values) for values in packed.kl] == [9]
    assert packed.kl[0].mean() > 0.01


class EvaluationLosses(TrainerCallback):
    """Records the loss of each evaluation."""

    def __init__(self):
        self.losses = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append(metrics["eval_loss"])


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_checkpoints_are_compared_on_the_mixture_of_text_and_answers(share):
    pruned = prune_model(build("llama-tied", seed=1), config(), tokenizer())
    evaluations = EvaluationLosses()
    recovery = Recovery(recovery_config(tokens=288, answer_share=share), callbacks=[evaluations])
    recovery.recover_model(pruned, tokenizer(), build("llama-tied"))

    report = recovery.report
    assert set(report.domains) == {"a", "b", "validation text", "answers"}
    assert report.unseen.divergence
    assert report.kept_step

    answers = report.domains["answers"].divergence
    text = report.domains["validation text"].divergence
    assert answers.recovered < answers.pruned
    mixture = (1 - share) * text.recovered + share * answers.recovered
    assert min(evaluations.losses) == pytest.approx(mixture, rel=0.1)
