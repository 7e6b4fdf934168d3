"""Answers: patterns, greedy writing, figures, the short check of a run, and the command."""

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


MODEL, READER = real_text_model()
READER.chat_template = CHATML


def questions(count=6):
    return read_questions()[:: 120 // count][:count]


def test_the_built_in_questions_are_many_of_eight_kinds():
    every = read_questions()
    kinds = [question.kind for question in every]
    assert len(every) >= 100 and len(set(kinds)) == 8 and min(map(kinds.count, kinds)) >= 12
    assert len({question.prompt for question in every}) == len(every)
    assert kinds[:16].count("code") == kinds[:16].count("facts") == 2
    for question in every:
        assert not any(question.pattern.search(text) for text in ("", "I do not know.", "Yes")), question.prompt


# Words of a prompt, answers that are right, and answers that are not.
@pytest.mark.parametrize(("words", "right", "wrong"), [
    ("capital of France", ["Paris.", "It is **Paris**, on the Seine."], ["Lyon", "Parisian food is good"]),
    ("2 + 3?", ["5", "2 + 3 = 5.", "It is five.", "It equals **5**"], ["2 + 3 = 6", "It is 5 + 1", "is 5.5", "is 15"]),
    ("two boxes hold", ["12", "Two boxes hold 2 * 6 = 12 eggs.", "They hold a dozen."], ["6 eggs", "2 * 6 = 8"]),
    ("did the letter come from", ["Oslo", "It came from Oslo."], ["It was written in Oslo blue.", "Ink"]),
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
def test_right_answers_may_be_phrased_otherwise(words, right, wrong):
    (question,) = (question for question in read_questions() if words in question.prompt)
    assert [text for text in right if not question.pattern.search(text.strip())] == []
    assert [text for text in wrong if question.pattern.search(text.strip())] == []


@pytest.mark.parametrize(("line", "message"), [
    ('{"prompt": "Hi"}', "line 2, is no question.*'right'"),
    ('{"right": "a"}', "no question.*'prompt'"),
    ('{"prompt": "Hi", "right": "("}', "no question.*unterminated"),
    ('{"messages": "Hi", "right": ""}', "no question"),
    ('{"prompt": "\\ud800", "right": ""}', "no question.*surrogates not allowed"),
    ("[1", "no question"),
    ("", "has no questions for"),
])  # fmt: skip
def test_a_file_or_a_line_without_a_question(line, message, tmp_path):
    first = '\ufeff{"prompt": "Hi", "right": ""}\n' if line else "\n"
    (tmp_path / "mine.jsonl").write_text(first + line, encoding="utf-8")
    with pytest.raises(StructPruneError, match=message):
        read_questions(tmp_path / "mine.jsonl")
    with pytest.raises(StructPruneError, match="cannot be read"):
        read_questions("built-in")


@torch.no_grad()
def alone(model, ids, count, end):
    """The greedy answer, without a cache, a batch or padding."""
    written = []
    while len(written) < count:
        token = int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
        if token == end:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_answers_are_greedy_whatever_is_written_together(batch_size):
    asked = questions()
    written = ask(MODEL, READER, asked, 12, batch_size)
    for question, answer in zip(asked, written, strict=True):
        expected = alone(MODEL, question.ids(READER), 12, READER.eos_token_id)
        assert (answer.ids, answer.stopped) == (expected, len(expected) < 12)
        assert answer.text == READER.decode(expected, skip_special_tokens=True)


def test_an_answer_ends_where_the_model_ends_it():
    model, asked = deepcopy(MODEL), questions(2)
    third = ask(model, READER, asked, 6)[0].ids[2]
    model.generation_config.eos_token_id = [third]
    written = ask(model, READER, asked, 6)
    assert written[0].stopped and third not in written[0].ids and len(written[0].ids) <= 2


def test_the_settings_of_the_model_have_no_say_and_stay():
    model, tokenizer = deepcopy(MODEL).train(), READER
    expected = ask(MODEL, tokenizer, questions(), 8)
    odd = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 5.0, "max_time": 1e-9}
    odd |= {"min_new_tokens": 9, "max_length": 3, "suppress_tokens": [5], "no_repeat_ngram_size": 1}
    model.generation_config = settings = GenerationConfig(**odd)
    assert ask(model, tokenizer, questions(), 8) == expected
    assert model.generation_config is settings and settings.to_diff_dict().items() >= odd.items() and model.training


def test_an_answer_loops_that_repeats_a_run():
    for answer in ask(MODEL, READER, questions(), 40):
        runs = [run for run in zip(*(answer.ids[start:] for start in range(4)), strict=False)]
        assert answer.loops == (max(map(runs.count, runs), default=0) > 3)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(StructPruneError, match="max_new_tokens=1024 .* 1024 positions .* Pass at most"):
        ask(MODEL, READER, questions(), 1024)


def test_a_model_without_a_template_goes_on_from_openings():
    model, tokenizer = MODEL, deepcopy(READER)
    tokenizer.chat_template = None
    openings = read_questions(tokenizers=[READER, tokenizer])
    question, ids = openings[0], openings[0].ids(tokenizer)
    assert tokenizer.decode(ids[1:]) == question.opening and ids[0] == tokenizer.bos_token_id
    evaluation = evaluate(model, tokenizer, answers="builtin", max_new_tokens=2, limit=5)
    assert [item.prompt for item in evaluation.answers.questions] == [of.prompt for of in openings[:5]]
    assert len(openings) >= 60 and all(of.opening for of in openings)
    assert "answers correct" in str(evaluation) and " of 5" in str(evaluation)


def test_divergence_is_its_definition_and_counts_tokens_that_are_gone():
    other = deepcopy(MODEL)
    torch.nn.init.normal_(other.lm_head.weight, std=0.1)
    asked = questions(3)
    written = ask(MODEL, READER, asked, 6)
    prompts = [question.ids(READER) for question in asked]
    total = tokens = 0
    for prompt, answer in zip(prompts, written, strict=True):
        row = torch.tensor([[*prompt, *answer.ids]])
        with torch.no_grad():
            ours, theirs = (log_softmax(of(row).logits[0, len(prompt) - 1 : -1], -1) for of in (other, MODEL))
        total, tokens = total + float((theirs.exp() * (theirs - ours)).sum()), tokens + len(answer.ids)
    parts = TokenAlignment.between(MODEL, READER, other, READER)
    assert answer_divergence(MODEL, other, parts, prompts, written) == pytest.approx(total / tokens, rel=1e-4)
    assert max(token for answer in written for token in answer.ids) >= 300
    few, reader = with_tokens(MODEL, READER, [*range(300)])
    parts = TokenAlignment.between(MODEL, READER, few, reader)
    assert answer_divergence(MODEL, few, parts, prompts, written) > 1e-3


def test_a_run_is_checked_unless_it_reads_next_to_nothing(monkeypatch):
    for tokens, asked in ((0, 0), (4095, 0), (4096, 16)):
        check = ShortCheck(READER, tokens)
        check.ask("dense", MODEL)
        check.ask("pruned", MODEL)
        result = check.result()
        assert (0 if result is None else len(result.questions)) == asked
    assert result.models == ["dense", "pruned"]
    later = ShortCheck(READER, 10**9)
    later.ask("recovered", MODEL)
    assert later.result(result).models == ["dense", "pruned", "recovered"]
    assert later.result(AnswersResult(result.questions[:3])).models == ["recovered"]
    monkeypatch.setattr(answers, "continuations", lambda *rest: 1 / 0)
    with pytest.warns(UserWarning, match="no answers of the dense model: division"):
        later.ask("dense", MODEL)
    assert later.result() is None


@pytest.mark.parametrize("case", ["bert", "t5-gated"])
def test_what_does_not_write_is_not_asked(case):
    check = ShortCheck(READER, 10**9)
    check.ask("dense", build(case))
    assert check.result() is None


def test_prune_ends_with_answers_and_shows_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(answers, "SHORT_CHECK_MIN_READ", 1)
    save_with_tokenizer(MODEL, tmp_path / "model", READER)
    text = ["--domain", "math=builtin:math", "--num-samples", "6", "--seq-length", "32", "--general-share", "0"]
    command = ["prune", str(tmp_path / "model"), str(tmp_path / "out"), "--width", "mlp=1200", *text, "--quiet"]
    assert main(command) == 0
    assert "16 test questions: correct " in capsys.readouterr().out
    paths = (tmp_path / "out" / name for name in ("report.json", "report.html", "README.md"))
    report, page, card = (path.read_text() for path in paths)
    answered = Report.load(tmp_path / "out" / "report.json").answers
    prompts = [question.prompt.partition("\n")[0][:20] for question in sample_questions(answered)]
    assert len(prompts) == len(re.findall(r"<b>original: (?:right|wrong)", page)) == 3
    assert "## Answers" in card and all(prompt in card for prompt in prompts)
