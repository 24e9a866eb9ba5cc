"""The real command line: help, settings, errors, and a whole run on the tiny checkpoint."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import class_token
import report
from classifiers import load_classifier
from config import RunConfig, parse, to_yaml
from diffusion import encode_prompts, generate_images, load_components
from metrics import frechet_distance, prdc
from prompt_datasets import evaluation_prompts
from real import real_pictures
from run import main
from utils import UserError, load_images


def flags(config: RunConfig, *more):
    return ["--model", config.model, "--classifier", config.classifier, "--device", "cpu", "--mixed_precision", "no",
            "--height", "32", "--width", "32", "--num_inference_steps", "3", "--test_size", "2", "--output_path",
            config.output_path, *more]


def error_of(capsys, *argv) -> str:
    """The one line that a wrong call prints; its exit code is 2."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_reference_setting():
    """DESIGN: the paper's numbers are the defaults."""
    config, _ = parse(["--class_index", "283", "--train", "True"])
    config.validate()
    assert (config.lr, config.epoch_size, config.num_train_epochs, config.seed) == (1.25e-3, 5, 50, 35)
    assert (config.guidance_scale, config.num_inference_steps, config.mixed_precision) == (7.0, 30, "fp16")
    assert config.train is True and config.evaluate is False and config.train_timesteps is None


def test_flags_beat_the_file(tmp_path):
    file = tmp_path / "settings.yml"
    file.write_text("lr: 1e-2\nseed: 77\ntrain_timesteps: [999, 600]\nevaluator: none\nfresh_noise: true\n")
    config, _ = parse(["--config", str(file), "--seed", "78"])
    assert (config.lr, config.seed, config.train_timesteps, config.fresh_noise) == (0.01, 78, [999, 600], True)
    for unset in (["--train_timesteps", "none"], ["--train_timesteps=none"]):
        assert parse([*unset, "--config", str(file)])[0].train_timesteps is None


def test_a_saved_config_repeats_the_run(tmp_path, tiny_config):
    (tmp_path / "config.yml").write_text(to_yaml(tiny_config))
    assert parse(["--config", str(tmp_path / "config.yml")])[0] == tiny_config


def test_yaml_words_mean_what_they_say(tmp_path):
    file = tmp_path / "settings.yml"
    file.write_text("mixed_precision: no\ntrain: yes\nexp_id: 007\n")
    config, _ = parse(["--config", str(file)])
    assert (config.mixed_precision, config.train, config.exp_id) == ("no", True, "007")


@pytest.mark.parametrize("name", sorted(path.name for path in Path("configs").glob("*.yml")))
def test_shipped_configs_are_valid(name):
    config, _ = parse(["--config", f"configs/{name}", "--class_index", "1", "--train", "True"])
    config.validate()


