"""What a run will take, before anything large is loaded: parameters, memory, FLOPs and disk, from configs alone.

The method's own `token_gradient` runs on networks of the meta device, which have shapes and no values.
"""

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from evaluation.drawing import CONTROLS, FRAMES, PAIR
from evaluation.tables import Table
from method.losses import cross_entropy
from method.update import AT_ONCE, GRAPHS, Batch, token_gradient
from models.batch_size import WITHOUT_GRAPH, default_batch_size
from models.classifiers import Classifier, load_classifier
from models.costs import PARTS, STAGES, counted_flops, metered_memory
from models.generator import PRECISIONS, Generator, load_generator
from models.sampling import SamplingSettings, new_scheduler
from prompt_datasets import TEMPLATES
from tokens.class_token import start_vectors

CONTEXT_GB = 0.5  # what CUDA itself takes of a card, about
PNG_BYTES = 1.5  # of a picture, per pixel, about
LINE_BYTES, FILES_BYTES = 130, 6000  # of history.jsonl per update; of a class's other files


class EstimateSettings(NamedTuple):
    """What decides an estimate besides how images are drawn; config.py explains each."""

    model: str
    mixed_precision: str
    gradient_checkpointing: bool
    classifier: str
    evaluator: str | None
    labels: str | None
    loss: str
    device: str
    placeholder_token: str
    initializer_token: str
    num_vectors: int | None
    num_train_epochs: int
    epoch_size: int
    number_of_prompts: int
    classes_at_once: int
    batch_size: int | None
    evaluate: bool
    test_size: int
    eval_prompts: list[str]
    controls: bool
    train_images: str
    memory_gb: float | None


class Update(NamedTuple):
    """What an update runs on, the token's vectors [K, D] and its number of images."""

    generator: Generator
    classifier: Classifier
    vectors: torch.Tensor
    prompts: list[str]
    images: int
    steps: int  # of the trajectory
    evaluator: Classifier | None = None  # loaded beside the rest


def make_batch(
    generator: Generator, vectors: torch.Tensor, prompts: list[str], images: int
) -> tuple[Batch, torch.Tensor]:
    """An update of `images` images, and the token's vectors [P, K, D] in each of its prompts."""
    spread = vectors.expand(len(prompts), *vectors.shape).clone().requires_grad_()
    return Batch(
        prompts,
        torch.arange(images) % len(prompts),
        torch.arange(images),
        torch.zeros(images, dtype=torch.long, device=generator.device),
        torch.full((images,), 1 / images, device=generator.device),
    ), spread


def open_update(
    settings: EstimateSettings, sampling: SamplingSettings, device: str = "meta"
) -> Update:
    """The update that `settings` describe; a UserError for what the run itself would refuse."""
    generator = load_generator(
        settings.model,
        device,
        PRECISIONS[settings.mixed_precision],
        settings.gradient_checkpointing,
    )
    generator.set_placeholder(settings.placeholder_token)
    generator.check_sampling(sampling, is_training=True)
    more = device, sampling.height, sampling.width, settings.labels
    classifier = load_classifier(settings.classifier, *more)
    if device == "meta":  # where a library's preprocessing finds no values to look at
        size = classifier.preprocess(torch.zeros(1, 3, sampling.height, sampling.width)).shape[-2:]
        classifier = classifier._replace(
            preprocess=lambda images: F.interpolate(images, size, mode="bilinear", antialias=True)
        )
    prompts = [template.format(f"{settings.placeholder_token} x") for template in TEMPLATES]
    return Update(
        generator,
        classifier,
        start_vectors(generator, settings.initializer_token, settings.num_vectors),
        prompts[: settings.number_of_prompts] * settings.classes_at_once,
        settings.epoch_size * settings.classes_at_once,
        len(new_scheduler(generator.scheduler, sampling).timesteps),
        load_classifier(settings.evaluator, *more)
        if settings.evaluator and settings.evaluate
        else None,
    )


