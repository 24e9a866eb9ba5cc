"""One factor at a time: the command, and what its sentence names."""

import yaml

from evaluation.statistics import compare_classes, correct_pvalues
from experiments.trainings import describe_clear


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


def test_only_what_the_test_supports_is_named():
    """Of three changes to eight classes one is worse in all, one in some, and one in none."""
    start = [0.9] * 8
    shares = {
        "worse": [0.1, 0.2, 0.3, 0.2, 0.1, 0.2, 0.1, 0.1],
        "worse in some": [0.9] * 6 + [0.4, 0.5],
        "equal": start,
    }
    tests = {name: compare_classes(values, start) for name, values in shares.items()}
    found = describe_clear(correct_pvalues(tests))
    assert "1 of 3" in found and "worse (-0.7" in found
    assert "worse in some" not in found and "equal" not in found
