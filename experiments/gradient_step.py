"""Gradient skipping itself: how much of the trajectory should carry the gradient, and where should its end begin?

    python -m experiments.gradient_step

A token learns for a fixed number of updates in variants of the loop: the last steps with a graph (DRaFT-K of Clark et
al. 2024), the final step starting at different timesteps, trajectories of different lengths, and several noise draws
for the last step from each trajectory (DRaFT-LV). Gradients at the start are compared too: their spread over updates,
and the cosine between minus their mean and the way to the adjectives that name the class, or to a trained token.
"""

import time
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F

from experiments import common
from experiments.plots import plot_curves
from method.class_token import start_vectors
from method.losses import cross_entropy
from miniature.world import THINGS
from models.batch_size import default_batch_size, fit_batch_size
from models.generator import Generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, TargetClass

TEN = tuple(range(999, 0, -100))  # ten steps, the last from 99
SPREAD = 3  # updates' pictures at the start, whose gradients are compared
MEASURES = ("cosine", "spread", "seconds_per_update", "mb_per_trajectory")  # of a variant


class Variant(NamedTuple):
    """A loop: its timesteps, how many last ones carry the graph, noise draws for the last one."""

    name: str
    timesteps: tuple[int, ...] | None  # None: the sampler's own, as the paper trains
    graph_steps: int = 1
    draws: int = 1


