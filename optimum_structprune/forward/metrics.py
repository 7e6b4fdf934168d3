"""Losses, perplexity and divergence of a model on held-out text, and their margins of error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from math import nan
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..arch.hooks import in_fast_dtype, intercept
from ..arch.inference import input_device, random_inputs, run_model
from ..arch.meta import predicts_next
from ..errors import StructPruneError
from ..method.devices import rows_at_once
from ..method.layers import equal
from ..system.offloading import check_reachable
from ..system.stages import progress


if TYPE_CHECKING:
    from peft import PeftModel  # its import takes as long as the import of torch

# The number of tokens whose logits a loss takes at a time on a CPU. The loss copies them in fp32.
TOKENS_AT_ONCE = 128
FP32_BYTES = 4
MEASURED_TOKENS = 4000  # tokens on which a run measures perplexity, over all domains
# Margins over fewer documents than the first number are wide, and over fewer than the second they are rough.
MIN_DOCUMENTS, MANY_DOCUMENTS = 5, 12
# Quantiles of Student's t at 0.95, by degrees of freedom, where the expansion in `margin_of_error` is off by over 2 %.
STUDENT_T = {1: 6.31, 2: 2.92}
# Lower bound of the margin of a ratio, divided by the number of documents: the sample may miss rare documents.
UNSEEN = 0.12
# Relative spread of the loss: between kinds of text, and between whole documents and their first tokens.
KINDS_DIFFER, PARTS_DIFFER = 0.5, 0.25
HEAD_TOKENS = 8  # tokens on which `plain_head` runs a model


def outputs_of(output: Any) -> Tensor:
    """Return the main tensor of a model's output: the logits if there are any, else the last hidden states."""
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


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
    return int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def perplexity(model: PreTrainedModel | PeftModel, samples: Tensor, batch_size: int | None = None) -> float:
    """Return the perplexity over samples: e to the mean loss per predicted token.

    The first token of each sample is context only.

    Args:
        model: A causal language model. Its training mode is restored afterwards.
        samples: Token ids, shape `(samples, seq_length)`.
        batch_size: The number of samples per forward pass. The default is 1 on a CPU, and up to 16 on a GPU, as long
            as their logits fill at most 1/64 of its memory.

    Raises:
        StructPruneError: If the model does not predict the next token, or the samples leave nothing to predict.
    """
    if not predicts_next(model):  # a bidirectional model sees the token that it would predict
        raise StructPruneError(f"{type(model).__name__} does not predict the next token, and has no perplexity.")
    return float(sample_losses(model, samples, batch_size).mean().exp())


@torch.no_grad()
def sample_losses(model: PreTrainedModel | PeftModel, samples: Tensor, batch_size: int | None = None) -> Tensor:
    """Return the mean loss per predicted token of each sample, shape `(samples,)`, fp64, on the CPU.

    See `perplexity` for the arguments.
    """
    if samples.dim() != 2 or not samples[:, 1:].numel():
        raise StructPruneError(
            f"samples has the shape {tuple(samples.shape)}, which leaves nothing to predict; (1, 2) is the least."
        )
    seq_length = samples.shape[1]
    batch_size = batch_size or samples_per_pass(model, seq_length)
    losses = row_losses(model, list(samples), tokens=batch_size * seq_length)
    return losses / (seq_length - 1)


