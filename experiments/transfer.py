"""A token learned on one checkpoint, used on another of the same text encoder.

    python -m experiments.transfer
    python -m experiments.transfer --class_index 281-290 --config configs/imagenet.yml --other stable-diffusion-v1-5/...

Without --other the second checkpoint is the miniature, its UNet trained further on pictures that its world draws.
"""

import random
import shutil
from pathlib import Path
from statistics import mean

import torch
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation.statistics import compare_classes, correct_pvalues, interval_over_classes
from experiments import common
from experiments.trainings import describe_test, judge_sets, list_seeds
from miniature import world
from models.denoising import compute_denoising_loss, encode_images
from system.paths import find_path
from utils import replace_file, require

BATCH, LR = 24, 5e-4
WITHOUT_CAPTION = 0.1  # of the pictures, for guidance


def train_denoiser(lab: common.Lab, drawings: int, steps: int) -> Path:
    """A copy of the miniature whose denoiser was trained further on new drawings; all else is the same."""
    folder = lab.work / f"generator_{steps}_{BATCH}_{LR}_{drawings}"
    if folder.exists():
        return folder
    generator, rng = common.open_generator(lab.config), random.Random("transfer")
    drawn = [(index, world.sample_context(rng)) for index in (world.sample_class(rng) for _ in range(drawings))]
    images = torch.stack([to_tensor(world.draw(index, rng, context)) for index, context in tqdm(drawn, desc="drawing")])
    captions = ["" if rng.random() < WITHOUT_CAPTION else world.write_caption(index, rng, context)
                for index, context in drawn]
    with torch.no_grad():
        cond = torch.cat([generator.encode(captions[i:i + 100]) for i in range(0, drawings, 100)])
    latents = torch.cat([encode_images(generator, part)[0] for part in images.split(50)])
    denoiser, noise_source = generator.denoiser.requires_grad_(True).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(denoiser.parameters(), LR, weight_decay=0.01)
    for _ in tqdm(range(steps), desc="another denoiser", unit="step"):
        rows = torch.randint(drawings, (BATCH,), generator=noise_source)
        optimizer.zero_grad()
        compute_denoising_loss(generator, latents[rows], cond[rows], noise_source).backward()
        optimizer.step()
    with replace_file(folder) as temporary:
        shutil.copytree(find_path(lab.config.model), temporary)
        denoiser.save_pretrained(temporary / "unet")
    return folder


def main(argv: list[str] | None = None):
    options = common.parse_options(
        __doc__, argv, "all", quick={"seeds": 2, "images": 1, "drawings": 8, "steps": 1}, other=None, seeds=3,
        images=10, drawings=1200, steps=100)
    lab = common.open_lab(options)
    require(options.other or lab.config.real_images == common.WORLD,
            "give --other, a checkpoint of the same text encoder")
    runs = [common.learn_tokens(lab, seed=seed) for seed in list_seeds(lab)]
    trainings = [common.load_vectors(folders) for folders in runs]
    other = options.other or str(train_denoiser(lab, options.drawings, options.steps).resolve())
    shown, right = {}, {}
    for name, drawing_lab in (("its own generator", lab), ("the other generator", common.open_lab(options,
                                                                                                  model=other))):
        arms = {"without": [dict.fromkeys(trainings[0])], "with": trainings}
        sets = {arm: [common.draw_sets(drawing_lab, vectors, options.images) for vectors in many]
                for arm, many in arms.items()}
        shown |= {f"{arm}, {name}": many[0] for arm, many in sets.items()}
        right[name] = {arm: [mean(shares) for shares in judge_sets(lab, many).values()] for arm, many in sets.items()}
    tests = correct_pvalues({name: compare_classes(arms["with"], arms["without"]) for name, arms in right.items()})
    rows = [[name, *map(interval_over_classes, arms.values()), tests[name]] for name, arms in right.items()]
    common.show_sets(lab, shown, lab.out / "transfer.png")
    common.publish_result(
        lab, "transfer", common.TESTED, "A token works on another checkpoint of the same text encoder",
        f"On another checkpoint the token takes the right class from {rows[1][1]} to {rows[1][2]}: "
        f"{describe_test(tests['the other generator'])}.",
        ["drawn by", "without", "with the token", "difference"], rows,
        f"{options.seeds} trainings, {options.images} held-out pictures per class and training. The other generator: "
        + (options.other or f"the same, its UNet trained further for {options.steps} steps of {BATCH} drawings") + ".",
        {"right": right, "tests": tests})


if __name__ == "__main__":
    common.run_script(main)
