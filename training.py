"""Learn class tokens: draw, classify, backpropagate through the final denoising step alone (Sec. 3)."""

import time
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F

from class_token import spliced
from classifiers import Classifier
from config import RunConfig
from diffusion import Components, decode, encode_prompts, generate_latents
from learner import Job, Learner, Trained, start, update
from memory import WITHOUT_GRAPH, first_batch, fitting
from prompt_datasets import TEMPLATES, PromptDataset
from stopping import heed, in_flight
from utils import ImageWriter, UserError

AT_ONCE = 40  # images with a graph, at first: more only cost a CPU fresh memory (1.4 times the seconds at 128)


def train_tokens(config: RunConfig, components: Components, token_id: int, classifier: Classifier,
                 jobs: Iterator[Job]) -> Iterator[tuple[Job, Trained | UserError]]:
    """Learn v_c for every job, `classes_at_once` in the same batches; as one stops, the next takes its place.

    A class's vector depends on its neighbours by no more than rounding, and one that gives no numbers, whose end is a
    UserError, does not stop them. What stopped half-way goes on from its state.

    Raises:
        Stopped: a signal came; the state of the last update is on the disk.
    """
    most = first_batch(AT_ONCE, config.device, config.height, config.width)
    step = fitting(accumulate_gradients, config.batch_size, min(config.epoch_size * config.classes_at_once, most))
    learners = []
    with ImageWriter() as writer:
        while True:
            learners += [start(config, components, job)
                         for job in islice(jobs, config.classes_at_once - len(learners))]
            if not learners:
                return
            with in_flight("this update"):
                started = time.monotonic()
                measured = step(config, components, classifier, token_id, learners, writer)
                writer.wait()  # or a kill could leave an update without its pictures
                for learner in learners:
                    learner.seconds += (time.monotonic() - started) / len(learners)
                ends = [update(config, learner, *each) for learner, each in zip(learners, measured, strict=True)]
            ended = [(learner.job, end) for learner, end in zip(learners, ends, strict=True) if end]
            learners = [learner for learner, end in zip(learners, ends, strict=True) if not end]
            yield from ended
            heed()


def accumulate_gradients(batch_size: int, config: RunConfig, components: Components, classifier: Classifier,
                         token_id: int, learners: list[Learner], writer: ImageWriter) -> list[tuple[float, float]]:
    """One update's images of all learners: set dL/dv in every `vector.grad`; return mean loss and share right of each.

    Backwards in stages, so that the graphs of classifier and VAE, of the UNet and of the text encoder are never in
    memory together, each of `batch_size` images at a time; what needs no graph takes WITHOUT_GRAPH times as many.
    """
    size, count, device = config.epoch_size, config.number_of_prompts, components.device
    datasets = [images_of(config, learner) for learner in learners]
    vectors = torch.stack([learner.vector for learner in learners]).repeat_interleave(count, 0)
    prompts = [prompt for dataset in datasets for prompt in dataset.prompts]
    with torch.no_grad(), spliced(components.text_encoder, token_id, vectors):
        prompt_embeds = encode_prompts(components, prompts).requires_grad_()  # [learners * prompts, L, D]
    items = [item for dataset in datasets for item in dataset]
    rows = torch.tensor([i // size * count + item["prompt"] for i, item in enumerate(items)])  # of prompt_embeds
    seeds = torch.tensor([item["seed"] for item in items])
    targets = torch.tensor([learner.job.class_index for learner in learners], device=device).repeat_interleave(size)
    weights = torch.cat([learner.scaler.scale(torch.full((size,), 1 / size, device=device)) for learner in learners])
    losses, right = torch.zeros(2, len(items), device=device)
    for part in torch.arange(len(items)).split(WITHOUT_GRAPH * batch_size):
        z_0 = generate_latents(components, prompt_embeds[rows[part]], seeds[part].tolist(), config.height, config.width,
                               config.guidance_scale, config.num_inference_steps, config.train_timesteps, batch_size)
        latents = z_0.detach().requires_grad_()
        for batch, part_latents in zip(part.split(batch_size), latents.split(batch_size), strict=True):
            images = decode(components, part_latents)
            logits = classifier(images)
            loss = F.cross_entropy(logits, targets[batch], reduction="none")
            (loss * weights[batch]).sum().backward()
            losses[batch], right[batch] = loss.detach(), (logits.argmax(1) == targets[batch]).float()
            writer.write(images.detach(), [learners[i // size].image_path(items[i]["seed"]) for i in batch.tolist()])
        z_0.backward(latents.grad)
    with spliced(components.text_encoder, token_id, vectors):
        encode_prompts(components, prompts).backward(prompt_embeds.grad)
    return list(zip(losses.view(-1, size).mean(1).tolist(), right.view(-1, size).mean(1).tolist(), strict=True))


def images_of(config: RunConfig, learner: Learner) -> PromptDataset:
    """The next update's prompts and seeds."""
    first = config.seed + (len(learner.history) * config.epoch_size if config.fresh_noise else 0)
    return PromptDataset(f"{config.placeholder_token} {learner.job.class_name}", TEMPLATES[:config.number_of_prompts],
                         list(range(first, first + config.epoch_size)))