@torch.no_grad()
def row_losses(model: PreTrainedModel | PeftModel, rows: Iterable[Tensor], tokens: int = 1) -> Tensor:
    """Return the total loss in nats of each row, shape `(rows,)`, fp64, on the CPU.

    Args:
        model: A causal language model.
        rows: Token ids, shape `(seq_length,)` each; lengths may differ. The first token of a row is context only.
        tokens: The most tokens in a forward pass. Neighbouring rows of equal length run together.
    """
    rows = list(rows)
    batches: list[Tensor] = []
    for length, same_length in groupby(rows, len):
        stacked = torch.stack(list(same_length))
        batches += stacked.split(max(tokens // length, 1))

    losses = []
    with evaluating(model):
        for targets, logits in _predictions([model], batches):
            losses.append(_losses(logits, targets))

    predicted = [len(row) - 1 for row in rows]
    return torch.stack([part.sum() for part in torch.cat(losses).cpu().split(predicted)])


@torch.no_grad()
def expected_shares(model: PreTrainedModel, samples: Tensor) -> Tensor:
    """Return the share of each token in the predictions of a model, shape `(vocab,)`, fp64, on the CPU.

    Square roots of probabilities are added up. They favour tokens that are rare in these samples, shape
    `(samples, seq_length)`, and may be frequent in other text.
    """
    batches = samples.split(samples_per_pass(model, samples.shape[1]))
    total: Tensor | float = 0.0
    with evaluating(model):
        for _, logits in _predictions([model], batches):
            # The sum stays on the device, so that the host waits once.
            total = total + logits.float().softmax(-1).sqrt().sum(0).double()
    shares = torch.as_tensor(total).cpu()
    return shares / shares.sum()


def divergence(logits: Tensor, teacher: Tensor, mean: bool = True) -> Tensor:
    """Return KL(teacher‖model) in nats, fp32: the mean, or one value per position.

    Args:
        logits: The logits of the model, shape `(..., vocab)`.
        teacher: The logits of the teacher, of the same shape. No gradient reaches them.
        mean: Whether to return the mean, shape `()`, or the values of all positions, shape `(...)`.
    """
    student_log = logits.float().log_softmax(-1)
    teacher_log = teacher.detach().float().log_softmax(-1)
    by_position = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    return by_position.mean() if mean else by_position


def margin_of_error(values: Tensor, documents: Tensor | None = None) -> float:
    """Return the half-width of the 90 % confidence interval of a mean; NaN for a single document.

    The interval is Student's t, whose quantile is expanded in 1/n (Abramowitz and Stegun 26.7.5), plus a correction
    for skewed documents (Johnson, JASA 1978, 73:536), because a few documents may lose much.

    Args:
        values: The values, shape `(values,)`.
        documents: The number of each value's document, shape `(values,)`. Documents are independent. By default each
            value has its own document.
    """
    deviations = values.double() - values.double().mean()
    count = len(values)
    if documents is not None:
        # The part that each document has in the mean: its own mean, where all documents have equally many values.
        index = documents.unique(return_inverse=True)[1].to(deviations.device)
        sums = deviations.new_zeros(int(index.max()) + 1).index_add(0, index, deviations)
        deviations = sums * len(sums) / count
        count = len(sums)
    if count < 2:
        return nan

    freedom = count - 1
    z = NormalDist().inv_cdf(0.95)
    expansion = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t = STUDENT_T.get(freedom, expansion)
    third_moment = (deviations.pow(3).mean() / deviations.var()).nan_to_num(0.0, 0.0, 0.0).abs()
    skewness = third_moment * (1 + 2 * t**2) / (6 * count)
    return float(t * deviations.std() / count**0.5 + skewness)


def margin_of_share(values: Tensor) -> float:
    """Return the margin of error of a share. Where all values agree, documents that were not read may still differ."""
    unseen = 1 - 0.05 ** (1 / len(values))  # the largest share of which a sample of this size likely shows none
    return max(margin_of_error(values), unseen)


@torch.no_grad()
def total_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the sum of next-token losses over a batch, shape `(batch, seq_length)`, of one forward pass."""
    size = tokens_at_once(input_device(model), _vocabulary(model))
    targets = ids[:, 1:].flatten().split(size)
    total: Tensor | int = 0
    for part, logits in zip(targets, _next_token_logits(model, ids, size), strict=True):
        total = total + _losses(logits, part.to(logits.device)).sum()
    return float(total)


@torch.no_grad()
def compare(
    model: PreTrainedModel, dense: PreTrainedModel, samples: Tensor, batch_size: int | None = None
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Compare a model with the dense model on the same text, in one pass of each.

    In memory are the logits and probabilities of few tokens by both models; see `tokens_at_once`. Where a model caps
    or scales its logits, the logits of a whole batch are.

    Args:
        model: The model.
        dense: The dense model.
        samples: Token ids, shape `(samples, seq_length)`.
        batch_size: The number of samples per forward pass; see `perplexity`.

    Returns:
        The mean losses per predicted token of each sample, shape `(samples,)`, as "dense" and "model"; then the mean
        KL(dense‖model) per predicted token in nats, and the share of tokens that both models predict alike.
    """
    batch_size = batch_size or samples_per_pass(dense, samples.shape[1])
    losses = []
    dense_losses = []
    distances = []
    agreements = []
    with evaluating(model, dense):
        for targets, logits, dense_logits in _predictions([model, dense], samples.split(batch_size)):
            losses.append(_losses(logits, targets))
            dense_losses.append(_losses(dense_logits, targets))
            distances.append(divergence(logits, dense_logits, mean=False))
            agreements.append(logits.argmax(-1) == dense_logits.argmax(-1))

    def by_sample(parts: list[Tensor]) -> Tensor:
        by_token = torch.cat(parts).double().reshape(samples[:, 1:].shape)
        return by_token.mean(1).cpu()

    distance = float(by_sample(distances).mean())
    agreement = float(by_sample(agreements).mean())
    return {"dense": by_sample(dense_losses), "model": by_sample(losses)}, (distance, agreement)


@contextmanager
def own_settings() -> Iterator[None]:
    """Use torch's defaults inside `with` or in a decorated function, whatever the caller has set.

    These are fp32 as the default dtype, new tensors on the CPU, no autocast, no inference mode, gradients, and fp32
    products in full precision. The caller's settings return afterwards.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)

        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))

        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_full_precision())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 inside `with`: TF32 and bf16 have 10 and 7 bits, too few for Gram matrices."""
    # torch 2.9 has a setting for each backend beside the older one for all, and reading the older one fails where a
    # caller has used the new settings.
    precisions: list[tuple[Any, str]] = []
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    for backend in backends:
        if hasattr(backend, "fp32_precision"):
            precisions.append((backend, backend.fp32_precision))
    try:
        former = torch.get_float32_matmul_precision()
    except RuntimeError:
        former = None

    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if former is not None:
            torch.set_float32_matmul_precision(former)
        for backend, precision in precisions:
            backend.fp32_precision = precision


@contextmanager
def evaluating(*models: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Put models in eval mode inside `with`, and restore the mode of every module afterwards.

    A module that has replaced another inside `with` takes the mode of the former module, and a module at a new place
    takes the mode of the model.

    Raises:
        StructPruneError: If a model has no weights.
    """
    modes_by_model = [{name: module.training for name, module in model.named_modules()} for model in models]
    try:
        for model in models:
            if any(parameter.is_meta for parameter in model.parameters()):
                check_reachable(model)
            model.eval()
        yield
    finally:
        for model, modes in zip(models, modes_by_model, strict=True):
            for name, module in model.named_modules():
                module.training = modes.get(name, modes[""])


def _predictions(models: Sequence[Any], batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the targets, shape `(tokens,)`, and the logits of each model, shape `(tokens, vocab)`.

    They are of few tokens at a time. `batches` have the shape `(batch, seq_length)`.
    """
    first = batches[0][:1, :HEAD_TOKENS]
    heads: list[Callable[[Tensor], Tensor] | None] = []
    for model in models:
        is_plain = plain_head(model, first)
        heads.append(partial(_head_logits, model.get_output_embeddings()) if is_plain else None)

    size = min(tokens_at_once(input_device(model), _vocabulary(model)) for model in models)
    for ids in progress(batches, desc="Comparing predictions", unit="batch", leave=False, delay=1):
        targets = ids[:, 1:].flatten().split(size)
        pairs = zip(models, heads, strict=True)
        logits_by_model = [_next_token_logits(model, ids, size, head) for model, head in pairs]
        for target, *logits in zip(targets, *logits_by_model, strict=True):
            device = logits[0].device
            yield [target.to(device), *(values.to(device) for values in logits)]


def _next_token_logits(
    model: Any, ids: Tensor, size: int, head: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Tensor]:
    """Yield the logits of all tokens but the last of each row, for `size` tokens at a time.

    `head` computes them from the last hidden states; None takes the logits of the whole batch from the model.
    """
    if head is None:
        logits = run_model(model, ids).logits[:, :-1]
        yield from logits.flatten(0, 1).split(size)
        return
    hidden = run_model(model.base_model, ids)[0][:, :-1]
    for part in hidden.flatten(0, 1).split(size):
        yield head(part)


def _head_logits(head: Any, hidden: Tensor) -> Tensor:
    with in_fast_dtype([head]):
        return head(hidden.to(head.weight.device))


@torch.no_grad()
def plain_head(model: Any, ids: Tensor) -> bool:
    """Return whether the head alone turns the last hidden states into logits, so that it can run on few tokens.

    All tensors are of one forward pass over `ids`, shape `(1, tokens)`. Two passes need not agree bit for bit: on a
    GPU, experts add their outputs in any order.
    """
    head, base = model.get_output_embeddings(), model.base_model
    if base is model or head is None or head.weight.is_meta or model.config.is_encoder_decoder:
        return False
    modules = [base, head]
    inputs: dict[int, Any] = {}
    outputs: dict[int, Any] = {}

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[index] = args[0] if args else None

    def after(index: int, output: Any) -> None:
        outputs[index] = output

    with intercept(modules, before, after):
        logits = run_model(model, ids).logits
    if len(outputs) < len(modules) or not isinstance(inputs[1], Tensor):
        return False

    # The model may change hidden states in front of the head, or logits behind it.
    is_input = equal(inputs[1], outputs[0][0])
    is_output = equal(logits, outputs[1].to(logits.dtype))
    return is_input and is_output


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each token, shape `(tokens,)`, fp64, on the device of the logits: the host need not wait."""
    return cross_entropy(logits.float(), targets, reduction="none").double()


@torch.no_grad()
def outputs_for(model: PreTrainedModel, inputs: Tensor | None = None) -> Tensor:
    """Return the outputs of a model for inputs, by default `random_inputs`.

    The shape is `(1, tokens, vocab)` for logits, and `(1, tokens, channels)` for hidden states.
    """
    with evaluating(model):
        return outputs_of(run_model(model, random_inputs(model) if inputs is None else inputs))
