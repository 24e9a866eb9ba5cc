"""What Stable Diffusion's sizes cost on a GPU, and a thousand classes.

The last two stages of benchmarks/gpu.py.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cost import FOREVER, measure_rate, measure_updates
from benchmarks.flops import IMAGES, count_images, wrap_classifier
from benchmarks.gpu_checks import WORK
from benchmarks.random_weights import TINY, build_generator, build_pipeline, build_scheduler
from config import RunConfig
from models.batch_size import peak_memory_gb
from models.costs import PARTS
from models.generator import PRECISIONS
from models.sampling import SamplingSettings, new_scheduler
from runs.session import find_training_sampling
from system.text_files import read_json
from utils import require

DTYPE = "bf16"
SHORT = {"train_timesteps": [999, 800, 600], "train_guidance_scale": 1.0}
SMALL = {"batch_size": 1, "gradient_checkpointing": True}
RATE = "a matrix product"
PLAIN = "plain loop, paper's trajectory"
DRAWING = "drawing, 30 steps, guidance 7"
ONE, EIGHT = "ours, paper's trajectory", "ours, paper's trajectory, 8 classes at once"
SHORT_ONE = "ours, 999 800 600, training guidance 1"
SHORT_EIGHT = f"{SHORT_ONE}, 8 classes at once"
SECONDS, CLASS_SECONDS = "s per update and class", "s per class of 50 updates"
DRAWN, UPDATES, CLASSES, CARDS = 8, 50, 1000, (1, 8, 64)
EVALUATED = 20  # pictures of a class's evaluation
PICTURE_MB, FILES_MB = 0.4, 0.01  # a picture; the rest of a class


class Row(NamedTuple):
    """One setting to measure, as it differs from the paper's."""

    family: str = "sd14"
    classes: int = 1
    changes: dict = {}
    plain: bool = False
    compiled: bool = False


ROWS = {
    PLAIN: Row(plain=True),
    ONE: Row(),
    EIGHT: Row(classes=8),
    SHORT_EIGHT: Row(classes=8, changes=SHORT),
    "ours, paper's trajectory, batches of 1": Row(changes={"batch_size": 1}),
    "ours, training guidance 1": Row(changes={"train_guidance_scale": 1.0}),
    SHORT_ONE: Row(changes=SHORT),
    "ours, 600, training guidance 1": Row(
        changes={"train_timesteps": [600], "train_guidance_scale": 1.0}
    ),
    "ours, batches of 1, gradient_checkpointing": Row(changes=SMALL),
    "ours, SD-Turbo's sizes, one step": Row(
        "sd_turbo", changes={"num_inference_steps": 1, "guidance_scale": 0.0}
    ),
    "ours, SDXL's sizes, 1024 x 1024, guidance 5": Row(
        "sdxl",
        changes={
            "height": 1024,
            "width": 1024,
            "guidance_scale": 5.0,
            "gradient_checkpointing": True,
        },
    ),
    "ours, paper's trajectory, compiled": Row(compiled=True),
    "ours, paper's trajectory, 8 classes at once, compiled": Row(classes=8, compiled=True),
}


def row_config(row: Row, device: str, tiny: bool) -> RunConfig:
    """Return the paper's setting with a row's changes.

    A tiny row has two images of 64 x 64 and at most three steps.
    """
    config = replace(
        RunConfig(),
        **FOREVER,
        device=device,
        mixed_precision="no" if tiny else DTYPE,
        **row.changes,
    )
    steps = min(3, config.num_inference_steps)
    if tiny:
        return replace(config, height=64, width=64, epoch_size=2, num_inference_steps=steps)
    return config


@cache
def count_flops(family: str, height: int, width: int, narrowed: int) -> tuple[float, float]:
    """Count the FLOPs of an update with one UNet call per image, and of one more without a graph.

    A long trajectory need not be run for it: its calls are all alike.
    """
    generator, model = build_generator(family, narrowed=narrowed)
    generator.set_placeholder("newclas")  # the word in the prompts of `count_images`
    sampling = SamplingSettings(height, width, guidance_scale=1.0, num_inference_steps=1)
    totals = []
    for timesteps in ((600,), (999, 600)):
        counts = count_images(
            generator,
            wrap_classifier(model),
            sampling._replace(timesteps=timesteps),
            is_recomputed=False,
        )
        totals.append(sum(counts[part] for part in PARTS))
    return totals[0], totals[1] - totals[0]


def count_calls(family: str, config: RunConfig) -> int:
    """Count the UNet calls per image, without recomputation; guidance takes two."""
    sampling = find_training_sampling(config)
    steps = len(new_scheduler(build_scheduler(family), sampling).timesteps)
    return steps * (2 if sampling.guidance_scale > 1 else 1)


