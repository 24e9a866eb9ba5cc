"""Every experiment runs on the miniature, writes its table, figure and list, and goes on where it was killed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from diffusion import encode_prompts, generate_latents
from experiments import ablations, augmentation, gradient_step, inversion, textual_inversion, transfer
from experiments.common import open_lab, parser
from utils import ROOT, UserError

SMALL = {"num_train_epochs": 2, "epoch_size": 4, "test_size": 2, "num_inference_steps": 3}


@pytest.fixture
def settings(tmp_path) -> str:
    """The miniature's settings, cut down to a smoke test."""
    values = yaml.safe_load((ROOT / "configs/miniature.yml").read_text())
    (tmp_path / "small.yml").write_text(yaml.safe_dump({**values, **SMALL}))
    return str(tmp_path / "small.yml")


def run(monkeypatch, name: str, settings: str, tmp_path: Path, *flags: str) -> dict:
    monkeypatch.setattr(sys, "argv", [name, "--config", settings, "--work", str(tmp_path / "work"), "--out",
                                      str(tmp_path / "out"), *flags])
    importlib.import_module(f"experiments.{name}").main()
    result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert Image.open(tmp_path / "out" / result["figure"]).width > 100
    assert result["found"] in (tmp_path / "out" / f"{name}.md").read_text()
    assert f"`python -m experiments.{name}`" in (tmp_path / "out" / "README.md").read_text()
    return result


def test_iterations(monkeypatch, settings, tmp_path):
    result = run(monkeypatch, "iterations", settings, tmp_path, "--class_index", "7,13")
    assert [list(each) for each in result["probabilities"].values()] == [["0", "1"]] * 2
    assert Image.open(tmp_path / "out" / "iterations.gif").n_frames == 2


def test_inversion(monkeypatch, settings, tmp_path, capsys):
    monkeypatch.setattr(inversion, "STEPS", 3)
    monkeypatch.setattr(inversion, "DRAWINGS", 32)
    flags = "--class_index", "2,8"
    result = run(monkeypatch, "inversion", settings, tmp_path, *flags)
    assert len(result["rates"]) == 3 and all(0 <= each["scene"]["value"] <= 1 for each in result["rates"].values())
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.png")}
    capsys.readouterr()
    assert run(monkeypatch, "inversion", settings, tmp_path, *flags) == result
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.png")}
    assert "update" not in capsys.readouterr().err  # nothing was trained again


def test_inversion_of_other_worlds_compares_labels(monkeypatch, tmp_path):
    values = yaml.safe_load((ROOT / "configs/miniature.yml").read_text())
    (tmp_path / "other.yml").write_text(yaml.safe_dump({**values, **SMALL, "context_judge": None}))
    result = run(monkeypatch, "inversion", str(tmp_path / "other.yml"), tmp_path, "--class_index", "7")
    assert len(result["changes"]["jaguar, cat"]) == 5


def test_the_guides_of_the_inversion_see_what_they_should():
    assert inversion.scenes("biased", 1) == ("in the snow",) and inversion.scenes("biased", 0) == (None,)
    everywhere = inversion.scenes("unbiased", 1)
    assert everywhere == inversion.scenes("unbiased", 0) and set(everywhere) == {None, *inversion.CONTEXTS}


def test_textual_inversion(monkeypatch, settings, tmp_path):
    monkeypatch.setattr(textual_inversion, "STEPS", 2)
    monkeypatch.setattr(textual_inversion, "NEAREST_K", 1)
    result = run(monkeypatch, "textual_inversion", settings, tmp_path, "--class_index", "7,13", "--k", "2", "--images",
                 "4")
    assert set(result["methods"]) == {"no token", "class token", "textual inversion"}
    kept = result["methods"]["no token"]["context_kept"]
    assert set(kept) == set(textual_inversion.CONTEXTS)


def test_textual_inversion_learns_its_pictures(settings, tmp_path, monkeypatch):
    """The denoising loss on the real pictures falls, and only the vectors move."""
    lab = open_lab(parser("", "7").parse_args(["--config", settings, "--work", str(tmp_path)]))
    real = textual_inversion.real_pictures_of(lab, 4)
    components, _ = lab.generator()
    before = [parameter.clone() for parameter in components.text_encoder.parameters()]
    monkeypatch.setattr(textual_inversion, "STEPS", 40)
    lr, mse, losses, vectors = textual_inversion.LR, torch.nn.functional.mse_loss, {0: [], 1: []}, {}
    for learns in (0, 1):  # on the same noise
        monkeypatch.setattr(textual_inversion, "LR", learns * lr)
        monkeypatch.setattr(textual_inversion.F, "mse_loss", lambda *a, to=losses[learns]: to.append(mse(*a)) or to[-1])
        vectors[learns], = textual_inversion.denoising(lab, real, seed=0)
    assert losses[0][0] == losses[1][0] and sum(losses[1][-20:]) < sum(losses[0][-20:])
    assert torch.equal(vectors[0], textual_inversion.first_word(lab, 6)) and (vectors[1] - vectors[0]).norm() > 0.01
    assert all(torch.equal(*pair) for pair in zip(before, components.text_encoder.parameters(), strict=True))


