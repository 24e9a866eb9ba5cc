"""The baseline: textual inversion (Gal et al. 2023) from k real pictures a class, beside the class token.

    python -m experiments.textual_inversion
    python -m experiments.textual_inversion --config configs/imagenet.yml --real_images DIR --class_index 283

A vector of the same size at the same splice learns, by the ordinary denoising loss, to stand for the pictures: "A photo
of a S*", started from the class name's first word. Then both are asked for fresh seeds, plainly and in other contexts.
"""

import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from class_token import spliced
from classifiers import penultimate
from diffusion import encode_prompts
from evaluation import context_kept, interval
from experiments.common import (
    Lab,
    kept,
    open_lab,
    parser,
    pictures,
    publish,
    real_pictures_of,
    script,
    seconds_of,
    settings_of,
    share_right,
    tokens,
    updates_of,
    vector_of,
)
from experiments.small import squares
from metrics import prdc, wilson
from prompt_datasets import TEMPLATES, prompt_folder
from report import sheet
from utils import load_images, require

STEPS, A_STEP, LR = 120, 4, 5e-3  # steps, pictures of a class in each, AdamW's learning rate
AT_ONCE = 40  # pictures with a graph
CONTEXTS = ("A painting of a {}", "A photo of a {} in the snow")
NEAREST_K = 5
TRUTH = 100  # real pictures a class that drawn ones are compared with


class Method(NamedTuple):
    """A way to draw a class: the pictures' folder, a vector a class, what it stands for in the prompt, its cost."""

    folder: str
    vectors: dict[int, torch.Tensor | None]
    phrase: str | None = None  # None: '<placeholder> <class name>', or the name alone without a vector
    real: int = 0
    drawn: float = 0
    seconds: float = 0


def learn(lab: Lab, real: dict[int, list[Path]], file: Path, steps: int = STEPS, seed: int = 0) -> dict:
    """{"vectors": {class: [D]}, "seconds": a class}, by the denoising loss on its pictures; kept in `file`."""
    def make():
        started = time.monotonic()
        vectors = denoising(lab, real, steps, seed)
        return {"vectors": {index: vector.tolist() for index, vector in zip(real, vectors, strict=True)},
                "seconds": (time.monotonic() - started) / len(real)}

    pictured = {index: [path.name for path in files] for index, files in real.items()}
    settings = settings_of(lab, steps=steps, a_step=A_STEP, inversion_lr=LR, inversion_seed=seed, pictures=pictured)
    value = kept(file, settings, make)
    return {**value, "vectors": {int(index): torch.tensor(vector) for index, vector in value["vectors"].items()}}


