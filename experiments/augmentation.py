"""Claim (ii): pictures drawn with class tokens help to train a classifier from few real ones.

    python -m experiments.augmentation
    python -m experiments.augmentation --config configs/cub.yml --real_images DIR --class_index 1-20
        --test 10

A small classifier learns from k real pictures per class, alone or with as many drawn ones in every
batch.
"""

from statistics import mean

from evaluation.statistics import (
    Comparison,
    Interval,
    compare_classes,
    correct_pvalues,
    interval_over_classes,
)
from evaluation.tables import Table
from experiments.material import (
    Sets,
    cached_result,
    digest_training,
    draw_sets,
    learn_tokens,
    load_real_images,
    load_vectors,
    stamp_sets,
)
from experiments.plots import plot_curves
from experiments.small_classifiers import (
    Samples,
    load_sets,
    measure_classifier,
    save_classifier,
    train_classifier,
)
from experiments.study import (
    EXPLORATORY,
    Study,
    StudyResult,
    open_study,
    parse_options,
    publish_result,
)
from experiments.textual_inversion import invert_pictures
from experiments.trainings import judge_sets, list_seeds
from system.terminal import run_script

BATCH = 32
REAL = "real alone"
PLAIN = "+ plain prompt"
TOKEN = "+ class token"
FEW_SHOT = "+ class token of a classifier of the k pictures"
INVERTED = "+ textual inversion"
CONDITIONS = (REAL, PLAIN, TOKEN, FEW_SHOT, INVERTED)
CHEAP = (REAL, PLAIN, TOKEN)  # these run for every k
CONTRASTS = ((TOKEN, REAL), (TOKEN, PLAIN), (TOKEN, INVERTED), (FEW_SHOT, REAL), (FEW_SHOT, PLAIN))
Results = dict[str, dict[int, list[float]]]  # accuracy by class of every condition and k


def draw_condition(
    study: Study, condition: str, seed: int, few: Sets | None = None, classifier: str = ""
) -> Sets:
    """Draw what a condition adds to the `few` real pictures, with a training for each seed.

    Seeds count from 0; `classifier` is the folder of one that was trained on `few` alone.
    """
    options = study.options
    first = list_seeds(study)[seed]
    vectors, phrase = dict.fromkeys(study.targets), None
    if condition == TOKEN:
        vectors = load_vectors(learn_tokens(study, seed=first))
    elif condition == FEW_SHOT:
        folders = learn_tokens(
            study,
            classifier=classifier,
            labels=None,
            evaluator=None,
            epoch_size=options.epoch_size,
            num_train_epochs=options.updates,
            seed=first,
        )
        vectors = load_vectors(folders)
    elif condition == INVERTED:
        steps = options.inversion_steps
        of_steps, _ = invert_pictures(study, few, [steps], seed)
        vectors, phrase = of_steps[steps], study.config.placeholder_token
    return draw_sets(study, vectors, options.images, phrase=phrase)


def measure_condition(
    study: Study, condition: str, k: int, seed: int, real: Sets, test: Samples
) -> list[float]:
    """Measure test accuracy by class with k real pictures per class, different for each seed."""
    options = study.options
    first = options.test + max(options.k) * seed
    few = {target: files[first : first + k] for target, files in real.items()}
    training = {
        "k": k,
        "seed": seed,
        "first": first,
        "steps": options.steps,
        "batch": BATCH,
        "pictures": stamp_sets(few),
    }
    classifier = study.work / "classifiers" / digest_training(study.config, **training)

    def train_and_measure() -> list[float]:
        parts = [load_sets(few)]
        if condition != REAL:
            drawn = draw_condition(study, condition, seed, few, str(classifier))
            parts.append(load_sets(drawn))
        title = f"k = {k}, seed {seed}, {condition}"
        labels = study.session.labels
        model = train_classifier(labels, parts, options.steps, BATCH, seed, title)
        if condition == REAL:
            save_classifier(model, classifier)
        return measure_classifier(model, *test)

    return cached_result(
        study,
        train_and_measure,
        condition=condition,
        **training,
        first_seed=list_seeds(study)[seed],
        test=options.test,
        images=options.images,
        tokens=[options.epoch_size, options.updates, options.inversion_steps],
    )


