"""What a run will take, from configs alone: parameters, memory, FLOPs and disk.

The method's own `token_gradient` runs on networks of the meta device, which have shapes but no
values.
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
    """What affects an estimate besides how images are drawn; see config.py."""

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
    """What an update runs on."""

    generator: Generator
    classifier: Classifier
    vectors: torch.Tensor  # [K, D], the token's
    prompts: list[str]
    images: int
    steps: int  # of the trajectory
    evaluator: Classifier | None = None  # loaded beside the rest


def make_batch(
    generator: Generator, vectors: torch.Tensor, prompts: list[str], images: int
) -> tuple[Batch, torch.Tensor]:
    """Make an update of `images` images, and the token's vectors [P, K, D] in each prompt."""
    device = generator.device
    spread = vectors.expand(len(prompts), *vectors.shape).clone().requires_grad_()
    batch = Batch(
        prompts,
        prompt_of=torch.arange(images) % len(prompts),
        seeds=torch.arange(images),
        targets=torch.zeros(images, dtype=torch.long, device=device),
        weights=torch.full((images,), 1 / images, device=device),
    )
    return batch, spread


def open_update(
    settings: EstimateSettings, sampling: SamplingSettings, device: str = "meta"
) -> Update:
    """Build the update that `settings` describe; raise UserError where the run itself would."""
    precision = PRECISIONS[settings.mixed_precision]
    generator = load_generator(settings.model, device, precision, settings.gradient_checkpointing)
    generator.set_placeholder(settings.placeholder_token)
    generator.check_sampling(sampling, is_training=True)

    def open_classifier(name: str) -> Classifier:
        return load_classifier(name, device, sampling.height, sampling.width, settings.labels)

    classifier = open_classifier(settings.classifier)
    if device == "meta":  # where a library's preprocessing finds no values to look at
        classifier = replace_preprocessing(classifier, sampling)
    evaluator = None
    if settings.evaluator and settings.evaluate:
        evaluator = open_classifier(settings.evaluator)
    phrase = f"{settings.placeholder_token} x"
    templates = TEMPLATES[: settings.number_of_prompts]
    prompts = [template.format(phrase) for template in templates]
    vectors = start_vectors(generator, settings.initializer_token, settings.num_vectors)
    classes = settings.classes_at_once
    return Update(
        generator,
        classifier,
        vectors,
        prompts * classes,
        images=settings.epoch_size * classes,
        steps=len(new_scheduler(generator.scheduler, sampling).timesteps),
        evaluator=evaluator,
    )


def replace_preprocessing(classifier: Classifier, sampling: SamplingSettings) -> Classifier:
    """Replace the classifier's preprocessing by a resizing to the same size."""
    image = torch.zeros(1, 3, sampling.height, sampling.width)
    size = classifier.preprocess(image).shape[-2:]

    def resize_images(images: torch.Tensor) -> torch.Tensor:
        return F.interpolate(images, size, mode="bilinear", antialias=True)

    return classifier._replace(preprocess=resize_images)


def shorten_trajectory(sampling: SamplingSettings, steps: int) -> SamplingSettings:
    """Keep one step with a graph, and one without if there are more: these are all alike."""
    return sampling._replace(timesteps=(1, 0)[-steps:])


def measure_update(update: Update, sampling: SamplingSettings, batch_size: int) -> dict[str, int]:
    """Measure {stage: peak bytes} of an update in parts of `batch_size` images."""
    images = min(update.images, WITHOUT_GRAPH * batch_size)  # the first part: the others are alike
    batch, vectors = make_batch(update.generator, update.vectors, update.prompts, images)
    loss_fn = cross_entropy(update.classifier)
    short = shorten_trajectory(sampling, update.steps)
    with metered_memory(update.generator, update.classifier.model) as peaks:
        token_gradient(update.generator, loss_fn, vectors, batch, short, batch_size)
    return peaks


def count_update(
    generator: Generator,
    classifier: Classifier,
    batch: Batch,
    vectors: torch.Tensor,
    sampling: SamplingSettings,
    batch_size: int,
) -> Counter:
    """Count what one update takes; see `counted_flops`."""
    with counted_flops(generator, classifier.model) as counts:
        loss_fn = cross_entropy(classifier)
        token_gradient(generator, loss_fn, vectors, batch, sampling, batch_size)
    return counts


