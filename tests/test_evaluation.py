"""Evaluation through the real command line: which pictures are drawn, how they are judged, real ones, reports."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

import class_token
import report
from classifiers import load_classifier
from diffusion import encode_prompts, generate_images, load_components
from distribution import Extractor, distribution, distribution_lines
from evaluation import context_kept, judge_images, table_lines
from metrics import frechet_distance, prdc, wilson
from miniature import world
from prompt_datasets import evaluation_prompts
from real import folder_names, real_pictures
from run import main
from tests.test_run import error_of, flags
from utils import UserError, load_images, save_images


def test_a_smaller_evaluation_judges_its_own_images_alone(tiny_config, tmp_path):
    argv = flags(tiny_config, "--class_index", "3", "--evaluate", "True")
    assert main([*argv, "--train", "True", "--num_train_epochs", "3", "--test_size", "4"]) == 0
    assert main([*argv, "--train", "True", "--num_train_epochs", "1", "--test_size", "3"]) == 0
    metrics = json.loads(next((tmp_path / "img").rglob("metrics.json")).read_text())
    assert metrics["images"] == 3
    assert len(metrics["with"]["classifier"]["right"]) == 3
    assert [p.name for p in next((tmp_path / "img").rglob("train")).iterdir()] == ["000"]


def test_evaluating_again_draws_only_what_is_missing(capsys, tiny_config, tmp_path, monkeypatch):
    argv = flags(tiny_config, "--class_index", "3", "--evaluate", "True")
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    folder, warnings = next((tmp_path / "img").rglob("eval")), []

    def again(*more):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*/*.png")}
        capsys.readouterr()
        assert main([*argv, *more]) == 0
        out, err = capsys.readouterr()
        warnings.append(err)
        drawn = {f"{path.parent.name}/{path.stem}" for path in folder.rglob("*/*.png")
                 if path.stat().st_mtime_ns != before.get(path)}
        return drawn, "there already" in out

    with monkeypatch.context() as without_generator:
        without_generator.setattr("run.load_components", None)  # not needed, so not loaded
        assert again() == (set(), True)
        assert again("--train", "True", "--skip_exists", "True", "--num_train_epochs", "1") == (set(), True)
    (folder / "with" / "1.png").unlink()
    assert again() == ({"with/1"}, False)
    assert again("--test_size", "3") == ({"without/2", "with/2"}, False)
    token = next((tmp_path / "pipeline_token").rglob("*.safetensors"))
    class_token.save(token, "newclas", torch.ones(32), {})
    assert again() == ({"with/0", "with/1"}, False)
    everything = {"without/0", "without/1", "with/0", "with/1"}
    assert again("--guidance_scale", "2") == (everything, False)
    assert "warning: the token was trained with guidance_scale 7.0, now 2.0" in warnings[-1]
    os.utime(next(Path(tiny_config.model).rglob("*.safetensors")))  # another checkpoint in the same place
    assert again("--guidance_scale", "2") == (everything, False)
    os.utime(Path(tiny_config.model, "scheduler", "scheduler_config.json"))  # another sampler
    assert again("--guidance_scale", "2") == (everything, False)


def test_evaluation_refuses_pictures_that_are_no_numbers(capsys, tiny_config, tmp_path, monkeypatch):
    argv = flags(tiny_config, "--class_index", "3")
    assert main([*argv, "--train", "True", "--evaluate", "True", "--num_train_epochs", "1"]) == 0
    monkeypatch.setattr("evaluation.generate_images", lambda *settings: torch.full((4, 3, 32, 32), torch.nan))
    assert main([*argv, "--evaluate", "True", "--guidance_scale", "2"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: a picture of 3 (tiger cat) is not a number: try --mixed_precision bf16")
    assert not list(tmp_path.rglob("eval/*/*.png")) and not list(tmp_path.rglob("metrics.json"))


def test_judging_equals_transformers_own(tiny_classifier, tmp_path):
    """Accuracy, certainty and what is seen instead, against the checkpoint's own processor and model."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    pictures, files = [Image.fromarray(each) for each in pixels], [tmp_path / f"{i}.png" for i in range(12)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    inputs = ViTImageProcessor.from_pretrained(tiny_classifier)(pictures, return_tensors="pt")
    model = ViTForImageClassification.from_pretrained(tiny_classifier)
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(1)
    seen = probabilities.argmax(1)
    target = seen.mode().values.item()
    judged = judge_images(load_classifier(tiny_classifier, "cpu"), files, target)
    assert judged["right"] == (seen == target).tolist() and 0 < sum(judged["right"]) < 12
    assert judged["accuracy"]["value"] == pytest.approx((seen == target).float().mean().item())
    assert judged["mean_target_probability"] == pytest.approx(probabilities[:, target].mean().item(), abs=1e-5)
    assert judged["predicted_instead"] == Counter(
        f"{i + 1} ({model.config.id2label[i]})" for i in seen[seen != target].tolist())


