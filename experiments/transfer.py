"""A token learned on one checkpoint, used on another of the same text encoder.

    python -m experiments.transfer
    python -m experiments.transfer --class_index 281-290 --config configs/imagenet.yml --other stable-diffusion-v1-5/...

Stable Diffusion 1.4 and 1.5 share their text encoder; their UNets were both trained further from that of 1.2. Without
--other the second checkpoint is the miniature, its UNet trained further on pictures that its world draws.
"""

import random
import shutil
from pathlib import Path

import torch
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from evaluation.pictures import draw_sheet
from evaluation.tables import Table
from experiments import common
from miniature import world
from utils import find_path, require

BATCH, LR = 24, 5e-4
WITHOUT_CAPTION = 0.1  # of the pictures, for guidance


def train_denoiser(lab: common.Lab, drawings: int, steps: int) -> Path:
    """A copy of the lab's generator whose denoiser was trained further on new drawings; all else is the same."""
    folder = lab.work / f"generator_{steps}_{BATCH}_{LR}_{drawings}"
    if folder.exists():
        return folder
    generator, rng = lab.get_generator(), random.Random("transfer")
    drawn = [(index, world.sample_context(rng)) for index in (world.sample_class(rng) for _ in range(drawings))]
    images = torch.stack([to_tensor(world.draw(index, rng, context)) for index, context in tqdm(drawn, desc="drawing")])
    captions = ["" if rng.random() < WITHOUT_CAPTION else world.write_caption(index, rng, context)
                for index, context in drawn]
    with torch.no_grad():
        cond = torch.cat([generator.encode(captions[i:i + 100]) for i in range(0, drawings, 100)])
    latents = torch.cat([generator.encode_images(part)[0] for part in images.split(50)])
    denoiser, noise_source = generator.denoiser.requires_grad_(True).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(denoiser.parameters(), LR, weight_decay=0.01)
    for _ in tqdm(range(steps), desc="another denoiser", unit="step"):
        rows = torch.randint(drawings, (BATCH,), generator=noise_source)
        optimizer.zero_grad()
        generator.denoising_loss(latents[rows], cond[rows], noise_source).backward()
        optimizer.step()
    half_written = folder.with_name("half_written")
    shutil.rmtree(half_written, ignore_errors=True)
    shutil.copytree(find_path(lab.config.model), half_written)
    denoiser.save_pretrained(half_written / "unet")
    half_written.rename(folder)
    return folder


def main(argv: list[str] | None = None):
    parser = common.build_parser(__doc__, "1,3,5,7,9,11,13,15")
    parser.add_argument("--other", help="the other generator (the run's own, trained further)")
    parser.add_argument("--images", type=int, default=10, help="held-out pictures per class and arm (10)")
    parser.add_argument("--drawings", type=int, default=1200, help="what the run's own is trained further on (1200)")
    parser.add_argument("--steps", type=int, default=100, help="of that training (100)")
    options = parser.parse_args(argv)
    lab = common.open_lab(options)
    require(options.other or lab.config.real_images == common.WORLD,
            "give --other, a checkpoint of the same text encoder")
    learned = {target: common.load_vectors(run) for target, run in common.learn_tokens(lab, "token").items()}
    other = options.other or str(train_denoiser(common.open_lab(options), options.drawings, options.steps).resolve())
    arms = {"without": dict.fromkeys(learned), "with": learned}
    labs = {"its own generator": lab,
            "the other generator": common.open_lab(options, model=other)._replace(work=lab.work / "transfer")}
    sets = {name: {arm: {target: common.draw_class(drawing, target, arm, vectors, options.images)
                         for target, vectors in by_class.items()} for arm, by_class in arms.items()}
            for name, drawing in labs.items()}
    shares = {name: {arm: common.measure_accuracy(lab, files) for arm, files in by_arm.items()}
              for name, by_arm in sets.items()}
    draw_sheet([(f"{target.label}: {arm}, {name}", by_arm[arm][target][:8]) for target in common.choose_shown(lab)
                for arm in arms for name, by_arm in sets.items()], lab.out / "transfer.png", cell=72)
    rows = [[name, *by_arm.values()] for name, by_arm in shares.items()]
    kind = options.other or f"the same, its UNet trained further for {options.steps} steps of {BATCH} drawings"
    common.publish_result(
        lab, "transfer", "A token works on another checkpoint of the same text encoder",
        f"On another checkpoint the token takes the right class from {rows[1][1]} to {rows[1][2]} ({rows[0][1]} to "
        f"{rows[0][2]} on its own).",
        Table(["drawn by", "without", "with the token"], rows,
              note=f"Right by {common.judge_name(lab)} [Wilson 95 % interval over the pictures of one training per "
                   f"class]. The other generator: {kind}."),
        {"shares": shares, "pictures_per_class": options.images}, "transfer.png")


if __name__ == "__main__":
    common.run_script(main)
