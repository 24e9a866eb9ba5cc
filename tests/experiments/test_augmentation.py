"""Claim (ii): every condition trains its classifiers, and conditions are compared over classes."""

from evaluation.statistics import compare_classes
from experiments import augmentation


def test_the_command(run_experiment, tmp_path):
    result = run_experiment("augmentation")
    assert {condition: list(by_k) for condition, by_k in result["accuracies"].items()} == {
        **dict.fromkeys((augmentation.REAL, augmentation.PLAIN, augmentation.TOKEN), ["1", "2"]),
        **dict.fromkeys((augmentation.FEW_SHOT, augmentation.INVERTED), ["2"]),
    }
    assert all(
        len(classes) == 2 for by_k in result["accuracies"].values() for classes in by_k.values()
    )
    assert len(list((tmp_path / "work" / "classifiers").iterdir())) == 4  # of two k and two seeds
    assert run_experiment("augmentation") == result
    token, real = (
        result["accuracies"][condition]["2"]
        for condition in (augmentation.TOKEN, augmentation.REAL)
    )
    difference = compare_classes(token, real).difference
    assert result["tests"]["k = 2, '+ class token' vs. 'real alone'"][0] == list(difference)
