"""Claim (ii): pictures drawn with class tokens help to train a classifier from a handful of real ones.

    python -m experiments.augmentation
    python -m experiments.augmentation --config configs/cub.yml --real_images DIR --class_index 1-20 --test 10

A small classifier learns from k real pictures a class, alone or with as many drawn pictures in every batch: of the
plain prompt, with class tokens, with class tokens whose guide itself saw the same k pictures alone, of textual
inversion from the same k. All arms have the same steps and standard augmentation; real pictures that no arm saw are
the test. The config's own guide was trained on far more than k pictures: what its tokens bring includes what it knows;
the tokens of the k-picture guide have no such help.
"""

import functools
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from evaluation import interval
from experiments import small
from experiments.common import (
    Lab,
    kept,
    open_lab,
    parser,
    pictures,
    publish,
    pyplot,
    real_pictures_of,
    save_figure,
    script,
    settings_of,
    share_right,
    tokens,
    vector_of,
)
from experiments.textual_inversion import learn
from utils import require

STEPS, BATCH, WIDTH = 80, 32, 16  # of every classifier
BRIEFLY = {"epoch_size": 8, "num_train_epochs": 12}  # the training of the tokens whose guides saw k pictures
REAL, PLAIN, TOKEN, GUIDED, INVERTED = (
    "real alone", "+ plain prompt", "+ class token", "+ class token, guide of the k pictures", "+ textual inversion")


def drawn_sets(lab: Lab, arm: str, real: dict[int, list[Path]], guide: Path, key: str, images: int):
    """{class: pictures} that an arm adds to the k real ones; `key` names k and the seed."""
    placeholder = lab.config.placeholder_token
    if arm == PLAIN:
        return {index: pictures(lab, index, "without", None, images) for index in real}
    if arm == TOKEN:
        return {index: pictures(lab, index, "with", vector_of(folder), images)
                for index, folder in tokens(lab, "token").items()}
    if arm == GUIDED:
        folders = tokens(lab, "guided", classifier=guide, **BRIEFLY)
        return {index: pictures(lab, index, f"guide_{key}", vector_of(folder), images)
                for index, folder in folders.items()}
    vectors = learn(lab, real, lab.work / "textual_inversion" / f"{key}.json")["vectors"]
    return {index: pictures(lab, index, f"textual_inversion_{key}", vector, images, phrase=placeholder)
            for index, vector in vectors.items()}


def accuracies_of(lab: Lab, k: int, seed: int, real: dict[int, list[Path]], test, options) -> dict[str, float]:
    """{arm: test accuracy} for k pictures a class, which are of this seed alone; kept as each is known."""
    first = options.test + max(options.k) * seed
    few = {index: files[first:first + k] for index, files in real.items()}
    key, decisive = f"k{k}_seed{seed}", {"test": options.test, "first": first, "images": options.images,
                                         "classifier": [STEPS, BATCH, WIDTH], "briefly": BRIEFLY}
    guide = lab.work / "guides" / f"{key}_{first}_{STEPS}_{BATCH}_{WIDTH}"

    def trained(arm):
        parts = [small.as_tensors(few)]
        if arm != REAL:
            parts.append(small.as_tensors(drawn_sets(lab, arm, few, guide, key, options.images)))
        model = small.fit(small.new_classifier(lab.labels, seed, WIDTH), parts, STEPS, seed,
                          f"k = {k}, seed {seed}, {arm}", BATCH)
        if arm == REAL:
            small.save(model, guide)
        return small.accuracy(model, *test)

    arms = (REAL, PLAIN, TOKEN, *([GUIDED, INVERTED] if k in options.trained else []))
    return {arm: kept(lab.work / "augmentation" / f"{key}_{i}.json", settings_of(lab, arm=arm, k=k, **decisive),
                      functools.partial(trained, arm)) for i, arm in enumerate(arms)}


def compared(results: dict[int, list[dict]], k: int, arm: str, with_what: str) -> tuple[float, float]:
    """Mean difference of two arms at k and its standard error, paired over seeds."""
    differences = [each[arm] - each[with_what] for each in results[k]]
    return mean(differences), stdev(differences) / sqrt(len(differences))


