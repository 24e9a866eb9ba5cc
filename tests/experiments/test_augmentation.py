"""Claim (ii): every arm trains its classifiers, and arms are compared over classes."""

from evaluation.statistics import compare_classes
from experiments import augmentation


def test_the_command(run_experiment, tmp_path):
    result = run_experiment("augmentation")
    assert {arm: list(by_k) for arm, by_k in result["accuracies"].items()} == {
        **dict.fromkeys((augmentation.REAL, augmentation.PLAIN, augmentation.TOKEN), ["1", "2"]),
        **dict.fromkeys((augmentation.GUIDED, augmentation.INVERTED), ["2"]),
    }
    assert all(
        len(classes) == 2 for by_k in result["accuracies"].values() for classes in by_k.values()
    )
    assert len(list((tmp_path / "work" / "guides").iterdir())) == 4  # of two k and two seeds
    assert run_experiment("augmentation") == result
    token, real = (
        result["accuracies"][arm]["2"] for arm in (augmentation.TOKEN, augmentation.REAL)
    )
    difference = compare_classes(token, real).difference
    assert result["tests"]["k = 2, '+ class token' beside 'real alone'"][0] == list(difference)