def measure_conditions(study: Study, real: Sets, test: Samples) -> Results:
    """Measure the accuracy by class of every condition and k, averaged over seeds."""
    options = study.options
    results: Results = {}
    for condition in CONDITIONS:
        results[condition] = {}
        for k in options.k:
            if condition not in CHEAP and k not in options.trained:
                continue
            of_seeds = []
            for seed in range(options.seeds):
                of_seeds.append(measure_condition(study, condition, k, seed, real, test))
            results[condition][k] = [mean(shares) for shares in zip(*of_seeds, strict=True)]
    return results


def compare_conditions(results: Results) -> dict[str, Comparison]:
    """Test CONTRASTS at every k that both conditions have."""
    tests = {}
    for ours, theirs in CONTRASTS:
        for k, accuracies in results[ours].items():
            if k in results[theirs]:
                test = compare_classes(accuracies, results[theirs][k])
                tests[f"k = {k}, '{ours}' vs. '{theirs}'"] = test
    return correct_pvalues(tests)


def measure_right(study: Study, condition: str, seeds: int) -> Interval:
    """Measure the share of drawn pictures that show their class."""
    sets = [draw_condition(study, condition, seed) for seed in range(seeds)]
    return interval_over_classes([mean(shares) for shares in judge_sets(study, sets).values()])


def main(argv: list[str] | None = None):
    """Train every classifier, and publish the page."""
    quick = {"k": [1, 2], "seeds": 2, "images": 2, "test": 2, "steps": 2, "inversion_steps": 2}
    options = parse_options(
        __doc__,
        argv,
        "all",
        quick=quick,
        real_images=None,
        k=[1, 2, 5, 10],
        trained=[2],
        seeds=3,
        images=12,
        test=60,
        steps=120,
        inversion_steps=120,
        epoch_size=8,
        updates=12,
    )
    study = open_study(options)
    real = load_real_images(study, options.test + max(options.k) * options.seeds)
    test = load_sets({target: files[: options.test] for target, files in real.items()})
    results = measure_conditions(study, real, test)
    curves = {}
    for condition, by_k in results.items():
        curves[condition] = {str(k): interval_over_classes(values) for k, values in by_k.items()}
    plot_curves(
        study.out / "augmentation.png",
        "real pictures per class (k)",
        "accuracy on real pictures",
        curves,
    )
    right = {
        PLAIN: measure_right(study, PLAIN, 1),
        TOKEN: measure_right(study, TOKEN, options.seeds),
    }
    publish_result(study, write_result(study, results, curves, right))


def write_result(
    study: Study,
    results: Results,
    curves: dict[str, dict[str, Interval]],
    right: dict[str, Interval],
) -> StudyResult:
    """Make the study's page; `curves` holds the accuracy over classes of every condition and k."""
    options = study.options
    least = str(options.k[0])
    rows = []
    for condition, by_k in curves.items():
        rows.append([condition, *(by_k.get(str(k), "") for k in options.k)])
    note = (
        f"Accuracy by class on {options.test} real pictures each, over {options.seeds} seeds, each "
        f"with its own real pictures. {right[PLAIN]} of the pictures of '{PLAIN}' and "
        f"{right[TOKEN]} of those of '{TOKEN}' show their class. The classifier behind '{TOKEN}' "
        f"was trained on far more than k pictures; the one behind '{FEW_SHOT}' is that of "
        f"'{REAL}', and its tokens had at most {options.updates} updates of {options.epoch_size} "
        f"pictures; textual inversion had {options.inversion_steps} steps. Empty cells were not "
        "run (`--trained`). All classes of a cell share one classifier per seed, so their "
        "accuracies are not independent and the p-values are only indicative."
    )
    data = {
        "accuracies": results,
        "steps": options.steps,
        "drawn": options.images,
        "right": right,
    }
    return StudyResult(
        "augmentation",
        EXPLORATORY,
        "Pictures drawn with class tokens help to train a classifier from few real ones",
        f"Accuracy at k = {least}: {curves[REAL][least]} from real pictures alone, "
        f"{curves[TOKEN][least]} with class tokens' pictures added.",
        Table(["trained on", *(f"k = {k}" for k in options.k)], rows),
        note,
        data,
        compare_conditions(results),
    )


if __name__ == "__main__":
    run_script(main)
