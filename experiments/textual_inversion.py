"""The baseline: textual inversion (Gal et al. 2023) from k real pictures a class, beside the class token.

    python -m experiments.textual_inversion
    python -m experiments.textual_inversion --config configs/imagenet.yml --real_images DIR --class_index 283

A vector of the same size at the same splice learns, by the ordinary denoising loss, to stand for the pictures: "A photo
of a S*", started from the class name's first word. Then both are asked for fresh seeds, plainly and in other contexts.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import class_token
from class_token import TOKEN_FILE, spliced
from classifiers import penultimate
from diffusion import encode_prompts
from evaluation import context_kept
from experiments.common import (
    Lab,
    open_lab,
    parser,
    pictures,
    publish,
    real_pictures_of,
    script,
    seconds_of,
    share_right,
    shown,
    tokens,
    updates_of,
    vector_of,
)
from metrics import prdc, wilson
from prompt_datasets import TEMPLATES, prompt_folder
from report import sheet
from utils import load_images, write_json

STEPS, A_STEP, LR = 120, 4, 5e-3  # steps, pictures of a class in each, AdamW's learning rate
CONTEXTS = ("A painting of a {}", "A photo of a {} in the snow")
NEAREST_K = 5


def learn(lab: Lab, real: dict[int, list[Path]], folder: Path, seed: int = 0) -> dict[int, torch.Tensor]:
    """{class: vector [D]} by the denoising loss on its pictures, all classes in the same batches; kept in `folder`."""
    files = {index: folder / str(index + 1) / TOKEN_FILE for index in real}
    if not all(file.exists() for file in files.values()):
        started = time.monotonic()
        for (index, file), vector in zip(files.items(), denoising(lab, real, seed), strict=True):
            class_token.save(file, lab.config.placeholder_token, vector, {"label": lab.labels[index], "steps": STEPS})
        share = (time.monotonic() - started) / len(real)
        write_json(folder / "seconds.json", {str(index + 1): share for index in real})
    return {index: vector_of(file.parent) for index, file in files.items()}


def denoising(lab: Lab, real: dict[int, list[Path]], seed: int) -> torch.Tensor:
    """The vectors [C, D] after STEPS of AdamW."""
    components, token_id = lab.generator()
    device, generator = components.device, torch.Generator().manual_seed(seed)
    means, stds = zip(*(encoded(lab, files) for files in real.values()), strict=True)
    vectors = torch.stack([first_word(lab, index) for index in real]).to(device).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], LR, weight_decay=lab.config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=components.unet.dtype == torch.float16)
    for _ in tqdm(range(STEPS), desc="textual inversion", unit="step"):
        rows = [torch.randint(len(each), (A_STEP,), generator=generator) for each in means]
        latents = torch.cat([mean[row] + std[row] * torch.randn(mean[row].shape, generator=generator)
                             for mean, std, row in zip(means, stds, rows, strict=True)])
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(components.scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        noisy = components.scheduler.add_noise(latents, noise, timesteps)
        templates = [TEMPLATES[i] for i in torch.randint(len(TEMPLATES), (len(latents),), generator=generator)]
        with spliced(components.text_encoder, token_id, vectors.repeat_interleave(A_STEP, 0)):
            embeds = encode_prompts(components, [each.format(lab.config.placeholder_token) for each in templates])
        predicted = components.unet(noisy.to(device, components.unet.dtype), timesteps.to(device),
                                    encoder_hidden_states=embeds).sample
        loss = F.mse_loss(predicted.float(), noise.to(device)) * len(real)  # each class as if it learned alone
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return vectors.detach()


@torch.no_grad()
def encoded(lab: Lab, files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [K, 4, h, w] of the latents of real pictures, cropped to the run's size."""
    vae = lab.generator()[0].vae
    images = [load_images([file])[0] for file in files]
    size = [lab.config.height, lab.config.width]
    images = torch.stack([TF.center_crop(TF.resize(image, min(size), antialias=True), size) for image in images])
    posterior = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist
    return tuple((vae.config.scaling_factor * part).float().cpu() for part in (posterior.mean, posterior.std))


def first_word(lab: Lab, index: int) -> torch.Tensor:
    """The embedding [D] of the first token of the class's name."""
    components, _ = lab.generator()
    word = components.tokenizer(lab.names[index], add_special_tokens=False).input_ids[0]
    return components.text_encoder.get_input_embeddings().weight[word].detach().float()


@torch.no_grad()
def features(lab: Lab, files: list[Path]) -> torch.Tensor:
    judge = lab.judge()
    return torch.cat([penultimate(judge, judge.preprocessing(load_images(files[i:i + 64]).to(lab.config.device))).cpu()
                      for i in range(0, len(files), 64)])


def diversity(lab: Lab, sets: dict[int, list[Path]], real: dict[int, list[Path]]) -> tuple[float, float]:
    """Mean coverage of each class's real pictures, and mean distance of two of its drawn ones, of the judge's features.

    Distances are in units of that between two real pictures of the class.
    """
    coverages, distances = [], []
    for index, files in sets.items():
        drawn, truth = features(lab, files), features(lab, real[index])
        coverages.append(prdc(truth, drawn, NEAREST_K).coverage)
        distances.append((torch.pdist(drawn).mean() / torch.pdist(truth).mean()).item())
    return sum(coverages) / len(coverages), sum(distances) / len(distances)


