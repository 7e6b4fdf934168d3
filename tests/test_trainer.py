"""Pruning inside a Trainer: widths, optimizer state, checkpoints, resuming, and refusals."""

import json
import re
from copy import deepcopy

import pytest
import torch
import torch._dynamo as dynamo
from helpers import count_hooks, logits, on_two_ranks, same_weights
from models import build, config, token_ids, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from optimum_structprune import RecoveryConfig, StructPruneCallback, StructPruneError, attach_pruner
from optimum_structprune.arch.load import describe
from optimum_structprune.system.fingerprint import fingerprint
from optimum_structprune.trainer import RecentText


# Newer versions of transformers use the first name and warn about the second.
CHECKPOINTING = "gradient_checkpointing"
if hasattr(TrainingArguments, "activation_checkpointing"):
    CHECKPOINTING = "activation_checkpointing"

SERIES = {"widths": {"mlp": 24}, "rounds": 3, "refit": "none", "criterion": "wanda"}
ROWS = [{"input_ids": ids, "labels": ids} for ids in token_ids(32, 24)]


def build_trainer(folder, model=None, callbacks=(), **fields) -> Trainer:
    """Return a Trainer of a small model for 8 steps on random rows."""
    defaults = {"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 2, "learning_rate": 1e-3}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), **(defaults | quiet | fields))

    if model is None:
        model = build("llama-tied")
    eval_rows = None
    if arguments.eval_strategy != "no":
        eval_rows = ROWS[:4]

    return Trainer(
        model,
        arguments,
        train_dataset=ROWS,
        eval_dataset=eval_rows,
        callbacks=list(callbacks),
        processing_class=tokenizer(),
    )


def build_saving_trainer(folder, **fields) -> Trainer:
    """Return a Trainer that saves a checkpoint every second step and leaves the weights as they are."""
    defaults = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0}
    return build_trainer(folder, **(defaults | fields))


def build_pruner(start=2, **fields) -> StructPruneCallback:
    """Return a callback from the fields of a config and of a schedule."""
    config_fields = {}
    schedule = {}
    for name, value in fields.items():
        if name in ("widths", "rounds", "seq_length", "skip_layers"):
            config_fields[name] = value
        else:
            schedule[name] = value
    return StructPruneCallback(config(**config_fields), start, **schedule)


def checkpoint_path(folder, step):
    """Return the folder of the checkpoint at a step, or None to start from the beginning."""
    if step is None:
        return None
    return str(folder / f"checkpoint-{step}")


def assert_plan_names_original_channels(plan, model):
    """Check that the FFN of each layer consists of the channels of the original model that the plan names."""
    original = build("llama-tied")
    for index, (layer, pruned_layer) in enumerate(zip(original.model.layers, model.model.layers, strict=True)):
        channels = list(plan.keep[index, "mlp"])
        assert torch.equal(layer.mlp.up_proj.weight[channels], pruned_layer.mlp.up_proj.weight)


class Watch(TrainerCallback):
    """Record the width at every step, and check the state of the optimizer."""

    def __init__(self):
        self.widths = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.widths[state.global_step] = model.config.intermediate_size

        for parameter in model.parameters():
            moments = optimizer.optimizer.state[parameter]
            assert moments["exp_avg"].shape == parameter.shape
            assert moments["exp_avg_sq"].shape == parameter.shape

        optimized = set()
        for group in optimizer.optimizer.param_groups:
            optimized.update(id(parameter) for parameter in group["params"])
        assert optimized == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize(("fields", "steps"), [
    ({}, {2: 24}),
    ({"calibration": "domains"}, {2: 24}),
    ({"end": 6, "every": 2, "widths": {"mlp": 24, "attention": 1}}, {2: 34, 4: 28, 6: 24}),
    ({"start": 0.25, "end": 0.75, "rounds": 2}, {2: 31, 6: 24}),
    ({"start": 8}, {8: 24}),
])  # fmt: skip
def test_schedules(tmp_path, fields, steps):
    watch = Watch()
    callback = build_pruner(**fields)
    trainer = build_trainer(tmp_path, callbacks=[callback, watch])
    trainer.train()

    expected_widths = {}
    width = 40
    for step in range(1, 9):
        width = steps.get(step, width)
        expected_widths[step] = width
    assert watch.widths == expected_widths
    assert {step: stage["mlp"] for step, stage in callback.steps.items()} == steps
    if "widths" in fields:  # The number of KV heads has to divide the number of query heads.
        assert [stage["attention"] for stage in callback.steps.values()] == [4, 2, 1]

    for layer in (0, 1):
        assert len(callback.plan.keep[layer, "mlp"]) == 24
    assert count_hooks(trainer.model) == 0
    assert not trainer.model._load_state_dict_pre_hooks

    trainer.save_model(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(trainer.model.eval()))


