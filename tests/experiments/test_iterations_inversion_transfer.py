"""The experiments that show a training's pictures, a planted bias, and tokens on another checkpoint."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import inversion
from utils import ROOT, UserError


def test_iterations(run_experiment, settings, tmp_path):
    result = run_experiment("iterations", settings, "--class_index", "7,13")
    assert [list(by_update) for by_update in result["probabilities"].values()] == [["0", "1"]] * 2
    assert Image.open(tmp_path / "out" / "iterations.gif").n_frames == 2


def test_inversion(run_experiment, settings, tmp_path, capsys):
    flags = "--class_index", "2,7", "--images", "2", "--drawings", "32", "--guide_steps", "3"
    result = run_experiment("inversion", settings, *flags)
    assert list(result["rates"]) == ["no token", "token of the biased guide", "token of the unbiased guide"]
    assert list(result["rates"]["no token"]["classes"]) == ["2 (crane, machine)", "7 (jaguar, cat)"]
    assert result["rates"]["no token"]["planted"]["count"] == 4
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.png")}
    capsys.readouterr()
    assert run_experiment("inversion", settings, *flags) == result
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.png")}
    assert "update" not in capsys.readouterr().err  # nothing was trained again


def test_inversion_of_other_worlds_compares_labels(run_experiment, write_settings):
    result = run_experiment("inversion", write_settings(real_images=None), "--class_index", "7")
    assert len(result["changes"]["7 (jaguar, cat)"]) == 5


def test_classes_without_a_planted_bias_are_one_line(run_experiment, settings):
    with pytest.raises(UserError, match=r"no bias is planted in class 8 \(jaguar, car\); it is in crane, machine"):
        run_experiment("inversion", settings, "--class_index", "2,8")


def test_the_guides_of_the_inversion_see_what_they_should():
    assert inversion.list_kinds("jaguar", "biased") == [6] and inversion.list_kinds("jaguar", "unbiased") == [6, 7]
    assert inversion.list_kinds("finch", "biased") == inversion.list_kinds("finch", "unbiased") == [14, 15]


def test_transfer(run_experiment, settings, tmp_path):
    result = run_experiment("transfer", settings, "--images", "1", "--drawings", "8", "--steps", "1")
    assert set(result["shares"]) == {"its own generator", "the other generator"}
    other, = (tmp_path / "work").glob("generator_*")
    for part, same in (("unet", False), ("vae", True), ("text_encoder", True)):
        weights = [load_file(next(Path(folder, part).glob("*.safetensors"))) for folder in
                   (other, ROOT / "miniature/weights/generator")]
        assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items()) == same
