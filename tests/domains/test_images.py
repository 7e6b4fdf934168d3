"""Images as calibration samples, by the command line and from Python."""

import json

import numpy as np
import pytest
import torch
from helpers import error_line
from models import build, config, tokenizer
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from optimum_structprune import DomainConfig, StructPruneError, StructPruner
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.images import image_domains


RANDOM = np.random.default_rng(0)
PICTURES = [Image.fromarray(RANDOM.integers(0, 255, (12, 10, 3), dtype=np.uint8)) for _ in range(20)]


def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8})


def asked(*sources, **fields):
    return config(domains=[DomainConfig(f"d{n}", source) for n, source in enumerate(sources)], **fields)


@pytest.fixture
def desk(tmp_path):
    """A folder with a dense `vit` and `photos` in folders, in colour, grey and with a palette; one is hidden."""
    build("vit").save_pretrained(tmp_path / "vit")
    processor().save_pretrained(tmp_path / "vit")
    (tmp_path / "photos" / ".cache").mkdir(parents=True)
    for number, picture in enumerate(PICTURES):
        picture.convert(("RGB", "L", "P")[number % 3]).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / ".cache" / "cut.png").write_bytes(b"no image")
    return tmp_path


def test_a_model_of_images_on_the_command_line(desk, capsys):
    command = ["prune", str(desk / "vit"), str(desk / "out"), "--width", "mlp=16", "--device", "cpu"]
    named = [*command, "--domain", f"pets={desk / 'photos'}"]
    for wrong, text in ((command, "builtin:prose, and this model reads images"), (named, "num_samples=18 would do")):
        assert main(wrong) == 2 and text in error_line(capsys)
    assert main([*named, "--num-samples", "12"]) == 0
    assert "output error pets" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(desk / "out")
    pixels = AutoImageProcessor.from_pretrained(desk / "out")(PICTURES[0], return_tensors="pt")
    assert model.config.intermediate_size == 16 and torch.isfinite(model(**pixels).logits).all()
    entry = json.loads((desk / "out" / "calibration_manifest.json").read_text())["domains"][0]
    assert (entry["calibration_tokens"], entry["heldout_tokens"]) == (12, 2)
    assert "Perplexity" not in (desk / "out" / "README.md").read_text()
    (desk / "photos" / "cut.png").write_bytes(b"no image")
    assert main([*named, "--num-samples", "12", "--overwrite"]) == 2 and "cut.png cannot be read" in error_line(capsys)
    assert main(["evaluate", str(desk / "out"), "--domain", "a=builtin:prose"]) == 2
    assert "does not predict the next token" in error_line(capsys)
    (desk / "vit" / "preprocessor_config.json").unlink()
    assert main([*named, "--overwrite"]) == 2 and "its image processor cannot be loaded" in error_line(capsys)


def test_each_image_has_one_use():
    twice, rows = PICTURES[:12] * 2, [{"label": 1, "image": picture} for picture in PICTURES]
    domains = image_domains(asked(twice, rows, num_samples=8), processor())
    used, held = ([name for of in domains for name in getattr(of, f"{use}documents")] for use in ("", "heldout_"))
    assert len(used) == 8 and len(held) == 4 and not {*used} & {*held}
    full = image_domains(asked(PICTURES[:14], PICTURES[13::-1], num_samples=24), processor())
    assert [len(domain.samples) for domain in full] == [12, 12]  # each is found, in whichever order they come
    again = image_domains(asked(twice, rows, num_samples=8), processor())
    assert all(torch.equal(one.samples, two.samples) for one, two in zip(domains, again, strict=True))
    with pytest.raises(StructPruneError, match="has 12 images that differ"):
        image_domains(asked(twice, num_samples=16), processor())


def test_what_is_no_image_or_no_reader_of_them():
    for source, text in (([{"text": "w3"}], "no image and has none, got the columns text"), (["w3"] * 9, "got str")):
        with pytest.raises(StructPruneError, match=text):
            image_domains(asked(source), processor())
    with pytest.raises(StructPruneError, match="takes an image processor"):
        image_domains(asked(PICTURES), None)
    with pytest.raises(StructPruneError, match="shapes"):
        image_domains(asked([PICTURES[0], PICTURES[1].rotate(90, expand=True)]), ViTImageProcessor(do_resize=False))
    for model, reader, text in (("vit", tokenizer(), "reads images"), ("llama-tied", processor(), "reads text")):
        with pytest.raises(StructPruneError, match=text):
            StructPruner(config()).prune_model(build(model), reader)
    for dtype in (torch.bfloat16, torch.float16):
        pruned = StructPruner(asked(PICTURES, widths={"mlp": 16})).prune_model(build("vit").to(dtype), processor())
        assert pruned.config.intermediate_size == 16
