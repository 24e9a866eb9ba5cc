"""What every experiment shares: labs, tokens and pictures that are made once, pages of results, user errors."""

import math

import pytest
from PIL import Image
from scipy.stats import sem

from evaluation.statistics import Proportion
from evaluation.tables import Table
from experiments import common, small
from prompt_datasets import target_class
from utils import UserError


def open_lab(settings, *flags):
    return common.open_lab(common.build_parser("", "7").parse_args(["--config", settings, *flags]))


def test_tokens_are_learned_once(lab, capsys):
    (target, folder), = common.learn_tokens(lab, "token").items()
    assert target.number == 7 and common.load_vectors(folder).shape == (1, lab.get_generator().token_width)
    assert [line["update"] for line in common.read_updates(folder)] == [0, 1] and common.read_seconds(folder) >= 0
    written = folder.token_file.stat().st_mtime_ns
    capsys.readouterr()
    assert common.learn_tokens(lab, "token", lab.targets)[target].token_file.stat().st_mtime_ns == written
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="trained with lr 0.005, now 0.1.*another --work"):
        common.learn_tokens(lab, "token", lr=0.1)


def test_classes_that_another_process_holds_are_one_line(lab):
    folder = common.RunFolder(lab.config.output_path, lab.config.classifier, lab.targets[0], "token")
    assert folder.try_lock()
    with pytest.raises(UserError, match=r"other processes are training class 7 \(jaguar, cat\)"):
        common.learn_tokens(lab, "token")


def test_results_are_cached_by_their_settings(tmp_path, lab):
    calls = []

    def make():
        calls.append(1)
        return {"a": [1, 2]}

    for settings in (common.list_settings(lab, k=(1, 2)), common.list_settings(lab, k=[1, 2]),
                     common.list_settings(lab, k=[1, 3])):
        assert common.cached_result(tmp_path / "cached.json", settings, make) == {"a": [1, 2]}
    assert len(calls) == 2


def test_pictures_and_real_pictures_are_judged(lab):
    drawn = {target: common.draw_class(lab, target, "without", None, 2) for target in lab.targets}
    real = common.load_real_images(lab, 3)
    assert [len(files) for files in (*drawn.values(), *real.values())] == [2, 3]
    assert common.measure_accuracy(lab, drawn).count == 2 and common.measure_accuracy(lab, real).value == 1
    assert common.judge_name(lab) == "the evaluator 'miniature_evaluator'"


def test_real_pictures_must_be_enough(write_settings, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    (tmp_path / "real/7").mkdir(parents=True)
    (tmp_path / "0.png").rename(tmp_path / "real/7/0.png")
    lab = open_lab(write_settings(real_images=str(tmp_path / "real")), "--class_index", "7")
    with pytest.raises(UserError, match=r"2 real pictures per class are needed, and there are of class 7 \(.*\) 1"):
        common.load_real_images(lab, 2)


def test_a_result_is_a_page_a_file_and_a_line(settings, tmp_path, capsys):
    lab = open_lab(settings, "--class_index", "jaguar, cat", "--work", "w", "--out", str(tmp_path))
    half = Proportion(1, 2)
    common.publish_result(lab, "some", "A claim", "We found it.", Table(["a"], [[half]], note="A note."), {"of": half})
    page = (tmp_path / "some.md").read_text()
    assert page == ("# A claim\n\nWe found it.\n\n| a |\n| --- |\n| 0.50 [0.09, 0.91] |\n\nA note.\n\n"
                    f"`python -m experiments.some --config {settings} --class_index 'jaguar, cat'`\n")
    assert common.read_json(tmp_path / "some.json")["of"]["count"] == 2
    assert "| A claim | `python -m experiments.some" in (tmp_path / "README.md").read_text()
    assert "We found it." in capsys.readouterr().out


def test_figures_have_a_legend_where_there_is_something_to_tell_apart(tmp_path):
    sizes = []
    for label in (None, "a line"):
        figure, axes = common.new_axes(4, 2, columns=2)
        axes[0].plot([1, 2], label=label)
        common.save_figure(figure, tmp_path / "figure.png")
        sizes.append(figure.axes[0].get_legend() is not None)
    assert sizes == [False, True] and Image.open(tmp_path / "figure.png").width > 300


def test_user_errors_are_one_line(capsys):
    def fail_at_once():
        raise UserError("this cannot work")

    with pytest.raises(SystemExit, match="2"):
        common.run_script(fail_at_once)
    assert capsys.readouterr().err == "error: this cannot work\n"


@pytest.mark.parametrize("flags, message", [
    (["--class_index", "17"], "the classifier's classes are 1 to 16"), ([], "which class")])
def test_wrong_or_missing_classes_are_one_line(settings, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        open_lab(settings, "--work", str(tmp_path), *flags)


def test_judging_seeds_were_never_trained_on(run_experiment, settings):
    with pytest.raises(UserError, match="--images 1001 would judge seeds that training uses, from 1000 on"):
        run_experiment("transfer", settings, "--images", "1001")


def test_pictures_of_any_size_become_squares(tmp_path):
    for name, size in (("a", (100, 60)), ("b", (40, 80))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{name}.png")
    images, numbers = small.load_sets({target_class(3, "a", "a"): [tmp_path / "a.png"],
                                       target_class(5, "b", "b"): [tmp_path / "b.png"]})
    assert images.shape == (2, 3, 64, 64) and numbers.tolist() == [3, 5] and images[:, 0].min() == 1


def test_standard_errors():
    values = [0.5, 0.75, 1.0, 0.25]
    assert common.standard_error(values) == pytest.approx(sem(values)) and math.isnan(common.standard_error([0.5]))
    assert (common.mean_with_error(values), common.mean_with_error([0.5])) == ("0.62 (0.16)", "0.50")
