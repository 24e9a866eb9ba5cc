"""What a class token costs: seconds, UNet calls, memory and bytes, beside a plain loop and the machine's floor.

    python -m benchmarks.cost                                                       the miniature, on a CPU
    python -m benchmarks.cost --random_weights sd14 --device cuda --dtype bf16      Stable Diffusion 1.4's sizes

Each row is measured in a process of its own, --rounds times in turn with the others, and the median counts: on a
machine whose speed drifts, only ratios within one run mean something. The plain loop is benchmarks/plain_loop.py.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import class_token
import diffusion
import learner
import training
from benchmarks import plain_loop
from benchmarks.random_weights import sd14
from classifiers import load_classifier
from config import RunConfig, parse, to_yaml
from diffusion import load_components
from learner import Job
from memory import peak_memory
from outputs import save
from run import DTYPES
from sweep import hide_progress
from training import train_tokens
from utils import ROOT, write_json, write_text

PAPER = {"train_timesteps": None, "epoch_size": 5, "fresh_noise": False}
FOREVER = {"target_accuracy": 1.0, "early_stopping": 10**6}


class Row(NamedTuple):
    """A way to train: its name in the table, the plain loop or ours, what differs from the config, classes at once."""

    name: str
    plain: bool
    changes: dict
    classes: int


def rows_of(config: RunConfig) -> list[Row]:
    """The paper's trajectory; where the config has one of its own that too, at as many images and at its own number."""
    settings = {", paper's trajectory, 5 images": PAPER}
    if config.train_timesteps:
        settings |= {", short trajectory, 5 images": {"epoch_size": 5},
                     f", short trajectory, {config.epoch_size} images": {}}
    rows = [row for name, changes in settings.items()
            for row in (Row("plain loop" + name, True, changes, 1), Row("ours" + name, False, changes, 1),
                        Row(f"ours{name}, 8 classes at once", False, changes, 8))]
    return [*rows, Row("ours, paper's trajectory, 5 images, batches of 1", False, {**PAPER, "batch_size": 1}, 1)]


def setting_of(config: RunConfig) -> str:
    """What decides how many updates a token takes, whoever makes them."""
    return f"{config.train_timesteps or 'paper'} {config.epoch_size}"


def load(config: RunConfig, random_weights: str | None):
    if random_weights:
        return sd14(config.device, DTYPES[config.mixed_precision])
    return (load_components(config.model, config.device, DTYPES[config.mixed_precision]),
            load_classifier(config.classifier, config.device))


class Enough(Exception):
    """The updates to be measured are done."""


def run_updates(row: Row, config: RunConfig, components, classifier, updates: int, folder: Path, begin):
    """Train every class of the row for so many updates, and then, after `begin()`, for as many again."""
    config = replace(config, **FOREVER, num_train_epochs=10**6, classes_at_once=row.classes)
    if row.plain:
        loop = plain_loop.train(config, components, classifier, 0, "crane", folder=None)
        for i in range(2 * updates):
            if i == updates:
                begin()
            next(loop)
        return
    token_id, done = class_token.add_placeholder(components.tokenizer, config.placeholder_token), []

    def counted(*arguments):
        learner.update(*arguments)
        done.append(arguments)
        if len(done) == updates * row.classes:
            begin()
        if len(done) == 2 * updates * row.classes:
            raise Enough

    training.update = counted
    with contextlib.suppress(Enough):
        jobs = (Job(i % len(classifier.labels), "crane", folder / f"{i}", folder / f"{i}/images")
                for i in range(row.classes))
        list(train_tokens(config, components, token_id, classifier, jobs))


def measure(row: Row, config: RunConfig, random_weights: str | None, updates: int) -> dict:
    """One row, once; runs in a process of its own."""
    hide_progress()
    config = replace(config, **row.changes)
    components, classifier = load(config, random_weights)
    calls, started, cuda = [], [], config.device.startswith("cuda")
    components.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with tempfile.TemporaryDirectory() as folder, in_networks(components, classifier) as networks:

        def begin():
            synchronize(config.device)
            if cuda:
                torch.cuda.reset_peak_memory_stats(config.device)
            calls.clear()
            networks.clear()
            started.append(time.perf_counter())

        run_updates(row, config, components, classifier, updates, Path(folder, "run"), begin)
        synchronize(config.device)
        seconds = time.perf_counter() - started[0]
        peak = peak_memory(config.device)
        written = bytes_of(row, config, components, classifier, Path(folder, "saved"))
    return {"seconds_per_update": seconds / updates / row.classes, "unet_images": sum(calls) / updates / row.classes,
            "images_per_second": config.epoch_size * row.classes * updates / seconds,
            "share_outside_networks": None if cuda else 1 - sum(networks) / seconds, "peak_memory_gb": peak,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if cuda else None, "bytes_a_class": written}


