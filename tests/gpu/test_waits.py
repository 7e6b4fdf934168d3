"""Ceilings on how often the host waits for a GPU and copies tensors, where a loop runs often."""

from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gpu.compare import assert_same
from gpu.simulator import simulated_gpus
from helpers import batches, random_plan, shrunk
from models import build, config, token_ids, tokenizer

import optimum_structprune
from optimum_structprune import StructPruner, trainer
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.criteria import CRITERIA
from optimum_structprune.method import calibrate, shrink
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.shrink import shrink_layer_
from optimum_structprune.sources import experts as sources_experts
from optimum_structprune.sources.data import source_of
from optimum_structprune.sources.experts import contributions, expert_moments
from optimum_structprune.steps import experts as steps_experts
from optimum_structprune.system import fingerprint
from optimum_structprune.system.fingerprint import checksums
from optimum_structprune.trainer import RecentText
from optimum_structprune.vocabulary import token_alignment
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


def file_of(module):
    """Return the path of a module inside the package, as the counters name it."""
    path = Path(module.__file__)
    return path.relative_to(Path(optimum_structprune.__file__).parent).as_posix()


ALIGNMENT, EXPERTS, EXPERT_REFIT = map(file_of, (token_alignment, sources_experts, steps_experts))
FINGERPRINT, CALIBRATE, SHRINK = map(file_of, (fingerprint, calibrate, shrink))
TRAINER = file_of(trainer)
SIZE = 50


def aligned_batch(count):
    """An alignment, logits of both models, and the rows and nodes of a text with so many counted dense tokens."""
    generator = torch.Generator().manual_seed(0)
    lost = torch.randint(SIZE, (30, 3), generator=generator)
    spellings = [*((token,) for token in range(SIZE)), *(tuple(parts) for parts in lost.tolist())]
    alignment = TokenAlignment(spellings, SIZE)
    ids = torch.randint(len(spellings), (count + 1,), generator=generator).tolist()
    aligned = alignment.align(ids, [False, *[True] * count])
    following = torch.tensor([after for _, after in pairwise(aligned) if after.row >= 0])
    logits = torch.randn(len(following), SIZE, generator=generator)
    dense = torch.randn(count, len(spellings), generator=generator)
    return alignment, logits, dense, following[:, 1], following[:, 2]


@pytest.mark.parametrize("count", [40, 400])
def test_the_divergence_of_other_tokens_copies_indices_once(count):
    alignment, logits, dense, rows, nodes = aligned_batch(count)
    expected = alignment.divergence(logits, dense, rows, nodes)
    with simulated_gpus() as gpus:
        on_gpu = (logits.cuda(), dense.cuda())
        first = alignment.divergence(*on_gpu, rows, nodes)
        copies = gpus.copies_in(ALIGNMENT)
        again = alignment.divergence(*on_gpu, rows, nodes)
        assert gpus.waits_in(ALIGNMENT) == 0
        assert copies <= 4  # the tables of the vocabulary, and the indices
        assert gpus.copies_in(ALIGNMENT) - copies == 1
        assert_same([first, again], [expected, expected])

        alignment.divergence(*on_gpu, rows.cuda(), nodes.cuda())
        assert gpus.waits_in(ALIGNMENT) == 1


@pytest.mark.parametrize("case", ["olmoe", "mixtral"])
@torch.no_grad()
def test_tokens_are_sorted_by_expert_once_per_batch(case):
    def scores(model):
        arch = describe(model)
        source = source_of(model, arch, batches())
        whole = arch.of("expert")[0]
        inside = [space for space in arch.at(whole.layer) if space.inside and space.experts]
        contributed = contributions(source, whole, CRITERIA.get("reap"))
        moments = [moments for space in inside for moments in expert_moments(source, space, gram=True)]
        return source, len(inside), [contributed, *(own.mean for domain in moments for own in domain)]

    expected = scores(build(case))[2]
    with simulated_gpus() as gpus:
        source, num_experts, actual = scores(build(case).cuda())
        assert_same(actual, expected)
    # Each batch is routed twice, and the contributions are copied once.
    sorting = sum(number for (operator, _), number in gpus.waits.items() if operator == "tolist")
    assert sorting == 2 * len(source.batches)
    assert gpus.waits_in(EXPERTS) <= sorting + 1
    assert gpus.waits_in(CALIBRATE) == num_experts * source.num_domains


def test_a_refit_of_experts_copies_each_weight_once():
    settings = config(widths={"expert": 3})

    def pruned(model):
        return StructPruner(settings).prune_model(model, tokenizer())

    expected = pruned(build("olmoe"))
    with simulated_gpus() as gpus:
        small = pruned(build("olmoe").cuda())
        consumers = sum(space.inside and space.experts is not None for space in describe(small).spaces)
        layers = describe(small).num_layers
        assert consumers <= gpus.waits_in(EXPERT_REFIT) <= consumers + layers
        assert_same(small.cpu().state_dict(), expected.state_dict())


def test_one_hash_of_the_model_is_computed_in_a_pruning():
    with simulated_gpus() as gpus:
        model = build("llama-tied").cuda()
        StructPruner(config(widths={"mlp": 24})).prune_model(model, tokenizer())
        assert 0 < gpus.waits_in(FINGERPRINT) <= len(model.state_dict()) + 1


def test_checksums_are_those_of_the_cpu_and_wait_once():
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
    masks = [rows > 10 for rows in ids]
    expected = torch.cat([rows[mask] for rows, mask in zip(ids, masks, strict=True)])[-48:].view(4, 12)
    with simulated_gpus() as gpus:
        text = RecentText(num_samples=4, seq_length=12)
        for rows, mask in zip(ids, masks, strict=True):
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

    def copies(free):
        """Count the copies of tensors to the CPU, while so many bytes of a GPU are free."""
        with simulated_gpus() as gpus:
            small = deepcopy(model).cuda()
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 80 << 30))
            for layer in range(arch.num_layers):
                shrink_layer_(small, arch, layer, plan.keep, shrunk_skeleton(model, arch, plan.widths()))
            assert {tensor.device.type for tensor in small.parameters()} == {"cuda"}
            copied = gpus.copies.copy()
            for layer, other in zip(layer_list(small, arch), layer_list(expected, arch), strict=True):
                assert_same(layer.state_dict(), other.state_dict(), tolerance=0)
            return sum(n for (way, line), n in copied.items() if way == "cuda to cpu" and line.startswith(SHRINK))

    largest = max(arch.layer_params) * 4
    assert copies(free=3 * largest) == 0
    assert copies(free=largest) >= arch.num_layers
