"""One factor at a time: the command, and what its sentence names."""

import yaml

from experiments import ablations
from experiments.trainings import Trainings


def test_the_command(run_experiment, tmp_path):
    result = run_experiment(
        "ablations", factors={"fresh_noise": (True, False), "guidance_scale": (1.0,)}
    )
    assert list(result["trainings"]) == ["nothing", "fresh_noise False", "guidance_scale 1.0"]
    assert all(
        list(map(len, found["right"].values())) == [1, 1] for found in result["trainings"].values()
    )
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "work").rglob("config.yml")]
    assert [
        sum(config[name] == value for config in configs)
        for name, value in (("fresh_noise", False), ("guidance_scale", 1.0), ("seed", 1000))
    ] == [2, 2, 6]


def test_only_what_the_test_supports_is_named(run_experiment, monkeypatch):
    """Of three changes to eight classes one is worse in all, one in some, and one in none."""
    shares = {
        "start": [0.9] * 8,
        "0.5": [0.1, 0.2, 0.3, 0.2, 0.1, 0.2, 0.1, 0.1],
        "0.6": [0.9] * 6 + [0.4, 0.5],
        "0.8": [0.9] * 8,
    }
    monkeypatch.setattr(
        ablations,
        "measure_variant",
        lambda study, changes: Trainings(
            {
                str(i): [share]
                for i, share in enumerate(shares[str(changes.get("target_accuracy", "start"))])
            },
            1,
            1,
            1,
        ),
    )
    found = run_experiment("ablations", factors={"target_accuracy": (0.5, 0.6, 0.8)})["found"]
    assert (
        "0.5" in found and "target_accuracy 0.6" not in found and "target_accuracy 0.8" not in found
    )
