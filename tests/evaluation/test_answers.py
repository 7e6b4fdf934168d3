"""Answers to questions: patterns, greedy generation, the original's answers, the short check, and the command."""

import json
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import save_with_tokenizer, with_tokens
from models import CHATML, build, real_text_model
from torch.nn.functional import log_softmax
from trained import needs_shared, stories_config, stories_model
from transformers import GenerationConfig

from optimum_structprune import StructPruneError, StructPruner, evaluate
from optimum_structprune.commands.cli import main
from optimum_structprune.evaluation import answers
from optimum_structprune.evaluation.answers import ShortCheck, ask, read_answers, read_questions
from optimum_structprune.record.answers import followed, paired, right_difference, sample_questions
from optimum_structprune.record.figures import AnswersResult
from optimum_structprune.record.report import Report
from optimum_structprune.recovery.prompts import builtin_prompts


MODEL, TOKENIZER = real_text_model()
TOKENIZER.chat_template = CHATML


def some_questions(count=6):
    """Return built-in questions of different kinds."""
    return read_questions()[:count]


def lines():
    """Return the lines of the file of questions, each with an example of a right and of a wrong answer."""
    return [json.loads(line) for line in answers.QUESTIONS.read_text(encoding="utf-8").splitlines()]


# --- questions
def test_the_built_in_questions_are_distinct_and_each_kind_has_the_same_share():
    questions = read_questions()
    kinds = [question.kind for question in questions]

    assert len(questions) == 640
    assert len({question.prompt for question in questions}) == len(questions)
    assert len(set(kinds)) == 16
    # The kinds take turns, so the first questions have the same share of each kind.
    for start in range(0, len(questions), 16):
        assert len(set(kinds[start : start + 16])) == 16


def test_each_built_in_question_accepts_its_right_answer_and_no_wrong_one():
    for question, line in zip(read_questions(), lines(), strict=True):
        assert question.is_right(line["answer"], True), line
        assert not question.is_right(line["wrong"], True), line


def test_no_single_answer_is_right_for_many_built_in_questions():
    questions = read_questions()
    for line in lines():
        assert sum(question.is_right(line["answer"], True) for question in questions) <= 25, line


def test_no_built_in_question_is_like_a_prompt_of_the_training():
    words = [set(re.findall(r"\w+", question.prompt.lower())) for question in read_questions()]
    for prompt in builtin_prompts(TOKENIZER):
        own_words = set(re.findall(r"\w+", prompt.lower()))
        likeness = max(len(own_words & other) / len(own_words | other) for other in words)
        assert likeness < 0.7, prompt


def test_no_built_in_question_accepts_an_answer_without_content():
    for question in read_questions():
        for text in ("", "I do not know.", "Maybe"):
            assert not question.pattern.search(text), question.prompt


def test_no_built_in_opening_accepts_any_word_as_its_continuation():
    for question in read_questions():
        for text in ("zorp blim tock", "once upon a time there was"):
            assert not question.continuation_pattern.search(text), question.opening


@pytest.mark.parametrize(("prompt_words", "correct", "incorrect"), [
    ("list of four animals", ["bird", "a mouse", "elephants"], ["cats", "the one", "rather", "run"]),
    ("three colours", ["green", "and yellow", "gray."], ["and", "car", "red"]),
])  # fmt: skip
def test_openings_of_lists_accept_correct_continuations(prompt_words, correct, incorrect):
    (question,) = (item for item in read_questions() if prompt_words in item.prompt)
    for text in correct:
        assert question.continuation_pattern.search(text), text
    for text in incorrect:
        assert not question.continuation_pattern.search(text), text


