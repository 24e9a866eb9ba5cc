"""The baseline: textual inversion (Gal et al. 2023) from k real pictures per class, beside the class token.

    python -m experiments.textual_inversion
    python -m experiments.textual_inversion --config configs/imagenet.yml --real_images DIR --class_index 283

A vector of the same size learns, by the ordinary denoising loss, to stand for the pictures: "A photo of a S*", started
from the first word of the class name. Both are then drawn with fresh seeds, in the plain prompt and in other contexts.
"""

import time
from contextlib import suppress
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from evaluation.accuracy import measure_context
from evaluation.fidelity import classifier_extractor, extract_files
from evaluation.pictures import draw_sheet
from evaluation.statistics import NEAREST_K, measure_prdc, pool_proportions
from evaluation.tables import Table
from experiments import common
from experiments.common import mean_with_error
from experiments.small import crop_squares
from prompt_datasets import TEMPLATES, TargetClass, prompt_folder
from utils import UserError, require

STEPS, PER_STEP, LR = 120, 4, 5e-3  # steps, pictures of a class in each, AdamW's learning rate
AT_ONCE = 40  # pictures with a graph
CONTEXTS = ("A painting of a {}", "A photo of a {} in the snow")
FOLDERS = {TEMPLATES[0]: "", **{template: f"prompts/{prompt_folder(template)}/" for template in CONTEXTS}}
Sets = dict[TargetClass, list[Path]]


def invert_pictures(lab: common.Lab, real: Sets, file: Path, steps: int = STEPS) -> tuple[dict, float]:
    """{class: its vectors [K, D] by textual inversion of its pictures}, and the seconds per class; cached in `file`."""
    def run_inversion():
        started = time.monotonic()
        return {"vectors": learn_vectors(lab, real, steps).tolist(), "seconds": time.monotonic() - started}

    pictures = {target.number: [path.name for path in files] for target, files in real.items()}
    found = common.cached_result(file, common.list_settings(lab, steps=steps, per_step=PER_STEP, inversion_lr=LR,
                                                            pictures=pictures), run_inversion)
    return dict(zip(real, torch.tensor(found["vectors"]), strict=True)), found["seconds"] / len(real)