def shorten_trajectory(sampling: SamplingSettings, steps: int) -> SamplingSettings:
    """One step with a graph, and one without where there are more: these are all alike."""
    return sampling._replace(timesteps=(1, 0)[-steps:])


def measure_update(update: Update, sampling: SamplingSettings, batch_size: int) -> dict[str, int]:
    """{stage: bytes at its peak} of an update in parts of `batch_size` images."""
    images = min(update.images, WITHOUT_GRAPH * batch_size)  # the first part: the others are alike
    batch, vectors = make_batch(update.generator, update.vectors, update.prompts, images)
    with metered_memory(update.generator, update.classifier.model) as peaks:
        token_gradient(
            update.generator,
            cross_entropy(update.classifier),
            vectors,
            batch,
            shorten_trajectory(sampling, update.steps),
            batch_size,
        )
    return peaks


def count_update(
    generator: Generator,
    classifier: Classifier,
    batch: Batch,
    vectors: torch.Tensor,
    sampling: SamplingSettings,
    batch_size: int,
) -> Counter:
    """What one update takes, as `counted_flops` has it."""
    with counted_flops(generator, classifier.model) as counts:
        token_gradient(generator, cross_entropy(classifier), vectors, batch, sampling, batch_size)
    return counts


def count_trajectory(update: Update, sampling: SamplingSettings) -> tuple[Counter, Counter]:
    """What an update of the whole trajectory takes, and what making its last step's graph again takes on top."""
    batch = make_batch(update.generator, update.vectors, update.prompts, update.images)

    def count_short(steps: int, graphs: int) -> Counter:
        return count_update(
            update.generator,
            update.classifier,
            *batch,
            shorten_trajectory(sampling, steps),
            graphs * update.images,
        )

    one, two, again = count_short(1, GRAPHS), count_short(2, GRAPHS), count_short(1, 1)
    return (
        Counter({name: one[name] + (update.steps - 1) * (two[name] - one[name]) for name in two}),
        Counter({name: again[name] - one[name] for name in again}),
    )


def list_batch_sizes(images: int, given: int | None) -> list[int]:
    """1, 2, 4, ... up to an update's images, the number from which no graph is made again, and the one given."""
    powers = {2**i for i in range(images.bit_length()) if 2**i < images}
    return sorted(powers | {images, GRAPHS * images, given or images})


def count_bytes(network: torch.nn.Module) -> int:
    """Of its parameters."""
    return sum(weight.nbytes for weight in network.parameters())


def describe_networks(update: Update) -> str:
    """Parameters of each network, in millions, and their bytes."""
    *encoders, denoiser, decoder = update.generator.networks
    networks = [
        *(("text encoder", encoder) for encoder in encoders),
        ("UNet", denoiser),
        ("VAE", decoder),
        ("classifier", update.classifier.model),
    ]
    networks += [("evaluator", update.evaluator.model)] if update.evaluator else []
    counts = [
        f"{name} {sum(weight.numel() for weight in network.parameters()) / 1e6:.1f} M"
        for name, network in networks
    ]
    return (
        f"{', '.join(counts)}: {sum(count_bytes(network) for _, network in networks) / 1e9:.3g} GB"
    )


def describe_disk(
    settings: EstimateSettings, sampling: SamplingSettings, vectors: torch.Tensor
) -> str:
    """What one class leaves on disk; pictures by PNG_BYTES."""
    updates, picture = settings.num_train_epochs, PNG_BYTES * sampling.height * sampling.width / 1e6
    kept = {"all": updates, "film": min(FRAMES, updates), "none": 0}[
        settings.train_images
    ] * settings.epoch_size
    arms = len(PAIR) * (1 + len(settings.eval_prompts)) + len(CONTROLS) * settings.controls
    drawn = arms * settings.test_size * settings.evaluate
    files = (FILES_BYTES + LINE_BYTES * updates + 4 * vectors.numel()) / 1e6
    return (
        f"disk per class: {files + picture * (kept + drawn):.3g} MB: {files:.3f} of files, {picture * kept:.3g} of "
        f"{kept} training pictures, {picture * drawn:.3g} of {drawn} evaluation pictures ({PNG_BYTES} B/pixel)"
    )


