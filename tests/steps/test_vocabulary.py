"""A smaller vocabulary: what its model computes, what it is chosen by, what is saved, and layers beside it."""

import json
from collections import Counter
from copy import deepcopy
from itertools import islice, permutations
from math import exp, log

import pytest
import torch
from accelerate import cpu_offload
from helpers import failing, recovery_config, same_weights, save_with_tokenizer, unread, with_long
from models import GROUPED, PLAIN, build, config, documents, fewer_tokens, random_model, real_text_model, tokenizer
from quantized import Reversible, quantized
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, Trainer

from optimum_structprune import RunOptions, StructPruner, dry_run, perplexity, prune_model, recover
from optimum_structprune.commands.cli import main
from optimum_structprune.config.domains import DomainConfig
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.manifest import COUNTED
from optimum_structprune.domains.packing import Passages, document_hash
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.errors import StructPruneError
from optimum_structprune.forward.metrics import row_losses
from optimum_structprune.pruning.measure import short_rows
from optimum_structprune.recovery.teacher import load_teacher
from optimum_structprune.system.resume import Resume
from optimum_structprune.vocabulary.languages import CHOOSING, cost_by_language, tokens_by_language


READER = real_text_model()[1]
JOINT = {"widths": None, "targets": ("vocab", "mlp"), "allocation": "sensitivity", "round_to": 8}


def text_model(auto=AutoModelForCausalLM, kind="llama", fields=GROUPED, positions=256):
    return random_model(auto, kind, {**fields, "vocab_size": 400, "max_position_embeddings": positions})


def pruned(model=None, inputs=None, options=None, **fields):
    pruner = StructPruner(fewer_tokens(**fields), options)
    return pruner, pruner.prune_model(text_model() if model is None else model, READER, inputs=inputs)


@torch.no_grad()
def logits(model, ids, keep=slice(None)):
    return model(torch.tensor([ids])).logits[..., keep]


def same_as_dense(pruner, small, model):
    """The model with fewer tokens predicts what the dense one does on the new tokens, among those that stay."""
    keep = list(pruner.plan.keep[-1, "vocab"])
    ids = pruner.tokenizer("The sum of 17 and 25 is 42, of course; naïve Ünïcödé.")["input_ids"]
    torch.testing.assert_close(logits(small, ids), logits(model, [keep[i] for i in ids], keep), atol=1e-5, rtol=0)
    return ids


def test_only_the_tokens_go_and_their_tokenizer_is_saved_with_the_model(tmp_path):
    model = text_model(positions=400)
    pruner, small = pruned(model)
    assert len(pruner.plan.keep[-1, "vocab"]) == 320 == small.config.vocab_size == len(pruner.tokenizer)
    assert model.config.vocab_size == 400 == len(READER)
    ids = same_as_dense(pruner, small, model)
    with pytest.raises(StructPruneError, match="of 96 tokens, does not belong to .*which has 320 tokens"):
        pruner.save(small, tmp_path / "out", tokenizer())
    for number, given in enumerate((None, READER, pruner.tokenizer)):
        pruner.save(small, tmp_path / str(number), given)
        assert AutoTokenizer.from_pretrained(tmp_path / str(number)).decode(ids) == pruner.tokenizer.decode(ids)
    card = (tmp_path / "1" / "README.md").read_text()
    assert "has a tokenizer of its own" in card and "- Removed tokens by script: Latin " in card
    assert 0 < pruner.report.trimmed.scripts["LATIN"] <= 80
    trimmed = pruner.report.trimmed
    assert Counter(trimmed.reason_of_each) == {name[0]: of for name, of in trimmed.reasons.items()}
    english = pruner.report.languages["en"]
    assert english.known and not english.wanted and english.cost.dense > 0 < english.cost.pruned
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    torch.testing.assert_close(logits(again, ids), logits(small, ids), atol=1e-6, rtol=0)
    assert pruner.report.dense.parameters - pruner.report.pruned.parameters == 2 * 32 * 80
    with pytest.warns(UserWarning, match="smaller vocabulary and needs a new tokenizer"):
        prune_model(model, fewer_tokens(), READER)


