"""What a class token costs: seconds, UNet calls, memory and bytes, beside a plain loop and the machine's floor.

    python -m benchmarks.cost                                                       the miniature, on a CPU
    python -m benchmarks.cost --random_weights sd14 --device cuda --dtype bf16      Stable Diffusion 1.4's sizes

Each row is measured in a process of its own, --rounds times in turn with the others, and the median counts: on a
machine whose speed drifts, only ratios within one run mean something. The plain loop is benchmarks/plain_loop.py.
"""

import argparse
import contextlib
import multiprocessing
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import class_token
from benchmarks import plain_loop
from benchmarks.random_weights import sd14
from classifiers import load_classifier
from config import RunConfig, parse, to_yaml
from diffusion import load_components
from learner import Job
from run import DTYPES, save
from sweep import hide_progress
from training import train_tokens
from utils import ROOT, peak_memory, write_json, write_text

PAPER = {"train_timesteps": None, "epoch_size": 5, "fresh_noise": False}
FOREVER = {"target_accuracy": 1.0, "early_stopping": 10**6}


class Row(NamedTuple):
    """A way to train: its name in the table, the plain loop or ours, what differs from the config, classes at once."""

    name: str
    plain: bool
    changes: dict
    classes: int


def rows_of(config: RunConfig) -> list[Row]:
    rows = [Row("plain loop", True, PAPER, 1), Row("ours", False, PAPER, 1),
            Row("ours, 8 classes at once", False, PAPER, 8)]
    if config.train_timesteps:
        short = {"epoch_size": 5}
        rows += [Row("plain loop, short trajectory", True, short, 1), Row("ours, short trajectory", False, short, 1),
                 Row("ours, short trajectory, 8 classes at once", False, short, 8),
                 Row("ours, short trajectory, 16 images", False, {"epoch_size": 16}, 1),
                 Row("ours, short trajectory, 16 images, 8 classes at once", False, {"epoch_size": 16}, 8)]
    return rows


def load(config: RunConfig, random_weights: str | None):
    if random_weights:
        return sd14(config.device, DTYPES[config.mixed_precision])
    return (load_components(config.model, config.device, DTYPES[config.mixed_precision]),
            load_classifier(config.classifier, config.device))


def run_updates(row: Row, config: RunConfig, components, classifier, token_id: int | None, updates: int, folder: Path):
    """Train every class of the row for so many updates; returns what came out, to be saved or not."""
    config = replace(config, **FOREVER, num_train_epochs=updates, classes_at_once=row.classes)
    if row.plain:
        saved = folder / "pipeline" if folder.name == "warm-up" else None  # a save is not of every update: not timed
        loop = plain_loop.train(config, components, classifier, 0, "crane", saved)
        return [next(loop) for _ in range(updates)]
    jobs = [Job(i, "crane", folder / f"{i}", folder / f"{i}" / "images") for i in range(row.classes)]
    return list(train_tokens(config, components, token_id, classifier, iter(jobs)))


def measure(row: Row, config: RunConfig, random_weights: str | None, updates: int, count_flops: bool) -> dict:
    """One row, once; runs in a process of its own."""
    hide_progress()
    config = replace(config, **row.changes)
    components, classifier = load(config, random_weights)
    token_id = None if row.plain else class_token.add_placeholder(components.tokenizer, config.placeholder_token)
    calls = []
    components.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run_updates(row, config, components, classifier, token_id, 1, folder / "warm-up")
        calls.clear()
        with in_networks(components, classifier) as networks:
            started = time.perf_counter()
            trained = run_updates(row, config, components, classifier, token_id, updates, folder / "measured")
            synchronize(config.device)
            seconds = time.perf_counter() - started
        unet_images = sum(calls) / updates / row.classes
        if not row.plain:
            with contextlib.redirect_stdout(None):
                for job, result in trained:
                    write_text(job.tokens / "config.yml", to_yaml(config))
                    save(config, job, result, classifier.labels[job.class_index])
        written = sum(path.stat().st_size for path in (folder / ("warm-up" if row.plain else "measured")).rglob("*")
                      if path.is_file() and path.suffix != ".png") / row.classes
        peak, flops = peak_memory(config.device), None
        if count_flops:
            with FlopCounterMode(display=False) as counter:
                run_updates(row, config, components, classifier, token_id, 1, folder / "counted")
            flops = counter.get_total_flops() / row.classes
    return {"seconds_per_update": seconds / updates / row.classes, "unet_images": unet_images,
            "images_per_second": config.epoch_size * row.classes * updates / seconds, "flops": flops,
            "share_outside_networks": 1 - sum(networks) / seconds, "peak_memory_gb": peak, "bytes_a_class": written}


