"""Words into settings: flags, the file of --config, paths as a shell has them."""

from dataclasses import asdict
from pathlib import Path

import pytest

from command_line import parse_settings
from config import SETTINGS
from run import main
from tests.conftest import error_of, flags
from utils import write_yaml


def test_flags_beat_the_file(tmp_path):
    file = tmp_path / "settings.yml"
    file.write_text(
        "lr: 1e-2\nseed: 77\ntrain_timesteps: [999, 600]\nevaluator: none\nfresh_noise: true\n"
    )
    config, _ = parse_settings(["--config", str(file), "--seed", "78"])
    assert (config.lr, config.seed, config.train_timesteps, config.fresh_noise) == (
        0.01,
        78,
        [999, 600],
        True,
    )
    for unset in (["--train_timesteps", "none"], ["--train_timesteps=none"]):
        assert parse_settings([*unset, "--config", str(file)])[0].train_timesteps is None


def test_a_saved_config_repeats_the_run(tmp_path, tiny_config):
    write_yaml(tmp_path / "config.yml", asdict(tiny_config))
    assert parse_settings(["--config", str(tmp_path / "config.yml")])[0] == tiny_config


PATHS = [
    (name, prefix)
    for name, prefixes in {
        "model": [""],
        "classifier": ["", "mean:", "timm:local-dir:", "zero-shot:"],
        "evaluator": ["", "mean:"],
        "labels": [""],
        "class_names": [""],
        "real_images": [""],
        "features": ["", "inception:"],
        "output_path": [""],
        "eval_prompts": [""],
    }.items()
    for prefix in prefixes
]


@pytest.fixture
def home(tmp_path, monkeypatch) -> str:
    """The home folder of a user whose $DATA is a folder in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    return str(tmp_path)


def assert_path_is_expanded(name: str, typed: str, full: str):
    """In flags and files alike, and the settings file's own."""
    many = name == "eval_prompts"
    write_yaml(Path("~/settings.yml").expanduser(), {name: [typed] if many else typed})
    for argv in (
        [f"--{name}={typed}"],
        ["--config", "$HOME/settings.yml"],
        ["--config=~/settings.yml"],
    ):
        found = getattr(parse_settings(argv)[0], name)
        assert (found[0] if many else found) == full


@pytest.mark.parametrize(
    "typed, full",
    [
        ("~/x.yml", "{}/x.yml"),
        ("$HOME/x.yml", "{}/x.yml"),
        ("${HOME}/x.yml", "{}/x.yml"),
        ("$DATA/../x.yml", "{}/data/../x.yml"),
        ("~/a $HOME/x.yml", "{}/a {}/x.yml"),
    ],
)
def test_paths_as_a_shell_has_them(home, typed, full):
    assert_path_is_expanded("model", typed, full.replace("{}", home))


def test_paths_of_every_setting(home):
    for name, prefix in PATHS:
        assert SETTINGS[name].metadata["path"]
        assert_path_is_expanded(name, f"{prefix}~/x.yml", f"{prefix}{home}/x.yml")


def test_what_is_no_path_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a $NO_SUCH").mkdir()
    prompts = ["A {} for $HOME and ~", "~ {}"]
    config, _ = parse_settings(
        ["--eval_prompts", *prompts, "--output_path", "a $NO_SUCH", "--exp_id", "$HOME"]
    )
    assert (config.eval_prompts, config.output_path, config.exp_id) == (
        prompts,
        "a $NO_SUCH",
        "$HOME",
    )


def test_yaml_words_are_read_as_typed(tmp_path):
    file = tmp_path / "settings.yml"
    file.write_text("mixed_precision: no\ntrain: yes\nexp_id: 007\n")
    config, _ = parse_settings(["--config", str(file)])
    assert (config.mixed_precision, config.train, config.exp_id) == ("no", True, "007")


@pytest.mark.parametrize(
    "argv, right",
    [
        (["--train"], "which class?"),
        (["--class_index", "3"], "python run.py --class_index 3 --train True --evaluate True"),
        (
            ["--class_index", "3", "--token", "x.pt"],
            "run.py --class_index 3 --token x.pt --evaluate True",
        ),
        (
            ["tiger", "cat", "--exp_id", "x"],
            "python run.py --class_index 'tiger cat' --exp_id x --train True --eval",
        ),
        (["tiger cat"], "python run.py --class_index 'tiger cat' --train True --evaluate True"),
        (["--lr"], "expected one argument"),
        (
            ["--class_index=3", "--train=True", "--lr=-1e-3"],
            "lr must be greater than 0",
        ),
        (
            ["--class_index", "1", "3"],
            "3; a value with spaces needs quotes",
        ),
        (
            ["--class_index", "tiger", "cat"],
            "cat; a value with spaces needs quotes",
        ),
        (["--config", "."], "no file '.'"),
    ],
)
def test_half_a_command(capsys, argv, right):
    assert right in error_of(capsys, *argv)


def test_the_last_value_of_a_setting_counts():
    def batch_size(*argv):
        return parse_settings(["--batch_size", "3", *argv])[0].batch_size

    assert batch_size("--batch_size", "none") is batch_size("--batch-size=none") is None
    assert batch_size("--batch_size", "none", "--batch_size=4") == 4
    assert parse_settings(["--eval_prompts", "A {} with x=none"])[0].eval_prompts == [
        "A {} with x=none"
    ]


def test_debug_shows_where(capsys, tiny_config):
    assert main(flags(tiny_config, "--debug", class_index=3, train=True, lr=0)) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith(
        "error: lr must be greater than 0"
    )