def learn_vectors(lab: common.Lab, real: Sets, steps: int) -> torch.Tensor:
    """The vectors [C, K, D] after `steps` of AdamW, all classes in the same steps."""
    config, generator, noise = lab.config, lab.get_generator(), torch.Generator().manual_seed(0)
    moments = [generator.encode_images(crop_squares(files, config.height, config.width)) for files in real.values()]
    vectors = torch.stack([embed_first_word(lab, target) for target in real]).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], LR, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(generator.device.type, enabled=generator.dtype == torch.float16)
    for _ in tqdm(range(steps), desc="textual inversion", unit="step"):
        optimizer.zero_grad()
        for part in torch.arange(len(real)).split(AT_ONCE // PER_STEP):
            latents = torch.cat([draw_latents(*moments[i], noise) for i in part.tolist()])
            prompts = [TEMPLATES[i].format(config.placeholder_token)
                       for i in torch.randint(len(TEMPLATES), (len(latents),), generator=noise)]
            cond = generator.encode(prompts, vectors[part].repeat_interleave(PER_STEP, 0))
            loss = generator.denoising_loss(latents, cond, noise) * len(part)  # each class as if it learned alone
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return vectors.detach().cpu()


def draw_latents(means: torch.Tensor, stds: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Latents [PER_STEP, 4, h, w] of some of a class's pictures."""
    rows = torch.randint(len(means), (PER_STEP,), generator=noise)
    return means[rows] + stds[rows] * torch.randn(means[rows].shape, generator=noise).to(means.device)


def embed_first_word(lab: common.Lab, target: TargetClass) -> torch.Tensor:
    """The embedding [K, D] of the class name's first word, or of the initialiser where that word is several tokens."""
    with suppress(UserError):
        return lab.get_generator().initial_vectors(target.name.split()[0])
    return lab.get_generator().initial_vectors(lab.config.initializer_token)


def measure_diversity(lab: common.Lab, sets: Sets, truth: Sets, nearest_k: int) -> tuple[list[float], list[float]]:
    """Of every class, on the judge's features: coverage of the real pictures `truth`, and the mean distance of two
    pictures in `sets`, in units of that of two real ones.
    """
    extractor = classifier_extractor(lab.get_judge())
    pairs = [[extract_files(extractor, files) for files in (truth[target], sets[target])] for target in sets]
    return ([measure_prdc(real, drawn, nearest_k)["coverage"] for real, drawn in pairs],
            [(torch.pdist(drawn).mean() / torch.pdist(real).mean()).item() for real, drawn in pairs])


def main(argv: list[str] | None = None):
    parser = common.build_parser(__doc__, "1,3,5,7,9,11,13,15")
    parser.add_argument("--real_images", help="a folder of real pictures, as for run.py (the config's)")
    for name, default, text in (
            ("k", 5, "real pictures per class for textual inversion"), ("steps", STEPS, "of textual inversion"),
            ("images", 10, "pictures per class, prompt and method"), ("nearest_k", NEAREST_K, "neighbours of coverage"),
            ("truth", 100, "real pictures per class to be covered")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    options = parser.parse_args(argv)
    require(options.images > options.nearest_k, f"--images must be greater than --nearest_k {options.nearest_k}")
    lab = common.open_lab(options, **({"real_images": options.real_images} if options.real_images else {}))
    real = common.load_real_images(lab, options.k + options.images + options.truth)
    few, more, truth = ({target: files[part] for target, files in real.items()} for part in (
        slice(options.k), slice(options.k, options.k + options.images), slice(options.k + options.images, None)))
    runs = common.learn_tokens(lab, "token")
    drawn = lab.config.epoch_size * mean(len(common.read_updates(run)) for run in runs.values())
    inverted, seconds = invert_pictures(lab, few, lab.work / f"textual_inversion/{options.k}.json", options.steps)
    methods = {"no token": ("without", dict.fromkeys(lab.targets), None),
               "class token": ("with", {target: common.load_vectors(run) for target, run in runs.items()}, None),
               "textual inversion": (f"textual_inversion_{options.k}", inverted, lab.config.placeholder_token)}
    costs = {"no token": (0, 0, 0), "class token": (0, drawn, mean(map(common.read_seconds, runs.values()))),
             "textual inversion": (options.k, 0, seconds)}
    sets = {name: {template: {target: common.draw_class(lab, target, folder + arm, of_class, options.images, template,
                                                        phrase) for target, of_class in vectors.items()}
                   for template, folder in FOLDERS.items()} for name, (arm, vectors, phrase) in methods.items()}
    draw_sheet([(f"{target.label}: {name}", [file for files in by_prompt.values() for file in files[target][:4]])
                for target in common.choose_shown(lab) for name, by_prompt in sets.items()],
               lab.out / "textual_inversion.png", cell=72, title=f"four seeds each: {'; '.join(FOLDERS)}")
    compare_methods(lab, sets, costs, more, truth, options)


def compare_methods(lab: common.Lab, sets: dict[str, dict[str, Sets]], costs: dict[str, tuple[float, ...]], more: Sets,
                    truth: Sets, options):
    """Publish a row per method, and one of real pictures, the ceiling; `costs`: real and drawn pictures, seconds."""
    rows, data, context_judge = [], {}, lab.config.context_judge
    for name in sets:
        right = {template: common.measure_accuracy(lab, files) for template, files in sets[name].items()}
        kept = {template: pool_proportions(measure_context(context_judge, template, files)
                                           for files in sets[name][template].values())
                for template in CONTEXTS if context_judge}
        coverage, distance = measure_diversity(lab, sets[name][TEMPLATES[0]], truth, options.nearest_k)
        rows.append([name, right[TEMPLATES[0]], mean_with_error(coverage), mean_with_error(distance),
                     *(f"{right[template]}, {kept.get(template, '-')}" for template in CONTEXTS),
                     *(f"{cost:.0f}" for cost in costs[name])])
        data[name] = {"right": right, "coverage": coverage, "distance": distance, "context_kept": kept,
                      "seconds_per_class": costs[name][-1]}
    ceiling = measure_diversity(lab, more, truth, options.nearest_k)
    _, ours, theirs = rows
    contexts = [f"'{context}': right and kept {ours[4 + i]} and {theirs[4 + i]}" for i, context in enumerate(CONTEXTS)]
    table = Table(
        ["", "right class", "coverage", "distance of two pictures", *(f"{name}: right, kept" for name in CONTEXTS),
         "real pictures per class", "pictures drawn to learn", "seconds per class"],
        [*rows, ["real pictures", "", *map(mean_with_error, ceiling), *[""] * (len(ours) - 4)]],
        note=f"Right and features by {common.judge_name(lab)} [Wilson 95 % interval over the pictures of one training "
             f"per class]. Coverage of {options.truth} real pictures per class, and the mean distance of two pictures "
             "in units of theirs (standard error over classes). The last row is of as many real pictures. Textual "
             f"inversion: {options.steps} steps of {PER_STEP} pictures, AdamW at {LR}. The class token needs no real "
             "pictures, but a classifier that was trained on some.")
    common.publish_result(
        lab, "textual_inversion", "The class token beside textual inversion",
        f"Right class in {ours[1]} with the class token, in {theirs[1]} with textual inversion of {options.k} "
        f"pictures; coverage {ours[2]} and {theirs[2]}; {'; '.join(contexts)}.", table,
        {"methods": data, "ceiling": ceiling, "pictures": options.images, "k": options.k, "steps": options.steps},
        "textual_inversion.png")


if __name__ == "__main__":
    common.run_script(main)
