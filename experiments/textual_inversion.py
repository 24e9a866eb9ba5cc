"""The baseline: textual inversion (Gal et al. 2023) from k real pictures per class, beside the class token.

    python -m experiments.textual_inversion
    python -m experiments.textual_inversion --config configs/imagenet.yml --real_images DIR --class_index 283

The recipe is that of diffusers' script, of 300 steps: PER_STEP pictures in each, LR, flipped at random, started from
the class name's first word. The new word stands alone in the prompt, as it was learned, or before the class name. What
inversion takes along is tried with pictures that all show one context: whether the plain prompt shows it too.
"""

import functools
import math
import random
import time
from contextlib import suppress
from statistics import mean

import torch
from tqdm import tqdm

from config import RunConfig
from evaluation.accuracy import measure_context
from evaluation.fidelity import extract_files
from evaluation.statistics import (
    NEAREST_K,
    compare_classes,
    correct_pvalues,
    interval_over_classes,
    measure_prdc,
)
from experiments import common
from experiments.plots import plot_panels
from experiments.small import crop_squares
from experiments.trainings import describe_tests, judge_sets, list_seeds
from miniature import world
from models.denoising import compute_denoising_loss, encode_images
from models.extractors import classifier_extractor
from models.generator import Generator
from prompt_datasets import TEMPLATES, TargetClass
from system.tensor_files import save_image
from utils import UserError, require

PER_STEP, LR = 4, 5e-3  # pictures of a class in each step, AdamW's learning rate
AT_ONCE = 40  # pictures with a graph
TAKEN_ALONG = "in the snow"  # what all pictures of one case show
TOKEN, ALONE, NOUN, TIMED, SNOWY = ("class token", "inversion, alone", "inversion, with the noun",
                                    "inversion, alone, in the token's time", "inversion of snow, alone")
CONTRASTS = (("right", TOKEN, ALONE), ("right", TOKEN, NOUN), ("right", TOKEN, TIMED), ("coverage", TOKEN, ALONE),
             ("snow", SNOWY, ALONE))


def invert_pictures(lab: common.Lab, real: common.Sets, steps: list[int],
                    seed: int = 0) -> tuple[dict[int, common.Vectors], float]:
    """The vectors [K, D] of every class by its pictures after each of `steps`, and a class's seconds per step; cached.
    """
    def run_inversion():
        started = time.monotonic()
        found = learn_vectors(lab.config, lab.get_generator(), real, steps, seed)
        learned = {step: vectors.tolist() for step, vectors in found.items()}
        return {"vectors": learned, "seconds": (time.monotonic() - started) / len(real) / max(steps)}

    found = common.cached_result(lab, run_inversion, steps=steps, per_step=PER_STEP, lr=LR, flipped=True, seed=seed,
                                 pictures=common.stamp_sets(real))
    return {int(step): dict(zip(real, torch.tensor(vectors), strict=True))
            for step, vectors in found["vectors"].items()}, found["seconds"]


