"""Which samples of a pool are used."""

import pytest
import torch
from helpers import count_hooks
from models import build, config, tokenizer

from optimum_structprune import DomainConfig, StructPruneError, StructPruner, perplexity
from optimum_structprune.arch.load import describe
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.packing import Frame, tokenised
from optimum_structprune.domains.select import Selector, mean_activations, nearest_to_centres
from optimum_structprune.domains.templates import document_hash


def texts(count: int = 80, seed: int = 0) -> list[str]:
    words = torch.randint(3, 96, (count, 30), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(f"w{word}" for word in row[: 6 + i % 25]) for i, row in enumerate(words)]


def selecting(select: str, **fields):
    return config(domains=[DomainConfig("a", texts())], num_samples=4, select=select, **fields)


def pool(count: int = 12):
    frame = Frame(16, 1, 2)
    return frame, frame.take(tokenised(iter(texts()), tokenizer()), count * frame.body)


def test_random_takes_what_comes_first_whatever_the_pool():
    small, large = (load_domains(selecting("random", pool_factor=n), tokenizer())[0] for n in (1, 9))
    assert torch.equal(small.samples, large.samples)


@pytest.mark.parametrize("select", ["length", "diverse", "perplexity"])
def test_heldout_samples_do_not_depend_on_the_selection(select):
    model = build("llama-tied")
    plain = load_domains(selecting("random"), tokenizer())[0]
    chosen = load_domains(selecting(select), tokenizer(), model=model)[0]
    assert torch.equal(plain.heldout, chosen.heldout)
    assert chosen.samples.shape == plain.samples.shape
    assert not torch.equal(chosen.samples, plain.samples)
    assert count_hooks(model) == 0 and not model.training


def test_length_takes_the_longest_documents_of_the_pool():
    (domain,) = load_domains(selecting("length", pool_factor=8), tokenizer())
    lengths = {document_hash(text): len(text.split()) for text in texts()}
    used = [lengths[name] for name in domain.documents]
    (plain,) = load_domains(selecting("random"), tokenizer())
    assert used == sorted(used, reverse=True)
    assert min(used) > sum(lengths[name] for name in plain.documents) / len(plain.documents)


def test_perplexity_takes_the_middle():
    model = build("llama-tied")
    frame, documents = pool()
    chosen = Selector(selecting("perplexity", pool_factor=3), model).pack(frame, documents, 4)
    found = frame.pack(documents, 12)
    by_perplexity = sorted(range(12), key=lambda i: perplexity(model, found.samples[i : i + 1]))
    middle = sorted(by_perplexity[4:8])
    assert torch.equal(chosen.samples, found.samples[middle])
    assert chosen.documents == tuple(found.documents[i] for i in middle)


def test_one_of_each_cluster():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(5, 8, generator=generator)
    owners = torch.arange(40) % 5
    vectors = centres[owners] + 0.1 * torch.randn(40, 8, generator=generator)
    for seed in range(3):
        chosen = nearest_to_centres(vectors, 5, seed)
        assert {int(owners[i]) for i in chosen} == set(range(5))
        for i in chosen:
            mates = vectors[owners == owners[i]]
            gaps = (mates - mates.mean(0)).norm(dim=1)
            assert (vectors[i] - mates.mean(0)).norm() <= gaps.min() + 1e-5


@pytest.mark.parametrize("count", [1, 6, 20])
def test_as_many_different_ones_as_asked_even_where_all_are_the_same(count):
    chosen = nearest_to_centres(torch.ones(20, 3), count, 0)
    assert len(set(chosen)) == len(chosen) == count


@pytest.mark.parametrize("case", ["llama-tied", "gpt2-tied", "bert", "t5"])
def test_mean_activations_are_on_one_scale_for_every_layer(case):
    model = build(case)
    frame, documents = pool()
    samples = frame.pack(documents, 8).samples
    means = mean_activations(model, samples, 3)
    layers = means.view(8, describe(model).num_layers, -1)
    # What enters the first layer of an encoder-decoder's decoder differs no less than the rest.
    torch.testing.assert_close(layers.square().sum(-1).mean(0), torch.ones(layers.shape[1]))
    torch.testing.assert_close(means, mean_activations(model, samples, 8), atol=1e-4, rtol=1e-3)


def test_diverse_takes_one_sample_of_each_kind():
    model = build("llama-tied")
    frame = Frame(16, 1, 2)
    kinds = [" ".join([f"w{word}"] * 15) for word in (10, 30, 50, 70)]
    documents = list(tokenised(iter(kinds * 4), tokenizer()))
    chosen = Selector(selecting("diverse"), model).pack(Frame(16, 1, None), documents, 4)
    assert frame.body == 15
    assert {int(sample[-1]) for sample in chosen.samples} == {10, 30, 50, 70}


def test_choosing_by_the_model_takes_one_that_will_do():
    for select in ("diverse", "perplexity"):
        with pytest.raises(StructPruneError, match=f"select='{select}' runs the model"):
            load_domains(selecting(select), tokenizer())
    encoder = build("bert").train()
    with pytest.raises(StructPruneError, match="select='perplexity' takes a causal language model"):
        load_domains(selecting("perplexity"), tokenizer(), model=encoder)
    assert encoder.training, "the mode is put back when choosing fails"


def test_a_small_source_makes_a_small_pool():
    few = config(domains=[DomainConfig("a", texts(12))], num_samples=4, select="diverse", pool_factor=50)
    assert len(load_domains(few, tokenizer(), model=build("llama-tied"))[0].samples) == 4


def test_pruned_on_a_selection():
    pruner = StructPruner(selecting("diverse"))
    pruner.prune_model(build("llama-tied"), tokenizer())
    assert pruner.manifest.select == "diverse"
