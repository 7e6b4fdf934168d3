"""Functions that tests of several folders share: comparisons, masks, small runs, and other processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from functools import partial
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
from optimum_structprune.arch.inference import outputs_of
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton, skeleton
from optimum_structprune.arch.modules import adopt_config_
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.packing import Domain
from optimum_structprune.measure.kl import divergence
from optimum_structprune.method.calibrate import Moments, mixed
from optimum_structprune.method.layers import InMemory, NotSequentialError, run_model
from optimum_structprune.method.plan import Plan
from optimum_structprune.method.shrink import read_consumer, shrink_layer_, units_to_columns, write_consumer_
from optimum_structprune.pruner import StructPruner
from optimum_structprune.pruning.comparison import Comparison
from optimum_structprune.steps.base import RunState
from optimum_structprune.steps.data import CalibrationData, batches_of
from optimum_structprune.system.stages import model_bytes


# The widths of random plans, by kind of space.
KEEP = {
    "mlp": 24,
    "attention": 2,
    "expert": 3,
    "shared_mlp": 20,
    "dense_mlp": 24,
    "encoder_mlp": 24,
    "decoder_mlp": 20,
}
RECOVERY_TEXT = {
    "domains": [
        DomainConfig(name="a", source=documents(200, seed=0)),
        DomainConfig(name="b", source=documents(200, seed=1)),
    ]
}
OTHER_WORDS = TemporaryDirectory()
# Every build of torch knows this type of device.
CARD = torch.device("lazy", 0)


def with_long(cases: Iterable, short: Iterable) -> list:
    """Return cases as parameters of a test, with a slow mark on each case whose first value is not in `short`."""
    short = set(short)
    parameters = []
    for case in cases:
        if not isinstance(case, tuple):
            case = (case,)
        marks = []
        if case[0] not in short:
            marks.append(pytest.mark.slow)
        parameters.append(pytest.param(*case, marks=marks))
    return parameters


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


@torch.no_grad()
def outputs(model):
    """Return the outputs of a model on random tokens, or on random pixels if the model reads pixels."""
    if model.main_input_name == "pixel_values":
        inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    else:
        inputs = token_ids()
    return outputs_of(run_model(model, inputs))


def save_with_tokenizer(model, folder, reader=None) -> None:
    """Save a model with a tokenizer, by default the tokenizer of the models of `build`."""
    reader = reader or tokenizer()
    model.save_pretrained(folder)
    reader.save_pretrained(folder)


def write_texts(path, texts) -> Path:
    """Write texts as a JSONL file, and return its path."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines))
    return path


def save_desk(folder, case="llama-tied", count=80):
    """Write the files that a command line names: an original `model` with its tokenizer, and text in `a.jsonl`."""
    save_with_tokenizer(build(case), folder / "model")
    write_texts(folder / "a.jsonl", documents(count))
    return folder


def unread():
    """Return text that fails the test when it is read."""
    pytest.fail("text was read")
    yield


def error_line(capsys) -> str:
    """Return the error line of a command. Fail if it printed none or several."""
    output = capsys.readouterr().err
    lines = [line for line in output.splitlines() if line.startswith("structprune: error:")]
    assert len(lines) == 1, lines
    return lines[0]