@pytest.mark.parametrize(("prompt_words", "correct", "incorrect"), [
    ("capital of France", ["Paris.", "It is **Paris**, on the Seine."], ["Lyon", "Parisian food is good"]),
    ("is 2 + 3?", ["5", "2 + 3 = 5.", "It is five.", "It equals **5**"], ["2 + 3 = 6", "is 5 + 1", "is 5.5", "is 15"]),
    ("two boxes hold", ["12", "Two boxes hold 2 * 6 = 12 eggs.", "They hold a dozen."], ["6 eggs", "2 * 6 = 8"]),
    ("did the letter come from", ["Oslo", "It came from Oslo."], ["It was model_answers in Oslo blue.", "Ink"]),
    ("Leo drink", ["Cocoa", "Leo drinks cocoa."], ["Mia drinks tea.", "Leo drinks tea, and not cocoa"]),
    ('past tense of "go"', ["went", 'It is "went".'], ['"goed", or went', "gone"]),
    ("hammer, orange", ["Hammer", "The hammer, because it is a tool."], ["Apple, not hammer", "banana"]),
    ("The food was", ["Negative.", "The sentiment is negative."], ["Positive", "not negative", "positive, negative"]),
    ("It broke after", ["Unhappy", "He is not happy.", "They are not very happy."], ["Happy", "happy, not unhappy"]),
    ("list of four", ["1. a\n2. b\n3. c\n4. d", "1) a 2) b 3) c 4) d"], ["1. a\n2. b\n3. c", "1. 2. 3. 4. 5."]),
    ("three fruits", ["Apples, pears and plums", "1. Mango\n2. Kiwi\n3. Banana"], ["An apple and a pear", "Bread"]),
    ("primary colours", ["red, yellow, blue", "Red, blue, and yellow."], ["1. Red\n2. Blue", "red and blue"]),
    ("GOOD NIGHT", ["good night"], ["Good night", "GOOD NIGHT"]),
    ("3, 8, 2", ["2, 3, 8", "1. 2\n2. 3\n3. 8"], ["3, 8, 2", "8, 3, 2", "2, 3, 5, 8"]),
    ("bus or a bicycle", ["A bus.", "The bus is bigger.", "A bus is much larger."], ["A bicycle is bigger"]),
    ("number is larger: 9 or 4", ["9", "9 is larger than 4.", "The larger number is 9."], ["4", "9 or 4"]),
    ("a wolf", ["An animal.", "A wolf is an animal, not a plant."], ["A plant", "plant, animal"]),
    ("Is fire hot", ["Yes.", "The answer is yes."], ["No.", "Fire", "No, yes"]),
    ("headings", ["Ingredients\n- tea\n\nSteps\n1. boil", "**Ingredients:**\ntea\n**Steps:**\nboil"], ["Ingredients"]),
    ('value "Anna"', ['{"name": "Anna"}', '```json\n{\n  "name": "Anna"\n}\n```'], ['{"name": "Bob"}', "name: Anna"]),
    ("contraire de", ["Froid", 'Le contraire est "froid".'], ["Chaud", "cold"]),
    ("I like rain", ["I don't like rain.", "I do not like the rain"], ["I like rain.", "Rain, not"]),
    ("add(a, b)", ["def add(a: int, b: int) -> int:\n    return (a + b)"], ["def add(a, b):\n    return a - b"]),
    ("from 0 to 4", ["for i in range(5):\n    print(i)"], ["for i in range(0, 4, 1):\n    print(i)"]),
    ("table users", ["SELECT * FROM users;", "select * from `users`"], ["SELECT * FROM users WHERE id = 1"]),
])  # fmt: skip
def test_patterns_accept_correct_answers_in_different_words(prompt_words, correct, incorrect):
    (question,) = (question for question in read_questions() if prompt_words in question.prompt)

    assert [text for text in correct if not question.pattern.search(text.strip())] == []
    assert [text for text in incorrect if question.pattern.search(text.strip())] == []


@pytest.mark.parametrize(("line", "message"), [
    ('{"prompt": "Hi"}', "line 2, is not a question.*'right'"),
    ('{"right": "a"}', "not a question.*'prompt'"),
    ('{"prompt": "Hi", "right": "("}', "not a question.*unterminated"),
    ('{"messages": "Hi", "right": ""}', "not a question"),
    ('{"prompt": "\\ud800", "right": ""}', "not a question.*surrogates not allowed"),
    ("[1", "not a question"),
    ("", "has no questions for"),
])  # fmt: skip
def test_a_file_or_a_line_without_a_question_is_refused(line, message, tmp_path):
    first_line = '\ufeff{"prompt": "Hi", "right": ""}\n'
    if not line:
        first_line = "\n"
    (tmp_path / "mine.jsonl").write_text(first_line + line, encoding="utf-8")

    with pytest.raises(StructPruneError, match=message):
        read_questions(tmp_path / "mine.jsonl")


def test_a_missing_file_of_questions_is_refused():
    with pytest.raises(StructPruneError, match="cannot be read"):
        read_questions("built-in")


# --- generation
@torch.no_grad()
def greedy_answer(model, prompt, max_new_tokens, eos):
    """Return the greedy answer as token ids, without a cache, a batch or padding."""
    answer = []
    while len(answer) < max_new_tokens:
        logits = model(torch.tensor([prompt + answer])).logits
        token = int(logits[0, -1].argmax())
        if token == eos:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_answers_are_greedy_for_every_batch_size(batch_size):
    questions = some_questions()

    model_answers = ask(MODEL, TOKENIZER, questions, 12, batch_size)

    for question, answer in zip(questions, model_answers, strict=True):
        expected = greedy_answer(MODEL, question.ids(TOKENIZER), 12, TOKENIZER.eos_token_id)
        assert answer.stopped == (len(expected) < 12)
        assert answer.tokens == len(expected)
        assert answer.text == TOKENIZER.decode(expected, skip_special_tokens=True)


