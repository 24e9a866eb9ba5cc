"""Claim (ii): pictures drawn with class tokens help to train a classifier from a handful of real ones.

    python -m experiments.augmentation
    python -m experiments.augmentation --config configs/cub.yml --real_images DIR --class_index 1-20 --test 10

A small classifier learns from k real pictures per class, alone or with as many drawn pictures in every batch: of the
plain prompt, with class tokens, with class tokens whose guide itself saw the same k pictures alone, of textual
inversion from the same k. All arms have the same steps and standard augmentation; real pictures that no arm saw are
the test. The config's own guide was trained on far more than k pictures, and its tokens bring what it knows.
"""

from functools import partial
from pathlib import Path
from statistics import mean

from evaluation.tables import Table
from experiments import common, small
from experiments.common import mean_with_error, standard_error
from experiments.textual_inversion import Sets, invert_pictures
from utils import require

BATCH, WIDTH = 32, 16  # of every classifier
REAL, PLAIN, TOKEN, GUIDED, INVERTED = ARMS = (
    "real alone", "+ plain prompt", "+ class token", "+ class token, guide of the k pictures", "+ textual inversion")


def draw_set(lab: common.Lab, arm: str, options, few: Sets | None = None, guide: Path | None = None,
             key: str = "") -> Sets:
    """What an arm adds to the `few` real pictures, which `key` names; `guide` is the classifier that saw them alone."""
    phrase, vectors = None, dict.fromkeys(lab.targets)
    if arm == INVERTED:
        vectors, _ = invert_pictures(lab, few, lab.work / f"textual_inversion/{key}.json", options.inversion_steps)
        phrase = lab.config.placeholder_token
    elif arm in (TOKEN, GUIDED):
        runs = common.learn_tokens(lab, "token") if arm == TOKEN else common.learn_tokens(
            lab, "guided", classifier=str(guide), epoch_size=options.epoch_size, num_train_epochs=options.updates)
        vectors = {target: common.load_vectors(run) for target, run in runs.items()}
    name = {PLAIN: "without", TOKEN: "with", GUIDED: f"guide_{key}", INVERTED: f"textual_inversion_{key}"}[arm]
    return {target: common.draw_class(lab, target, name, of_class, options.images, phrase=phrase)
            for target, of_class in vectors.items()}


def measure_arms(lab: common.Lab, k: int, seed: int, real: Sets, test, options) -> dict[str, float]:
    """{arm: test accuracy} for k pictures per class, which are of this seed alone; all are cached."""
    first, key = options.test + max(options.k) * seed, f"k{k}_seed{seed}"
    few = {target: files[first:first + k] for target, files in real.items()}
    guide = lab.work / "guides" / f"{key}_{first}_{options.steps}_{BATCH}_{WIDTH}"

    def train_arm(arm: str) -> float:
        sets = [few] if arm == REAL else [few, draw_set(lab, arm, options, few, guide, key)]
        model = small.train_classifier(small.new_classifier(lab.labels, seed, WIDTH), list(map(small.load_sets, sets)),
                                       options.steps, seed, f"k = {k}, seed {seed}, {arm}", BATCH)
        if arm == REAL:
            small.save_classifier(model, guide)
        return small.measure_classifier(model, *test)

    settings = common.list_settings(
        lab, k=k, test=options.test, first=first, images=options.images, classifier=[options.steps, BATCH, WIDTH],
        tokens=[options.epoch_size, options.updates, options.inversion_steps])
    return {arm: common.cached_result(lab.work / "augmentation" / f"{key}_{i}.json", {**settings, "arm": arm},
                                      partial(train_arm, arm))
            for i, arm in enumerate(ARMS) if arm in (REAL, PLAIN, TOKEN) or k in options.trained}


