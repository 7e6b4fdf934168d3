"""Pruning inside a Trainer: widths, optimizer state, checkpoints, resuming, and what is refused."""

import json
from copy import deepcopy

import pytest
import torch
import torch._dynamo as dynamo
from helpers import count_hooks, logits, on_two_ranks, same_weights
from models import build, config, token_ids, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from optimum_structprune import StructPruneCallback, StructPruneError, attach_pruner
from optimum_structprune.arch.load import describe
from optimum_structprune.system.fingerprint import fingerprint
from optimum_structprune.trainer import RecentText


# Newer versions of transformers call it the first; the old name warns.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
SERIES = {"widths": {"mlp": 24}, "rounds": 3, "refit": "none", "criterion": "wanda"}
ROWS = [{"input_ids": ids, "labels": ids} for ids in token_ids(32, 24)]


def trainer(folder, model=None, callbacks=(), **fields) -> Trainer:
    defaults = {"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 2, "learning_rate": 1e-3}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), **{**defaults, **quiet, **fields})
    model = build("llama-tied") if model is None else model
    more = {"eval_dataset": ROWS[:4]} if arguments.eval_strategy != "no" else {}
    return Trainer(
        model, arguments, train_dataset=ROWS, callbacks=list(callbacks), processing_class=tokenizer(), **more
    )


class Watch(TrainerCallback):
    """Notes the width at every step, and checks the state of the optimizer."""

    def __init__(self):
        self.widths = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.widths[state.global_step] = model.config.intermediate_size
        for parameter in model.parameters():
            moments = optimizer.optimizer.state[parameter]
            assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
        held = {id(p) for group in optimizer.optimizer.param_groups for p in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters()}


def pruner(start=2, **schedule) -> StructPruneCallback:
    names = ("widths", "rounds", "seq_length", "skip_layers")
    fields = {name: schedule.pop(name) for name in names if name in schedule}
    return StructPruneCallback(config(**fields), start, **schedule)


@pytest.mark.parametrize(("fields", "steps"), [
    ({}, {2: 24}),
    ({"calibration": "domains"}, {2: 24}),
    ({"end": 6, "every": 2, "widths": {"mlp": 24, "attention": 1}}, {2: 34, 4: 28, 6: 24}),
    ({"start": 0.25, "end": 0.75, "rounds": 2}, {2: 31, 6: 24}),
    ({"start": 8}, {8: 24}),
])  # fmt: skip
def test_schedules(tmp_path, fields, steps):
    watch, callback = Watch(), pruner(**fields)
    run = trainer(tmp_path, callbacks=[callback, watch])
    run.train()
    assert {step: stage["mlp"] for step, stage in callback.steps.items()} == steps
    assert watch.widths == {step: min([40, *(steps[at] for at in steps if at <= step)]) for step in range(1, 9)}
    assert {len(callback.plan.keep[layer, "mlp"]) for layer in (0, 1)} == {24}
    assert count_hooks(run.model) == 0 and not run.model._load_state_dict_pre_hooks
    run.save_model(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(run.model.eval()))
    if "widths" in fields:  # heads go through legal numbers
        assert [stage["attention"] for stage in callback.steps.values()] == [4, 2, 1]


@pytest.mark.parametrize("fields", [
    {CHECKPOINTING: True, "max_grad_norm": 0.1, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "bf16": True},
    {"optim": "sgd"},
], ids=str)  # fmt: skip
def test_what_else_a_trainer_does(tmp_path, fields):
    run = trainer(tmp_path, callbacks=[pruner(end=4, rounds=2)], **fields)
    run.train()
    assert run.model.config.intermediate_size == 24
    if CHECKPOINTING in fields:
        assert all(block.gradient_checkpointing for block in run.model.model.layers)
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())


