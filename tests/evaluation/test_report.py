"""The page over the classes of a run: what it needs, and that it tells of nothing that is no longer
so.
"""

import json
import os
import shutil
from pathlib import Path

from evaluation import report
from run import main
from tests.conftest import error_of, flags


def test_reports_of_other_evaluations(capsys, tiny_config, tmp_path):
    """A token that came alone has a report too; classes that were evaluated differently have none
    together.
    """
    argv = flags(tiny_config, train=True, evaluate=True, num_train_epochs=1)
    assert main([*argv, "--class_index", "2"]) == 0
    assert main([*argv, "--class_index", "3", "--eval_prompts", "{} at night"]) == 0
    (warning,) = (
        line for line in capsys.readouterr().err.splitlines() if "left out of the summary" in line
    )
    assert "0002_crane" in warning and "was evaluated with another eval_prompts" in warning
    (summary,) = (tmp_path / "img").rglob("summary_demo.json")
    assert [found["class_index"] for found in json.loads(summary.read_text())["classes"]] == [3]
    alone = next((tmp_path / "pipeline_token").glob("*/0002*/demo"))
    for name in ("config.yml", "history.jsonl"):
        (alone / name).unlink()
    assert main(flags(tiny_config, class_index=2, evaluate=True)) == 0
    runs = [str(path) for path in sorted((tmp_path / "img").glob("*/*/demo"))]
    assert "<td>crane, machine</td>" in Path(runs[0], "report.html").read_text()
    assert (
        report.main([runs[1], "--out", str(tmp_path / "page.html")]) == 0
        and (tmp_path / "page.html").exists()
    )
    capsys.readouterr()
    assert report.main(runs) == 2 and "with another eval_prompts" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2 and "holds no evaluation" in capsys.readouterr().err


def test_classes_of_two_lists_do_not_stand_in_one_table(capsys, tiny_config, tmp_path):
    """Class 1 of one list of words is not class 1 of another."""
    argv = flags(tiny_config, train=True, evaluate=True, num_train_epochs=1)
    argv += ["--class_index", "2,3"]
    assert main(argv) == 0
    file = next((tmp_path / "img").glob("*/0002*/demo/eval/metrics.json"))
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps({**metrics, "list_of_classes": "another"}))
    runs = [str(path) for path in sorted((tmp_path / "img").glob("*/*/demo"))]
    capsys.readouterr()
    assert report.main(runs) == 2 and "with another list of classes" in capsys.readouterr().err
    del metrics["list_of_classes"]  # of an earlier version
    file.write_text(json.dumps(metrics))
    assert report.main([*runs, "--out", str(tmp_path / "page.html")]) == 0


def test_pictures_behind_a_link_have_all_of_their_page(capsys, tiny_config, tmp_path, monkeypatch):
    """img/ on another disk; the run's folder through a link from elsewhere; a run without its
    tokens says so.
    """
    argv = flags(tiny_config, train=True, evaluate=True, num_train_epochs=1, class_index=3)
    assert main(argv) == 0
    disk = tmp_path / "large/disk"
    disk.parent.mkdir()
    (tmp_path / "img").rename(disk)
    (tmp_path / "img").symlink_to(disk)
    (run,) = (tmp_path / "img").glob("*/*/demo")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "pipeline_token")
    shortcut = tmp_path / "elsewhere/shortcut"
    page = tmp_path / "page.html"

    def read_page(folder: Path) -> str:
        assert report.main([str(folder), "--out", str(page)]) == 0
        return page.read_text()

    for written in (run, run / ".." / "demo"):
        html = read_page(written)
        assert (
            "<h3>Training</h3>" in html and "num_train_epochs" in html and "Not found" not in html
        )
    monkeypatch.chdir(run.parent)  # now the system knows no link
    assert "Not found, and so not shown: curves (" in read_page(Path("demo"))
    (tmp_path / "img").unlink()
    disk.rename(tmp_path / "img")
    shortcut.symlink_to(run)
    assert "<h3>Training</h3>" in read_page(shortcut)
    (tmp_path / "pipeline_token").rename(tmp_path / "away")
    html = read_page(run)
    assert all(
        words in html
        for words in ("Not found, and so not shown: curves (", "training settings (", "the token")
    )


def test_what_is_drawn_again_is_no_longer_told_of(tiny_config, tmp_path, real_images, capsys):
    """Distances show only beside the pictures that they are of; redrawing removes pages and numbers
    of the old ones.
    """
    (real_images / "0001_crane").mkdir()
    for file in list((real_images / "tiger cat").glob("[0-8].jpg")):
        shutil.copy(file, real_images / "0001_crane")
    argv = flags(tiny_config, num_train_epochs=1, test_size=3, evaluate=True)
    measure = ["--real_images", str(real_images), "--features", tiny_config.classifier]
    assert main([*argv, *measure, "--class_index", "3,1", "--train", "True"]) == 0
    (page,) = (tmp_path / "img").rglob("report_demo.html")
    assert "Distance to real pictures" in page.read_text()
    runs = [str(folder.parent) for folder in sorted((tmp_path / "img").rglob("eval"))]
    assert report.main([*runs, "--out", str(tmp_path / "page.html")]) == 0
    assert "Distance to real pictures" in (tmp_path / "page.html").read_text()
    assert main([*argv, "--class_index", "1", "--guidance_scale", "2"]) == 0
    assert not page.exists()
    capsys.readouterr()
    assert report.main(runs) == 2 and "with another guidance_scale" in capsys.readouterr().err
    assert main([*argv, "--class_index", "3", "--guidance_scale", "2"]) == 0
    assert report.main([*runs, "--out", str(tmp_path / "page.html")]) == 0
    assert "Distance to real pictures" not in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert (
        report.main([runs[0], runs[0]]) == 2 and "class 1 is given twice" in capsys.readouterr().err
    )


def test_another_classifier_s_token_is_refused(capsys, tiny_config, tmp_path):
    assert main(flags(tiny_config, class_index=3, train=True, num_train_epochs=1)) == 0
    relative = os.path.relpath(tiny_config.classifier)
    assert main(flags(tiny_config, class_index=3, evaluate=True, classifier=relative)) == 0
    shutil.copytree(
        tiny_config.classifier, tmp_path / "other" / Path(*Path(tiny_config.classifier).parts[-2:])
    )
    line = error_of(
        capsys,
        *flags(
            tiny_config,
            class_index=3,
            evaluate=True,
            classifier=tmp_path / "other" / Path(*Path(tiny_config.classifier).parts[-2:]),
        ),
    )
    assert "was trained with the classifier" in line


def test_a_link_to_a_picture_is_an_address(tmp_path):
    """Spaces, and names that are not UTF-8."""
    picture = tmp_path / "a run" / os.fsdecode(b"caf\xe9") / "0.png"
    assert report.link_image(picture, tmp_path / "page.html") == "a%20run/caf%E9/0.png"
