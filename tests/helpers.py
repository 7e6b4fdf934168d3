"""What tests of several folders share: comparisons, masks, and the whole model as a source."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from models import build, config, documents, token_ids, tokenizer
from tokenizers import Tokenizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, PreTrainedTokenizerFast

from optimum_structprune import DomainConfig, RecoveryConfig
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton, skeleton
from optimum_structprune.arch.modules import adopt_config_
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.packing import Domain
from optimum_structprune.forward.metrics import outputs_of
from optimum_structprune.method.calibrate import Moments, mixed
from optimum_structprune.method.layers import InMemory, NotSequentialError, run_model
from optimum_structprune.method.shrink import read_consumer, shrink_layer_, units_to_columns, write_consumer_
from optimum_structprune.pruner import StructPruner
from optimum_structprune.pruning.measure import Comparison
from optimum_structprune.record.plan import Plan
from optimum_structprune.sources.data import CalibrationData, batches_of
from optimum_structprune.steps.base import RunState
from optimum_structprune.system.stages import model_bytes


KEEP = {"mlp": 24, "attention": 2, "expert": 3, "shared_mlp": 20, "dense_mlp": 24}
KEEP |= {"encoder_mlp": 24, "decoder_mlp": 20}
RECOVERY_TEXT = {"domains": [DomainConfig(name=n, source=documents(200, seed=s)) for s, n in enumerate("ab")]}
OTHER_WORDS = TemporaryDirectory()
# A type of device that torch knows in every build.
CARD = torch.device("lazy", 0)


def with_long(cases: Iterable, short: Iterable) -> list:
    """Cases as parameters of a test: those whose first value is in `short` are short, and the others are slow."""
    short = set(short)
    return [
        pytest.param(*case, marks=() if case[0] in short else pytest.mark.slow)
        for case in (case if isinstance(case, tuple) else (case,) for case in cases)
    ]


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


@torch.no_grad()
def outputs(model):
    """Of random tokens, or of pixels where the model reads these."""
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return outputs_of(run_model(model, pixels if model.main_input_name == "pixel_values" else token_ids()))


def save_with_tokenizer(model, folder, reader=None) -> None:
    """Save a model of `build` as a folder that a command line can name."""
    model.save_pretrained(folder)
    (reader or tokenizer()).save_pretrained(folder)


def write_texts(path, texts) -> Path:
    """A file of documents."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def save_desk(folder, case="llama-tied", count=80):
    """A folder with what a command line names: a dense `model` with its tokenizer, and text in `a.jsonl`."""
    save_with_tokenizer(build(case), folder / "model")
    write_texts(folder / "a.jsonl", documents(count))
    return folder


def unread():
    """Text that nobody may read."""
    pytest.fail("text was read")
    yield