def test_gradient_step(monkeypatch, settings, tmp_path):
    variants = [gradient_step.Variant("steps with a graph", "1", [999, 600], 1),
                gradient_step.Variant("steps with a graph", "2", [999, 600], 2),
                gradient_step.Variant("draws", "2", [999, 600], 1, 2)]
    monkeypatch.setattr(gradient_step, "VARIANTS", variants)
    result = run(monkeypatch, "gradient_step", settings, tmp_path, "--class_index", "7", "--updates", "1", "--images",
                 "1", "--epoch_size", "4")
    one, two, draws = result["results"]
    assert two["kept_mb_an_image"] > 1.1 * one["kept_mb_an_image"]
    assert draws["cosine"] != one["cosine"] and -1 <= one["cosine"] <= 1


def test_one_step_with_a_graph_is_the_methods_gradient(settings, tmp_path):
    """The experiment's own loop at one step gives the latents and the gradient of diffusion.generate_latents."""
    lab = open_lab(parser("", "7").parse_args(["--config", settings, "--work", str(tmp_path)]))
    components, _ = lab.generator()
    seeds, timesteps = [1, 2, 3, 4], [999, 600]
    with torch.no_grad():
        embeds = encode_prompts(components, ["a photo of a crane", "a jaguar", "a jaguar", "a bat"])
    found = []
    for latents_of in (
            lambda each: gradient_step.final_latents(lab, each, seeds, gradient_step.Variant("", "", timesteps)),
            lambda each: generate_latents(components, each, seeds, 64, 64, lab.config.guidance_scale, 3, timesteps)):
        each = embeds.clone().requires_grad_()
        latents = latents_of(each)
        latents.square().sum().backward()
        found.append((latents.detach(), each.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_ablations(monkeypatch, settings, tmp_path):
    monkeypatch.setattr(ablations, "FACTORS", {"fresh_noise": (False,), "guidance_scale": (1.0,)})
    monkeypatch.setattr(ablations, "BRIEFLY", {})
    result = run(monkeypatch, "ablations", settings, tmp_path, "--class_index", "7", "--seeds", "2", "--images", "2")
    assert [(each["factor"], each["value"]) for each in result["results"]] == [
        ("nothing", ""), ("fresh_noise", False), ("guidance_scale", 1.0)]
    configs = [yaml.safe_load(path.read_text()) for path in sorted((tmp_path / "work").rglob("config.yml"))]
    assert {config["seed"] for config in configs} >= {1000, 11000}


def test_augmentation(monkeypatch, settings, tmp_path):
    monkeypatch.setattr(augmentation, "STEPS", 2)
    monkeypatch.setattr(augmentation, "TEST", 2)
    monkeypatch.setattr(augmentation, "BRIEFLY", ())
    monkeypatch.setattr(textual_inversion, "STEPS", 2)
    result = run(monkeypatch, "augmentation", settings, tmp_path, "--class_index", "7,8", "--k", "1", "2", "--trained",
                 "2", "--seeds", "2", "--images", "2")
    assert [len(seeds) for seeds in result["accuracies"].values()] == [2, 2]
    assert augmentation.GUIDED in result["accuracies"]["2"][0]
    assert augmentation.GUIDED not in result["accuracies"]["1"][0]
    guides = sorted(path.name for path in (tmp_path / "work" / "guides").iterdir())
    assert guides == ["k1_seed0", "k1_seed1", "k2_seed0", "k2_seed1"]


def test_transfer(monkeypatch, settings, tmp_path):
    monkeypatch.setattr(transfer, "STEPS", 1)
    monkeypatch.setattr(transfer, "DRAWINGS", 8)
    result = run(monkeypatch, "transfer", settings, tmp_path, "--class_index", "7", "--images", "1")
    assert set(result["shares"]) == {"its own generator", "the other generator"}


def test_wrong_classes_are_one_line(settings, tmp_path):
    with pytest.raises(UserError, match="the classifier's classes are 1 to 16"):
        open_lab(parser("", "1").parse_args(["--config", settings, "--class_index", "17", "--work", str(tmp_path)]))