VARIANTS = (
    *(Variant(f"last {count} of ten steps with a graph (to 99)", TEN, count) for count in (1, 2, 5, 10)),
    *(Variant(f"final step from {t}", (999, (999 + t) // 2, t)) for t in (900, 800, 700, 600, 400, 200, 50)),
    Variant("final step as in the paper", None),
    *(Variant(f"trajectory of {len(steps)} (to 600)", steps)
      for steps in ((600,), (999, 600), (999, 900, 800, 700, 600))),
    *(Variant(f"noise draws for the final step: {draws}", (999, 800, 600), 1, draws) for draws in (1, 2, 4)))


def draw_latents(generator: Generator, cond: torch.Tensor, seeds: list[int], sampling: SamplingSettings,
                 graph_steps: int, draws: int) -> torch.Tensor:
    """z_0 [draws * B, 4, h, w], first all trajectories' own; the other draws noise these again to the last timestep."""
    z_0 = generator.sample(cond, seeds, sampling, graph_steps)
    last_step = sampling._replace(timesteps=sampling.timesteps and sampling.timesteps[-1:])
    return torch.cat([z_0, *(generator.sample(cond, [seed + 10**6 * draw for seed in seeds], last_step,
                                              start=z_0.detach()) for draw in range(1, draws))])


def measure_gradient(lab: common.Lab, target: TargetClass, vectors: torch.Tensor, update: int, variant: Variant,
                     batch_size: int) -> torch.Tensor:
    """The gradient [K, D] of an update's mean loss at `vectors`, `batch_size` trajectories at a time."""
    config, generator, loss_fn = lab.config, lab.get_generator(), cross_entropy(lab.get_guide())
    vectors, size = vectors.detach().clone().requires_grad_(), config.epoch_size
    sampling = common.method_settings(config)[1]._replace(timesteps=variant.timesteps)
    for part in torch.arange(size).split(batch_size):
        prompts = [TEMPLATES[i % config.number_of_prompts].format(f"{config.placeholder_token} {target.name}")
                   for i in part.tolist()]
        cond = generator.encode(prompts, vectors.expand(len(part), *vectors.shape))
        seeds = (config.seed + update * size + part).tolist()
        images = generator.decode(draw_latents(generator, cond, seeds, sampling, variant.graph_steps, variant.draws))
        losses, _ = loss_fn(images, torch.full((len(images),), target.index, device=images.device))
        (losses.sum() / (size * variant.draws)).backward()
    return vectors.grad


def learn_vectors(lab: common.Lab, target: TargetClass, variant: Variant) -> dict:
    """The mean of the last three vectors after `--updates` of AdamW as the config has it, and MEASURES."""
    config, updates, past = lab.config, lab.options.updates, []
    step = fit_batch_size(measure_gradient, config.batch_size,
                          default_batch_size(config.epoch_size, config.device, config.height, config.width))
    vectors = start_vectors(lab.get_generator(), config.initializer_token, config.num_vectors).requires_grad_()
    gradients = torch.stack([step(lab, target, vectors, update, variant) for update in range(SPREAD)]).flatten(1).cpu()
    cosine = F.cosine_similarity(-gradients.mean(0), find_direction(lab, target).flatten(), dim=0)
    optimizer = torch.optim.AdamW([vectors], config.lr, tuple(config.betas), config.eps, config.weight_decay)
    started = time.monotonic()
    for update in range(updates):
        vectors.grad = step(lab, target, vectors, update, variant)
        torch.nn.utils.clip_grad_norm_([vectors], config.max_grad_norm)
        optimizer.step()
        past.append(vectors.detach().clone())
    seconds = time.monotonic() - started
    return {"vectors": torch.stack(past[-3:]).mean(0).tolist(), "cosine": cosine.item(),
            "spread": (gradients.std(0).norm() / gradients.mean(0).norm()).item(),
            "seconds_per_update": seconds / updates, "mb_per_trajectory": measure_graph(lab, target, vectors, variant)}


def find_direction(lab: common.Lab, target: TargetClass) -> torch.Tensor:
    """From the initialiser to what names the class [K, D], on the CPU."""
    generator = lab.get_generator()
    adjectives = next((thing.adjectives for thing in THINGS if thing.label == target.label), ())
    end = torch.stack([generator.initial_vectors(word) for word in adjectives]).mean(0).cpu() if adjectives else \
        common.load_vectors(common.learn_tokens(lab, [target]))[target]
    return end - generator.initial_vectors(lab.config.initializer_token).cpu()


def measure_graph(lab: common.Lab, target: TargetClass, vectors: torch.Tensor, variant: Variant) -> float:
    """Megabytes of activations that autograd keeps for one trajectory."""
    networks, activations = (*lab.get_generator().networks, lab.get_guide().model), {}
    weights = {weight.untyped_storage().data_ptr() for network in networks for weight in network.parameters()}

    def note_storage(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            activations[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note_storage, lambda tensor: tensor):
        measure_gradient(lab._replace(config=replace(lab.config, epoch_size=1)), target, vectors, 0, variant, 1)
    return sum(activations.values()) / 1e6


def measure_variant(lab: common.Lab, variant: Variant) -> dict:
    """What a variant learned for every class, and how its pictures are judged."""
    learned = {target: common.cached_result(
        lab, partial(learn_vectors, lab, target, variant), target=target.number, loop=variant[1:], spread=SPREAD,
        updates=lab.options.updates) for target in lab.targets}
    vectors = {target: torch.tensor(found["vectors"]) for target, found in learned.items()}
    return {**variant._asdict(), **{name: mean(found[name] for found in learned.values()) for name in MEASURES},
            "right": common.measure_accuracy(lab, common.draw_sets(lab, vectors, lab.options.images))}


def recommend_variant(results: list[dict]) -> tuple[dict, dict]:
    """The variant that is right most often, and of those that run.py has settings for the fastest as good as it."""
    by_accuracy = sorted(results, key=lambda result: -result["right"].value)
    known = [result for result in by_accuracy if result["graph_steps"] == result["draws"] == 1]
    as_good = [result for result in known if result["right"].high >= by_accuracy[0]["right"].value]
    return by_accuracy[0], min(as_good or known[:1], key=lambda result: result["seconds_per_update"])


def main(argv: list[str] | None = None, variants: tuple[Variant, ...] = VARIANTS):
    options = common.parse_options(__doc__, argv, "7,16", updates=10, epoch_size=8, images=10)
    lab = common.open_lab(options, epoch_size=options.epoch_size)
    if lab.config.mixed_precision == "fp16":  # gradients are compared here without a loss scale
        lab = common.open_lab(options, epoch_size=options.epoch_size, mixed_precision="bf16")
    plain = common.measure_accuracy(lab, common.draw_sets(lab, dict.fromkeys(lab.targets), options.images))
    results = [measure_variant(lab, variant) for variant in variants]
    plot_curves(lab.out / "gradient_step.png", "", "right class", {
        "": {"no token": plain, **{result["name"]: result["right"] for result in results}}})
    best, advised = recommend_variant(results)
    ties = " and ".join(result["name"] for result in results if result["right"] == best["right"])
    flag = f"`--train_timesteps {' '.join(map(str, advised['timesteps'] or ['none']))}`"
    common.publish_result(
        lab, "gradient_step", "How many steps need a gradient, and from where",
        f"After {options.updates} updates best, {best['right'].value:.2f} right ({plain.value:.2f} without a token): "
        f"{ties}. Recommended here: {flag}, the fastest single gradient step whose interval reaches that.",
        ["variant of the loop", "right class", "cosine", "spread", "s per update", "MB per trajectory"],
        [[result["name"], result["right"], *(f"{result[measure]:.2f}" for measure in MEASURES)] for result in results],
        f"Of {len(results)} variants, on {len(lab.targets)} classes, the best and the worst may be so by chance. "
        "Cosine: between the first descent direction and the way from the initialiser to the adjectives that name the "
        f"class, or to its token. Spread: standard deviation of {SPREAD} updates' gradients at the start over the norm "
        "of their mean. Seconds of equal loops differ by up to a third. MB: activations for backward. Not tested: "
        f"whether {flag} suffices for Stable Diffusion 1.4 too, whose noise schedule is the same.",
        {"results": results, "without": plain, "updates": options.updates})


if __name__ == "__main__":
    common.run_script(main)
