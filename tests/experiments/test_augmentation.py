"""Claim (ii): every arm trains its classifiers, and differences are paired."""

from statistics import mean

from evaluation.statistics import standard_error
from experiments import augmentation


def test_the_command(run_experiment, settings, tmp_path):
    flags = ("--class_index", "7,8", "--k", "1", "2", "--trained", "2", "--seeds", "2", "--images", "2", "--test", "2",
             "--steps", "2", "--inversion_steps", "2", "--epoch_size", "4", "--updates", "1")
    result = run_experiment("augmentation", settings, *flags)
    assert {arm: list(by_k) for arm, by_k in result["accuracies"].items()} == {
        **dict.fromkeys((augmentation.REAL, augmentation.PLAIN, augmentation.TOKEN), ["1", "2"]),
        **dict.fromkeys((augmentation.GUIDED, augmentation.INVERTED), ["2"])}
    assert all(len(seeds) == 2 for by_k in result["accuracies"].values() for seeds in by_k.values())
    assert len(list((tmp_path / "work" / "guides").iterdir())) == 4  # of two k and two seeds
    assert run_experiment("augmentation", settings, *flags) == result
    token, real = (result["accuracies"][arm]["2"] for arm in (augmentation.TOKEN, augmentation.REAL))
    gains = [100 * (with_token - alone) for with_token, alone in zip(token, real, strict=True)]  # paired by seed
    assert f"{mean(gains):.1f} points (standard error {standard_error(gains):.1f}) more than 'real alone'" in \
        result["found"]
