"""Items of a task: what each of them scores, and whether two models differ."""

import json
from math import comb, isnan

import pytest
import torch
from models import build, documents, tokenizer
from torch.nn.functional import log_softmax
from transformers import GenerationConfig

from optimum_structprune import DomainConfig, Manifest, StructPruneError, evaluate
from optimum_structprune.domains.manifest import Entry
from optimum_structprune.evaluation import tasks
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.evaluation.paired import paired
from optimum_structprune.evaluation.tasks import Tasks
from optimum_structprune.forward.metrics import sample_losses, standard_error


pytest.importorskip("lm_eval")


def quiz(path, count, seed=0):
    """Items of several lengths, whose choices have equally many tokens, and the file that holds them."""
    generator, items = torch.Generator().manual_seed(seed), []
    for number in range(count):
        a, b, c, d = (f"w{word}" for word in torch.randint(3, 96, (4,), generator=generator).tolist())
        choices = [c, d] if number % 3 else [f"{c} {a}", f"{d} {b}"]
        items.append({"query": f"{a} {b} {d}" if number % 2 else a, "choices": choices, "gold": 0})
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return items, path


# A window shorter than a prompt, and a state beside the cache: what fills up a batch must not show.
@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "falcon_h1"])
def test_items_score_as_the_likelihoods_of_their_choices_say(case, tmp_path):
    model, reader = build(case).train(), tokenizer()
    reader.pad_token = None
    items, path = quiz(tmp_path / "quiz.jsonl", 21)
    answers = Tasks([path]).score(model, reader)
    assert model.training and reader.pad_token is None
    model.eval()
    expected, shares = {"acc": {}, "acc_norm": {}}, {}
    for number, item in enumerate(items):
        start, likelihoods = len(reader(item["query"])["input_ids"]), []
        for choice in item["choices"]:
            whole = reader(f"{item['query']} {choice}")["input_ids"]
            with torch.no_grad():
                logits = log_softmax(model(torch.tensor([whole])).logits[0], dim=-1)
            likelihoods.append(sum(float(logits[at - 1, whole[at]]) for at in range(start, len(whole))))
        expected["acc"][number] = float(likelihoods[0] > likelihoods[1])
        first, second = (of / len(choice) for of, choice in zip(likelihoods, item["choices"], strict=True))
        expected["acc_norm"][number] = float(first > second)
        shares[number] = likelihoods[0] - float(torch.tensor(likelihoods).logsumexp(-1))
    assert answers.items["quiz"].pop("logprob") == pytest.approx(shares, abs=1e-4)
    assert answers.items["quiz"] == expected and expected["acc"] != expected["acc_norm"]
    scores = answers.scores["quiz"]
    assert 0 < scores["acc"] < 1 and 0 < scores["acc_norm"] < 1
    for metric, of_items in {**expected, "logprob": shares}.items():
        values = torch.tensor([*of_items.values()])
        # Log-probabilities of a batch are those of one sequence to within rounding.
        assert scores[metric] == pytest.approx(float(values.mean()), abs=1e-4 if metric == "logprob" else None)
        assert scores[f"{metric}_stderr"] == pytest.approx(float(values.std() / len(items) ** 0.5), rel=1e-4)
    assert scores["items"] == len(items)
    assert len(Tasks([path]).score(model, reader, limit=3).items["quiz"]["acc"]) == 3


# A task may name its right choice by text, have several right ones, or hide which it is (test sets do).
@pytest.mark.parametrize("case", ["text", "several", "hidden"])
def test_the_share_of_the_right_choice_whatever_names_it(case, tmp_path, monkeypatch):
    path = quiz(tmp_path / "quiz.jsonl", 6)[1]
    model, reader = build("llama-tied"), tokenizer()
    plain = Tasks([path]).score(model, reader)
    named = {"text": lambda item: item["choices"][0], "several": lambda item: [0, 1], "hidden": lambda item: -1}
    local = tasks.local_task
    monkeypatch.setattr(tasks, "local_task", lambda path: {**local(path), "doc_to_target": named[case]})
    found = Tasks([path]).score(model, reader)
    if case == "hidden":
        assert "logprob" not in found.items["quiz"] and "logprob" not in found.scores["quiz"]
    else:
        expected = plain.items["quiz"]["logprob"] if case == "text" else dict.fromkeys(range(6), 0.0)
        assert found.items["quiz"]["logprob"] == pytest.approx(expected, abs=1e-6)


