"""What a class token costs, beside a plain loop and the machine's floor.

Seconds, UNet calls, memory and bytes.

    python -m benchmarks.cost                                                       the miniature,
        on a CPU
    python -m benchmarks.cost --random_weights sd14 --device cuda --dtype bf16      Stable Diffusion
        1.4's sizes

Each row is measured in a process of its own, --rounds times in turn with the others, and the median
counts: on a machine whose speed drifts, only ratios within one run mean something. The plain loop
is method/plain_loop.py.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from torch.utils.benchmark import Timer

from benchmarks.random_weights import save_sd14
from command_line import parse_settings
from config import RunConfig
from evaluation.read_image import load_squares
from evaluation.real_images import draw_missing_images, find_real_images
from evaluation.tables import Table
from method.class_training import ClassTraining, UpdateFigures
from method.losses import cross_entropy
from method.plain_loop import train_token
from method.textual_inversion import PER_STEP, learn_vectors
from method.update import GRAPHS, compute_gradients, fit_token_gradient, join_batches
from models.batch_size import peak_memory_gb
from models.classifiers import Classifier
from models.costs import PARTS
from models.generator import PRECISIONS, Generator
from prompt_datasets import TargetClass, target_class
from runs.estimate import count_update
from runs.folders import RunFolder
from runs.session import Session, find_training_sampling, find_training_settings
from system.paths import find_path, read_path
from system.terminal import run_script
from system.text_files import read_json
from tokens.class_token import start_vectors
from utils import ROOT, write_json, write_text

PAPER = {
    "train_timesteps": None,
    "train_guidance_scale": None,
    "epoch_size": 5,
    "fresh_noise": False,
}
PEER = "textual inversion"  # by the recipe of diffusers' script
PICTURES = 5  # real ones, of which the peer learns
FOREVER = {"target_accuracy": 1.0, "early_stopping": 100_000}
TARGET = target_class(0, "crane", "crane")
COLUMNS = [
    "",
    "s per update and class",
    "images/s",
    "times the plain loop's",
    "times the paper's plain loop's",
    "UNet images",
    "floor s",
    "floor / s",
    "peak GB",
    "bytes per class",
    "median updates to 0.9",
    "s to 0.9",
    "images to 0.9",
]


def name_setting(config: RunConfig) -> str:
    """Name what decides the number of updates: trajectory and images per update."""
    return f"{config.train_timesteps or 'paper'} {config.epoch_size}"


def list_rows(config: RunConfig) -> dict[str, tuple[bool, RunConfig, int]]:
    """The rows by name: whether it is the plain loop, its settings, its classes at once.

    The paper's trajectory; where the config has another, that too, with as many images and with its
    own number.
    """
    paper = replace(config, **PAPER)
    settings = {"paper's trajectory, 5 images": paper}
    if config.train_timesteps:
        settings["short trajectory, 5 images"] = replace(config, epoch_size=5)
        settings[f"short trajectory, {config.epoch_size} images"] = config
    rows = {}
    for name, found in settings.items():
        rows[f"plain loop, {name}"] = (True, found, 1)
        rows[f"ours, {name}"] = (False, found, 1)
        rows[f"ours, {name}, 8 classes at once"] = (False, found, 8)
    one_by_one = replace(paper, batch_size=1)
    rows["ours, paper's trajectory, 5 images, batches of 1"] = (False, one_by_one, 1)
    return rows


def new_training(
    config: RunConfig, generator: Generator, target: TargetClass, folder: Path
) -> ClassTraining:
    """Begin the training of a class, with its files in `folder`."""
    return ClassTraining(
        target,
        start_vectors(generator, config.initializer_token, config.num_vectors),
        find_training_settings(config),
        generator.dtype,
        folder / "history.jsonl",
        folder / "training_state.pt",
        folder / "images",
    )


def measure_row(plain: bool, config: RunConfig, classes: int, updates: int) -> dict:
    """Measure one row once, after as many updates to warm up; runs in a process of its own."""
    session = open_session(config)
    models = open_pipeline(config) if plain else session.generator
    with tempfile.TemporaryDirectory() as path:
        work, saved = Path(path, "work"), Path(path, "saved")
        measured = measure_updates(
            plain, models, session.classifier, config, classes, updates, work
        )
        return {**measured, "bytes_per_class": count_bytes(plain, config, models, saved)}


def open_session(config: RunConfig) -> Session:
    """Open the models of a setting; the class does not matter."""
    return Session(replace(config, class_index="1"))


def open_pipeline(config: RunConfig) -> StableDiffusionPipeline:
    """Load the pipeline with which the plain loop draws."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        find_path(config.model) or config.model,
        torch_dtype=PRECISIONS[config.mixed_precision],
        safety_checker=None,
        feature_extractor=None,
    )
    return pipeline.to(config.device)


