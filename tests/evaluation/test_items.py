"""Items of a task: what a model answers, what outlives a kill, and whether two models differ."""

import json
from functools import wraps
from math import comb, isnan

import pytest
import torch
from models import build, documents, tokenizer
from torch.nn.functional import log_softmax

from optimum_structprune import DomainConfig, Manifest, StructPruneError, evaluate
from optimum_structprune.domains.manifest import Entry
from optimum_structprune.evaluation.evaluate import Evaluation
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.evaluation.paired import paired
from optimum_structprune.forward.metrics import sample_losses, standard_error


pytest.importorskip("lm_eval")
choices = pytest.importorskip("optimum_structprune.evaluation.choices")

# Choices of one token, of several, and of different numbers of them.
ITEMS = [
    {"query": "w5 w6 w7 w8 w9 w10", "choices": ["w7", "w8 w9 w10", "w11 w12"], "gold": 0},
    {"query": "w5 w6 w7 w8 w9 w10", "choices": ["w20", "w21"], "gold": 1},
    {"query": "w30", "choices": ["w31 w32 w33 w34", "w35"], "gold": 0},
    {"query": "w40 w41", "choices": ["w42 w43", "w44 w45"], "gold": 1},
]


def write_items(path, items=ITEMS):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def answers(folder) -> list[dict]:
    """The lines of the one file in a folder of items, without its head."""
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def defined(model, item) -> list[float]:
    """The log-likelihood of each choice by its definition: every choice in a pass of its own."""
    reader, found = tokenizer(), []
    for choice in item["choices"]:
        context = reader(item["query"])["input_ids"]
        whole = reader(f"{item['query']} {choice}")["input_ids"]
        with torch.no_grad():
            logits = log_softmax(model(torch.tensor([whole])).logits[0].float(), dim=-1)
        found.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole))))
    return found


# Keys and values, a window shorter than a prompt, a convolution beside attention, and a state-space model.
@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "lfm2", "falcon_h1"])
def test_choices_after_a_shared_prompt_score_as_each_does_alone(case, tmp_path):
    model = build(case)
    evaluate(model, tokenizer(), tasks=[write_items(tmp_path / "quiz.jsonl")], items=tmp_path / "kept")
    found = answers(tmp_path / "kept")
    found.sort(key=lambda line: line["item"])
    assert [(line["task"], line["item"]) for line in found] == [("quiz", number) for number in range(len(ITEMS))]
    for line, item in zip(found, ITEMS, strict=True):
        assert line["loglikelihood"] == pytest.approx(defined(model, item), abs=1e-4)


def test_texts_are_scored_as_before():
    from lm_eval.api.instance import Instance

    model, text = build("llama-tied"), documents(1)[0]
    wrapped = choices.SharedPrompts(pretrained=model, tokenizer=tokenizer(), backend="causal", batch_size=1)
    (found,) = wrapped.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = torch.tensor([[1, *tokenizer()(text, add_special_tokens=False)["input_ids"]]])
    assert found == pytest.approx(-float(sample_losses(model, ids)[0]) * (ids.shape[1] - 1), rel=1e-4)


def test_a_killed_run_goes_on_at_the_next_item(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "ITEMS_AT_ONCE", 1)
    model, quiz, kept = build("llama-tied"), write_items(tmp_path / "quiz.jsonl"), tmp_path / "kept"
    whole = evaluate(model, tokenizer(), tasks=[quiz])
    forward, left = type(model).forward, 3

    @wraps(forward)
    def dying(*args, **more):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return forward(*args, **more)

    monkeypatch.setattr(type(model), "forward", dying)
    with pytest.raises(KeyboardInterrupt):  # between the prompt and the choices of the second item to be asked
        evaluate(model, tokenizer(), tasks=[quiz], items=kept)
    assert [line["item"] for line in answers(kept)] == [2]  # the one with the longest choice
    (path,) = kept.glob("*.jsonl")
    path.write_text(path.read_text() + '{"task": "quiz", "item": 0, "sha')
    left = 5  # of the three that are left, one has choices of one token, which need no pass of their own
    assert evaluate(model, tokenizer(), tasks=[quiz], items=kept).tasks == whole.tasks
    assert sorted(line["item"] for line in answers(kept)) == [0, 1, 2, 3] and left == 0
    assert evaluate(model, tokenizer(), tasks=[quiz], items=kept).tasks == whole.tasks
    path.write_text(path.read_text() + "[]\n")
    with pytest.raises(StructPruneError, match="line 6, holds no answers to an item"):
        evaluate(model, tokenizer(), tasks=[quiz], items=kept)


