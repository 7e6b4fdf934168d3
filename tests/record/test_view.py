"""The printed result: few lines, relative losses, one verdict, and the next command."""

import pytest
import results
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.record.figures import Figure, LanguageResult, TextResult, TrimResult
from optimum_structprune.record.report import Report
from optimum_structprune.record.table import aligned
from optimum_structprune.record.verdict import judge
from optimum_structprune.record.view import View, language_lines, target_line


def lines_of(report: Report) -> list[str]:
    """Return the printed lines of a report, where a table has several lines."""
    return str(report).splitlines()


def loss_lines(report: Report) -> list[str]:
    """Return the printed table of losses, and the notes below it."""
    view = View(report)
    return [aligned(view.losses), *view.notes]


def test_a_pruning_is_summarized_in_twelve_lines():
    report = results.report([1.39, 1.2], margin=0.08, unseen_ratio=1.5, asked=results.answers(kept=20))
    report.widths = {"mlp": dict.fromkeys(range(30), 1216)}
    report.original_widths = {"mlp": 1536}
    report.target = 0.125

    lines = lines_of(report)

    assert len(lines) <= 12
    assert lines[:3] == [
        "Parameters: 100 → 90 (-10.0%); weights 200 bytes → 180 bytes",
        "FFN channels: 1,536 → 1,216 (-20.8%) in each of 30 layers",
        "Requested 12.5% of the layer parameters, removed 12.5% (10.0% of the whole model).",
    ]
    assert lines[3].split() == ["Perplexity", "relative", "to", "the", "original", "pruned"]
    assert lines[4].split() == ["domain", "0", "1.39×", "±", "0.08"]
    assert lines[7].split("  ")[0] == "unseen text (sampled from the original model)"
    assert lines[8] == "±: 90% confidence interval over documents. Domains differ: 1.20× to 1.39×."
    assert lines[-1].startswith("Verdict: needs recovery before use (")
    assert not any("`" in line for line in lines)


def test_a_recovery_is_summarized_in_one_table_and_one_verdict():
    report = results.report([1.4], unseen_ratio=1.5, asked=results.answers(kept=20))
    report.recovery = results.recovery((1.42, 1.08), kept_step=4, answers=results.answers())
    report.recovery.unseen = results.unseen(1.5, 1.2, margin=0.05)

    lines = lines_of(report)

    text = "\n".join(lines)
    assert text.count("Verdict:") == 1
    assert text.count("Perplexity relative to the original") == 1
    assert lines[2].split() == ["domain", "0", "1.420×", "1.080×"]
    assert lines[3].split("  ")[-1].strip() == "1.20× ± 0.05"
    assert "Recovery: 400 tokens, 4 steps, 3 s; best checkpoint: step 4 (last)" in lines


def test_a_checkpoint_that_is_worse_on_some_text_is_not_called_better_there():
    """A mean over all validation samples chooses the checkpoint."""
    report = results.report([1.4])
    report.recovery = results.recovery((1.4, 1.3), (1.2, 1.1), kept_step=4)
    for name, pruned, recovered in (("domain 0", 0.13, 0.1333), ("domain 1", 0.2, 0.2004), ("answers", 0.5, 0.4)):
        report.recovery.domains.setdefault(name, TextResult()).divergence = Figure(pruned=pruned, recovered=recovered)
    report.recovery.unseen = results.unseen(1.5, 1.2)
    report.recovery.unseen.divergence = Figure(pruned=0.3, recovered=0.35)

    line = (
        "Recovery: 400 tokens, 4 steps, 3 s; best checkpoint: step 4 (last), but farther from the original model on "
        "domain 0 (KL 0.130 → 0.133) and unseen text (KL 0.300 → 0.350)"
    )
    assert line in lines_of(report)


def test_a_training_without_a_teacher_is_compared_with_the_pruned_model():
    report = results.report([1.4])
    report.recovery = results.recovery((1.4, 1.05), has_original=False)

    lines = lines_of(report)

    assert "Perplexity relative to the pruned model after training: domain 0 0.750×" in lines
    explanation = "no checkpoint was better than the pruned model, so the pruned model is kept"
    assert f"Recovery: 400 tokens, 4 steps, 3 s; {explanation}" in lines


@given(st.integers(1, 40), st.booleans())
def test_a_table_of_many_domains_shows_the_worst_in_few_lines(count, is_recovered):
    ratios = {f"domain {number}": 1 + number / 10 for number in range(count)}
    report = results.report(ratios)
    if is_recovered:
        pairs = [(ratio, ratio) for ratio in ratios.values()]
        report.recovery = results.recovery(*pairs)

    text = "\n".join(loss_lines(report))
    assert len(text.splitlines()) <= 10
    assert f"domain {count - 1} " in text


def test_figures_of_few_documents_are_marked():
    text = "\n".join(loss_lines(results.report([1.5], documents=4)))
    assert "1.5× (few documents)" in text
    assert "few documents: fewer than 12" in text

    text = "\n".join(loss_lines(results.report([1.5])))
    assert "few documents" not in text