def test_an_answer_ends_at_the_end_token_of_the_model():
    model = deepcopy(MODEL)
    questions = some_questions(2)
    third_token = greedy_answer(model, questions[0].ids(TOKENIZER), 6, None)[2]
    model.generation_config.eos_token_id = [third_token]

    answer = ask(model, TOKENIZER, questions, 6)[0]

    assert answer.stopped
    assert answer.tokens <= 2


def test_generation_settings_of_the_model_are_ignored_and_kept():
    model = deepcopy(MODEL).train()
    expected = ask(model, TOKENIZER, some_questions(), 8)
    unusual_settings = {
        "do_sample": True,
        "temperature": 9.0,
        "num_beams": 3,
        "repetition_penalty": 5.0,
        "max_time": 1e-9,
        "min_new_tokens": 9,
        "max_length": 3,
        "suppress_tokens": [5],
        "no_repeat_ngram_size": 1,
    }
    settings = GenerationConfig(**unusual_settings)
    model.generation_config = settings

    assert ask(model, TOKENIZER, some_questions(), 8) == expected
    assert model.generation_config is settings
    assert settings.to_diff_dict().items() >= unusual_settings.items()
    assert model.training


def test_an_answer_that_repeats_four_tokens_often_is_repetitive():
    for question, answer in zip(some_questions(), ask(MODEL, TOKENIZER, some_questions(), 40), strict=True):
        ids = greedy_answer(MODEL, question.ids(TOKENIZER), 40, TOKENIZER.eos_token_id)
        runs = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
        highest_count = max(map(runs.count, runs), default=0)
        assert answer.loops == (highest_count > 3)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(StructPruneError, match="max_new_tokens=1024 .* 1024 positions .* Pass at most"):
        ask(MODEL, TOKENIZER, some_questions(), 1024)


def test_a_model_without_a_chat_template_continues_openings():
    base_tokenizer = deepcopy(TOKENIZER)
    base_tokenizer.chat_template = None
    questions = read_questions(tokenizers=[TOKENIZER, base_tokenizer])

    assert len(questions) >= 60
    assert all(question.opening for question in questions)
    ids = questions[0].ids(base_tokenizer)
    assert ids[0] == base_tokenizer.bos_token_id
    assert base_tokenizer.decode(ids[1:]) == questions[0].opening

    evaluation = evaluate(MODEL, base_tokenizer, answers="builtin", max_new_tokens=2, limit=5)
    prompts = [question.prompt for question in evaluation.answers.questions]
    assert prompts == [question.opening for question in questions[:5]], "the report shows the text that was read"
    assert "answers correct" in str(evaluation)
    assert " of 5" in str(evaluation)


# --- the original model's answers, read by other models
@torch.no_grad()
def expected_reading(model, tokenizer, question, text):
    """Return the predictions along an answer, one token at a time."""
    prompt = question.ids(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    log_probs = log_softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1], -1)
    agrees = (log_probs.argmax(-1) == torch.tensor(ids)).tolist()
    total = float(log_probs.gather(1, torch.tensor(ids)[:, None]).sum())
    return len(ids), sum(agrees), (agrees + [False]).index(False), total


@pytest.mark.parametrize("is_trimmed", [False, True])
def test_the_reading_of_the_original_answers_equals_its_definition(is_trimmed):
    questions = some_questions()
    originals = ask(MODEL, TOKENIZER, questions, 12)
    model, tokenizer = deepcopy(MODEL), TOKENIZER
    torch.nn.init.normal_(model.model.norm.weight, mean=1.0, std=0.3)
    if is_trimmed:
        model, tokenizer = with_tokens(model, TOKENIZER, list(range(300)))
    model_answers = ask(model, tokenizer, questions, 12)

    read_answers(model, tokenizer, questions, originals, model_answers)

    for question, original, answer in zip(questions, originals, model_answers, strict=True):
        tokens, agreed, first, total = expected_reading(model, tokenizer, question, original.text)
        reading = answer.reading
        assert (reading.tokens, reading.agreed, reading.first) == (tokens, agreed, first)
        assert reading.log_probability == pytest.approx(total, rel=1e-4)
    if is_trimmed:
        assert sum(answer.reading.tokens for answer in model_answers) > sum(answer.tokens for answer in originals)


def test_a_model_agrees_with_itself():
    questions = some_questions(16)
    originals = ask(MODEL, TOKENIZER, questions, 12, is_original=True)
    same = ask(MODEL, TOKENIZER, questions, 12)
    read_answers(MODEL, TOKENIZER, questions, originals, same)

    result = answers.answers_result(questions, {"original": originals, "pruned": same}, TOKENIZER)
    agreement, _, log_probability = followed(result, "pruned")

    assert log_probability.low <= 0 <= log_probability.high
    assert abs(log_probability.value) < 1e-6
    # The text of a random model may have another spelling than the tokens that it has written.
    assert agreement == followed(result, "original").agreement
    assert paired(result, "right") == ("alike", 1.0)


