"""The commands run on simulated GPUs and have the same results as on the CPU."""

import pytest
from gpu.compare import assert_same
from gpu.simulator import simulated_gpus
from helpers import save_desk
from safetensors.torch import load_file

from optimum_structprune import StructPruneError
from optimum_structprune.commands.cli import main
from optimum_structprune.commands.loading import usable_device


@pytest.fixture(autouse=True)
def kernels_of_the_hub(monkeypatch):
    """Let transformers use kernels of the Hub, which cannot be downloaded. The commands load models without them."""
    monkeypatch.setenv("USE_HUB_KERNELS", "YES")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return save_desk(tmp_path_factory.mktemp("desk"), "llama-untied")


def prune(desk, out, flags):
    """Prune the model of the desk with a command, and return the weights in the order of their names."""
    command = ["prune", str(desk / "model"), str(out), "--domain", f"a={desk / 'a.jsonl'}", "--general-share", "0"]
    command += ["--num-samples", "6", "--seq-length", "24", "--width", "mlp=24"]
    assert main(command + flags) in (0, None)
    return sorted_weights(out)


def sorted_weights(folder):
    weights = load_file(folder / "model.safetensors")
    return dict(sorted(weights.items()))


@pytest.fixture(scope="module")
def weights_on_cpu(desk, tmp_path_factory):
    return prune(desk, tmp_path_factory.mktemp("out") / "cpu", ["--device", "cpu"])


FLAGS = {
    "cuda": (1, ["--device", "cuda"]),
    "second": (2, ["--device", "cuda:1"]),
    "default": (1, []),
    "auto": (2, ["--device", "auto"]),
    "balanced": (2, ["--device", "balanced"]),
    "cpu memory": (1, ["--device", "cuda", "--offload", "cpu"]),
    "disk": (1, ["--device", "cuda", "--offload", "disk"]),
}


def run_on(count, device, command):
    """Run a command on the CPU, or on simulated GPUs if their number is above 0."""
    arguments = command + ["--device", device]
    if count == 0:
        assert main(arguments) in (0, None)
        return

    with simulated_gpus(count) as gpus:
        assert main(arguments) in (0, None)
    assert gpus.products


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_prune_has_the_same_weights_on_every_device(desk, weights_on_cpu, tmp_path, name):
    count, flags = FLAGS[name]
    with simulated_gpus(count) as gpus:
        weights = prune(desk, tmp_path / "out", flags)

    assert gpus.products
    # Offloaded models do not generate text. So the text of the measurement differs, but the weights do not.
    assert_same(weights, weights_on_cpu)


@pytest.mark.slow
def test_recover_has_the_same_shapes_on_every_device(desk, tmp_path):
    prune(desk, tmp_path / "out", ["--device", "cpu"])
    command = ["recover", str(tmp_path / "out"), str(tmp_path / "recovered"), "--teacher", str(desk / "model")]
    command += ["--domain", f"a={desk / 'a.jsonl'}", "--tokens", "480", "--seq-length", "24"]
    command += ["--overwrite", "--quiet"]

    shapes_by_device = []
    for count, device in ((0, "cpu"), (1, "cuda"), (2, "cuda:1"), (2, "auto")):
        run_on(count, device, command)
        weights = sorted_weights(tmp_path / "recovered")
        shapes_by_device.append({name: weight.shape for name, weight in weights.items()})

    for shapes in shapes_by_device[1:]:
        assert shapes == shapes_by_device[0]


@pytest.mark.slow
def test_evaluate_prints_the_same_on_every_device(desk, tmp_path, capsys):
    prune(desk, tmp_path / "out", ["--device", "cpu"])
    command = ["evaluate", str(tmp_path / "out"), "--against", str(desk / "model"), "--seq-length", "24"]
    command += ["--domain", f"a={desk / 'a.jsonl'}"]

    texts = []
    for count, device in ((0, "cpu"), (1, "cuda"), (2, "auto")):
        capsys.readouterr()
        run_on(count, device, command)
        texts.append(capsys.readouterr().out)

    assert texts[0] == texts[1]
    assert texts[0] == texts[2]


def test_mps_is_refused():
    with pytest.raises(StructPruneError, match="MPS does not compute in float64"):
        usable_device("mps")
