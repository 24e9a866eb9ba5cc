"""What a training setting costs at the real sizes, in FLOPs.

    python -m benchmarks.flops

Runs the method's own `token_gradient` on networks of the meta device, which have shapes and no
values. Multiplications and additions of convolutions, matrix products and attention count, on the
way back as they occur.
"""

import argparse
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.random_weights import build_generator
from command_line import parse_settings
from config import RunConfig
from evaluation.tables import Table
from method.update import GRAPHS
from models.classifiers import Classifier
from models.costs import PARTS
from models.generator import Generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES
from runs.estimate import count_update, make_batch, sum_parts
from runs.session import find_training_sampling
from system.paths import read_path
from system.terminal import run_script
from utils import ROOT, write_text

IMAGES = 5  # per update, of three prompts, in every row: the text encoder's share depends on it
COLUMNS = [
    "setting",
    "UNet calls per image",
    "of these with a graph",
    "recomputed",
    "TFLOP per image",
    *PARTS,
    "without recomputing",
    "TFLOP per update",
    "times the paper's loop",
]
TEXT = """# What a setting costs on Stable Diffusion 1.4

FLOPs of training, counted at the published sizes of every network. With guidance the UNet is
called twice per step. All rows are for {images} images per update from three prompts, at the
config's resolution, with ViT-L/16 as classifier.

{table}

How these settings affect the quality of Stable Diffusion's pictures is a hypothesis: it was
measured on the miniature only ([README](../README.md), [findings](findings.md)). The cost of a
token is that of an update times the number of updates, which also depends on the setting.

- 'Recomputed': where `--batch_size` is too small to hold two graphs of every image, the graph of
  the last step is recomputed in the backward pass, so that decoder, classifier and UNet never hold
  theirs at the same time (`token_gradient`). All columns but 'without recomputing' include it.
  SDXL's config also recomputes activations inside the UNet and the VAE
  (`gradient_checkpointing`).
- The columns of the networks include forward, recomputation and backward; weights are frozen, so
  none has a gradient.
- A multiplication and an addition are two FLOPs. Attention counts as two matrix products forward
  and four backward; the one that a fused kernel recomputes is not counted. Norms, activations and
  resizing are not counted.
- FLOPs are not seconds.
- Where a single UNet call is left, the decoder takes most of the rest: forward and backward at full
  resolution.
- SD-Turbo has the sizes of Stable Diffusion 2.1 base; SDXL's row has four times as many pixels.
- Drawing and judging with a finished token are not included.

`python -m benchmarks.flops` (takes minutes on a CPU, most of them for SDXL; needs no weights and no
GPU)
"""


def list_settings() -> dict[str, tuple[str, RunConfig]]:
    """List {name: (family, setting)}, with the paper's loop first."""
    paper, short, family = RunConfig(), {"train_timesteps": [999, 800, 600]}, "sd14"
    changes = {
        "the paper's loop: 30 PNDM steps, guidance 7": {},
        "training guidance 1": {"train_guidance_scale": 1.0},
        "999 800 600, guidance 7": short,
        "999 800 600, training guidance 1": {**short, "train_guidance_scale": 1.0},
        "999 600, training guidance 1": {
            "train_timesteps": [999, 600],
            "train_guidance_scale": 1.0,
        },
        "600, training guidance 1": {"train_timesteps": [600], "train_guidance_scale": 1.0},
    }
    files = {
        "SD-Turbo, `configs/turbo.yml`: one step, no guidance": ("sd_turbo", "turbo"),
        "SDXL, `configs/sdxl.yml`: 1024 x 1024, 30 steps, guidance 5": ("sdxl", "sdxl"),
    }
    settings = {}
    for name, change in changes.items():
        settings[name] = (family, replace(paper, **change))
    for name, (kind, file) in files.items():
        config, _ = parse_settings(["--config", str(ROOT / f"configs/{file}.yml")])
        settings[name] = (kind, config)
    return settings


def wrap_classifier(model: torch.nn.Module) -> Classifier:
    """Wrap a ViT with a resizing to its input's size, which is not counted."""
    side = (model.config.image_size,) * 2
    return Classifier(
        "classifier",
        [""] * model.config.num_labels,
        model,
        lambda images: F.interpolate(images, side),
        lambda model, pixels: model(pixels).logits,
        model.device,
    )


def count_images(
    generator: Generator,
    classifier: Classifier,
    sampling: SamplingSettings,
    is_recomputed: bool = True,
) -> Counter:
    """Count what an update of IMAGES images takes, by part.

    `is_recomputed`: whether the graph of the last step is recomputed.
    """
    prompts = [template.format("newclas crane") for template in TEMPLATES]
    start = generator.initial_vectors("a")
    batch, vectors = make_batch(generator, start, prompts, IMAGES)
    batch_size = IMAGES if is_recomputed else GRAPHS * IMAGES
    return count_update(generator, classifier, batch, vectors, sampling, batch_size)


def count_setting(family: str, config: RunConfig) -> tuple[Counter, Counter]:
    """Count what one update takes, and what it would take if nothing were computed twice."""
    generator, model = build_generator(family)
    generator.set_placeholder(config.placeholder_token)
    classifier, sampling = wrap_classifier(model), find_training_sampling(config)
    least = count_images(generator, classifier, sampling, is_recomputed=False)
    for network in generator.networks:
        if config.gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
    return count_images(generator, classifier, sampling), least


def make_row(
    name: str, counts: Counter, least: Counter, paper: float | None
) -> tuple[list[str], float]:
    """Make a row of the table, and its TFLOP per image.

    `paper` is the TFLOP per image of the paper's loop, or None for that row itself.
    """
    tera = 1e12 * IMAGES
    total = sum_parts(counts) / tera
    floor = sum_parts(least) / tera
    recomputed = counts["images"] - least["images"]
    row = [
        name,
        f"{least['images'] / IMAGES:.0f}",
        f"{least['images with a graph'] / IMAGES:.0f}",
        f"{recomputed / IMAGES:.0f}",
        f"{total:.2f}",
        *(f"{counts[part] / tera:.2f}" for part in PARTS),
        f"{floor:.2f}",
        f"{total * IMAGES:.0f}",
        f"{total / (paper or total):.3f}",
    ]
    return row, total


def make_table() -> Table:
    table, paper = Table(COLUMNS, []), None
    for name, (family, config) in list_settings().items():
        row, total = make_row(name, *count_setting(family, config), paper)
        table.rows.append(row)
        paper = paper or total
        print(f"{name}: {total:.2f} TFLOP per image", flush=True)
    return table


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=read_path, default=ROOT / "docs/flops.md", help="the page (docs/flops.md)"
    )
    out = parser.parse_args(argv).out
    write_text(out, TEXT.format(images=IMAGES, table=make_table().to_markdown()))


if __name__ == "__main__":
    run_script(main)