def measure_updates(
    plain: bool,
    models,
    classifier: Classifier,
    config: RunConfig,
    classes: int,
    updates: int,
    work: Path,
) -> dict:
    """Time `updates` updates of `classes` classes, by the plain loop on a pipeline or by ours.

    As many updates come before, to warm up.
    """
    settings, sampling = find_training_settings(config), find_training_sampling(config)
    count, images, marks = updates * classes, [], []
    denoiser = models.components["unet"] if plain else models.denoiser
    watch = denoiser.register_forward_pre_hook(
        lambda network, inputs: images.append(len(inputs[0]))
    )
    cuda = config.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(config.device)  # loading does not count

    def mark_update():
        if cuda:
            torch.cuda.synchronize(config.device)
        marks.append((time.perf_counter(), sum(images)))

    if plain:
        for _ in islice(train_token(models, classifier, TARGET, settings, sampling), 2 * updates):
            mark_update()
    else:
        targets = [
            target_class(i % len(classifier.labels), "crane", "crane") for i in range(classes)
        ]
        running = [
            new_training(config, models, target, work / str(i)) for i, target in enumerate(targets)
        ]
        images_at_once = classes * config.epoch_size
        gradient = fit_token_gradient(images_at_once, config.batch_size, sampling, config.device)
        loss_fn = cross_entropy(classifier)
        for _ in range(2 * updates):
            figures = compute_gradients(running, models, loss_fn, sampling, gradient)
            for training, measured in zip(running, figures, strict=True):
                training.finish_update(measured)
            mark_update()
    watch.remove()
    (begin, before), (end, after) = marks[updates - 1], marks[-1]
    return {
        "seconds_per_update": (end - begin) / count,
        "unet_images": (after - before) / count,
        "images_per_second": config.epoch_size * count / (end - begin),
        "peak_memory_gb": peak_memory_gb(config.device),
    }


def measure_peer(config: RunConfig, updates: int) -> dict:
    """Time a step of textual inversion on one class, after as many to warm up.

    Runs in a process of its own.
    """
    session = open_session(config)
    generator = session.generator
    (target,) = session.targets
    marks: list[float] = []
    generator.denoiser.register_forward_pre_hook(
        lambda network, inputs: marks.append(time.perf_counter())
    )
    source = config.real_images
    with tempfile.TemporaryDirectory() as path:
        folders, cache = {target: Path(path)}, Path(path, "cache")
        found = find_real_images(source, session.every_class(), folders, PICTURES, cache)
        files = draw_missing_images(source, target, found[target][:PICTURES])
        pictures = [load_squares(files, config.height, config.width)]
        start = session.start_vectors(generator)[None]
        word = config.placeholder_token
        steps = [2 * updates + 1]
        learn_vectors(generator, pictures, start, word, steps, config.weight_decay)
    seconds = (marks[-1] - marks[updates]) / updates
    return {
        "seconds_per_update": seconds,
        "unet_images": PER_STEP,
        "images_per_second": PER_STEP / seconds,
        "peak_memory_gb": peak_memory_gb(config.device),
    }


def count_bytes(plain: bool, config: RunConfig, models, path: Path) -> int:
    """Count the bytes a class leaves on disk, without images; for the plain loop, its pipeline."""
    if plain:
        models.save_pretrained(path)
    else:
        folder = RunFolder(str(path), config.classifier, TARGET, "run")
        folder.begin_training(asdict(config))
        training = new_training(config, models, TARGET, folder.tokens)
        stop = None
        while stop is None:
            training.vectors.grad = torch.randn_like(training.vectors)
            loss = torch.tensor(1 / (1 + len(training.history)))
            stop = training.finish_update(UpdateFigures(loss, torch.tensor(0.5), 0.1)).stop
        folder.save_training(training.trained_token(stop), models.token_widths, asdict(config))
    return sum(
        file.stat().st_size for file in path.rglob("*") if file.is_file() and file.suffix != ".png"
    )


def count_flops(config: RunConfig) -> int:
    """Count the FLOPs that an update of one class cannot avoid; nothing is recomputed."""
    session = open_session(config)
    generator = session.generator
    with tempfile.TemporaryDirectory() as path:
        training = new_training(config, generator, TARGET, Path(path))
        batch, vectors = join_batches([training], generator.device)
        counts = count_update(
            generator,
            session.classifier,
            batch,
            vectors,
            session.training_sampling,
            GRAPHS * len(batch.seeds),
        )
    return sum(counts[part] for part in PARTS)


def measure_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the FLOPs per second of a square matrix product: the most the machine can do."""
    size = 1024 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(10))


def run_apart(function, *arguments):
    """Run `function(*arguments)` in a silent process of its own, which has its own memory peak."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), silence_process) as pool:
        return pool.submit(function, *arguments).result()