def test_each_removal_is_announced_once_by_its_number(tmp_path, capsys):
    trainer = build_trainer(tmp_path)
    attach_pruner(trainer, config(refit="none", criterion="wanda"), 2, end=8)
    trainer.train()

    printed = capsys.readouterr().err
    assert re.findall(r"Removal (\d of 4, after step \d)", printed) == [
        f"{number} of 4, after step {2 * number}" for number in (1, 2, 3, 4)
    ]
    assert "ound 1" not in printed


def test_the_recovery_of_a_config_is_ignored_with_a_warning(tmp_path):
    trainer = build_trainer(tmp_path)
    with pytest.warns(UserWarning, match="`recovery` has no effect here.*Call `attach_teacher`"):
        attach_pruner(trainer, config(recovery=RecoveryConfig(tokens=96)), 2)
    trainer.train()

    assert trainer.model.config.intermediate_size == 24


@pytest.mark.parametrize("fields", [
    {CHECKPOINTING: True, "max_grad_norm": 0.1, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "bf16": True},
    {"optim": "sgd"},
], ids=str)  # fmt: skip
def test_pruning_works_with_other_options_of_a_trainer(tmp_path, fields):
    trainer = build_trainer(tmp_path, callbacks=[build_pruner(end=4, rounds=2)], **fields)
    trainer.train()

    assert trainer.model.config.intermediate_size == 24
    if CHECKPOINTING in fields:
        assert all(layer.gradient_checkpointing for layer in trainer.model.model.layers)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_optimizer_moments_are_pruned_with_their_weights():
    model = build("llama-bias")
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    original_moments = {}
    for name, parameter in model.named_parameters():
        original_moments[name] = deepcopy(optimizer.state[parameter])
    arch = describe(model)

    callback = build_pruner()
    callback.text.add_call((token_ids(8, 24),), {})
    assert callback.prune_(model, optimizer, {"mlp": 24, "attention": 2})

    channels = list(callback.plan.keep[0, "mlp"])
    name = "model.layers.0.mlp.down_proj.weight"
    moments = optimizer.state[model.get_parameter(name)]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(moments[key], original_moments[name][key][:, channels])
    name = "model.layers.0.mlp.up_proj.bias"
    moments = optimizer.state[model.get_parameter(name)]
    assert torch.equal(moments["exp_avg"], original_moments[name]["exp_avg"][channels])
    assert {space.size for space in arch.of("mlp")} == {40}

    # The optimizer still works.
    model(token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()


def test_evaluation_adds_no_calibration_text_and_no_metrics(tmp_path):
    text_lengths = {}

    class RecordTextLength(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            text_lengths[state.global_step] = len(callback.text)

    callback = build_pruner(start=8)
    callbacks = [callback, RecordTextLength()]
    trainer = build_trainer(tmp_path, callbacks=callbacks, eval_strategy="steps", eval_steps=1)
    outcome = trainer.train()

    assert [text_lengths[step] for step in (1, 2, 3)] == [48, 96, 144]
    for metrics in (trainer.evaluate(), outcome.metrics):
        assert not any("structprune" in name for name in metrics)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert any("structprune/params" in entry for entry in evaluations)


@pytest.mark.parametrize("when", ["forward", "step end"])
def test_all_hooks_are_removed_when_training_raises(tmp_path, when):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    def compute_bad_loss(model, inputs, *args, **kwargs):
        return model(**(inputs | {"labels": "none"}))

    callbacks = [build_pruner(start=6)]
    if when == "step end":
        callbacks.append(Interrupt())
    trainer = build_trainer(tmp_path, callbacks=callbacks)
    if when == "forward":
        trainer.compute_loss = compute_bad_loss

    with pytest.raises(BaseException):  # noqa: B017  # The kind of the error does not matter.
        trainer.train()
    assert count_hooks(trainer.model) == 0
    assert not trainer.model._load_state_dict_pre_hooks


def test_the_plan_describes_the_original_model_after_a_resume(tmp_path):
    for step in (None, 8, 4):
        trainer = build_saving_trainer(tmp_path)
        callback = attach_pruner(trainer, config(**SERIES), 2, end=6)
        trainer.train(resume_from_checkpoint=checkpoint_path(tmp_path, step))

        assert trainer.model.config.intermediate_size == 24
        assert_plan_names_original_channels(callback.plan, trainer.model)


@pytest.mark.parametrize("second", [{"mlp": 12}, {"attention": 2}], ids=str)
def test_two_pruners_of_one_trainer_share_one_plan(second, tmp_path):
    settings = SERIES | {"rounds": 1}
    for step in (None, 4):
        trainer = build_saving_trainer(tmp_path)
        first_pruner = attach_pruner(trainer, config(**settings), 2)
        second_pruner = attach_pruner(trainer, config(**(settings | {"widths": second})), 6)
        trainer.train(resume_from_checkpoint=checkpoint_path(tmp_path, step))

        plan = first_pruner.plan
        assert second_pruner.plan == plan
        assert {name for _, name in plan.keep} == {"mlp", *second}
        assert_plan_names_original_channels(plan, trainer.model)


def test_resuming_with_the_model_of_a_checkpoint_is_refused(tmp_path):
    """The model of a checkpoint is already narrower, so a resumed training would remove the channels twice."""
    trainer = build_saving_trainer(tmp_path)
    attach_pruner(trainer, config(**SERIES), 2, end=6)
    trainer.train()

    checkpoint = str(tmp_path / "checkpoint-4")
    trainer = build_saving_trainer(tmp_path, model=AutoModelForCausalLM.from_pretrained(checkpoint))
    attach_pruner(trainer, config(**SERIES), 2, end=6)
    with pytest.raises(StructPruneError, match="began with a model of widths .*Resume with the model that"):
        trainer.train(resume_from_checkpoint=checkpoint)


class InterruptOnce(TrainerCallback):
    """Raise a KeyboardInterrupt the first time that training reaches a step."""

    def __init__(self, step):
        self.step = step
        self.interrupted = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt


def test_the_same_trainer_resumes_after_an_interruption(tmp_path):
    trainer = build_saving_trainer(tmp_path, callbacks=[InterruptOnce(step=5)])
    callback = attach_pruner(trainer, config(**SERIES), 2, end=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.model.config.intermediate_size < 40

    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.model.config.intermediate_size == 24
    assert_plan_names_original_channels(callback.plan, trainer.model)


def test_models_from_model_init_are_pruned(tmp_path):
    arguments = build_saving_trainer(tmp_path).args
    trainer = Trainer(None, arguments, train_dataset=ROWS, model_init=lambda: build("llama-tied"))
    callback = attach_pruner(trainer, config(**SERIES), 2, end=6)

    for step in (None, 4):
        trainer.train(resume_from_checkpoint=checkpoint_path(tmp_path, step))
        assert trainer.model.config.intermediate_size == 24
        assert_plan_names_original_channels(callback.plan, trainer.model)
        assert not trainer.model._load_state_dict_pre_hooks


def test_a_removal_waits_for_enough_text(tmp_path):
    watch = Watch()
    trainer = build_trainer(tmp_path, callbacks=[build_pruner(start=1, seq_length=64), watch])
    with pytest.warns(UserWarning, match="The removal at step 1 is postponed.*training has read 48 so far"):
        trainer.train()

    assert watch.widths[1] == 40
    assert watch.widths[2] == 24


@pytest.mark.parametrize(
    ("step", "attached", "calibration"), [(4, True, "batches"), (6, False, "batches"), (4, False, "domains")]
)
def test_a_resume_that_restores_callbacks_keeps_the_pruner_of_the_script(step, attached, calibration, tmp_path):
    """A checkpoint does not hold the text in memory of a config, so its callback must not replace the pruner."""
    settings = config(sparsity=0.4, targets=("mlp",), rounds=2, round_to=1)
    schedule = {"start": 3, "end": 5, "calibration": calibration}
    options = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}

    def train(folder, checkpoint=None):
        if attached:
            trainer = build_trainer(folder, **options)
            callback = attach_pruner(trainer, settings, **schedule)
        else:
            callback = StructPruneCallback(settings, **schedule)
            trainer = build_trainer(folder, callbacks=[callback], **options)

        trainer.train(resume_from_checkpoint=checkpoint)
        callbacks = trainer.callback_handler.callbacks
        assert [item for item in callbacks if isinstance(item, StructPruneCallback)] == [callback]
        assert not trainer.model._load_state_dict_pre_hooks
        return trainer.model, callback

    expected, expected_callback = train(tmp_path / "first")
    resumed, callback = train(tmp_path / "second", checkpoint_path(tmp_path / "first", step))

    assert resumed.config.intermediate_size == expected.config.intermediate_size < 40
    assert callback.steps == expected_callback.steps
    assert callback.plan.widths() == expected_callback.plan.widths()
    # A resumed training calibrates on the batches after the checkpoint only.
    if step > 5 or calibration == "domains":
        assert same_weights(resumed, expected)
        assert callback.plan == expected_callback.plan


def test_a_checkpoint_with_renamed_parameters_is_refused(tmp_path):
    """transformers saves experts under other names than the model has.

    Its Trainer then resumes without the state of the experts, and fused AdamW reads beyond the state.
    """
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    build_trainer(tmp_path, build("mixtral"), [build_pruner(start=1)], **fields).train()

    trainer = build_trainer(tmp_path, build("mixtral"), [build_pruner(start=1)], **fields)
    with pytest.raises(StructPruneError, match=r"another name for .* \(.*experts.*from_pretrained"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").config.intermediate_size == 24


def test_a_second_training_prunes_no_further(tmp_path):
    trainer = build_trainer(tmp_path)
    callback = attach_pruner(trainer, config(sparsity=0.4, targets=("mlp",), round_to=1), start=2)
    trainer.train()
    plan = callback.plan
    width = trainer.model.config.intermediate_size

    trainer.train()
    assert trainer.model.config.intermediate_size == width < 40
    assert callback.plan == plan


@pytest.mark.parametrize("why", ["too little text", "stopped early"])
def test_a_missed_removal_is_reported_at_the_end(tmp_path, why):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = build_trainer(tmp_path)
    last_step = 8
    if why == "stopped early":
        trainer.add_callback(Stop())
        last_step = 3
    else:  # Every row is shorter than a sample.
        trainer.train_dataset = [{"input_ids": row["input_ids"][:2], "labels": row["labels"][:2]} for row in ROWS]
    callback = attach_pruner(trainer, config(widths={"mlp": 24}, seq_length=60), start=6)

    message = f"ended after step {last_step} without the removals at step 6.*wider than asked"
    with pytest.warns(UserWarning, match=message):
        trainer.train()
    assert trainer.model.config.intermediate_size == 40
    assert not (callback.plan and callback.plan.keep)


@pytest.mark.parametrize("skipped", [(), (0,)])
def test_checkpoints_reload_and_resume(tmp_path, skipped):
    """Skipped layers keep their width in checkpoints and after a resume."""

    def train(folder, resume_step=None):
        callbacks = [build_pruner(end=6, every=2, skip_layers=skipped)]
        if not skipped:
            callbacks.append(Watch())
        trainer = build_trainer(tmp_path / folder, callbacks=callbacks, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=checkpoint_path(tmp_path / "first", resume_step))
        return trainer.model

    model = train("first")
    for step, width in {2: 34, 4: 28, 6: 24, 8: 24}.items():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / f"checkpoint-{step}")
        widths = [layer.mlp.down_proj.in_features for layer in reloaded.model.layers]
        first_width = 40 if skipped else width
        assert widths == [first_width, width]

    # A resumed training calibrates on the batches after the checkpoint, so the weights differ slightly.
    resumed = train("resumed-early", resume_step=4)
    assert resumed.model.layers[1].mlp.down_proj.in_features == 24
    resumed = train("resumed-late", resume_step=6)
    assert same_weights(resumed, model)


def test_reporters_receive_widths_and_parameters(tmp_path, monkeypatch):
    logs_by_step = {}

    class Dashboard(TrainerCallback):
        """Copy the logs, as the callbacks of TensorBoard and W&B do."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            logs_by_step[state.global_step] = dict(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "dashboard", Dashboard)
    trainer = build_trainer(tmp_path, report_to=["dashboard"])
    callback = attach_pruner(trainer, config(), 3)

    def kinds_of_callbacks():
        return [type(item) for item in trainer.callback_handler.callbacks if item is not callback]

    kinds_before = kinds_of_callbacks()
    trainer.train()

    assert logs_by_step[2]["structprune/width/mlp"] == 40
    assert logs_by_step[3]["structprune/width/mlp"] == 24
    assert logs_by_step[6]["structprune/params"] == trainer.model.num_parameters()
    widths = [entry["structprune/width/mlp"] for entry in trainer.state.log_history]
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == {40, 24}
    assert kinds_of_callbacks() == kinds_before


def test_an_optimizer_state_that_cannot_be_pruned_is_reset_for_pruned_parameters(tmp_path):
    ages = {}

    class RecordAges(TrainerCallback):
        """Record for how many steps the optimizer has had a state of each parameter."""

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            ages[state.global_step] = {}
            for name, parameter in model.named_parameters():
                age = 0
                if parameter in optimizer.state:
                    age = int(optimizer.state[parameter]["step"])
                ages[state.global_step][name] = age

    model = build("llama-tied")
    trainer = build_trainer(tmp_path, model, [RecordAges()], optim="adafactor")
    attach_pruner(trainer, config(widths={"mlp": 24}, rounds=2), 2, end=5)
    with pytest.warns(UserWarning, match="state of Adafactor cannot be pruned") as warned:
        trainer.train()

    assert sum("cannot be pruned" in str(warning.message) for warning in warned) == 1
    for name, parameter in model.named_parameters():
        parameter_ages = {step: ages[step][name] for step in (1, 2, 3, 5, 8)}
        if ".mlp." in name:
            assert parameter_ages == {1: 1, 2: 0, 3: 1, 5: 0, 8: 3}
        else:
            assert parameter_ages == {1: 1, 2: 2, 3: 3, 5: 5, 8: 8}
        assert torch.isfinite(parameter).all()
    assert model.config.intermediate_size == 24


def test_a_trainer_with_an_adapter_is_refused(tmp_path):
    model = get_peft_model(build("llama-tied"), LoraConfig(target_modules=["q_proj"]))
    trainer = build_trainer(tmp_path, model)
    with pytest.raises(StructPruneError, match="adapter"):
        attach_pruner(trainer, config())

    # The adapter may also come after the callback.
    trainer = build_trainer(tmp_path, callbacks=[build_pruner()])
    trainer.model = model
    with pytest.raises(StructPruneError, match="adapter"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_a_model_is_compiled_once_for_each_width(tmp_path, backend):
    def train(**fields):
        trainer = build_trainer(tmp_path, logging_steps=1, **fields)
        attach_pruner(trainer, config(widths={"mlp": 24}), 2, end=4, every=1)
        with dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            trainer.train()

        assert trainer.model.config.intermediate_size == 24
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        is_compiled = trainer.model_wrapped is not trainer.model
        return losses, is_compiled

    expected_losses, is_compiled = train()
    assert not is_compiled

    losses, is_compiled = train(torch_compile=True, torch_compile_backend=backend)
    assert is_compiled
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert len(expected_losses) == 8


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
# Trainings in two processes by name: the arguments of `attach_pruner`, and the arguments of the Trainer.
TOGETHER = {
    "checkpoints": ({}, CHECKPOINTS | {"load_best_model_at_end": True}),
    "domains": ({"calibration": "domains"}, {}),
    "accumulation": ({}, {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}),
    "static graph": ({}, {"ddp_static_graph": True, "ddp_find_unused_parameters": False}),
    "adafactor": ({}, {"optim": "adafactor"}),
    "mixture": ({}, {}),
}
# The trainings of another model than a Llama: the model, and the widths after pruning.
MODELS = {"mixture": ("olmoe", {"mlp": 24, "expert": 3})}
SCRIPT = """
import json, os, sys
from pathlib import Path

import torch.distributed as dist
from models import config
from test_trainer import TOGETHER, InterruptOnce, build_pruner, build_trainer, train_together

from optimum_structprune import StructPruneError, attach_pruner

folder = Path(sys.argv[1])
rank = os.environ["RANK"]
results = {}
for case in TOGETHER:
    trainer, results[case] = train_together(folder / case, case, 2)

trainer, results["resumed"] = train_together(folder / "resumed", "checkpoints", 2, [InterruptOnce(step=6)])
dist.barrier()
trainer.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-2"))
assert trainer.model.config.intermediate_size == 24

# A callback that is not attached does not reach the wrapper of DDP.
trainer = build_trainer(folder, callbacks=[build_pruner()], eval_strategy="epoch")
try:
    trainer.train()
except StructPruneError as error:
    results["not attached"] = str(error)

# An evaluation before the training prepares the model without DDP.
trainer = build_trainer(folder, eval_strategy="epoch")
attach_pruner(trainer, config(widths={"mlp": 24}), 2)
trainer.evaluate()
try:
    trainer.train()
except StructPruneError as error:
    results["evaluated"] = str(error)

(folder / f"{rank}.json").write_text(json.dumps(results))
"""


def train_together(folder, case, processes, callbacks=()):
    """Train and prune in two steps, with batches of 4 over all processes.

    Return the Trainer, and a record of the weights and the optimizer at each step.
    """
    schedule, fields = TOGETHER[case]
    model, widths = MODELS.get(case, ("llama-tied", {"mlp": 24, "attention": 2}))
    batch_size = 4 // processes
    trainer = build_trainer(folder, build(model), per_device_train_batch_size=batch_size, logging_steps=1, **fields)
    callback = attach_pruner(trainer, config(widths=widths, rounds=2), 2, end=5, **schedule)
    record = {"weights": {}, "state": {}}

    class RecordState(TrainerCallback):
        """Record the weights, and the shape and the sum of each tensor of the optimizer."""

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            tensors = []
            for parameter in model.parameters():
                if parameter not in optimizer.state:
                    continue
                for value in optimizer.state[parameter].values():
                    if isinstance(value, torch.Tensor) and value.ndim:
                        tensors.append([list(value.shape), float(value.double().sum())])

            step = str(state.global_step)
            record["weights"][step] = fingerprint(model)
            record["state"][step] = tensors

    trainer.add_callback(RecordState())
    for item in callbacks:
        trainer.add_callback(item)
    try:
        trainer.train()
    except KeyboardInterrupt:
        return trainer, record

    record["loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record_at_end = {"plan": callback.plan.to_dict(), "end": fingerprint(trainer.model)}
    return trainer, record | record_at_end


@pytest.fixture(scope="module")
def results_of_ranks(tmp_path_factory):
    """Return the results that each of two processes has written."""
    folder = tmp_path_factory.mktemp("together")
    on_two_ranks(SCRIPT, folder, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("case", TOGETHER)
    def test_two_processes_train_and_prune_as_one_process_does(self, case, results_of_ranks, tmp_path):
        record, second_record = [results[case] for results in results_of_ranks]
        assert record == second_record

        trainer, expected = train_together(tmp_path, case, 1)
        assert trainer.model.config.intermediate_size == 24
        assert record["plan"] == expected["plan"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert len(record["loss"]) == 8

        for step, expected_tensors in expected["state"].items():
            tensors = record["state"][step]
            assert [shape for shape, _ in tensors] == [shape for shape, _ in expected_tensors]
            expected_sums = [total for _, total in expected_tensors]
            assert [total for _, total in tensors] == pytest.approx(expected_sums, rel=1e-3, abs=1e-5)

    def test_the_same_trainers_resume_after_an_interruption(self, results_of_ranks):
        """The resumed training starts wider than the first ended, and repeats the first until the next removal."""
        results, second_results = results_of_ranks
        assert results["resumed"] == second_results["resumed"]

        weights = results["checkpoints"]["weights"]
        resumed_weights = results["resumed"]["weights"]
        assert len(resumed_weights) == 8
        for step in "1234":
            assert resumed_weights[step] == weights[step]

    def test_a_pruner_that_cannot_reach_the_wrapper_is_refused(self, results_of_ranks):
        for results in results_of_ranks:
            assert "attach_pruner(trainer, config) instead" in results["not attached"]
            assert "without DDP, and a model cannot be pruned under `nn.DataParallel`" in results["evaluated"]


def test_an_unknown_calibration_is_refused():
    with pytest.raises(StructPruneError, match="'batches' or 'domains', got 'batch'"):
        StructPruneCallback(config(), calibration="batch")


def test_a_trainer_of_a_vision_model_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(build("vit"), arguments, train_dataset=ROWS)
    attach_pruner(trainer, config(widths={"mlp": 16}))
    with pytest.raises(StructPruneError, match="ViTForImageClassification reads pixel_values.*inputs="):
        trainer.train()


def test_frameworks_with_fixed_shapes_are_refused(tmp_path):
    for field, value, framework in (("fsdp", "full_shard", "FSDP"), ("deepspeed", "zero3.json", "DeepSpeed")):
        callback = build_pruner()
        trainer = build_trainer(tmp_path, callbacks=[callback])
        setattr(trainer.args, field, value)
        with pytest.raises(StructPruneError, match=f"{framework} fixes the shapes.*Prune first.*attach_teacher"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=None)


def test_a_compiled_model_needs_an_attached_pruner(tmp_path):
    trainer = build_trainer(tmp_path, callbacks=[build_pruner()], torch_compile=True, torch_compile_backend="eager")
    message = r"callback does not reach the wrapper of torch.compile.*attach_pruner\(trainer"
    with pytest.raises(StructPruneError, match=message):
        trainer.train()


def test_padding_is_not_calibration_text():
    text = RecentText(num_samples=1, seq_length=4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    text.add_call((), {"input_ids": torch.arange(6).view(2, 3), "attention_mask": mask})
    assert text.domain().samples.tolist() == [[0, 1, 4, 5]]


def test_the_memory_of_recent_text_is_bounded():
    text = RecentText(num_samples=8, seq_length=24)
    for _ in range(100):
        text.add_call((token_ids(4, 24),), {})
    assert len(text) == 8 * 24
    assert text.domain().samples.shape == (8, 24)
