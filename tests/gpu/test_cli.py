"""The commands on simulated GPUs."""

import pytest
from gpu.compare import assert_same
from gpu.simulator import simulated_gpus
from helpers import save_desk
from safetensors.torch import load_file

from optimum_structprune import StructPruneError
from optimum_structprune.commands.cli import main
from optimum_structprune.commands.loading import usable_device


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return save_desk(tmp_path_factory.mktemp("desk"), "llama-untied")


def prune(desk, out, *flags):
    text = ["--domain", f"a={desk / 'a.jsonl'}", "--general-share", "0", "--num-samples", "6", "--seq-length", "24"]
    assert main(["prune", str(desk / "model"), str(out), *text, "--width", "mlp=24", *flags]) in (0, None)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def on_cpu(desk, tmp_path_factory):
    return prune(desk, tmp_path_factory.mktemp("out") / "cpu", "--device", "cpu")


FLAGS = {
    "cuda": (1, ["--device", "cuda"]),
    "second": (2, ["--device", "cuda:1"]),
    "default": (1, []),
    "auto": (2, ["--device", "auto"]),
    "balanced": (2, ["--device", "balanced"]),
    "cpu memory": (1, ["--device", "cuda", "--offload", "cpu"]),
    "disk": (1, ["--device", "cuda", "--offload", "disk"]),
}


def run(command, count, device):
    """Run a command on the CPU without simulated GPUs, or on some of them."""
    if count == 0:
        assert main([*command, "--device", device]) in (0, None)
        return
    with simulated_gpus(count) as gpus:
        assert main([*command, "--device", device]) in (0, None)
    assert gpus.products


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_prune(desk, on_cpu, tmp_path, name):
    count, flags = FLAGS[name]
    with simulated_gpus(count) as gpus:
        weights = prune(desk, tmp_path / "out", *flags)
    assert gpus.products
    # Offloaded models write no text, so the text of the measurement differs, and the weights do not.
    assert_same(dict(sorted(weights.items())), dict(sorted(on_cpu.items())))


@pytest.mark.slow
def test_recover(desk, tmp_path):
    prune(desk, tmp_path / "out", "--device", "cpu")
    text = ["--domain", f"a={desk / 'a.jsonl'}", "--tokens", "480", "--seq-length", "24", "--overwrite", "--quiet"]
    command = ["recover", str(tmp_path / "out"), str(tmp_path / "recovered"), "--teacher", str(desk / "model"), *text]
    weights = []
    for count, device in ((0, "cpu"), (1, "cuda"), (2, "cuda:1"), (2, "auto")):
        run(command, count, device)
        weights.append(dict(sorted(load_file(tmp_path / "recovered" / "model.safetensors").items())))
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(other[name].shape == weight.shape for name, weight in weights[0].items())


@pytest.mark.slow
def test_evaluate(desk, tmp_path, capsys):
    prune(desk, tmp_path / "out", "--device", "cpu")
    command = ["evaluate", str(tmp_path / "out"), "--against", str(desk / "model"), "--seq-length", "24"]
    command += ["--domain", f"a={desk / 'a.jsonl'}"]
    texts = []
    for count, device in ((0, "cpu"), (1, "cuda"), (2, "auto")):
        capsys.readouterr()
        run(command, count, device)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_mps_is_refused():
    with pytest.raises(StructPruneError, match="MPS does not compute in float64"):
        usable_device("mps")