def with_tokens(model, reader, kept):
    """Return copies of a model and of its tokenizer with the tokens `kept` only, renumbered in their order."""
    new_ids = {old_id: new_id for new_id, old_id in enumerate(kept)}

    state = json.loads(reader.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {token: new_ids[old_id] for token, old_id in vocab.items() if old_id in new_ids}
    merges = state["model"].get("merges")
    if merges:
        state["model"]["merges"] = [pair for pair in merges if vocab["".join(pair)] in new_ids]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    state["added_tokens"].sort(key=lambda token: token["id"])
    backend = Tokenizer.from_str(json.dumps(state))
    small_reader = PreTrainedTokenizerFast(tokenizer_object=backend, **reader.special_tokens_map)

    small_config = deepcopy(model.config)
    small_config.vocab_size = len(kept)
    small = type(model)(small_config).eval()
    weights = model.state_dict()
    for name, tensor in weights.items():
        if len(tensor) == model.config.vocab_size:
            weights[name] = tensor[kept]
    small.load_state_dict(weights)
    return small, small_reader


def same_weights(left, right) -> bool:
    """Return whether two models have the same weights, bit for bit. A NaN equals a NaN."""
    left_weights = left.state_dict()
    right_weights = right.state_dict()
    if left_weights.keys() != right_weights.keys():
        return False

    for name, tensor in left_weights.items():
        right_tensor = right_weights[name]
        if torch.equal(tensor, right_tensor):
            continue
        if tensor.shape != right_tensor.shape or not torch.allclose(tensor, right_tensor, 0, 0, equal_nan=True):
            return False
    return True


@contextmanager
def whole_model_at_once():
    """Take all activations from passes of the whole model, even if its layers can run one by one."""
    error = NotSequentialError("this test runs the whole model at once")
    with patch.object(InMemory, "__init__", side_effect=error):
        yield


def own_family(model_type: str, **more) -> dict:
    """Return a description of a model type in which only the FFN can be pruned, as in a Llama."""
    mlp = {
        "size": "intermediate_size",
        "producers": {"mlp.gate_proj": "unit", "mlp.up_proj": "unit"},
        "consumers": {"mlp.down_proj": "unit"},
    }
    description = {"model_types": [model_type], "layer_path": "layers", "spaces": {"mlp": mlp}}
    return description | more


def data_of(settings, domains=None) -> CalibrationData:
    """Return calibration data in `domains`, by default in the domains of a config with the tests' own tokenizer."""
    if domains is None:
        domains = load_domains(settings, tokenizer())
    return CalibrationData(settings, domains)


def weighed(*shares) -> CalibrationData:
    """Return calibration data without samples, in domains of these weights."""
    no_samples = torch.empty(0, 1, dtype=torch.long)
    domains = [Domain("", share, no_samples, no_samples) for share in shares]
    return CalibrationData(config(), domains)


def pruned_on(data, model, widths) -> RunState:
    """Prune a copy of a model to `widths` on calibration data, and return the state of the finished run."""
    state = RunState.start(deepcopy(model), describe(model), data)
    state.plan = Plan.of(state.model, state.arch)
    state.report.start(state.model, state.arch)
    comparison = Comparison(state)

    for step in StructPruner(data.config).steps(state.arch, state.model, widths):
        step.apply(state)

    comparison.finish()
    state.report.finish(state.model, state.arch, state.original_arch, state.plan)
    return state


def mixture_of(moments, shares, weight) -> Moments:
    """Return the moments of a mixture of domains at a consumer. The moments of the domains are not changed."""
    moments_by_domain = ([deepcopy(domain_moments)] for domain_moments in moments)
    (mixture,) = mixed(moments_by_domain, shares, [weight])
    return mixture


def mix(moments, weights) -> Moments:
    """Return the weighted average of several moments, as the mixture of domains with the same output energy."""
    moments = [replace(domain_moments, energy=torch.ones(())) for domain_moments in moments]
    weight = torch.zeros(1, len(moments[0].mean))
    mixture = mixture_of(moments, weights, weight)
    return replace(mixture, energy=None)


def config_of(model):
    """Return the config of a model as `save_pretrained` would write it."""
    saved_config = deepcopy(model.config)
    saved_config.architectures = [type(model).__name__]
    return saved_config


@torch.no_grad()
def cached_bytes(model, tokens: int) -> int:
    """Return the bytes of the KV cache after a number of tokens.

    The states of linear attention do not count: they do not grow with the text.
    """
    is_encoder_decoder = model.config.is_encoder_decoder
    if not describe(model).causal and not is_encoder_decoder:
        return 0

    ids = token_ids(1, tokens)
    inputs = {"input_ids": ids}
    if is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    result = model(**inputs, use_cache=True)
    cache = next(value for value in result.values() if isinstance(value, Cache))
    cache = getattr(cache, "self_attention_cache", cache)

    num_bytes = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            num_bytes += layer.keys.nbytes + layer.values.nbytes
    return num_bytes


def assert_as_said(outcome, model, small, cache_known=True) -> None:
    """Check the widths and sizes that a dry run predicts against the original and the pruned model."""
    for actual, when in ((model, "before"), (small, "after")):
        arch = describe(actual)
        for space in outcome.spaces:
            widths = {part.layer: part.width for part in arch.of(space.name)}
            predicted = getattr(space, when)
            if not isinstance(predicted, dict):
                predicted = dict.fromkeys(widths, predicted)
            assert predicted == widths

        assert getattr(outcome.parameters, when) == actual.num_parameters()
        assert getattr(outcome.layer_parameters, when) == sum(arch.layer_params)
        assert getattr(outcome.memory, when) == model_bytes(actual)
        if cache_known:
            bytes_per_token = cached_bytes(actual, 1)
            assert cached_bytes(actual, 3) == 3 * bytes_per_token
            assert getattr(outcome.cache_per_token, when) == bytes_per_token
        else:
            assert outcome.cache_per_token is None

    assert outcome.parameters.after < outcome.parameters.before


def remembered(model: nn.Module) -> dict[tuple[str, str], int]:
    """Return the integer attributes of all modules of a model."""
    numbers = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if type(value) is int:
                numbers[name, key] = value
    return numbers


def assert_remembers_its_own_config(model) -> None:
    """Check that the modules of a model hold the same numbers as the modules of a model from its config."""
    assert remembered(model) == remembered(skeleton(model, model.config))


def modes(model: nn.Module) -> dict[str, bool]:
    """Return whether each module of a model is in training mode."""
    return {name: module.training for name, module in model.named_modules()}


def count_hooks(model: nn.Module) -> int:
    total = 0
    for module in model.modules():
        total += len(module._forward_hooks) + len(module._forward_pre_hooks)
    return total


def batches():
    return batches_of(load_domains(config(), tokenizer()), 3)


def kept(space) -> int:
    """Return the width of a space in a random plan: the width of its kind if it is narrower, else half."""
    width = KEEP[space.kind]
    if width < space.width:
        return width
    return space.width // 2


def random_plan(arch, names) -> Plan:
    """Return a plan that keeps random units of the spaces of some kinds."""
    generator = torch.Generator().manual_seed(3)
    keep = {}
    for space in arch.spaces:
        if space.kind in names:
            width = kept(space) * space.scale
            units = torch.randperm(space.size, generator=generator)[:width].sort().values
            keep[space.layer, space.name] = tuple(units.tolist())
    return Plan(arch.model_type, keep)


def shrunk(model, arch, plan):
    """Return a copy of a model pruned by a plan of `random_plan`, without a refit."""
    widths = {name: kept(arch.of(name)[0]) for name in plan.widths()}
    return without_refit(model, plan, widths)


def without_refit(model, plan, widths=None):
    """Return a copy of a model pruned by a plan, with the remaining weights unchanged."""
    small = deepcopy(model)
    arch = describe(model)
    smaller = shrunk_skeleton(small, arch, widths or plan.widths())
    for layer in range(arch.num_layers):
        shrink_layer_(small, arch, layer, plan.keep, smaller)
    adopt_config_(small, smaller)
    return small


def aligned_divergence(alignment, logits, original, rows, nodes) -> torch.Tensor:
    """Return the divergence of each original token by its parts in fewer tokens, in chunks of 64 positions.

    `rows` and `nodes` are the fields of `AlignedToken` at each position of the logits.
    """
    all_rows, chunks = alignment.chunks(rows, nodes, 64, logits.device)
    parts = []
    for values, chunk in zip(logits.split(64), chunks, strict=True):
        parts.append(divergence(values, original[chunk.original], align=partial(alignment.next_part, chunk=chunk)))
    return logits.new_zeros(len(original)).index_add(0, all_rows, torch.cat(parts))


def first_units(model, ffn, groups=()):
    """Return a copy of a model with the first `ffn[i]` FFN channels and `groups[i]` KV groups of layer i."""
    keep = {}
    for layer, width in enumerate(ffn):
        keep[layer, "mlp"] = tuple(range(width))
    for layer, count in enumerate(groups):
        keep[layer, "attention"] = tuple(range(count))
    return without_refit(model, Plan(model.config.model_type, keep)).eval()


def masked(model, arch, plan):
    """Return a copy of a model in which consumers and routers ignore the units that a plan removes."""
    model = deepcopy(model)
    for space in arch.spaces:
        units = plan.keep.get((space.layer, space.name))
        if units is None:
            continue

        if not space.inside:
            silence(model, space, units)
        for axis in space.consumers:
            weight, bias = read_consumer(model, axis)
            columns = units_to_columns(units, axis, weight.device)
            write_consumer_(model, axis, columns, weight[:, columns], bias)
    return model


def silence(model, space, keep):
    """Set a router's logits of the removed experts to minus infinity."""
    router = model.get_submodule(space.producers[0].module)
    removed = [expert for expert in range(space.size) if expert not in keep]
    forward = router.forward
    linear = torch.nn.functional.linear

    def silent_linear(*args):
        logits = linear(*args)
        logits[..., removed] = float("-inf")
        return logits

    def silent_forward(*args):
        with patch("torch.nn.functional.linear", silent_linear):
            return forward(*args)

    router.forward = silent_forward
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[removed] = float("-inf")


def free_spaces(arch):
    """Return the kinds of space that several layers have, and whose width may differ between layers."""
    if arch.uniform:
        return []

    names = []
    for name in arch.names:
        spaces = arch.of(name)
        layers = {space.layer for space in spaces}
        if len(layers) > 1 and not spaces[0].uniform:
            names.append(name)
    return names


def recovery_config(**fields) -> RecoveryConfig:
    """Return the config of a short training on two domains of random words, with other words for validation.

    A training argument of None removes the default.
    """
    validation = Path(OTHER_WORDS.name, "other.jsonl")
    if not validation.exists():
        write_texts(validation, documents(20, seed=9))

    training = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True, "bf16": False}
    training.update(fields.get("training", {}))
    training = {name: value for name, value in training.items() if value is not None}

    settings = {"tokens": 480, "seq_length": 24, "lora": {"r": 2}, "validation": str(validation)}
    settings.update(RECOVERY_TEXT)
    settings.update(fields)
    settings["training"] = training
    return RecoveryConfig(**settings)


