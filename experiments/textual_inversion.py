"""The baseline: textual inversion (Gal et al. 2023) from k real pictures per class, beside the class token.

    python -m experiments.textual_inversion
    python -m experiments.textual_inversion --config configs/imagenet.yml --real_images DIR --class_index 283

Both are drawn with fresh seeds, in the plain prompt and in other contexts.
"""

import time
from contextlib import suppress

import torch
from tqdm import tqdm

from evaluation.accuracy import measure_context
from evaluation.fidelity import extract_files
from evaluation.statistics import NEAREST_K, mean_with_error, measure_prdc, pool_proportions
from experiments import common
from experiments.small import crop_squares
from models.denoising import compute_denoising_loss, encode_images
from models.extractors import classifier_extractor
from prompt_datasets import TEMPLATES, TargetClass
from utils import UserError, require

PER_STEP, LR = 4, 5e-3  # pictures of a class in each step, AdamW's learning rate
AT_ONCE = 40  # pictures with a graph
CONTEXTS = ("A painting of a {}", "A photo of a {} in the snow")
PROMPTS = (TEMPLATES[0], *CONTEXTS)


def invert_pictures(lab: common.Lab, real: common.Sets, steps: int) -> tuple[common.Vectors, float]:
    """The vectors [K, D] of every class by textual inversion of its pictures, and the seconds per class; cached."""
    def run_inversion():
        started = time.monotonic()
        return {"vectors": learn_vectors(lab, real, steps).tolist(), "seconds": time.monotonic() - started}

    found = common.cached_result(lab, run_inversion, steps=steps, per_step=PER_STEP, lr=LR,
                                 pictures=common.stamp_sets(real))
    return dict(zip(real, torch.tensor(found["vectors"]), strict=True)), found["seconds"] / len(real)


def learn_vectors(lab: common.Lab, real: common.Sets, steps: int) -> torch.Tensor:
    """The vectors [C, K, D] after `steps` of the ordinary denoising loss, all classes in the same steps."""
    config, generator, noise = lab.config, lab.get_generator(), torch.Generator().manual_seed(0)
    moments = [encode_images(generator, crop_squares(files, config.height, config.width)) for files in real.values()]
    vectors = torch.stack([embed_first_word(lab, target) for target in real]).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], LR, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(generator.device.type, enabled=generator.dtype == torch.float16)
    for _ in tqdm(range(steps), desc="textual inversion", unit="step"):
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
    return vectors.detach().cpu()


def sample_latents(means: torch.Tensor, stds: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Latents [PER_STEP, 4, h, w] of some of a class's pictures."""
    rows = torch.randint(len(means), (PER_STEP,), generator=noise)
    return means[rows] + stds[rows] * torch.randn(means[rows].shape, generator=noise).to(means.device)


def embed_first_word(lab: common.Lab, target: TargetClass) -> torch.Tensor:
    """The embedding [K, D] of the class name's first word, or of the initialiser where that word is several tokens."""
    with suppress(UserError):
        return lab.get_generator().initial_vectors(target.name.split()[0], 1)
    return lab.get_generator().initial_vectors(lab.config.initializer_token)


def measure_sets(lab: common.Lab, sets: dict[str, common.Sets], truth: common.Sets) -> dict:
    """How pictures {prompt: of every class} are judged, and the diversity of those of the plain prompt."""
    judge = lab.config.context_judge
    coverage, distance = measure_diversity(lab, sets[TEMPLATES[0]], truth)
    return {"right": {prompt: common.measure_accuracy(lab, files) for prompt, files in sets.items()},
            "coverage": coverage, "distance": distance, "context_kept": {
                context: pool_proportions(measure_context(judge, context, files) for files in sets[context].values())
                for context in CONTEXTS if judge}}


def measure_diversity(lab: common.Lab, sets: common.Sets, truth: common.Sets) -> tuple[list[float], list[float]]:
    """Of every class, on the judge's features: coverage of the real pictures `truth`, and the mean distance of two
    pictures in `sets`, in units of that of two real ones.
    """
    extractor = classifier_extractor(lab.get_judge())
    pairs = [[extract_files(extractor, files) for files in (truth[target], sets[target])] for target in sets]
    return ([measure_prdc(real, drawn, lab.options.nearest_k)["coverage"] for real, drawn in pairs],
            [(torch.pdist(drawn).mean() / torch.pdist(real).mean()).item() for real, drawn in pairs])


def main(argv: list[str] | None = None):
    options = common.parse_options(__doc__, argv, "1,3,5,7,9,11,13,15", real_images=None, k=5, steps=120, images=10,
                                   nearest_k=NEAREST_K, truth=100)
    require(options.images > options.nearest_k, f"--images must be greater than --nearest_k {options.nearest_k}")
    lab = common.open_lab(options)
    real = common.load_real_images(lab, options.k + options.images + options.truth)
    few, more, truth = ({target: files[part] for target, files in real.items()} for part in (
        slice(options.k), slice(options.k, options.k + options.images), slice(options.k + options.images, None)))
    runs = common.learn_tokens(lab)
    drawn = lab.config.epoch_size * common.measure_cost(runs, "updates")
    inverted, seconds = invert_pictures(lab, few, options.steps)
    methods = {  # vectors, what stands for them in a prompt; real and drawn pictures and seconds that they cost
        "no token": (dict.fromkeys(real), None, 0, 0, 0),
        "class token": (common.load_vectors(runs), None, 0, drawn, common.measure_cost(runs, "seconds")),
        "textual inversion": (inverted, lab.config.placeholder_token, options.k, 0, seconds)}
    rows, data, shown = [], {}, {}
    for name, (vectors, phrase, *costs) in methods.items():
        sets = {prompt: common.draw_sets(lab, vectors, options.images, prompt, phrase) for prompt in PROMPTS}
        shown[name] = {target: [file for files in sets.values() for file in files[target][:4]] for target in real}
        data[name] = found = {**measure_sets(lab, sets, truth), "seconds_per_class": costs[-1]}
        rows.append([name, found["right"][TEMPLATES[0]], mean_with_error(found["coverage"]),
                     mean_with_error(found["distance"]), *(f"{cost:.0f}" for cost in costs),
                     *(f"{found['right'][text]}, {found['context_kept'].get(text, '-')}" for text in CONTEXTS)])
    common.show_sets(lab, shown, lab.out / "textual_inversion.png", f"four seeds each: {'; '.join(PROMPTS)}", 12)
    (_, ours, theirs), ceiling = rows, measure_diversity(lab, more, truth)
    contexts = [f"'{CONTEXTS[i]}': right and kept {ours[i - 2]} and {theirs[i - 2]}" for i in range(2)]
    common.publish_result(
        lab, "textual_inversion", "The class token beside textual inversion",
        f"Right class in {ours[1]} with the class token, in {theirs[1]} with textual inversion of {options.k} "
        f"pictures; coverage {ours[2]} and {theirs[2]}; {'; '.join(contexts)}.",
        ["", "right class", "coverage", "distance of two pictures", "real pictures per class",
         "pictures drawn to learn", "seconds per class", *(f"{context}: right, kept" for context in CONTEXTS)],
        [*rows, ["real pictures", "", *map(mean_with_error, ceiling), *[""] * 5]],
        f"Coverage of {options.truth} real pictures per class; distance in units of theirs. The class token needs no "
        "real pictures, but a classifier that was trained on some.",
        {"methods": data, "ceiling": ceiling, "pictures": options.images, "k": options.k, "steps": options.steps})


if __name__ == "__main__":
    common.run_script(main)