def main(argv: list[str] | None = None):
    parser = common.build_parser(__doc__, "7,8,13,14")
    parser.add_argument("--real_images", help="a folder of real pictures, as for run.py (the config's)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 5, 10], help="real pictures per class (1 2 5 10)")
    parser.add_argument("--trained", type=int, nargs="*", default=[2],
                        help="for which k the costly arms run too, whose tokens are trained from the k pictures (2)")
    for name, default, text in (
            ("seeds", 5, "sets of real pictures, and of starts"), ("images", 12, "drawn pictures per class"),
            ("test", 60, "real pictures per class for the test"), ("steps", 80, "of every classifier"),
            ("inversion_steps", 120, "of textual inversion"), ("epoch_size", 8, "pictures per update of the tokens "
            "whose guide saw k pictures"), ("updates", 12, "of these tokens at most")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    options = parser.parse_args(argv)
    require(options.seeds > 1, "--seeds must be greater than 1, for a standard error")
    lab = common.open_lab(options, **({"real_images": options.real_images} if options.real_images else {}))
    real = common.load_real_images(lab, options.test + max(options.k) * options.seeds)
    test = small.load_sets({target: files[:options.test] for target, files in real.items()})
    results = {k: [measure_arms(lab, k, seed, real, test, options) for seed in range(options.seeds)]
               for k in options.k}
    report_arms(lab, {arm: {k: [found[arm] for found in results[k]] for k in results if arm in results[k][0]}
                      for arm in ARMS if any(arm in found[0] for found in results.values())}, options)


def report_arms(lab: common.Lab, accuracies: dict[str, dict[int, list[float]]], options):
    """Publish the figure and the table of {arm: {k: accuracy by seed}}."""
    figure, axis = common.new_axes(6, 3.6)
    for arm, by_k in accuracies.items():
        axis.errorbar(list(by_k), list(map(mean, by_k.values())), yerr=list(map(standard_error, by_k.values())),
                      fmt="o-", capsize=3, label=arm)
    axis.set(xscale="log", xlabel="real pictures per class (k)", ylabel="accuracy on real pictures")
    axis.minorticks_off()
    axis.set_xticks(options.k, list(map(str, options.k)))
    common.save_figure(figure, lab.out / "augmentation.png")
    k = 2 if 2 in options.k else options.k[0]
    gains = {arm: [100 * (ours - theirs) for ours, theirs in zip(accuracies[TOKEN][k], by_k[k], strict=True)]
             for arm, by_k in accuracies.items() if arm != TOKEN and k in by_k}
    right = {arm: common.measure_accuracy(lab, draw_set(lab, arm, options)) for arm in (PLAIN, TOKEN)}
    table = Table(
        ["trained on", *(f"k = {k}" for k in options.k)],
        [[arm, *(mean_with_error(by_k[k]) if k in by_k else "" for k in options.k)]
         for arm, by_k in accuracies.items()],
        note=f"Test accuracy (standard error) over {options.seeds} seeds, each with real pictures and a start of its "
             f"own, and {options.images} drawn pictures per class, the same for all seeds but in the arms of the k "
             f"pictures. Test: {options.test} real pictures per class. {right[PLAIN]} of the drawn pictures show the "
             f"class that they are labelled with ('{PLAIN}'), and {right[TOKEN]} ('{TOKEN}'), by "
             f"{common.judge_name(lab)}: classes that share a name share their plain pictures.\n\nThe guide of "
             f"'{TOKEN}', '{lab.config.classifier}', was trained on far more than k pictures, and its tokens bring "
             f"what it knows. That of '{GUIDED}' is '{REAL}' itself; its tokens have {options.updates} updates of "
             f"{options.epoch_size} pictures at most. Empty cells were not run: they need tokens for every k and seed "
             "(`--trained`).")
    common.publish_result(
        lab, "augmentation", "Pictures drawn with class tokens help to train a classifier from few real ones",
        f"At k = {k}, class tokens' pictures bring " + ", ".join(
            f"{mean(gain):.1f} points (standard error {standard_error(gain):.1f}) more than '{arm}'"
            for arm, gain in gains.items()) + ".", table,
        {"accuracies": accuracies, "steps": options.steps, "drawn": options.images, "right": right}, "augmentation.png")


if __name__ == "__main__":
    common.run_script(main)