def test_models_share_a_folder_and_differ_by_pairs(tmp_path):
    models = [build("llama-tied", seed) for seed in range(2)]
    generator = torch.Generator().manual_seed(0)
    words = [[f"w{number}" for number in torch.randint(3, 96, (4,), generator=generator).tolist()] for _ in range(30)]
    items = [{"query": f"{a} {b}", "choices": [c, f"{d} {a}"], "gold": 0} for a, b, c, d in words]
    tasks = [write_items(tmp_path / "one.jsonl", items[:20]), write_items(tmp_path / "two.jsonl", items[20:])]
    found = evaluate(models[0], tokenizer(), tasks=tasks, dense=models[1], items=tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.jsonl"))) == 2
    for name, count in (("one", 20), ("two", 10)):
        scores, pair = found.tasks[name], found.paired[name]["acc"]
        assert pair.items == count and pair.difference == pytest.approx(
            scores["model"]["acc"] - scores["dense"]["acc"]
        )
        assert pair.difference == pytest.approx((pair.better - pair.worse) / count)
    together = found.paired["all items"]["acc"]
    assert together.items == 30 and together.worse == sum(found.paired[name]["acc"].worse for name in ("one", "two"))
    assert found.to_dict()["paired"]["one"]["acc"]["verdict"] in str(found)
    same = evaluate(models[0], tokenizer(), tasks=tasks, dense=models[0], items=tmp_path / "kept").paired["one"]["acc"]
    assert (same.difference, same.p_value, same.verdict) == (0, 1, "alike")


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 3), (1, 4), (1, 12), (12, 1)])
def test_the_test_of_mcnemar_is_its_definition(better, worse):
    scores = [(1.0, 0.0)] * better + [(0.0, 1.0)] * worse + [(1.0, 1.0)] * 5
    found = paired(*(dict(enumerate(score[at] for score in scores)) for at in (0, 1)))
    apart = better + worse
    tail = sum(comb(apart, k) for k in range(min(better, worse) + 1)) / 2**apart
    assert found.p_value == pytest.approx(min(1, 2 * tail))
    assert (found.better, found.worse) == (better, worse)
    assert found.verdict == ("alike" if found.p_value >= 0.05 else "better" if better > worse else "worse")


def test_scores_that_are_no_yes_or_no_are_compared_by_their_differences():
    dense = {item: item / 40 for item in range(40)}
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0)) / 100
    lower = {item: score - 0.02 + float(noise[item]) for item, score in dense.items()}
    alike = {item: score + float(noise[item]) for item, score in dense.items()}
    assert [paired(one, dense).verdict for one in (lower, alike, dense)] == ["worse", "alike", "alike"]
    with pytest.raises(ValueError, match="39 and 40 items"):
        paired({item: lower[item] for item in range(39)}, dense)


def test_errors_of_perplexities_are_those_of_the_samples():
    model, dense = build("llama-tied", 0), build("llama-tied", 1)
    domain = DomainConfig("a", documents(40))
    found = evaluate(model, tokenizer(), [domain], dense=dense, seq_length=24, num_samples=6, batch_size=4)
    samples = read_heldout(domain, tokenizer(), 24, 6).samples
    mine, theirs = (torch.stack([sample_losses(one, row[None])[0] for row in samples]) for one in (model, dense))
    for which, losses in (("model", mine), ("dense", theirs), ("ratio", mine - theirs)):
        expected = float(losses.mean().exp() * losses.std() / 6**0.5)
        assert found.perplexity_stderr["a"][which] == pytest.approx(expected, rel=1e-6)
    assert f"± {found.perplexity_stderr['a']['ratio']:.3f}" in str(found)
    assert isnan(standard_error(mine[:1]))
    alone = evaluate(model, tokenizer(), [domain], seq_length=24, num_samples=1)
    assert "±" not in str(alone).splitlines()[1]


def test_calibrated_kinds_stand_apart():
    entry = Entry("prose", {"source": "somewhere"}, 1.0, 8, 8, 8, "", "", [], [])
    manifest = Manifest(0, 8, "", {}, [entry])
    domains = [DomainConfig(name, documents(10, seed)) for seed, name in enumerate(("law", "prose", "poems"))]
    found = evaluate(build("llama-tied"), tokenizer(), domains, seq_length=24, num_samples=2, manifest=manifest)
    assert found.calibrated == ["prose"]
    first = [line.split("  ")[0] for line in str(found).splitlines()]
    assert first[1:6] == ["calibrated kinds:", "prose", "other kinds:", "law", "poems"]
    assert "geometric mean" in str(found).splitlines()[6] and str(found).count("geometric mean") == 1
    assert isinstance(found, Evaluation) and found.to_dict()["calibrated"] == ["prose"]
