"""How near the peak of memory that `--estimate` predicts is to that of a real update on a CPU.

    python -m tests.memory            the miniature, two minutes
    python -m tests.memory --sd14     also Stable Diffusion 1.4's sizes with random weights: 13 GB,
        ten minutes
    python -m tests.memory --save_configs DIR      only write Stable Diffusion 1.4's and ViT-L's
        configs, no weights

Each row is measured in a process of its own, whose memory goes back to the system as soon as it is
free: the growth of that process over what it holds once models and libraries are loaded, beside the
estimate without parameters.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import ViTImageProcessor

from benchmarks.flops import wrap_classifier
from benchmarks.random_weights import (
    build_generator,
    build_networks,
    build_scheduler,
    load_tokenizer,
)
from command_line import parse_settings
from config import RunConfig
from evaluation.tables import Table
from method.losses import cross_entropy
from method.update import token_gradient
from models.generator import PRECISIONS
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES
from runs.estimate import EstimateSettings, Update, make_batch, measure_update, open_update
from system.terminal import run_script
from tests.conftest import MODEL_INDEX
from utils import ROOT, write_json

MINIATURE = [
    "--config",
    str(ROOT / "configs/miniature.yml"),
    "--epoch_size",
    "32",
    "--batch_size",
    "32",
]
ROWS = {
    "miniature": [],
    "batch_size 16": ["--batch_size", "16"],
    "batch_size 64: the denoiser's graph is kept": ["--batch_size", "64"],
    "gradient_checkpointing": ["--gradient_checkpointing", "True"],
    "one step": ["--train_timesteps", "600"],
    "the paper's trajectory, 3 steps, guidance 3": [
        "--train_timesteps",
        "none",
        "--num_inference_steps",
        "3",
        "--train_guidance_scale",
        "3",
    ],
    "bf16": ["--mixed_precision", "bf16"],
    "8 images of 128 x 128": [
        "--epoch_size",
        "8",
        "--batch_size",
        "8",
        "--height",
        "128",
        "--width",
        "128",
    ],
    "8 classes at once of 4 images": ["--epoch_size", "4", "--classes_at_once", "8"],
}
ONE_STEP = [
    "--device",
    "cpu",
    "--epoch_size",
    "1",
    "--batch_size",
    "1",
    "--train_timesteps",
    "600",
    "--train_guidance_scale",
    "1",
]
SD14 = {
    "SD 1.4's sizes, one image of 512 x 512, one step, float32": [
        *ONE_STEP,
        "--mixed_precision",
        "no",
    ],
    "the same in bf16": [*ONE_STEP, "--mixed_precision", "bf16"],
}
# bytes; glibc keeps less than these
RETURNED = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
COLUMNS = ["setting", "estimated GB", "measured GB", "estimated / measured", "parameters GB"]


def open_updates(name: str, device: str) -> tuple[Update, SamplingSettings, RunConfig]:
    """A row's update on a device, how it samples, and its settings."""
    config, _ = parse_settings([*MINIATURE, *ROWS[name]] if name in ROWS else SD14[name])
    settings = EstimateSettings(**config.pick_settings(EstimateSettings._fields))
    sampling = SamplingSettings(**config.sampling_settings(training=True))
    if name in ROWS:
        return open_update(settings, sampling, device), sampling, config
    generator, model = build_generator("sd14", device, PRECISIONS[config.mixed_precision])
    generator.set_placeholder(config.placeholder_token)
    prompts = [TEMPLATES[0].format(f"{config.placeholder_token} x")]
    return (
        Update(generator, wrap_classifier(model), generator.initial_vectors("a"), prompts, 1, 1),
        sampling,
        config,
    )


def run_update(update: Update, sampling: SamplingSettings, batch_size: int, images: int):
    batch, vectors = make_batch(update.generator, update.vectors, update.prompts, images)
    token_gradient(
        update.generator, cross_entropy(update.classifier), vectors, batch, sampling, batch_size
    )


def save_configs(folder: Path):
    """What `--estimate` reads of the two checkpoints, at the published sizes."""
    with torch.device("meta"):
        (text_encoder,), unet, vae, classifier = build_networks("sd14")
    for part, network in (("unet", unet), ("vae", vae)):
        network.save_config(folder / "generator" / part)
    text_encoder.config.save_pretrained(folder / "generator/text_encoder")
    load_tokenizer().save_pretrained(folder / "generator/tokenizer")
    build_scheduler("sd14").save_pretrained(folder / "generator/scheduler")
    write_json(folder / "generator/model_index.json", MODEL_INDEX)
    for part in (classifier.config, ViTImageProcessor()):
        part.save_pretrained(folder / "classifier")


def read_peak_gb() -> float:
    """The most memory of this process; getrusage's figure begins with that of the process which
    started it.
    """
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    ]
    return int(line.split()[1]) * 1024 / 1e9


def measure_row(name: str) -> dict[str, float]:
    """GB of a row, in this process."""
    update, sampling, config = open_updates(name, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = read_peak_gb()
    run_update(update, sampling, config.batch_size, update.images)
    measured = read_peak_gb() - before
    shapes, sampling, _ = open_updates(name, "meta")
    peaks = measure_update(shapes, sampling, config.batch_size)
    return {
        "estimated": (max(peaks.values()) - peaks["parameters"]) / 1e9,
        "measured": measured,
        "parameters": peaks["parameters"] / 1e9,
    }


def measure_apart(*names: str) -> list[dict[str, float]]:
    """`measure_row` of each in a new process."""
    command = [sys.executable, "-m", "tests.memory", "--rows", *names]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | RETURNED, capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sd14", action="store_true", help="Stable Diffusion 1.4's sizes too")
    parser.add_argument(
        "--rows", nargs="+", choices=[*ROWS, *SD14], help="measure these in this process, as JSON"
    )
    parser.add_argument("--save_configs", type=Path, help="only write the configs to this folder")
    options = parser.parse_args()
    if options.save_configs:
        save_configs(options.save_configs)
        return
    if options.rows:
        warm, sampling, _ = open_updates("miniature", "cpu")
        run_update(warm, sampling, 1, 1)  # loads what libraries load late
        print(json.dumps([measure_row(name) for name in options.rows]))
        return
    table = Table(COLUMNS, [])
    for name in [*ROWS, *SD14] if options.sd14 else ROWS:
        (found,) = measure_apart(name)
        table.rows.append(
            [
                name,
                f"{found['estimated']:.3f}",
                f"{found['measured']:.3f}",
                f"{found['estimated'] / found['measured']:.2f}",
                f"{found['parameters']:.3f}",
            ]
        )
        print(f"{name}: {table.rows[-1][1:]}", file=sys.stderr)
    print(table.to_markdown())


if __name__ == "__main__":
    run_script(main)
