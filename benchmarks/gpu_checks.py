"""What must be right on a GPU, on the miniature: the first two stages of benchmarks/gpu.py."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import mean

import torch
from diffusers import StableDiffusionPipeline

from benchmarks.cost import FOREVER, new_training, open_session
from command_line import parse_settings
from config import RunConfig
from evaluation.drawing import PAIR
from evaluation.files import RunFiles
from evaluation.metrics import load_metrics
from method.class_training import DivergenceError
from method.losses import cross_entropy
from method.update import fit_token_gradient, join_batches, token_gradient, train_class
from models.batch_size import fit_batch_size
from models.generator import PRECISIONS
from models.sampling import SamplingSettings, seeded_generators
from prompt_datasets import target_class
from system.tensor_files import read_tensors
from system.text_files import read_json
from utils import ROOT

CONFIG = ROOT / "configs/miniature.yml"
TARGET = target_class(6, "jaguar", "jaguar, cat")  # class 7
PROMPTS, SEEDS = ["A photo of a crane", "A photo of a jaguar"], [7, 8]
DRAWING = SamplingSettings(64, 64, guidance_scale=7.0, num_inference_steps=10)
MEAN_DIFFERENCE = {"no": 1e-4, "fp16": 5e-3, "bf16": 3e-2}  # of pixels in [0, 1], at most
IMAGES = 16
WORK = "work"  # a folder for what is only measured
HOLDS = 4  # images, where a card that is too small is played on a CPU


def make_answer(passed: bool, **found) -> dict:
    return {"passed": "yes" if passed else "no", **found}


def miniature_config(device: str, precision: str = "no", **changes) -> RunConfig:
    config = parse_settings(["--config", str(CONFIG)])[0]
    return replace(
        config, device=device, mixed_precision=precision, **{**FOREVER, "epoch_size": 4, **changes}
    )


def compare_drawing(device: str, precision: str) -> dict:
    """Compare our sampler and decoder with diffusers' pipeline, from the same noise."""
    config = miniature_config(device, precision)
    generator, dtype = open_session(config).generator, PRECISIONS[precision]
    pipeline = StableDiffusionPipeline.from_pretrained(
        ROOT / config.model, torch_dtype=dtype, safety_checker=None, feature_extractor=None
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    # float32 in all its digits
    with (
        torch.no_grad(),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        ours = generator.decode(generator.sample(generator.encode(PROMPTS), SEEDS, DRAWING))
        noise = generator.initial_noise(seeded_generators(SEEDS), DRAWING)
        theirs = pipeline(
            PROMPTS,
            height=DRAWING.height,
            width=DRAWING.width,
            guidance_scale=DRAWING.guidance_scale,
            num_inference_steps=DRAWING.num_inference_steps,
            latents=noise,
            output_type="pt",
        ).images
    difference = (ours - theirs.float()).abs()
    mean = difference.mean().item()
    return make_answer(mean <= MEAN_DIFFERENCE[precision], mean=mean, most=difference.max().item())


def digest_weights(networks: Iterable[torch.nn.Module]) -> str:
    digest = sha256()
    for network in networks:
        for value in network.state_dict().values():
            digest.update(
                value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def train_vectors(config: RunConfig, folder: Path) -> tuple[torch.Tensor, bool]:
    """Train briefly; return the vectors [updates, K, D] and whether the weights are unchanged."""
    session = open_session(config)
    generator = session.generator
    networks = (*generator.networks, session.classifier.model)
    before = digest_weights(networks)
    training = new_training(config, generator, TARGET, folder)
    loss_fn = cross_entropy(session.classifier)
    gradient = fit_token_gradient(
        config.epoch_size, config.batch_size, session.training_sampling, config.device
    )
    trained = train_class(training, generator, loss_fn, session.training_sampling, gradient)
    return trained.every_update.cpu(), before == digest_weights(networks)


def check_weights(out: Path, device: str) -> dict:
    _, frozen = train_vectors(miniature_config(device, num_train_epochs=2), out / WORK / "frozen")
    return make_answer(frozen)


def compare_trainings(
    out: Path, device: str, first: str, second: str, least: float, updates: int
) -> dict:
    """Compute the cosine between what two trainings learn in these precisions."""
    found = [
        train_vectors(
            miniature_config(device, precision, num_train_epochs=updates),
            out / WORK / f"{first} {second} {i}",
        )[0]
        for i, precision in enumerate((first, second))
    ]
    ways = [(vectors[-1] - vectors[0]).flatten() for vectors in found]
    cosine = torch.cosine_similarity(*ways, dim=0).item()
    return make_answer(
        cosine >= least, cosine=cosine, most=(found[0] - found[1]).abs().max().item()
    )


def resume_killed(out: Path, device: str, updates: int) -> dict:
    """Kill run.py in the middle, start it again, and compare with an undisturbed training."""
    config = miniature_config(
        device, num_train_epochs=updates, output_path=str(out / WORK / "killed")
    )
    settings = {
        "config": CONFIG,
        "class_index": TARGET.number,
        "train": True,
        "exp_id": "killed",
        "device": device,
        **config.pick_settings(
            ("epoch_size", "num_train_epochs", "target_accuracy", "early_stopping", "output_path")
        ),
    }
    command = [sys.executable, "run.py"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    files = RunFiles(Path(config.output_path, "img/miniature", TARGET.folder, "killed"))
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not files.state_file.exists():
        time.sleep(0.02)
    process.kill()
    was_killed = process.wait() < 0
    updates_before = len(files.history_file.read_text().splitlines()) if was_killed else updates
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole, _ = train_vectors(config, out / WORK / "undisturbed")
    history = [json.loads(line) for line in files.history_file.read_text().splitlines()]
    norms = whole.flatten(1).norm(dim=1)
    difference = max(abs(line["vector_norm"] - norms[line["update"]].item()) for line in history)
    done = len(history) == updates and read_tensors(files.token_file)[0] != {}
    return make_answer(
        was_killed and done and difference < 1e-3,
        most=difference,
        note=f"killed after {updates_before}",
    )


def survive_shortage(out: Path, device: str) -> dict:
    """Compare an update that does not fit into memory at once with one that does."""
    config, cuda = miniature_config(device, epoch_size=IMAGES), device.startswith("cuda")
    session = open_session(config)
    generator, loss_fn = session.generator, cross_entropy(session.classifier)
    sampling, tried, gradients, peak = session.training_sampling, [], [], 0

    def watched_gradient(*arguments, batch_size: int):
        tried.append(batch_size)
        if gradients and not cuda and batch_size > HOLDS:  # only a card can be made small
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return token_gradient(*arguments, batch_size=batch_size)

    for name in ("roomy", "short"):
        training = new_training(config, generator, TARGET, out / WORK / name)
        batch, vectors = join_batches([training], generator.device)
        if cuda and gradients:
            shrink_card(generator.device, peak)
        elif cuda:
            torch.cuda.reset_peak_memory_stats(device)
        fit_batch_size(watched_gradient, None, 2 * IMAGES)(
            generator, loss_fn, vectors, batch, sampling
        )
        gradients.append(training.vectors.grad.flatten().cpu())
        peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.set_per_process_memory_fraction(1.0, generator.device)
    cosine = torch.cosine_similarity(*gradients, dim=0).item()
    return make_answer(
        len(tried) > 2 and cosine > 0.9999,
        cosine=cosine,
        note=f"images with a graph: {', then '.join(map(str, tried[1:]))}"
        + ("" if cuda else " (no card: played)"),
    )


def shrink_card(device: torch.device, peak: int):
    """Leave this process half of the memory, in bytes, that it needed at its `peak`."""
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((held + (peak - held) / 2) / whole, device)


def survive_overflow(out: Path, device: str, updates: int, scale: float) -> dict:
    """Train in float16 with gradients that overflow at first.

    Such updates are skipped, and the scale halved, until gradients are finite.
    """
    config = miniature_config(device, "fp16", num_train_epochs=updates, epoch_size=1)
    session = open_session(config)
    generator, loss_fn = session.generator, cross_entropy(session.classifier)
    training = new_training(config, generator, TARGET, out / WORK / "overflow")
    training.scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=scale)
    start = training.vectors.detach().clone()
    sampling = session.training_sampling
    gradient = fit_token_gradient(config.epoch_size, None, sampling, config.device)
    try:
        train_class(training, generator, loss_fn, sampling, gradient)
        is_trained = True
    except DivergenceError:
        is_trained = False
    skipped = [line for line in training.history if line["grad_norm"] is None]
    still = all(torch.equal(vectors, start) for vectors in training.past[: len(skipped)])
    recovered = 0 < len(skipped) < updates == len(training.history)
    return make_answer(
        is_trained and recovered and still, note=f"{len(skipped)} of {updates} updates skipped"
    )


def list_checks(out: Path, device: str, tiny: bool) -> dict[str, Callable[[], dict]]:
    """List the rows of the first stage."""
    precisions = ("no", "bf16") if tiny else ("no", "fp16", "bf16")  # a CPU is slow in float16
    short, overflow = (2, (6, 2.0**17)) if tiny else (5, (12, 2.0**24))
    checks: dict[str, Callable[[], dict]] = {}
    for name in precisions:
        title = f"our sampler is the pipeline's, mixed_precision {name}"
        checks[title] = partial(compare_drawing, device, name)
    compare = partial(compare_trainings, out, device, updates=short)
    checks["the frozen weights stay"] = partial(check_weights, out, device)
    checks["the same token twice"] = partial(compare, "no", "no", 0.999)
    checks["fp16 learns what float32 does"] = partial(compare, "no", "fp16", 0.99)
    checks["out of memory is survived"] = partial(survive_shortage, out, device)
    checks["killed and resumed"] = partial(resume_killed, out, device, 3 if tiny else 20)
    checks["overflows of float16 are skipped"] = partial(survive_overflow, out, device, *overflow)
    return checks


def run_miniature(out: Path, device: str, precision: str, *more: str) -> dict:
    """Run the README's command; return the evaluator's accuracy and the seconds."""
    folder = out / f"miniature {precision}"
    settings = {
        "config": CONFIG,
        "train": True,
        "evaluate": True,
        "device": device,
        "mixed_precision": precision,
        "output_path": folder,
    }
    command = [sys.executable, "run.py"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    started = time.monotonic()
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        return make_answer(False, failed=done.stderr.strip()[-300:])
    costs = []
    for file in folder.glob("pipeline_token/miniature/*/*/cost.json"):
        costs.append(read_json(file, "seconds", "updates"))
    metrics = [load_metrics(file) for file in folder.glob("img/miniature/*/*/eval/metrics.json")]
    shares = {}
    for condition in PAIR:
        judged = [found.conditions[condition]["evaluator"] for found in metrics]
        shares[condition] = [seen.accuracy.value for seen in judged]
    means = {condition: mean(values) for condition, values in shares.items()}
    figures = {
        "classes": len(metrics),
        **means,
        "lowest": min(shares["with"]),
        "training s per class": mean(cost["seconds"] for cost in costs),
        "updates": mean(cost["updates"] for cost in costs),
        "wall s": seconds,
    }
    return make_answer(means["with"] >= 0.95 or bool(more), **figures)


def list_miniature_rows(out: Path, device: str, tiny: bool) -> dict[str, Callable[[], dict]]:
    """List the rows of the second stage: all sixteen classes, or two updates of one."""
    if tiny:
        return {
            "class 7, two updates": partial(
                run_miniature,
                out,
                device,
                "no",
                "--class_index",
                "7",
                "--num_train_epochs",
                "2",
                "--test_size",
                "2",
                "--num_inference_steps",
                "4",
                "--epoch_size",
                "4",
                "--real_images",
                "none",
            )
        }
    return {
        f"all classes, mixed_precision {name}": partial(
            run_miniature, out, device, name, "--class_index", "all", "--classes_at_once", "8"
        )
        for name in ("no", "fp16")
    }