@pytest.mark.parametrize("argv, reason", [
    ([], "which class?"),
    (["--class_index", "1"], "nothing to do"),
    (["--class_index", "1", "--train", "True", "--height", "500"], "height must be divisible by 8"),
    (["--class_index", "1", "--train", "True", "--lr", "fast"], "invalid float value: 'fast'"),
    (["--class_index", "1", "--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    (["--class_index", "1", "--train", "True", "--test_size", "50"], "give --seed 50 or more"),
    (["--class_index", "1", "--train", "True", "--train_timesteps", "600", "800"], "must fall from noise to image"),
    (["--class_index", "1", "--train", "True", "--betas", "0.9"], "betas must be two numbers"),
    (["--class_index", "1", "--train", "True", "--device", "tpu"], "device must be"),
    (["--class_index", "1", "--train", "True", "--device", "cpu:x"], "device must be"),
    (["--class_index", "1", "--train", "True", "--exp_id", "a/b"], "names a folder"),
    (["--class_index", "1", "--evaluate", "True", "--eval_prompts", "in snow"], "is no file, and no prompt either"),
    (["--class_index", "1", "--evaluate", "True", "--eval_prompts", "{}", "on the moon"], "'on the moon' needs one {}"),
    (["--class_index", "1", "--evaluate", "True", "--eval_prompts", "A {}", "a {}!"], "differ in no letter"),
    (["--config", "nowhere.yml"], "no file 'nowhere.yml'"),
])
def test_wrong_settings(capsys, argv, reason):
    assert reason in error_of(capsys, *argv)


def test_unknown_key_in_a_file(capsys, tmp_path):
    (tmp_path / "s.yml").write_text("learning: 1\nlrr: 2\n")
    assert "unknown setting 'learning'" in error_of(capsys, "--config", tmp_path / "s.yml")
    (tmp_path / "s.yml").write_text("guidance: 2\n")
    assert "did you mean 'guidance_scale'" in error_of(capsys, "--config", tmp_path / "s.yml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_cuda_the_way_out_is_named(capsys):
    line = error_of(capsys, "--class_index", "283", "--train", "True")
    assert "no CUDA GPU" in line and "--config configs/miniature.yml" in line


@pytest.mark.parametrize("flag", ["--model", "--classifier"])
def test_no_network_is_one_line(capsys, tiny_config, flag, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = flags(tiny_config, flag, "nobody/no-such-model", "--class_index", "1", "--train", "True")
    line = error_of(capsys, *argv)
    assert "cannot open 'nobody/no-such-model'" in line and "--config configs/miniature.yml" in line


@pytest.mark.parametrize("more, reason", [
    (["--class_index", "6"], "classes are 1 to 5"), (["--class_index", "tiger"], "did you mean"),
    (["--class_index", "1", "--placeholder_token", "crane"], "in the vocabulary already"),
    (["--class_index", "1", "--initializer_token", "tiger cat"], "one token of the vocabulary"),
    (["--class_index", "1", "--evaluate", "True", "--real_images", "nowhere"], "no real_images folder"),
    (["--class_index", "1", "--train_timesteps", "2000", "600"], "from 999 to 0")])
def test_nothing_is_written_for_a_run_that_cannot_work(capsys, tiny_config, more, reason):
    assert reason in error_of(capsys, *flags(tiny_config, "--train", "True", *more))
    assert not list(Path(tiny_config.output_path).rglob("*.safetensors"))


def test_evaluate_without_a_token(capsys, tiny_config):
    assert "no token at" in error_of(capsys, *flags(tiny_config, "--class_index", "1", "--evaluate", "True"))


def test_list_classes(capsys, tiny_config):
    assert main(["--classifier", tiny_config.classifier, "--list_classes"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split(None, 1) == ["3", "tiger cat"]


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name}" in text for name in RunConfig.__dataclass_fields__) and "default: 0.00125" in text


def test_train_and_evaluate(capsys, tiny_config, tmp_path):
    argv = flags(tiny_config, "--class_index", "2-3", "--train", "True", "--evaluate", "True",
                 "--num_train_epochs", "2", "--evaluator", tiny_config.classifier)
    assert main(argv) == 0
    out = capsys.readouterr().out
    classifier = next(path.name for path in (tmp_path / "img").iterdir())
    tokens = tmp_path / "pipeline_token" / classifier / "0003_tiger_cat" / "demo"
    images = tmp_path / "img" / classifier / "0003_tiger_cat" / "demo"
    assert {path.name for path in tokens.iterdir()} == {"learned_embeds.safetensors", "config.yml", "history.jsonl"}
    placeholder, vector, header = class_token.load(tokens / "learned_embeds.safetensors")
    assert placeholder == "newclas" and len(vector) == 32
    assert (header["class_index"], header["class_name"], header["base_model"]) == ("3", "tiger cat", tiny_config.model)
    assert yaml.safe_load((tokens / "config.yml").read_text())["num_train_epochs"] == 2
    assert len((tokens / "history.jsonl").read_text().splitlines()) == 2
    assert {p.name for p in (images / "eval" / "with").iterdir()} == {"0.png", "1.png"}
    metrics = json.loads((images / "eval" / "metrics.json").read_text())
    assert metrics["class_index"] == 3 and set(metrics["with"]) == {"classifier", "evaluator"}
    judged = metrics["with"]["classifier"]
    assert judged["accuracy"]["low"] <= judged["accuracy"]["value"] <= judged["accuracy"]["high"]
    assert judged["top5"]["value"] == 1.0 and 0 <= metrics["mcnemar_p"]["evaluator"] <= 1  # it has five classes
    page = (tmp_path / "img" / classifier / "report_demo.html").read_text()
    assert "tiger cat" in page and page.count("data:image/") >= 8
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # opens without a network
    assert (images / "eval" / "grid.png").exists() and " all " in out and "class 3 (tiger cat)" in out


def test_a_smaller_evaluation_judges_its_own_images_alone(tiny_config, tmp_path):
    argv = flags(tiny_config, "--class_index", "3", "--evaluate", "True")
    assert main([*argv, "--train", "True", "--num_train_epochs", "3", "--test_size", "4"]) == 0
    assert main([*argv, "--train", "True", "--num_train_epochs", "1", "--test_size", "3"]) == 0
    metrics = json.loads(next((tmp_path / "img").rglob("metrics.json")).read_text())
    assert metrics["images"] == 3
    assert len(metrics["with"]["classifier"]["right"]) == 3
    assert [p.name for p in next((tmp_path / "img").rglob("train")).iterdir()] == ["000"]


def test_evaluating_again_draws_only_what_is_missing(capsys, tiny_config, tmp_path):
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

    assert again() == (set(), True)
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


def test_evaluation_refuses_pictures_that_are_no_numbers(capsys, tiny_config, tmp_path, monkeypatch):
    argv = flags(tiny_config, "--class_index", "3")
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    monkeypatch.setattr("evaluation.generate_images", lambda *settings: torch.full((4, 3, 32, 32), torch.nan))
    assert main([*argv, "--evaluate", "True"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: a picture of 3 (tiger cat) is not a number: try --mixed_precision bf16")
    assert not list(tmp_path.rglob("eval/*/*.png"))


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
    assert report.main(runs) == 2 and "evaluated differently" in capsys.readouterr().err
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
    for folder in ("crane", "0001_crane", "crane, machine", "tiger cat"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    found = [real_pictures(str(tmp_path), index, names, labels, tmp_path, 1)[0].parent.name for index in range(3)]
    assert found == ["0001_crane", "crane, machine", "tiger cat"]
    shutil.rmtree(tmp_path / "0001_crane")
    with pytest.raises(UserError, match="'0001_crane' or '1' or 'crane, bird'"):
        real_pictures(str(tmp_path), 0, names, labels, tmp_path, 1)


def test_distances_to_real_pictures(tiny_config, tmp_path, real_images, capsys):
    """FID and company on a classifier's features are those of the folders' features; the broken file is named."""
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--evaluate", "True", "--num_train_epochs", "1",
                 "--test_size", "6", "--real_images", str(real_images), "--features", tiny_config.classifier)
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "warning: 1 of 10 real pictures cannot be read" in err and "9.jpg" in err
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
    assert set(distances) == {"features", "classes", "without", "with"}  # too few real ones to set some aside


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
    (["--real_images", "{empty}"], "has no pictures of class 3"),
    (["--real_images", "miniature.nowhere:draw"], "no module 'miniature.nowhere'"),
    (["--real_images", "miniature.world:paint"], "has no function 'paint'"),
    (["--context_judge", "miniature.world"], "it is written module:function"),
    (["--real_images", "{real}", "--features", "inception:nowhere.pth"], "no file 'nowhere.pth'"),
    (["--real_images", "{real}", "--test_size", "4"], "more than 5 generated pictures"),
    (["--evaluator", "nobody/no-such-model"], "cannot open 'nobody/no-such-model'"),
])
def test_wrong_measurements_are_found_before_any_work(tiny_config, tmp_path, real_images, capsys, more, reason,
                                                      monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    next(real_images.rglob("9.jpg")).unlink()
    (tmp_path / "empty").mkdir()
    places = {"{empty}": str(tmp_path / "empty"), "{real}": str(real_images)}
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--evaluate", "True", "--test_size", "6")
    assert reason in error_of(capsys, *argv, *(places.get(part, part) for part in more))
    assert not (tmp_path / "img").exists()


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("A painting of a {}\n\n{} at night\n")
    assert evaluation_prompts([str(tmp_path / "prompts.txt")]) == ["A painting of a {}", "{} at night"]
    assert evaluation_prompts(["A photo of a {}", "{} at night"]) == ["{} at night"]  # the first is always evaluated


def test_evaluation_never_uses_training_seeds(capsys, tiny_config):
    argv = flags(tiny_config, "--class_index", "3")
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    line = error_of(capsys, *argv, "--evaluate", "True", "--test_size", "50")
    assert "trained on seeds from 35 on" in line and "--test_size 35" in line


def test_summary_gathers_the_classes_of_a_shell_loop(tiny_config, tmp_path):
    for index in ("2", "3"):
        assert main(flags(tiny_config, "--class_index", index, "--train", "True", "--evaluate", "True",
                          "--num_train_epochs", "1")) == 0
    summary = json.loads(next((tmp_path / "img").rglob("summary_demo.json")).read_text())
    assert [metrics["class_index"] for metrics in summary["classes"]] == [2, 3]


def test_skip_exists_trains_nothing(tiny_config, tmp_path):
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--num_train_epochs", "1")
    assert main(argv) == 0
    file = next((tmp_path / "pipeline_token").rglob("*.safetensors"))
    before = file.stat().st_mtime_ns
    assert main([*argv, "--skip_exists", "True"]) == 0 and file.stat().st_mtime_ns == before


def test_token_of_another_model(capsys, tiny_config, tmp_path):
    assert main(flags(tiny_config, "--class_index", "3", "--train", "True", "--num_train_epochs", "1")) == 0
    file = next((tmp_path / "pipeline_token").rglob("*.safetensors"))
    class_token.save(file, "newclas", torch.zeros(768), {})
    assert "trained for another model" in error_of(capsys, *flags(tiny_config, "--class_index", "3", "--evaluate",
                                                                  "True"))