def test_moments_go_with_their_weights():
    model = build("llama-bias")
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    before = {name: deepcopy(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    arch = describe(model)
    callback = pruner()
    callback.text.add_call((token_ids(8, 24),), {})
    optimizer.zero_grad()
    assert callback.prune_(model, optimizer, {"mlp": 24, "attention": 2})
    keep = callback.plan.keep[0, "mlp"]
    name = "model.layers.0.mlp.down_proj.weight"
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(optimizer.state[model.get_parameter(name)][key], before[name][key][:, list(keep)])
    name = "model.layers.0.mlp.up_proj.bias"
    assert torch.equal(optimizer.state[model.get_parameter(name)]["exp_avg"], before[name]["exp_avg"][list(keep)])
    assert {space.size for space in arch.of("mlp")} == {40}
    model(token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()


def test_evaluation_is_no_calibration_text_and_metrics_are_left_alone(tmp_path):
    texts = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            texts[state.global_step] = len(callback.text)

    callback = pruner(start=8)
    run = trainer(tmp_path, callbacks=[callback, Look()], eval_strategy="steps", eval_steps=1)
    outcome = run.train()
    assert [texts[step] for step in (1, 2, 3)] == [48, 96, 144]
    assert not any("structprune" in name for metrics in (run.evaluate(), outcome.metrics) for name in metrics)
    assert any("structprune/params" in entry for entry in run.state.log_history if "eval_loss" in entry)


@pytest.mark.parametrize("when", ["forward", "step end"])
def test_no_hook_is_left_when_training_raises(tmp_path, when):
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    run = trainer(tmp_path, callbacks=[pruner(start=6), *([Broken()] if when == "step end" else [])])
    if when == "forward":
        run.compute_loss = lambda model, inputs, *args, **kwargs: model(**{**inputs, "labels": "none"})
    with pytest.raises(BaseException):  # noqa: B017  # whatever it is
        run.train()
    assert count_hooks(run.model) == 0 and not run.model._load_state_dict_pre_hooks


def saved(folder, **fields):
    return trainer(folder, **{"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0, **fields})


def describes(plan, model):
    """Whether a plan says which channels of the dense model are left."""
    dense = build("llama-tied")
    return all(
        torch.equal(old.mlp.up_proj.weight[list(plan.keep[index, "mlp"])], new.mlp.up_proj.weight)
        for index, (old, new) in enumerate(zip(dense.model.layers, model.model.layers, strict=True))
    )


def test_the_plan_speaks_of_the_dense_model_after_a_resume_too(tmp_path):
    for step in (None, 8, 4):
        run = saved(tmp_path)
        callback = attach_pruner(run, config(**SERIES), 2, end=6)
        run.train(resume_from_checkpoint=step and str(tmp_path / f"checkpoint-{step}"))
        assert run.model.config.intermediate_size == 24 and describes(callback.plan, run.model)


@pytest.mark.parametrize("second", [{"mlp": 12}, {"attention": 2}], ids=str)
def test_two_pruners_of_one_trainer_share_one_plan_of_the_dense_model(second, tmp_path):
    for step in (None, 4):
        run = saved(tmp_path)
        wishes = ({"mlp": 24}, 2), (second, 6)
        callbacks = [attach_pruner(run, config(**{**SERIES, "rounds": 1, "widths": of}), at) for of, at in wishes]
        run.train(resume_from_checkpoint=step and str(tmp_path / f"checkpoint-{step}"))
        first, later = (callback.plan for callback in callbacks)
        assert first == later and {name for _, name in first.keep} == {"mlp", *second}
        assert describes(first, run.model)


def test_a_run_resumes_with_the_model_that_it_began_with(tmp_path):
    """That of a checkpoint has lost what the run has removed so far, and would lose it a second time."""
    run = saved(tmp_path)
    attach_pruner(run, config(**SERIES), 2, end=6)
    run.train()
    checkpoint = str(tmp_path / "checkpoint-4")
    run = saved(tmp_path, model=AutoModelForCausalLM.from_pretrained(checkpoint))
    attach_pruner(run, config(**SERIES), 2, end=6)
    with pytest.raises(StructPruneError, match="began with a model of widths .*Resume with the model that"):
        run.train(resume_from_checkpoint=checkpoint)


def test_the_same_trainer_goes_on_after_an_interruption(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5 and not hasattr(self, "done"):
                self.done = True
                raise KeyboardInterrupt

    run = saved(tmp_path, callbacks=[Stop()])
    callback = attach_pruner(run, config(**SERIES), 2, end=6)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.model.config.intermediate_size < 40
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.model.config.intermediate_size == 24 and describes(callback.plan, run.model)


def test_models_that_the_trainer_makes_anew(tmp_path):
    run = Trainer(None, saved(tmp_path).args, train_dataset=ROWS, model_init=lambda: build("llama-tied"))
    callback = attach_pruner(run, config(**SERIES), 2, end=6)
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        run.train(resume_from_checkpoint=checkpoint)
        assert run.model.config.intermediate_size == 24 and describes(callback.plan, run.model)
        assert not run.model._load_state_dict_pre_hooks


def test_a_removal_waits_for_text(tmp_path):
    watch, callback = Watch(), pruner(start=1, seq_length=64)
    with pytest.warns(UserWarning, match="The removal at step 1 is postponed.*training has read 48 so far"):
        trainer(tmp_path, callbacks=[callback, watch]).train()
    assert watch.widths[1] == 40 and watch.widths[2] == 24


@pytest.mark.parametrize(
    ("step", "attached", "calibration"), [(4, True, "batches"), (6, False, "batches"), (4, False, "domains")]
)
def test_callbacks_stay_where_a_checkpoint_restores_others(step, attached, calibration, tmp_path):
    """The callback that the script holds stays, with the text in memory of its config."""
    how = {"config": config(sparsity=0.4, targets=("mlp",), rounds=2, round_to=1), "start": 3, "end": 5}
    how["calibration"] = calibration
    restored = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}

    def trained(folder, **resume):
        callback = StructPruneCallback(**how)
        run = trainer(folder, callbacks=[] if attached else [callback], **restored)
        callback = attach_pruner(run, **how) if attached else callback
        run.train(**resume)
        assert [one for one in run.callback_handler.callbacks if isinstance(one, StructPruneCallback)] == [callback]
        assert not run.model._load_state_dict_pre_hooks
        return run.model, callback

    whole, expected = trained(tmp_path / "whole")
    resumed, callback = trained(tmp_path / "again", resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
    assert resumed.config.intermediate_size == whole.config.intermediate_size < 40
    assert callback.steps == expected.steps and callback.plan.widths() == expected.plan.widths()
    if step > 5 or calibration == "domains":  # of the text that training shows, only what comes later calibrates
        assert same_weights(resumed, whole) and callback.plan == expected.plan


def test_a_checkpoint_of_other_names_is_refused(tmp_path):
    """So transformers saves experts. Its Trainer resumes without them, and fused AdamW then reads beyond its state."""
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, build("mixtral"), [pruner(start=1)], **fields).train()
    run = trainer(tmp_path, build("mixtral"), [pruner(start=1)], **fields)
    with pytest.raises(StructPruneError, match=r"another name for .* \(.*experts.*from_pretrained"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").config.intermediate_size == 24


def test_a_second_training_prunes_no_further(tmp_path):
    run = trainer(tmp_path)
    callback = attach_pruner(run, config(sparsity=0.4, targets=("mlp",), round_to=1), start=2)
    run.train()
    plan, width = callback.plan, run.model.config.intermediate_size
    run.train()
    assert run.model.config.intermediate_size == width < 40 and callback.plan == plan


@pytest.mark.parametrize("why", ["too little text", "stopped early"])
def test_a_removal_that_never_came_is_said_at_the_end(tmp_path, why):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run = trainer(tmp_path, callbacks=[Stop()] if why == "stopped early" else [])
    if why == "too little text":  # every row is shorter than a sample
        run.train_dataset = [{name: ids[:2] for name, ids in row.items()} for row in ROWS]
    callback = attach_pruner(run, config(widths={"mlp": 24}, seq_length=60), start=6)
    step = 3 if why == "stopped early" else 8
    with pytest.warns(UserWarning, match=f"ended after step {step} without the removals at step 6.*wider than asked"):
        run.train()
    assert run.model.config.intermediate_size == 40 and not (callback.plan and callback.plan.keep)


@pytest.mark.parametrize("skipped", [(), (0,)])
def test_checkpoints_on_the_way_reload_plainly_and_runs_resume(tmp_path, skipped):
    """Blocks that are skipped stay whole on the way and after resuming."""

    def run(folder, checkpoint=None):
        callbacks = [pruner(end=6, every=2, skip_layers=skipped), *([] if skipped else [Watch()])]
        run = trainer(tmp_path / folder, callbacks=callbacks, save_strategy="steps", save_steps=2)
        run.train(resume_from_checkpoint=checkpoint and str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
        return run.model

    whole = run("whole")
    for step, width in {2: 34, 4: 28, 6: 24, 8: 24}.items():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / f"checkpoint-{step}")
        widths = [block.mlp.down_proj.in_features for block in again.model.layers]
        assert widths == [40 if skipped else width, width]
    # Only the text seen since the checkpoint calibrates, so the weights are alike and not the same.
    assert run("again", 4).model.layers[1].mlp.down_proj.in_features == 24
    assert same_weights(run("late", 6), whole)


def test_what_reporters_see(tmp_path, monkeypatch):
    seen = {}

    class Dashboard(TrainerCallback):
        """Stands where TensorBoard and W&B stand, and copies what it is told, as they do."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen[state.global_step] = dict(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "dashboard", Dashboard)
    run = trainer(tmp_path, report_to=["dashboard"])
    callback = attach_pruner(run, config(), 3)
    others = [type(each) for each in run.callback_handler.callbacks if each is not callback]
    run.train()
    assert seen[2]["structprune/width/mlp"] == 40 and seen[3]["structprune/width/mlp"] == 24
    assert seen[6]["structprune/params"] == run.model.num_parameters()
    logged = [entry["structprune/width/mlp"] for entry in run.state.log_history]
    assert logged == sorted(logged, reverse=True) and {40, 24} == set(logged)
    assert [type(each) for each in run.callback_handler.callbacks if each is not callback] == others


def test_a_state_that_cannot_be_cut_begins_anew_for_what_is_cut(tmp_path):
    ages = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            ages[state.global_step] = {
                name: int(optimizer.state[parameter]["step"]) if parameter in optimizer.state else 0
                for name, parameter in model.named_parameters()
            }

    model = build("llama-tied")
    run = trainer(tmp_path, model, [Look()], optim="adafactor")
    attach_pruner(run, config(widths={"mlp": 24}, rounds=2), 2, end=5)
    with pytest.warns(UserWarning, match="state of Adafactor cannot be pruned") as warned:
        run.train()
    assert sum("cannot be pruned" in str(each.message) for each in warned) == 1
    for name, parameter in model.named_parameters():
        since = {step: ages[step][name] for step in (1, 2, 3, 5, 8)}
        assert since == ({1: 1, 2: 0, 3: 1, 5: 0, 8: 3} if ".mlp." in name else {step: step for step in since})
        assert torch.isfinite(parameter).all()
    assert model.config.intermediate_size == 24


def test_a_trainer_of_an_adapter_is_told_to_prune_first(tmp_path):
    model = get_peft_model(build("llama-tied"), LoraConfig(target_modules=["q_proj"]))
    run = trainer(tmp_path, model)
    said = pytest.raises(StructPruneError, match="adapter")
    with said:
        attach_pruner(run, config())
    run = trainer(tmp_path, callbacks=[pruner()])
    run.model = model
    with said:  # of an adapter that came after the callback, too
        run.train()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_a_model_is_compiled_once_for_each_width(tmp_path, backend):
    losses = {}
    for fields in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        run = trainer(tmp_path, logging_steps=1, **fields)
        attach_pruner(run, config(widths={"mlp": 24}), 2, end=4, every=1)
        with dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            run.train()
        assert run.model.config.intermediate_size == 24 and (run.model_wrapped is not run.model) == bool(fields)
        losses[len(fields)] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 8


# What two processes train, as `attach_pruner` and as the Trainer take it.
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
TOGETHER = {
    "checkpoints": ({}, {**CHECKPOINTS, "load_best_model_at_end": True}),
    "domains": ({"calibration": "domains"}, {}),
    "accumulation": ({}, {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}),
    "static graph": ({}, {"ddp_static_graph": True, "ddp_find_unused_parameters": False}),
    "adafactor": ({}, {"optim": "adafactor"}),
    "mixture": ({}, {}),
}
# What is trained other than a Llama, and the widths that it is pruned to.
MODELS = {"mixture": ("olmoe", {"mlp": 24, "expert": 3})}
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from transformers import TrainerCallback
from test_trainer import TOGETHER, pruner, trained_together, trainer
from optimum_structprune import StructPruneError, attach_pruner
from models import config

folder, rank = Path(sys.argv[1]), os.environ["RANK"]

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6 and not hasattr(self, "done"):
            self.done = True
            raise KeyboardInterrupt

found = {case: trained_together(folder / case, case, 2)[1] for case in TOGETHER}
run, noted = trained_together(folder / "again", "checkpoints", 2, [Stop()])
dist.barrier()
run.train(resume_from_checkpoint=str(folder / "again" / "checkpoint-2"))
assert run.model.config.intermediate_size == 24
found["again"] = noted
for how in ("alone", "evaluated"):
    run = trainer(folder, callbacks=[pruner()] if how == "alone" else [], eval_strategy="epoch")
    if how == "evaluated":
        attach_pruner(run, config(widths={"mlp": 24}), 2)
        run.evaluate()
    try:
        run.train()
    except StructPruneError as error:
        found[how] = str(error)
(folder / f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


def trained_together(folder, case, processes, callbacks=()):
    """A Trainer that has pruned in two steps, with batches of 4 over all processes, and what it held at each step."""
    schedule, fields = TOGETHER[case]
    model, widths = MODELS.get(case, ("llama-tied", {"mlp": 24, "attention": 2}))
    run = trainer(folder, build(model), per_device_train_batch_size=4 // processes, logging_steps=1, **fields)
    callback = attach_pruner(run, config(widths=widths, rounds=2), 2, end=5, **schedule)
    noted = {"weights": {}, "state": {}}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            states = [optimizer.state[parameter] for parameter in model.parameters() if parameter in optimizer.state]
            values = [value for of in states for value in of.values()]
            tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim]
            noted["weights"][str(state.global_step)] = fingerprint(model)
            noted["state"][str(state.global_step)] = [[*value.shape, float(value.double().sum())] for value in tensors]

    for each in (Note(), *callbacks):
        run.add_callback(each)
    try:
        run.train()
    except KeyboardInterrupt:
        return run, noted
    noted["loss"] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return run, noted | {"plan": callback.plan.to_dict(), "end": fingerprint(run.model)}


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    on_two_ranks(SCRIPT, folder, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("case", TOGETHER)
    def test_they_hold_the_same_and_train_as_one_does(self, case, of_two_ranks, tmp_path):
        first, second = (found[case] for found in of_two_ranks)
        assert first == second
        run, alone = trained_together(tmp_path, case, 1)
        assert run.model.config.intermediate_size == 24 and first["plan"] == alone["plan"]
        assert first["loss"] == pytest.approx(alone["loss"], rel=1e-5) and len(first["loss"]) == 8
        for step, tensors in alone["state"].items():
            theirs = first["state"][step]
            assert [each[:-1] for each in theirs] == [each[:-1] for each in tensors]
            sums, expected = ([each[-1] for each in of] for of in (theirs, tensors))
            assert sums == pytest.approx(expected, rel=1e-3, abs=1e-5)

    def test_the_same_trainers_go_on_after_an_interruption(self, of_two_ranks):
        """The second training begins wider than the first ended, and until the next removal it repeats it."""
        first, second = of_two_ranks
        assert first["again"] == second["again"]
        whole, again = (first[case]["weights"] for case in ("checkpoints", "again"))
        assert len(again) == 8 and [again[step] for step in "1234"] == [whole[step] for step in "1234"]

    def test_what_is_not_reached_is_refused(self, of_two_ranks):
        for found in of_two_ranks:
            assert "attach_pruner(trainer, config) instead" in found["alone"]
            assert "without DDP, and a model cannot be pruned under `nn.DataParallel`" in found["evaluated"]


def test_bad_input(tmp_path):
    with pytest.raises(StructPruneError, match="'batches' or 'domains', got 'batch'"):
        StructPruneCallback(config(), calibration="batch")
    run = Trainer(build("vit"), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), train_dataset=ROWS)
    attach_pruner(run, config(widths={"mlp": 24}))
    with pytest.raises(StructPruneError, match="ViTForImageClassification reads pixel_values.*inputs="):
        run.train()
    for name, value, what in (("fsdp", "full_shard", "FSDP"), ("deepspeed", "zero3.json", "DeepSpeed")):
        run = trainer(tmp_path, callbacks=[callback := pruner()])
        setattr(run.args, name, value)
        with pytest.raises(StructPruneError, match=f"{what} fixes the shapes.*Prune first.*attach_teacher"):
            callback.on_train_begin(run.args, run.state, run.control, model=run.model, optimizer=None)
    with pytest.raises(
        StructPruneError, match=r"callback does not reach the wrapper of torch.compile.*attach_pruner\(trainer"
    ):
        trainer(tmp_path, callbacks=[pruner()], torch_compile=True, torch_compile_backend="eager").train()


def test_padding_is_no_calibration_text_and_memory_of_the_text_is_bounded():
    text = RecentText(num_samples=1, seq_length=4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    text.add_call((), {"input_ids": torch.arange(6).view(2, 3), "attention_mask": mask})
    assert text.domain().samples.tolist() == [[0, 1, 4, 5]]
    text = RecentText(num_samples=8, seq_length=24)
    for _ in range(100):
        text.add_call((token_ids(4, 24),), {})
    assert len(text) == 8 * 24 and text.domain().samples.shape == (8, 24)