def error_line(capsys) -> str:
    """The one line that a command has ended with, which refuses something."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("structprune: error:")]
    assert len(lines) == 1, lines
    return lines[0]


def with_tokens(model, reader, kept):
    """A copy of a model and of its tokenizer with these tokens only, numbered in their order."""
    number = {old: new for new, old in enumerate(kept)}
    state = json.loads(reader.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {token: number[old] for token, old in vocab.items() if old in number}
    if merges := state["model"].get("merges"):
        state["model"]["merges"] = [pair for pair in merges if vocab["".join(pair)] in number]
    added = [{**token, "id": number[token["id"]]} for token in state["added_tokens"]]
    state["added_tokens"] = sorted(added, key=lambda token: token["id"])
    backend = Tokenizer.from_str(json.dumps(state))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **reader.special_tokens_map)
    small_config = deepcopy(model.config)
    small_config.vocab_size = len(kept)
    small = type(model)(small_config).eval()
    tables = [name for name, tensor in model.state_dict().items() if len(tensor) == model.config.vocab_size]
    small.load_state_dict({**model.state_dict(), **{name: model.state_dict()[name][kept] for name in tables}})
    return small, other


def same_weights(left, right) -> bool:
    """Bit for bit, where a NaN equals a NaN."""
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name])
        or (mine[name].shape == theirs[name].shape and torch.allclose(mine[name], theirs[name], 0, 0, equal_nan=True))
        for name in mine
    )


@contextmanager
def whole_model_at_once():
    """No layer runs by itself inside `with`, whatever the model allows: activations come from the whole model."""
    with patch.object(InMemory, "__init__", side_effect=NotSequentialError("this test runs the whole model at once")):
        yield


def own_family(model_type: str, **more) -> dict:
    """The description of a model type whose layers have the FFN of a Llama, and nothing else."""
    producers = {"mlp.gate_proj": "unit", "mlp.up_proj": "unit"}
    mlp = {"size": "intermediate_size", "producers": producers, "consumers": {"mlp.down_proj": "unit"}}
    return {"model_types": [model_type], "layer_path": "layers", "spaces": {"mlp": mlp}, **more}


def data_of(settings, domains=None) -> CalibrationData:
    """The calibration data in `domains`, by default those of a config in tokens of the tests' own tokenizer."""
    return CalibrationData(settings, load_domains(settings, tokenizer()) if domains is None else domains)


def weighed(*shares) -> CalibrationData:
    """Calibration data without samples, in domains of these weights."""
    nothing = torch.empty(0, 1, dtype=torch.long)
    return CalibrationData(config(), [Domain("", share, nothing, nothing) for share in shares])


def pruned_on(data, model, widths) -> RunState:
    """The finished run that brings a copy of a model to `widths` on given data."""
    state = RunState.start(deepcopy(model), describe(model), data)
    state.plan = Plan.of(state.model, state.arch)
    state.report.start(state.model, state.arch)
    comparison = Comparison(state)
    for step in StructPruner(data.config).steps(state.arch, state.model, widths):
        step.apply(state)
    comparison.finish()
    state.report.finish(state.model, state.arch, state.dense_arch, state.plan)
    return state


def mixture_of(moments, shares, weight) -> Moments:
    """The moments of the mixture at a consumer; those of the domains stay as they are."""
    (mixture,) = mixed(([deepcopy(part)] for part in moments), shares, [weight])
    return mixture


def mix(moments, weights) -> Moments:
    """The weighted average of several moments: the mixture of domains that have the same output energy."""
    alike = [replace(part, energy=torch.ones(())) for part in moments]
    return replace(mixture_of(alike, weights, torch.zeros(1, len(alike[0].mean))), energy=None)


def config_of(model):
    """A model's config as it is after saving."""
    saved = deepcopy(model.config)
    saved.architectures = [type(model).__name__]
    return saved


@torch.no_grad()
def cached_bytes(model, tokens: int) -> int:
    """What the cache holds after so many tokens; the states of a linear attention do not grow with the text."""
    if not (describe(model).causal or model.config.is_encoder_decoder):
        return 0
    ids = token_ids(1, tokens)
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    cache = next(value for value in model(ids, use_cache=True, **both).values() if isinstance(value, Cache))
    layers = getattr(cache, "self_attention_cache", cache).layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if getattr(layer, "keys", None) is not None)


def assert_as_said(outcome, model, small, cache_known=True) -> None:
    """Before and after pruning, a dry run says the widths, the parameters, the bytes and the cache for a token."""
    for that, when in ((model, "before"), (small, "after")):
        arch = describe(that)
        for space in outcome.spaces:
            width, by_layer = getattr(space, when), {part.layer: part.width for part in arch.of(space.name)}
            assert (width if isinstance(width, dict) else dict.fromkeys(by_layer, width)) == by_layer
        assert getattr(outcome.parameters, when) == that.num_parameters()
        assert getattr(outcome.layer_parameters, when) == sum(arch.layer_params)
        assert getattr(outcome.memory, when) == model_bytes(that)
        if not cache_known:
            assert outcome.cache_per_token is None
        else:
            each, of_three = cached_bytes(that, 1), cached_bytes(that, 3)
            assert of_three == 3 * each and getattr(outcome.cache_per_token, when) == each
    assert outcome.parameters.after < outcome.parameters.before


