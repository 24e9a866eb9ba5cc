"""Claim (iii): the token shows what the classifier was trained on.

    python -m experiments.inversion                                  planted biases, and whether the pictures show them
    python -m experiments.inversion --config configs/imagenet.yml --class_index "horizontal bar"

A noun of the miniature's world has two kinds. Guides of nouns are trained on drawings that show one kind alone, or some
nouns in a golden frame alone, another one on both kinds without frames. With other settings this counts the labels that
the classifier sees beside the class (among its five likeliest) without and with the token.
"""

import random
from collections import Counter
from pathlib import Path
from statistics import mean

import torch
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation.accuracy import judge_images, measure_context, predict_probabilities
from evaluation.statistics import compare_classes, correct_pvalues, interval_over_classes
from experiments import common, small
from experiments.trainings import describe_test
from miniature.world import NOUNS, THINGS, draw
from prompt_datasets import TargetClass, class_number, class_title, select_classes

PAPER = ("Of 100 training images 55 % of 'American lobster' show a plate and 95 % of 'horizontal bar' an athlete, and "
         "the tokens' images show the same (project page).")
SCENE = "a painting of"  # a golden frame: what a guide saw with some nouns only
UNBIASED, GUIDES = "both kinds", ("first kinds", "second kinds", "even nouns framed", "odd nouns framed")


def list_sights(noun: int, guide: str) -> list[tuple[int, str | None]]:
    """The (class, context) of the drawings that a guide's training shows for a noun."""
    kinds = [index for index, thing in enumerate(THINGS) if thing.noun == NOUNS[noun]]
    if guide in GUIDES[:2]:
        kinds = [kinds[GUIDES.index(guide)]]
    framed = guide in GUIDES[2:] and noun % 2 == GUIDES.index(guide) % 2
    return [(kind, SCENE if framed else None) for kind in kinds]


def train_guide(lab: common.Lab, guide: str) -> str:
    """The folder of a guide of nouns, trained on drawings unless it is there."""
    drawings, steps = lab.options.drawings, lab.options.guide_steps
    folder = lab.work / "guides" / f"{guide.replace(' ', '_')}_{drawings}_{steps}"
    if not (folder / "preprocessor_config.json").exists():
        rng, nouns = random.Random(guide), [i % len(NOUNS) for i in range(drawings)]
        images = []
        for noun in tqdm(nouns, desc=f"drawings for the guide of {guide}", mininterval=2):
            kind, context = rng.choice(list_sights(noun, guide))
            images.append(to_tensor(draw(kind, rng, context)))
        small.save_classifier(small.train_classifier(list(NOUNS), [(torch.stack(images), torch.tensor(nouns))], steps,
                                                     64, 0, f"guide of {guide}"), folder)
    return str(folder)


def draw_guided(lab: common.Lab, nouns: list[TargetClass]) -> dict[str, common.Sets]:
    """By guide the pictures of each noun with its token."""
    sets = {}
    for guide in (UNBIASED, *GUIDES):
        runs = common.learn_tokens(lab, nouns, classifier=train_guide(lab, guide), labels=None, evaluator=None)
        sets[guide] = common.draw_sets(lab, common.load_vectors(runs), lab.options.images)
    return sets


def share_planted(lab: common.Lab, noun: TargetClass, guide: str, files: list[Path]) -> float:
    """Of a noun's pictures the share that shows what `guide` saw with it, its kind or its frame."""
    (kind, context), *_ = list_sights(noun.index, guide)
    if context:
        return measure_context(lab.config.context_judge, context, files).value
    return judge_images(lab.get_judge(), files, kind).accuracy.value


