"""Compare the outputs of a model with the outputs of its teacher, whatever the head of the model returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, logsigmoid
from transformers import AutoConfig, PreTrainedTokenizerBase, Trainer

from ..arch.inference import evaluating, input_device, on_device, random_inputs, run_model
from ..arch.meta import model_class, predicts_next
from ..domains.manifest import tokenizer_of
from ..measure.batches import IGNORED
from ..measure.predictions import accepted_inputs, bare_model
from ..measure.vectors import Pooling
from ..system.errors import StructPruneError, some_of
from .both_tokenizers import BothTokenizers, collated, respelled, split_inputs
from .logged_loss import LoggedLoss
from .placement import Placed, check_device
from .teacher import check_differs, check_sizes, loading_errors


def kl_of_classes(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of distributions over classes."""
    return kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def kl_of_labels(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of labels that apply independently of each other."""
    applies = kl_div(logsigmoid(student), logsigmoid(teacher), log_target=True, reduction="none")
    does_not_apply = kl_div(logsigmoid(-student), logsigmoid(-teacher), log_target=True, reduction="none")
    return (applies + does_not_apply).sum(-1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of scores."""
    return (student - teacher).square().mean(-1)


def relative_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of hidden states, divided by the variance of the teacher's hidden states."""
    return squared_error(student, teacher) / teacher.var()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the cosine similarity of vectors."""
    return 1 - cosine_similarity(student, teacher, dim=-1)


class Head(NamedTuple):
    """The comparison of one output.

    Attributes:
        unit: The elements of the last dimension of the output, in words. Both models need the same number.
        divergence: A function from the outputs of student and teacher, shape `(items, size)`, to the divergence of
            each item, shape `(items,)`.
    """

    unit: str
    divergence: Callable[[Tensor, Tensor], Tensor]


# What is compared: an entry for each output of a model, by its name. The mean divergences of all outputs that both
# models return are added. An output of shape `(batch, tokens, size)` has an item for each token that counts.
HEADS: Mapping[str, Head] = {
    "sentence_embedding": Head("channels of sentence vectors", cosine_distance),
    "token_embeddings": Head("channels of token vectors", relative_squared_error),
    "last_hidden_state": Head("channels of token vectors", relative_squared_error),
    "logits": Head("labels", kl_of_classes),
    "scores": Head("labels", kl_of_classes),
    "start_logits": Head("positions", kl_of_classes),
    "end_logits": Head("positions", kl_of_classes),
}
# The divergences of labels that are not exclusive classes, by the `problem_type` of a config.
PROBLEMS = {"regression": squared_error, "multi_label_classification": kl_of_labels}
# The inputs of a decoder. Some models make the input of their decoder from the input of the encoder.
DECODER_INPUTS = {"labels", "decoder_input_ids", "decoder_inputs_embeds"}
# The divergences that a temperature softens.
OF_DISTRIBUTIONS = (kl_of_classes, kl_of_labels)


def divergence_of(name: str, size: int, config: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the divergence for an output, from its name, its size and the config of the student."""
    head = HEADS[name]
    if head.unit != "labels":
        return head.divergence
    if size == 1:
        return squared_error
    return PROBLEMS.get(getattr(config, "problem_type", None) or "", head.divergence)


class Reader(Placed):
    """A model with any head.

    Args:
        model: A model of transformers or of sentence-transformers.
        device: The device of a teacher; see `place_teacher`.
    """

    def __init__(self, model: Any, device: str | torch.device | int | None = None):
        super().__init__(model, device)
        self.has_modules = has_modules(model)
        self.pooling = None if self.has_modules else Pooling.of(model)

    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the outputs of a placed teacher; see `outputs`."""
        if not self.sharded:
            inputs = on_device(inputs, input_device(self.model))
        with self.called() as model:
            return self.outputs(model, inputs)

    def outputs(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the outputs in `HEADS` for a batch, by name.

        Args:
            model: The model, as a Trainer wraps it.
            inputs: The batch.
        """
        if self.has_modules:
            return self._compared(model(dict(inputs)), inputs)

        arguments = accepted_inputs(self.model, inputs)
        if not self.model.config.is_encoder_decoder:
            arguments.pop("labels", None)
            arguments.pop("use_cache", None)
        try:
            return self._compared(model(**arguments), inputs)
        except ValueError as error:
            if not self.model.config.is_encoder_decoder or DECODER_INPUTS & arguments.keys():
                raise
            raise StructPruneError(
                f"The decoder of a {type(self.model).__name__} has no input in the columns {', '.join(inputs)}. Add "
                "`labels` or `decoder_input_ids` to the batches."
            ) from error

    def _compared(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        compared = {name: outputs[name] for name in HEADS if isinstance(outputs.get(name), Tensor)}
        for name in ("logits", "scores"):
            if name in compared:
                # A model that predicts may return its hidden states too.
                return {name: compared[name]}

        states = compared.get("last_hidden_state")
        if states is not None and self.pooling is not None and states.ndim == 3:
            mask = inputs.get("attention_mask")
            if mask is not None and mask.shape != states.shape[:2]:
                mask = None
            compared["sentence_embedding"] = self.pooling.vectors(states, mask)
        return compared

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each output, for a random input."""
        with evaluating(self.model), torch.no_grad():
            if self.has_modules:
                sample: Any = "text"
                if hasattr(self.model, "predict"):
                    sample = ("text", "text")
                inputs = on_device(self.model.preprocess([sample]), input_device(self.model))
                outputs = self.outputs(self.model, inputs)
            else:
                outputs = self._compared(run_model(self.model, random_inputs(self.model)), {})
        return {name: output.shape for name, output in outputs.items()}


def has_modules(model: Any) -> bool:
    """Return whether a model is one of sentence-transformers, which has modules after the transformer."""
    return hasattr(model, "preprocess") and hasattr(model, "tokenizer")


def load_any_teacher(
    teacher: Any,
    student: Any,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    is_pruned_later: bool = False,
) -> Any:
    """Return the teacher of a model with any head, from a model, or from its id or folder; see `load_teacher`.

    Raises:
        StructPruneError: If it cannot be loaded, lacks weights of its head, or is the student itself.
    """
    if isinstance(teacher, (str, Path)):
        teacher = _loaded(str(teacher), student, dtype, trust_remote_code)
    elif dtype is not None:
        teacher = teacher.to(dtype)
    check_differs(teacher, student, is_pruned_later)
    return teacher


def _loaded(name: str, student: Any, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    with loading_errors(name):
        if has_modules(student):
            teacher = type(student)(name, trust_remote_code=trust_remote_code)
            return teacher.to(dtype or student.dtype)

        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        kind = model_class(config)
        if config.model_type == student.config.model_type:
            kind = type(student)
        teacher, info = kind.from_pretrained(
            name,
            dtype=dtype or student.dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_kernels=False,
        )

    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise StructPruneError(
            f"The teacher {name!r} lacks weights of a {type(student).__name__}, which would be random: "
            f"{some_of(missing)}. Pass a teacher with the same head."
        )
    return teacher


def attach_to_head(
    trainer: Trainer,
    teacher: Any,
    temperature: float = 1.0,
    task_weight: float = 0.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | int | None = None,
    trust_remote_code: bool = False,
) -> HeadLoss:
    """Attach a loaded teacher to a Trainer whose model does not predict the next token; see `attach_teacher`."""
    check_device(device)
    student = Reader(bare_model(trainer.model))
    reader = Reader(teacher, device)
    if reader.has_modules != student.has_modules:
        raise StructPruneError(
            f"`teacher` is a {type(teacher).__name__}, and the Trainer trains a {type(student.model).__name__}. Pass "
            "a teacher of the same class, or its id or folder."
        )

    if teacher_tokenizer is None and not student.has_modules:
        teacher_tokenizer = tokenizer_of(teacher, trust_remote_code)
    if student.has_modules:
        tokenizer = student.model.tokenizer
        teacher_tokenizer = teacher.tokenizer
    reads_same = _has_same_tokens(student.model, teacher, tokenizer, teacher_tokenizer)
    shapes = _compared_shapes(student, reader, reads_same)

    if not reads_same and not isinstance(trainer.data_collator, BothTokenizers):
        collator: Any = trainer.data_collator
        if not student.has_modules:
            trainer.data_collator = BothTokenizers(collator, partial(respelled, tokenizer, teacher_tokenizer))
        elif not hasattr(student.model, "predict"):  # the batches of a reranker are texts
            teacher_collator = replace(collator, preprocess_fn=teacher.preprocess)
            trainer.data_collator = BothTokenizers(collator, partial(collated, teacher_collator))
    loss = HeadLoss(trainer, student, reader, list(shapes), temperature, task_weight)
    loss.attach()

    # The Trainer counts the tokens of an accumulated batch only for losses of tokens with labels.
    trainer.model_accepts_loss_kwargs = len(shapes.get("logits", ())) == 3
    trainer._loss_shifts_labels = False
    trainer.can_return_loss = True
    return loss


def _has_same_tokens(student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any) -> bool:
    """Return whether two models have the same token ids. Unknown vocabularies of equal size are taken to be equal."""
    if hasattr(tokenizer, "get_vocab") and hasattr(teacher_tokenizer, "get_vocab"):
        return bool(tokenizer.get_vocab() == teacher_tokenizer.get_vocab())

    check_sizes(teacher, student)
    return True


def _compared_shapes(student: Reader, teacher: Reader, reads_same: bool) -> dict[str, torch.Size]:
    """Return the shapes of the outputs that are compared, by name.

    Raises:
        StructPruneError: If the models have no output of the same size.
    """
    shapes = student.shapes()
    teacher_shapes = teacher.shapes()
    common = [name for name in shapes if name in teacher_shapes]
    kind = type(student.model).__name__
    if not teacher.has_modules and predicts_next(teacher.model):
        common = []  # its logits are of the next tokens
    if not student.has_modules and student.model.config.is_encoder_decoder != teacher.model.config.is_encoder_decoder:
        # An encoder returns an output for each token that it reads, and a decoder for each token that it writes.
        common = [name for name in common if len(shapes[name]) == 2 and HEADS[name].unit == "labels"]
    if not common:
        raise StructPruneError(
            f"`attach_teacher` cannot compare a {kind} with a {type(teacher.model).__name__}. Pass a teacher with "
            f"the same head, which returns one of {', '.join(shapes or HEADS)}."
        )

    equal: dict[str, torch.Size] = {}
    for name in common:
        if shapes[name][-1] == teacher_shapes[name][-1] or HEADS[name].unit == "positions":
            equal[name] = shapes[name]
    if not equal:
        name = common[-1]
        raise StructPruneError(
            f"The teacher has {teacher_shapes[name][-1]} {HEADS[name].unit}, and the model has {shapes[name][-1]}. "
            "Pass a teacher with the same number."
        )
    if reads_same:
        return equal

    # The tokens of two tokenizers are not compared one by one.
    of_texts: dict[str, torch.Size] = {
        name: shape for name, shape in equal.items() if len(shape) == 2 and HEADS[name].unit != "positions"
    }
    if not of_texts:
        raise StructPruneError(
            f"The teacher has other tokens than the model, and a {kind} returns an output for each token. Pass a "
            "teacher with the same tokenizer."
        )
    return of_texts


class HeadLoss(LoggedLoss):
    """The divergence from a teacher as the loss of a Trainer, for models that do not predict the next token.

    Args:
        trainer: The Trainer.
        student: The trained model.
        teacher: The teacher.
        names: The names of the compared outputs.
        temperature: The temperature of both distributions.
        task_weight: The weight of the Trainer's own loss.
    """

    def __init__(
        self,
        trainer: Trainer,
        student: Reader,
        teacher: Reader,
        names: Sequence[str],
        temperature: float,
        task_weight: float,
    ):
        super().__init__(trainer, "divergence", teacher, temperature, task_weight)
        self.student = student
        self.names = names
        self._own_loss = trainer.compute_loss

    def batch_loss(
        self, mode: str, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        """Compute the loss of a batch; see `LoggedLoss.compute_loss`."""
        accelerator = self.trainer.accelerator
        self.teacher.place(accelerator)
        losses: list[Tensor] = []
        compared: dict[str, Tensor] = {}

        for student_inputs, teacher_inputs in self._readings(inputs):
            with torch.no_grad(), accelerator.autocast():
                expected = self.teacher.predict(teacher_inputs)
            compared = self.student.outputs(model, student_inputs)

            parts = []
            for name in self.names:
                values = self._divergence(name, compared[name], expected[name], student_inputs)
                count = num_items_in_batch if compared[name].ndim == 3 else None
                parts.append(self._mean(values, count))
            losses.append(torch.stack(parts).sum())

        divergence = torch.stack(losses).mean()
        size = torch.ones_like(divergence)
        self._sums[mode] = self._sums.get(mode, 0) + torch.stack([divergence.detach(), size])

        loss = divergence
        if self.task_weight:
            own, _ = split_inputs(inputs)
            task: Any = self._own_loss(model, own, num_items_in_batch=num_items_in_batch)
            loss = (1 - self.task_weight) * divergence + self.task_weight * task
        if return_outputs:
            return loss, {"loss": loss, "logits": compared[self.names[-1]]}
        return loss

    def _divergence(self, name: str, output: Tensor, expected: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the divergence of each item of one output."""
        output = output.float()
        expected = expected.to(output.device).float()
        if output.ndim == 3:
            mask = _counted(inputs, output)
            output = output[mask]
            expected = expected[mask]
        divergence = divergence_of(name, output.shape[-1], self.student.model.config)
        if divergence not in OF_DISTRIBUTIONS:
            return divergence(output, expected)
        return self.temperature**2 * divergence(output / self.temperature, expected / self.temperature)

    def _readings(self, inputs: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Yield the inputs of the student and of the teacher: one pair, or one for each column of texts."""
        inputs, teacher_inputs = split_inputs(inputs)
        if not self.student.has_modules:
            yield inputs, teacher_inputs or inputs
            return

        options = {name: inputs.pop(name, None) for name in ("prompt", "task")}
        for part in (inputs, teacher_inputs):
            part.pop("dataset_name", None)
        trainer: Any = self.trainer
        columns, _ = trainer.collect_features(dict(inputs))
        if columns and isinstance(columns[0], Mapping):
            teacher_columns = columns
            if teacher_inputs:
                teacher_columns, _ = trainer.collect_features(teacher_inputs)
            yield from zip(columns, teacher_columns, strict=True)
            return

        pairs = list(_pairs(columns))
        device = trainer.accelerator.device
        student_inputs = on_device(self.student.model.preprocess(pairs, **options), device)
        yield student_inputs, self.teacher.model.preprocess(pairs, **options)


def _pairs(columns: Sequence[Sequence[Any]]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of the first column and each other column, whose values may be lists of texts."""
    for column in columns[1:]:
        for query, value in zip(columns[0], column, strict=True):
            documents = [value] if isinstance(value, str) else value
            for document in documents:
                yield query, document


def _counted(inputs: Mapping[str, Any], output: Tensor) -> Tensor:
    """Return which tokens of a batch count, shape `(batch, tokens)`: by the labels, or else all but padding."""
    shape = output.shape[:2]
    labels = inputs.get("labels")
    if labels is not None and labels.shape == shape:
        return labels != IGNORED
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == shape:
        return mask.bool()
    return torch.ones(shape, dtype=torch.bool, device=output.device)