@pytest.mark.slow
def test_the_languages_to_keep_take_fewer_tokens_and_the_report_says_what_each_costs():
    fields = {"model": text_model(positions=400), "widths": {"vocab": 300}}
    (without, _), (kept, small) = pruned(**fields), pruned(**fields, languages=["de-DE,fi"])
    less, more = (tokens_by_language(pruner.tokenizer) for pruner in (kept, without))
    assert len(less["de"] + less["fi"]) < len(more["de"] + more["fi"])
    assert [code for code, of in kept.report.languages.items() if of.wanted] == ["de", "fi"]
    assert "Wanted languages (bits per byte): German " in str(kept.report)
    assert "Wanted languages" not in str(without.report)
    after = {code: of.cost.pruned for code, of in kept.report.languages.items() if of.known or of.wanted}
    assert after == pytest.approx(cost_by_language(small, kept.tokenizer, after))


@pytest.mark.parametrize("rounds", [1, 2])
def test_channels_are_calibrated_on_the_languages_to_keep_too_and_measured_without_them(rounds, tmp_path):
    fields = {"model": text_model(positions=400), "widths": {"mlp": 24}, "rounds": rounds}
    (without, plain), (kept, small) = pruned(**fields), pruned(**fields, languages=["de_DE,fi", "DE"])
    *texts, of_languages = kept.manifest.of_use("calibrated on")
    read = sum(len(tokens_by_language(READER, CHOOSING)[code]) for code in ("de", "fi"))
    assert of_languages.name == "languages de,fi" and of_languages.heldout_tokens == 0
    assert read - 48 < of_languages.calibration_tokens <= read
    assert [of.weight for of in texts] == pytest.approx([0.45, 0.45]) and of_languages.weight == pytest.approx(0.1)
    assert kept.report.domains.keys() == without.report.domains.keys() == {"math", "prose"}
    assert not same_weights(small, plain)
    assert kept.report.languages and not without.report.languages
    kept.save(small, tmp_path / "out")


@pytest.mark.slow
def test_rows_without_a_token_go_first_but_for_those_that_a_config_names(tmp_path):
    model = text_model()
    model.resize_token_embeddings(464)  # as embeddings are padded for kernels
    model.config.pad_token_id, model.generation_config.eos_token_id = 463, [2, 450]
    save_with_tokenizer(model, tmp_path / "dense", READER)
    for number in (448, 402, 330):
        pruner, small = pruned(model, widths={"vocab": number})
        keep = pruner.plan.keep[-1, "vocab"]
        assert len(keep) == small.config.vocab_size == number and len(pruner.tokenizer) == min(number - 2, 400)
        assert {463, 2, 450} <= {*keep}
        same_as_dense(pruner, small, model)
        spelled = load_teacher(tmp_path / "dense", small, pruner.tokenizer).alignment.spellings
        assert [spelled[token] for token in keep] == [(new,) for new in range(number)] and len(spelled) == 464
        pruner.save(small, tmp_path / str(number), READER)
        assert len(AutoTokenizer.from_pretrained(tmp_path / str(number))) == min(number - 2, 400)


def test_a_budget_that_rows_without_a_token_meet_takes_no_token():
    model = text_model()
    model.resize_token_embeddings(464)
    limit = {"parameters": model.num_parameters() - 10 * 2 * 32}
    pruner, small = pruned(model, targets=("vocab",), widths=None, budget=limit)
    assert small.config.vocab_size == 448 and pruner.tokenizer.get_vocab() == READER.get_vocab()
    assert pruner.report.trimmed.tokens == 16 and pruner.report.trimmed.respelled == 0
    assert dry_run(model.config, pruner.result.config).widths == {"vocab": 448}
    joint, small = pruned(model, **JOINT, budget={"parameters": 0.97})  # they are no tokens to compare with channels
    assert joint.report.trimmed.tokens == 464 - small.config.vocab_size > 0
    assert joint.report.trimmed.respelled == 0