def remembered(model: nn.Module) -> dict[tuple[str, str], int]:
    """The whole numbers that the modules of a model hold."""
    every = ((name, key, value) for name, module in model.named_modules() for key, value in vars(module).items())
    return {(name, key): value for name, key, value in every if type(value) is int}


def assert_remembers_its_own_config(model) -> None:
    """The modules of a model hold the numbers that they would if it was loaded."""
    assert remembered(model) == remembered(skeleton(model, model.config))


def modes(model: nn.Module) -> dict[str, bool]:
    """Which modules of a model are in training mode."""
    return {name: module.training for name, module in model.named_modules()}


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def batches():
    return batches_of(load_domains(config(), tokenizer()), 3)


def kept(space) -> int:
    return KEEP[space.kind] if KEEP[space.kind] < space.width else space.width // 2


def random_plan(arch, names) -> Plan:
    generator = torch.Generator().manual_seed(3)
    keep = {}
    for space in arch.spaces:
        if space.kind in names:
            width = kept(space) * space.scale
            units = torch.randperm(space.size, generator=generator)[:width].sort().values
            keep[space.layer, space.name] = tuple(units.tolist())
    return Plan(arch.model_type, keep)


def shrunk(model, arch, plan):
    return without_refit(model, plan, {name: kept(arch.of(name)[0]) for name in plan.widths()})


def without_refit(model, plan, widths=None):
    """A copy of a model with the units of its layers that a plan keeps, as they are."""
    small, arch = deepcopy(model), describe(model)
    smaller = shrunk_skeleton(small, arch, widths or plan.widths())
    for layer in range(arch.num_layers):
        shrink_layer_(small, arch, layer, plan.keep, smaller)
    adopt_config_(small, smaller)
    return small


def first_units(model, ffn, groups=()):
    """A copy of a model whose layers keep their first FFN channels and KV groups, so many of each."""
    keep = {(layer, "mlp"): tuple(range(width)) for layer, width in enumerate(ffn)}
    keep |= {(layer, "attention"): tuple(range(count)) for layer, count in enumerate(groups)}
    return without_refit(model, Plan(model.config.model_type, keep)).eval()


def masked(model, arch, plan):
    model = deepcopy(model)
    for space in arch.spaces:
        if not space.inside and (space.layer, space.name) in plan.keep:
            silence(model, space, plan.keep[space.layer, space.name])
        for axis in space.consumers if (space.layer, space.name) in plan.keep else ():
            weight, bias = read_consumer(model, axis)
            keep = units_to_columns(plan.keep[space.layer, space.name], axis, weight.device)
            write_consumer_(model, axis, keep, weight[:, keep], bias)
    return model


def silence(model, space, keep):
    """Make a router's logits minus infinity where an expert is gone."""
    router = model.get_submodule(space.producers[0].module)
    gone = [expert for expert in range(space.size) if expert not in keep]
    forward, linear = router.forward, torch.nn.functional.linear

    def silent_linear(*args):
        logits = linear(*args)
        logits[..., gone] = float("-inf")
        return logits

    def silent_forward(*args):
        with patch("torch.nn.functional.linear", silent_linear):
            return forward(*args)

    router.forward = silent_forward
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[gone] = float("-inf")


def free_spaces(arch):
    """Kinds of space whose width may differ and that several layers have."""
    names = [] if arch.uniform else [name for name in arch.names if not arch.of(name)[0].uniform]
    return [name for name in names if len({space.layer for space in arch.of(name)}) > 1]