def main():
    arguments = parser(__doc__, "all")
    arguments.add_argument("--real_images", help="a folder of real pictures, as for run.py (the config's)")
    arguments.add_argument("--k", type=int, default=5, help="real pictures a class for textual inversion (5)")
    arguments.add_argument("--images", type=int, default=10, help="pictures a class, prompt and method (10)")
    options = arguments.parse_args()
    lab = open_lab(options, **({"real_images": options.real_images} if options.real_images else {}))
    real = real_pictures_of(lab, options.k + 100)
    folders = tokens(lab, "token")
    learn(lab, {index: files[:options.k] for index, files in real.items()}, inverted_in(lab, options.k))
    report(lab, folders, {index: files[options.k:] for index, files in real.items()}, options)


def inverted_in(lab: Lab, k: int) -> Path:
    return lab.work / f"textual_inversion/{k}"


def report(lab: Lab, folders: dict[int, Path], truth: dict[int, list[Path]], options):
    drawn_to_learn = sum(len(updates_of(folder)) for folder in folders.values()) * lab.config.epoch_size
    inverted = {index: inverted_in(lab, options.k) / str(index + 1) for index in folders}
    methods = {"no token": ({}, None, 0, 0, {}),
               "class token": (folders, None, 0, drawn_to_learn, seconds_of(lab.work / "token_seconds.json")),
               "textual inversion": (inverted, lab.config.placeholder_token, options.k, 0,
                                     seconds_of(inverted_in(lab, options.k) / "seconds.json"))}
    prompts = {"": TEMPLATES[0], **{f"prompts/{prompt_folder(template)}/": template for template in CONTEXTS}}
    rows, data, sheets = [], {}, {}
    for method, (learned, phrase, k, drawn, spent) in methods.items():
        called = {"no token": "without", "class token": "with"}.get(method, f"textual_inversion_{options.k}")
        vectors = {index: vector_of(learned[index]) if learned else None for index in lab.classes}
        seconds = sum(spent.get(str(index + 1), 0.0) for index in lab.classes) / len(lab.classes)
        sets = {template: {index: pictures(lab, index, f"{folder}{called}", vector, options.images, template, phrase)
                           for index, vector in vectors.items()} for folder, template in prompts.items()}
        right = {template: share_right(lab, each) for template, each in sets.items()}
        coverage, distance = diversity(lab, sets[TEMPLATES[0]], truth)
        kept = [keeps(lab, template, sets[template]) for template in CONTEXTS]
        sheets[method] = sets
        rows.append([method, shown(right[TEMPLATES[0]]), f"{coverage:.2f}", f"{distance:.2f}",
                     *(f"{shown(right[template])}, {f'{share.value:.2f}' if share else '-'}"
                       for template, share in zip(CONTEXTS, kept, strict=True)),
                     k, drawn // len(vectors), f"{seconds:.0f}"])
        data[method] = {"right": {template: share._asdict() for template, share in right.items()},
                        "coverage": coverage, "distance": distance, "seconds_a_class": seconds,
                        "context_kept": {template: share._asdict() for template, share in
                                         zip(CONTEXTS, kept, strict=True) if share}}
    some = lab.classes[::max(1, len(lab.classes) // 4)][:4]
    sheet([(f"{lab.labels[index]}: {method}", [file for template in sets for file in sets[template][index][:4]])
           for index in some for method, sets in sheets.items()], lab.out / "textual_inversion.png", cell=72,
          title=f"four seeds each: {TEMPLATES[0]}; {'; '.join(CONTEXTS)}")
    ours, theirs = data["class token"], data["textual inversion"]
    publish(lab, "textual_inversion", "The class token beside textual inversion",
            f"Right class in {rows[1][1]} with the class token, in {rows[2][1]} with textual inversion of {options.k} "
            f"pictures; coverage {ours['coverage']:.2f} and {theirs['coverage']:.2f}.",
            ["", "right class", "coverage", "distance of two pictures", *(f"{template}: right, context kept"
                                                                      for template in CONTEXTS),
             "real pictures a class", "pictures drawn to learn", "seconds a class"], rows,
            {"methods": data, "pictures": options.images, "k": options.k, "steps": STEPS},
            "Right [Wilson 95 % interval] and features by the evaluator; coverage of the class's real pictures; the "
            "mean distance of two pictures of a class in units of the real pictures' own.", "textual_inversion.png")


def keeps(lab: Lab, template: str, sets: dict[int, list[Path]]):
    """In how many pictures the context is seen, where there is something that sees it."""
    if not lab.config.context_judge:
        return None
    shares = [(context_kept(lab.config.context_judge, template, files), len(files)) for files in sets.values()]
    return wilson(sum(round(share["value"] * count) for share, count in shares), sum(count for _, count in shares))


if __name__ == "__main__":
    script(main)