@lru_cache(maxsize=1)
def open_models(
    family: str,
    plain: bool,
    compiled: bool,
    checkpointing: bool,
    device: str,
    precision: str,
    narrowed: int,
) -> tuple:
    """Load a generator, or the plain loop's pipeline, and a classifier.

    Both are kept until a row needs others.
    """
    dtype = PRECISIONS[precision]
    if plain:
        pipeline, model = build_pipeline(device, dtype, narrowed)
        return pipeline, wrap_classifier(model)
    generator, model = build_generator(family, device, dtype, narrowed)
    generator.set_placeholder(RunConfig().placeholder_token)
    for network in generator.networks:
        if checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
    if compiled:
        generator.compile_networks()
    return generator, wrap_classifier(model)


def measure_cost(name: str, out: Path, device: str, tiny: bool) -> dict:
    """Measure seconds and peak memory, and their share of what the GPU can do."""
    row, measured = ROWS[name], read_rows(out)
    config, narrowed = row_config(row, device, tiny), TINY if tiny else 1
    models, classifier = open_models(
        row.family,
        row.plain,
        row.compiled,
        config.gradient_checkpointing,
        device,
        config.mixed_precision,
        narrowed,
    )
    found = measure_updates(
        row.plain, models, classifier, config, row.classes, 1 if tiny else 2, out / WORK / name
    )
    seconds, plain = found["seconds_per_update"], measured.get(PLAIN, {}).get(SECONDS)
    once, another = count_flops(row.family, config.height, config.width, narrowed)
    flops = (once + (count_calls(row.family, config) - 1) * another) * config.epoch_size / IMAGES
    rate = measured.get(RATE, {}).get("TFLOP/s")
    return {
        SECONDS: seconds,
        "times the plain loop's speed": plain / seconds if plain else 1.0,
        "share of the rate": flops / seconds / (rate * 1e12) if rate else "",
        "TFLOP": flops / 1e12,
        "peak GB": found["peak_memory_gb"],
        CLASS_SECONDS: UPDATES * seconds,
    }


@torch.no_grad()
def measure_drawing(device: str, tiny: bool) -> dict:
    """Measure the seconds per picture of an evaluation."""
    config = row_config(Row(), device, tiny)
    generator, _ = open_models(
        "sd14", False, False, False, device, config.mixed_precision, TINY if tiny else 1
    )
    cond = generator.encode(["A photo of a crane"])
    sampling = SamplingSettings(**config.sampling_settings())
    for _ in range(2):  # the first warms up
        started = time.monotonic()
        generator.decode(
            generator.sample(cond.expand(DRAWN, -1, -1), range(DRAWN), sampling)
        ).sum().item()
    return {
        "s per picture": (time.monotonic() - started) / DRAWN,
        "peak GB": peak_memory_gb(device),
    }


def list_costs(out: Path, device: str, tiny: bool) -> dict[str, Callable[[], dict]]:
    """List the rows of the third stage."""
    # which takes minutes on a CPU
    rows = {
        name: partial(measure_cost, name, out, device, tiny)
        for name, row in ROWS.items()
        if not (tiny and row.compiled)
    }
    return {
        RATE: lambda: {"TFLOP/s": measure_rate(device, PRECISIONS["no" if tiny else DTYPE]) / 1e12},
        **{name: rows[name] for name in (PLAIN, ONE, EIGHT, SHORT_EIGHT)},
        DRAWING: partial(measure_drawing, device, tiny),
        **rows,
    }


def read_rows(out: Path) -> dict[str, dict]:
    """Read what the third stage has measured so far."""
    file = out / "gpu.json"
    return read_json(file, "rows")["rows"].get("cost", {}) if file.exists() else {}


def predict_sweep(out: Path, setting: str) -> dict:
    """Predict the hours and the disk that training and evaluating a thousand classes takes."""
    measured = read_rows(out)
    lacking = [
        name for name in (setting, DRAWING) if "failed" in measured.get(name, {"failed": ""})
    ]
    require(not lacking, f"needs results of the previous stage: {'; '.join(lacking)}")
    seconds = measured[setting][CLASS_SECONDS] + EVALUATED * measured[DRAWING]["s per picture"]
    kept = {"all": UPDATES * IMAGES, "film": 10 * IMAGES, "none": 0}
    predicted = {}
    for cards in CARDS:
        title = f"hours, {cards} card" if cards == 1 else f"hours, {cards} cards"
        predicted[title] = CLASSES * seconds / 3600 / cards
    for name, count in kept.items():
        megabytes = FILES_MB + PICTURE_MB * (count + EVALUATED)
        predicted[f"GB, train_images {name}"] = CLASSES * megabytes / 1000
    return predicted


def list_predictions(out: Path, device: str, tiny: bool) -> dict[str, Callable[[], dict]]:
    """List the rows of the last stage.

    They assume 50 updates and 20 evaluation pictures per class, of 0.4 MB each.
    """
    return {setting: partial(predict_sweep, out, setting) for setting in (ONE, EIGHT, SHORT_EIGHT)}
