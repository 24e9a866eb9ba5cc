"""The real command line: help, settings, errors, and a whole run on the tiny checkpoint."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import class_token
from config import RunConfig, parse, to_yaml
from run import main


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
    (["--clas_index", "1"], "unrecognized arguments: --clas_index 1; did you mean '--class_index'?"),
    (["--class_index", "1", "--train", "True", "--test_size", "50"], "give --seed 50 or more"),
    (["--class_index", "1", "--train", "True", "--train_timesteps", "600", "800"], "that fall, from noise to image"),
    (["--class_index", "1", "--train", "True", "--betas", "0.9"], "betas must be two numbers"),
    (["--class_index", "1", "--train", "True", "--device", "tpu"], "device must be"),
    (["--class_index", "1", "--train", "True", "--device", "cpu:x"], "device must be"),
    (["--class_index", "1", "--train", "True", "--exp_id", "a/b"], "a folder's name"),
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
    (["--class_index", "3", "--placeholder_token", "crane"], "in the vocabulary already"),
    (["--class_index", "1", "--initializer_token", "tigercat"], "one token of the vocabulary"),
    (["--class_index", "1", "--evaluate", "True", "--real_images", "nowhere"], "no real_images folder"),
    (["--class_index", "1", "--train_timesteps", "2000", "600"], "from 999 to 0")])
def test_nothing_is_written_for_a_run_that_cannot_work(capsys, tiny_config, more, reason):
    assert reason in error_of(capsys, *flags(tiny_config, "--train", "True", *more))
    assert not list(Path(tiny_config.output_path).iterdir())


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
    assert {path.name for path in tokens.iterdir()} == {"learned_embeds.safetensors", "config.yml", "history.jsonl",
                                                        "cost.json"}
    cost = json.loads((tokens / "cost.json").read_text())
    assert cost["updates"] == 2 and cost["seconds"] > 0 and 0.1 < cost["peak_memory_gb"] < 10
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


def test_evaluation_never_uses_training_seeds(capsys, tiny_config):
    argv = flags(tiny_config, "--class_index", "3")
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    line = error_of(capsys, *argv, "--evaluate", "True", "--test_size", "50")
    assert "trained on seeds from 35 on" in line and "--test_size 35" in line
    line = error_of(capsys, *flags(tiny_config, "--class_index", "2-3", "--train", "True", "--evaluate", "True",
                                   "--skip_exists", "True", "--seed", "60", "--test_size", "50"))
    assert "seed 35, now 60" in line
    assert not list(Path(tiny_config.output_path).rglob("0002*"))  # found before class 2 cost hours


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


def test_the_config_of_a_skipping_run_trains_again(tiny_config, tmp_path):
    assert main(flags(tiny_config, "--class_index", "3", "--train", "True", "--num_train_epochs", "1", "--skip_exists",
                      "True")) == 0
    file = next((tmp_path / "pipeline_token").rglob("*.safetensors"))
    before = file.stat().st_mtime_ns
    assert main(["--config", str(file.with_name("config.yml"))]) == 0 and file.stat().st_mtime_ns > before


def test_token_of_another_model(capsys, tiny_config, tmp_path):
    assert main(flags(tiny_config, "--class_index", "3", "--train", "True", "--num_train_epochs", "1")) == 0
    file = next((tmp_path / "pipeline_token").rglob("*.safetensors"))
    class_token.save(file, "newclas", torch.zeros(768), {})
    assert "trained for another --model" in error_of(capsys, *flags(tiny_config, "--class_index", "3", "--evaluate",
                                                                  "True"))
