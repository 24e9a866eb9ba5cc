"""What every experiment shares: studies, tokens and pictures that are made once, pages of results,
user errors.
"""

import math
import os
import re
import shutil
from dataclasses import replace

import pytest
from PIL import Image
from scipy.stats import sem

from evaluation.statistics import Comparison, Interval, Proportion, standard_error
from evaluation.tables import Table
from experiments import small_classifiers as small
from experiments import study as studies
from experiments import trainings
from experiments.material import (
    cached_result,
    digest_training,
    draw_sets,
    learn_tokens,
    load_real_images,
    load_vectors,
    measure_accuracy,
    measure_cost,
    stamp_sets,
)
from experiments.plots import plot_curves
from experiments.study import SHOWN, StudyResult, parse_options, publish_result
from experiments.trainings import measure_trainings
from prompt_datasets import target_class
from runs.folders import RunFolder
from system.terminal import run_script
from system.text_files import read_json
from utils import ROOT, UserError


def open_study(settings, *flags):
    return studies.open_study(parse_options("", ["--config", settings, *flags], "7"))


def test_tokens_are_learned_once(study, capsys):
    folders = learn_tokens(study)
    ((target, folder),) = folders.items()
    assert target.number == 7 and load_vectors(folders)[target].shape == (
        1,
        *study.session.generator.token_widths,
    )
    assert measure_cost(folders, "updates") == 2 and measure_cost(folders, "seconds") >= 0
    written = folder.token_file.stat().st_mtime_ns
    capsys.readouterr()
    assert learn_tokens(study, study.targets)[target].token_file.stat().st_mtime_ns == written
    assert capsys.readouterr().out == ""


def test_tokens_of_other_settings_are_other_tokens(study):
    folders = [
        learn_tokens(study, **changes)[study.targets[0]]
        for changes in ({}, {"lr": 0.1}, {"batch_size": 1})
    ]
    assert folders[0].token_file.read_bytes() != folders[1].token_file.read_bytes()
    assert folders[0].token_file == folders[2].token_file  # which changes speed and memory alone


def test_replaced_weights_and_pictures_are_other_trainings(study, tmp_path):
    shutil.copytree(ROOT / "miniature/weights/evaluator", tmp_path / "classifier")
    config, sets = (
        replace(study.config, classifier=str(tmp_path / "classifier")),
        {study.targets[0]: [tmp_path / "small.yml"]},
    )
    before = digest_training(config), stamp_sets(sets)
    assert before == (digest_training(config), stamp_sets(sets))
    os.utime(tmp_path / "classifier/config.json", (1, 1))
    os.utime(tmp_path / "small.yml", (1, 1))
    assert before[0] != digest_training(config) and before[1] != stamp_sets(sets)


def test_classes_that_another_process_holds_are_one_line(study):
    folder = RunFolder(
        study.config.output_path,
        study.config.classifier,
        study.targets[0],
        digest_training(study.config),
    )
    assert folder.try_lock()
    with pytest.raises(UserError, match=r"other processes are training class 7 \(jaguar, cat\)"):
        learn_tokens(study)


def test_results_are_cached_by_their_settings(study):
    calls = []

    def make():
        calls.append(1)
        return {"a": [1, 2]}

    for k in ((1, 2), [1, 2], [1, 3]):
        assert cached_result(study, make, k=k) == {"a": [1, 2]}
    assert len(calls) == 2


def test_pictures_and_real_pictures_are_judged(study):
    drawn = draw_sets(study, dict.fromkeys(study.targets), 2)
    real = load_real_images(study, 3)
    assert [len(files) for files in (*drawn.values(), *real.values())] == [2, 3]
    assert measure_accuracy(study, drawn).count == 2 and measure_accuracy(study, real).value == 1


