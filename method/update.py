"""One update of many classes at once: draw, classify, backpropagate through the last step alone.

The method of Sec. 3 at speed; plain_loop.py has the same in plain lines.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from method.class_training import ClassTraining, Progress, TrainedToken, UpdateFigures
from method.losses import Loss
from models.batch_size import WITHOUT_GRAPH, default_batch_size, fit_batch_size
from models.generator import Generator
from models.sampling import SamplingSettings
from system.tensor_files import submit_images, to_pixels

GRAPHS = 2  # of an image: the denoiser's, and that of decoder and classifier
# Images with a graph, at first: more only cost a CPU fresh memory (1.4 times the seconds at 128).
AT_ONCE = 40


class Batch(NamedTuple):
    """One update's images: P prompts, each with the token of its class, and N images of them."""

    prompts: list[str]  # [P]
    prompt_of: torch.Tensor  # [N], which prompt an image is of
    seeds: torch.Tensor  # [N]
    targets: torch.Tensor  # [N], classes from 0
    weights: torch.Tensor  # [N], of an image's loss in the sum that is minimised


def token_gradient(
    generator: Generator,
    loss_fn: Loss,
    vectors: torch.Tensor,
    batch: Batch,
    sampling: SamplingSettings,
    batch_size: int,
    on_images: Callable[[torch.Tensor, np.ndarray], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accumulate dL/dv over one update's images; vectors [P, K, D] holds the token of each prompt.

    Backwards in stages, so that the graphs of decoder and classifier, of the denoiser and of the
    text encoder are never in memory together, each of `batch_size` images at a time. Where that is
    room for two graphs of every image, the denoiser's is kept instead of recomputed.

    Returns losses [N] and which images are correct [N]; `on_images` gets every part's place in the
    batch and its pixels, uint8 [B, H, W, 3].
    """
    images = len(batch.seeds)
    recomputed = None if batch_size >= GRAPHS * images else batch_size
    embeds = generator.encode(batch.prompts, vectors)  # v_c enters here
    leaf = embeds.detach().requires_grad_()  # encoded once for all parts
    words = vectors.detach().requires_grad_()
    words.grad = torch.zeros_like(words)  # of a loss that reads the vectors themselves
    losses, correct = torch.zeros(2, images, device=leaf.device)
    for part in torch.arange(images).split(WITHOUT_GRAPH * batch_size):
        cond = leaf.index_select(0, batch.prompt_of[part].to(leaf.device))
        z_0 = generator.sample(cond, batch.seeds[part], sampling, batch_size=recomputed)
        latents = z_0.detach().requires_grad_()
        for i, some_latents in zip(part.split(batch_size), latents.split(batch_size), strict=True):
            decoded = generator.decode(some_latents)
            tokens = words.index_select(0, batch.prompt_of[i].to(words.device))
            loss, right = loss_fn(decoded, batch.targets[i], tokens)
            (loss * batch.weights[i]).sum().backward()
            losses[i], correct[i] = loss.detach(), right.float()
            if on_images:
                on_images(i, to_pixels(decoded))
        z_0.backward(latents.grad)  # through the final step ...
    torch.autograd.backward([embeds, vectors], [leaf.grad, words.grad])  # ... and on to v_c
    return losses, correct


def fit_token_gradient(
    images: int, batch_size: int | None, sampling: SamplingSettings, device: str
) -> Callable:
    """Return `token_gradient` with its `batch_size` filled in, for updates of `images` images.

    That is `batch_size`, or as many images as fit into memory.
    """
    most = default_batch_size(AT_ONCE, device, sampling.height, sampling.width)
    return fit_batch_size(token_gradient, batch_size, min(most, GRAPHS * images))


def compute_gradients(
    running: list[ClassTraining],
    generator: Generator,
    loss_fn: Loss,
    sampling: SamplingSettings,
    fitted_gradient: Callable,
) -> list[UpdateFigures]:
    """Draw, classify and backpropagate the next update's images of several classes together.

    Leaves each class's gradient in its `vectors.grad` and its images on disk. `fitted_gradient` is
    from `fit_token_gradient`. A class's gradient depends on its neighbours by no more than
    rounding.
    """
    started = time.monotonic()
    batch, vectors = join_batches(running, generator.device)
    paths = [path for training in running for path in training.list_image_paths()]
    writes: list[Future] = []
    with ThreadPoolExecutor(4) as pool:
        losses, correct = fitted_gradient(
            generator,
            loss_fn,
            vectors,
            batch,
            sampling,
            on_images=partial(submit_images, pool, writes, paths),
        )
        for write in writes:
            write.result()  # or a kill could leave an update without its pictures
    seconds = (time.monotonic() - started) / len(running)
    size = len(batch.seeds) // len(running)
    parts = zip(losses.split(size), correct.split(size), strict=True)
    return [UpdateFigures(of_losses, of_correct, seconds) for of_losses, of_correct in parts]


def train_update(
    training: ClassTraining,
    generator: Generator,
    loss_fn: Loss,
    sampling: SamplingSettings,
    fitted_gradient: Callable,
) -> Progress:
    """Train one update of a class that learns alone; arguments and errors as in its two halves."""
    (figures,) = compute_gradients([training], generator, loss_fn, sampling, fitted_gradient)
    return training.finish_update(figures)


def train_class(
    training: ClassTraining,
    generator: Generator,
    loss_fn: Loss,
    sampling: SamplingSettings,
    fitted_gradient: Callable,
) -> TrainedToken:
    """Train a class alone to its end; arguments and errors as in `train_update`."""
    stop = None
    while stop is None:
        progress = train_update(training, generator, loss_fn, sampling, fitted_gradient)
        stop = progress.stop
    return training.trained_token(stop)


def join_batches(running: list[ClassTraining], device: torch.device) -> tuple[Batch, torch.Tensor]:
    """Join one update of several classes into one Batch, and the token [P, K, D] in each prompt."""
    prompts: list[str] = []
    prompt_of: list[int] = []
    seeds: list[int] = []
    targets: list[int] = []
    for training in running:
        dataset = training.next_images()
        prompt_of += [len(prompts) + item["prompt"] for item in dataset]
        prompts += dataset.prompts
        seeds += dataset.seeds
        targets += [training.target.index] * len(dataset)
    batch = Batch(
        prompts,
        torch.tensor(prompt_of),
        torch.tensor(seeds),
        torch.tensor(targets, device=device),
        torch.cat([training.image_weights() for training in running]),
    )
    prompts_of_each = len(prompts) // len(running)
    vectors = torch.stack([training.vectors for training in running])
    return batch, vectors.repeat_interleave(prompts_of_each, 0)
