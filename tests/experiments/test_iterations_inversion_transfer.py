"""The experiments that show a training's pictures, a planted bias, and tokens on another
checkpoint.
"""

import random
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import inversion
from utils import ROOT


def test_iterations(run_experiment, tmp_path):
    result = run_experiment("iterations")
    assert [list(by_update) for by_update in result["probabilities"].values()] == [["0", "1"]] * 2
    assert Image.open(tmp_path / "out" / "iterations.gif").n_frames == 2


def test_inversion(run_experiment, tmp_path, capsys):
    result = run_experiment("inversion")
    # of two nouns
    assert {
        bias: list(map(len, conditions.values())) for bias, conditions in result["shares"].items()
    } == {
        "kind": [2] * 3,
        "frame": [2] * 3,
    }
    assert set(result["tests"]) == {"kind", "frame"} and "lobster" in result["paper"]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.png")}
    capsys.readouterr()
    assert run_experiment("inversion") == result
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.png")}
    assert "update" not in capsys.readouterr().err  # nothing was trained again


def test_inversion_of_other_worlds_compares_labels(run_experiment, write_settings):
    result = run_experiment(
        "inversion", "--config", write_settings(real_images=None), "--class_index", "7"
    )
    assert len(result["changes"]["7 (jaguar, cat)"]) == 5


def test_biased_classifiers_see_what_they_should():
    jaguar, finch = (inversion.NOUNS.index(noun) for noun in ("jaguar", "finch"))
    assert inversion.list_sights(jaguar, "both kinds") == [(6, None), (7, None)]
    assert inversion.list_sights(jaguar, "second kinds") == [(7, None)]
    assert inversion.list_sights(finch, "first kinds") == [(14, None)]
    framed = [
        [inversion.list_sights(noun, bias)[0][1] is not None for noun in range(8)]
        for bias in inversion.BIASES[2:]
    ]
    assert framed == [[True, False] * 4, [False, True] * 4]


def test_what_a_biased_classifier_saw_is_counted(study):
    """Of drawings of a jaguar's second kind in a frame."""
    noun = inversion.select_classes("jaguar", list(inversion.NOUNS), list(inversion.NOUNS))[0]
    files = [study.work / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        inversion.draw(7, random.Random(i), inversion.SCENE).save(file)
    shares = {bias: inversion.share_planted(study, noun, bias, files) for bias in inversion.BIASES}
    # jaguar is the fourth noun, and nothing frames it for even ones
    assert list(shares.values()) == [
        0,
        1,
        0,
        1,
    ]


def test_transfer(run_experiment, tmp_path):
    result = run_experiment("transfer")
    assert set(result["right"]) == {"its own generator", "the other generator"}
    (other,) = (tmp_path / "work").glob("generator_*")
    for part, same in (("unet", False), ("vae", True), ("text_encoder", True)):
        weights = [
            load_file(next(Path(folder, part).glob("*.safetensors")))
            for folder in (other, ROOT / "miniature/weights/generator")
        ]
        assert (
            all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items()) == same
        )