@contextlib.contextmanager
def in_networks(components, classifier):
    """Yields a list of the seconds spent in calls of the networks, forwards and backwards; meaningful on a CPU."""
    seconds, depth = [], [0, 0.0]

    def enter(*_):
        depth[0] += 1
        if depth[0] == 1:
            depth[1] = time.perf_counter()

    def leave(*_):
        depth[0] -= 1
        if depth[0] == 0:
            seconds.append(time.perf_counter() - depth[1])

    hooks = [hook for module in (components.text_encoder, components.unet, components.vae.decoder, classifier.model)
             for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))]
    backward = torch.autograd.backward

    def timed(*args, **kwargs):
        enter()
        level = depth[0]
        backward(*args, **kwargs)
        depth[0] = level  # what is computed anew on the way back stops early, before its hook
        leave()

    torch.autograd.backward = timed
    try:
        yield seconds
    finally:
        torch.autograd.backward = backward
        for hook in hooks:
            hook.remove()


def synchronize(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def matmul_rate(device: str, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """FLOPs a second of a square matrix product: what the machine can do at best."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def measure_rate(config: RunConfig) -> float:
    return matmul_rate(config.device, DTYPES[config.mixed_precision], 1024 if config.device == "cpu" else 8192)


def apart(function, *arguments):
    """`function(*arguments)` in a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def table(rows: list[Row], results: list[dict], rate: float, device: str) -> list[str]:
    """Markdown, every figure a class and update. The plain loop's seconds are without its saves."""
    lines = ["| | s an update and class | images/s | times the plain loop's | times the plain loop's of the same "
             "trajectory | UNet images | TFLOPs | of the matmul rate | outside the networks | peak GB | bytes a class "
             "|",
             "|---" * 11 + "|"]
    plain = {"train_timesteps" in row.changes: result["images_per_second"]
             for row, result in zip(rows, results, strict=True) if row.plain}
    for row, result in zip(rows, results, strict=True):
        speed, alike = result["images_per_second"], plain["train_timesteps" in row.changes]
        outside = f"{100 * result['share_outside_networks']:.0f} %" if device == "cpu" else ""
        lines.append(f"| {row.name} | {result['seconds_per_update']:.3g} | {speed:.2f} | {speed / plain[True]:.2f} | "
                     f"{speed / alike:.2f} | {result['unet_images']:.0f} | {result['flops'] / 1e12:.3g} | "
                     f"{100 * result['flops'] / rate / result['seconds_per_update']:.0f} % | {outside} | "
                     f"{result['peak_memory_gb']:.2f} | {result['bytes_a_class']:,.0f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature.yml", help="settings of the run (the miniature's)")
    parser.add_argument("--random_weights", choices=["sd14"], help="Stable Diffusion 1.4 and ViT-L/16 in the paper's "
                                                                   "setting, instead of a config's weights")
    parser.add_argument("--device", help="cpu, cuda (the config's)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="no, fp16 or bf16 (the config's)")
    parser.add_argument("--updates", type=int, default=2, help="measured updates a round (2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median counts (3)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/cost", help="where the .md and .json go (docs/cost)")
    arguments = parser.parse_args()
    config = RunConfig() if arguments.random_weights else parse(["--config", arguments.config])[0]
    config = replace(config, device=arguments.device or config.device,
                     mixed_precision=arguments.dtype or config.mixed_precision)
    rows = rows_of(config)
    rate, rounds = apart(measure_rate, config), []
    for i in range(arguments.rounds):
        rounds.append([])
        for row in rows:
            result = apart(measure, row, config, arguments.random_weights, arguments.updates, i == 0)
            rounds[-1].append(result)
            print(f"round {i + 1}, {row.name}: {result['seconds_per_update']:.3g} s an update and class", flush=True)
    results = [{**first, **{key: statistics.median(each[i][key] for each in rounds) for key in first if key != "flops"}}
               for i, first in enumerate(rounds[0])]
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    about = {"device": f"{config.device}: {device}", "matmul_flops_per_second": rate, "updates": arguments.updates,
             "rounds": arguments.rounds, "python": platform.python_version(), "torch": torch.__version__,
             "diffusers": diffusers.__version__}
    lines = table(rows, results, rate, config.device)
    write_text(arguments.out.with_suffix(".md"), "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in
                                                                                    about.items()), ""]))
    write_json(arguments.out.with_suffix(".json"), {**about, "rows": [
        {"name": row.name, "classes_at_once": row.classes, **result} for row, result in zip(rows, results,
                                                                                          strict=True)]})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