def test_a_template_that_refuses_is_named_before_a_task_is_asked(tmp_path, monkeypatch):
    reader, local = tokenizer(), tasks.local_task
    reader.chat_template = {"rag": "{{ messages }}"}
    quiz(tmp_path / "quiz.jsonl", 2)
    how = {"output_type": "generate_until", "doc_to_target": "query"}
    monkeypatch.setattr(
        tasks, "local_task", lambda path: {name: of for name, of in local(path).items() if "choice" not in name} | how
    )
    with pytest.raises(StructPruneError, match="chat template of .* refuses a conversation"):
        Tasks([tmp_path / "quiz.jsonl"]).score(build("llama-tied"), reader)


def test_a_task_in_which_the_model_writes(tmp_path, monkeypatch):
    model, reader = build("llama-tied"), tokenizer()
    items, path = quiz(tmp_path / "quiz.jsonl", 9)
    written = [model.generate(**reader(item["query"], return_tensors="pt"), max_new_tokens=6) for item in items]
    texts = {
        item["query"]: reader.decode(ids[0, len(item["query"].split()) :], skip_special_tokens=True).partition("w3")[0]
        for item, ids in zip(items, written, strict=True)
    }
    how = {"output_type": "generate_until", "generation_kwargs": {"until": ["w3"], "max_gen_toks": 6}}
    assert len({*texts.values()}) > 1
    how |= {"doc_to_target": lambda item: texts[item["query"]]}
    how |= {"metric_list": [{"metric": "exact_match", "higher_is_better": True}]}
    local = tasks.local_task
    monkeypatch.setattr(
        tasks, "local_task", lambda path: {name: of for name, of in local(path).items() if "choice" not in name} | how
    )
    model.generation_config = GenerationConfig(repetition_penalty=9.0, max_time=1e-9)
    scores = Tasks([path]).score(model, reader).scores["quiz"]
    assert (model.generation_config.repetition_penalty, scores["exact_match"], scores["items"]) == (9.0, 1, 9)


def test_models_differ_by_pairs(tmp_path):
    models = [build("llama-tied", seed) for seed in range(2)]
    tasks = [quiz(tmp_path / f"{name}.jsonl", count, count)[1] for name, count in (("one", 20), ("two", 10))]
    found = evaluate(models[0], tokenizer(), tasks=tasks, dense=models[1])
    for name, count in (("one", 20), ("two", 10)):
        scores, pair = found.tasks[name], found.paired[name]["acc"]
        assert pair.items == count and pair.difference == pytest.approx(
            scores["model"]["acc"] - scores["dense"]["acc"]
        )
        assert pair.difference == pytest.approx((pair.better - pair.worse) / count)
    together = found.paired["all items"]["acc"]
    assert together.items == 30 and together.worse == sum(found.paired[name]["acc"].worse for name in ("one", "two"))
    assert found.to_dict()["paired"]["one"]["acc"]["verdict"] in str(found)
    same = evaluate(models[0], tokenizer(), tasks=tasks[:1], dense=models[0]).paired["one"]["acc"]
    assert (same.difference, same.p_value, same.verdict) == (0, 1, "alike")


def test_the_test_of_mcnemar_is_its_definition():
    for better, worse in [(0, 0), (3, 3), (1, 4), (1, 12), (12, 1)]:
        scores = [(1.0, 0.0)] * better + [(0.0, 1.0)] * worse + [(1.0, 1.0)] * 5
        found = paired(*(dict(enumerate(score[at] for score in scores)) for at in (0, 1)))
        apart = better + worse
        tail = sum(comb(apart, k) for k in range(min(better, worse) + 1)) / 2**apart
        assert found.p_value == pytest.approx(min(1, 2 * tail)) and (found.better, found.worse) == (better, worse)
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
    assert isnan(standard_error(mine[:4])) and not isnan(standard_error(mine[:5]))
    alone = evaluate(model, tokenizer(), [domain], seq_length=24, num_samples=4)
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
