"""The baseline: textual inversion (Gal et al. 2023), compared with the class token.

    python -m experiments.textual_inversion
    python -m experiments.textual_inversion --config configs/imagenet.yml --real_images DIR
        --class_index 283

The recipe is that of diffusers' script (method/textual_inversion.py): 300 steps, initialised with
the class name's first word. The new word stands alone in the prompt, as it was learned, or before
the class name. Whether inversion also learns the context of its pictures is tested with pictures
that all show snow: does a plain prompt then show snow too?
"""

import argparse
import math
import random
import time
from statistics import mean
from typing import NamedTuple

import torch

from evaluation.accuracy import measure_context
from evaluation.fidelity import extract_files
from evaluation.read_image import load_squares
from evaluation.statistics import (
    NEAREST_K,
    Comparison,
    compare_classes,
    correct_pvalues,
    interval_over_classes,
    measure_prdc,
)
from evaluation.tables import Table
from experiments.material import (
    WORLD,
    Sets,
    Vectors,
    cached_result,
    draw_sets,
    learn_tokens,
    load_real_images,
    load_vectors,
    measure_cost,
    stamp_sets,
)
from experiments.plots import plot_panels
from experiments.study import TESTED, Study, StudyResult, open_study, parse_options, publish_result
from experiments.trainings import describe_clear, judge_sets, list_seeds
from method.textual_inversion import LR, PER_STEP, embed_first_word, learn_vectors
from miniature import world
from models.extractors import classifier_extractor
from system.tensor_files import save_image
from system.terminal import run_script
from utils import require

TAKEN_ALONG = "in the snow"  # the context of every picture that SNOWY learns from
CONTEXTS = ("A painting of a {}", "A photo of a {} in the snow")
PLAIN = "no token"
TOKEN = "class token"
ALONE = "inversion, alone"
NOUN = "inversion, with the noun"
TIMED = "inversion, alone, in the token's time"
SNOWY = "inversion of snow, alone"
CONTRASTS = (
    ("accuracy", TOKEN, ALONE),
    ("accuracy", TOKEN, NOUN),
    ("accuracy", TOKEN, TIMED),
    ("coverage", TOKEN, ALONE),
    ("snow", SNOWY, ALONE),
)


class Condition(NamedTuple):
    """How the pictures of a row are made."""

    trainings: list[Vectors]
    phrase: str | None  # in the place of '<placeholder> <class name>'
    pictures: int  # real ones per class
    seconds: float  # per class


def invert_pictures(
    study: Study, real: Sets, steps: list[int], seed: int = 0
) -> tuple[dict[int, Vectors], float]:
    """Learn every class's vectors [K, D] from its pictures, after each of `steps`.

    Also returns a class's seconds per step. Cached.
    """

    def run_inversion() -> dict:
        started = time.monotonic()
        found = learn_pictures(study, real, steps, seed)
        learned = {step: vectors.tolist() for step, vectors in found.items()}
        seconds = (time.monotonic() - started) / len(real) / max(steps)
        return {"vectors": learned, "seconds": seconds}

    found = cached_result(
        study,
        run_inversion,
        steps=steps,
        per_step=PER_STEP,
        lr=LR,
        flipped=True,
        seed=seed,
        pictures=stamp_sets(real),
    )
    learned = {}
    for step, vectors in found["vectors"].items():
        learned[int(step)] = dict(zip(real, torch.tensor(vectors), strict=True))
    return learned, found["seconds"]


def learn_pictures(
    study: Study, real: Sets, steps: list[int], seed: int = 0
) -> dict[int, torch.Tensor]:
    """Learn the vectors [C, K, D] of the classes of `real` after each of `steps`."""
    config, generator = study.config, study.session.generator
    pictures = [load_squares(files, config.height, config.width) for files in real.values()]
    start = [embed_first_word(generator, target.name, config.initializer_token) for target in real]
    return learn_vectors(
        generator,
        pictures,
        torch.stack(start),
        config.placeholder_token,
        steps,
        config.weight_decay,
        seed,
    )


def draw_snowy_pictures(study: Study) -> Sets:
    """Draw `--main_k` pictures of every class in the miniature's world, all TAKEN_ALONG."""
    sets = {}
    for target in study.targets:
        folder = study.work / "snowy" / target.folder
        sets[target] = [folder / f"{i}.png" for i in range(study.options.main_k)]
        for i, file in enumerate(sets[target]):
            if not file.exists():
                noise = random.Random(f"{target.index} {i}")
                save_image(world.draw(target.label, noise, TAKEN_ALONG), file)
    return sets


