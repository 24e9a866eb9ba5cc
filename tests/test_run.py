"""The real command line: help, errors before any work, a whole run on the tiny checkpoint, and the
same run again.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from config import RunConfig
from run import main
from runs.session import Session
from runs.sweep import run_sweep
from tests.conftest import error_of, file_times, flags, save_classifier
from tokens.class_token import load_token, save_token
from utils import ROOT, write_json


@pytest.mark.parametrize(
    "argv, reason",
    [
        ([], "which class?"),
        (["--class_index", "1"], "nothing to do"),
        (
            ["--class_index", "1", "--train", "True", "--height", "500"],
            "height must be divisible by 8",
        ),
        (["--class_index", "1", "--train", "True", "--lr", "fast"], "invalid float value: 'fast'"),
        (["--class_index", "1", "--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
        (
            ["--clas_index", "1"],
            "unrecognized arguments: --clas_index 1; did you mean '--class_index'?",
        ),
        (["--class_index", "1", "--train", "True", "--test_size", "50"], "give --seed 50 or more"),
        (
            ["--class_index", "1", "--train", "True", "--train_timesteps", "600", "800"],
            "falling numbers from 999 to 0",
        ),
        (["--class_index", "1", "--train", "True", "--betas", "0.9"], "betas must be two numbers"),
        (["--class_index", "1", "--train", "True", "--device", "tpu"], "device must be"),
        (["--class_index", "1", "--train", "True", "--device", "cpu:x"], "device must be"),
        (["--class_index", "1", "--train", "True", "--exp_id", "a/b"], "a folder's name"),
        (
            ["--class_index", "1", "--evaluate", "True", "--eval_prompts", "in snow"],
            "is neither a file nor a prompt",
        ),
        (
            ["--class_index", "1", "--evaluate", "True", "--eval_prompts", "{}", "on the moon"],
            "'on the moon' needs one {}",
        ),
        (
            ["--class_index", "1", "--evaluate", "True", "--eval_prompts", "A {}", "a {}!"],
            "the same letters and digits",
        ),
        (["--config", "nowhere.yml"], "no file 'nowhere.yml'"),
    ],
)
def test_wrong_settings(capsys, argv, reason):
    assert reason in error_of(capsys, *argv)


def test_unknown_key_in_a_file(capsys, tmp_path):
    (tmp_path / "s.yml").write_text("learning: 1\nlrr: 2\n")
    assert "unknown setting 'learning'" in error_of(capsys, "--config", tmp_path / "s.yml")
    (tmp_path / "s.yml").write_text("guidance: 2\n")
    assert "did you mean 'guidance_scale'" in error_of(capsys, "--config", tmp_path / "s.yml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_cuda_the_error_names_the_way_out(capsys, tiny_config):
    line = error_of(capsys, *flags(tiny_config, class_index=3, train=True, device="cuda"))
    assert "no CUDA GPU" in line and "--config configs/miniature.yml" in line


@pytest.mark.parametrize("flag", ["--model", "--classifier"])
def test_no_network_is_one_line(capsys, tiny_config, flag):
    argv = flags(tiny_config, flag, "nobody/no-such-model", "--class_index", "1", "--train", "True")
    line = error_of(capsys, *argv)
    assert "cannot open 'nobody/no-such-model'" in line and "--config configs/miniature.yml" in line


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--class_index", "6"], "classes are 1 to 5"),
        (["--class_index", "tiger"], "did you mean"),
        (["--class_index", "1", "--placeholder_token", "crane"], "is part of 'crane'"),
        (["--class_index", "3", "--placeholder_token", "crane"], "already in the vocabulary"),
        (
            ["--class_index", "1", "--initializer_token", "tigercat", "--num_vectors", "1"],
            "is 3 tokens",
        ),
        (
            ["--class_index", "1", "--evaluate", "True", "--real_images", "nowhere"],
            "no real_images folder",
        ),
        (["--class_index", "1", "--train_timesteps", "999", "-1"], "from 999 to 0"),
    ],
)
def test_nothing_is_written_for_a_run_that_cannot_work(capsys, tiny_config, more, reason):
    assert reason in error_of(capsys, *flags(tiny_config, *more, train=True))
    assert not list(Path(tiny_config.output_path).iterdir())


def test_timesteps_beyond_the_model_s_are_refused_before_anything_is_written(
    capsys, tiny_config, tmp_path
):
    scheduler = Path(tiny_config.model, "scheduler", "scheduler_config.json")
    before = scheduler.read_text()
    write_json(scheduler, {**json.loads(before), "num_train_timesteps": 500})
    argv = flags(tiny_config, class_index=1, train=True, train_timesteps=600)
    try:
        line = error_of(capsys, *argv)
    finally:
        scheduler.write_text(before)
    assert "train_timesteps start at 600" in line and not list(tmp_path.iterdir())


def test_evaluate_without_a_token(capsys, tiny_config):
    assert "no token at" in error_of(capsys, *flags(tiny_config, class_index=1, evaluate=True))


def test_list_classes(capsys, tiny_config):
    assert main(["--classifier", tiny_config.classifier, "--list_classes"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split(None, 1) == ["3", "tiger cat"]


@pytest.mark.parametrize(
    "command, code",
    [
        ("run.py --classifier {vit} --list_classes | true", 0),
        ("run.py --classifier {vit} --list_classes >&-", 0),
        ("-m evaluation.report nowhere >&- 2>&-", 2),
        ("-m experiments.iterations --help | true", 0),
    ],
)
def test_entry_points_need_nobody_who_reads(tmp_path, command, code):
    vit = save_classifier(tmp_path / "vit", ["鶴", "虎猫"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; exec {sys.executable} {command.format(vit=vit)}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        all(f"--{name}" in text for name in RunConfig.__dataclass_fields__) and "[0.00125]" in text
    )


def test_train_and_evaluate(capsys, tiny_config, tmp_path):
    argv = flags(
        tiny_config,
        class_index="2-3",
        train=True,
        evaluate=True,
        num_train_epochs=2,
        evaluator=tiny_config.classifier,
    )
    assert main(argv) == 0
    out = capsys.readouterr().out
    classifier = next(path.name for path in (tmp_path / "img").iterdir())
    tokens = tmp_path / "pipeline_token" / classifier / "0003_tiger_cat" / "demo"
    images = tmp_path / "img" / classifier / "0003_tiger_cat" / "demo"
    assert {path.name for path in tokens.iterdir()} == {
        "learned_embeds.safetensors",
        "config.yml",
        "history.jsonl",
        "cost.json",
    }
    cost = json.loads((tokens / "cost.json").read_text())
    assert cost["updates"] == 2 and cost["seconds"] > 0 and 0.1 < cost["peak_memory_gb"] < 10
    placeholder, vectors, _, header = load_token(tokens / "learned_embeds.safetensors")
    assert placeholder == "newclas" and vectors.shape == (1, 32)
    assert (header["class_index"], header["class_name"], header["base_model"]) == (
        "3",
        "tiger cat",
        tiny_config.model,
    )
    assert yaml.safe_load((tokens / "config.yml").read_text())["num_train_epochs"] == 2
    assert len((tokens / "history.jsonl").read_text().splitlines()) == 2
    assert {p.name for p in (images / "eval" / "with").iterdir()} == {"0.png", "1.png"}
    assert {p.name for p in (images / "train" / "001").iterdir()} == {
        f"{seed}.png" for seed in range(35, 40)
    }
    metrics = json.loads((images / "eval" / "metrics.json").read_text())
    assert metrics["class_index"] == 3 and set(metrics["conditions"]["with"]) == {
        "classifier",
        "evaluator",
    }
    judged = metrics["conditions"]["with"]["classifier"]
    assert judged["accuracy"]["low"] <= judged["accuracy"]["value"] <= judged["accuracy"]["high"]
    # it has five classes
    assert judged["top5"]["value"] == 1.0 and 0 <= metrics["mcnemar_p"]["evaluator"] <= 1
    page = (tmp_path / "img" / classifier / "report_demo.html").read_text()
    assert "tiger cat" in page and page.count("data:image/") >= 8
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # opens without a network
    assert (
        (images / "eval" / "grid.png").exists() and " all " in out and "class 3 (tiger cat)" in out
    )


def test_evaluation_never_uses_training_seeds(capsys, tiny_config):
    argv = flags(tiny_config, class_index=3)
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    line = error_of(capsys, *argv, "--evaluate", "True", "--test_size", "50")
    assert "trained on seeds from 35 on" in line and "--test_size 35" in line
    line = error_of(
        capsys,
        *flags(
            tiny_config,
            class_index="2-3",
            train=True,
            evaluate=True,
            num_train_epochs=1,
            seed=60,
            test_size=50,
        ),
    )
    assert "seed 35, now 60" in line
    assert not list(Path(tiny_config.output_path).rglob("0002*"))  # found before class 2 cost hours


def test_summary_gathers_the_classes_of_a_shell_loop(tiny_config, tmp_path):
    for index in ("2", "3"):
        assert (
            main(
                flags(tiny_config, class_index=index, train=True, evaluate=True, num_train_epochs=1)
            )
            == 0
        )
    summary = json.loads(next((tmp_path / "img").rglob("summary_demo.json")).read_text())
    assert [metrics["class_index"] for metrics in summary["classes"]] == [2, 3]


def test_the_same_command_again_repeats_nothing(tiny_config, tmp_path, capsys):
    """Neither a file of a token nor a picture changes, no model of the generator is loaded, the
    results are shown.
    """
    tiny_config.class_index, tiny_config.evaluate, tiny_config.num_train_epochs = "2-3", True, 2
    tiny_config.output_path = str(tmp_path)
    run_sweep(Session(tiny_config))
    before, first = file_times(tmp_path), capsys.readouterr().out
    again = Session(tiny_config)
    run_sweep(again)
    out = capsys.readouterr().out
    assert file_times(tmp_path) == before and len(before) > 20
    assert not {"generator", "classifier", "evaluator"} & vars(again).keys()
    assert "training" not in out and out.count("accuracy without -> with") == first.count(
        "accuracy without -> with"
    )


def test_the_same_command_again_does_what_is_missing(tiny_config, tmp_path, capsys):
    argv = flags(tiny_config, class_index="2-3", num_train_epochs=1, train=True, evaluate=True)
    assert main(argv) == 0
    (folder,) = tmp_path.rglob("0003_tiger_cat/demo/eval")
    (folder / "with" / "1.png").unlink()
    next(tmp_path.rglob("0002_crane/demo/eval/metrics.json")).unlink()
    before = file_times(tmp_path)
    capsys.readouterr()
    assert main(argv) == 0
    out = capsys.readouterr().out
    after = file_times(tmp_path)
    changed = {
        path for path in after if after[path] != before.get(path) and path.name != "grid.png"
    }
    assert changed == {folder / "with" / "1.png"} and len(list(tmp_path.rglob("metrics.json"))) == 2
    assert out.count("trained already") == 2 and out.count("its pictures are there already") == 1


def test_the_config_of_a_run_is_that_run(tiny_config, tmp_path):
    assert main(flags(tiny_config, class_index=3, train=True, num_train_epochs=1)) == 0
    before = file_times(tmp_path)
    config = next((tmp_path / "pipeline_token").rglob("config.yml"))
    assert main(["--config", str(config)]) == 0 and file_times(tmp_path) == before
    assert main(["--config", str(config), "--skip_exists", "False"]) == 0
    token = config.with_name("learned_embeds.safetensors")
    assert token.stat().st_mtime_ns > before[token]


def test_starting_over_removes_what_the_old_token_gave(tiny_config, tmp_path):
    argv = flags(tiny_config, "--num_train_epochs", class_index=3, train=True)
    assert main([*argv, "3", "--evaluate", "True"]) == 0
    assert main([*argv, "1", "--skip_exists", "False"]) == 0
    assert not list(tmp_path.rglob("metrics.json")) and not list(
        tmp_path.rglob("summary_demo.json")
    )
    assert [path.name for path in next((tmp_path / "img").rglob("train")).iterdir()] == ["000"]


def test_another_setting_is_another_run(tiny_config, tmp_path, capsys):
    argv = flags(tiny_config, class_index=3, train=True, num_train_epochs=2)
    assert main(argv) == 0
    before = file_times(tmp_path)
    assert main([*argv, "--device", "cpu", "--batch_size", "2"]) == 0  # what changes no result
    line = error_of(capsys, *argv, "--lr", "0.1")
    assert "lr 0.00125, now 0.1" in line
    assert "--exp_id" in line and "--skip_exists False" in line
    assert file_times(tmp_path) == before
    assert main([*argv, "--lr", "0.1", "--skip_exists", "False"]) == 0
    config = yaml.safe_load(next(tmp_path.rglob("config.yml")).read_text())
    assert config["lr"] == 0.1
    assert main([*argv, "--lr", "0.1"]) == 0  # the new settings are the run's from here on


@pytest.mark.parametrize("fresh_noise", ["False", "True"])
def test_which_training_pictures_stay(tiny_config, tmp_path, capsys, fresh_noise):
    """All, those of the film's updates, or none; neither the token nor the film depends on it."""
    found, pages = {}, {}
    for value in ("all", "film", "none"):
        argv = flags(
            tiny_config,
            class_index=3,
            train=True,
            evaluate=True,
            epoch_size=2,
            num_train_epochs=13,
            target_accuracy=1,
            early_stopping=13,
            fresh_noise=fresh_noise,
            train_images=value,
            output_path=tmp_path / value,
        )
        assert main(argv) == 0
        (train,) = (tmp_path / value).rglob("train")
        found[value] = {path.parent.name for path in train.glob("*/*.png")}
        pages[value] = next((tmp_path / value).rglob("report.html")).read_text()
        assert len(list(train.glob("*/*.png"))) == 2 * len(found[value])
        assert (train / "vectors.safetensors").exists() == (fresh_noise == "True")
        before = file_times(tmp_path / value)
        assert (
            main([*argv, "--train_images", "all"]) == 0 and file_times(tmp_path / value) == before
        )
    updates = {f"{update:03d}" for update in range(13)}
    assert found == {"all": updates, "film": updates - {"002", "006", "010"}, "none": set()}
    films = {value: re.findall('data:image/gif[^"]*', page) for value, page in pages.items()}
    assert len(films["all"]) == 1 and films["all"] == films["film"]
    assert films["none"] == (films["all"] if fresh_noise == "True" else [])
    first, *others = (
        load_token(path).vectors for path in sorted(tmp_path.rglob("learned_embeds.safetensors"))
    )
    assert all(torch.equal(vectors, first) for vectors in others)