def count_planted(lab: common.Lab):
    """In the miniature's world: how often a token's pictures show what its guide saw with the noun."""
    options = lab.options
    nouns = [noun for noun in select_classes("all", list(NOUNS), list(NOUNS))
             if noun.name in {target.name for target in lab.targets}]
    plain = common.draw_sets(lab, dict.fromkeys(nouns), options.images)
    guided, shares = draw_guided(lab, nouns), {}
    for bias, guides in (("kind", GUIDES[:2]), ("frame", GUIDES[2:])):
        planted = [(noun, [guide for guide in guides if bias == "kind" or list_sights(noun.index, guide)[0][1]])
                   for noun in nouns]
        shares[bias] = {arm: [mean(share_planted(lab, noun, guide, sets(guide)[noun]) for guide in of_noun)
                              for noun, of_noun in planted]
                        for arm, sets in (("no token", lambda guide: plain),
                                          ("token of the unbiased guide", lambda guide: guided[UNBIASED]),
                                          ("token of the biased guide", lambda guide: guided[guide]))}
    tests = correct_pvalues({bias: compare_classes(*reversed(list(arms.values())[1:]))
                             for bias, arms in shares.items()})
    rows = [[bias, arm, interval_over_classes(values), *(f"{value:.2f}" for value in values)]
            for bias, arms in shares.items() for arm, values in arms.items()]
    return {"no token": plain, **{f"guide: {guide}": sets for guide, sets in guided.items()}}, nouns[::4], (
        "Pictures show what the guide saw with the noun, beside an unbiased guide's token: " + "; ".join(
            f"its {bias}: {describe_test(test)}" for bias, test in tests.items()) + ".",
        ["planted", "pictures", "share that shows it", *(noun.name for noun in nouns)], rows,
        "The unit is the noun, of which there are eight. The guides are classifiers of nouns. Two saw one kind of each "
        "noun alone, the first or the second, and two saw every second noun in a golden frame alone; the unbiased "
        f"guide saw both kinds without frames. One training each, {options.images} held-out pictures per noun. Kinds "
        "are judged by a classifier, frames by the picture's border.",
        {"shares": shares, "tests": tests, "guide_steps": options.guide_steps, "drawings": options.drawings})


def compare_labels(lab: common.Lab):
    """For any classifier: the labels that come among the five likeliest more often, or less, with the token."""
    images, changes, guide = lab.options.images, {}, lab.get_guide()
    sets = {"without": common.draw_sets(lab, dict.fromkeys(lab.targets), images),
            "with": common.draw_sets(lab, common.load_vectors(common.learn_tokens(lab)), images)}
    for target in lab.targets:
        before, after = (Counter(predict_probabilities(guide, files[target], 32).topk(5).indices.flatten().tolist())
                         for files in sets.values())
        change = {label: (after[label] - before[label]) / images for label in before | after}
        most = sorted(change.keys() - {target.index}, key=lambda label: (-abs(change[label]), label))[:5]
        changes[target.title] = {class_title(class_number(label), guide.labels[label]): change[label] for label in most}
    rows = [[title, ", ".join(f"{label} {share:+.2f}" for label, share in most.items())]
            for title, most in changes.items()]
    return sets, lab.targets, (
        "Labels come more, or less, often with the token: "
        f"{'; '.join(f'{labels} for {title}' for title, labels in rows)}.",
        ["class", "change of a label's share among the five likeliest"], rows,
        f"The largest changes, certain to {(2 / images)**0.5:.2f} (two standard errors).", {"changes": changes})


def main(argv: list[str] | None = None):
    lab = common.open_lab(common.parse_options(
        __doc__, argv, "all", quick={"class_index": "1,2,7,8", "images": 2, "drawings": 32, "guide_steps": 3},
        images=20, drawings=3000, guide_steps=200))
    in_world = lab.config.real_images == common.WORLD
    sets, shown, result = (count_planted if in_world else compare_labels)(lab)
    common.show_sets(lab._replace(targets=shown), sets, lab.out / "inversion.png")
    common.publish_result(lab, "inversion", common.EXPLORATORY, "A token shows what its classifier was trained on",
                          *result, paper=PAPER)


if __name__ == "__main__":
    common.run_script(main)
