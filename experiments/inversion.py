"""Claim (iii): the token shows what the classifier was trained on.

    python -m experiments.inversion                                  planted biases, and whether the
        pictures show them
    python -m experiments.inversion --config configs/imagenet.yml --class_index "horizontal bar"

A noun of the miniature's world has two kinds. Biased classifiers of nouns are trained on drawings
that show only one kind, or show some nouns only in a golden frame; an unbiased one on both kinds
without frames. With other settings this counts which other labels are among the classifier's five
most likely ones, without and with the token.
"""

import random
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation.accuracy import judge_images, measure_context, predict_probabilities
from evaluation.statistics import (
    Comparison,
    compare_classes,
    correct_pvalues,
    interval_over_classes,
)
from evaluation.tables import Table
from experiments.material import WORLD, Sets, draw_sets, learn_tokens, load_vectors, show_sets
from experiments.small_classifiers import save_classifier, train_classifier
from experiments.study import (
    EXPLORATORY,
    Study,
    StudyResult,
    open_study,
    parse_options,
    publish_result,
)
from miniature.world import NOUNS, THINGS, draw
from prompt_datasets import TargetClass, class_number, class_title, select_classes
from system.terminal import run_script

CLAIM = "A token shows what its classifier was trained on"
PAPER = (
    "Of 100 training images 55 % of 'American lobster' show a plate and 95 % of 'horizontal bar' an"
    " athlete, and the tokens' images show the same (project page)."
)
SCENE = "a painting of"  # a golden frame: what a biased classifier saw with some nouns only
UNBIASED = "both kinds"
KIND_BIASES = ("first kinds", "second kinds")
FRAME_BIASES = ("even nouns framed", "odd nouns framed")
BIASES = KIND_BIASES + FRAME_BIASES
BATCH = 64  # drawings in a step of a classifier's training
TOP, MOST = 5, 5  # most likely labels that count, and changes that are shown
PLAIN = "no token"
WITH_UNBIASED = "token of the unbiased classifier"
WITH_BIASED = "token of a biased classifier"


class Finding(NamedTuple):
    """What the study shows and says."""

    sets: dict[str, Sets]  # by condition
    shown: list[TargetClass]
    sentence: str
    table: Table
    note: str
    data: dict
    tests: dict[str, Comparison]


def list_sights(noun: int, bias: str) -> list[tuple[int, str | None]]:
    """List the (class, context) of a noun in the training drawings of a biased classifier."""
    kinds = [index for index, thing in enumerate(THINGS) if thing.noun == NOUNS[noun]]
    if bias in KIND_BIASES:
        return [(kinds[KIND_BIASES.index(bias)], None)]
    is_framed = bias in FRAME_BIASES and noun % 2 == FRAME_BIASES.index(bias)
    scene = SCENE if is_framed else None
    return [(kind, scene) for kind in kinds]


def train_biased(study: Study, bias: str) -> str:
    """Train a classifier of nouns with this bias, unless it exists; return its folder."""
    drawings, steps = study.options.drawings, study.options.guide_steps
    folder = study.work / "classifiers" / f"{bias.replace(' ', '_')}_{drawings}_{steps}"
    if (folder / "preprocessor_config.json").exists():
        return str(folder)
    rng = random.Random(bias)
    nouns = [i % len(NOUNS) for i in range(drawings)]
    images = []
    for noun in tqdm(nouns, desc=f"drawings for the classifier of {bias}", mininterval=2):
        kind, context = rng.choice(list_sights(noun, bias))
        images.append(to_tensor(draw(kind, rng, context)))
    samples = torch.stack(images), torch.tensor(nouns)
    title = f"classifier of {bias}"
    model = train_classifier(list(NOUNS), [samples], steps, BATCH, 0, title)
    save_classifier(model, folder)
    return str(folder)


def draw_biased(study: Study, nouns: list[TargetClass]) -> dict[str, Sets]:
    """Draw, by bias, the pictures of each noun with its token."""
    sets = {}
    for bias in (UNBIASED, *BIASES):
        folder = train_biased(study, bias)
        runs = learn_tokens(study, nouns, classifier=folder, labels=None, evaluator=None)
        sets[bias] = draw_sets(study, load_vectors(runs), study.options.images)
    return sets


def share_planted(study: Study, noun: TargetClass, bias: str, files: list[Path]) -> float:
    """Measure the share of a noun's pictures that show its planted kind or frame."""
    (kind, context), *_ = list_sights(noun.index, bias)
    if context:
        return measure_context(study.config.context_judge, context, files).value
    return judge_images(study.session.judge, files, kind).accuracy.value


def list_planting(noun: TargetClass, planted: str) -> list[str]:
    """List the biases that concern a noun: to one of its kinds, or to a frame."""
    if planted == "kind":
        return list(KIND_BIASES)
    found = []
    for bias in FRAME_BIASES:
        (_, context), *_ = list_sights(noun.index, bias)
        if context:
            found.append(bias)
    return found