def denoising(lab: Lab, real: dict[int, list[Path]], steps: int, seed: int) -> torch.Tensor:
    """The vectors [C, D] after `steps` of AdamW, all classes in the same steps, AT_ONCE pictures with a graph."""
    components, token_id = lab.generator()
    require(components.scheduler.config.prediction_type == "epsilon", "this generator does not predict the noise")
    device, generator = components.device, torch.Generator().manual_seed(seed)
    latents_of = [encoded(lab, files) for files in real.values()]
    vectors = torch.stack([first_word(lab, index) for index in real]).to(device).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], LR, weight_decay=lab.config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=components.unet.dtype == torch.float16)
    for _ in tqdm(range(steps), desc="textual inversion", unit="step"):
        optimizer.zero_grad()
        for part in torch.arange(len(real)).split(max(1, AT_ONCE // A_STEP)):
            latents = torch.cat([sampled(*latents_of[i], generator) for i in part.tolist()])
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = torch.randint(components.scheduler.config.num_train_timesteps, (len(latents),),
                                      generator=generator)
            noisy = components.scheduler.add_noise(latents, noise, timesteps)
            chosen = torch.randint(len(TEMPLATES), (len(latents),), generator=generator)
            prompts = [TEMPLATES[i].format(lab.config.placeholder_token) for i in chosen]
            with spliced(components.text_encoder, token_id, vectors[part].repeat_interleave(A_STEP, 0)):
                embeds = encode_prompts(components, prompts)
            predicted = components.unet(noisy.to(device, components.unet.dtype), timesteps.to(device),
                                        encoder_hidden_states=embeds).sample
            loss = F.mse_loss(predicted.float(), noise.to(device)) * len(part)  # each class as if it learned alone
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return vectors.detach().cpu()


def sampled(means: torch.Tensor, stds: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents [A_STEP, 4, h, w] of some of a class's pictures."""
    rows = torch.randint(len(means), (A_STEP,), generator=generator)
    return means[rows] + stds[rows] * torch.randn(means[rows].shape, generator=generator)


@torch.no_grad()
def encoded(lab: Lab, files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [K, 4, h, w] of the latents of real pictures, cropped to the run's size."""
    vae = lab.generator()[0].vae
    images = squares(files, lab.config.height, lab.config.width)
    posterior = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist
    return tuple((vae.config.scaling_factor * part).float().cpu() for part in (posterior.mean, posterior.std))


def first_word(lab: Lab, index: int) -> torch.Tensor:
    """The embedding [D] of the first token of the class's name."""
    components, _ = lab.generator()
    word = components.tokenizer(lab.names[index], add_special_tokens=False).input_ids[0]
    return components.text_encoder.get_input_embeddings().weight[word].detach().float()


@torch.no_grad()
def features(lab: Lab, files: list[Path]) -> torch.Tensor:
    """The judge's features [N, D] of pictures of any sizes."""
    judge, device = lab.judge(), lab.config.device
    prepared = torch.cat([judge.preprocessing(load_images([file])) for file in files])
    return torch.cat([penultimate(judge, part.to(device)).cpu() for part in prepared.split(64)])


def diversity(lab: Lab, sets: dict[int, list[Path]], truth: dict[int, list[Path]]) -> tuple[list[float], list[float]]:
    """Of every class: coverage of its real pictures, and the mean distance of two of its drawn ones.

    Both on the judge's features; the distance in units of that between two real pictures of the class.
    """
    pairs = [(features(lab, files), features(lab, truth[index])) for index, files in sets.items()]
    return ([prdc(real, drawn, NEAREST_K).coverage for drawn, real in pairs],
            [(torch.pdist(drawn).mean() / torch.pdist(real).mean()).item() for drawn, real in pairs])


def main():
    arguments = parser(__doc__, "1,3,5,7,9,11,13,15")
    arguments.add_argument("--real_images", help="a folder of real pictures, as for run.py (the config's)")
    arguments.add_argument("--k", type=int, default=5, help="real pictures a class for textual inversion (5)")
    arguments.add_argument("--steps", type=int, default=STEPS, help=f"of textual inversion, {A_STEP} pictures a class "
                                                                    f"each ({STEPS})")
    arguments.add_argument("--images", type=int, default=10, help="pictures a class, prompt and method (10)")
    options = arguments.parse_args()
    require(options.images > NEAREST_K, f"--images must be greater than {NEAREST_K}, for the neighbours of coverage")
    lab = open_lab(options, **({"real_images": options.real_images} if options.real_images else {}))
    real = real_pictures_of(lab, options.k + TRUTH + options.images)
    few, more, truth = ({index: files[part] for index, files in real.items()} for part in (
        slice(options.k), slice(options.k, options.k + options.images), slice(options.k + options.images, None)))
    folders = tokens(lab, "token")
    updates = mean(len(updates_of(folder)) for folder in folders.values())
    inverted = learn(lab, few, lab.work / f"textual_inversion/{options.k}.json", options.steps)
    methods = {
        "no token": Method("without", dict.fromkeys(lab.classes)),
        "class token": Method("with", {index: vector_of(folder) for index, folder in folders.items()},
                              drawn=updates * lab.config.epoch_size, seconds=mean(map(seconds_of, folders.values()))),
        "textual inversion": Method(f"textual_inversion_{options.k}", inverted["vectors"],
                                    lab.config.placeholder_token, options.k, seconds=inverted["seconds"])}
    sets = {name: drawn_by(lab, method, options.images) for name, method in methods.items()}
    show(lab, sets)
    compare(lab, methods, sets, more, truth, options)


def drawn_by(lab: Lab, method: Method, images: int) -> dict[str, dict[int, list[Path]]]:
    """{template: {class: pictures}}, the plain prompt first."""
    folders = {TEMPLATES[0]: "", **{template: f"prompts/{prompt_folder(template)}/" for template in CONTEXTS}}
    return {template: {index: pictures(lab, index, folder + method.folder, vector, images, template, method.phrase)
                       for index, vector in method.vectors.items()} for template, folder in folders.items()}


def show(lab: Lab, sets: dict[str, dict[str, dict[int, list[Path]]]]):
    some = lab.classes[::max(1, len(lab.classes) // 4)][:4]
    sheet([(f"{lab.labels[index]}: {method}", [file for each in of.values() for file in each[index][:4]])
           for index in some for method, of in sets.items()], lab.out / "textual_inversion.png", cell=72,
          title=f"four seeds each: {TEMPLATES[0]}; {'; '.join(CONTEXTS)}")


def compare(lab: Lab, methods: dict[str, Method], sets, more, truth, options):
    """Write the table: a row a method, and one of real pictures, which is the ceiling of coverage."""
    rows, data = [], {}
    for name, method in methods.items():
        right = {template: share_right(lab, each) for template, each in sets[name].items()}
        keeps = {template: seen(lab, template, sets[name][template]) for template in CONTEXTS}
        coverage, distance = diversity(lab, sets[name][TEMPLATES[0]], truth)
        rows.append([name, interval(right[TEMPLATES[0]]), with_error(coverage), with_error(distance),
                     *(f"{interval(right[template])}, {interval(keeps[template]) if keeps[template] else '-'}"
                       for template in CONTEXTS), method.real, f"{method.drawn:.0f}", f"{method.seconds:.0f}"])
        data[name] = {"right": {template: each._asdict() for template, each in right.items()}, "coverage": coverage,
                      "distance": distance, "seconds_a_class": method.seconds,
                      "context_kept": {template: each._asdict() for template, each in keeps.items() if each}}
    ceiling = diversity(lab, more, truth)
    rows.append(["real pictures", "", *map(with_error, ceiling), *[""] * (len(rows[0]) - 4)])
    _, ours, theirs, _ = rows
    publish(lab, "textual_inversion", "The class token beside textual inversion",
            f"Right class in {ours[1]} with the class token, in {theirs[1]} with textual inversion of {options.k} "
            f"pictures; coverage {ours[2]} and {theirs[2]}; " + "; ".join(
                f"'{template}': right and kept {ours[4 + i]} and {theirs[4 + i]}"
                for i, template in enumerate(CONTEXTS)) + ".",
            ["", "right class", "coverage", "distance of two pictures",
             *(f"{template}: right, context kept" for template in CONTEXTS), "real pictures a class",
             "pictures drawn to learn", "seconds a class"], rows,
            {"methods": data, "ceiling": ceiling, "pictures": options.images, "k": options.k, "steps": options.steps},
            f"Right and features by {lab.judged} [Wilson 95 % interval over the pictures of one training a class]. "
            f"Coverage of {TRUTH} real pictures of the class, and the mean distance of two pictures of it in units of "
            "theirs (standard error over classes); the last row is of as many real pictures. Textual inversion: "
            f"{options.steps} steps of {A_STEP} pictures, AdamW at {LR}. The class token needs no real pictures at "
            "hand, but a classifier that was trained on some.", "textual_inversion.png")


def with_error(values: list[float]) -> str:
    error = f" ({stdev(values) / len(values)**0.5:.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{error}"


def seen(lab: Lab, template: str, sets: dict[int, list[Path]]):
    """In how many pictures the context is seen, where there is something that sees it."""
    if not lab.config.context_judge:
        return None
    shares = [(context_kept(lab.config.context_judge, template, files), len(files)) for files in sets.values()]
    return wilson(sum(round(share["value"] * count) for share, count in shares), sum(count for _, count in shares))


if __name__ == "__main__":
    script(main)
