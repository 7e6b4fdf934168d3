"""Measure losses, perplexity and divergence of a model on held-out text, with their margins of error."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import groupby
from math import nan
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
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

# The number of tokens whose loss is computed at a time on a CPU. The loss copies their logits in fp32.
TOKENS_AT_ONCE = 128
FP32_BYTES = 4
# The number of tokens that measure the perplexity of a run, over all domains.
MEASURED_TOKENS = 4000
# Margins over fewer documents than `MIN_DOCUMENTS` are wide, and over fewer than `MANY_DOCUMENTS` they are rough.
MIN_DOCUMENTS = 5
MANY_DOCUMENTS = 12
# The quantiles of Student's t at 0.95 for few degrees of freedom, where `_student_t` would be off by more than 2 %.
STUDENT_T = {1: 6.31, 2: 2.92}
# The lower bound of the margin of a ratio, times the number of documents. The sample may miss rare documents.
UNSEEN = 0.12
# The relative spread of the loss between kinds of text.
KINDS_DIFFER = 0.5
# The relative spread of the loss between whole documents and their first tokens.
PARTS_DIFFER = 0.25
# The number of tokens for the check in `plain_head`.
HEAD_TOKENS = 8


def outputs_of(output: Any) -> Tensor:
    """Return the main tensor of a model's output: the logits, or else the last hidden states."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return output[0]
    return logits


def tokens_at_once(device: torch.device, vocabulary: int) -> int:
    """Return the number of tokens whose loss is computed at a time on a device."""
    return rows_at_once(device, FP32_BYTES * vocabulary, TOKENS_AT_ONCE)


def tokens_per_pass(model: PreTrainedModel | PeftModel, on_cpu: int) -> int:
    """Return the default number of tokens in a forward pass, by the size of their logits; see `rows_at_once`."""
    return rows_at_once(input_device(model), model.dtype.itemsize * _vocabulary(model), on_cpu)


def samples_per_pass(model: PreTrainedModel | PeftModel, seq_length: int) -> int:
    """Return the default number of samples in a forward pass: 1 on a CPU, and up to 16 on a GPU."""
    return rows_at_once(input_device(model), seq_length * model.dtype.itemsize * _vocabulary(model), 1)