def count_trajectory(update: Update, sampling: SamplingSettings) -> tuple[Counter, Counter]:
    """Count what an update of the whole trajectory takes, and what recomputing adds."""
    batch, vectors = make_batch(update.generator, update.vectors, update.prompts, update.images)

    def count_short(steps: int, graphs: int) -> Counter:
        short = shorten_trajectory(sampling, steps)
        batch_size = graphs * update.images
        return count_update(update.generator, update.classifier, batch, vectors, short, batch_size)

    one, two = count_short(1, GRAPHS), count_short(2, GRAPHS)
    recomputing = count_short(1, 1)
    whole, again = Counter(), Counter()
    for name in two:
        step = two[name] - one[name]
        whole[name] = one[name] + (update.steps - 1) * step
        again[name] = recomputing[name] - one[name]
    return whole, again


def list_batch_sizes(images: int, given: int | None) -> list[int]:
    """List 1, 2, 4, ... up to an update's images, and the size from which nothing is recomputed.

    And the given one.
    """
    sizes = {images, GRAPHS * images, given or images}
    size = 1
    while size < images:
        sizes.add(size)
        size *= 2
    return sorted(sizes)


def count_bytes(network: torch.nn.Module) -> int:
    """Count the bytes of a network's parameters."""
    return sum(weight.nbytes for weight in network.parameters())


def describe_networks(update: Update) -> str:
    """Describe the parameters of each network, in millions, and the bytes of all."""
    *encoders, denoiser, decoder = update.generator.networks
    networks = [("text encoder", encoder) for encoder in encoders]
    networks += [("UNet", denoiser), ("VAE", decoder), ("classifier", update.classifier.model)]
    if update.evaluator:
        networks.append(("evaluator", update.evaluator.model))
    counts = []
    total = 0
    for name, network in networks:
        parameters = sum(weight.numel() for weight in network.parameters())
        counts.append(f"{name} {parameters / 1e6:.1f} M")
        total += count_bytes(network)
    return f"{', '.join(counts)}: {total / 1e9:.3g} GB"


def describe_disk(
    settings: EstimateSettings, sampling: SamplingSettings, vectors: torch.Tensor
) -> str:
    """Describe what one class leaves on disk; pictures take PNG_BYTES per pixel."""
    updates = settings.num_train_epochs
    picture = PNG_BYTES * sampling.height * sampling.width / 1e6
    kept_updates = {"all": updates, "film": min(FRAMES, updates), "none": 0}
    kept = kept_updates[settings.train_images] * settings.epoch_size
    drawn = 0
    if settings.evaluate:
        conditions = len(PAIR) * (1 + len(settings.eval_prompts))
        if settings.controls:
            conditions += len(CONTROLS)
        drawn = conditions * settings.test_size
    files = (FILES_BYTES + LINE_BYTES * updates + 4 * vectors.numel()) / 1e6
    total = files + picture * (kept + drawn)
    return (
        f"disk per class: {total:.3g} MB: {files:.3f} of files, {picture * kept:.3g} of {kept} "
        f"training pictures, {picture * drawn:.3g} of {drawn} evaluation pictures "
        f"({PNG_BYTES} B/pixel)"
    )


def describe_fit(peaks: dict[int, float], settings: EstimateSettings) -> str:
    """Describe which --batch_size fits into memory_gb, from the peak in GB of each."""
    given = f"{settings.memory_gb:g} GB"
    context = 0.0
    if settings.device.startswith("cuda"):
        context = CONTEXT_GB
        given += f", {context} of them for the CUDA context"
    fitting = [size for size, peak in peaks.items() if peak + context <= settings.memory_gb]
    if fitting:
        largest = max(fitting)
        return f"--batch_size {largest} fits into {given}: it takes {peaks[largest]:.3g} GB"
    helps = []
    if settings.mixed_precision == "no":
        helps.append("--mixed_precision fp16 or bf16")
    if not settings.gradient_checkpointing:
        helps.append("--gradient_checkpointing True")
    if settings.classes_at_once > 1:
        helps.append("fewer --classes_at_once")
    helps.append("smaller images")
    least = min(peaks.values())
    return f"no --batch_size fits into {given}: 1 takes {least:.3g} GB; try {', '.join(helps)}"


