"""Every experiment runs on the miniature, writes its table, figure and list, and goes on where it was killed."""

import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusion import encode_prompts, generate_latents, trajectory
from experiments import ablations, augmentation, gradient_step, inversion, small, textual_inversion, transfer
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
    flags = flags if "--class_index" in flags else ("--class_index", "7", *flags)
    monkeypatch.setattr(sys, "argv", [name, "--config", settings, "--work", str(tmp_path / "work"), "--out",
                                      str(tmp_path / "out"), *flags])
    importlib.import_module(f"experiments.{name}").main()
    result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert Image.open(tmp_path / "out" / result["figure"]).width > 100
    assert result["found"] in (tmp_path / "out" / f"{name}.md").read_text()
    command = f"python -m experiments.{name} --config {settings} {' '.join(flags)}"
    assert result["command"] == command and command in (tmp_path / "out" / "README.md").read_text()
    assert result["config"]["model"] == "miniature/weights/generator"
    return result


def test_iterations(monkeypatch, settings, tmp_path):
    result = run(monkeypatch, "iterations", settings, tmp_path, "--class_index", "7,13")
    assert [list(each) for each in result["probabilities"].values()] == [["0", "1"]] * 2
    assert Image.open(tmp_path / "out" / "iterations.gif").n_frames == 2


def test_inversion(monkeypatch, settings, tmp_path, capsys):
    monkeypatch.setattr(inversion, "STEPS", 3)
    monkeypatch.setattr(inversion, "DRAWINGS", 32)
    flags = "--class_index", "2,7", "--images", "2"
    result = run(monkeypatch, "inversion", settings, tmp_path, *flags)
    assert list(result["rates"]) == ["no token", "token of the biased guide", "token of the unbiased guide"]
    assert list(result["rates"]["no token"]["classes"]) == ["2 (crane, machine)", "7 (jaguar, cat)"]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.png")}
    capsys.readouterr()
    assert run(monkeypatch, "inversion", settings, tmp_path, *flags) == result
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.png")}
    assert "update" not in capsys.readouterr().err  # nothing was trained again


def test_inversion_of_other_worlds_compares_labels(monkeypatch, tmp_path):
    values = yaml.safe_load((ROOT / "configs/miniature.yml").read_text())
    (tmp_path / "other.yml").write_text(yaml.safe_dump({**values, **SMALL, "real_images": None}))
    result = run(monkeypatch, "inversion", str(tmp_path / "other.yml"), tmp_path, "--class_index", "7")
    assert len(result["changes"]["7 (jaguar, cat)"]) == 5


def test_classes_without_a_planted_bias_are_one_line(monkeypatch, settings, tmp_path):
    with pytest.raises(UserError, match=r"no bias is planted in class 8 \(jaguar, car\); it is in 2"):
        run(monkeypatch, "inversion", settings, tmp_path, "--class_index", "2,8")


def test_the_guides_of_the_inversion_see_what_they_should():
    jaguar, finch = inversion.noun_of(6), inversion.noun_of(14)
    assert inversion.noun_of(7) == jaguar and inversion.kinds("biased", jaguar) == [6]
    assert inversion.kinds("unbiased", jaguar) == [6, 7]
    assert inversion.kinds("biased", finch) == inversion.kinds("unbiased", finch) == [14, 15]


def test_textual_inversion(monkeypatch, settings, tmp_path):
    monkeypatch.setattr(textual_inversion, "NEAREST_K", 1)
    monkeypatch.setattr(textual_inversion, "TRUTH", 6)
    flags = "--class_index", "7,13", "--k", "2", "--images", "4", "--steps"
    result = run(monkeypatch, "textual_inversion", settings, tmp_path, *flags, "2")
    assert set(result["methods"]) == {"no token", "class token", "textual inversion"}
    learned = tmp_path / "work/textual_inversion/2.json"
    before = json.loads(learned.read_text())["value"]
    assert before["seconds"] > 0 and result["methods"]["class token"]["seconds_a_class"] > 0
    again = run(monkeypatch, "textual_inversion", settings, tmp_path, *flags, "2")
    assert json.loads(learned.read_text())["value"] == before and again["methods"] == result["methods"]
    run(monkeypatch, "textual_inversion", settings, tmp_path, *flags, "1")
    assert json.loads(learned.read_text())["value"] != before  # other settings, another result
    kept = result["methods"]["no token"]["context_kept"]
    assert set(kept) == set(textual_inversion.CONTEXTS)


def test_textual_inversion_learns_its_pictures(settings, tmp_path, monkeypatch):
    """The denoising loss on the real pictures falls, and only the vectors move."""
    lab = open_lab(parser("", "7").parse_args(["--config", settings, "--class_index", "7", "--work", str(tmp_path)]))
    real = textual_inversion.real_pictures_of(lab, 4)
    components, _ = lab.generator()
    before = [parameter.clone() for parameter in components.text_encoder.parameters()]
    lr, mse, losses, vectors = textual_inversion.LR, torch.nn.functional.mse_loss, {0: [], 1: []}, {}
    for learns in (0, 1):  # on the same noise
        monkeypatch.setattr(textual_inversion, "LR", learns * lr)
        monkeypatch.setattr(textual_inversion.F, "mse_loss", lambda *a, to=losses[learns]: to.append(mse(*a)) or to[-1])
        vectors[learns], = textual_inversion.denoising(lab, real, steps=40, seed=0)
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
    assert two["kept_mb_a_trajectory"] > 1.1 * one["kept_mb_a_trajectory"]
    assert 1.5 < draws["kept_mb_a_trajectory"] / one["kept_mb_a_trajectory"] < 2.5
    assert draws["spread"] != one["spread"]


