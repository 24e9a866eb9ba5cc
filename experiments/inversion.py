"""Claim (iii): the token shows what the classifier was trained on.

    python -m experiments.inversion                                  a planted bias, and whether the pictures show it
    python -m experiments.inversion --config configs/imagenet.yml --class_index "horizontal bar"

A noun of the miniature's world has two kinds. One guide of nouns is trained on drawings that show some in one kind
only, another one on both; the evaluator tells the kinds apart. With other settings this counts the labels that the
classifier sees beside the class (among its five likeliest) without and with the token.
"""

import random
from collections import Counter

import torch
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation.accuracy import judge_images, predict_probabilities
from evaluation.statistics import Proportion
from experiments import common, small
from miniature.world import LABELS, NOUNS, THINGS, draw
from prompt_datasets import class_number, class_title, select_classes
from utils import require

PLANTED = ("crane, machine", "jaguar, cat", "seal, stamp", "palm, hand")  # the rarer kinds of their nouns


def list_kinds(noun: str, guide: str = "unbiased") -> list[int]:
    """The world's classes that a guide's training shows for a noun."""
    kinds = [index for index, thing in enumerate(THINGS) if thing.noun == noun]
    return [index for index in kinds if LABELS[index] in PLANTED] or kinds if guide == "biased" else kinds


def train_guide(lab: common.Lab, guide: str) -> str:
    """The folder of a guide of nouns, trained on drawings unless it is there."""
    drawings, steps = lab.options.drawings, lab.options.guide_steps
    folder = lab.work / "guides" / f"{guide}_{drawings}_{steps}"
    if not (folder / "preprocessor_config.json").exists():
        rng, nouns = random.Random(guide), [i % len(NOUNS) for i in range(drawings)]
        images = torch.stack([to_tensor(draw(rng.choice(list_kinds(NOUNS[noun], guide)), rng))
                              for noun in tqdm(nouns, desc=f"drawings for the {guide} guide")])
        small.save_classifier(small.train_classifier(list(NOUNS), [(images, torch.tensor(nouns))], steps, 64, 0,
                                                     f"{guide} guide"), folder)
    return str(folder)


def count_kinds(lab: common.Lab):
    """In the miniature's world: how often a token's pictures show the kind that its guide was trained on."""
    options, others = lab.options, [target.title for target in lab.targets if target.label not in PLANTED]
    require(not others, f"no bias is planted in class {', '.join(others)}; it is in {'; '.join(PLANTED)}")
    noun_classes = {target.name: target for target in select_classes("all", list(NOUNS), list(NOUNS))}
    nouns = {target: noun_classes[THINGS[target.index].noun] for target in lab.targets}
    sets = {"no token": common.draw_sets(lab, dict.fromkeys(lab.targets), options.images)}
    for guide in ("biased", "unbiased"):
        runs = common.learn_tokens(lab, list(nouns.values()), classifier=train_guide(lab, guide), labels=None,
                                   evaluator=None)
        drawn = common.draw_sets(lab, common.load_vectors(runs), options.images)
        sets[f"token of the {guide} guide"] = {target: drawn[noun] for target, noun in nouns.items()}
    rates = {}
    for arm, files in sets.items():
        planted, either = common.measure_accuracy(lab, files), sum(
            judge_images(lab.get_judge(), files[target], kind).accuracy.successes
            for target in lab.targets for kind in list_kinds(THINGS[target.index].noun))
        rates[arm] = {"planted": planted, "noun": Proportion(either, planted.count), "classes": {
            target.title: common.measure_accuracy(lab, {target: files[target]}) for target in lab.targets}}
    before, biased, unbiased = (rate["planted"] for rate in rates.values())
    return sets, (
        f"A guide that saw some nouns in one kind only gives tokens whose pictures are of that kind in {biased}; with "
        f"an unbiased guide's it is {unbiased}, without a token {before}.",
        ["pictures", *(target.label for target in lab.targets), "all", "the noun, of either kind"],
        [[arm, *rate["classes"].values(), rate["planted"], rate["noun"]] for arm, rate in rates.items()],
        "The biased guide saw each of these nouns as this kind alone, the rarer of its two; neither guide knows kinds.",
        {"rates": rates, "pictures_per_class": options.images, "guide_steps": options.guide_steps,
         "drawings": options.drawings})


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
    return sets, (
        "Labels come more, or less, often with the token: "
        f"{'; '.join(f'{labels} for {title}' for title, labels in rows)}.",
        ["class", "change of a label's share among the five likeliest"], rows,
        f"The largest changes, certain to {(2 / images)**0.5:.2f} (two standard errors).", {"changes": changes})


def main(argv: list[str] | None = None):
    lab = common.open_lab(common.parse_options(__doc__, argv, "2,7,10,12", images=30, drawings=3000, guide_steps=200))
    sets, result = (count_kinds if lab.config.real_images == common.WORLD else compare_labels)(lab)
    common.show_sets(lab, sets, lab.out / "inversion.png")
    common.publish_result(lab, "inversion", "A token shows what its classifier was trained on", *result)


if __name__ == "__main__":
    common.run_script(main)