def tabulate_memory(
    update: Update,
    sampling: SamplingSettings,
    batch_sizes: list[int],
    flops: Counter,
    again: Counter,
) -> tuple[Table, dict[int, float]]:
    """Tabulate what an update takes by batch_size; also return the peak of each in GB."""
    table = Table(["batch_size", *STAGES, "peak GB", "TFLOP"], [])
    totals = {}
    beside = count_bytes(update.evaluator.model) if update.evaluator else 0
    for size in batch_sizes:
        peaks = measure_update(update, sampling, size)
        found = []
        for stage in STAGES:
            has_stage = peaks[stage] > 0
            found.append(peaks[stage] + beside if has_stage else 0)
        most = max(found)
        totals[size] = most / 1e9
        counted = sum_parts(flops)
        if size < GRAPHS * update.images:
            counted += sum_parts(again)
        cells = [f"{peak / 1e9:.3g}" for peak in (*found, most)]
        table.rows.append([size, *cells, f"{counted / 1e12:.4g}"])
    return table, totals


def sum_parts(counts: Counter) -> int:
    """Sum the FLOPs of all networks."""
    return sum(counts[part] for part in PARTS)


def estimate_run(settings: EstimateSettings, sampling: SamplingSettings) -> str:
    """Return the whole estimate of training as text; nothing is written and no weight is read."""
    update = open_update(settings, sampling)
    flops, again = count_trajectory(update, sampling)
    batch_sizes = list_batch_sizes(update.images, settings.batch_size)
    table, peaks = tabulate_memory(update, sampling, batch_sizes, flops, again)
    lines = [
        describe_setting(settings, sampling, update),
        f"parameters: {describe_networks(update)}",
        *describe_calls(settings, update, flops, again),
        describe_disk(settings, sampling, update.vectors),
        "peak memory in GB by stage, parameters included, and TFLOP per update:",
        table.to_text(),
        describe_first_size(settings, sampling, update),
        (
            f"not included: the CUDA context (about {CONTEXT_GB} GB), kernels' workspaces; Python's"
            " libraries"
        ),
    ]
    if settings.loss != "cross_entropy":
        lines.append(f"loss '{settings.loss}' is not counted: cross_entropy stands in its place")
    if settings.memory_gb:
        lines.append(describe_fit(peaks, settings))
    return "\n".join(lines)


def describe_setting(settings: EstimateSettings, sampling: SamplingSettings, update: Update) -> str:
    """Describe the setting that is estimated."""
    return (
        f"{settings.model}, mixed_precision {settings.mixed_precision}, "
        f"{sampling.height} x {sampling.width}, {update.images} images per update: estimated from "
        "configs, without weights; not compared with a GPU yet"
    )


def describe_calls(
    settings: EstimateSettings, update: Update, flops: Counter, again: Counter
) -> list[str]:
    """Describe the UNet's calls, per update and per class."""
    updates, classes = settings.num_train_epochs, settings.classes_at_once
    calls, recorded = flops["images"], flops["images with a graph"]
    without_recomputing = GRAPHS * update.images
    tera = sum_parts(flops) / 1e12
    return [
        (
            f"UNet calls per update: {calls}, {recorded} of them with a graph; with batch_size "
            f"below {without_recomputing}, {again['images']} more to recompute it"
        ),
        (
            f"per class, for at most {updates} updates: {calls * updates // classes} UNet calls, "
            f"at least {tera * updates / classes:.5g} TFLOP"
        ),
    ]


def describe_first_size(
    settings: EstimateSettings, sampling: SamplingSettings, update: Update
) -> str:
    """Describe how many images are tried at once by default."""
    most = default_batch_size(AT_ONCE, settings.device, sampling.height, sampling.width)
    first = min(most, GRAPHS * update.images)
    return f"without --batch_size: {first} at first, halved while memory runs out"
