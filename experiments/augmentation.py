"""Claim (ii): pictures drawn with class tokens help to train a classifier from a handful of real ones.

    python -m experiments.augmentation
    python -m experiments.augmentation --config configs/cub.yml --real_images DIR --class_index 1-20 --test 10

A small classifier learns from k real pictures per class, alone or with as many drawn ones in every batch.
"""

from statistics import mean

from evaluation.statistics import compare_classes, correct_pvalues, interval_over_classes
from experiments import common, small
from experiments.plots import plot_curves
from experiments.textual_inversion import invert_pictures
from experiments.trainings import describe_tests, judge_sets, list_seeds

BATCH = 32
REAL, PLAIN, TOKEN, GUIDED, INVERTED = ARMS = (
    "real alone", "+ plain prompt", "+ class token", "+ class token, guide of the k pictures", "+ textual inversion")
CONTRASTS = ((TOKEN, REAL), (TOKEN, PLAIN), (TOKEN, INVERTED), (GUIDED, REAL), (GUIDED, PLAIN))


def draw_arm(lab: common.Lab, arm: str, seed: int, few: common.Sets | None = None, guide: str = "") -> common.Sets:
    """What an arm adds to the `few` real pictures, by a training of its own for each seed, counted from 0; `guide` is
    the classifier that saw them alone.
    """
    first = list_seeds(lab)[seed]
    options, vectors, phrase = lab.options, dict.fromkeys(lab.targets), None
    if arm == TOKEN:
        vectors = common.load_vectors(common.learn_tokens(lab, seed=first))
    elif arm == GUIDED:
        vectors = common.load_vectors(common.learn_tokens(
            lab, classifier=guide, labels=None, evaluator=None, epoch_size=options.epoch_size,
            num_train_epochs=options.updates, seed=first))
    elif arm == INVERTED:
        vectors = invert_pictures(lab, few, [options.inversion_steps], seed)[0][options.inversion_steps]
        phrase = lab.config.placeholder_token
    return common.draw_sets(lab, vectors, options.images, phrase=phrase)


def measure_arm(lab: common.Lab, arm: str, k: int, seed: int, real: common.Sets,
                test: small.Samples) -> list[float]:
    """The test accuracy by class of an arm with k real pictures per class, which are of this seed alone."""
    options = lab.options
    first = options.test + max(options.k) * seed
    few = {target: files[first:first + k] for target, files in real.items()}
    training = {"k": k, "seed": seed, "first": first, "steps": options.steps, "batch": BATCH,
                "pictures": common.stamp_sets(few)}
    guide = lab.work / "guides" / common.digest_training(lab.config, **training)

    def train_arm() -> list[float]:
        sets = [few] if arm == REAL else [few, draw_arm(lab, arm, seed, few, str(guide))]
        model = small.train_classifier(lab.labels, list(map(small.load_sets, sets)), options.steps, BATCH, seed,
                                       f"k = {k}, seed {seed}, {arm}")
        if arm == REAL:
            small.save_classifier(model, guide)
        return small.measure_classifier(model, *test)

    return common.cached_result(lab, train_arm, arm=arm, **training, first_seed=list_seeds(lab)[seed],
                                test=options.test, images=options.images,
                                tokens=[options.epoch_size, options.updates, options.inversion_steps])


def main(argv: list[str] | None = None):
    options = common.parse_options(
        __doc__, argv, "all", quick={"k": [1, 2], "seeds": 2, "images": 2, "test": 2, "steps": 2, "inversion_steps": 2},
        real_images=None, k=[1, 2, 5, 10], trained=[2], seeds=3, images=12, test=60, steps=120, inversion_steps=120,
        epoch_size=8, updates=12)
    lab = common.open_lab(options)
    real = common.load_real_images(lab, options.test + max(options.k) * options.seeds)
    test = small.load_sets({target: files[:options.test] for target, files in real.items()})
    results = {arm: {k: [mean(shares) for shares in zip(*(
        measure_arm(lab, arm, k, seed, real, test) for seed in range(options.seeds)), strict=True)]
                     for k in options.k if arm in (REAL, PLAIN, TOKEN) or k in options.trained} for arm in ARMS}
    plot_curves(lab.out / "augmentation.png", "real pictures per class (k)", "accuracy on real pictures",
                {arm: {str(k): interval_over_classes(values) for k, values in by_k.items()}
                 for arm, by_k in results.items()})
    tests = correct_pvalues({f"k = {k}, '{ours}' beside '{theirs}'": compare_classes(results[ours][k],
                                                                                     results[theirs][k])
                             for ours, theirs in CONTRASTS for k in results[ours] if k in results[theirs]})
    right = {arm: interval_over_classes([mean(shares) for shares in judge_sets(lab, [
        draw_arm(lab, arm, seed) for seed in range(options.seeds if arm == TOKEN else 1)]).values()])
             for arm in (PLAIN, TOKEN)}
    rows = [[arm, *(interval_over_classes(by_k[k]) if k in by_k else "" for k in options.k)]
            for arm, by_k in results.items()]
    common.publish_result(
        lab, "augmentation", common.EXPLORATORY,
        "Pictures drawn with class tokens help to train a classifier from few real ones",
        f"Accuracy: {describe_tests(tests)}",
        ["trained on", *(f"k = {k}" for k in options.k)], rows,
        f"Accuracy by class on {options.test} real pictures each, over {options.seeds} seeds with real pictures of "
        f"their own. Of the drawn pictures {right[PLAIN]} show their class ('{PLAIN}'), and {right[TOKEN]} "
        f"('{TOKEN}'). The guide of '{TOKEN}' was trained on far more than k pictures; that of '{GUIDED}' is '{REAL}', "
        f"and its tokens had {options.updates} updates of {options.epoch_size} pictures at most; textual inversion had "
        f"{options.inversion_steps} steps. "
        "Empty cells were not run (`--trained`). All classes of a cell share its classifiers, one for each seed, so "
        "their accuracies are not independent and the p-values are a guide.",
        {"accuracies": results, "steps": options.steps, "drawn": options.images, "right": right, "tests": tests})


if __name__ == "__main__":
    common.run_script(main)