def variant(right: float, seconds: float, graph_steps: int = 1) -> dict:
    return {"right": {"value": right, "low": right - 0.1, "high": right + 0.1}, "seconds_an_update": seconds,
            "graph_steps": graph_steps, "draws": 1}


def test_recommended_is_the_quickest_of_those_as_good_that_run_py_knows():
    best, good, quick, other = variant(0.9, 3), variant(0.85, 2), variant(0.7, 1), variant(0.95, 1, graph_steps=5)
    assert gradient_step.recommended([quick, good, best]) == (best, good)
    assert gradient_step.recommended([quick, good, best, other]) == (other, good)
    assert gradient_step.recommended([quick, other]) == (other, quick)


def test_other_draws_start_from_their_own_trajectory(settings, tmp_path):
    """The first of a trajectory's draws is what no draws at all give; the others are at the same noise level."""
    lab = open_lab(parser("", "7").parse_args(["--config", settings, "--class_index", "7", "--work", str(tmp_path)]))
    components, _ = lab.generator()
    scheduler = trajectory(components, 3, [999, 600])
    z_0, latents = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    again = gradient_step.renoised(lab, scheduler, z_0, latents, scheduler.timesteps[1], [1000, 1001], 3)
    assert torch.equal(again[::3], latents) and len(again) == 6
    others = again[[1, 2, 4, 5]]
    assert len({round(each.sum().item(), 3) for each in others}) == 4
    assert (others.std() / scheduler.sigmas[1] - 1).abs() < 0.05


def test_one_step_with_a_graph_is_the_methods_gradient(settings, tmp_path):
    """The experiment's own loop at one step gives the latents and the gradient of diffusion.generate_latents."""
    lab = open_lab(parser("", "7").parse_args(["--config", settings, "--class_index", "7", "--work", str(tmp_path)]))
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
    monkeypatch.setattr(augmentation, "BRIEFLY", {"epoch_size": 4, "num_train_epochs": 1})
    monkeypatch.setattr(augmentation, "learn", functools.partial(textual_inversion.learn, steps=2))
    result = run(monkeypatch, "augmentation", settings, tmp_path, "--class_index", "7,8", "--k", "1", "2", "--trained",
                 "2", "--seeds", "2", "--images", "2", "--test", "2")
    assert [len(seeds) for seeds in result["accuracies"].values()] == [2, 2]
    assert augmentation.GUIDED in result["accuracies"]["2"][0]
    assert augmentation.GUIDED not in result["accuracies"]["1"][0]
    guides = sorted(path.name.split("_")[0] for path in (tmp_path / "work" / "guides").iterdir())
    assert guides == ["k1", "k1", "k2", "k2"]


def test_pictures_of_any_size_become_squares(tmp_path):
    for name, size in (("a", (100, 60)), ("b", (40, 80))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{name}.png")
    images, numbers = small.as_tensors({3: [tmp_path / "a.png"], 5: [tmp_path / "b.png"]})
    assert images.shape == (2, 3, 64, 64) and numbers.tolist() == [3, 5] and images[:, 0].min() == 1


@pytest.mark.parametrize("accuracies, clear", [([0.9, 0.8], True), ([0.9, 0.5], False), ([0.3, 0.2], True),
                                               ([0.55, 0.5], False)])
def test_clear_is_what_every_training_says(accuracies, clear):
    assert ablations.is_clear({"accuracies": accuracies}, {"accuracies": [0.5, 0.5]}) == clear


def test_differences_are_paired():
    results = {2: [{"a": 0.9, "b": 0.5}, {"a": 0.7, "b": 0.4}]}
    difference, error = augmentation.compared(results, 2, "a", "b")
    assert difference == pytest.approx(0.35) and error == pytest.approx(0.05)


def test_transfer(monkeypatch, settings, tmp_path):
    monkeypatch.setattr(transfer, "STEPS", 1)
    monkeypatch.setattr(transfer, "DRAWINGS", 8)
    result = run(monkeypatch, "transfer", settings, tmp_path, "--class_index", "7", "--images", "1")
    assert set(result["shares"]) == {"its own generator", "the other generator"} and result["levels_apart"] > 0
    other, = (tmp_path / "work").glob("generator_*")
    for part, same in (("unet", False), ("vae", True), ("text_encoder", True)):
        weights = [load_file(next(Path(folder, part).glob("*.safetensors"))) for folder in
                   (other, ROOT / "miniature/weights/generator")]
        assert all(torch.equal(each, weights[1][key]) for key, each in weights[0].items()) == same


def test_wrong_classes_are_one_line(settings, tmp_path):
    with pytest.raises(UserError, match="the classifier's classes are 1 to 16"):
        open_lab(parser("", "1").parse_args(["--config", settings, "--class_index", "17", "--work", str(tmp_path)]))


def test_judging_seeds_were_never_trained_on(monkeypatch, settings, tmp_path):
    with pytest.raises(UserError, match="--images 1001 would judge seeds that training uses, from 1000 on"):
        run(monkeypatch, "transfer", settings, tmp_path, "--images", "1001")


def test_another_config_needs_its_classes(settings, tmp_path):
    with pytest.raises(UserError, match="which class"):
        open_lab(parser("", "7").parse_args(["--config", settings, "--work", str(tmp_path)]))