def test_real_pictures_must_be_enough(write_settings, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    (tmp_path / "real/7").mkdir(parents=True)
    (tmp_path / "0.png").rename(tmp_path / "real/7/0.png")
    study = open_study(write_settings(real_images=str(tmp_path / "real")), "--class_index", "7")
    with pytest.raises(UserError, match=r"2 real pictures .* class 7 \(.*\) 1"):
        load_real_images(study, 2)


def test_a_result_is_a_page_a_file_and_a_line(settings, tmp_path, capsys):
    study = open_study(
        settings, "--class_index", "jaguar, cat", "--work", "w", "--out", str(tmp_path)
    )
    half = Proportion(1, 2)
    difference = Interval(0.25, 0.125, 0.5)
    result = StudyResult(
        "some",
        SHOWN,
        "A claim",
        "We found it.",
        Table(["a"], [[half]]),
        "A note.",
        {"of": half},
        {"new vs. old": Comparison(difference, 0.03125)},
        paper="They say so.",
    )
    publish_result(study, result)
    page = (tmp_path / "some.md").read_text()
    command = f"python -m experiments.some --config {settings} --class_index 'jaguar, cat'"
    for part in (
        "# A claim",
        "We found it.",
        "| a |\n| --- |\n| 0.50 [0.09, 0.91] |",
        "| new vs. old | +0.25 [+0.12, +0.50] | 0.031 |",
        "A note. Judged by the evaluator 'miniature_evaluator'.",
        "![A claim](some.png)",
        f"`{command}`",
    ):
        assert f"{part}\n" in page or f"{part} " in page
    assert read_json(tmp_path / "some.json")["of"]["count"] == 2
    assert (
        (tmp_path / "README.md")
        .read_text()
        .startswith((ROOT / "experiments/protocol.md").read_text())
    )
    assert "| They say so. |" in (tmp_path / "README.md").read_text()
    assert "| [some](some.md) | shown | A claim |" in (tmp_path / "README.md").read_text()
    assert "We found it." in capsys.readouterr().out


@pytest.mark.parametrize("found", [[0.2, 0.4], [0.2], Proportion(1, 2)])
def test_figures_show_means_and_shares_over_numbers_and_names(tmp_path, found):
    for x in ("1", 5, "a name"):
        plot_curves(tmp_path / "figure.png", "x", "y", {"a line": {x: found}})
        assert Image.open(tmp_path / "figure.png").width > 300


def test_user_errors_are_one_line(capsys):
    def fail_at_once():
        raise UserError("this cannot work")

    with pytest.raises(SystemExit, match="2"):
        run_script(fail_at_once)
    assert capsys.readouterr().err == "error: this cannot work\n"


@pytest.mark.parametrize(
    "flags, message",
    [(["--class_index", "17"], "the classifier's classes are 1 to 16"), ([], "which class")],
)
def test_wrong_or_missing_classes_are_one_line(settings, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        open_study(settings, "--work", str(tmp_path), *flags)


def test_judging_seeds_were_never_trained_on(run_experiment):
    with pytest.raises(UserError, match="--images 1001 .* 1000"):
        run_experiment("transfer", "--images", "1001")


def test_one_class_cannot_be_compared_over_classes(run_experiment):
    with pytest.raises(UserError, match="two or more as --class_index"):
        run_experiment("ablations", "--class_index", "7", factors={"fresh_noise": (False,)})


def test_several_trainings_are_judged_by_class(settings, tmp_path):
    """Shares by class are what the judge says of each training's pictures, and costs count every
    image's UNet calls.
    """
    study = open_study(settings, "--class_index", "7,8", "--work", str(tmp_path))
    found = measure_trainings(
        study, [1000, 11000], 3, train_guidance_scale=1.0, train_timesteps=[999, 600]
    )
    assert list(found.right) == [target.title for target in study.targets]
    for i, seed in enumerate((1000, 11000)):
        folders = learn_tokens(
            study, seed=seed, train_guidance_scale=1.0, train_timesteps=[999, 600]
        )
        for target, files in draw_sets(study, load_vectors(folders), 3).items():
            assert found.right[target.title][i] == measure_accuracy(study, {target: files}).value
    assert found.updates == 2 and found.unet_calls == 2 * 4 * 2  # updates, images, steps
    guided = measure_trainings(study, [1000], 1, train_timesteps=[999, 600])
    assert guided.unet_calls == 2 * found.unet_calls


def test_pictures_of_any_size_become_squares(tmp_path):
    for name, size in (("a", (100, 60)), ("b", (40, 80))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{name}.png")
    images, numbers = small.load_sets(
        {
            target_class(3, "a", "a"): [tmp_path / "a.png"],
            target_class(5, "b", "b"): [tmp_path / "b.png"],
        }
    )
    assert images.shape == (2, 3, 64, 64) and numbers.tolist() == [3, 5] and images[:, 0].min() == 1


def test_standard_errors():
    values = [0.5, 0.75, 1.0, 0.25]
    assert standard_error(values) == pytest.approx(sem(values)) and math.isnan(
        standard_error([0.5])
    )


def test_the_recipe_of_the_docs_works(tmp_path):
    page = (ROOT / "docs/architecture.md").read_text()
    (recipe,) = re.findall(r"### An experiment.*?```python\n(.*?)```", page, re.DOTALL)
    names = {**vars(studies), **vars(trainings), "plot_curves": plot_curves}
    argv = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    exec(recipe, {**names, "argv": argv})
    assert list(read_json(tmp_path / "mine.json")["tests"]) == ["fast vs. slow"]
