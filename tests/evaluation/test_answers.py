"""Answers to questions: patterns, greedy generation, divergence, the short check of a run, and the command."""

import re
from copy import deepcopy

import pytest
import torch
from helpers import save_with_tokenizer, with_tokens
from models import CHATML, build, real_text_model
from torch.nn.functional import log_softmax
from transformers import GenerationConfig

from optimum_structprune import StructPruneError, evaluate
from optimum_structprune.commands.cli import main
from optimum_structprune.evaluation import answers
from optimum_structprune.evaluation.answers import ShortCheck, answer_divergence, ask, read_questions
from optimum_structprune.record.answers import sample_questions
from optimum_structprune.record.figures import AnswersResult
from optimum_structprune.record.report import Report
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


MODEL, TOKENIZER = real_text_model()
TOKENIZER.chat_template = CHATML


def some_questions(count=6):
    """Return built-in questions of different kinds."""
    return read_questions()[:: 120 // count][:count]


# --- questions
def test_the_built_in_questions_are_distinct_and_of_eight_kinds():
    questions = read_questions()
    kinds = [question.kind for question in questions]

    assert len(questions) >= 100
    assert len({question.prompt for question in questions}) == len(questions)
    assert len(set(kinds)) == 8
    assert min(map(kinds.count, kinds)) >= 12
    assert kinds[:16].count("code") == 2
    assert kinds[:16].count("facts") == 2


def test_no_built_in_question_accepts_an_answer_without_content():
    for question in read_questions():
        for text in ("", "I do not know.", "Yes"):
            assert not question.pattern.search(text), question.prompt


def test_no_built_in_opening_accepts_any_word_as_its_continuation():
    for question in read_questions():
        for text in ("zorp blim tock", "once upon a time there was"):
            assert not question.continuation_pattern.search(text), question.opening


@pytest.mark.parametrize(("prompt_words", "correct", "incorrect"), [
    ("four animals", ["bird", "a mouse", "elephants"], ["cats", "the one", "rather", "run"]),
    ("three colours", ["blue", "and yellow", "gray."], ["and", "car", "red"]),
])  # fmt: skip
def test_openings_of_lists_accept_correct_continuations(prompt_words, correct, incorrect):
    (question,) = (item for item in read_questions() if prompt_words in item.prompt)
    for text in correct:
        assert question.continuation_pattern.search(text), text
    for text in incorrect:
        assert not question.continuation_pattern.search(text), text


@pytest.mark.parametrize(("prompt_words", "correct", "incorrect"), [
    ("capital of France", ["Paris.", "It is **Paris**, on the Seine."], ["Lyon", "Parisian food is good"]),
    ("2 + 3?", ["5", "2 + 3 = 5.", "It is five.", "It equals **5**"], ["2 + 3 = 6", "It is 5 + 1", "is 5.5", "is 15"]),
    ("two boxes hold", ["12", "Two boxes hold 2 * 6 = 12 eggs.", "They hold a dozen."], ["6 eggs", "2 * 6 = 8"]),
    ("did the letter come from", ["Oslo", "It came from Oslo."], ["It was model_answers in Oslo blue.", "Ink"]),
    ("Leo drink", ["Cocoa", "Leo drinks cocoa."], ["Mia drinks tea.", "Leo drinks tea, and not cocoa"]),
    ('past tense of "go"', ["went", 'It is "went".'], ['"goed", or went', "gone"]),
    ("not belong", ["Hammer", "The hammer, because it is a tool."], ["Apple, not hammer", "banana"]),
    ("The food was", ["Negative.", "The sentiment is negative."], ["Positive", "not negative", "positive, negative"]),
    ("The room was", ["Unhappy", "He is not happy.", "They are not very happy."], ["Happy", "happy, not unhappy"]),
    ("list of four", ["1. a\n2. b\n3. c\n4. d", "1) a 2) b 3) c 4) d"], ["1. a\n2. b\n3. c", "1. 2. 3. 4. 5."]),
    ("three fruits", ["Apples, pears and plums", "1. Mango\n2. Kiwi\n3. Banana"], ["An apple and a pear", "Bread"]),
    ("by commas", ["red, green, blue", "Red, blue, and yellow."], ["1. Red\n2. Blue", "red and blue"]),
    ("lower case", ["the sea is deep."], ["The sea is deep.", "the lake is deep."]),
    ("headings", ["Ingredients\n- tea\n\nSteps\n1. boil", "**Ingredients:**\ntea\n**Steps:**\nboil"], ["Ingredients"]),
    ("JSON", ['{"name": "Anna"}', '```json\n{\n  "name": "Anna"\n}\n```'], ['{"name": "Bob"}', "name: Anna"]),
    ("into French", ["Bonjour", 'In French, it is "Bonjour".', "Bonjour !"], ["Je suis bonjour.", "Bon soir"]),
    ("negative: ", ["I don't like rain.", "I do not like the rain", "I dislike rain."], ["I like rain.", "Rain, not"]),
    ("add(a, b)", ["def add(a: int, b: int) -> int:\n    return (a + b)"], ["def add(a, b):\n    return a - b"]),
    ("from 0 to 4", ["for i in range(5):\n    print(i)"], ["for i in range(0, 4, 1):\n    print(i)"]),
    ("SQL", ["SELECT * FROM users;", "select * from `users`"], ["SELECT * FROM users WHERE id = 1"]),
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
        assert answer.ids == expected
        assert answer.stopped == (len(expected) < 12)
        assert answer.text == TOKENIZER.decode(expected, skip_special_tokens=True)


def test_an_answer_ends_at_the_end_token_of_the_model():
    model = deepcopy(MODEL)
    questions = some_questions(2)
    third_token = ask(model, TOKENIZER, questions, 6)[0].ids[2]
    model.generation_config.eos_token_id = [third_token]

    answer = ask(model, TOKENIZER, questions, 6)[0]

    assert answer.stopped
    assert third_token not in answer.ids
    assert len(answer.ids) <= 2


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
    for answer in ask(MODEL, TOKENIZER, some_questions(), 40):
        runs = [tuple(answer.ids[start : start + 4]) for start in range(len(answer.ids) - 3)]
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


# --- divergence
@torch.no_grad()
def expected_divergence(dense, model, prompt, answer):
    """Return KL(dense‖model) summed over the tokens of an answer."""
    row = torch.tensor([prompt + answer])
    log_probs = log_softmax(model(row).logits[0, len(prompt) - 1 : -1], -1)
    dense_log_probs = log_softmax(dense(row).logits[0, len(prompt) - 1 : -1], -1)
    return float((dense_log_probs.exp() * (dense_log_probs - log_probs)).sum())


def test_the_divergence_on_answers_equals_its_definition():
    questions = some_questions(3)
    prompts = [question.ids(TOKENIZER) for question in questions]
    model_answers = ask(MODEL, TOKENIZER, questions, 6)
    model = deepcopy(MODEL)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    alignment = TokenAlignment.between(MODEL, TOKENIZER, model, TOKENIZER)

    total = 0
    num_tokens = 0
    for prompt, answer in zip(prompts, model_answers, strict=True):
        total += expected_divergence(MODEL, model, prompt, answer.ids)
        num_tokens += len(answer.ids)

    divergence = answer_divergence(MODEL, model, alignment, prompts, model_answers)
    assert divergence == pytest.approx(total / num_tokens, rel=1e-4)


def test_the_divergence_on_answers_counts_removed_tokens():
    questions = some_questions(3)
    prompts = [question.ids(TOKENIZER) for question in questions]
    model_answers = ask(MODEL, TOKENIZER, questions, 6)
    small_model, small_tokenizer = with_tokens(MODEL, TOKENIZER, list(range(300)))
    alignment = TokenAlignment.between(MODEL, TOKENIZER, small_model, small_tokenizer)

    assert max(max(answer.ids) for answer in model_answers if answer.ids) >= 300
    assert answer_divergence(MODEL, small_model, alignment, prompts, model_answers) > 1e-3


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
    assert len(result.questions) == 16
    assert result.models == ["original", "pruned"]

    later_check = ShortCheck(TOKENIZER, 10**9)
    later_check.ask("recovered", MODEL)
    assert later_check.result(result).models == ["original", "pruned", "recovered"]
    assert later_check.result(AnswersResult(result.questions[:3])).models == ["recovered"]

    monkeypatch.setattr(answers, "continuations", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="no answers of the original model: division"):
        later_check.ask("original", MODEL)
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

    assert "16 test questions: correct " in capsys.readouterr().out
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
