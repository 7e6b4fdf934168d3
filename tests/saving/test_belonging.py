"""A record belongs to what it describes: plans, reports and manifests to their model."""

import json
import re
from copy import deepcopy
from html import unescape
from itertools import product
from shlex import split

import pytest
from helpers import same_weights, save_desk, without_refit, write_texts
from models import build, config, documents, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig, Plan, StructPruneError, StructPruner, evaluate
from optimum_structprune.commands.cli import main
from optimum_structprune.record.plan import PLAN_NAME
from optimum_structprune.system.fingerprint import fingerprint


CONFIGS = (config(refit="none"), config(refit="none", domains=[DomainConfig("c", documents(seed=5))]))


def test_every_model_is_saved_with_the_records_of_its_own_run(tmp_path):
    """Two models by two pruners, saved in any order."""
    dense, pruners = [build("llama-tied", seed) for seed in (0, 1)], [StructPruner(one) for one in CONFIGS]
    runs = []
    for model, pruner in product(dense, pruners):
        small = pruner.prune_model(model, tokenizer())
        runs.append((model, pruner, small, pruner.report.to_dict(), pruner.manifest))
    for number in (1, 3, 0, 2):
        model, pruner, small, report, manifest = runs[number]
        folder = tmp_path / str(number)
        pruner.save(small, folder, tokenizer())
        saved = json.loads((folder / "report.json").read_text())
        assert saved["perplexity"] == json.loads(json.dumps(report["perplexity"]))
        assert type(manifest).load(folder) == manifest
        plan = Plan.load(folder / PLAN_NAME)
        assert same_weights(without_refit(model, plan), small) and plan.sizes["mlp"] == 40
        for other, _, other_small, *_ in runs:
            assert (plan.dense == fingerprint(other)) == (other is model) and plan.dense != fingerprint(other_small)
    pruner.save(deepcopy(small), tmp_path / "copy", tokenizer())  # a copy carries the result too
    assert Plan.load(tmp_path / "copy" / PLAN_NAME) == Plan.load(folder / PLAN_NAME)
    with pytest.raises(StructPruneError, match="not what prune_model returned"):
        pruner.save(model, tmp_path / "dense")
    # The plan of a second pruning is for the once pruned model, and both together for the dense one.
    second = StructPruner(config(widths={"mlp": 12}))
    second.prune_model(small, tokenizer())
    assert second.plan.dense == fingerprint(small) and second.plan.sizes["mlp"] == 24
    assert plan.then(second.plan).dense == fingerprint(model)
    assert Plan.from_dict(second.plan.to_dict()) == second.plan


def text_file(path, seed=0):
    return write_texts(path, documents(200, seed))


def prune_and_recover(folder, *flags):
    """`prune --recover`, on text of one file, trained on that of another."""
    save_desk(folder, count=200)
    text_file(folder / "b.jsonl", seed=7)
    training = ["tokens=480", f"domains=[{{name: b, source: {folder / 'b.jsonl'}}}]"]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--num-samples", "6", "--device", "cpu"]
    given = [part for value in training for part in ("--recovery", value)]
    return ["prune", str(folder / "model"), str(folder / "out"), "--width", "mlp=24", *text, *given, *flags]


@pytest.mark.slow
def test_text_that_was_trained_on_is_not_unseen_and_what_the_page_says_repeats_all_of_it(tmp_path, monkeypatch):
    assert main(prune_and_recover(tmp_path)) == 0
    text_file(tmp_path / "c.jsonl", seed=9)
    domains = [DomainConfig(name, str(tmp_path / f"{file}.jsonl")) for name, file in (("other", "b"), ("new", "c"))]
    with pytest.warns(UserWarning, match="documents were trained on, in the training domain 'b'"):
        found = evaluate(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokenizer(), domains, seq_length=24)
    assert found.shared == ["other"]
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    lines = re.findall(r"structprune (?:prune|recover) [^\n<]*", unescape(page))
    assert len(lines) == 2
    for line in lines:
        assert main([*split(line)[1:], "--device", "cpu"]) == 0
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "out-again"))
    assert same_weights(first, again)
    assert "output_dir" not in (tmp_path / "out" / "recovery_config.json").read_text()
    assert "none of its documents was used for anything else" in card
    assert "| b " in card.split("## Trained afterwards")[1].split("## Limits")[0]
    # The card says it for whoever stands in its folder.
    commands = re.search(r"```bash\n(.*?)\n```", card, re.DOTALL)[1].splitlines()[:-1]
    assert len(commands) == 2 and str(tmp_path) not in "".join(commands)
    monkeypatch.chdir(tmp_path / "out")
    for line in commands:
        assert main([str(tmp_path / "model") if word == "DENSE" else word for word in split(line)[1:]]) == 0
    assert same_weights(first, AutoModelForCausalLM.from_pretrained("again"))