def _vocabulary(model: PreTrainedModel | PeftModel) -> int:
    """Return the number of logits of a model."""
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
        StructPruneError: If the model does not predict the next token, or if the samples have fewer than two tokens.
    """
    # A bidirectional model sees the token that it would predict.
    if not predicts_next(model):
        raise StructPruneError(f"{type(model).__name__} does not predict the next token, and has no perplexity.")

    return float(sample_losses(model, samples, batch_size).mean().exp())


@torch.no_grad()
def sample_losses(model: PreTrainedModel | PeftModel, samples: Tensor, batch_size: int | None = None) -> Tensor:
    """Return the mean loss per predicted token of each sample, shape `(samples,)`, fp64, on the CPU.

    See `perplexity` for the arguments.
    """
    if samples.dim() != 2 or not samples[:, 1:].numel():
        raise StructPruneError(
            f"`samples` must contain at least one sample of two tokens, got the shape {tuple(samples.shape)}."
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
        tokens: The maximum number of tokens in a forward pass. Neighbouring rows of equal length run together.
    """
    rows = list(rows)
    batches: list[Tensor] = []
    for length, rows_of_length in groupby(rows, len):
        stacked = torch.stack(list(rows_of_length))
        batches += stacked.split(max(tokens // length, 1))

    losses = []
    with evaluating(model):
        for targets, logits in _predictions([model], batches):
            losses.append(_losses(logits, targets))

    counts = [len(row) - 1 for row in rows]
    losses_by_row = torch.cat(losses).cpu().split(counts)
    return torch.stack([row_loss.sum() for row_loss in losses_by_row])


@torch.no_grad()
def expected_shares(model: PreTrainedModel, samples: Tensor) -> Tensor:
    """Return the share of each token in the predictions of a model, shape `(vocab,)`, fp64, on the CPU.

    The shares are sums of square roots of probabilities. Compared with sums of probabilities, they favour tokens that
    are rare in these samples and may be frequent in other text. `samples` has the shape `(samples, seq_length)`.
    """
    batches = samples.split(samples_per_pass(model, samples.shape[1]))
    total: Tensor | float = 0.0
    with evaluating(model):
        for _, logits in _predictions([model], batches):
            # The sum remains on the device, so that the host waits only once.
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
    if mean:
        return by_position.mean()
    return by_position


def margin_of_error(values: Tensor, documents: Tensor | None = None) -> float:
    """Return the half-width of the 90 % confidence interval of a mean, or NaN for a single document.

    It is t · s / √n plus a correction for skewed documents (Johnson, JASA 1978, 73:536), because a few documents may
    have a large loss. t is the quantile of Student's distribution.

    Args:
        values: The values, shape `(values,)`.
        documents: The number of each value's document, shape `(values,)`. Documents are independent. By default each
            value has its own document.
    """
    deviations = values.double() - values.double().mean()
    count = len(values)
    if documents is not None:
        # The contribution of each document to the mean. If all documents have the same number of values, it is the
        # mean of the document.
        index = documents.unique(return_inverse=True)[1].to(deviations.device)
        sums = deviations.new_zeros(int(index.max()) + 1).index_add(0, index, deviations)
        deviations = sums * len(sums) / count
        count = len(sums)

    if count < 2:
        return nan

    t = _student_t(count - 1)
    third_moment = (deviations.pow(3).mean() / deviations.var()).nan_to_num(0.0, 0.0, 0.0).abs()
    skewness = third_moment * (1 + 2 * t**2) / (6 * count)
    return float(t * deviations.std() / count**0.5 + skewness)


def _student_t(freedom: int) -> float:
    """Return the quantile of Student's t at 0.95, expanded in 1/freedom (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.95)
    expansion = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return STUDENT_T.get(freedom, expansion)


def margin_of_share(values: Tensor) -> float:
    """Return the margin of error of a share.

    If all values are the same, it is the largest share s that a sample of n values misses with a probability of 5 %,
    (1 - s)^n = 0.05.
    """
    unseen_share = 1 - 0.05 ** (1 / len(values))
    return max(margin_of_error(values), unseen_share)


@torch.no_grad()
def total_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the sum of next-token losses over a batch, shape `(batch, seq_length)`, with one forward pass."""
    size = tokens_at_once(input_device(model), _vocabulary(model))
    targets_by_chunk = ids[:, 1:].flatten().split(size)
    total: Tensor | int = 0
    for targets, logits in zip(targets_by_chunk, _next_token_logits(model, ids, size), strict=True):
        total = total + _losses(logits, targets.to(logits.device)).sum()
    return float(total)


@torch.no_grad()
def compare(
    model: PreTrainedModel, dense: PreTrainedModel, samples: Tensor, batch_size: int | None = None
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Compare a model with the dense model on the same text, with one forward pass of each model.

    Only the logits and probabilities of a few tokens are in memory at a time; see `tokens_at_once`. If a model caps or
    scales its logits, the logits of a whole batch are in memory.

    Args:
        model: The model.
        dense: The dense model.
        samples: Token ids, shape `(samples, seq_length)`.
        batch_size: The number of samples per forward pass; see `perplexity`.

    Returns:
        The mean losses per predicted token of each sample, shape `(samples,)`, as "dense" and "model"; then the mean
        KL(dense‖model) per predicted token in nats, and the share of positions with the same most likely token.
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
    """Use torch's default settings inside `with` or in a decorated function, and restore the caller's settings.

    The defaults are fp32 as the default dtype, new tensors on the CPU, no autocast, no inference mode, gradients, and
    fp32 products in full precision. The states of the random number generators are restored too.
    """
    with ExitStack() as stack:
        stack.enter_context(_own_random_numbers())
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
def _own_random_numbers() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after `with`. The Trainer and peft use these generators."""
    devices = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = list(range(torch.cuda.device_count()))

    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 inside `with`.

    TF32 and bf16 have 10 and 7 bits, which is not enough for Gram matrices.
    """
    # torch 2.9 adds a setting for each backend. If a caller has used it, torch raises an error for the old setting.
    backend_precisions: list[tuple[Any, str]] = []
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    for backend in backends:
        if hasattr(backend, "fp32_precision"):
            backend_precisions.append((backend, backend.fp32_precision))

    original_precision: str | None = None
    with suppress(RuntimeError):
        original_precision = torch.get_float32_matmul_precision()

    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if original_precision is not None:
            torch.set_float32_matmul_precision(original_precision)
        for backend, precision in backend_precisions:
            backend.fp32_precision = precision


@contextmanager
def evaluating(*models: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Put models in eval mode inside `with`, and restore the mode of every module afterwards.

    A module that was replaced inside `with` gets the mode of the module before it. A module with a new name gets the
    mode of the model.

    Raises:
        StructPruneError: If a model has no weights.
    """
    modes_by_model = []
    for model in models:
        modes_by_model.append({name: module.training for name, module in model.named_modules()})

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
    """Yield the targets, shape `(tokens,)`, and the logits of each model, shape `(tokens, vocab)`, for a few tokens.

    Args:
        models: The models.
        batches: Token ids, shape `(batch, seq_length)` each.
    """
    test_ids = batches[0][:1, :HEAD_TOKENS]
    heads: list[Callable[[Tensor], Tensor] | None] = []
    for model in models:
        head: Callable[[Tensor], Tensor] | None = None
        if plain_head(model, test_ids):
            head = partial(_head_logits, model.get_output_embeddings())
        heads.append(head)

    size = min(tokens_at_once(input_device(model), _vocabulary(model)) for model in models)
    for ids in progress(batches, unit="batch", leave=False, delay=1):
        streams = []
        for model, head in zip(models, heads, strict=True):
            streams.append(_next_token_logits(model, ids, size, head))

        for targets in ids[:, 1:].flatten().split(size):
            logits = [next(stream) for stream in streams]
            device = logits[0].device
            chunk = [targets.to(device)]
            chunk += [values.to(device) for values in logits]
            yield chunk


def _next_token_logits(
    model: Any, ids: Tensor, size: int, head: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Tensor]:
    """Yield the logits of all tokens except the last token of each row, for `size` tokens at a time.

    Args:
        model: The model.
        ids: Token ids, shape `(batch, seq_length)`.
        size: The number of tokens.
        head: A function from the last hidden states to logits. None computes the logits of the whole batch at once.
    """
    if head is None:
        logits = run_model(model, ids).logits[:, :-1]
        yield from logits.flatten(0, 1).split(size)
        return

    hidden = run_model(model.base_model, ids)[0][:, :-1]
    for chunk in hidden.flatten(0, 1).split(size):
        yield head(chunk)


def _head_logits(head: Any, hidden: Tensor) -> Tensor:
    """Return the logits of hidden states, on the device of the head."""
    with in_fast_dtype([head]):
        return head(hidden.to(head.weight.device))


@torch.no_grad()
def plain_head(model: Any, ids: Tensor) -> bool:
    """Return whether the head alone computes logits from the last hidden states, so that it can run on a few tokens.

    The check uses one forward pass over `ids`, shape `(1, tokens)`. Two passes may differ by rounding, because experts
    on a GPU add their outputs in any order.
    """
    head = model.get_output_embeddings()
    base = model.base_model
    if base is model or head is None or head.weight.is_meta or model.config.is_encoder_decoder:
        return False

    modules = [base, head]
    inputs: dict[int, Any] = {}
    outputs: dict[int, Any] = {}

    def on_call(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[index] = None
        if args:
            inputs[index] = args[0]

    def on_return(index: int, output: Any) -> None:
        outputs[index] = output

    with intercept(modules, on_call, on_return):
        logits = run_model(model, ids).logits
    if len(outputs) < len(modules) or not isinstance(inputs[1], Tensor):
        return False

    # The model may change the hidden states before the head, or the logits after it.
    is_input = equal(inputs[1], outputs[0][0])
    is_output = equal(logits, outputs[1].to(logits.dtype))
    return is_input and is_output


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each token, shape `(tokens,)`, fp64, on the device of the logits."""
    return cross_entropy(logits.float(), targets, reduction="none").double()


@torch.no_grad()
def outputs_for(model: PreTrainedModel, inputs: Tensor | None = None) -> Tensor:
    """Return the outputs of a model for inputs, by default `random_inputs`.

    The shape is `(1, tokens, vocab)` for logits, and `(1, tokens, channels)` for hidden states.
    """
    if inputs is None:
        inputs = random_inputs(model)
    with evaluating(model):
        return outputs_of(run_model(model, inputs))