def silence_process():
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def write_table(out: Path) -> str:
    """Write docs/cost.md from docs/cost.json, and from docs/updates.json where that exists."""
    about = read_json(out.with_suffix(".json"))
    rows = about.pop("rows")
    file = out.with_name("updates.json")
    updates = read_json(file)["settings"] if file.exists() else {}
    table = Table(COLUMNS, [])
    for row in rows:
        same_setting = [other for other in rows if other["setting"] == row["setting"]]
        needed = updates.get(row["setting"], {}).get("median", "")
        table.rows.append(describe_row(row, rows[0], same_setting[0], needed))
    described = ", ".join(f"{name} {value}" for name, value in about.items())
    write_text(out.with_suffix(".md"), f"{table.to_markdown()}\n\n{described}\n")
    return table.to_markdown()


def describe_row(row: dict, first: dict, plain: dict, needed: float | str) -> list:
    """A row of the table, beside the `first` one and the plain loop of the same setting.

    `needed` are its updates to 0.9, or words where nothing is known of them.
    """
    seconds, rate = row["seconds_per_update"], row["images_per_second"]
    floor = row["floor_seconds"]
    floor_cells = ["", ""]
    if floor:
        floor_cells = [f"{floor:.3g}", f"{100 * floor / seconds:.0f} %"]
    until_accurate = [needed, needed]
    if not isinstance(needed, str):
        images = rate * seconds
        until_accurate = [f"{needed * seconds:.3g}", f"{needed * images:.3g}"]
    return [
        row["name"],
        f"{seconds:.3g}",
        f"{rate:.2f}",
        f"{rate / plain['images_per_second']:.2f}",
        f"{rate / first['images_per_second']:.2f}",
        f"{row['unet_images']:.0f}",
        *floor_cells,
        f"{row['peak_memory_gb']:.2f}",
        f"{row.get('bytes_per_class', 0):,.0f}",
        needed,
        *until_accurate,
    ]


def measure_rows(config: RunConfig, updates: int, rounds: int) -> tuple[list[dict], float]:
    """The medians of every row, and of the machine's FLOPs per second."""
    rows = list_rows(config)
    work = {name: (measure_row, *row, updates) for name, row in rows.items()}
    if config.real_images:
        peer = f"{PEER}, {PICTURES} real pictures, steps of {PER_STEP}"
        work[peer] = (measure_peer, config, 10 * updates)
    flops = {}
    for is_plain, found, _ in rows.values():
        if is_plain:
            flops[name_setting(found)] = run_apart(count_flops, found)
    rates: list[float] = []
    measured: dict[str, list[dict]] = {name: [] for name in work}
    for i in range(rounds):
        rates.append(run_apart(measure_rate, config.device, PRECISIONS[config.mixed_precision]))
        for name, job in work.items():
            found = run_apart(*job)
            measured[name].append(found)
            seconds = found["seconds_per_update"]
            print(f"round {i + 1}, {name}: {seconds:.3g} s per update and class", flush=True)
    rate = statistics.median(rates)
    results = []
    for name, of_rounds in measured.items():
        setting = name_setting(rows[name][1]) if name in rows else PEER
        floor = flops[setting] / rate if setting in flops else None
        row = {"name": name, "setting": setting, "floor_seconds": floor}
        for key in of_rounds[0]:
            row[key] = statistics.median(values[key] for values in of_rounds)
        results.append(row)
    return results, rate


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="configs/miniature.yml", help="settings of the run (the miniature's)"
    )
    parser.add_argument(
        "--random_weights",
        choices=["sd14"],
        help=(
            "Stable Diffusion 1.4 and ViT-L/16 in the paper's "
            "setting, instead of a config's weights"
        ),
    )
    parser.add_argument("--device", help="cpu, cuda (the config's)")
    parser.add_argument("--dtype", choices=list(PRECISIONS), help="no, fp16 or bf16 (the config's)")
    parser.add_argument("--updates", type=int, default=2, help="measured updates per round (2)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds, of which the median counts (3)"
    )
    parser.add_argument(
        "--out", type=read_path, default=ROOT / "docs/cost", help="where results go (docs/cost)"
    )
    options = parser.parse_args()
    config = (
        RunConfig() if options.random_weights else parse_settings(["--config", options.config])[0]
    )
    config = replace(
        config,
        device=options.device or config.device,
        mixed_precision=options.dtype or config.mixed_precision,
        **FOREVER,
    )
    with tempfile.TemporaryDirectory() as weights:
        if options.random_weights:
            config = replace(config, **run_apart(save_sd14, Path(weights)))
        rows, rate = measure_rows(config, options.updates, options.rounds)
    device = f"{torch.get_num_threads()} threads"
    if config.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    write_json(
        options.out.with_suffix(".json"),
        {
            "device": f"{config.device}: {device}",
            "matmul_flops_per_second": rate,
            "updates": options.updates,
            "rounds": options.rounds,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "rows": rows,
        },
    )
    print(write_table(options.out))


if __name__ == "__main__":
    run_script(main)