def failing(function, number, error):
    """Wrap a function so that its n-th call does its work and then raises an error."""
    calls = []

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(result)
        if len(calls) == number:
            raise error
        return result

    return call


class Card(TorchDispatchMode):
    """Record the peak memory of the tensors on the card, inside `with card()`. The tensors have no values."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == CARD:
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self):
        self.sizes = {reference: size for reference, size in self.sizes.items() if not reference.expired()}
        return sum(self.sizes.values())


@contextmanager
def card():
    with FakeTensorMode(allow_non_fake_inputs=True), Card() as memory:
        yield memory


def put_on_card_(model):
    """Move the parameters of a model to the card, without values."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=CARD)))


class Killed(Exception):
    """Stand for the end of the process."""


@contextmanager
def dying(monkeypatch, module, number, after):
    """Raise `Killed` at the n-th access to the disk, before or after it. Yield a function that counts accesses."""
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
        patch.setattr(module, "write_tensors", wrapped(module.write_tensors))
        for name in ("write_text", "replace", "unlink"):
            patch.setattr(Path, name, wrapped(getattr(Path, name)))
        yield lambda: len(calls)


def flip_byte(path: Path, place: int) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def flipped_bytes(path: Path, count: int = 12) -> Iterator[int]:
    """Change one byte of a file, yield, and restore the file, at `count` places from its start to its end."""
    content = path.read_bytes()
    for number in range(count):
        place = number * (len(content) - 2) // (count - 1)  # a record ends with a line break that has no meaning
        flip_byte(path, place)
        yield place
        path.write_bytes(content)