def test_contexts_are_judged_by_the_world(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        world.draw(0, random.Random(i), "at night" if i else None).save(file)
    kept = context_kept("miniature.world:context_of", "A photo of a {} at night", files)
    assert kept["value"] == 0.75 and kept["low"] < 0.75 < kept["high"]


def test_reports_of_other_evaluations(capsys, tiny_config, tmp_path):
    """A token that came alone has a report too; classes that were evaluated differently have none together."""
    argv = flags(tiny_config, "--train", "True", "--evaluate", "True", "--num_train_epochs", "1")
    assert main([*argv, "--class_index", "2"]) == 0
    assert main([*argv, "--class_index", "3", "--eval_prompts", "{} at night"]) == 0
    alone = next((tmp_path / "pipeline_token").glob("*/0002*/demo"))
    for name in ("config.yml", "history.jsonl"):
        (alone / name).unlink()
    assert main(flags(tiny_config, "--class_index", "2", "--evaluate", "True")) == 0
    runs = [str(path) for path in sorted((tmp_path / "img").glob("*/*/demo"))]
    assert "crane, machine" in Path(runs[0], "report.html").read_text()
    assert report.main([runs[1], "--out", str(tmp_path / "page.html")]) == 0 and (tmp_path / "page.html").exists()
    capsys.readouterr()
    assert report.main(runs) == 2 and "with another eval_prompts" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2 and "holds no evaluation" in capsys.readouterr().err


def test_training_again_forgets_the_evaluation_of_the_old_token(tiny_config, tmp_path):
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--num_train_epochs", "1")
    assert main([*argv, "--evaluate", "True"]) == 0 and main(argv) == 0
    assert not list((tmp_path / "img").rglob("metrics.json"))


def test_contexts_and_controls(tiny_config, tmp_path):
    """Every arm has its own pictures; the untrained control is the initialiser's word in the token's place."""
    argv = flags(tiny_config, "--class_index", "3", "--evaluate", "True", "--eval_prompts", "A painting of a {}",
                 "{} at night", "--controls", "True")
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    folder = next((tmp_path / "img").rglob("eval"))
    arms = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("*/0.png")}
    assert arms == {"without", "with", "untrained", "random", "prompts/a_painting_of_a/without",
                    "prompts/a_painting_of_a/with", "prompts/at_night/without", "prompts/at_night/with"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["contexts"]) == {"A painting of a {}", "{} at night"}
    assert 0 <= metrics["contexts"]["{} at night"]["with"]["classifier"]["accuracy"]["value"] <= 1
    components = load_components(tiny_config.model, "cpu", torch.float32)
    prompt_embeds = encode_prompts(components, ["A photo of a a tiger cat"])
    expected = generate_images(components, prompt_embeds, [1], tiny_config.height, tiny_config.width,
                               tiny_config.guidance_scale, tiny_config.num_inference_steps)
    assert (load_images([folder / "untrained" / "1.png"]) - expected).abs().max() <= 0.5 / 255 + 1e-5


def test_the_film_of_a_picture_starts_untrained(tiny_config, tmp_path):
    """With fresh noise no training picture comes back: one seed is drawn by the vectors of the updates."""
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--evaluate", "True", "--num_train_epochs", "3",
                 "--lr", "0.5", "--fresh_noise", "True", "--train_timesteps", "999", "600", "--controls", "True")
    assert main(argv) == 0
    folder = next((tmp_path / "img").rglob("eval"))
    assert json.loads((folder / "metrics.json").read_text())["film"] == [f"updates/00{i}" for i in range(3)]
    frames = [(folder / "updates" / f"00{i}" / "0.png").read_bytes() for i in range(3)]
    assert frames[0] == (folder / "untrained" / "0.png").read_bytes() and len(set(frames)) == 3
    assert (folder.parent / "report.html").read_text().count("data:image/gif") == 1


@pytest.fixture
def real_images(tmp_path):
    """Ten odd-sized pictures of a tiger cat, one of them broken."""
    folder = tmp_path / "real" / "tiger cat"
    folder.mkdir(parents=True)
    colours = np.random.default_rng(0).integers(0, 256, (10, 3))
    for i, colour in enumerate(colours):
        Image.new("RGB", (30 + i, 40 - i), tuple(colour.tolist())).save(folder / f"{i}.jpg")
    (folder / "9.jpg").write_bytes(b"not a picture")
    return tmp_path / "real"


