"""Claim (iii): the token shows what the classifier was trained on.

    python -m experiments.inversion                                  a planted bias, and whether the pictures show it
    python -m experiments.inversion --config configs/imagenet.yml --class_index "horizontal bar"

A noun of the miniature's world has two kinds. One guide, which knows nouns alone, is trained on drawings that show some
nouns in one kind only; another guide sees both kinds of all. Tokens are learned against both, and the evaluator, which
tells the kinds apart, counts them. With other settings it counts the labels that the classifier sees beside the class
(among its five likeliest) without and with the token.
"""

import random
from collections import Counter
from pathlib import Path

import torch
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation.accuracy import judge_images, predict_probabilities
from evaluation.pictures import draw_sheet
from evaluation.statistics import Proportion, pool_proportions
from evaluation.tables import Table
from experiments import common, small
from miniature.world import LABELS, NOUNS, THINGS, draw
from prompt_datasets import TargetClass, class_number, class_title, select_classes
from utils import require

PLANTED = ("crane, machine", "jaguar, cat", "seal, stamp", "palm, hand")  # the rarer kinds of their nouns
WIDTH = 16  # of the guides
GUIDES = ("biased", "unbiased")
SHOWN = 8
CLAIM = "A token shows what its classifier was trained on"


def list_kinds(noun: str, guide: str = "unbiased") -> list[int]:
    """The world's classes that a guide's training shows for a noun."""
    kinds = [index for index, thing in enumerate(THINGS) if thing.noun == noun]
    return [index for index in kinds if LABELS[index] in PLANTED] or kinds if guide == "biased" else kinds


def train_guide(lab: common.Lab, guide: str, drawings: int, steps: int) -> Path:
    """The folder of a guide of nouns, trained on drawings unless it is there."""
    folder = lab.work / "guides" / f"{guide}_{drawings}_{steps}_{WIDTH}"
    if not (folder / "preprocessor_config.json").exists():
        rng, nouns = random.Random(guide), [i % len(NOUNS) for i in range(drawings)]
        drawn = [to_tensor(draw(rng.choice(list_kinds(NOUNS[noun], guide)), rng))
                 for noun in tqdm(nouns, desc=f"drawings for the {guide} guide")]
        model = small.train_classifier(small.new_classifier(list(NOUNS), 0, WIDTH),
                                       [(torch.stack(drawn), torch.tensor(nouns))], steps, 0, f"{guide} guide")
        small.save_classifier(model, folder)
    return folder


def measure_kinds(lab: common.Lab, sets: dict[TargetClass, list[Path]]) -> dict:
    """The shares of pictures that are of the planted kind, by class and in all, and of either kind of the noun."""
    judge = lab.get_judge()
    classes = {target: judge_images(judge, files, target.index).accuracy for target, files in sets.items()}
    planted = pool_proportions(classes.values())
    nouns = sum(judge_images(judge, files, kind).accuracy.successes for target, files in sets.items()
                for kind in list_kinds(THINGS[target.index].noun))
    return {"planted": planted, "noun": Proportion(nouns, planted.count),
            "classes": {target.title: share for target, share in classes.items()}}


