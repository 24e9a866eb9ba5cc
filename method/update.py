"""Learn class tokens: draw, classify, backpropagate through the final denoising step alone (Sec. 3)."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from method.class_training import TrainedToken, Trainer
from method.losses import Loss
from models.batch_size import WITHOUT_GRAPH, default_batch_size, fit_batch_size
from models.generator import Generator
from models.sampling import SamplingSettings
from system.tensor_files import submit_images, to_pixels
from utils import UserError

GRAPHS = 2  # of an image: the denoiser's, and that of decoder and classifier
AT_ONCE = 40  # images with a graph, at first: more only cost a CPU fresh memory (1.4 times the seconds at 128)


class Batch(NamedTuple):
    """One update's images: P prompts, each with the token of its class, and N images of them."""

    prompts: list[str]  # [P]
    prompt_of: torch.Tensor  # [N], which prompt an image is of
    seeds: torch.Tensor  # [N]
    targets: torch.Tensor  # [N], classes from 0
    weights: torch.Tensor  # [N], of an image's loss in the sum that is minimised


def token_gradient(
        generator: Generator, loss_fn: Loss, vectors: torch.Tensor, batch: Batch, sampling: SamplingSettings,
        batch_size: int, on_images: Callable[[torch.Tensor, np.ndarray], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accumulate dL/dv over one update's images; vectors [P, K, D] holds the token of each prompt.

    Backwards in stages, so that the graphs of decoder and classifier, of the denoiser and of the text encoder are
    never in memory together, each of `batch_size` images at a time; where that is room for two graphs of every image,
    the denoiser's is kept instead of made again. Returns losses [N] and which images are correct [N]; `on_images` gets
    every part's place in the batch and its pixels, uint8 [B, H, W, 3].
    """
    remade = None if batch_size >= GRAPHS * len(batch.seeds) else batch_size
    embeds = generator.encode(batch.prompts, vectors)  # v_c enters here
    leaf, words = embeds.detach().requires_grad_(), vectors.detach().requires_grad_()  # encoded once for all parts
    words.grad = torch.zeros_like(words)  # of a loss that reads the vectors themselves
    losses, correct = torch.zeros(2, len(batch.seeds), device=leaf.device)
    for part in torch.arange(len(batch.seeds)).split(WITHOUT_GRAPH * batch_size):
        cond = leaf.index_select(0, batch.prompt_of[part].to(leaf.device))
        z_0 = generator.sample(cond, batch.seeds[part], sampling, batch_size=remade)  # a graph of the last step
        latents = z_0.detach().requires_grad_()
        for i, some_latents in zip(part.split(batch_size), latents.split(batch_size), strict=True):
            images = generator.decode(some_latents)
            loss, right = loss_fn(images, batch.targets[i], words.index_select(0, batch.prompt_of[i].to(words.device)))
            (loss * batch.weights[i]).sum().backward()
            losses[i], correct[i] = loss.detach(), right.float()
            if on_images:
                on_images(i, to_pixels(images))
        z_0.backward(latents.grad)  # through the final step ...
    torch.autograd.backward([embeds, vectors], [leaf.grad, words.grad])  # ... and the text encoder, on to v_c
    return losses, correct


def train_tokens(generator: Generator, loss_fn: Loss, trainers: Iterator[Trainer], classes_at_once: int,
                 sampling: SamplingSettings,
                 batch_size: int | None) -> Iterator[tuple[Trainer, TrainedToken | UserError | None]]:
    """Train every class, `classes_at_once` in the same batches; as one ends, the next takes its place.

    Yields every class after each of its updates, with its end or None. A class's vectors depend on its neighbours by
    no more than rounding. One that diverges, whose end is a UserError, does not stop them.
    """
    most = default_batch_size(AT_ONCE, str(generator.device), sampling.height, sampling.width)
    step, running = None, []
    with ThreadPoolExecutor(4) as pool:
        while running := running + list(islice(trainers, classes_at_once - len(running))):
            started, writes = time.monotonic(), []
            batch, vectors = join_batches(running, generator.device)
            step = step or fit_batch_size(token_gradient, batch_size, min(most, GRAPHS * len(batch.seeds)))
            paths = [path for trainer in running for path in trainer.list_image_paths()]
            measured = step(generator, loss_fn, vectors, batch, sampling,
                            on_images=partial(submit_images, pool, writes, paths))
            for write in writes:
                write.result()  # or a kill could leave an update without its pictures
            seconds = (time.monotonic() - started) / len(running)
            size = len(batch.seeds) // len(running)
            ends = [trainer.finish_update(*(part[i * size:(i + 1) * size] for part in measured), seconds)
                    for i, trainer in enumerate(running)]
            yield from zip(running, ends, strict=True)
            running = [trainer for trainer, end in zip(running, ends, strict=True) if not end]


def join_batches(running: list[Trainer], device: torch.device) -> tuple[Batch, torch.Tensor]:
    """One update of several classes in one Batch, and the token's vectors [P, K, D] in each of its prompts."""
    datasets, prompts, prompt_of, seeds = [trainer.next_images() for trainer in running], [], [], []
    for dataset in datasets:
        prompt_of += [len(prompts) + item["prompt"] for item in dataset]
        seeds += dataset.seeds
        prompts += dataset.prompts
    size, count = len(datasets[0]), len(datasets[0].prompts)
    targets = torch.tensor([trainer.target.index for trainer in running], device=device).repeat_interleave(size)
    weights = torch.cat([trainer.image_weights() for trainer in running])
    vectors = torch.stack([trainer.vectors for trainer in running]).repeat_interleave(count, 0)
    return Batch(prompts, torch.tensor(prompt_of), torch.tensor(seeds), targets, weights), vectors
