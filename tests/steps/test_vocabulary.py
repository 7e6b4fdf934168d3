"""Vocabulary trimming: the predictions and the tokenizer of the result, the choice of tokens, and joint budgets."""

import json
from collections import Counter
from copy import deepcopy
from itertools import islice, permutations
from math import exp, isfinite, log

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
from optimum_structprune.distillation.teacher import load_teacher
from optimum_structprune.domains.languages import CHOOSING, tokens_by_language
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.manifest import COUNTED
from optimum_structprune.domains.packing import document_hash
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.measure.languages import cost_by_language
from optimum_structprune.measure.losses import measure, totals
from optimum_structprune.measure.text import Text
from optimum_structprune.system.errors import StructPruneError
from optimum_structprune.system.resume import Resume


READER = real_text_model()[1]
JOINT = {"widths": None, "targets": ("vocab", "mlp"), "allocation": "sensitivity", "round_to": 8}
TEXT = "The sum of 17 and 25 is 42, of course; naïve Ünïcödé."


def text_model(auto=AutoModelForCausalLM, model_type="llama", fields=GROUPED, positions=256):
    sizes = fields | {"vocab_size": 400, "max_position_embeddings": positions}
    return random_model(auto, model_type, sizes)


def prune(model=None, inputs=None, options=None, **fields):
    """Return the pruner and the pruned model."""
    pruner = StructPruner(fewer_tokens(**fields), options)
    if model is None:
        model = text_model()
    small = pruner.prune_model(model, READER, inputs=inputs)
    return pruner, small


def kept_tokens(pruner):
    return list(pruner.result.plan.keep[-1, "vocab"])


@torch.no_grad()
def logits(model, ids, columns=slice(None)):
    return model(torch.tensor([ids])).logits[..., columns]


