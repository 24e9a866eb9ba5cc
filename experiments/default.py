"""The default by rule: a setting chosen on classes 1, 3, 5, ... and tested on 2, 4, 6, ....

    python -m experiments.default

The rule, fixed before the candidates were run: of those that are right in ENOUGH of the pictures, and in LEAST of any
class in any training, the one with the fewest seconds; the one that is most often right where none is.
"""

from evaluation.statistics import correct_pvalues, interval_over_classes
from experiments import common
from experiments.plots import plot_tradeoff
from experiments.trainings import Trainings, compare_trainings, describe_test, list_seeds, measure_trainings

ENOUGH, LEAST = 0.98, 0.90
PAPER, BEFORE = "the paper's loop", "the default until now"
UNTIL_NOW = {"train_timesteps": [999, 800, 600], "train_guidance_scale": None, "lr": 5e-3, "epoch_size": 16,
             "num_train_epochs": 80, "target_accuracy": 0.96, "fresh_noise": True}
UNGUIDED = {**UNTIL_NOW, "train_timesteps": [999, 600], "train_guidance_scale": 1.0, "lr": 0.015,
            "num_train_epochs": 20}
CANDIDATES = {
    "999 600, target 0.96": UNGUIDED, "999 600, target 0.9": {**UNGUIDED, "target_accuracy": 0.9},
    "999 600, 8 pictures": {**UNGUIDED, "epoch_size": 8},
    "999 800 600, target 0.9": {**UNGUIDED, "train_timesteps": [999, 800, 600], "target_accuracy": 0.9}}
REFERENCES = {
    PAPER: {**UNTIL_NOW, "train_timesteps": None, "epoch_size": 5, "num_train_epochs": 50, "target_accuracy": 0.7,
            "fresh_noise": False},
    BEFORE: UNTIL_NOW}


def measure_settings(lab: common.Lab, settings: dict[str, dict], parity: int, images: int) -> dict[str, Trainings]:
    """What settings give on the classes with odd numbers (`parity` 1) or even ones (0)."""
    targets, seeds = [target for target in lab.targets if target.number % 2 == parity], list_seeds(lab)
    for seed in seeds:  # one training of every setting after the other: seconds of the same minutes
        for changes in settings.values():
            common.learn_tokens(lab, targets, **changes, seed=seed)
    return {name: measure_trainings(lab, seeds, images, targets, **changes) for name, changes in settings.items()}


def choose_setting(found: dict[str, Trainings]) -> str:
    """The name of the setting that the rule takes."""
    good = [name for name, trainings in found.items()
            if trainings.interval().mean >= ENOUGH and trainings.least() >= LEAST]
    return min(good, key=lambda name: found[name].seconds) if good else \
        max(found, key=lambda name: found[name].interval().mean)


def write_flags(changes: dict) -> str:
    """The flags of run.py that set what differs from until now."""
    words = {name: " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
             for name, value in changes.items() if value != UNTIL_NOW[name] and value is not None}
    return " ".join(f"--{name} {value}" for name, value in words.items())


def describe_trainings(found: Trainings, before: Trainings) -> list[str]:
    return [str(found.interval()), f"{found.least():.2f}", f"{found.updates:.0f}", f"{found.unet_calls:.0f}",
            f"{found.seconds:.1f}", f"{found.seconds / before.seconds:.2f}"]


def main(argv: list[str] | None = None):
    options = common.parse_options(
        __doc__, argv, "all", quick={"class_index": "5-8", "seeds": 2, "images": 2, "choice_images": 2}, seeds=3,
        images=50, choice_images=25)
    lab = common.open_lab(options)
    plain = interval_over_classes([common.measure_accuracy(lab, common.draw_sets(lab, {target: None}, options.images))
                                  .value for target in lab.targets])
    tried = measure_settings(lab, {BEFORE: UNTIL_NOW, **CANDIDATES}, 1, options.choice_images)
    chosen = choose_setting(tried)
    compared = {**REFERENCES, chosen: (CANDIDATES | REFERENCES)[chosen]}
    even, odd = (measure_settings(lab, compared, parity, options.images) for parity in (0, 1))
    everywhere = {name: odd[name].join(found) for name, found in even.items()}
    tests = correct_pvalues({name: compare_trainings(even[chosen], even[name]) for name in REFERENCES})
    ours, before = everywhere[chosen], everywhere[BEFORE]
    flags, ratio = write_flags(compared[chosen]), ours.seconds / before.seconds
    plot_tradeoff(lab.out / "default.png", f"{flags}\n{ours.interval().mean:.2f} right instead of "
                  f"{before.interval().mean:.2f}, in {ratio:.0%} of the seconds", plain, everywhere,
                  {name: found for name, found in tried.items() if name not in everywhere}, chosen)
    parts = {"odd: the choice": tried, "even: the test": even, "all": everywhere}
    rows = [[f"**{name}**" if name == chosen else name, where, *describe_trainings(found, part[BEFORE])]
            for where, part in parts.items() for name, found in part.items()]
    common.publish_result(
        lab, "default", common.TESTED, "The default, chosen by rule",
        f"Chosen: `{flags}`, right in {ours.interval()} of all classes' pictures, in {ours.least():.2f} of the least "
        f"class of any training, in {ratio:.0%} of the seconds of the default until now. Tested on the other half of "
        "the classes, right beside " + "; beside ".join(f"{name}: {describe_test(found)}" for name, found in
                                                      tests.items()) + ".",
        ["setting", "classes", "right", "least in any training", "updates", "UNet calls", "seconds",
         "of the seconds until now"], rows,
        f"Rule, fixed before: of those right in {ENOUGH} or more, and in {LEAST} or more of any class in any training, "
        f"on the odd classes ({options.choice_images} pictures), the one with fewest seconds. {options.seeds} "
        f"trainings, {options.images} held-out pictures per class and training. Updates, UNet calls (one image each) "
        "and seconds are per class, eight classes at once. The paper's loop: its trajectory, guidance, prompts, seeds "
        "and stops, with the learning rate of the default until now.",
        {"chosen": chosen, "settings": CANDIDATES | REFERENCES, "without": plain, "tests": tests,
         "trainings": {where: {name: found._asdict() for name, found in part.items()}
                       for where, part in parts.items()}})


if __name__ == "__main__":
    common.run_script(main)
