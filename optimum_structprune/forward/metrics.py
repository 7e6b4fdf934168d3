"""Measures of a model on held-out text: perplexity, and its distance from the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from math import hypot, nan
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..arch.hooks import in_fast_dtype
from ..arch.inference import input_device, random_inputs, run_model
from ..arch.meta import predicts_next
from ..errors import StructPruneError
from ..method.devices import rows_at_once
from ..system.offloading import check_reachable
from ..system.stages import progress


if TYPE_CHECKING:
    from peft import PeftModel  # whose import takes as long as that of torch

# The number of tokens whose logits a loss takes at a time on a CPU, as the loss copies them in fp32.
TOKENS_AT_ONCE = 128
FP32_BYTES = 4
MEASURED_TOKENS = 4000  # tokens on which a run measures perplexity, of all kinds together
# The documents over which a margin of error is not wide, and those over which it is not rough.
MIN_DOCUMENTS, MANY_DOCUMENTS = 5, 12
STUDENT_T = {1: 6.31, 2: 2.92}  # by degrees of freedom, where its expansion is off by more than 2 %
UNSEEN = 0.12  # least margin of a ratio, over the documents: what few of a kind lose may be in none that was read
# The shares of what is lost by which people's kinds of text lose more or less than other text, and whole texts than
# their beginnings.
KINDS_DIFFER, PARTS_DIFFER = 0.5, 0.25
HEAD_TOKENS = 8  # on which it is tried whether the head alone gives the logits


def outputs_of(output: Any) -> Tensor:
    """The main tensor of a model's output: the logits where there are some, the last hidden states otherwise."""
    return output.logits if getattr(output, "logits", None) is not None else output[0]


def tokens_at_once(device: torch.device, vocabulary: int) -> int:
    """Return the number of tokens whose logits a loss takes at a time on a device."""
    return rows_at_once(device, FP32_BYTES * vocabulary, TOKENS_AT_ONCE)


def tokens_per_pass(model: PreTrainedModel | PeftModel, on_cpu: int) -> int:
    """Return the number of tokens in a forward pass by default, by the size of their logits; see `rows_at_once`."""
    return rows_at_once(input_device(model), model.dtype.itemsize * _vocabulary(model), on_cpu)


def samples_per_pass(model: PreTrainedModel | PeftModel, seq_length: int) -> int:
    """Return the number of samples in a forward pass by default: 1 on a CPU, and up to 16 on a GPU."""
    return rows_at_once(input_device(model), seq_length * model.dtype.itemsize * _vocabulary(model), 1)


def _vocabulary(model: PreTrainedModel | PeftModel) -> int:
    """Return the number of tokens in the vocabulary of a model."""
    return int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def perplexity(model: PreTrainedModel | PeftModel, samples: Tensor, batch_size: int | None = None) -> float:
    """The perplexity over samples: e to the mean loss per predicted token. The first token of each is context only.

    Args:
        model: A causal language model; its training mode is left as it was.
        samples: Token ids, shape `(samples, seq_length)`.
        batch_size: The number of samples in a forward pass; by default 1 on a CPU, and on a GPU up to 16, as long as
            their logits fill at most 1/64 of its memory.

    Raises:
        StructPruneError: If the model does not predict the next token, or the samples leave nothing to predict.
    """
    if not predicts_next(model):  # what the tokens themselves tell it would count as foreseen
        raise StructPruneError(f"{type(model).__name__} does not predict the next token, and has no perplexity.")
    return float(sample_losses(model, samples, batch_size).mean().exp())


def perplexity_figures(
    losses: Mapping[str, Tensor], tokens: int, documents: Tensor | None = None, differs: float = 0.0
) -> dict[str, Any]:
    """Gives the perplexities of models on a text, their margins of error, and counts, by the fields of a record.

    With several models, "ratio" is that of the last perplexity divided by the first. `losses` are those of the same
    samples of `tokens` tokens in all, and `documents` numbers the document of each, shape `(samples,)`; by default all
    differ. What they stand for may lose more or less, by the share `differs` of what is lost; the margin counts that.
    """
    first, *others = losses.values()
    perplexity = {name: float(each.mean().exp()) for name, each in losses.items()}
    # The margin of e to a mean is that of the mean, relative to it.
    margins = {name: perplexity[name] * margin_of_error(each, documents) for name, each in losses.items()}
    count = len(first if documents is None else documents.unique())
    if others:
        more = others[-1] - first
        ratio, margin = float(more.mean().exp()), max(margin_of_error(more, documents), UNSEEN / count)
        margins["ratio"] = hypot(ratio * margin, differs * (ratio - 1))
    counts = {"perplexity_tokens": tokens, "perplexity_documents": count}
    return {"perplexity": perplexity, "perplexity_margin": margins, **counts}