def measure_planted_bias(lab: common.Lab, options):
    """In the miniature's world: how often a token's pictures show the kind that its guide was trained on."""
    others = [target.title for target in lab.targets if target.label not in PLANTED]
    require(not others, f"no bias is planted in class {', '.join(others)}; it is in {'; '.join(PLANTED)}")
    noun_classes = {target.name: target for target in select_classes("all", list(NOUNS), list(NOUNS))}
    nouns = {target: noun_classes[THINGS[target.index].noun] for target in lab.targets}
    sets = {"no token": {target: common.draw_class(lab, target, "without", None, options.images) for target in nouns}}
    for guide in GUIDES:
        folder = train_guide(lab, guide, options.drawings, options.guide_steps)
        runs = common.learn_tokens(lab, "inversion", list(nouns.values()), classifier=str(folder))
        sets[f"token of the {guide} guide"] = {
            target: common.draw_class(lab, noun, guide, common.load_vectors(runs[noun]), options.images)
            for target, noun in nouns.items()}
    rates = {arm: measure_kinds(lab, files) for arm, files in sets.items()}
    draw_sheet([(f"{target.label}: {arm}", files[target][:SHOWN]) for target in lab.targets
                for arm, files in sets.items()], lab.out / "inversion.png", cell=72)
    before, biased, unbiased = (rate["planted"] for rate in rates.values())
    common.publish_result(
        lab, "inversion", CLAIM,
        f"A guide that saw some nouns in one kind only gives tokens whose pictures are of that kind in {biased}; "
        f"with an unbiased guide's it is {unbiased}, without a token {before}.",
        Table(["pictures", *(target.label for target in lab.targets), "all", "the noun, of either kind"],
              [[arm, *rate["classes"].values(), rate["planted"], rate["noun"]] for arm, rate in rates.items()],
              note="The biased guide saw each of these nouns as this kind alone, the rarer of its two, and the other "
                   "nouns as both. Share of pictures of that kind [Wilson 95 % interval over the pictures of one "
                   f"training per noun], by {common.judge_name(lab)}. Both guides know {len(NOUNS)} nouns and no kinds "
                   f"({options.drawings} drawings, {options.guide_steps} steps)."),
        {"rates": rates, "pictures_per_class": options.images, "guide_steps": options.guide_steps,
         "drawings": options.drawings}, "inversion.png")


def measure_changed_labels(lab: common.Lab, images: int):
    """For any classifier: the labels that come among the five likeliest more often, or less, with the token."""
    changes, sheet, guide = {}, [], lab.get_guide()
    for target, run in common.learn_tokens(lab, "inversion").items():
        sets = {name: common.draw_class(lab, target, name, vectors, images)
                for name, vectors in (("without", None), ("with", common.load_vectors(run)))}
        sheet += [(f"{target.label}: {name}", files[:SHOWN]) for name, files in sets.items()]
        seen = [Counter(predict_probabilities(guide, files, 32).topk(5).indices.flatten().tolist())
                for files in sets.values()]
        change = {label: (seen[1][label] - seen[0][label]) / images for label in seen[0] | seen[1]}
        most = sorted(change.keys() - {target.index}, key=lambda label: (-abs(change[label]), label))[:5]
        changes[target.title] = {class_title(class_number(label), guide.labels[label]): change[label] for label in most}
    draw_sheet(sheet, lab.out / "inversion.png")
    rows = [[title, ", ".join(f"{label} {share:+.2f}" for label, share in most.items())]
            for title, most in changes.items()]
    common.publish_result(
        lab, "inversion", CLAIM, "Labels that come more, or less, often with the token: "
                                 + "; ".join(f"{labels} for {title}" for title, labels in rows) + ".",
        Table(["class", "change of a label's share among the five likeliest"], rows,
              note=f"The largest changes over {images} pictures per class, whose shares are certain to "
                   f"{(2 / images)**0.5:.2f} (two standard errors at most)."), {"changes": changes}, "inversion.png")


def main(argv: list[str] | None = None):
    parser = common.build_parser(__doc__, "2,7,10,12")
    parser.add_argument("--images", type=int, default=30, help="held-out pictures per class (30)")
    parser.add_argument("--drawings", type=int, default=3000, help="what the guides of nouns are trained on (3000)")
    parser.add_argument("--guide_steps", type=int, default=200, help="their training (200)")
    options = parser.parse_args(argv)
    lab = common.open_lab(options)
    if lab.config.real_images == common.WORLD:
        measure_planted_bias(lab, options)
    else:
        measure_changed_labels(lab, options.images)


if __name__ == "__main__":
    common.run_script(main)
