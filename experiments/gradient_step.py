"""Where the gradient enters: guidance in training, where the final step starts, how many steps carry a graph.

    python -m experiments.gradient_step

A token learns for a fixed number of updates in variants of the loop. EXPLORED, of one training each, varies guidance,
the start of the final step and the steps before it. CONTRASTS are tested: several steps with a graph (DRaFT-K of Clark
et al. 2024), with a stop-gradient at the denoiser's input (DRTune, Wu et al. 2024), several noise draws for the final
step of one trajectory (DRaFT-LV), and the paper's own trajectory. Gradients at the start are compared too: their spread
over updates, and the cosine between minus their mean and the way to the adjectives that name the class.
"""

import functools
from dataclasses import replace
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F

from evaluation.statistics import correct_pvalues
from experiments import common
from experiments.plots import plot_tradeoff
from experiments.trainings import (
    Trainings,
    compare_trainings,
    describe_test,
    describe_tests,
    judge_sets,
    list_seeds,
    measure_trainings,
)
from method.losses import cross_entropy
from method.update import Batch, token_gradient
from miniature.world import THINGS
from models.batch_size import fit_batch_size
from models.stable_diffusion import StableDiffusion
from prompt_datasets import TEMPLATES
from tokens.class_token import start_vectors
from utils import require

TEN = tuple(range(999, 0, -100))  # ten steps, the last from 99
SPREAD = 3  # updates' pictures at the start, whose gradients are compared
AT_ONCE = 40  # pictures with a graph
PAPER = "the paper's trajectory, guidance 3"


class Variant(NamedTuple):
    """A loop: its timesteps (None: the sampler's own) and guidance, and what it does with the gradient."""

    timesteps: tuple[int, ...] | None
    guidance: float = 1.0
    graph_steps: int = 1
    stop_gradient: bool = False  # at the denoiser's input
    draws: int = 1  # of noise for the final step, from one trajectory