def measure_condition(
    study: Study, condition: Condition, truth: Sets, images: int
) -> dict[str, list[float]]:
    """Measure, by class, what the pictures of several trainings' vectors show."""
    sets = []
    for vectors in condition.trainings:
        sets.append(draw_sets(study, vectors, images, phrase=condition.phrase))
    right = [mean(shares) for shares in judge_sets(study, sets).values()]
    diversities = [measure_diversity(study, part, truth) for part in sets]
    found = {"accuracy": right}
    for name in ("coverage", "distance"):
        of_trainings = [diversity[name] for diversity in diversities]
        found[name] = [mean(values) for values in zip(*of_trainings, strict=True)]
    judge = study.config.context_judge
    if judge:
        found["snow"] = []
        for target in sets[0]:
            shares = [measure_context(judge, TAKEN_ALONG, part[target]).value for part in sets]
            found["snow"].append(mean(shares))
    return found


def measure_diversity(study: Study, sets: Sets, truth: Sets) -> dict[str, list[float]]:
    """Measure every class's coverage of the real pictures `truth`, and the distance of pictures.

    On the judge's features. The distance is the mean over two pictures in `sets`, relative to two
    real ones.
    """
    extractor = classifier_extractor(study.session.judge)
    found = {"coverage": [], "distance": []}
    for target, files in sets.items():
        real = extract_files(extractor, truth[target])
        drawn = extract_files(extractor, files)
        neighbours = measure_prdc(real, drawn, study.options.nearest_k)
        found["coverage"].append(neighbours["coverage"])
        found["distance"].append((torch.pdist(drawn).mean() / torch.pdist(real).mean()).item())
    return found


def measure_contexts(
    study: Study, conditions: dict[str, Condition], images: int
) -> dict[str, dict]:
    """Measure accuracy in other prompts, and how many pictures keep the context, by class.

    Of the first training. The latter only if the config has a judge of contexts.
    """
    judge = study.config.context_judge
    found = {}
    for context in CONTEXTS:
        for name, condition in conditions.items():
            sets = draw_sets(study, condition.trainings[0], images, context, condition.phrase)
            right = [mean(shares) for shares in judge_sets(study, [sets]).values()]
            kept = []
            if judge:
                kept = [measure_context(judge, context, files).value for files in sets.values()]
            found[f"{name}: {context}"] = {"accuracy": right, "kept": kept}
    return found


def invert_few(study: Study, real: Sets, k: int, steps: int, seed: int) -> tuple[Vectors, float]:
    """Learn from k pictures per class, different for each seed; also the seconds per step."""
    first = seed * max(study.options.k)
    few = {target: files[first : first + k] for target, files in real.items()}
    learned, seconds = invert_pictures(study, few, [steps], seed)
    return learned[steps], seconds


def list_conditions(study: Study, real: Sets) -> dict[str, Condition]:
    """List the conditions of CONTRASTS."""
    options, word = study.options, study.config.placeholder_token
    runs = [learn_tokens(study, seed=seed) for seed in list_seeds(study)]
    token_seconds = mean(measure_cost(folders, "seconds") for folders in runs)
    tokens = [load_vectors(folders) for folders in runs]

    k, steps = options.main_k, options.steps
    _, per_step = invert_few(study, real, k, steps, 0)
    as_long = max(1, math.ceil(token_seconds / per_step))
    learned, timed = [], []
    for seed in range(options.seeds):
        learned.append(invert_few(study, real, k, steps, seed)[0])
        timed.append(invert_few(study, real, k, as_long, seed)[0])
    cost = per_step * steps
    conditions = {
        TOKEN: Condition(tokens, None, 0, token_seconds),
        ALONE: Condition(learned, word, k, cost),
        NOUN: Condition(learned, None, k, cost),
        TIMED: Condition(timed, word, k, per_step * as_long),
    }
    if study.config.real_images == WORLD:
        pictures = draw_snowy_pictures(study)
        snowy = []
        for seed in range(options.seeds):
            of_steps, _ = invert_pictures(study, pictures, [steps], seed)
            snowy.append(of_steps[steps])
        conditions[SNOWY] = Condition(snowy, word, k, cost)
    return conditions


def measure_by_k(study: Study, real: Sets, truth: Sets) -> dict[tuple[str, int], list[float]]:
    """Measure accuracy by class of one training with k pictures, alone and with the noun."""
    options, word = study.options, study.config.placeholder_token
    found = {}
    for k in options.k:
        vectors, _ = invert_few(study, real, k, options.steps, 0)
        for name, phrase in ((ALONE, word), (NOUN, None)):
            condition = Condition([vectors], phrase, k, 0.0)
            measured = measure_condition(study, condition, truth, options.k_images)
            found[name, k] = measured["accuracy"]
    return found


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the study's options; raise UserError for fewer pictures than neighbours."""
    quick = {
        "k": [1, 2],
        "main_k": 2,
        "seeds": 2,
        "steps": 2,
        "images": 4,
        "k_images": 4,
        "truth": 6,
        "nearest_k": 1,
    }
    options = parse_options(
        __doc__,
        argv,
        "all",
        quick=quick,
        real_images=None,
        k=[1, 3, 5, 10],
        main_k=5,
        seeds=3,
        steps=300,
        images=20,
        k_images=10,
        truth=100,
        nearest_k=NEAREST_K,
    )
    require(
        min(options.images, options.k_images) > options.nearest_k,
        f"--images and --k_images must be greater than --nearest_k {options.nearest_k}",
    )
    return options