def recovery_config(**fields) -> RecoveryConfig:
    """A short training on two domains of random words, which is compared on others. None leaves a default away."""
    other = Path(OTHER_WORDS.name, "other.jsonl")
    if not other.exists():
        write_texts(other, documents(20, seed=9))
    training = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True, "bf16": False}
    defaults = {"tokens": 480, "seq_length": 24, "lora": {"r": 2}, "validation": str(other), **RECOVERY_TEXT}
    training = {key: value for key, value in {**training, **fields.get("training", {})}.items() if value is not None}
    return RecoveryConfig(**{**defaults, **fields, "training": training})


def failing(function, number, error):
    """The function, which raises an error at its n-th call after the work is done."""
    calls = []

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(result)
        if len(calls) == number:
            raise error
        return result

    return call


class Card(TorchDispatchMode):
    """Follows how many bytes tensors of a card without values hold at most, inside `with card()`."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == CARD:
                storage = tensor.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self):
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired()}
        return sum(self.held.values())


@contextmanager
def card():
    with FakeTensorMode(allow_non_fake_inputs=True), Card() as found:
        yield found


def put_on_card_(model):
    """Give a model parameters without values on the card."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=CARD)))


class Killed(Exception):
    """Stands for the end of the process."""


@contextmanager
def dying(monkeypatch, module, number, after):
    """The process dies at the n-th touch of the disk, before or after it; gives a function that counts them."""
    calls = []

    def wrapped(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number and not after:
                raise Killed
            result = function(*args, **kwargs)
            if len(calls) == number:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", wrapped(module.save_file))
        for name in ("write_text", "replace", "unlink"):
            patch.setattr(Path, name, wrapped(getattr(Path, name)))
        yield lambda: len(calls)


def main_of(script: str):
    """The `main` of an example, or of what we measure with."""
    return import_module(script).main


def ran(command, **options) -> str:
    """What a process writes to its standard output, which has to end well."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_two_ranks(script: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """What two processes of `torchrun` say that run a script, which may import what the tests share, and end well.

    Every rank writes into a file of its own: two that share a pipe write into each other's lines.
    """
    (folder / "script.py").write_text(script)
    tests, said = str(Path(__file__).parent), folder / "said"
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = path
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--redirects", "3", "--log-dir", str(said), str(folder / "script.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    for stream in ("stdout", "stderr"):
        ranks = "".join(file.read_text() for file in sorted(said.rglob(f"{stream}.log")))
        setattr(done, stream, getattr(done, stream) + ranks)
    assert done.returncode == 0, done.stderr
    return done


def ask_python(python, script, place, requests, **variables):
    """What a script answers under another Python, one process for all requests."""
    command = [python, Path(__file__).with_name(script), place / "answers.json"]
    ran(command, input=json.dumps(requests), env={**os.environ, **variables})
    return json.loads((place / "answers.json").read_text())


def today_is(monkeypatch, date: datetime) -> None:
    """Set the clock that chat templates read."""
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: date))


# Names that look like those of a result, and others; no file can have the name of one of the folders.
OF_RESULTS = st.sampled_from("config model README report evaluation vocab".split())
STEMS = OF_RESULTS | st.from_regex("[a-z_.]{1,9}x", fullmatch=True)
SUFFIXES = [*".json .safetensors .jinja .model .py .gguf .html .txt .md .bin .gitattributes .index.json".split(), ""]
FOLDERS = ["", "1_Pooling/", ".cache/hub/", "__pycache__/", "additional_chat_templates/", "my notes/"]


def user_files():
    """A strategy of up to three files that a user may put into a result, or replace there: contents by path."""
    paths = st.tuples(st.sampled_from(FOLDERS), STEMS, st.sampled_from(SUFFIXES)).map("".join)
    return st.dictionaries(paths, st.binary(max_size=3), max_size=3)


def put_into(folder, files) -> None:
    """Write files of bytes or text, by their paths, with the folders around them."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def contents(folder) -> dict[str, bytes]:
    """All files in a folder, by their paths."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
