"""Claim (ii): pictures drawn with class tokens help to train a classifier from a handful of real ones.

    python -m experiments.augmentation
    python -m experiments.augmentation --config configs/cub.yml --real_images DIR --class_index 1-20 --test 10

A small classifier learns from k real pictures per class, alone or with as many drawn ones in every batch.
"""

from statistics import mean

from evaluation.statistics import mean_with_error, standard_error
from experiments import common, small
from experiments.plots import plot_curves
from experiments.textual_inversion import invert_pictures

BATCH = 32
REAL, PLAIN, TOKEN, GUIDED, INVERTED = ARMS = (
    "real alone", "+ plain prompt", "+ class token", "+ class token, guide of the k pictures", "+ textual inversion")


def draw_arm(lab: common.Lab, arm: str, few: common.Sets | None = None, guide: str = "") -> common.Sets:
    """What an arm adds to the `few` real pictures; `guide` is the classifier that saw them alone."""
    options, vectors, phrase = lab.options, dict.fromkeys(lab.targets), None
    if arm == TOKEN:
        vectors = common.load_vectors(common.learn_tokens(lab))
    elif arm == GUIDED:
        vectors = common.load_vectors(common.learn_tokens(
            lab, classifier=guide, labels=None, evaluator=None, epoch_size=options.epoch_size,
            num_train_epochs=options.updates))
    elif arm == INVERTED:
        vectors, _ = invert_pictures(lab, few, options.inversion_steps)
        phrase = lab.config.placeholder_token
    return common.draw_sets(lab, vectors, options.images, phrase=phrase)


def measure_arm(lab: common.Lab, arm: str, k: int, seed: int, real: common.Sets, test: small.Samples) -> float:
    """The test accuracy of an arm with k real pictures per class, which are of this seed alone."""
    options = lab.options
    first = options.test + max(options.k) * seed
    few = {target: files[first:first + k] for target, files in real.items()}
    training = {"k": k, "seed": seed, "first": first, "steps": options.steps, "batch": BATCH,
                "pictures": common.stamp_sets(few)}
    guide = lab.work / "guides" / common.digest_training(lab.config, **training)

    def train_arm() -> float:
        sets = [few] if arm == REAL else [few, draw_arm(lab, arm, few, str(guide))]
        model = small.train_classifier(lab.labels, list(map(small.load_sets, sets)), options.steps, BATCH, seed,
                                       f"k = {k}, seed {seed}, {arm}")
        if arm == REAL:
            small.save_classifier(model, guide)
        return small.measure_classifier(model, *test)

    return common.cached_result(lab, train_arm, arm=arm, **training, test=options.test, images=options.images,
                                tokens=[options.epoch_size, options.updates, options.inversion_steps])


def main(argv: list[str] | None = None):
    options = common.parse_options(
        __doc__, argv, "7,8,13,14", real_images=None, k=[1, 2, 5, 10], trained=[2], seeds=5, images=12, test=60,
        steps=80, inversion_steps=120, epoch_size=8, updates=12)
    lab = common.open_lab(options)
    real = common.load_real_images(lab, options.test + max(options.k) * options.seeds)
    test = small.load_sets({target: files[:options.test] for target, files in real.items()})
    results = {arm: {k: [measure_arm(lab, arm, k, seed, real, test) for seed in range(options.seeds)]
                     for k in options.k if arm in (REAL, PLAIN, TOKEN) or k in options.trained} for arm in ARMS}
    plot_curves(lab.out / "augmentation.png", "real pictures per class (k)", "accuracy on real pictures",
                {arm: {str(k): values for k, values in by_k.items()} for arm, by_k in results.items()})
    k = 2 if 2 in options.k else options.k[0]
    gains = {arm: [100 * (ours - theirs) for ours, theirs in zip(results[TOKEN][k], by_k[k], strict=True)]
             for arm, by_k in results.items() if arm != TOKEN and k in by_k}
    right = {arm: common.measure_accuracy(lab, draw_arm(lab, arm)) for arm in (PLAIN, TOKEN)}
    common.publish_result(
        lab, "augmentation", "Pictures drawn with class tokens help to train a classifier from few real ones",
        f"At k = {k}, class tokens' pictures bring " + ", ".join(
            f"{mean(gain):.1f} points (standard error {standard_error(gain):.1f}) more than '{arm}'"
            for arm, gain in gains.items()) + ".",
        ["trained on", *(f"k = {k}" for k in options.k)],
        [[arm, *(mean_with_error(by_k[k]) if k in by_k else "" for k in options.k)] for arm, by_k in results.items()],
        f"Test accuracy over {options.seeds} seeds. Of the drawn pictures {right[PLAIN]} show their class ('{PLAIN}'), "
        f"and {right[TOKEN]} ('{TOKEN}'). The guide of '{TOKEN}' was trained on far more than k pictures; that of "
        f"'{GUIDED}' is '{REAL}'. Empty cells were not run (`--trained`).",
        {"accuracies": results, "steps": options.steps, "drawn": options.images, "right": right})


if __name__ == "__main__":
    common.run_script(main)