def compare_conditions(found: dict[str, dict]) -> dict[str, Comparison]:
    """Test CONTRASTS, as far as they were measured."""
    tests = {}
    for measure, ours, theirs in CONTRASTS:
        if ours in found and measure in found[ours]:
            test = compare_classes(found[ours][measure], found[theirs][measure])
            tests[f"{measure}, {ours} vs. {theirs}"] = test
    return correct_pvalues(tests)


def main(argv: list[str] | None = None):
    """Learn by both methods, measure, and publish the page."""
    options = read_options(argv)
    study = open_study(options)
    learned_from = max(options.k) * options.seeds
    real = load_real_images(study, learned_from + options.images + options.truth)
    truth, more = {}, {}
    for target, files in real.items():
        truth[target] = files[-options.truth :]
        more[target] = files[-options.truth - options.images : -options.truth]

    conditions = list_conditions(study, real)
    plain = Condition([dict.fromkeys(real)], None, 0, 0.0)
    found = {}
    for name, condition in {PLAIN: plain, **conditions}.items():
        found[name] = measure_condition(study, condition, truth, options.images)
    by_k = measure_by_k(study, real, truth)
    in_contexts = {name: conditions[name] for name in (TOKEN, ALONE, NOUN)}
    contexts = measure_contexts(study, in_contexts, options.k_images)
    tests = compare_conditions(found)
    plot_result(study, found, by_k)
    ceiling = measure_diversity(study, more, truth)
    data = {
        "methods": found,
        "by_k": {f"{name}, k = {k}": values for (name, k), values in by_k.items()},
        "contexts": contexts,
        "ceiling": ceiling,
    }
    publish_result(
        study,
        StudyResult(
            "textual_inversion",
            TESTED,
            "The class token compared with textual inversion",
            describe_clear(tests),
            make_table(conditions, found, contexts, ceiling),
            write_note(options),
            data,
            tests,
        ),
    )


def write_note(options: argparse.Namespace) -> str:
    """Write what the table rests on."""
    return (
        f"{options.seeds} trainings and {options.images} held-out pictures per class and training; "
        "other prompts and the left half of the figure use one training and "
        f"{options.k_images} pictures. Coverage is of {options.truth} real pictures per class; "
        "distances are relative to the distance of two real pictures. Inversion takes "
        f"{options.steps} steps of {PER_STEP} pictures; '{TIMED}' takes as many steps as fit into "
        "the class token's seconds, both measured in this run. The class token needs no real "
        "pictures, but a classifier that was trained on some."
    )


def plot_result(study: Study, found: dict[str, dict], by_k: dict[tuple[str, int], list[float]]):
    """Write the study's figure."""
    options = study.options
    curves = {}
    for name in (ALONE, NOUN):
        curves[name] = {k: interval_over_classes(by_k[name, k]) for k in options.k}
    points = {name: interval_over_classes(of["accuracy"]) for name, of in found.items()}
    panels = {
        "real pictures per class (one training: exploratory)": curves,
        f"({options.seeds} trainings)": {"": points},
    }
    plot_panels(study.out / "textual_inversion.png", "accuracy", panels)


def make_table(
    conditions: dict[str, Condition], found: dict[str, dict], contexts: dict, ceiling: dict
) -> Table:
    """Make a table: a row per condition, one for real pictures, and one per other prompt."""
    header = [
        "",
        "accuracy",
        "coverage",
        "distance of two pictures",
        "shows snow",
        "real pictures per class",
        "seconds per class",
    ]
    rows = []
    for name, measured in found.items():
        cells = []
        for measure in ("accuracy", "coverage", "distance", "snow"):
            values = measured.get(measure)
            cells.append(interval_over_classes(values) if values else "")
        cost = ["", ""]
        if name in conditions:
            cost = [conditions[name].pictures, f"{conditions[name].seconds:.1f}"]
        rows.append([name, *cells, *cost])
    coverage = interval_over_classes(ceiling["coverage"])
    distance = interval_over_classes(ceiling["distance"])
    rows.append(["real pictures", "", coverage, distance, "", "", ""])
    for name, measured in contexts.items():
        rows.append([name, interval_over_classes(measured["accuracy"]), "", "", "", "", ""])
    return Table(header, rows)


if __name__ == "__main__":
    run_script(main)
