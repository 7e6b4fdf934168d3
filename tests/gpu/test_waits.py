"""The host waits for a GPU and copies tensors only a few times, also where a loop runs often."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from gpu.compare import assert_same
from gpu.simulator import simulated_gpus
from helpers import aligned_divergence, batches, random_plan, shrunk
from models import build, config, token_ids, tokenizer

import optimum_structprune
from optimum_structprune import prune_model, trainer
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.criteria import CRITERIA
from optimum_structprune.method import calibrate, shrink
from optimum_structprune.method import expert_source as sources_experts
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.expert_source import contributions, expert_moments
from optimum_structprune.method.shrink import shrink_layer_
from optimum_structprune.steps import experts as steps_experts
from optimum_structprune.steps.data import source_of
from optimum_structprune.system import fingerprint
from optimum_structprune.system.fingerprint import checksums
from optimum_structprune.trainer import RecentText
from optimum_structprune.vocabulary import token_alignment
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


def file_of(module):
    """Return the path of a module inside the package, as the simulated GPUs count by it."""
    package = Path(optimum_structprune.__file__).parent
    return Path(module.__file__).relative_to(package).as_posix()


ALIGNMENT = file_of(token_alignment)
CALIBRATE = file_of(calibrate)
EXPERT_REFIT = file_of(steps_experts)
EXPERTS = file_of(sources_experts)
FINGERPRINT = file_of(fingerprint)
SHRINK = file_of(shrink)
TRAINER = file_of(trainer)
# The number of tokens in the vocabulary of the pruned model.
SIZE = 50


def aligned_batch(count):
    """Return an alignment, and the arguments of `divergence` for a text.

    The text has `count` original tokens that the divergence counts. The arguments are the logits of the pruned and of
    the original model, and the rows and nodes of the text.
    """
    generator = torch.Generator().manual_seed(0)
    spellings = [(token,) for token in range(SIZE)]
    for parts in torch.randint(SIZE, (30, 3), generator=generator).tolist():
        spellings.append(tuple(parts))
    alignment = TokenAlignment(spellings, SIZE)

    ids = torch.randint(len(spellings), (count + 1,), generator=generator).tolist()
    is_counted = [False] + [True] * count
    aligned = alignment.align(ids, is_counted)
    counted_tokens = torch.tensor([token for token in aligned[1:] if token.row >= 0])

    logits = torch.randn(len(counted_tokens), SIZE, generator=generator)
    original_logits = torch.randn(count, len(spellings), generator=generator)
    return alignment, logits, original_logits, counted_tokens[:, 1], counted_tokens[:, 2]


@pytest.mark.parametrize("count", [40, 400])
def test_the_divergence_across_vocabularies_copies_indices_once(count):
    alignment, logits, original_logits, rows, nodes = aligned_batch(count)
    expected = aligned_divergence(alignment, logits, original_logits, rows, nodes)

    with simulated_gpus() as gpus:
        logits = logits.cuda()
        original_logits = original_logits.cuda()
        first = aligned_divergence(alignment, logits, original_logits, rows, nodes)
        copies_of_first = gpus.copies_in(ALIGNMENT)
        second = aligned_divergence(alignment, logits, original_logits, rows, nodes)

        assert_same(first, expected)
        assert_same(second, expected)
        assert gpus.waits_in(ALIGNMENT) == 0
        # The first call copies the tables of the vocabulary and the indices, and the second call only the indices.
        assert copies_of_first <= 4
        assert gpus.copies_in(ALIGNMENT) - copies_of_first == 1

        aligned_divergence(alignment, logits, original_logits, rows.cuda(), nodes.cuda())
        assert gpus.waits_in(ALIGNMENT) == 1


@pytest.mark.parametrize("case", ["olmoe", "mixtral"])
@torch.no_grad()
def test_tokens_are_sorted_by_expert_once_per_batch(case):
    def source_on(model):
        return source_of(model, describe(model), batches())

    def measure(source):
        """Return the number of consumers in the experts, and the scores and means of the experts of a layer."""
        space = source.arch.of("expert")[0]
        results = [contributions(source, space, CRITERIA.get("reap"))]
        consumers = 0

        for inner_space in source.arch.at(space.layer):
            if not (inner_space.inside and inner_space.experts):
                continue

            consumers += 1
            for domain in expert_moments(source, inner_space, gram=True):
                results += [moments.mean for moments in domain]
        return consumers, results

    _, expected = measure(source_on(build(case)))
    with simulated_gpus() as gpus:
        source = source_on(build(case).cuda())
        consumers, actual = measure(source)
        assert_same(actual, expected)

    # Each batch is routed twice, and the contributions are copied once.
    sorts = sum(number for (operator, _), number in gpus.waits.items() if operator == "tolist")
    assert sorts == 2 * len(source.batches)
    assert gpus.waits_in(EXPERTS) <= sorts + 1
    assert gpus.waits_in(CALIBRATE) == consumers * source.num_domains


def test_a_refit_of_experts_copies_each_weight_once():
    settings = config(widths={"expert": 3})
    expected = prune_model(build("olmoe"), settings, tokenizer())

    with simulated_gpus() as gpus:
        small = prune_model(build("olmoe").cuda(), settings, tokenizer())
        arch = describe(small)
        consumers = [space for space in arch.spaces if space.inside and space.experts is not None]
        assert len(consumers) <= gpus.waits_in(EXPERT_REFIT) <= len(consumers) + arch.num_layers
        assert_same(small.cpu().state_dict(), expected.state_dict())


def test_a_pruning_hashes_the_model_once():
    with simulated_gpus() as gpus:
        model = build("llama-tied").cuda()
        prune_model(model, config(widths={"mlp": 24}), tokenizer())
        assert 0 < gpus.waits_in(FINGERPRINT) <= len(model.state_dict()) + 1


def test_checksums_equal_the_checksums_on_the_cpu_and_wait_once():
    model = build("llama-tied").bfloat16()
    expected = checksums(model)
    with simulated_gpus() as gpus:
        assert checksums(model.cuda()) == expected
        assert sum(gpus.waits.values()) == 1


def test_moments_are_checked_with_one_wait():
    with simulated_gpus() as gpus:
        moments = Moments.empty(8, gram=True, device="cuda")
        x = torch.randn(600, 8).cuda()
        moments.update(x, output=x)
        assert not gpus.waits

        moments.checked("mlp.down_proj", 0)
        assert sum(gpus.waits.values()) == 1


def test_training_text_is_copied_to_the_cpu_once():
    ids = [token_ids(2, 12, seed=call) for call in range(30)]
    expected = torch.cat([rows[rows > 10] for rows in ids])[-48:].view(4, 12)

    with simulated_gpus() as gpus:
        text = RecentText(num_samples=4, seq_length=12)
        for rows in ids:
            mask = rows > 10
            text.add_call((rows.cuda(),), {"attention_mask": mask.cuda()})

        assert gpus.waits_in(TRAINER) == 0
        assert torch.equal(text.domain().samples, expected)
        assert gpus.waits_in(TRAINER) == 2


def test_training_text_on_a_gpu_is_bounded(monkeypatch):
    monkeypatch.setattr(trainer, "MAX_PENDING_TOKENS", 100)
    with simulated_gpus() as gpus:
        text = RecentText(num_samples=4, seq_length=12)
        for call in range(30):
            text.add_call((token_ids(2, 12, seed=call).cuda(),), {})
        assert gpus.waits_in(TRAINER) == 2 * 30 // 5


@pytest.mark.parametrize(("case", "name"), [("llama-tied", "mlp"), ("olmoe", "expert"), ("gpt_oss", "mlp")])
def test_layers_are_cut_on_a_gpu_with_room(case, name, monkeypatch):
    model = build(case)
    arch = describe(model)
    plan = random_plan(arch, [name])
    expected = shrunk(model, arch, plan)

    def count_copies_to_the_cpu(free_bytes):
        """Count the copies that cut the layers while some bytes of a GPU are free."""
        with simulated_gpus() as gpus:
            small = deepcopy(model).cuda()
            skeleton = shrunk_skeleton(model, arch, plan.widths())
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free_bytes, 80 << 30))
            for layer in range(arch.num_layers):
                shrink_layer_(small, arch, layer, plan.keep, skeleton)
            assert {tensor.device.type for tensor in small.parameters()} == {"cuda"}

            copies = 0
            for (direction, line), number in gpus.copies.items():
                if direction == "cuda to cpu" and line.startswith(SHRINK):
                    copies += number

            for layer, expected_layer in zip(layer_list(small, arch), layer_list(expected, arch), strict=True):
                assert_same(layer.state_dict(), expected_layer.state_dict(), tolerance=0)
        return copies

    largest = max(arch.layer_params) * 4
    assert count_copies_to_the_cpu(free_bytes=3 * largest) == 0
    assert count_copies_to_the_cpu(free_bytes=largest) >= arch.num_layers