def main():
    arguments = parser(__doc__, "7,8,13,14")
    arguments.add_argument("--real_images", help="a folder of real pictures, as for run.py (the config's)")
    arguments.add_argument("--k", type=int, nargs="+", default=[1, 2, 5, 10], help="real pictures a class (1 2 5 10)")
    arguments.add_argument("--trained", type=int, nargs="*", default=[2],
                           help="for which k the costly arms run too, whose tokens are trained from the k pictures (2)")
    arguments.add_argument("--seeds", type=int, default=5, help="sets of real pictures, and of starts (5)")
    arguments.add_argument("--images", type=int, default=12, help="drawn pictures a class (12)")
    arguments.add_argument("--test", type=int, default=60, help="real pictures a class for the test (60)")
    options = arguments.parse_args()
    require(options.seeds > 1, "--seeds must be greater than 1, for a standard error")
    lab = open_lab(options, **({"real_images": options.real_images} if options.real_images else {}))
    real = real_pictures_of(lab, options.test + max(options.k) * options.seeds)
    test = small.as_tensors({index: files[:options.test] for index, files in real.items()})
    results = {k: [accuracies_of(lab, k, seed, real, test, options) for seed in range(options.seeds)]
               for k in options.k}
    report(lab, results, options)


def report(lab: Lab, results: dict[int, list[dict]], options):
    arms = [arm for arm in (REAL, PLAIN, TOKEN, GUIDED, INVERTED) if any(arm in each[0] for each in results.values())]
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    rows = []
    for arm in arms:
        values = {k: [each[arm] for each in seeds] for k, seeds in results.items() if arm in seeds[0]}
        errors = {k: stdev(each) / sqrt(len(each)) for k, each in values.items()}
        axis.errorbar(list(values), [mean(each) for each in values.values()], yerr=list(errors.values()), fmt="o-",
                      capsize=3, label=arm)
        rows.append([arm, *(f"{mean(values[k]):.2f} ({errors[k]:.2f})" if k in values else "" for k in results)])
    axis.set_xscale("log")
    axis.set_xticks(list(results), [str(k) for k in results])
    axis.set(xlabel="real pictures a class (k)", ylabel="accuracy on real pictures")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, lab.out / "augmentation.png")
    k = 2 if 2 in results else options.k[0]
    against = {other: compared(results, k, TOKEN, other) for other in (REAL, PLAIN, GUIDED, INVERTED)
               if other in results[k][0]}
    bears = {arm: interval(share_right(lab, drawn_sets(lab, arm, dict.fromkeys(lab.classes), Path(), "",
                                                       options.images))) for arm in (PLAIN, TOKEN)}
    publish(lab, "augmentation", "Pictures drawn with class tokens help to train a classifier from few real ones",
            f"At k = {k}, class tokens' pictures bring " + ", ".join(
                f"{100 * difference:.1f} points (standard error {100 * error:.1f}) more than '{other}'"
                for other, (difference, error) in against.items()) + ".",
            ["trained on", *(f"k = {k}" for k in results)], rows,
            {"accuracies": {str(k): seeds for k, seeds in results.items()}, "steps": STEPS, "drawn": options.images,
             "right": bears, "classes": [lab.title(index) for index in lab.classes]},
            f"Test accuracy (standard error) over {options.seeds} seeds, each with real pictures and a start of its "
            f"own, and {options.images} drawn pictures a class, the same for all seeds but in the arms of the k "
            f"pictures; {options.test} real test pictures a class, drawn by the world where it draws its own. Of the "
            f"drawn ones {bears[PLAIN]} show the class that they are labelled with ('{PLAIN}'), and {bears[TOKEN]} "
            f"('{TOKEN}'), by {lab.judged}: classes that share a name share their plain pictures.\n\nThe guide of "
            f"'{TOKEN}', '{lab.config.classifier}', was trained on far more than k pictures, and its tokens bring what "
            f"it knows. That of '{GUIDED}' is '{REAL}' itself, which knows the same k pictures alone; its tokens have "
            f"{BRIEFLY['num_train_epochs']} updates of {BRIEFLY['epoch_size']} pictures at most. The empty cells were "
            "not run: they need tokens of their own for every k and seed (`--trained`).", "augmentation.png")


if __name__ == "__main__":
    script(main)
