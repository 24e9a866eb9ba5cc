"""Claim (iii): the token shows what the classifier was trained on.

    python -m experiments.inversion                                  a bias that is planted, and whether it shows
    python -m experiments.inversion --config configs/imagenet.yml --class_index "horizontal bar"

Where the world draws its own pictures, a guide is trained on drawings in which each of four classes comes in one
scene alone, and no other class comes in it; another guide sees every class in every scene. Tokens are learned against
both, and a detector counts the scenes. For other settings, it counts which labels the classifier sees beside the class
(among its five likeliest) without and with the token.
"""

import random
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation import interval
from experiments import small
from experiments.common import Lab, open_lab, parser, pictures, publish, script, share_right, tokens, vector_of
from metrics import Proportion, wilson
from miniature.world import CONTEXTS
from report import sheet
from utils import imported, load_images, require

PLANTED = {1: "in the snow", 7: "at night", 10: "a painting of", 12: "a drawing of"}  # class from 0: its only scene
DRAWINGS, STEPS = 3000, 250
GUIDES = ("biased", "unbiased")
SHOWN = 8


def scenes(guide: str, index: int) -> tuple[str | None, ...]:
    """The scenes that a guide's training shows a class in."""
    if guide == "unbiased":
        return (None, *CONTEXTS)
    return (PLANTED[index],) if index in PLANTED else (None,)


def trained_guide(lab: Lab, guide: str):
    """The folder of a guide, trained on drawings unless it is there."""
    folder = lab.work / "guides" / f"{guide}_{DRAWINGS}_{STEPS}"
    if not small.is_saved(folder):
        draw, rng = imported(lab.config.real_images, "real_images"), random.Random(guide)
        numbers = [i % len(lab.labels) for i in range(DRAWINGS)]
        drawn = [to_tensor(draw(index, rng, rng.choice(scenes(guide, index))))
                 for index in tqdm(numbers, desc=f"drawings for the {guide} guide")]
        model = small.fit(small.new_classifier(lab.labels, seed=0),
                            [(torch.stack(drawn), torch.tensor(numbers))], STEPS, 0, f"{guide} guide")
        small.save(model, folder)
    return folder


def planted_bias(lab: Lab):
    judge, arms, data = imported(lab.config.context_judge, "context_judge"), {}, {}
    others = [lab.title(index) for index in lab.classes if index not in PLANTED]
    require(not others, f"no bias is planted in class {', '.join(others)}; it is in "
                        + ", ".join(lab.title(index) for index in PLANTED))
    arms["without a token"] = {index: pictures(lab, index, "without", None, lab.config.test_size)
                               for index in lab.classes}
    for guide in GUIDES:
        folders = tokens(lab, f"inversion_{guide}", classifier=trained_guide(lab, guide))
        arms[f"token of the {guide} guide"] = {
            index: pictures(lab, index, f"with_{guide}", vector_of(folder), lab.config.test_size)
            for index, folder in folders.items()}
    rows = []
    for arm, sets in arms.items():
        seen = {index: [judge(Image.open(file)) == PLANTED[index] for file in files] for index, files in sets.items()}
        rates = [wilson(sum(each), len(each)) for each in seen.values()]
        everything = wilson(sum(map(sum, seen.values())), sum(map(len, seen.values())))
        right = share_right(lab, sets)
        rows.append([arm, *map(interval, rates), interval(everything), interval(right)])
        data[arm] = {"scene": everything._asdict(), "right": right._asdict(),
                     "classes": {lab.title(index): rate._asdict() for index, rate in zip(seen, rates, strict=True)}}
    figure = "inversion.png"
    sheet([(f"{lab.labels[index]}: {arm}", sets[index][:SHOWN]) for index in lab.classes for arm, sets in arms.items()],
          lab.out / figure, cell=72)
    before, biased, unbiased = (interval(Proportion(**each["scene"])) for each in data.values())
    publish(lab, "inversion", "A token shows what its classifier was trained on",
            f"The planted scene is in {biased} of the pictures with the biased guide's token, in "
            f"{unbiased} with the unbiased guide's, in {before} without a token.",
            ["pictures", *(f"{lab.labels[index]}, {PLANTED[index]}" for index in lab.classes), "planted scene, all",
             "right class"], rows,
            {"rates": data, "pictures_a_class": lab.config.test_size, "guide_steps": STEPS, "drawings": DRAWINGS},
            "Share of pictures in which the detector (miniature.world:context_of) sees the scene that the biased "
            "guide's training showed this class in, and no other class [Wilson 95 % interval over the pictures of one "
            f"training a class]. Right by {lab.judged}.", figure)


def changed_labels(lab: Lab):
    """For any classifier: the labels that come among the five likeliest more often, or less, with the token."""
    rows, data, sheets = [], {}, []
    for index, folder in tokens(lab, "inversion").items():
        sets = [pictures(lab, index, name, vector, lab.config.test_size)
                for name, vector in (("without", None), ("with", vector_of(folder)))]
        counts = [Counter(five_likeliest(lab, files)) for files in sets]
        change = {label: (counts[1][label] - counts[0][label]) / lab.config.test_size
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
            f"The largest changes over {lab.config.test_size} pictures a class, whose shares are certain to "
            f"{(2 / lab.config.test_size)**0.5:.2f} (two standard errors at most).", "inversion.png")


@torch.no_grad()
def five_likeliest(lab: Lab, files: list[Path]) -> list[int]:
    """The guide's five likeliest labels of every picture, in one list."""
    return [label for file in files
            for label in lab.guide()(load_images([file]).to(lab.config.device))[0].topk(5).indices.tolist()]


def main():
    arguments = parser(__doc__, ",".join(str(index + 1) for index in PLANTED))
    lab = open_lab(arguments.parse_args())
    if lab.config.context_judge:
        planted_bias(lab)
    else:
        changed_labels(lab)


if __name__ == "__main__":
    script(main)