@pytest.mark.nightly
@needs_shared
def test_the_judge_is_fair():
    """A model in bf16 and in fp32 is alike, and the interval of half of the questions covers the other half."""
    original, tokenizer = stories_model()
    rounded = deepcopy(original).bfloat16()
    pruned = StructPruner(stories_config(widths={"mlp": 152})).prune_model(deepcopy(original), tokenizer)
    options = {"original": original, "answers": "builtin", "max_new_tokens": 24}

    equal = evaluate(rounded, tokenizer, **options).answers
    worse = evaluate(pruned, tokenizer, **options).answers

    difference = right_difference(equal)
    assert difference.low <= 0 <= difference.high
    assert abs(followed(equal, "pruned").log_probability.value) < 0.01
    assert followed(worse, "pruned").log_probability.high < followed(equal, "pruned").log_probability.low

    # The distance of two halves has the variance of both.
    first, second = (followed(AnswersResult(worse.questions[half::2]), "pruned") for half in range(2))
    for interval, other in zip(first, second, strict=True):
        assert abs(interval.value - other.value) <= 2**0.5 * (interval.high - interval.value)


def test_the_answers_of_the_original_model_are_cached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    questions = some_questions(8)
    first = ask(MODEL, TOKENIZER, questions[:5], 8, is_original=True)
    assert ask(MODEL, TOKENIZER, questions[:5], 8) == [replace(answer, reading=None) for answer in first]

    counts = []
    written = answers.continuations
    monkeypatch.setattr(answers, "continuations", lambda *args: counts.append(len(args[2])) or written(*args))
    second = ask(MODEL, TOKENIZER, questions, 8, is_original=True)
    assert second[:5] == first
    assert counts == [3], "only the new questions are asked"

    other = deepcopy(MODEL)
    other.lm_head.weight.data.neg_()
    ask(other, TOKENIZER, questions, 8, is_original=True)
    ask(MODEL, TOKENIZER, questions, 9, is_original=True)
    assert counts == [3, 8, 8]


def test_a_cache_that_cannot_be_written_is_ignored(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))

    assert len(ask(MODEL, TOKENIZER, some_questions(2), 4, is_original=True)) == 2


# --- the short check of a run
def test_a_run_that_reads_little_text_has_no_short_check():
    for tokens in (0, 4095):
        check = ShortCheck(TOKENIZER, tokens)
        check.ask("original", MODEL)
        check.ask("pruned", MODEL)
        assert check.result() is None


def test_a_short_check_continues_an_earlier_one_with_the_same_questions(monkeypatch):
    check = ShortCheck(TOKENIZER, 4096)
    check.ask("original", MODEL)
    check.ask("pruned", MODEL)
    result = check.result()
    assert len(result.questions) == 32
    assert result.models == ["original", "pruned"]
    assert followed(result, "pruned") is not None

    later_check = ShortCheck(TOKENIZER, 10**9, result)
    later_check.ask("recovered", MODEL)
    assert later_check.result().models == ["original", "pruned", "recovered"]
    assert followed(later_check.result(), "recovered") == followed(result, "pruned")

    later_check = ShortCheck(TOKENIZER, 10**9, AnswersResult(result.questions[:3]))
    later_check.ask("recovered", MODEL)
    assert later_check.result().models == ["recovered"]

    monkeypatch.setattr(answers, "continuations", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="no answers of the pruned model: division"):
        later_check.ask("pruned", MODEL)
    assert later_check.result() is None


@pytest.mark.parametrize("case", ["bert", "t5-gated"])
def test_a_model_that_does_not_predict_the_next_token_is_not_asked(case):
    check = ShortCheck(TOKENIZER, 10**9)

    check.ask("original", build(case))

    assert check.result() is None


def test_prune_shows_and_saves_answers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(answers, "SHORT_CHECK_MIN_READ", 1)
    save_with_tokenizer(MODEL, tmp_path / "model", TOKENIZER)
    output = tmp_path / "out"
    command = ["prune", str(tmp_path / "model"), str(output), "--width", "mlp=1200", "--quiet"]
    command += ["--domain", "math=builtin:math", "--num-samples", "6", "--seq-length", "32", "--general-share", "0"]

    assert main(command) == 0

    assert "32 test questions: correct " in capsys.readouterr().out
    result = Report.load(output / "report.json").answers
    samples = sample_questions(result)
    page = (output / "report.html").read_text()
    assert len(samples) == 3
    assert len(re.findall(r"<b>original: (?:right|wrong)", page)) == 3

    card = (output / "README.md").read_text()
    assert "## Answers" in card
    for question in samples:
        first_line = question.prompt.partition("\n")[0]
        assert first_line[:20] in card