def bytes_of(row: Row, config: RunConfig, components, classifier, folder: Path) -> int:
    """What a class of as many updates as the config allows leaves on disk without its images.

    The plain loop's save, of an improvement, is not timed.
    """
    if row.plain:
        plain_loop.pipeline(components).save_pretrained(folder)
    else:
        job = Job(0, "crane", folder, folder / "images")
        state, trained = learner.start(replace(config, **FOREVER), components, job), None
        while not trained:
            state.vector.grad = torch.randn_like(state.vector)
            trained = learner.update(replace(config, **FOREVER), state, 1 / (1 + len(state.history)), 0.5)
        write_text(folder / "config.yml", to_yaml(config))
        with contextlib.redirect_stdout(io.StringIO()):
            save(config, job, trained)
        (folder / learner.STATE_FILE).unlink()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")


def least_flops(row: Row, config: RunConfig, random_weights: str | None) -> int:
    """FLOPs of the calls that one update of one class cannot do without, whoever does it: nothing computed anew."""
    hide_progress()
    config = replace(config, **{**row.changes, **FOREVER, "num_train_epochs": 1, "batch_size": 4})
    components, classifier = load(config, random_weights)
    token_id = class_token.add_placeholder(components.tokenizer, config.placeholder_token)
    diffusion.checkpoint = lambda function, *arguments, **_: function(*arguments)
    with tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
        list(train_tokens(config, components, token_id, classifier,
                          iter([Job(0, "crane", Path(folder), Path(folder, "images"))])))
    return counter.get_total_flops()


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
        try:
            backward(*args, **kwargs)
        finally:
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
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def median_of(rounds: list[dict]) -> dict:
    return {key: value if value is None else statistics.median(each[key] for each in rounds)
            for key, value in rounds[0].items()}


def write_table(out: Path) -> list[str]:
    """docs/cost.md from docs/cost.json, and from docs/updates.json (benchmarks/updates.py) where that is there.

    The plain loop's seconds are without its saves.
    """
    read = [json.loads(file.read_text()) if file.exists() else {}
            for file in (out.with_suffix(".json"), out.with_name("updates.json"))]
    measured, updates = read[0], read[1].get("settings", {})
    rows, about = measured["rows"], {key: value for key, value in measured.items() if key != "rows"}
    columns = ["", "s an update and class", "images/s", "times the plain loop's", "times the paper's plain loop's",
               "UNet images", "floor s", "floor / s", "outside the networks", "peak GB", "bytes a class",
               "median updates to 0.9", "s to 0.9"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        seconds, plain = row["seconds_per_update"], next(each for each in rows if each["setting"] == row["setting"])
        outside = f"{100 * row['share_outside_networks']:.0f} %" if about["device"].startswith("cpu") else ""
        needed = updates.get(row["setting"], {}).get("median", "")
        cells = [row["name"], f"{seconds:.3g}", f"{row['images_per_second']:.2f}",
                 f"{row['images_per_second'] / plain['images_per_second']:.2f}",
                 f"{row['images_per_second'] / rows[0]['images_per_second']:.2f}", f"{row['unet_images']:.0f}",
                 f"{row['floor_seconds']:.3g}", f"{100 * row['floor_seconds'] / seconds:.0f} %", outside,
                 f"{row['peak_memory_gb']:.2f}", f"{row['bytes_a_class']:,.0f}", f"{needed}",
                 f"{needed * seconds:.3g}" if isinstance(needed, (int, float)) else needed]
        lines.append(f"| {' | '.join(cells)} |")
    write_text(out.with_suffix(".md"), "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]))
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
    changes = [row.changes for row in rows]
    flops = [apart(least_flops, rows[changes.index(each)], config, arguments.random_weights)
             if changes.index(each) == i else None for i, each in enumerate(changes)]
    rates, rounds = [], []
    for i in range(arguments.rounds):
        rates.append(apart(measure_rate, config))
        rounds.append([])
        for row in rows:
            rounds[-1].append(apart(measure, row, config, arguments.random_weights, arguments.updates))
            print(f"round {i + 1}, {row.name}: {rounds[-1][-1]['seconds_per_update']:.3g} s an update and class",
                  flush=True)
    rate = statistics.median(rates)
    results = [{**median_of(each), "floor_seconds": flops[changes.index(row.changes)] / rate}
               for row, each in zip(rows, zip(*rounds, strict=True), strict=True)]
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    about = {"device": f"{config.device}: {device}", "matmul_flops_per_second": rate, "updates": arguments.updates,
             "rounds": arguments.rounds, "python": platform.python_version(), "torch": torch.__version__,
             "diffusers": diffusers.__version__}
    write_json(arguments.out.with_suffix(".json"), {**about, "rows": [
        {"name": row.name, "setting": setting_of(replace(config, **row.changes)), **result}
        for row, result in zip(rows, results, strict=True)]})
    print("\n".join(write_table(arguments.out)))


if __name__ == "__main__":
    main()
