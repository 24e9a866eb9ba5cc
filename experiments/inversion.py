"""Claim (iii): the token shows what the classifier was trained on.

    python -m experiments.inversion                                  a bias that is planted, and whether it shows
    python -m experiments.inversion --config configs/imagenet.yml --class_index "horizontal bar"

In the miniature's world a noun has two kinds. A guide that knows nouns alone is trained on drawings in which some nouns
come in one kind only; another guide sees both kinds of all. Tokens are learned against both, and the evaluator, which
knows the kinds apart, counts them. For other settings, it counts which labels the classifier sees beside the class
(among its five likeliest) without and with the token.
"""

import random
from collections import Counter
from pathlib import Path

import torch
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation import interval, judge_images
from experiments import small
from experiments.common import Lab, open_lab, parser, pictures, publish, script, tokens, vector_of
from metrics import Proportion, wilson
from miniature.world import LABELS, NOUNS, draw
from report import sheet
from utils import load_images, require

WORLD = "miniature.world:draw"
PLANTED = (1, 6, 9, 11)  # classes from 0: of their nouns the biased guide sees this kind alone, which is the rarer one
DRAWINGS, STEPS, WIDTH = 3000, 200, 16
GUIDES = ("biased", "unbiased")
SHOWN = 8


def noun_of(index: int) -> int:
    """The number of a class's noun, from 0."""
    return NOUNS.index(LABELS[index].split(",")[0])


def kinds(guide: str, noun: int) -> list[int]:
    """The classes that a guide's training shows for a noun."""
    both = [index for index in range(len(LABELS)) if noun_of(index) == noun]
    return [index for index in both if index in PLANTED] or both if guide == "biased" else both


def trained_guide(lab: Lab, guide: str) -> Path:
    """The folder of a guide of nouns, trained on drawings unless it is there."""
    folder = lab.work / "guides" / f"{guide}_{DRAWINGS}_{STEPS}_{WIDTH}"
    if not small.is_saved(folder):
        rng, nouns = random.Random(guide), [i % len(NOUNS) for i in range(DRAWINGS)]
        drawn = [to_tensor(draw(rng.choice(kinds(guide, noun)), rng))
                 for noun in tqdm(nouns, desc=f"drawings for the {guide} guide")]
        model = small.fit(small.new_classifier(list(NOUNS), seed=0, width=WIDTH),
                          [(torch.stack(drawn), torch.tensor(nouns))], STEPS, 0, f"{guide} guide")
        small.save(model, folder)
    return folder


def planted_bias(lab: Lab, options):
    others = [lab.title(index) for index in lab.classes if index not in PLANTED]
    require(not others, f"no bias is planted in class {', '.join(others)}; it is in "
                        + ", ".join(lab.title(index) for index in PLANTED))
    arms = {"no token": {index: pictures(lab, index, "without", None, options.images) for index in lab.classes}}
    for guide in GUIDES:
        nouns = open_lab(options, classifier=trained_guide(lab, guide), evaluator="none",
                         class_index=",".join(str(noun_of(index) + 1) for index in lab.classes))
        folders = tokens(nouns, "inversion")
        arms[f"token of the {guide} guide"] = {
            index: pictures(nouns, noun_of(index), guide, vector_of(folders[noun_of(index)]), options.images)
            for index in lab.classes}
    rows, data = [], {}
    for arm, sets in arms.items():
        counts = {index: [sum(judge_images(lab.judge(), files, kind)["right"])
                          for kind in (index, *(each for each in kinds("unbiased", noun_of(index)) if each != index))]
                  for index, files in sets.items()}
        rates = {lab.title(index): wilson(planted, options.images) for index, (planted, _) in counts.items()}
        total = options.images * len(counts)
        planted, noun = (wilson(sum(each), total) for each in
                         ([first for first, _ in counts.values()], [sum(both) for both in counts.values()]))
        rows.append([arm, *map(interval, rates.values()), interval(planted), interval(noun)])
        data[arm] = {"planted": planted._asdict(), "noun": noun._asdict(),
                     "classes": {title: rate._asdict() for title, rate in rates.items()}}
    sheet([(f"{lab.labels[index]}: {arm}", sets[index][:SHOWN]) for index in lab.classes for arm, sets in arms.items()],
          lab.out / "inversion.png", cell=72)
    before, biased, unbiased = (interval(Proportion(**each["planted"])) for each in data.values())
    publish(lab, "inversion", "A token shows what its classifier was trained on",
            f"A guide that saw some nouns in one kind only gives tokens whose pictures are of that kind in {biased}; "
            f"with an unbiased guide's it is {unbiased}, without a token {before}.",
            ["pictures", *(lab.labels[index] for index in lab.classes), "all", "the noun, of either kind"], rows,
            {"rates": data, "pictures_a_class": options.images, "guide_steps": STEPS, "drawings": DRAWINGS},
            "The biased guide saw each of these nouns as this kind alone, the rarer of its two, and the other nouns as "
            "both. Share of pictures of that kind [Wilson 95 % interval over the pictures of one training a noun], by "
            f"{lab.judged}. Both guides know {len(NOUNS)} nouns and no kinds ({DRAWINGS} drawings, {STEPS} steps).",
            "inversion.png")


def changed_labels(lab: Lab, images: int):
    """For any classifier: the labels that come among the five likeliest more often, or less, with the token."""
    rows, data, sheets = [], {}, []
    for index, folder in tokens(lab, "inversion").items():
        sets = [pictures(lab, index, name, vector, images)
                for name, vector in (("without", None), ("with", vector_of(folder)))]
        counts = [Counter(five_likeliest(lab, files)) for files in sets]
        change = {label: (counts[1][label] - counts[0][label]) / images
                  for label in counts[0] | counts[1] if label != index}
        most = sorted(change, key=lambda label: -abs(change[label]))[:5]
        rows.append([lab.title(index), ", ".join(f"{lab.labels[label]} {change[label]:+.2f}" for label in most)])
        data[lab.title(index)] = {lab.title(label): change[label] for label in most}
        sheets += [(f"{lab.labels[index]}: {name}", files[:SHOWN])
                   for name, files in zip(("without", "with"), sets, strict=True)]
    sheet(sheets, lab.out / "inversion.png", cell=96)
    publish(lab, "inversion", "A token shows what its classifier was trained on",
            "Labels that come more, or less, often with the token: " + "; ".join(f"{labels} for {title}"
                                                                                 for title, labels in rows) + ".",
            ["class", "change of a label's share among the five likeliest"], rows, {"changes": data},
            f"The largest changes over {images} pictures a class, whose shares are certain to "
            f"{(2 / images)**0.5:.2f} (two standard errors at most).", "inversion.png")


@torch.no_grad()
def five_likeliest(lab: Lab, files: list[Path]) -> list[int]:
    """The guide's five likeliest labels of every picture, in one list."""
    return [label for file in files
            for label in lab.guide()(load_images([file]).to(lab.config.device))[0].topk(5).indices.tolist()]


def main():
    arguments = parser(__doc__, ",".join(str(index + 1) for index in PLANTED))
    arguments.add_argument("--images", type=int, default=30, help="held-out pictures a class (30)")
    options = arguments.parse_args()
    lab = open_lab(options)
    if lab.config.real_images == WORLD:
        planted_bias(lab, options)
    else:
        changed_labels(lab, options.images)


if __name__ == "__main__":
    script(main)