def test_a_name_that_two_classes_share_is_no_folder_of_either(tmp_path):
    labels = ["crane, bird", "crane, machine", "tiger cat"]
    names = ["crane", "crane", "tiger cat"]
    for folder in ("0001_crane", "crane, machine", "tiger cat"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
    classes = dict.fromkeys(range(3), tmp_path)
    found = real_pictures(str(tmp_path), names, labels, classes, 1)
    assert [found[i][0].parent.name for i in range(3)] == ["0001_crane", "crane, machine", "tiger cat"]
    (tmp_path / "crane").mkdir()
    with pytest.raises(UserError, match="folders that are no class: 'crane'"):  # of which of the two?
        real_pictures(str(tmp_path), names, labels, classes, 1)
    (tmp_path / "crane").rmdir()
    (tmp_path / "2").mkdir()
    with pytest.raises(UserError, match="two folders of class 2 .*: '2' and 'crane, machine'"):
        real_pictures(str(tmp_path), names, labels, classes, 1)
    (tmp_path / "2").rmdir()
    shutil.rmtree(tmp_path / "0001_crane")
    with pytest.raises(UserError, match="'0001_crane' or '1' or 'crane, bird'"):
        real_pictures(str(tmp_path), names, labels, classes, 1)


def test_numbers_as_labels_are_not_taken_for_positions():
    """Digits: folder '1' is the class of label 1, or the first class, so it is neither; '0' can only be the first."""
    digits = [str(i) for i in range(10)]
    allowed = folder_names(digits, digits)
    assert allowed[:2] == [["0001_0", "0"], ["0002_1"]] and allowed[9] == ["0010_9", "10"]


def test_what_is_drawn_anew_is_no_longer_told_of(tiny_config, tmp_path, real_images, capsys):
    """Distances show only beside the pictures that they are of; redrawing removes pages and numbers of the old ones."""
    (real_images / "0001_crane").mkdir()
    for file in list((real_images / "tiger cat").glob("[0-8].jpg")):
        shutil.copy(file, real_images / "0001_crane")
    argv = flags(tiny_config, "--num_train_epochs", "1", "--test_size", "3", "--evaluate", "True")
    measure = ["--real_images", str(real_images), "--features", tiny_config.classifier]
    assert main([*argv, *measure, "--class_index", "3,1", "--train", "True"]) == 0
    page, = (tmp_path / "img").rglob("report_demo.html")
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
    assert report.main([runs[0], runs[0]]) == 2 and "class 1 is there twice" in capsys.readouterr().err


def test_another_classifier_s_token_is_refused(capsys, tiny_config, tmp_path):
    assert main(flags(tiny_config, "--class_index", "3", "--train", "True", "--num_train_epochs", "1")) == 0
    relative = os.path.relpath(tiny_config.classifier)
    assert main(flags(tiny_config, "--class_index", "3", "--evaluate", "True", "--classifier", relative)) == 0
    shutil.copytree(tiny_config.classifier, tmp_path / "other" / Path(*Path(tiny_config.classifier).parts[-2:]))
    line = error_of(capsys, *flags(tiny_config, "--class_index", "3", "--evaluate", "True", "--classifier",
                                   str(tmp_path / "other" / Path(*Path(tiny_config.classifier).parts[-2:]))))
    assert "was trained with the classifier" in line


def test_distances_to_real_pictures(tiny_config, tmp_path, real_images, capsys):
    """FID and company on a classifier's features are those of the folders' features; the broken file is named."""
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--evaluate", "True", "--num_train_epochs", "1",
                 "--test_size", "6", "--real_images", str(real_images), "--features", tiny_config.classifier)
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "warning: skipped 1 of 10 real pictures, which cannot be read" in err and "9.jpg" in err
    assert "6 generated against 9 real pictures" in out and "not comparable with published FIDs" in out
    distances = json.loads(next((tmp_path / "img").rglob("summary_demo.json")).read_text())["distribution"]
    classifier = load_classifier(tiny_config.classifier, "cpu")

    def features(files):
        images = [load_images([file]) for file in files]
        with torch.no_grad():
            return torch.cat([classifier.model.vit(classifier.preprocessing(image)).last_hidden_state[:, 0]
                              for image in images])

    real = features(sorted(real_images.rglob("[0-8].jpg")))
    generated = features(sorted(next((tmp_path / "img").rglob("eval/with")).glob("*.png")))
    assert distances["with"]["fid"] == pytest.approx(frechet_distance(real, generated), rel=1e-3)
    assert distances["with"]["coverage"] == prdc(real, generated).coverage
    assert "with" in distances and "real" not in distances  # too few real ones to set some aside


def test_unequal_numbers_of_real_pictures_are_said(tmp_path):
    """Two classes, eight generated pictures each; the note says when the real ones weigh otherwise."""
    pixels = Extractor("pixels", lambda image: image[:, :2, :2], lambda batch: batch.flatten(1), torch.device("cpu"))
    noise = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    files = [tmp_path / f"{i}.png" for i in range(20)]
    save_images(noise, files)
    notes = [distribution_lines(distribution(pixels, {"without": files[:16], "with": files[4:]}, real))[1]
             for real in ([files[:9], files[9:]], [files[:10], files[10:]])]
    assert "Classes have 9 to 11 real pictures" in notes[0] and "Classes have" not in notes[1]


