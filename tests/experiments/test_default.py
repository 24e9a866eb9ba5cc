"""The default by rule: the command, the rule, and the flags that it recommends."""

import pytest

from experiments import default
from experiments.trainings import Trainings


def test_the_command(run_experiment):
    result = run_experiment("default")
    parts = result["trainings"]
    assert [len(part) for part in parts.values()] == [1 + len(default.CANDIDATES), 3, 2]
    assert {len(found["right"]) for found in parts["all"].values()} == {4}
    assert {
        title.split()[0] for found in parts["even: the test"].values() for title in found["right"]
    } == {"6", "8"}
    assert (
        all(0 < test[1] <= 1 for test in result["tests"].values())
        and result["chosen"] in default.CANDIDATES
    )


def make_trainings(seconds: float, *shares: float) -> Trainings:
    return Trainings({str(i): [share] for i, share in enumerate(shares)}, 1, 1, seconds)


@pytest.mark.parametrize(
    "found, chosen",
    [
        (
            {
                "slow": make_trainings(3, 1, 1),
                "fast": make_trainings(1, 1, 0.97),
                "poor": make_trainings(0.5, 1, 0.8),
            },
            "fast",
        ),
        (
            {"uneven": make_trainings(1, *[1] * 9, 0.85), "even": make_trainings(2, *[0.98] * 10)},
            "even",
        ),
        ({"a": make_trainings(1, 0.5), "b": make_trainings(9, 0.7)}, "b"),
    ],
)
def test_the_rule(found, chosen):
    assert default.choose_setting(found) == chosen


@pytest.mark.parametrize(
    "seen, tested, words",
    [
        ((1, 0.99), (1, 0.98), ("The rule takes `--lr 0.01", "became the default")),
        (
            (0.7, 0.8),
            (1, 1),
            ("No setting satisfies the rule on the odd classes", "became the default"),
        ),
        ((1, 1), (1, 0.7), ("The rule takes", "the default stays")),
    ],
)
def test_the_default_changes_only_where_the_test_confirms_it(seen, tested, words):
    name = "5 pictures, 40 updates, lr 0.01"
    told = default.describe_decision(
        name,
        {name: make_trainings(1, *seen)},
        {name: make_trainings(1, *tested), default.DEFAULT: make_trainings(2, 0.9, 0.9)},
    )
    assert "in 50% of the former default's seconds" in told
    assert all(word.split(" `")[0] in told for word in words)


def test_flags_are_what_differs():
    flags = default.write_flags({**default.OURS, "train_timesteps": [999, 600], "lr": 0.015})
    assert flags == "--train_timesteps 999 600 --lr 0.015"


def test_halves_of_the_classes_are_joined():
    odd, even = make_trainings(1, 1, 0.5), Trainings({"x": [0, 1], "y": [1, 1]}, 3, 5, 7)
    joined = odd.join_classes(even)
    assert (
        joined.class_means() == [1, 0.5, 0.5, 1]
        and joined.least_right() == 0
        and joined[1:] == (2, 3, 4)
    )