SHORT, GUIDED = Variant((999, 800, 600)), Variant((999, 800, 600), 3.0)
STARTS, GUIDANCES = (800, 600, 300), (1.0, 2.0, 3.0, 5.0)
EXPLORED = {f"{' '.join(map(str, timesteps))}, guidance {guidance:g}": Variant(timesteps, guidance)
            for start in STARTS for timesteps, guidances in (
                ((start,), (1.0,)), ((999, start), GUIDANCES), ((999, (999 + start) // 2, start), (1.0,)))
            for guidance in guidances}  # of one training
LOOPS = {
    "999 800 600, guidance 1": SHORT, "999 800 600, guidance 3": GUIDED, "600 alone, guidance 1": Variant((600,)),
    "two noise draws, guidance 1": SHORT._replace(draws=2),
    PAPER: Variant(None, 3.0),
    **{f"ten steps, graph of {steps}{', stop-gradient' * stop}": Variant(TEN, 1.0, steps, stop)
       for steps, stop in ((1, False), (5, False), (5, True))}}
MORE_LOOPS = {f"ten steps, graph of {steps}{', stop-gradient' * stop}": Variant(TEN, 1.0, steps, stop)
              for steps in (2, 10) for stop in (False, True)}  # of one training
CONTRASTS = (
    ("999 800 600, guidance 1", "999 800 600, guidance 3"), ("999 800 600, guidance 1", "600 alone, guidance 1"),
    ("999 800 600, guidance 3", PAPER),
    ("two noise draws, guidance 1", "999 800 600, guidance 1"),
    ("ten steps, graph of 5", "ten steps, graph of 1"),
    ("ten steps, graph of 5, stop-gradient", "ten steps, graph of 5"))


class VariedLoop(StableDiffusion):
    """A generator whose trajectories carry the gradient as a Variant says."""

    def __init__(self, generator: StableDiffusion, variant: Variant):
        super().__init__(generator.prompt_encoders, generator.denoiser, generator.networks[-1], generator.scheduler,
                         str(generator.device))
        self.variant = variant

    def sample(self, cond, seeds, settings, grad_steps=1, batch_size=None, start=None):
        if self.variant.draws == 1:
            return super().sample(cond, seeds, settings, self.variant.graph_steps, batch_size, start)
        prompt_of = cond.detach().flatten(1).unique(dim=0, return_inverse=True)[1]
        drawn, place = torch.tensor(share_trajectories(prompt_of.tolist(), self.variant.draws)).unique(
            return_inverse=True)
        with torch.no_grad():
            start = super().sample(cond[drawn.to(cond.device)], seeds[drawn], settings)[place.to(cond.device)]
        last_step = settings._replace(timesteps=settings.timesteps[-1:])
        return super().sample(cond, seeds + 10**6, last_step, 1, batch_size, start)

    def guided_noise(self, latents, *arguments):
        return super().guided_noise(latents.detach() if self.variant.stop_gradient else latents, *arguments)


def share_trajectories(prompt_of: list[int], draws: int) -> list[int]:
    """Of every image the one whose trajectory it shares: `draws` images of one prompt follow the first of them."""
    same = {prompt: [i for i, other in enumerate(prompt_of) if other == prompt] for prompt in prompt_of}
    return [same[prompt][same[prompt].index(i) // draws * draws] for i, prompt in enumerate(prompt_of)]


def open_variant(lab: common.Lab, variant: Variant) -> common.Lab:
    """The lab whose tokens learn by a variant of the loop."""
    generator = lab.get_generator()
    require(type(generator) is StableDiffusion, "this experiment is for Stable Diffusion 1 and 2 and the miniature")
    steps = variant.timesteps and list(variant.timesteps)
    config = replace(lab.config, train_timesteps=steps, train_guidance_scale=variant.guidance)
    loop = variant[2:] if variant[2:] != SHORT[2:] else ()
    return lab._replace(config=config, loop=loop, get_generator=functools.cache(lambda: VariedLoop(generator, variant)))


def measure_gradients(lab: common.Lab, update: int) -> torch.Tensor:
    """The gradient [C, K * D] of every class's mean loss over an update's pictures, at the initialiser."""
    config, generator, classes = lab.config, lab.get_generator(), len(lab.targets)
    size, count = config.epoch_size, min(config.number_of_prompts, config.epoch_size)
    start = start_vectors(generator, config.initializer_token, config.num_vectors)
    vectors = start.repeat(classes * count, 1, 1).requires_grad_()
    prompts = [template.format(f"{config.placeholder_token} {target.name}")
               for target in lab.targets for template in TEMPLATES[:count]]
    images = torch.arange(classes * size)
    batch = Batch(prompts, images // size * count + images % size % count, config.seed + update * size + images % size,
                  torch.tensor([target.index for target in lab.targets], device=start.device).repeat_interleave(size),
                  torch.full((len(images),), 1 / size, device=start.device))
    step = fit_batch_size(token_gradient, config.batch_size, AT_ONCE)
    step(generator, cross_entropy(lab.get_guide()), vectors, batch, common.method_settings(config)[1])
    return vectors.grad.view(classes, count, -1).sum(1).cpu()


def find_directions(lab: common.Lab) -> torch.Tensor:
    """From the initialiser to what names each class [C, K * D]: its adjectives, or a trained token."""
    generator, ends = lab.get_generator(), []
    for target in lab.targets:
        words = next((thing.adjectives for thing in THINGS if thing.label == target.label), ())
        ends.append(torch.stack([generator.initial_vectors(word) for word in words]).mean(0).cpu() if words else
                    common.load_vectors(common.learn_tokens(lab, [target]))[target])
    return (torch.stack(ends) - generator.initial_vectors(lab.config.initializer_token).cpu()).flatten(1)


def measure_start(lab: common.Lab, directions: torch.Tensor) -> list[float]:
    """Cosine and spread of the gradients at the initialiser, means over the classes."""
    gradients = torch.stack([measure_gradients(lab, update) for update in range(SPREAD)])
    cosines = F.cosine_similarity(-gradients.mean(0), directions, dim=1)
    return [cosines.mean().item(), (gradients.std(0).norm(dim=1) / gradients.mean(0).norm(dim=1)).mean().item()]


def measure_variant(lab: common.Lab, variant: Variant, seeds: list[int], images: int) -> Trainings:
    """What a variant of the loop learns in the trainings of `seeds`."""
    found, share = measure_trainings(open_variant(lab, variant), seeds, images), 1.0
    if variant.draws > 1:  # share a trajectory, and each takes the final step again
        size, prompts = lab.config.epoch_size, lab.config.number_of_prompts
        drawn = set(share_trajectories([i % prompts for i in range(size)], variant.draws))
        share = len(drawn) / size + 1 / len(variant.timesteps)
    return found._replace(unet_calls=found.unet_calls * share)


def measure_starts(lab: common.Lab, loops: dict[str, Variant]) -> dict[str, list[float]]:
    """Cosine and spread of each variant's gradients at the initialiser."""
    directions = find_directions(lab)
    return {name: common.cached_result(varied, functools.partial(measure_start, varied, directions),
                                       loop=variant, spread=SPREAD, classes=[target.number for target in lab.targets])
            for name, variant in loops.items() for varied in [open_variant(lab, variant)]}


def main(argv: list[str] | None = None, explored: dict[str, Variant] = EXPLORED, loops: dict[str, Variant] = LOOPS,
         more_loops: dict[str, Variant] = MORE_LOOPS, contrasts: tuple = CONTRASTS, reference: str = PAPER):
    options = common.parse_options(
        __doc__, argv, "all", quick={"seeds": 2, "images": 1, "updates": 2, "epoch_size": 4, "map_images": 1},
        seeds=3, images=10, updates=8, epoch_size=6, map_images=5)
    lab = common.open_lab(options, epoch_size=options.epoch_size, num_train_epochs=options.updates,
                          early_stopping=options.updates, target_accuracy=1.0, fresh_noise=True)
    seeds, plain = list_seeds(lab), common.draw_sets(lab, dict.fromkeys(lab.targets), options.images)
    tried = {name: measure_variant(lab, variant, seeds[:1], options.map_images) for name, variant in explored.items()}
    found = {name: measure_variant(lab, variant, seeds, options.images) for name, variant in loops.items()}
    more = {name: measure_variant(lab, variant, seeds[:1], options.images) for name, variant in more_loops.items()}
    starts = measure_starts(lab, loops | more_loops)
    tests = correct_pvalues({f"{ours}, beside {theirs}": compare_trainings(found[ours], found[theirs])
                             for ours, theirs in contrasts})
    plot_tradeoff(lab.out / "gradient_step.png", "\n".join(
        f"{name}:\n{describe_test(test)}" for name, test in tests.items() if test.pvalue < 0.05),
        [mean(shares) for shares in judge_sets(lab, [plain]).values()], found, tried | more, reference=reference)
    write_page(lab, found, tried | more, starts, tests)


def write_page(lab: common.Lab, found: dict[str, Trainings], explored: dict[str, Trainings],
               starts: dict[str, list[float]], tests: dict):
    options = lab.options
    rows = [[name, kind, str(trainings.mean_right()), f"{trainings.least_right():.2f}",
             *(f"{value:.2f}" for value in starts.get(name, [])), *[""] * (0 if name in starts else 2),
             f"{trainings.unet_calls:.0f}", f"{trainings.seconds:.1f}"]
            for kind, part in ((common.TESTED, found), (common.EXPLORATORY, explored))
            for name, trainings in part.items()]
    common.publish_result(
        lab, "gradient_step", common.TESTED, "Where the gradient enters, and how many steps need one",
        f"After {options.updates} updates: {describe_tests(tests)}",
        ["variant of the loop", "kind", "right class", "least", "cosine", "spread", "UNet calls per class",
         "seconds per class"], rows,
        f"{options.updates} updates of {options.epoch_size} pictures. Tested: {options.seeds} trainings, "
        f"{options.images} held-out pictures per class and training; exploratory: one training, and "
        f"{options.map_images} pictures where guidance, the start of the final step and the steps before it vary. "
        "Cosine: between the first descent direction and the way from the initialiser to the adjectives that name "
        f"the class. Spread: standard deviation of {SPREAD} updates' gradients at the start over the norm of their "
        "mean.", {"tests": tests, "updates": options.updates, "starts": starts, "loops": {
            name: trainings._asdict() for name, trainings in (found | explored).items()}})


if __name__ == "__main__":
    common.run_script(main)