@pytest.mark.parametrize(("target", "sparsity", "is_far"), [(0.15, 0.156, False), (0.15, 0.18, True)])
def test_a_size_far_from_the_request_is_a_warning(target, sparsity, is_far):
    line = target_line(target, sparsity, 0.1)

    assert line.startswith("warning: requested 15.0%") == is_far
    assert f"removed {sparsity:.1%} (10.0% of the whole model)" in line


def test_widths_are_listed_by_layer_if_they_differ():
    report = results.report([1.0])
    report.original_widths = {"mlp": 8}
    report.widths = {"mlp": {0: 4, 1: 8}}
    assert "FFN channels: 8 → 4-8 (-25.0%) in each of 2 layers" in View(report).sizes
    assert "FFN channels by layer: 4 8" in list(View(report).details)

    report.widths = {"mlp": {0: 4, 1: 4}}
    assert not any("by layer" in line for line in View(report).details)


def test_removed_layers_are_listed():
    report = results.report([1.0])
    report.widths = {"layer": {-1: 3}}
    report.original_widths = {"layer": 5}
    report.removed_layers = [2, 3]

    assert "Layers: 5 → 3 (-40.0%): layers 2, 3 removed" in View(report).sizes

    report.widths = {"layer": {-1: 4}, "mlp": {0: 4}}
    report.original_widths = {"layer": 5, "mlp": 8}
    report.removed_layers = [2]
    assert "Layers: 5 → 4 (-20.0%): layer 2 removed" in View(report).sizes
    assert "FFN channels: 8 → 4 (-50.0%) in one layer" in View(report).sizes


def test_vocabulary_trimming_states_the_number_of_split_words():
    report = results.report([1.0], unseen_ratio=1.1)
    report.widths = {"vocab": {-1: 42_112}}
    report.original_widths = {"vocab": 49_152}
    report.trimmed = TrimResult(7_040, 0.002, {"always": 311, "usual": 26_586}, scripts={"LATIN": 6_578})
    report.unseen.split_words = 0.008

    assert View(report).notes[1:] == [
        "Vocabulary: 49,152 → 42,112 entries; the removed ones are 0.20% of the held-out tokens",
        "Words now split into more tokens: 0.8% of unseen text; technical text may reach 1.10×",
    ]
    assert "Removed tokens by script: Latin 6,578." in list(View(report).details)


def test_languages_that_got_worse_are_counted():
    languages = {
        "en": LanguageResult(cost=results.cost(1.01), known=True),
        "de": LanguageResult(cost=results.cost(1.2), wanted=True, known=True),
        "nl": LanguageResult(cost=Figure.of({"original": 1.0}), known=False),
    }

    assert language_lines(languages) == [
        "Wanted languages (bits per byte): German 1.200×",
        "Languages checked: 2; 1 got worse by more than 2% (bits per byte): German 1.20×",
    ]
    assert language_lines({}) == []


def test_a_language_of_unknown_tokens_got_worse_although_it_has_fewer_tokens():
    def result(tokens, cosine):
        return LanguageResult(cost=results.cost(tokens), texts=4, cosine=Figure.of({"pruned": cosine}))

    languages = {"en": result(1.0, 1.0), "de": result(1.1, 0.99), "th": result(0.25, 0.83), "zh": result(0.9, 0.6)}
    assert language_lines(languages) == [
        "Languages checked: 4; 3 got worse by more than 2% (cosine or tokens): Chinese 0.60, Thai 0.83, German 0.99"
    ]

    report = results.report([1.0], asked=results.answers())
    report.languages.update(languages)
    assert judge(report).worse_languages == ["Chinese", "Thai", "German"]


@pytest.mark.parametrize(("ratio", "command"), [
    (1.0, "structprune evaluate 'my out' --against m --domain general=builtin:general --num-samples 64 --arch a"),
    (1.4, "structprune recover 'my out' 'my out-recovered' --teacher m --arch a"),
])  # fmt: skip
def test_the_next_command_follows_the_verdict(ratio, command):
    view = View(results.report([ratio], asked=results.answers()))

    assert view.next_command("m", "my out", can_recover=True, flags=["--arch", "a"]) == command
    evaluation = view.next_command("", "out", can_recover=False)
    assert evaluation == "structprune evaluate out --domain general=builtin:general --num-samples 64"


def test_an_infinite_loss_is_stated_in_words():
    report = results.report([1.0])
    shape = {"proposed_by": "one width", "widths": {"mlp": 8}, "loss": None, "chosen": True}
    report.shapes = [shape, shape]

    assert "Chosen: one width (FFN channels 8), loss not finite" in list(View(report).details)


def test_vocabulary_trimming_widens_the_interval_of_unseen_text():
    report = results.report([1.0], unseen_ratio=1.07)
    report.unseen.perplexity = results.figure(1.07, margin=0.02)
    assert "1.07× ± 0.02" in "\n".join(loss_lines(report))

    # Technical text has more split words than unseen text.
    report.unseen.split_words = 0.04
    assert "1.1× ± 0.5" in "\n".join(loss_lines(report))

    report.recovery = results.recovery((1.2, 1.1))
    report.recovery.unseen = results.unseen(1.07, 1.05, margin=0.02)
    assert "1.1× ± 0.6" in "\n".join(loss_lines(report))

    report.unseen.split_words = 0.0
    assert "1.05× ± 0.02" in "\n".join(loss_lines(report))