def describe_fit(peaks: dict[int, float], settings: EstimateSettings) -> str:
    """Which --batch_size fits into memory_gb, by the peaks in GB of each."""
    context = CONTEXT_GB if settings.device.startswith("cuda") else 0.0
    given = f"{settings.memory_gb:g} GB" + f", {context} of them for the CUDA context" * bool(
        context
    )
    fitting = [size for size, peak in peaks.items() if peak + context <= settings.memory_gb]
    if fitting:
        return (
            f"--batch_size {max(fitting)} fits into {given}: it takes {peaks[max(fitting)]:.3g} GB"
        )
    helps = (
        ["--mixed_precision fp16 or bf16"] * (settings.mixed_precision == "no")
        + ["--gradient_checkpointing True"] * (not settings.gradient_checkpointing)
        + ["fewer --classes_at_once"] * (settings.classes_at_once > 1)
        + ["smaller images"]
    )
    return f"no --batch_size fits into {given}: 1 takes {min(peaks.values()):.3g} GB; try {', '.join(helps)}"


def tabulate_memory(
    update: Update,
    sampling: SamplingSettings,
    batch_sizes: list[int],
    flops: Counter,
    again: Counter,
) -> tuple[Table, dict[int, float]]:
    """What an update takes by batch_size, and the peak of each in GB."""
    table, totals = Table(["batch_size", *STAGES, "peak GB", "TFLOP"], []), {}
    beside = count_bytes(update.evaluator.model) if update.evaluator else 0
    for size in batch_sizes:
        peaks = measure_update(update, sampling, size)
        found = [peaks[stage] and peaks[stage] + beside for stage in STAGES]  # none: no such stage
        totals[size] = max(found) / 1e9
        tera = (
            sum(flops[part] + again[part] * (size < GRAPHS * update.images) for part in PARTS)
            / 1e12
        )
        table.rows.append(
            [size, *(f"{peak / 1e9:.3g}" for peak in (*found, max(found))), f"{tera:.4g}"]
        )
    return table, totals


def estimate_run(settings: EstimateSettings, sampling: SamplingSettings) -> str:
    """The whole estimate of training as text; nothing is written and no weight is read."""
    update, updates = open_update(settings, sampling), settings.num_train_epochs
    flops, again = count_trajectory(update, sampling)
    table, peaks = tabulate_memory(
        update, sampling, list_batch_sizes(update.images, settings.batch_size), flops, again
    )
    start = min(
        default_batch_size(AT_ONCE, settings.device, sampling.height, sampling.width),
        GRAPHS * update.images,
    )
    calls, tera = flops["images"], sum(flops[part] for part in PARTS) / 1e12
    lines = [
        f"{settings.model}, mixed_precision {settings.mixed_precision}, {sampling.height} x {sampling.width}, "
        f"{update.images} images per update: estimated from configs, without weights; not compared with a GPU yet",
        f"parameters: {describe_networks(update)}",
        f"UNet calls per update: {calls}, {flops['images with a graph']} of them with a graph; {again['images']} more "
        f"make it again where batch_size is below {GRAPHS * update.images}",
        f"per class of {updates} updates at most: {calls * updates // settings.classes_at_once} UNet calls, "
        f"{tera * updates / settings.classes_at_once:.5g} TFLOP or more",
        describe_disk(settings, sampling, update.vectors),
        "peak memory in GB by stage, parameters included, and TFLOP per update:",
        table.to_text(),
        f"without --batch_size: {start} at first, halved while memory runs out",
        f"not included: the CUDA context (about {CONTEXT_GB} GB), kernels' workspaces; Python's libraries",
    ]
    if settings.loss != "cross_entropy":
        lines.append(f"loss '{settings.loss}' is not counted: cross_entropy stands in its place")
    if settings.memory_gb:
        lines.append(describe_fit(peaks, settings))
    return "\n".join(lines)