def assert_predicts_like_original(pruner, small, model):
    """Check that the trimmed model predicts the kept tokens as the original model does."""
    keep = kept_tokens(pruner)
    ids = pruner.result.tokenizer(TEXT)["input_ids"]
    original_ids = [keep[token] for token in ids]

    torch.testing.assert_close(logits(small, ids), logits(model, original_ids, keep), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def trimmed():
    """Return a model, the pruner that trims its vocabulary, and the trimmed model."""
    model = text_model(positions=400)
    pruner, small = prune(model)
    return model, pruner, small


def test_trimming_removes_only_rows_of_tokens(trimmed):
    model, pruner, small = trimmed

    assert len(kept_tokens(pruner)) == 320
    assert small.config.vocab_size == 320
    assert len(pruner.result.tokenizer) == 320
    assert model.config.vocab_size == 400
    assert len(READER) == 400
    assert pruner.result.report.original.parameters - pruner.result.report.pruned.parameters == 2 * 32 * 80
    assert_predicts_like_original(pruner, small, model)


def test_the_trimmed_tokenizer_is_saved_with_the_model(trimmed, tmp_path):
    _, pruner, small = trimmed
    ids = pruner.result.tokenizer(TEXT)["input_ids"]

    with pytest.raises(StructPruneError, match="of 96 tokens, does not belong to .*which has 320 tokens"):
        pruner.save(small, tmp_path / "out", tokenizer())
    for number, reader in enumerate((None, READER, pruner.result.tokenizer)):
        pruner.save(small, tmp_path / str(number), reader)
        assert AutoTokenizer.from_pretrained(tmp_path / str(number)).decode(ids) == pruner.result.tokenizer.decode(ids)

    card = (tmp_path / "1" / "README.md").read_text()
    assert "has a tokenizer of its own" in card
    assert "- Removed tokens by script: Latin " in card

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    torch.testing.assert_close(logits(reloaded, ids), logits(small, ids), atol=1e-6, rtol=0)


def test_the_report_counts_removed_tokens_by_script_and_reason(trimmed):
    _, pruner, _ = trimmed
    report = pruner.result.report.trimmed

    assert 0 < report.scripts["LATIN"] <= 80
    assert Counter(report.reason_of_each) == {name[0]: count for name, count in report.reasons.items()}


def test_the_report_has_the_cost_of_a_known_language(trimmed):
    _, pruner, _ = trimmed
    english = pruner.result.report.languages["en"]

    assert english.known
    assert not english.wanted
    assert english.cost.original > 0
    assert english.cost.pruned > 0


def test_prune_model_warns_that_a_trimmed_model_needs_its_new_tokenizer(trimmed):
    model, _, _ = trimmed

    with pytest.warns(UserWarning, match="smaller vocabulary and needs a new tokenizer"):
        prune_model(model, fewer_tokens(), READER)


def test_a_model_of_few_positions_is_measured_on_shorter_text():
    """Rows of 48 tokens have up to 85 of the kept tokens."""
    budget = {"parameters": 0.75}
    pruner, small = prune(text_model(positions=64), widths=None, budget=budget, targets=("vocab", "mlp"))

    report = pruner.result.report
    assert report.trimmed is not None
    assert small.config.intermediate_size < 40
    for domain in report.domains.values():
        assert isfinite(domain.perplexity.pruned)


@pytest.mark.slow
def test_languages_to_keep_are_written_in_fewer_tokens_and_the_report_has_their_cost():
    fields = {"model": text_model(positions=400), "widths": {"vocab": 300}}
    general, _ = prune(**fields)
    pruner, small = prune(**fields, languages=["de-DE,fi"])

    general_tokens = tokens_by_language(general.result.tokenizer)
    tokens = tokens_by_language(pruner.result.tokenizer)
    assert len(tokens["de"] + tokens["fi"]) < len(general_tokens["de"] + general_tokens["fi"])

    languages = pruner.result.report.languages
    assert [code for code, language in languages.items() if language.wanted] == ["de", "fi"]
    assert "Wanted languages (bits per byte): German " in str(pruner.result.report)
    assert "Wanted languages" not in str(general.result.report)

    costs = {code: language.cost.pruned for code, language in languages.items() if language.known or language.wanted}
    assert costs == pytest.approx(cost_by_language(small, pruner.result.tokenizer, costs, ["de", "fi"]))


@pytest.mark.parametrize("rounds", [1, 2])
def test_channels_are_calibrated_on_the_languages_to_keep_but_not_measured_on_them(rounds, tmp_path):
    fields = {"model": text_model(positions=400), "widths": {"mlp": 24}, "rounds": rounds}
    general, general_small = prune(**fields)
    pruner, small = prune(**fields, languages=["de_DE,fi", "DE"])

    entries = pruner.result.manifest.with_use("calibrated on")
    weights = [entry.weight for entry in entries]
    assert weights == pytest.approx([0.45, 0.45, 0.1])

    languages = entries[-1]
    tokens = tokens_by_language(READER, CHOOSING)
    token_count = len(tokens["de"]) + len(tokens["fi"])
    assert languages.name == "languages de,fi"
    assert languages.heldout_tokens == 0
    assert token_count - 48 < languages.calibration_tokens <= token_count

    assert pruner.result.report.domains.keys() == {"math", "prose"}
    assert general.result.report.domains.keys() == {"math", "prose"}
    assert not same_weights(small, general_small)
    assert pruner.result.report.languages
    assert not general.result.report.languages
    pruner.save(small, tmp_path / "out")


@pytest.mark.slow
def test_rows_without_a_token_are_removed_first_unless_a_config_names_them(tmp_path):
    model = text_model()
    model.resize_token_embeddings(464)  # as embeddings are padded for kernels
    model.config.pad_token_id = 463
    model.generation_config.eos_token_id = [2, 450]
    save_with_tokenizer(model, tmp_path / "original", READER)

    for number in (448, 402, 330):
        pruner, small = prune(model, widths={"vocab": number})

        keep = kept_tokens(pruner)
        token_count = min(number - 2, 400)
        assert len(keep) == number
        assert small.config.vocab_size == number
        assert len(pruner.result.tokenizer) == token_count
        assert {463, 2, 450} <= set(keep)
        assert_predicts_like_original(pruner, small, model)

        spellings = load_teacher(tmp_path / "original", small, pruner.result.tokenizer).alignment.spellings
        assert len(spellings) == 464
        assert [spellings[token] for token in keep] == [(new,) for new in range(number)]

        pruner.save(small, tmp_path / str(number), READER)
        assert len(AutoTokenizer.from_pretrained(tmp_path / str(number))) == token_count


def test_no_token_is_removed_where_rows_without_a_token_meet_the_budget():
    model = text_model()
    model.resize_token_embeddings(464)
    budget = {"parameters": model.num_parameters() - 10 * 2 * 32}

    pruner, small = prune(model, targets=("vocab",), widths=None, budget=budget)
    assert small.config.vocab_size == 448
    assert pruner.result.tokenizer.get_vocab() == READER.get_vocab()
    assert pruner.result.report.trimmed.tokens == 16
    assert pruner.result.report.trimmed.respelled == 0
    assert dry_run(model.config, pruner.result.config).widths == {"vocab": 448}

    # A joint budget compares channels with tokens, and these rows are no tokens.
    pruner, small = prune(model, **JOINT, budget={"parameters": 0.97})
    assert small.config.vocab_size < 464
    assert pruner.result.report.trimmed.tokens == 464 - small.config.vocab_size
    assert pruner.result.report.trimmed.respelled == 0


@pytest.mark.parametrize("fields", [
    {"allocation": "sensitivity", "widths": {"vocab": 320, "mlp": 24}},
    {"widths": {"vocab": 330, "mlp": 24, "attention": 2, "layer": 1, "hidden": 24}},
    {"rounds": 2, "widths": {"vocab": 320, "mlp": 24}},
])  # fmt: skip
def test_tokens_are_pruned_together_with_other_spaces(fields):
    pruner, small = prune(**fields)

    vocab = fields["widths"]["vocab"]
    planned = pruner.result.plan.widths()
    assert small.config.vocab_size == vocab
    assert pruner.result.config.widths == fields["widths"]
    assert pruner.result.report.widths["vocab"] == {-1: vocab}
    assert sum(sum(widths.values()) for widths in planned.values()) > 320


def test_tokens_are_counted_in_the_calibration_documents_and_not_in_heldout_ones():
    source = iter(builtin_documents("math", 3))
    domain = DomainConfig(name="math", source=source)
    pruner, _ = prune(domains=[domain], widths={"vocab": 320, "mlp": 24})

    counting = pruner.result.manifest.with_use(COUNTED)[0]
    calibration = pruner.result.manifest.with_use("calibrated on")[0]
    documents = {document_hash(text) for text in builtin_documents("math", 3)}
    heldout = set(calibration.heldout_documents)
    assert counting.heldout_documents == calibration.heldout_documents
    assert set(counting.documents) == documents - heldout
    assert set(calibration.documents) <= documents
    assert not set(counting.documents) & heldout
    assert pruner.result.config.domains == pruner.config.domains


def test_a_budget_that_is_a_share_is_met_with_a_multiple_of_64_tokens():
    model = text_model()
    fields = {"targets": ("vocab",), "widths": None, "budget": {"parameters": 0.9}}

    pruner, small = prune(model, **fields)
    assert small.num_parameters() <= 0.9 * model.num_parameters()
    assert small.config.vocab_size == 320

    outcome = dry_run(model.config, fewer_tokens(**fields))
    assert outcome.widths == {"vocab": 320}
    assert outcome.parameters.after == small.num_parameters()

    share = 2 * 32 * 400 / model.num_parameters()
    assert f"400 tokens have {share:.0%} of the parameters" in str(dry_run(model.config, config()))


def test_the_plan_command_predicts_the_sizes_and_the_text_of_trimmed_models(tmp_path, capsys):
    model = text_model()
    save_with_tokenizer(model, tmp_path, READER)
    flags = "--tokens --languages en,de --domain math=builtin:math --general-share 0 --num-samples 8 --seq-length 48"

    assert main(["plan", str(tmp_path), *flags.split(), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)

    sizes = output["sizes"]
    numbers = [size["tokens"] for size in sizes]
    assert numbers == sorted(set(numbers), reverse=True)
    assert numbers[0] == 400
    assert sizes[0]["parameters"] == model.num_parameters()

    for name in ("math", "English", "German"):
        shares = [size[name] for size in sizes]
        assert shares == pytest.approx(sorted(shares, reverse=True))
        assert shares[0] == pytest.approx(1)
        assert shares[-1] < 1

    size = sizes[1]
    domains = [DomainConfig("math", "builtin:math")]
    pruner, small = prune(model, widths={"vocab": size["tokens"]}, languages=["en", "de"], domains=domains)
    assert small.num_parameters() == size["parameters"]
    assert size["parameters"] == size["bytes"] // 4
    assert 1 - pruner.result.report.trimmed.respelled == pytest.approx(size["math"])

    tokens_in_use = output["tokens_in_use"]
    assert max(tokens_in_use.values()) == tokens_in_use["all"]
    assert tokens_in_use["all"] <= 400


def find_removed_words():
    """Return two rare tokens that are removed by default, and their words."""
    rare = {token for token in range(300, 400) if READER.decode(token).strip().isalpha()}
    pruner, _ = prune()
    tokens = sorted(rare - set(kept_tokens(pruner)))[:2]
    words = [READER.decode(token).strip() for token in tokens]
    return tokens, words


@pytest.mark.slow
def test_users_keep_tokens_of_their_own(tmp_path):
    tokens, words = find_removed_words()
    path = tmp_path / "words.txt"
    path.write_text("\n".join([READER.convert_ids_to_tokens(tokens[0]), words[1], ""]))
    expression = f"^ ?({'|'.join(words)})$"

    long_expression = "|".join([expression] * 20)  # too long for the name of a file
    for keep_tokens in (long_expression, str(path)):
        pruner, _ = prune(keep_tokens=keep_tokens)
        assert tokens[0] in kept_tokens(pruner)

    path.write_text("\ufeff" + words[0], encoding="utf-8")
    pruner, _ = prune(keep_tokens=str(path))
    assert tokens[0] in kept_tokens(pruner)


@pytest.mark.slow
def test_tokens_to_keep_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin-1").write_bytes(b"Gr\xf6\xdfe")

    for keep_tokens in ("qqqqqqq", "[", str(tmp_path / "empty"), str(tmp_path / "latin-1")):
        with pytest.raises(StructPruneError, match="keep_tokens="):
            prune(keep_tokens=keep_tokens)
    with pytest.raises(StructPruneError, match="are always kept"):
        dry_run(text_model().config, fewer_tokens(keep_tokens="."), tokenizer=READER)


@pytest.mark.parametrize(("fields", "message"), [
    ({"widths": {"vocab": 100}}, r"vocab=100 is not possible for this model: \d+ of 400 tokens are always kept"),
    ({"widths": None, "budget": {"parameters": 0.7}, "targets": ("vocab",)}, "with the smallest widths of vocab"),
    ({"widths": {"vocab": 401}}, r"'vocab'\] = 401 is not legal.*has 400. The nearest legal choice is 400"),
    ({"widths": None, "sparsity": 0.2, "targets": ("vocab",)}, r"Pass widths=\{'vocab': 192\}"),
    (JOINT | {"budget": {"cache_bytes_per_token": 9}}, "Tokens have no part in the cache_bytes_per_token"),
    ({"allocation": "sensitivity"}, "chooses widths inside the layers, and 'vocab' is not"),
    ({"model": cpu_offload(build("llama-tied")), "widths": {"vocab": 64}}, "'vocab' changes weights of all layers"),
])  # fmt: skip
def test_impossible_requests_are_refused_before_text_is_read(fields, message):
    with pytest.raises(StructPruneError, match=message):
        prune(domains=[DomainConfig(name="a", source=unread())], **fields)


def test_ids_and_samples_are_refused():
    with pytest.raises(StructPruneError, match="'vocab' renumbers the token ids, so `inputs` cannot be used"):
        prune(inputs={"a": torch.randint(400, (8, 12))})
    with pytest.raises(StructPruneError, match="'vocab' needs text and its tokenizer, not samples. Use prune_model"):
        StructPruner(fewer_tokens()).prune_to_(text_model(), [], {"vocab": 320})


@pytest.mark.slow
def test_a_packed_model_and_a_resumed_run_lose_the_same_tokens(tmp_path, monkeypatch):
    fields = {"widths": {"vocab": 320, "mlp": 24}}
    expected, expected_model = prune(**fields)

    options = RunOptions(checkpoint_dir=str(tmp_path))
    packed_run = prune(quantized(Reversible(), text_model()), **fields)
    first_run = prune(**fields, options=options)
    monkeypatch.setattr(Resume, "save", None)  # the resumed run computes nothing that it would save
    resumed_run = prune(**fields, options=options)

    for pruner, small in (packed_run, first_run, resumed_run):
        assert pruner.result.plan.keep == expected.result.plan.keep
        assert same_weights(small, expected_model)
        assert pruner.result.tokenizer.get_vocab() == expected.result.tokenizer.get_vocab()


@pytest.mark.slow
def test_the_original_model_teaches_in_its_own_tokens_during_a_run_and_later(tmp_path):
    model = text_model()
    save_with_tokenizer(model, tmp_path / "original", READER)
    texts = list(map(str, documents(200)))
    training = recovery_config(domains=[DomainConfig(name="a", source=texts)])
    fields = {"recovery": training, "widths": {"vocab": 320, "mlp": 24}}

    pruner, small = prune(model, **fields)
    report = pruner.result.report.recovery
    assert report.domains["a"].perplexity.values.keys() == {"original", "pruned", "recovered"}
    for domain in report.domains.values():
        assert 0 < domain.divergence.recovered < domain.divergence.pruned

    with pytest.raises(StructPruneError, match="a vocabulary of 96 tokens and the model one of 320"):
        recover(small, pruner.result.tokenizer, training, teacher=build("llama-tied"))
    unknown = type(model)(model.config)  # a copy would carry the tokenizer of the first run
    unknown.load_state_dict(model.state_dict())
    with pytest.raises(StructPruneError, match="the tokenizer of one of them is not known"):
        recover(deepcopy(small), pruner.result.tokenizer, training, teacher=unknown)

    # No folder has a tokenizer for a model in memory, but the run remembers the tokenizer of `model`.
    keep = kept_tokens(pruner)
    for teacher, teacher_tokenizer in ((tmp_path / "original", None), (model, None), (unknown, READER)):
        loaded = load_teacher(teacher, small, pruner.result.tokenizer, teacher_tokenizer)
        assert [loaded.alignment.spellings[token] for token in keep] == [(new,) for new in range(320)]
        assert same_weights(loaded.model, model)

    # The first run changed neither the model nor its tokenizer, so a run in place has the same result.
    inplace = StructPruner(fewer_tokens(**fields))
    assert same_weights(inplace.prune_model(model, READER, inplace=True), small)


@pytest.mark.slow
def test_a_training_with_fewer_tokens_keeps_the_rows_of_tokens_and_resumes_after_a_kill(tmp_path, monkeypatch):
    """Adam would move the row of every token at each step, because every token has a probability."""
    model = text_model()
    pruner, small = prune(model)
    texts = list(map(str, documents(200)))
    domains = [DomainConfig(name="a", source=texts)]
    settings = recovery_config(domains=domains, training={"output_dir": str(tmp_path / "run"), "save_steps": 4})

    def train(resume=False):
        return recover(
            deepcopy(small), pruner.result.tokenizer, settings, model, resume=resume, teacher_tokenizer=READER
        )

    uninterrupted = train()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", failing(Trainer.training_step, 6, KeyboardInterrupt()))
        train()
    assert same_weights(train(resume=True), uninterrupted)
    assert not same_weights(uninterrupted, small)
    for rows in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(uninterrupted, rows)().weight, getattr(small, rows)().weight)


def test_both_models_are_measured_on_the_same_text_per_original_token():
    model = text_model()
    pruner, small = prune(model, widths={"vocab": 320, "mlp": 24})

    domain = load_domains(pruner.config, READER)[0]
    text = Text.short(domain.heldout, READER, domain.samples.numel() // 8)
    heldout = torch.stack(text.rows)
    small_text = text.for_tokenizer(pruner.result.tokenizer, small)
    nats = float(totals(measure(small, small_text).loss).sum())
    assert sum(map(len, small_text.rows)) > heldout.numel()

    measured = pruner.result.report.domains["math"]
    assert measured.perplexity.original == pytest.approx(perplexity(model, heldout), rel=1e-6)
    assert measured.perplexity.pruned == pytest.approx(exp(nats / heldout[:, 1:].numel()), rel=1e-6)
    assert measured.bits_per_byte.pruned == pytest.approx(nats / log(2) / text.bytes, rel=1e-6)


@pytest.mark.parametrize(
    ("allocation", "share"),
    with_long([("uniform", 0.75), ("sensitivity", 0.75)], ["uniform"]),
)
def test_tokens_and_layers_share_one_budget(share, allocation):
    model = text_model()
    budget = {"parameters": share}
    fields = JOINT | {"allocation": allocation, "budget": budget}
    pruner, small = prune(model, **fields)

    removed = set(range(400)) - set(kept_tokens(pruner))
    number = 400 - len(removed)
    assert small.config.vocab_size == number
    assert len(pruner.result.tokenizer) == number
    assert small.num_parameters() <= share * model.num_parameters()
    assert pruner.result.config.budget == budget
    assert pruner.result.report.trimmed.tokens == len(removed)
    assert f"Vocabulary: 400 → {number} entries; the removed ones are " in str(pruner.result.report)

    removed_shares = []
    for domain in load_domains(pruner.config, READER):
        ids = domain.probe_or_heldout[:, 1:].flatten().tolist()
        removed_shares.append(sum(token in removed for token in ids) / len(ids))
    assert pruner.result.report.trimmed.respelled == pytest.approx(sum(removed_shares) / 2)


def test_a_budget_without_targets_trims_a_large_vocabulary(caplog):
    model = text_model()
    fields = {"widths": None, "budget": {"parameters": 0.9}, "round_to": 8}
    with caplog.at_level("INFO", logger="optimum_structprune"):
        pruner, small = prune(model, **fields)
    assert "trial: vocab " in caplog.text
    assert pruner.result.config.targets is None

    explicit, explicit_small = prune(model, **fields, targets=("vocab", "mlp"))
    assert pruner.result.plan.keep == explicit.result.plan.keep
    assert same_weights(small, explicit_small)

    outcome = dry_run(model.config, fewer_tokens(**fields))
    assert {choice.name for choice in outcome.spaces} == {"vocab", "mlp"}


def test_a_budget_without_targets_keeps_tokens_where_they_cannot_be_trimmed():
    model = text_model()
    fields = {"widths": None, "budget": {"parameters": 0.9}, "round_to": 8}

    for options in ({"targets": ("mlp",)}, {"inputs": {"a": torch.randint(400, (8, 12))}}):
        _, small = prune(model, **fields, **options)
        assert small.config.vocab_size == model.config.vocab_size
        assert small.config.intermediate_size < model.config.intermediate_size

    model = build("llama-tied")
    small = StructPruner(config(**fields)).prune_model(model, tokenizer())
    assert small.config.vocab_size == build("llama-tied").config.vocab_size


@pytest.mark.parametrize("share", [0.95, 0.75, 0.55])
def test_an_encoder_loses_unused_tokens_before_channels_and_used_tokens(share):
    model = text_model(AutoModelForMaskedLM, "bert", PLAIN | {"intermediate_size": 160})
    orders = islice(permutations("what is the total of all apples".split()), 300)
    texts = [f"Now {' '.join(words)}." for words in orders]
    domains = [DomainConfig(name="a", source=texts)]
    pruner, small = prune(model, widths=None, round_to=8, domains=domains, budget={"parameters": share})

    removed = set(range(400)) - set(kept_tokens(pruner))
    loses_used_tokens = not removed.isdisjoint(READER(texts[0])["input_ids"])
    assert small.num_parameters() <= share * model.num_parameters()
    assert pruner.result.report.trimmed.tokens == len(removed)
    assert loses_used_tokens == (share < 0.75)
    assert (pruner.result.report.trimmed.respelled > 0) == loses_used_tokens

    loses_channels = small.config.intermediate_size < 160
    assert loses_channels == (share < 0.95)
    assert ("FFN channels: " in str(pruner.result.report)) == loses_channels


def test_a_joint_budget_out_of_reach_is_refused_before_a_model_is_unpacked():
    """The budget is out of reach because more than half of the tokens are always kept."""
    model = quantized(Reversible(), text_model())
    fields = JOINT | {"budget": {"parameters": 0.4}}
    pruner = StructPruner(fewer_tokens(**fields, domains=[DomainConfig(name="a", source=unread())]))

    with pytest.raises(StructPruneError, match="with the smallest widths of vocab, mlp the model still has"):
        pruner.prune_model(model, READER, inplace=True)

    assert model.is_quantized
    assert "cannot be met" not in str(dry_run(text_model().config, fewer_tokens(**fields)))


def test_the_padding_id_is_unchanged_in_models_that_count_positions_from_it():
    model = text_model(AutoModelForMaskedLM, "roberta", PLAIN | {"pad_token_id": 390}, positions=700)
    message = r"vocab=320 is not .*: 391 of 400 tokens are always kept, .*of its padding, 390"

    with pytest.raises(StructPruneError, match=message):
        prune(model, domains=[DomainConfig(name="a", source=unread())])

    pruner, _ = prune(model, widths={"vocab": 395})
    assert kept_tokens(pruner)[:391] == list(range(391))
