"""Claim (iii): the token shows what the classifier was trained on.

    python -m experiments.inversion                                  planted biases, and whether the
        pictures show them
    python -m experiments.inversion --config configs/imagenet.yml --class_index "horizontal bar"

A noun of the miniature's world has two kinds. Guides of nouns are trained on drawings that show one
kind alone, or some nouns in a golden frame alone, another one on both kinds without frames. With
other settings this counts the labels that the classifier sees beside the class (among its five
likeliest) without and with the token.
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
from evaluation.statistics import compare_classes, correct_pvalues, interval_over_classes
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
from experiments.trainings import describe_test
from miniature.world import NOUNS, THINGS, draw
from prompt_datasets import TargetClass, class_number, class_title, select_classes
from system.terminal import run_script

CLAIM = "A token shows what its classifier was trained on"
PAPER = (
    "Of 100 training images 55 % of 'American lobster' show a plate and 95 % of 'horizontal bar' an"
    " athlete, and the tokens' images show the same (project page)."
)
SCENE = "a painting of"  # a golden frame: what a guide saw with some nouns only
UNBIASED = "both kinds"
KIND_GUIDES = ("first kinds", "second kinds")
FRAME_GUIDES = ("even nouns framed", "odd nouns framed")
GUIDES = KIND_GUIDES + FRAME_GUIDES
BATCH = 64  # drawings in a step of a guide's training
TOP, MOST = 5, 5  # likeliest labels that count, and changes that are shown
PLAIN = "no token"
WITH_UNBIASED = "token of the unbiased guide"
WITH_BIASED = "token of the biased guide"


class Finding(NamedTuple):
    """What is shown and said of the tokens' pictures."""

    sets: dict[str, Sets]  # by condition
    shown: list[TargetClass]
    sentence: str
    table: Table
    note: str
    data: dict


def list_sights(noun: int, guide: str) -> list[tuple[int, str | None]]:
    """The (class, context) of the drawings that a guide's training shows for a noun."""
    kinds = [index for index, thing in enumerate(THINGS) if thing.noun == NOUNS[noun]]
    if guide in KIND_GUIDES:
        return [(kinds[KIND_GUIDES.index(guide)], None)]
    is_framed = guide in FRAME_GUIDES and noun % 2 == FRAME_GUIDES.index(guide)
    scene = SCENE if is_framed else None
    return [(kind, scene) for kind in kinds]


def train_guide(study: Study, guide: str) -> str:
    """The folder of a guide of nouns, trained on drawings unless it is there."""
    drawings, steps = study.options.drawings, study.options.guide_steps
    folder = study.work / "guides" / f"{guide.replace(' ', '_')}_{drawings}_{steps}"
    if (folder / "preprocessor_config.json").exists():
        return str(folder)
    rng = random.Random(guide)
    nouns = [i % len(NOUNS) for i in range(drawings)]
    images = []
    for noun in tqdm(nouns, desc=f"drawings for the guide of {guide}", mininterval=2):
        kind, context = rng.choice(list_sights(noun, guide))
        images.append(to_tensor(draw(kind, rng, context)))
    samples = torch.stack(images), torch.tensor(nouns)
    title = f"guide of {guide}"
    model = train_classifier(list(NOUNS), [samples], steps, BATCH, 0, title)
    save_classifier(model, folder)
    return str(folder)


def draw_guided(study: Study, nouns: list[TargetClass]) -> dict[str, Sets]:
    """By guide the pictures of each noun with its token."""
    sets = {}
    for guide in (UNBIASED, *GUIDES):
        folder = train_guide(study, guide)
        runs = learn_tokens(study, nouns, classifier=folder, labels=None, evaluator=None)
        sets[guide] = draw_sets(study, load_vectors(runs), study.options.images)
    return sets


def share_planted(study: Study, noun: TargetClass, guide: str, files: list[Path]) -> float:
    """Of a noun's pictures the share that shows what `guide` saw with it, its kind or its frame."""
    (kind, context), *_ = list_sights(noun.index, guide)
    if context:
        return measure_context(study.config.context_judge, context, files).value
    return judge_images(study.session.judge, files, kind).accuracy.value