@pytest.mark.parametrize("fields", [
    {"allocation": "sensitivity", "widths": {"vocab": 320, "mlp": 24}},
    {"widths": {"vocab": 330, "mlp": 24, "attention": 2, "layer": 1, "hidden": 24}},
    {"rounds": 2, "widths": {"vocab": 320, "mlp": 24}},
])  # fmt: skip
def test_the_rest_of_a_run_takes_the_model_without_tokens_for_the_dense_one(fields):
    pruner, small = pruned(**fields)
    assert small.config.vocab_size == fields["widths"]["vocab"] and pruner.result.config.widths == fields["widths"]
    assert sum(width for widths in pruner.plan.widths().values() for width in widths.values()) > 320
    assert pruner.report.widths["vocab"] == {-1: fields["widths"]["vocab"]}


def test_text_is_the_same_in_other_tokens_and_what_is_held_out_is_not_counted():
    once = iter(builtin_documents("math", 3))
    pruner, _ = pruned(domains=[DomainConfig(name="math", source=once)], widths={"vocab": 320, "mlp": 24})
    counted, calibrated = (pruner.manifest.of_use(use)[0] for use in (COUNTED, "calibrated on"))
    every = {document_hash(text) for text in builtin_documents("math", 3)}
    assert {*counted.documents} == every - {*calibrated.heldout_documents} and {*calibrated.documents} <= every
    assert calibrated.heldout_documents == counted.heldout_documents
    assert not {*counted.documents} & {*counted.heldout_documents, *calibrated.heldout_documents}
    assert pruner.result.config.domains == pruner.config.domains


def test_a_budget_may_be_a_share_and_takes_multiples_of_64():
    model = text_model()
    budget = {"targets": ("vocab",), "widths": None, "budget": {"parameters": 0.9}}
    pruner, small = pruned(model, **budget)
    assert small.num_parameters() <= 0.9 * model.num_parameters() and small.config.vocab_size == 320
    planned = dry_run(model.config, fewer_tokens(**budget))
    assert planned.widths == {"vocab": 320} and planned.parameters.after == small.num_parameters()
    share = 2 * 32 * 400 / model.num_parameters()
    assert f"400 tokens have {share:.0%} of the parameters" in str(dry_run(model.config, config()))


