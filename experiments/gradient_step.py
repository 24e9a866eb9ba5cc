"""Where the gradient enters, and how many steps have a graph.

    python -m experiments.gradient_step

A token learns for a fixed number of updates in variants of the loop. EXPLORED, of one training
each, varies guidance, the start of the final step and the steps before it. CONTRASTS are tested:
several steps with a graph (DRaFT-K of Clark et al. 2024), with a stop-gradient at the denoiser's
input (DRTune, Wu et al. 2024), several noise draws for the final step of one trajectory (DRaFT-LV),
and the paper's own trajectory. Gradients at the start are compared too: their spread over updates,
and the cosine between minus their mean and the way to the adjectives that name the class.
"""

import functools
from collections import defaultdict
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F

from evaluation.statistics import correct_pvalues
from evaluation.tables import Table
from experiments.material import cached_result, draw_sets, learn_tokens, load_vectors
from experiments.plots import plot_tradeoff
from experiments.study import (
    EXPLORATORY,
    TESTED,
    Study,
    StudyResult,
    open_study,
    parse_options,
    publish_result,
)
from experiments.trainings import (
    Trainings,
    compare_trainings,
    describe_clear,
    is_clear,
    judge_sets,
    list_seeds,
    measure_trainings,
)
from method.losses import cross_entropy
from method.update import Batch, token_gradient
from miniature.world import THINGS
from models.base import Generator
from models.batch_size import fit_batch_size
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES
from runs.session import Session
from system.terminal import run_script

TEN = tuple(range(999, 0, -100))  # ten steps, the last from 99
SPREAD = 3  # updates' pictures at the start, whose gradients are compared
AT_ONCE = 40  # pictures with a graph
OTHER_NOISE = 10**6  # added to a seed, for the noise of a shared trajectory's final step
PAPER = "the paper's trajectory, guidance 3"


class Variant(NamedTuple):
    """A loop: its timesteps (None: the sampler's own), guidance, and way of the gradient."""

    timesteps: tuple[int, ...] | None
    guidance: float = 1.0
    graph_steps: int = 1
    stop_gradient: bool = False  # at the denoiser's input
    draws: int = 1  # of noise for the final step, from one trajectory


SHORT = Variant((999, 800, 600))
GUIDED = Variant((999, 800, 600), 3.0)