def list_planting(noun: TargetClass, bias: str) -> list[str]:
    """The guides that saw something special with a noun: one of its kinds, or a frame."""
    if bias == "kind":
        return list(KIND_GUIDES)
    found = []
    for guide in FRAME_GUIDES:
        (_, context), *_ = list_sights(noun.index, guide)
        if context:
            found.append(guide)
    return found


def measure_planted(
    study: Study, nouns: list[TargetClass], plain: Sets, guided: dict[str, Sets]
) -> dict[str, dict[str, list[float]]]:
    """By bias and condition: of every noun the share of pictures that shows what its guides saw."""
    shares = {}
    for bias in ("kind", "frame"):
        shares[bias] = {PLAIN: [], WITH_UNBIASED: [], WITH_BIASED: []}
        for noun in nouns:
            found = {PLAIN: [], WITH_UNBIASED: [], WITH_BIASED: []}
            for guide in list_planting(noun, bias):
                files = {
                    PLAIN: plain[noun],
                    WITH_UNBIASED: guided[UNBIASED][noun],
                    WITH_BIASED: guided[guide][noun],
                }
                for condition, drawn in files.items():
                    found[condition].append(share_planted(study, noun, guide, drawn))
            for condition, values in found.items():
                shares[bias][condition].append(mean(values))
    return shares


def count_planted(study: Study) -> Finding:
    """In the miniature's world: how often pictures show what the guide saw with the noun."""
    options = study.options
    wanted = {target.name for target in study.targets}
    every_noun = select_classes("all", list(NOUNS), list(NOUNS))
    nouns = [noun for noun in every_noun if noun.name in wanted]
    plain = draw_sets(study, dict.fromkeys(nouns), options.images)
    guided = draw_guided(study, nouns)
    shares = measure_planted(study, nouns, plain, guided)
    tests = {}
    for bias, of_bias in shares.items():
        tests[bias] = compare_classes(of_bias[WITH_BIASED], of_bias[WITH_UNBIASED])
    tests = correct_pvalues(tests)
    rows = []
    for bias, of_bias in shares.items():
        for condition, values in of_bias.items():
            cells = [f"{value:.2f}" for value in values]
            rows.append([bias, condition, interval_over_classes(values), *cells])
    sets = {PLAIN: plain}
    for guide, of_guide in guided.items():
        sets[f"guide: {guide}"] = of_guide
    differences = [f"its {bias}: {describe_test(test)}" for bias, test in tests.items()]
    sentence = (
        "Pictures show what the guide saw with the noun, beside an unbiased guide's token: "
        f"{'; '.join(differences)}."
    )
    note = (
        "The unit is the noun, of which there are eight. The guides are classifiers of nouns. Two "
        "saw one kind of each noun alone, the first or the second, and two saw every second noun "
        "in a golden frame alone; the unbiased guide saw both kinds without frames. One training "
        f"each, {options.images} held-out pictures per noun. Kinds are judged by a classifier, "
        "frames by the picture's border."
    )
    header = ["planted", "pictures", "share that shows it", *(noun.name for noun in nouns)]
    data = {
        "shares": shares,
        "tests": tests,
        "guide_steps": options.guide_steps,
        "drawings": options.drawings,
    }
    return Finding(sets, nouns[::4], sentence, Table(header, rows), note, data)


def count_likeliest(study: Study, files: list[Path]) -> Counter:
    """How often each label is among the likeliest of these pictures, according to the guide."""
    probabilities = predict_probabilities(study.session.classifier, files, 32)
    return Counter(probabilities.topk(TOP).indices.flatten().tolist())


def compare_labels(study: Study) -> Finding:
    """For any classifier: labels that are among the likeliest more or less often with a token."""
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
        f"Labels come more, or less, often with the token: {found}.",
        Table(["class", "change of a label's share among the five likeliest"], rows),
        f"The largest changes, certain to {(2 / images) ** 0.5:.2f} (two standard errors).",
        {"changes": changes},
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
            PAPER,
        ),
    )


if __name__ == "__main__":
    run_script(main)