def test_the_sizes_of_a_plan_are_those_of_the_models_and_keep_as_much_of_the_text(tmp_path, capsys):
    model = text_model()
    save_with_tokenizer(model, tmp_path, READER)
    flags = "--tokens --languages en,de --domain math=builtin:math --general-share 0 --num-samples 8 --seq-length 48"
    assert main(["plan", str(tmp_path), *flags.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = found["sizes"]
    numbers = [size["tokens"] for size in sizes]
    assert numbers == sorted({*numbers}, reverse=True) and numbers[0] == 400
    assert sizes[0]["parameters"] == model.num_parameters()
    for name in ("math", "English", "German"):
        kept = [size[name] for size in sizes]
        assert kept == pytest.approx(sorted(kept, reverse=True)) and kept[0] == pytest.approx(1) and kept[-1] < 1
    size = sizes[1]
    fields = {"languages": ["en", "de"], "domains": [DomainConfig("math", "builtin:math")]}
    pruner, small = pruned(model, widths={"vocab": size["tokens"]}, **fields)
    assert small.num_parameters() == size["parameters"] == size["bytes"] // 4
    assert 1 - pruner.report.trimmed.respelled == pytest.approx(size["math"])
    assert max(found["tokens_in_use"].values()) == found["tokens_in_use"]["all"] <= 400


@pytest.mark.slow
def test_users_keep_tokens_of_their_own(tmp_path):
    rare = [token for token in range(300, 400) if READER.decode(token).strip().isalpha()]
    gone = sorted(set(rare) - set(pruned()[0].plan.keep[-1, "vocab"]))[:2]
    words = [READER.decode(token).strip() for token in gone]
    (tmp_path / "words.txt").write_text("\n".join([READER.convert_ids_to_tokens(gone[0]), words[1], ""]))
    expression = f"^ ?({'|'.join(words)})$"
    for given in ("|".join([expression] * 20), str(tmp_path / "words.txt")):  # too long for the name of a file
        assert set(gone[:1]) <= set(pruned(keep_tokens=given)[0].plan.keep[-1, "vocab"])
    (tmp_path / "words.txt").write_text("\ufeff" + words[0], encoding="utf-8")
    assert gone[0] in pruned(keep_tokens=str(tmp_path / "words.txt"))[0].plan.keep[-1, "vocab"]
    for number, content in enumerate((b"", b"Gr\xf6\xdfe")):
        (tmp_path / str(number)).write_bytes(content)
    for wrong in ("qqqqqqq", "[", str(tmp_path / "0"), str(tmp_path / "1")):
        with pytest.raises(StructPruneError, match="keep_tokens="):
            pruned(keep_tokens=wrong)
    with pytest.raises(StructPruneError, match="are always kept"):
        dry_run(text_model().config, fewer_tokens(keep_tokens="."), tokenizer=READER)


@pytest.mark.parametrize(("fields", "message"), [
    ({"widths": {"vocab": 100}}, r"vocab=100 is not possible for this model: \d+ of 400 tokens are always kept"),
    ({"widths": None, "budget": {"parameters": 0.7}, "targets": ("vocab",)}, "with the smallest widths of vocab"),
    ({"widths": {"vocab": 401}}, r"'vocab'\] = 401 is not legal.*has 400; the nearest legal choice is 400"),
    ({"widths": None, "sparsity": 0.2, "targets": ("vocab",)}, r"Pass widths=\{'vocab': 192\}"),
    ({**JOINT, "budget": {"cache_bytes_per_token": 9}}, "Tokens have no part in the cache_bytes_per_token"),
    ({"allocation": "sensitivity"}, "chooses widths inside the layers, and 'vocab' is not"),
    ({"model": cpu_offload(build("llama-tied")), "widths": {"vocab": 64}}, "'vocab' changes weights of all layers"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_text_is_read(fields, message):
    with pytest.raises(StructPruneError, match=message):
        pruned(**{"domains": [DomainConfig(name="a", source=unread())], **fields})


def test_ids_and_samples_are_refused():
    with pytest.raises(StructPruneError, match="'vocab' renumbers the token ids, so `inputs` cannot be used"):
        pruned(inputs={"a": torch.randint(400, (8, 12))})
    with pytest.raises(StructPruneError, match="'vocab' needs text and its tokenizer, not samples. Use prune_model"):
        StructPruner(fewer_tokens()).prune_to_(text_model(), [], {"vocab": 320})


@pytest.mark.slow
def test_a_packed_model_and_a_run_that_goes_on_lose_the_same_tokens(tmp_path, monkeypatch):
    fields = {"widths": {"vocab": 320, "mlp": 24}}
    expected, whole = pruned(**fields)
    again = {**fields, "options": RunOptions(checkpoint_dir=str(tmp_path))}
    runs = [pruned(quantized(Reversible(), text_model()), **fields), pruned(**again)]
    monkeypatch.setattr(Resume, "save", None)  # nothing is made again
    runs.append(pruned(**again))
    for pruner, small in runs:
        assert pruner.plan.keep == expected.plan.keep and same_weights(small, whole)
        assert pruner.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


@pytest.mark.slow
def test_the_dense_model_teaches_in_its_own_tokens_in_a_run_and_later(tmp_path):
    model = text_model()
    save_with_tokenizer(model, tmp_path / "dense", READER)
    training = recovery_config(domains=[DomainConfig(name="a", source=[*map(str, documents(200))])])
    pruner, small = pruned(model, recovery=training, widths={"vocab": 320, "mlp": 24})
    report = pruner.report.recovery
    assert {"dense", "pruned", "recovered"} == report.domains["a"].perplexity.by_model().keys()
    divergences = [domain.divergence for domain in report.domains.values()]
    assert all(0 < divergence.recovered < divergence.pruned for divergence in divergences)
    keep = pruner.plan.keep[-1, "vocab"]
    with pytest.raises(StructPruneError, match="a vocabulary of 96 tokens and the model one of 320"):
        recover(small, pruner.tokenizer, training, teacher=build("llama-tied"))
    unknown = type(model)(model.config)  # a copy would carry the tokenizer of the first
    unknown.load_state_dict(model.state_dict())
    with pytest.raises(StructPruneError, match="the tokenizer of one of them is not known"):
        recover(deepcopy(small), pruner.tokenizer, training, teacher=unknown)
    # A model in memory comes from no place where its tokenizer lies; the run has seen that of this one.
    for teacher, theirs in ((tmp_path / "dense", None), (model, None), (unknown, READER)):
        taught = load_teacher(teacher, small, pruner.tokenizer, theirs)
        assert [taught.alignment.spellings[token] for token in keep] == [(new,) for new in range(320)]
        assert same_weights(taught.model, model)
    # The model that the first run has left as it was, with its tokenizer, loses both in place.
    inplace = StructPruner(fewer_tokens(recovery=training, widths={"vocab": 320, "mlp": 24}))
    assert same_weights(inplace.prune_model(model, READER, inplace=True), small)


@pytest.mark.slow
def test_a_training_of_rows_goes_on_after_a_kill(tmp_path, monkeypatch):
    pruner, small = pruned(model := text_model())
    texts = [DomainConfig(name="a", source=[*map(str, documents(200))])]
    settings = recovery_config(domains=texts, training={"output_dir": str(tmp_path / "run"), "save_steps": 4})

    def trained(resume=False):
        return recover(deepcopy(small), pruner.tokenizer, settings, model, resume=resume, teacher_tokenizer=READER)

    whole = trained()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", failing(Trainer.training_step, 6, KeyboardInterrupt()))
        trained()
    assert same_weights(trained(resume=True), whole) and not same_weights(whole, small)


def test_both_models_are_measured_on_the_same_text_per_dense_token():
    model = text_model()
    pruner, small = pruned(model, widths={"vocab": 320, "mlp": 24})
    domain = load_domains(pruner.config, READER)[0]
    heldout = torch.stack(short_rows(domain.heldout, READER.eos_token_id, domain.samples.numel() // 8)[0])
    text = Passages([*heldout], READER)
    rows = text.rows(pruner.tokenizer, small)
    assert sum(map(len, rows)) > heldout.numel()
    nats, report = float(row_losses(small, rows).sum()), pruner.report
    assert report.domains["math"].perplexity.dense == pytest.approx(perplexity(model, heldout), rel=1e-6)
    assert report.domains["math"].perplexity.pruned == pytest.approx(exp(nats / heldout[:, 1:].numel()), rel=1e-6)
    assert report.domains["math"].bits_per_byte.pruned == pytest.approx(nats / log(2) / text.bytes, rel=1e-6)


@pytest.mark.parametrize(
    ("allocation", "share"),
    with_long([("uniform", 0.75), ("sensitivity", 0.75)], ["uniform"]),
)
def test_tokens_and_layers_share_one_budget(share, allocation):
    model, budget = text_model(), {"parameters": share}
    pruner, small = pruned(model, **{**JOINT, "allocation": allocation}, budget=budget)
    gone = {*range(400)} - {*pruner.plan.keep[-1, "vocab"]}
    assert small.config.vocab_size == len(pruner.tokenizer) == 400 - len(gone)
    assert small.num_parameters() <= share * model.num_parameters()
    assert pruner.result.config.budget == budget and pruner.report.trimmed.tokens == len(gone)
    read = [load_domains(pruner.config, READER)[at].probe_or_heldout[:, 1:].flatten() for at in range(2)]
    shares = [sum(int(token) in gone for token in ids) / len(ids) for ids in read]
    assert pruner.report.trimmed.respelled == pytest.approx(sum(shares) / 2)
    assert f"Vocabulary: 400 → {400 - len(gone)} entries; the removed ones are " in str(pruner.report)


def test_a_budget_that_names_no_space_takes_tokens_where_they_are_many(caplog):
    model, fields = text_model(), {"widths": None, "budget": {"parameters": 0.9}, "round_to": 8}
    with caplog.at_level("INFO", logger="optimum_structprune"):
        pruner, small = pruned(model, **fields)
    assert "trial: vocab " in caplog.text
    named, alike = pruned(model, **fields, targets=("vocab", "mlp"))
    assert pruner.plan.keep == named.plan.keep and same_weights(small, alike)
    assert pruner.result.config.targets is None
    assert {choice.name for choice in dry_run(model.config, fewer_tokens(**fields)).spaces} == {"vocab", "mlp"}
    for kept in ({"targets": ("mlp",)}, {"inputs": {"a": torch.randint(400, (8, 12))}}):
        _, only_layers = pruned(model, **{**fields, **kept})
        assert only_layers.config.vocab_size == model.config.vocab_size
        assert only_layers.config.intermediate_size < model.config.intermediate_size
    unable = StructPruner(config(**fields)).prune_model(build("llama-tied"), tokenizer())
    assert unable.config.vocab_size == build("llama-tied").config.vocab_size


@pytest.mark.parametrize("share", [0.95, 0.75, 0.55])
def test_of_an_encoder_the_tokens_go_that_its_text_does_not_use_and_channels_give_the_rest(share):
    model = text_model(AutoModelForMaskedLM, "bert", {**PLAIN, "intermediate_size": 160})
    orders = islice(permutations("what is the total of all apples".split()), 300)
    texts = [f"Now {' '.join(words)}." for words in orders]
    fields = {"widths": None, "round_to": 8, "domains": [DomainConfig(name="a", source=texts)]}
    pruner, small = pruned(model, **fields, budget={"parameters": share})
    gone = {*range(400)} - {*pruner.plan.keep[-1, "vocab"]}
    used = gone & {*READER(texts[0])["input_ids"]}
    assert small.num_parameters() <= share * model.num_parameters()
    assert pruner.report.trimmed.tokens == len(gone) and (pruner.report.trimmed.respelled > 0) == bool(used)
    assert (small.config.intermediate_size < 160) == (share < 0.95) and bool(used) == (share < 0.75)
    assert ("FFN channels: " in str(pruner.report)) == (share < 0.95)


def test_a_budget_that_neither_can_meet_is_refused_before_a_model_is_unpacked():
    """It could be met if all tokens might go; more than half of them have to stay."""
    model, fields = quantized(Reversible(), text_model()), {**JOINT, "budget": {"parameters": 0.4}}
    pruner = StructPruner(fewer_tokens(**fields, domains=[DomainConfig(name="a", source=unread())]))
    with pytest.raises(StructPruneError, match="with the smallest widths of vocab, mlp the model still has"):
        pruner.prune_model(model, READER, inplace=True)
    assert model.is_quantized and "cannot be met" not in str(dry_run(text_model().config, fewer_tokens(**fields)))


def test_where_positions_are_counted_from_the_padding_its_id_stays():
    model = text_model(AutoModelForMaskedLM, "roberta", {**PLAIN, "pad_token_id": 390}, positions=700)
    with pytest.raises(
        StructPruneError, match=r"vocab=320 is not .*: 391 of 400 tokens are always kept, .*of its padding, 390"
    ):
        pruned(model, domains=[DomainConfig(name="a", source=unread())])
    pruner, _ = pruned(model, widths={"vocab": 395})
    assert pruner.plan.keep[-1, "vocab"][:391] == (*range(391),)