def test_token_of_another_model(capsys, tiny_config, tmp_path):
    assert main(flags(tiny_config, class_index=3, train=True, num_train_epochs=1)) == 0
    file = next((tmp_path / "pipeline_token").rglob("*.safetensors"))
    save_token(file, "newclas", torch.zeros(1, 768), (768,), {})
    assert "trained for another --model" in error_of(
        capsys, *flags(tiny_config, class_index=3, evaluate=True)
    )


def test_classes_without_names_are_told(capsys, tiny_config, tmp_path):
    """'A photo of a newclas LABEL 1' would train silently."""
    tiny_config.classifier = save_classifier(tmp_path / "unnamed", ["LABEL_0", "LABEL_1"])
    argv = flags(tiny_config, class_index=2, train=True, num_train_epochs=1)
    assert main(argv) == 0
    assert "'LABEL 1'" in capsys.readouterr().err
    (tmp_path / "names.yml").write_text("2: tiger cat")
    assert main([*argv, "--class_names", str(tmp_path / "names.yml"), "--exp_id", "named"]) == 0
    assert "does not name" not in capsys.readouterr().err


def test_a_machine_that_cannot_compile_is_one_line(tiny_config, tmp_path):
    """Before anything is loaded; what an earlier run compiled is no proof."""
    argv = flags(tiny_config, class_index=3, train=True, torch_compile=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    done = subprocess.run(
        [sys.executable, "run.py", *argv],
        cwd=ROOT,
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "torch_compile: this machine cannot compile (" in done.stderr
    assert not list(tmp_path.rglob("config.yml"))