def main_of(script: str):
    """Return the `main` of an example or of a benchmark."""
    return import_module(script).main


def ran(command, **options) -> str:
    """Run a command, fail unless it succeeds, and return its standard output."""
    words = [str(word) for word in command]
    process = subprocess.run(words, capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def path_with_tests() -> str:
    """Return a `PYTHONPATH` from which a script can import the modules of the tests."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    return os.pathsep.join(path for path in paths if path)


def on_one_rank(script: str, folder: Path, *arguments: object) -> str:
    """Run a script in a process of its own, and return its standard output. It may import what the tests share."""
    (folder / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": path_with_tests()}
    return ran([sys.executable, folder / "script.py", *arguments], env=environment)


# A process that ends with a process group may abort in a thread of the group.
LEAVE_GROUP = """
import torch.distributed

if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def on_two_ranks(script: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script in two processes of `torchrun`, fail unless it succeeds, and return the process with its output.

    The script may import the modules of the tests. Each rank writes into its own log file: two ranks that share a
    pipe would mix their lines.
    """
    script_path = folder / "script.py"
    script_path.write_text(script + LEAVE_GROUP)
    logs = folder / "logs"

    environment = dict(os.environ)
    environment["PYTHONPATH"] = path_with_tests()
    environment["HF_HUB_OFFLINE"] = "1"
    environment["OMP_NUM_THREADS"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--redirects", "3", "--log-dir", str(logs), str(script_path)]
    command += [str(argument) for argument in arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

    for file in sorted(logs.rglob("stdout.log")):
        process.stdout += file.read_text()
    for file in sorted(logs.rglob("stderr.log")):
        process.stderr += file.read_text()
    assert process.returncode == 0, process.stderr
    return process


def ask_python(python, script, place, requests, **variables):
    """Run a script once under another Python, and return its answer to each request."""
    answers = place / "answers.json"
    command = [python, Path(__file__).with_name(script), answers]
    ran(command, input=json.dumps(requests), env=os.environ | variables)
    return json.loads(answers.read_text())


def today_is(monkeypatch, date: datetime) -> None:
    """Set the clock that chat templates read."""
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: date))


# Names of the files of a result, and random names. All random names end in x, so that none is the name of a folder.
OF_RESULTS = st.sampled_from(["config", "model", "README", "report", "evaluation", "vocab"])
STEMS = st.one_of(OF_RESULTS, st.from_regex("[a-z_.]{1,9}x", fullmatch=True))
SUFFIXES = ".json .safetensors .jinja .model .py .gguf .html .txt .md .bin .gitattributes .index.json".split()
SUFFIXES.append("")
FOLDERS = ["", "1_Pooling/", ".cache/hub/", "__pycache__/", "additional_chat_templates/", "my notes/"]


def user_files():
    """Return a strategy of up to three files of a user in the folder of a result: contents by path."""
    parts = st.tuples(st.sampled_from(FOLDERS), STEMS, st.sampled_from(SUFFIXES))
    paths = parts.map("".join)
    return st.dictionaries(paths, st.binary(max_size=3), max_size=3)


def put_into(folder, files) -> None:
    """Write files of bytes or text by their paths, and make their folders."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_bytes(content.encode())


def contents(folder) -> dict[str, bytes]:
    """Return the contents of all files in a folder, by their paths."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files