def test_real_pictures_from_a_function_and_their_ceiling(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("run.COMPARABLE_FID", 40)  # 2,048 drawings take a while
    assert main(flags(tiny_config, "--class_index", "1-2", "--train", "True", "--evaluate", "True",
                      "--num_train_epochs", "1", "--test_size", "4", "--real_images", "miniature.world:draw",
                      "--features", tiny_config.classifier, "--eval_prompts", "A photo of a {} at night",
                      "--context_judge", "miniature.world:context_of")) == 0
    summary = json.loads(next((tmp_path / "img").rglob("summary_demo.json")).read_text())
    assert summary["distribution"]["with"]["real_images"] == 40
    ceiling = summary["distribution"]["real"]
    assert ceiling["generated_images"] == 8 and ceiling["fid"] < summary["distribution"]["with"]["fid"]
    kept = summary["classes"][0]["contexts"]["A photo of a {} at night"]["context_kept"]
    assert set(kept) == {"without", "with"} and 0 <= kept["with"]["value"] <= 1


@pytest.mark.parametrize("more, reason", [
    (["--real_images", "{stray}"], "has folders that are no class: 'tigre cat'; did you mean 'tiger cat'?"),
    (["--real_images", "{empty}"], "has no readable pictures of class 3"),
    (["--real_images", "miniature.nowhere:draw"], "no module 'miniature.nowhere'"),
    (["--real_images", "miniature.world:paint"], "has no function 'paint'"),
    (["--context_judge", "miniature.world"], "context_judge must be module:function"),
    (["--real_images", "{real}", "--features", "inception:nowhere.pth"], "no file 'nowhere.pth'"),
    (["--real_images", "{real}", "--test_size", "4"], "more than 5 generated pictures"),
    (["--evaluator", "nobody/no-such-model"], "cannot open 'nobody/no-such-model'"),
])
def test_wrong_measurements_are_found_before_any_work(tiny_config, tmp_path, real_images, capsys, more, reason,
                                                      monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    next(real_images.rglob("9.jpg")).unlink()
    (tmp_path / "empty").mkdir()
    shutil.copytree(real_images, tmp_path / "stray")
    (tmp_path / "stray" / "tigre cat").mkdir()
    places = {f"{{{name}}}": str(tmp_path / name) for name in ("empty", "real", "stray")}
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--evaluate", "True", "--test_size", "6")
    assert reason in error_of(capsys, *argv, *(places.get(part, part) for part in more))
    assert not (tmp_path / "img").exists()


def test_too_few_readable_real_pictures_are_found_before_any_work(tiny_config, tmp_path, real_images, capsys):
    for i in range(4, 9):
        next(real_images.rglob(f"{i}.jpg")).write_bytes(b"broken")
    assert main(flags(tiny_config, "--class_index", "3", "--train", "True", "--evaluate", "True", "--test_size", "6",
                      "--real_images", str(real_images))) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "skipped 6 of 10 real pictures" in warning
    assert "more than 5 real pictures, all classes together; there are 4" in error
    assert not (tmp_path / "img").exists()


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("A painting of a {}\n\n{} at night\n")
    assert evaluation_prompts([str(tmp_path / "prompts.txt")]) == ["A painting of a {}", "{} at night"]
    assert evaluation_prompts(["A photo of a {}", "{} at night"]) == ["{} at night"]  # the first is always evaluated


def test_the_table_pools_all_classes():
    """Two classes of four pictures: right 1 + 2 of 8 without, 4 + 3 with; top 5 as stored; five gained, one lost."""
    def judged(right, top5):
        return {"right": [bool(each) for each in right], "accuracy": wilson(sum(right), 4)._asdict(),
                "top5": wilson(top5, 4)._asdict(), "predicted_instead": {}}

    metrics = [{"class_index": i, "label": f"class {i}", "classes": 10, "judges": {"classifier": "vit"},
                "without": {"classifier": without}, "with": {"classifier": with_}}
               for i, without, with_ in ((1, judged([1, 0, 0, 0], 2), judged([1, 1, 1, 1], 4)),
                                         (2, judged([1, 1, 0, 0], 3), judged([1, 0, 1, 1], 4)))]
    lines = {line[1]: line[2] for line in table_lines(metrics)}
    assert lines["class 1"] == "0.25 -> 1.00"
    assert lines["all"].startswith("0.38 [0.14, 0.69] -> 0.88 [0.53, 0.98]")
    assert lines["all, in the top 5"].startswith("0.62 [") and " -> 1.00 [" in lines["all, in the top 5"]
    assert lines["put right, put wrong"] == "5 and 1, p = 0.22"