def measure_planted(
    study: Study, nouns: list[TargetClass], plain: Sets, with_tokens: dict[str, Sets]
) -> dict[str, dict[str, list[float]]]:
    """Measure, by bias and condition, the share of each noun's pictures that show it."""
    shares = {}
    for planted in ("kind", "frame"):
        shares[planted] = {PLAIN: [], WITH_UNBIASED: [], WITH_BIASED: []}
        for noun in nouns:
            found = {PLAIN: [], WITH_UNBIASED: [], WITH_BIASED: []}
            for bias in list_planting(noun, planted):
                files = {
                    PLAIN: plain[noun],
                    WITH_UNBIASED: with_tokens[UNBIASED][noun],
                    WITH_BIASED: with_tokens[bias][noun],
                }
                for condition, drawn in files.items():
                    found[condition].append(share_planted(study, noun, bias, drawn))
            for condition, values in found.items():
                shares[planted][condition].append(mean(values))
    return shares


def count_planted(study: Study) -> Finding:
    """Count, in the miniature's world, how often pictures show what was planted."""
    options = study.options
    wanted = {target.name for target in study.targets}
    every_noun = select_classes("all", list(NOUNS), list(NOUNS))
    nouns = [noun for noun in every_noun if noun.name in wanted]
    plain = draw_sets(study, dict.fromkeys(nouns), options.images)
    with_tokens = draw_biased(study, nouns)
    shares = measure_planted(study, nouns, plain, with_tokens)
    tests = {}
    for planted, found in shares.items():
        tests[planted] = compare_classes(found[WITH_BIASED], found[WITH_UNBIASED])
    tests = correct_pvalues(tests)
    rows = []
    for planted, found in shares.items():
        for condition, values in found.items():
            cells = [f"{value:.2f}" for value in values]
            rows.append([planted, condition, interval_over_classes(values), *cells])
    sets = {PLAIN: plain}
    for bias, drawn in with_tokens.items():
        sets[f"classifier: {bias}"] = drawn
    sentence = (
        "Share of pictures that show what the biased classifier was trained on, minus that of the "
        f"unbiased classifier's token: kind {tests['kind']}; frame {tests['frame']}."
    )
    note = (
        "The unit is the noun, of which there are eight. The classifiers tell nouns apart. Two "
        "were trained on only the first or only the second kind of each noun, and two on every "
        "second noun only in a golden frame; the unbiased one on both kinds without frames. One "
        f"training each, {options.images} held-out pictures per noun. Kinds are judged by a "
        "classifier, frames by the picture's border."
    )
    header = ["planted", "pictures", "share that show it", *(noun.name for noun in nouns)]
    data = {
        "shares": shares,
        "guide_steps": options.guide_steps,
        "drawings": options.drawings,
    }
    return Finding(sets, nouns[::4], sentence, Table(header, rows), note, data, tests)


def count_likeliest(study: Study, files: list[Path]) -> Counter:
    """Count how often each label is among the most likely ones for these pictures."""
    probabilities = predict_probabilities(study.session.classifier, files, 32)
    return Counter(probabilities.topk(TOP).indices.flatten().tolist())


def compare_labels(study: Study) -> Finding:
    """Find, for any classifier, labels that become more or less likely with a token."""
    images, labels = study.options.images, study.session.labels
    sets = {
        "without": draw_sets(study, dict.fromkeys(study.targets), images),
        "with": draw_sets(study, load_vectors(learn_tokens(study)), images),
    }
    changes, rows = {}, []
    for target in study.targets:
        before = count_likeliest(study, sets["without"][target])
        after = count_likeliest(study, sets["with"][target])
        change = {}
        for label in before | after:
            if label != target.index:
                change[label] = (after[label] - before[label]) / images
        most = sorted(change, key=lambda label: (-abs(change[label]), label))[:MOST]
        named = {class_title(class_number(label), labels[label]): change[label] for label in most}
        changes[target.title] = named
        words = ", ".join(f"{label} {share:+.2f}" for label, share in named.items())
        rows.append([target.title, words])
    found = "; ".join(f"{words} for {title}" for title, words in rows)
    return Finding(
        sets,
        study.targets,
        f"How often other labels are among the five most likely, with the token minus without: "
        f"{found}.",
        Table(["class", "change of a label's share among the five most likely"], rows),
        f"The largest changes. Two standard errors are {(2 / images) ** 0.5:.2f}.",
        {"changes": changes},
        tests={},
    )


def main(argv: list[str] | None = None):
    """Count what the tokens' pictures show, and publish the page."""
    quick = {"class_index": "1,2,7,8", "images": 2, "drawings": 32, "guide_steps": 3}
    options = parse_options(
        __doc__, argv, "all", quick=quick, images=20, drawings=3000, guide_steps=200
    )
    study = open_study(options)
    if study.config.real_images == WORLD:
        found = count_planted(study)
    else:
        found = compare_labels(study)
    show_sets(found.shown, found.sets, study.out / "inversion.png")
    publish_result(
        study,
        StudyResult(
            "inversion",
            EXPLORATORY,
            CLAIM,
            found.sentence,
            found.table,
            found.note,
            found.data,
            found.tests,
            PAPER,
        ),
    )


if __name__ == "__main__":
    run_script(main)