def list_explored() -> dict[str, Variant]:
    """List the variants with one training: start of the final step, steps before it, guidance."""
    found = {}
    for start in (800, 600, 300):
        variants = [Variant((start,))]
        variants += [Variant((999, start), guidance) for guidance in (1.0, 2.0, 3.0, 5.0)]
        variants.append(Variant((999, (999 + start) // 2, start)))
        for variant in variants:
            steps = " ".join(map(str, variant.timesteps))
            found[f"{steps}, guidance {variant.guidance:g}"] = variant
    return found


EXPLORED = list_explored()
LOOPS = {
    "999 800 600, guidance 1": SHORT,
    "999 800 600, guidance 3": GUIDED,
    "600 alone, guidance 1": Variant((600,)),
    "two noise draws, guidance 1": SHORT._replace(draws=2),
    PAPER: Variant(None, 3.0),
    "ten steps, graph of 1": Variant(TEN, graph_steps=1),
    "ten steps, graph of 5": Variant(TEN, graph_steps=5),
    "ten steps, graph of 5, stop-gradient": Variant(TEN, graph_steps=5, stop_gradient=True),
}
MORE_LOOPS = {  # of one training
    "ten steps, graph of 2": Variant(TEN, graph_steps=2),
    "ten steps, graph of 2, stop-gradient": Variant(TEN, graph_steps=2, stop_gradient=True),
    "ten steps, graph of 10": Variant(TEN, graph_steps=10),
    "ten steps, graph of 10, stop-gradient": Variant(TEN, graph_steps=10, stop_gradient=True),
}
CONTRASTS = (
    ("999 800 600, guidance 1", "999 800 600, guidance 3"),
    ("999 800 600, guidance 1", "600 alone, guidance 1"),
    ("999 800 600, guidance 3", PAPER),
    ("two noise draws, guidance 1", "999 800 600, guidance 1"),
    ("ten steps, graph of 5", "ten steps, graph of 1"),
    ("ten steps, graph of 5, stop-gradient", "ten steps, graph of 5"),
)


class SharedTrajectories:
    """A generator in which several images of a prompt share a trajectory up to the final step."""

    def __init__(self, generator: Generator, draws: int):
        """Let `draws` images share one trajectory."""
        self.generator = generator
        self.draws = draws

    def __getattr__(self, name: str):
        return getattr(self.generator, name)

    def sample(
        self,
        cond: torch.Tensor,
        seeds: torch.Tensor,
        settings: SamplingSettings,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """Sample as the generator does; the final step has its own noise for every image."""
        _, prompt_of = cond.detach().flatten(1).unique(dim=0, return_inverse=True)
        followed = torch.tensor(share_trajectories(prompt_of.tolist(), self.draws))
        drawn, place = followed.unique(return_inverse=True)
        with torch.no_grad():
            latents = self.generator.sample(cond[drawn.to(cond.device)], seeds[drawn], settings)
            start = latents[place.to(cond.device)]
        last_step = settings._replace(timesteps=settings.timesteps[-1:])
        return self.generator.sample(cond, seeds + OTHER_NOISE, last_step, batch_size, start)


def share_trajectories(prompt_of: list[int], draws: int) -> list[int]:
    """Return, for every image, the image whose trajectory it shares.

    `draws` images of one prompt follow the first of them.
    """
    images_of = defaultdict(list)
    for image, prompt in enumerate(prompt_of):
        images_of[prompt].append(image)
    followed = []
    for image, prompt in enumerate(prompt_of):
        place = images_of[prompt].index(image)
        first = place // draws * draws
        followed.append(images_of[prompt][first])
    return followed


def change_loop(session: Session, variant: Variant):
    """Make a session train by a variant of the loop."""
    session.training_sampling = session.training_sampling._replace(
        grad_steps=variant.graph_steps, stop_gradient=variant.stop_gradient
    )
    if variant.draws > 1:
        session.generator = SharedTrajectories(session.generator, variant.draws)


def open_variant(study: Study, variant: Variant) -> Study:
    """Open the study whose tokens learn by a variant of the loop."""
    steps = list(variant.timesteps) if variant.timesteps else None
    session = study.session.with_settings(
        train_timesteps=steps, train_guidance_scale=variant.guidance
    )
    change = functools.partial(change_loop, variant=variant)
    session.drawer = study.session.drawer  # draws as ever
    change(session)
    of_gradient = (variant.graph_steps, variant.stop_gradient, variant.draws)
    loop = of_gradient if of_gradient != (1, False, 1) else ()
    return study._replace(session=session, loop=loop, change_loop=change)


def measure_gradients(study: Study, update: int) -> torch.Tensor:
    """Measure the gradient [C, K * D] of each class's mean loss over an update, at the start."""
    config, session = study.config, study.session
    generator, targets = session.generator, study.targets
    size = config.epoch_size
    templates = TEMPLATES[: min(config.number_of_prompts, size)]
    prompts = []
    for target in targets:
        phrase = f"{config.placeholder_token} {target.name}"
        prompts += [template.format(phrase) for template in templates]
    start = session.start_vectors(generator)
    vectors = start.repeat(len(prompts), 1, 1).requires_grad_()
    images = torch.arange(len(targets) * size)
    of_class, in_class = images // size, images % size
    indices = torch.tensor([target.index for target in targets], device=start.device)
    batch = Batch(
        prompts,
        prompt_of=of_class * len(templates) + in_class % len(templates),
        seeds=config.seed + update * size + in_class,
        targets=indices.repeat_interleave(size),
        weights=torch.full((len(images),), 1 / size, device=start.device),
    )
    step = fit_batch_size(token_gradient, config.batch_size, AT_ONCE)
    loss_fn = cross_entropy(session.classifier)
    step(generator, loss_fn, vectors, batch, session.training_sampling)
    return vectors.grad.view(len(targets), len(templates), -1).sum(1).cpu()


def find_directions(study: Study) -> torch.Tensor:
    """Find each class's direction [C, K * D] from the start: to its adjectives or its token."""
    generator = study.session.generator
    adjectives = {thing.label: thing.adjectives for thing in THINGS}
    ends = []
    for target in study.targets:
        words = adjectives.get(target.label, ())
        if words:
            named = torch.stack([generator.initial_vectors(word) for word in words])
            ends.append(named.mean(0).cpu())
        else:
            ends.append(load_vectors(learn_tokens(study, [target]))[target])
    start = generator.initial_vectors(study.config.initializer_token).cpu()
    return (torch.stack(ends) - start).flatten(1)


def measure_start(study: Study, directions: torch.Tensor) -> list[float]:
    """Measure cosine and spread of the gradients at the start, averaged over the classes."""
    gradients = torch.stack([measure_gradients(study, update) for update in range(SPREAD)])
    average = gradients.mean(0)
    cosines = F.cosine_similarity(-average, directions, dim=1)
    spreads = gradients.std(0).norm(dim=1) / average.norm(dim=1)
    return [cosines.mean().item(), spreads.mean().item()]


def measure_variant(study: Study, variant: Variant, seeds: list[int], images: int) -> Trainings:
    """Measure what a variant of the loop learns in the trainings of `seeds`."""
    found = measure_trainings(open_variant(study, variant), seeds, images)
    if variant.draws == 1:
        return found
    # images share a trajectory, and each takes the final step anew
    size, prompts = study.config.epoch_size, study.config.number_of_prompts
    followed = share_trajectories([i % prompts for i in range(size)], variant.draws)
    share = len(set(followed)) / size
    return found._replace(unet_calls=found.unet_calls * (share + 1 / len(variant.timesteps)))


def measure_starts(study: Study, loops: dict[str, Variant]) -> dict[str, list[float]]:
    """Measure cosine and spread of every variant of the loop."""
    directions = find_directions(study)
    numbers = [target.number for target in study.targets]
    found = {}
    for name, variant in loops.items():
        varied = open_variant(study, variant)
        measure = functools.partial(measure_start, varied, directions)
        found[name] = cached_result(varied, measure, loop=variant, spread=SPREAD, classes=numbers)
    return found


def main(
    argv: list[str] | None = None,
    explored: dict[str, Variant] = EXPLORED,
    loops: dict[str, Variant] = LOOPS,
    more_loops: dict[str, Variant] = MORE_LOOPS,
    contrasts: tuple = CONTRASTS,
    reference: str = PAPER,
):
    """Measure every variant, and publish the page."""
    quick = {"seeds": 2, "images": 1, "updates": 2, "epoch_size": 4, "map_images": 1}
    options = parse_options(
        __doc__,
        argv,
        "all",
        quick=quick,
        seeds=3,
        images=10,
        updates=8,
        epoch_size=6,
        map_images=5,
    )
    study = open_study(
        options,
        epoch_size=options.epoch_size,
        num_train_epochs=options.updates,
        early_stopping=options.updates,
        target_accuracy=1.0,
        fresh_noise=True,
    )
    seeds = list_seeds(study)
    one_seed = seeds[:1]

    def measure_all(variants: dict[str, Variant], of_seeds: list[int], images: int):
        found = {}
        for name, variant in variants.items():
            found[name] = measure_variant(study, variant, of_seeds, images)
        return found

    tried = measure_all(explored, one_seed, options.map_images)
    found = measure_all(loops, seeds, options.images)
    more = measure_all(more_loops, one_seed, options.images)
    starts = measure_starts(study, loops | more_loops)
    tests = {}
    for ours, theirs in contrasts:
        tests[f"{ours} vs. {theirs}"] = compare_trainings(found[ours], found[theirs])
    tests = correct_pvalues(tests)

    clear = [f"{name}:\n{test}" for name, test in tests.items() if is_clear(test)]
    plain_sets = draw_sets(study, dict.fromkeys(study.targets), options.images)
    plain = [mean(shares) for shares in judge_sets(study, [plain_sets]).values()]
    plot_tradeoff(
        study.out / "gradient_step.png",
        "\n".join(clear),
        plain,
        found,
        tried | more,
        reference=reference,
    )
    publish_result(study, write_result(study, found, tried | more, starts, tests))


def write_result(
    study: Study,
    found: dict[str, Trainings],
    explored: dict[str, Trainings],
    starts: dict[str, list[float]],
    tests: dict,
) -> StudyResult:
    """Make the study's page."""
    options = study.options
    rows = []
    for kind, part in ((TESTED, found), (EXPLORATORY, explored)):
        for name, trainings in part.items():
            start = [f"{value:.2f}" for value in starts.get(name, [])] or ["", ""]
            row = [
                name,
                kind,
                str(trainings.mean_right()),
                f"{trainings.least_right():.2f}",
                *start,
                f"{trainings.unet_calls:.0f}",
                f"{trainings.seconds:.1f}",
            ]
            rows.append(row)
    header = [
        "variant of the loop",
        "kind",
        "accuracy",
        "lowest class accuracy",
        "cosine",
        "spread",
        "UNet calls per class",
        "seconds per class",
    ]
    note = (
        f"{options.updates} updates of {options.epoch_size} pictures. Tested: {options.seeds} "
        f"trainings, {options.images} held-out pictures per class and training; exploratory: one "
        f"training, and {options.map_images} pictures where guidance, the start of the final step "
        "and the steps before it vary. Cosine: between the first descent direction and the way "
        "from the initialiser to the adjectives that name the class. Spread: standard deviation "
        f"of {SPREAD} updates' gradients at the start over the norm of their mean."
    )
    measured = {name: trainings._asdict() for name, trainings in (found | explored).items()}
    return StudyResult(
        "gradient_step",
        TESTED,
        "Where the gradient enters, and how many steps need one",
        f"Accuracy after {options.updates} updates. {describe_clear(tests)}",
        Table(header, rows),
        note,
        {"updates": options.updates, "starts": starts, "loops": measured},
        tests,
    )


if __name__ == "__main__":
    run_script(main)
