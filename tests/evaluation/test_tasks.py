"""Test `structprune evaluate --tasks`. The libraries are installed by hand: `pip install lm-eval mteb`."""

import html
import json
from importlib.util import find_spec
from math import sqrt

import pytest
from helpers import error_line, save_with_tokenizer
from models import PLAIN, random_model, real_text_model
from transformers import AutoModel

from optimum_structprune.commands.cli import main
from optimum_structprune.evaluation import tasks as tasks_module


needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval"
)
needs_mteb = pytest.mark.skipif(find_spec("mteb") is None, reason="MTEB is not installed: pip install mteb")

QUESTIONS = [f"What is {number} plus {number}?" for number in range(10)]
# The task generates 4 tokens unless the caller says another number.
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["@@@"], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def generated(model, tokenizer, question: str, new_tokens: int) -> str:
    """Return the greedy continuation of a question."""
    inputs = tokenizer(question, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model, the model pruned by half of its channels, and a task whose first seven answers the model gives."""
    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = real_text_model()
    save_with_tokenizer(model, folder / "model", tokenizer)
    line = ["prune", str(folder / "model"), str(folder / "small"), "--width", "mlp=768", "--quiet"]
    assert main([*line, "--num-samples", "6", "--seq-length", "24", "--domain", "math=builtin:math"]) == 0

    rows = []
    for number, question in enumerate(QUESTIONS):
        answer = generated(model, tokenizer, question, 9) if number < 7 else "another answer"
        rows.append(json.dumps({"question": question, "answer": answer}))
    (folder / "sums.jsonl").write_text("\n".join(rows))
    (folder / "sums.yaml").write_text(TASK.format(file=folder / "sums.jsonl"))
    return folder


@needs_lm_eval
@pytest.mark.slow
def test_a_local_task_has_the_share_of_equal_answers_and_its_standard_error(folder, capsys):
    line = ["evaluate", str(folder / "small"), "--against", str(folder / "model"), "--html", "--quiet"]
    line += ["--tasks", str(folder / "sums.yaml")]

    assert main([*line, "--task-new-tokens", "9", "--json"]) == 0

    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert tasks["new_tokens"] == 9
    ((label, scores),) = tasks["scores"].items()
    assert label == "sums, exact_match"
    assert scores["original"]["value"] == pytest.approx(0.7)
    assert scores["original"]["error"] == pytest.approx(sqrt(0.7 * 0.3 / 9), rel=1e-3)
    assert scores["pruned"]["value"] < 0.7

    page = html.unescape((folder / "small" / "report.html").read_text())
    later_measurements = page[page.index("Measured later") :]
    assert "sums, exact_match" in later_measurements
    assert "0.700 (0.153)" in later_measurements
    assert "at most 9 new tokens; in brackets: the standard error" in later_measurements

    # With the 4 tokens of the task alone, no answer would be complete.
    assert main([*line, "--task-new-tokens", "4", "--limit", "5"]) == 0
    output = capsys.readouterr().out
    assert "sums, exact_match" in output
    assert "0.000" in output
    assert "the first 5 questions of each" in output


@needs_lm_eval
def test_unknown_tasks_and_too_many_new_tokens_are_refused(folder, capsys):
    line = ["evaluate", str(folder / "model"), "--tasks"]
    assert main([*line, "sumz", "--task-new-tokens", "9"]) == 2
    assert "lm-eval has no task 'sumz'" in error_line(capsys)
    assert main([*line, "gsm8k", "--task-new-tokens", "1024"]) == 2
    assert "`task_new_tokens` must be less than the 1024 positions" in error_line(capsys)


@needs_mteb
@pytest.mark.slow
def test_an_encoder_has_the_scores_of_mteb(tmp_path, monkeypatch, capsys):
    import mteb
    from mteb.mocks.mock_tasks.sts import MockSTSTask
    from sentence_transformers import SentenceTransformer

    tokenizer = real_text_model()[1]
    encoder = random_model(AutoModel, "bert", PLAIN | {"vocab_size": len(tokenizer), "max_position_embeddings": 256})
    save_with_tokenizer(encoder, tmp_path / "encoder", tokenizer)
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [MockSTSTask()])

    assert main(["evaluate", str(tmp_path / "encoder"), "--tasks", "MockSTSTask", "--json", "--quiet"]) == 0

    tasks = json.loads(capsys.readouterr().out)["tasks"]
    model = SentenceTransformer(str(tmp_path / "encoder"))
    expected = mteb.evaluate(model, MockSTSTask(), cache=None).task_results[0].get_score()
    assert tasks["scores"] == {"MockSTSTask": {"model": {"value": pytest.approx(expected)}}}
    assert tasks["library"].startswith("mteb ")


def test_a_missing_library_is_named_with_its_command(folder, monkeypatch, capsys):
    monkeypatch.setattr(tasks_module, "find_spec", lambda name: None)
    assert main(["evaluate", str(folder / "model"), "--tasks", "gsm8k,ifeval"]) == 2
    assert error_line(capsys).endswith(": `tasks` need the package lm-eval: pip install lm-eval.")