def learn_vectors(config: RunConfig, generator: Generator, real: common.Sets, steps: list[int],
                  seed: int = 0) -> dict[int, torch.Tensor]:
    """The vectors [C, K, D] after each of `steps` of the ordinary denoising loss, all classes in the same steps."""
    noise = torch.Generator().manual_seed(seed)
    pictures = [crop_squares(files, config.height, config.width) for files in real.values()]
    moments = [encode_images(generator, torch.cat([images, images.flip(3)])) for images in pictures]
    vectors = torch.stack([embed_first_word(config, generator, target) for target in real]).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], LR, weight_decay=config.weight_decay)
    scaler, learned = torch.amp.GradScaler(generator.device.type, enabled=generator.dtype == torch.float16), {}
    for step in tqdm(range(1, max(steps) + 1), desc="textual inversion", unit="step", mininterval=2):
        optimizer.zero_grad()
        for part in torch.arange(len(real)).split(AT_ONCE // PER_STEP):
            latents = torch.cat([sample_latents(*moments[i], noise) for i in part.tolist()])
            prompts = [TEMPLATES[i].format(config.placeholder_token)
                       for i in torch.randint(len(TEMPLATES), (len(latents),), generator=noise)]
            cond = generator.encode(prompts, vectors[part].repeat_interleave(PER_STEP, 0))
            loss = compute_denoising_loss(generator, latents, cond, noise)
            scaler.scale(loss * len(part)).backward()  # each class as if it learned alone
        scaler.step(optimizer)
        scaler.update()
        if step in steps:
            learned[step] = vectors.detach().cpu().clone()
    return learned


def sample_latents(means: torch.Tensor, stds: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Latents [PER_STEP, 4, h, w] of some of a class's pictures."""
    rows = torch.randint(len(means), (PER_STEP,), generator=noise)
    return means[rows] + stds[rows] * torch.randn(means[rows].shape, generator=noise).to(means.device)


def embed_first_word(config: RunConfig, generator: Generator, target: TargetClass) -> torch.Tensor:
    """The embedding [K, D] of the class name's first word, or of the initialiser where that word is several tokens."""
    with suppress(UserError):
        return generator.initial_vectors(target.name.split()[0], 1)
    return generator.initial_vectors(config.initializer_token)


def draw_snowy_pictures(lab: common.Lab) -> common.Sets:
    """As many pictures of every class as `--main_k`, all TAKEN_ALONG, by the miniature's world."""
    sets = {target: [lab.work / "snowy" / target.folder / f"{i}.png" for i in range(lab.options.main_k)]
            for target in lab.targets}
    for target, files in sets.items():
        for i, file in enumerate(files):
            if not file.exists():
                save_image(world.draw(target.label, random.Random(f"{target.index} {i}"), TAKEN_ALONG), file)
    return sets


def measure_method(lab: common.Lab, trainings: list[common.Vectors], phrase: str | None, truth: common.Sets,
                   images: int) -> dict[str, list[float]]:
    """MEASURES by class of the pictures that several trainings' vectors give in the plain prompt."""
    sets = [common.draw_sets(lab, vectors, images, phrase=phrase) for vectors in trainings]
    diversity = [measure_diversity(lab, part, truth) for part in sets]  # of as many pictures in every row
    found = {"right": [mean(shares) for shares in judge_sets(lab, sets).values()], **{
        name: [mean(values) for values in zip(*(part[name] for part in diversity), strict=True)]
        for name in diversity[0]}}
    if lab.config.context_judge:
        found["snow"] = [mean(measure_context(lab.config.context_judge, TAKEN_ALONG, part[target]).value
                              for part in sets) for target in sets[0]]
    return found


def measure_diversity(lab: common.Lab, sets: common.Sets, truth: common.Sets) -> dict[str, list[float]]:
    """Of every class, on the judge's features: coverage of the real pictures `truth`, and the mean distance of two
    pictures in `sets`, in units of that of two real ones.
    """
    extractor = classifier_extractor(lab.get_judge())
    pairs = [[extract_files(extractor, files) for files in (truth[target], sets[target])] for target in sets]
    return {"coverage": [measure_prdc(real, drawn, lab.options.nearest_k)["coverage"] for real, drawn in pairs],
            "distance": [(torch.pdist(drawn).mean() / torch.pdist(real).mean()).item() for real, drawn in pairs]}


def measure_contexts(lab: common.Lab, methods: dict[str, tuple], images: int) -> dict[str, dict]:
    """Of the first training in other prompts: by class the share right, and where a judge is there the share kept."""
    found = {}
    for context in ("A painting of a {}", "A photo of a {} in the snow"):
        for name, (trainings, phrase, *_) in methods.items():
            sets = common.draw_sets(lab, trainings[0], images, context, phrase)
            kept = [measure_context(lab.config.context_judge, context, files).value for files in sets.values()] \
                if lab.config.context_judge else []
            found[f"{name}: {context}"] = {
                "right": [mean(shares) for shares in judge_sets(lab, [sets]).values()], "kept": kept}
    return found


def list_methods(lab: common.Lab, real: common.Sets) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """(vectors of every training, phrase, real pictures per class, seconds per class): of CONTRASTS, and by k."""
    options, word, largest = lab.options, lab.config.placeholder_token, max(lab.options.k)
    runs = [common.learn_tokens(lab, seed=seed) for seed in list_seeds(lab)]
    seconds = mean(common.measure_cost(folders, "seconds") for folders in runs)

    def invert_few(k: int, steps: list[int], seed: int):
        few = {target: files[seed * largest:seed * largest + k] for target, files in real.items()}
        return invert_pictures(lab, few, steps, seed)

    per_step = invert_few(options.main_k, [options.steps], 0)[1]
    as_long = max(1, math.ceil(seconds / per_step))
    learned = [invert_few(options.main_k, [options.steps], seed)[0][options.steps] for seed in range(options.seeds)]
    timed = [invert_few(options.main_k, [as_long], seed)[0][as_long] for seed in range(options.seeds)]
    cost = per_step * options.steps
    methods = {TOKEN: ([common.load_vectors(folders) for folders in runs], None, 0, seconds),
               ALONE: (learned, word, options.main_k, cost), NOUN: (learned, None, options.main_k, cost),
               TIMED: (timed, word, options.main_k, per_step * as_long)}
    if lab.config.real_images == common.WORLD:
        pictures = draw_snowy_pictures(lab)
        methods[SNOWY] = [invert_pictures(lab, pictures, [options.steps], seed)[0][options.steps]
                          for seed in range(options.seeds)], word, options.main_k, cost
    by_k = {}
    for k in options.k:
        vectors = invert_few(k, [options.steps], 0)[0][options.steps]
        by_k |= {(ALONE, k): ([vectors], word, k, cost), (NOUN, k): ([vectors], None, k, cost)}
    return methods, by_k


def main(argv: list[str] | None = None):
    options = common.parse_options(
        __doc__, argv, "all", quick={"k": [1, 2], "main_k": 2, "seeds": 2, "steps": 2, "images": 4, "k_images": 4,
                                     "truth": 6, "nearest_k": 1}, real_images=None, k=[1, 3, 5, 10], main_k=5, seeds=3,
        steps=300, images=20, k_images=10, truth=100, nearest_k=NEAREST_K)
    require(min(options.images, options.k_images) > options.nearest_k,
            f"--images and --k_images must be greater than --nearest_k {options.nearest_k}")
    lab = common.open_lab(options)
    real = common.load_real_images(lab, max(options.k) * options.seeds + options.images + options.truth)
    truth = {target: files[-options.truth:] for target, files in real.items()}
    more = {target: files[-options.truth - options.images:-options.truth] for target, files in real.items()}
    methods, by_k = list_methods(lab, real)
    measure = functools.partial(measure_method, lab, truth=truth)
    found = {name: measure(trainings, phrase, images=options.images) for name, (trainings, phrase, *_) in
             {"no token": ([dict.fromkeys(real)], None), **methods}.items()}
    small = {key: measure(trainings, phrase, images=options.k_images)["right"]
             for key, (trainings, phrase, *_) in by_k.items()}
    contexts = measure_contexts(lab, {name: methods[name] for name in (TOKEN, ALONE, NOUN)}, options.k_images)
    tests = correct_pvalues({f"{measure}, {ours} beside {theirs}": compare_classes(found[ours][measure],
                                                                                   found[theirs][measure])
                             for measure, ours, theirs in CONTRASTS if ours in found and measure in found[ours]})
    write_page(lab, methods, found, small, contexts, tests, measure_diversity(lab, more, truth))


def write_page(lab: common.Lab, methods: dict, found: dict, small: dict, contexts: dict, tests: dict, ceiling: dict):
    """The figure and the page."""
    options = lab.options
    plot_panels(lab.out / "textual_inversion.png", "right class", {
        "real pictures per class (one training: exploratory)": {name: {
            k: interval_over_classes(small[name, k]) for k in options.k} for name in (ALONE, NOUN)},
        f"({options.seeds} trainings)": {"": {name: interval_over_classes(of["right"])
                                              for name, of in found.items()}}})
    costs = {"no token": ("", ""), **{name: (real, f"{seconds:.1f}") for name, (*_, real, seconds) in methods.items()}}
    rows = [[name, *(interval_over_classes(of[measure]) if measure in of else ""
                     for measure in ("right", "coverage", "distance", "snow")), *costs[name]]
            for name, of in found.items()]
    rows.append(["real pictures", "", *(interval_over_classes(ceiling[measure]) for measure in ("coverage", "distance")
                                        ), "", "", ""])
    rows += [[name, interval_over_classes(of["right"]), "", "", "", "", ""] for name, of in contexts.items()]
    common.publish_result(
        lab, "textual_inversion", common.TESTED, "The class token beside textual inversion",
        describe_tests(tests),
        ["", "right class", "coverage", "distance of two pictures", "shows snow", "real pictures per class",
         "seconds per class"], rows,
        f"{options.seeds} trainings (one in other prompts and in the figure's left side), "
        f"{options.images} held-out pictures per class and training (there {options.k_images}). Coverage of "
        f"{options.truth} real pictures per class, distance in units of theirs. {options.steps} steps of {PER_STEP} "
        f"pictures; '{TIMED}' as many as fit the class token's seconds, both "
        "measured in this run. The class token needs no real pictures, but a "
        "classifier that was trained on some.",
        {"methods": found, "by_k": {f"{name}, k = {k}": values for (name, k), values in small.items()},
         "contexts": contexts, "ceiling": ceiling, "tests": tests})


if __name__ == "__main__":
    common.run_script(main)