@torch.no_grad()
def sample_losses(model: PreTrainedModel | PeftModel, samples: Tensor, batch_size: int | None = None) -> Tensor:
    """The mean loss per predicted token of each sample, shape `(samples,)`, fp64, on the CPU; see `perplexity`."""
    if samples.dim() != 2 or not samples[:, 1:].numel():
        raise StructPruneError(
            f"samples has the shape {tuple(samples.shape)}, which leaves nothing to predict; (1, 2) is the least."
        )
    seq_length = samples.shape[1]
    batch_size = batch_size or samples_per_pass(model, seq_length)
    return row_losses(model, [*samples], tokens=batch_size * seq_length) / (seq_length - 1)


@torch.no_grad()
def row_losses(model: PreTrainedModel | PeftModel, rows: Iterable[Tensor], tokens: int = 1) -> Tensor:
    """The total loss in nats of each row of token ids, which may differ in length, shape `(rows,)`, fp64, on the CPU.
    The first token of a row is context only. Rows of equal length run together, up to so many `tokens`.
    """
    rows, batches = [*rows], list[Tensor]()
    for length, same in groupby(rows, len):
        batches += torch.stack([*same]).split(max(tokens // length, 1))
    with evaluating(model):
        losses = torch.cat([_losses(logits, targets) for targets, logits in _predictions([model], batches)])
    return torch.stack([part.sum() for part in losses.cpu().split([len(row) - 1 for row in rows])])


@torch.no_grad()
def expected_shares(model: PreTrainedModel, samples: Tensor) -> Tensor:
    """Gives how much a model expects each token in samples, as shares of the vocabulary, `(vocab,)`, fp64, on the CPU.

    The samples have the shape `(samples, seq_length)`. Square roots of probabilities are summed up, which favours what
    is rare here and may be frequent in other text.
    """
    # The sums stay on the device, so that the host waits once.
    total: Tensor | float = 0.0
    batches = samples.split(samples_per_pass(model, samples.shape[1]))
    with evaluating(model):
        for _, logits in _predictions([model], batches):
            total = total + logits.float().softmax(-1).sqrt().sum(0).double()
    shares = torch.as_tensor(total).cpu()
    return shares / shares.sum()


def divergence(logits: Tensor, teacher: Tensor, mean: bool = True) -> Tensor:
    """Gives KL(teacher‖model) in nats of logits `(..., vocab)`, as the mean or of each position, fp32."""
    student_log, teacher_log = (values.float().log_softmax(-1) for values in (logits, teacher.detach()))
    each = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    return each.mean() if mean else each


def margin_of_error(values: Tensor, documents: Tensor | None = None) -> float:
    """Gives what the mean of values, shape `(values,)`, is off by at most nine times in ten; NaN on one document.

    Beside Student's t, whose quantile is expanded in 1/n (Abramowitz and Stegun 26.7.5), it counts in how skewed the
    documents are (Johnson, JASA 1978, 73:536), as a few may lose much. `documents` has the number of each value's
    document, shape `(values,)`, and they are independent; by default each value has its own.
    """
    off, count = values.double() - values.double().mean(), len(values)
    if documents is not None:  # the parts that documents have in the mean, where they are of equal size their means
        index = documents.unique(return_inverse=True)[1].to(off.device)
        off = off.new_zeros(int(index.max()) + 1).index_add(0, index, off)
        off, count = off * len(off) / count, len(off)
    if count < 2:
        return nan
    z, free = NormalDist().inv_cdf(0.95), count - 1
    t = STUDENT_T.get(free, z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2))
    skewed = (off.pow(3).mean() / off.var()).nan_to_num(0.0, 0.0, 0.0).abs() * (1 + 2 * t**2) / (6 * count)
    return float(t * off.std() / count**0.5 + skewed)


def margin_of_share(values: Tensor) -> float:
    """Gives the margin of error of a share; where all values are alike, those that were not read may still differ."""
    return max(margin_of_error(values), 1 - 0.05 ** (1 / len(values)))  # what none of so many leaves likely


@torch.no_grad()
def total_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """The sum of a causal model's next-token losses over a batch, shape `(batch, seq_length)`, in one forward pass."""
    size = tokens_at_once(input_device(model), _vocabulary(model))
    pairs = zip(ids[:, 1:].flatten().split(size), _next_token_logits(model, ids, size), strict=True)
    return float(sum(_losses(logits, targets.to(logits.device)).sum() for targets, logits in pairs))


@torch.no_grad()
def compare(
    model: PreTrainedModel, dense: PreTrainedModel, samples: Tensor, batch_size: int | None = None
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Compares a model with the dense one on the same text, in one pass of each.

    It gives the mean losses per predicted token in each sample, shape `(samples,)`, as "dense" and "model"; then the
    mean KL(dense‖model) per predicted token in nats, and the share of these tokens for which both find the same one
    likeliest. The logits and probabilities of a few tokens by both models are in memory at a time (`tokens_at_once`);
    where a model caps or scales its logits, those of one batch. `samples` has the shape `(samples, seq_length)`.
    """
    found = list[tuple[Tensor, ...]]()
    batch_size = batch_size or samples_per_pass(dense, samples.shape[1])
    with evaluating(model, dense):
        for targets, mine, theirs in _predictions([model, dense], samples.split(batch_size)):
            closeness = divergence(mine, theirs, mean=False), mine.argmax(-1) == theirs.argmax(-1)
            found.append((_losses(mine, targets), _losses(theirs, targets), *closeness))
    by_token = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    mine, theirs, distance, agreed = (each.reshape(samples[:, 1:].shape).mean(1).cpu() for each in by_token)
    return {"dense": theirs, "model": mine}, (float(distance.mean()), float(agreed.mean()))


@contextmanager
def own_settings() -> Iterator[None]:
    """Use torch's own defaults inside `with` or a decorated function, whatever the caller has set: fp32 as the default
    dtype, new tensors on the CPU, no autocast, no inference mode, and gradients on.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu")):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def evaluating(*models: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Put models in eval mode inside `with`; afterwards every module is back in the mode that it was in.

    A model without weights, which would run in no time and give nothing, is refused. A module that has taken another's
    place inside `with` is put in the mode of that one, and a module at a new place in the mode of the model.
    """
    modes_by_name = [{name: module.training for name, module in model.named_modules()} for model in models]
    try:
        for model in models:
            if any(parameter.is_meta for parameter in model.parameters()):
                check_reachable(model)
            model.eval()
        yield
    finally:
        for model, modes in zip(models, modes_by_name, strict=True):
            for name, module in model.named_modules():
                module.training = modes.get(name, modes[""])


def _predictions(models: Sequence[Any], batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gives targets, `(tokens,)`, and the logits of each model, `(tokens, vocab)`, a few tokens at a time.

    `batches` have the shape `(batch, seq_length)`.
    """
    first = batches[0][:1, :HEAD_TOKENS]
    # None unless the head alone makes the logits.
    heads = [
        partial(_head_logits, model.get_output_embeddings()) if plain_head(model, first) else None for model in models
    ]
    size = min(tokens_at_once(input_device(model), _vocabulary(model)) for model in models)
    for ids in progress(batches, desc="predictions", unit="batch", leave=False, delay=1):
        targets = ids[:, 1:].flatten().split(size)
        logits = [_next_token_logits(model, ids, size, head) for model, head in zip(models, heads, strict=True)]
        for target, *some in zip(targets, *logits, strict=True):
            yield [tensor.to(some[0].device) for tensor in (target, *some)]


def _next_token_logits(
    model: Any, ids: Tensor, size: int, head: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Tensor]:
    """Compute the logits for all tokens of a batch but the first of each row, for `size` tokens at a time."""
    if head is None:
        yield from run_model(model, ids).logits[:, :-1].flatten(0, 1).split(size)
        return
    hidden = run_model(model.base_model, ids)[0][:, :-1].flatten(0, 1)
    yield from map(head, hidden.split(size))


def _head_logits(head: Any, hidden: Tensor) -> Tensor:
    with in_fast_dtype([head]):
        return head(hidden.to(head.weight.device))


def plain_head(model: Any, ids: Tensor) -> bool:
    """Tries on a few tokens if the head alone makes logits, so that it need not run on all at once."""
    head, base = model.get_output_embeddings(), model.base_model
    if base is model or head is None or head.weight.is_meta or model.config.is_encoder_decoder:
        return False
    hidden = run_model(base, ids)[0]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return False
    return torch.equal(_head_logits(head, hidden), run_model(model, ids).logits)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each token, shape `(tokens,)`, fp64. It stays on its device, so that nothing waits for a GPU."""
    return cross_entropy(logits.float(), targets, reduction="none").double()


@torch.no_grad()
def outputs_for(model: PreTrainedModel, inputs: Tensor | None = None) -> Tensor:
    """The outputs for inputs, by default `random_inputs`, shape `(1, tokens, vocab)` or `(1, tokens, channels)`."""
    with evaluating(model):
        return outputs_of(run_model(model, random_inputs(model) if inputs is None else inputs))
