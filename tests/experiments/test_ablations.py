"""One factor at a time: the command, and what counts as a clear difference."""

import pytest
import yaml

from experiments import ablations


def test_the_command(run_experiment, settings, tmp_path):
    result = run_experiment("ablations", settings, "--seeds", "2", "--images", "2", "--updates", "2", "--epoch_size",
                            "4", factors={"fresh_noise": (True, False), "guidance_scale": (1.0,), "epoch_size": (2,)})
    assert [(found["factor"], found["value"]) for found in result["results"]] == [
        ("nothing", ""), ("fresh_noise", False), ("guidance_scale", 1.0), ("epoch_size", 2)]
    assert [found["pictures_drawn"] / found["updates"] for found in result["results"]] == [4, 4, 4, 2]
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "work").rglob("config.yml")]
    assert {config["seed"] for config in configs} == {1000, 11000} and len(configs) == 8


@pytest.mark.parametrize("differences, clear", [([0.4, 0.3], True), ([0.4, 0.0], False), ([-0.2, -0.3], True),
                                                ([0.05, 0.0], False)])
def test_clear_is_what_every_training_says(differences, clear):
    assert ablations.is_clear(differences) == clear
