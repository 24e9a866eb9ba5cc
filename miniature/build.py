"""Train the miniature from scratch, then measure it.

Drawings, two classifiers, VAE, text encoder, UNet and CLIP.

    python -m miniature.build              # every stage; a finished one is skipped, a killed one
        resumes
    python -m miniature.build --stages quality
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m miniature.build    # two cores
        share each batch

Every step seeds its randomness by its own number and its worker's: a resumed build gives the same
weights.
"""

import argparse
import functools
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from miniature import world
from miniature.quality import draw_world, measure_quality, read_sampling
from miniature.workers import share_jobs
from models.zero_shot import TEMPLATES
from utils import ROOT, replace_file, require, write_text

CACHE, WEIGHTS = ROOT / "miniature/cache", ROOT / "miniature/weights"
ARCHITECTURE = yaml.safe_load((ROOT / "miniature/architecture.yml").read_text(encoding="utf-8"))
PROMPT_LENGTH = 32
DRAWINGS = 24_000  # to train on
# The evaluator is trained on drawings that nothing else has seen.
TRAINING_SEED, EVALUATOR_SEED, FRESH_SEED = 0, 1, 2
LABEL_MAPS = {
    "id2label": dict(enumerate(world.LABELS)),
    "label2id": {label: i for i, label in enumerate(world.LABELS)},
}


@functools.cache
def make_drawings(seed: int, count: int = DRAWINGS) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Draw pictures uint8 [N, 3, 64, 64], with class numbers [N] and captions."""

    def draw_sample(number: int) -> tuple[np.ndarray, int, str]:
        rng = random.Random(seed * 10_000_000 + number)
        index, context = world.sample_class(rng), world.sample_context(rng)
        return (
            np.asarray(world.draw(index, rng, context)),
            index,
            world.write_caption(index, rng, context),
        )

    pictures, labels, captions = zip(*share_jobs(range(count), draw_sample, "drawing"), strict=True)
    return (
        torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(labels),
        list(captions),
    )


def scale_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Scale uint8 in 0..255 to float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def train_modules(
    name: str,
    modules: torch.nn.ModuleDict,
    compute_loss,
    batch_size: int,
    steps: int,
    lr: float,
    weight_decay: float,
    ema: bool = False,
    cache: Path = CACHE,
):
    """Train on compute_loss(drawings, generator) of each worker's part of a batch.

    A checkpoint is written every 100 steps.
    """
    workers = PartialState(cpu=True)
    parameters = list(modules.parameters())
    matrices, muon, adamw = make_optimizers(modules, lr, weight_decay)
    average = EMAModel(parameters, decay=0.999 if ema else 0.0)
    stateful = {"modules": modules, "average": average, "muon": muon, "adamw": adamw}
    path, start = cache / f"{name}_{steps}_{lr}.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        for key, part in stateful.items():
            part.load_state_dict(saved[key])
    bar = tqdm(
        range(start, steps),
        name,
        steps,
        initial=start,
        mininterval=5,
        disable=not workers.is_main_process,
    )
    for step in bar:
        seed = step * workers.num_processes + workers.process_index
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(
            DRAWINGS, (batch_size // workers.num_processes,), generator=generator
        )
        loss = compute_loss(chosen, generator)
        modules.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in parameters]
        vector_to_parameters(reduce(parameters_to_vector(gradients), "mean"), gradients)
        clip_grad_norm_(parameters, 1.0)
        for weight, matrix in matrices.items():
            matrix.grad = weight.grad.view_as(matrix)
        for optimizer in (muon, adamw):
            # warmed up, then falling to zero
            optimizer.param_groups[0]["lr"] = lr * min(
                (step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps)
            )
            optimizer.step()
        average.step(parameters)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if workers.is_main_process and ((step + 1) % 100 == 0 or step + 1 == steps):
            with replace_file(path) as temporary:
                torch.save(
                    {key: part.state_dict() for key, part in stateful.items()} | {"step": step + 1},
                    temporary,
                )
    if ema:
        average.copy_to(parameters)


def make_optimizers(modules: torch.nn.Module, lr: float, weight_decay: float):
    """Make Muon for the matrices of layers and AdamW for the rest.

    Also returns {weight of a layer: its matrix in the same memory}.
    """
    require(
        hasattr(torch.optim, "Muon"),
        "training the miniature needs torch 2.9 or newer, for its optimiser Muon",
    )
    layers = [
        module
        for module in modules.modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    matrices = {
        layer.weight: torch.nn.Parameter(layer.weight.data.view(len(layer.weight), -1))
        for layer in layers
        if len(layer.weight) > 4
    }
    rest = [parameter for parameter in modules.parameters() if parameter not in matrices]
    # with Muon training takes a third of the steps
    muon = torch.optim.Muon(matrices.values(), lr, weight_decay, adjust_lr_fn="match_rms_adamw")
    return matrices, muon, torch.optim.AdamW(rest, lr, weight_decay=weight_decay)


def degrade_images(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add noise, and half the time blur.

    A classifier trained on both tolerates what a decoder does to a picture.
    """
    if torch.rand((), generator=generator) < 0.5:
        images = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + strength * torch.randn(images.shape, generator=generator)


def build_classifier(name: str, seed: int, drawings_seed: int, steps: int, model_class: type):
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**ARCHITECTURE[name], **LABEL_MAPS)).train()
    pictures, labels, _ = make_drawings(drawings_seed)

    def compute_loss(chosen, generator):
        logits = model(degrade_images(scale_pixels(pictures[chosen]), generator)).logits
        return F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)

    train_modules(
        name,
        torch.nn.ModuleDict({"model": model}),
        compute_loss,
        64,
        steps,
        lr=1e-3,
        weight_decay=0.05,
    )
    if PartialState().is_main_process:
        model.save_pretrained(WEIGHTS / name)  # in float32: transformers loads what is stored
        transformers.ViTImageProcessor(size=world.SIZE).save_pretrained(WEIGHTS / name)


def build_vae():
    torch.manual_seed(3)
    pictures, _, _ = make_drawings(TRAINING_SEED)
    vae = AutoencoderKL(**ARCHITECTURE["vae"])

    def compute_loss(chosen, generator):
        images = scale_pixels(pictures[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        divergence = posterior.kl().float().mean() / images[0].numel()
        areas = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8))
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + areas + 1e-3 * divergence

    def compute_decoder_loss(chosen, generator):
        images = scale_pixels(pictures[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.sample(generator)
            return F.l1_loss(vae.decode(latents).sample.float(), images)  # squares would blur

    train_modules(
        "vae",
        torch.nn.ModuleDict({"vae": vae}),
        compute_loss,
        16,
        steps=850,
        lr=4e-3,
        weight_decay=0.0,
    )
    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    train_modules(
        "decoder", decoder, compute_decoder_loss, 16, steps=600, lr=2e-3, weight_decay=0.0, ema=True
    )
    with torch.no_grad():
        latents = vae.encode(scale_pixels(pictures[:512])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    if PartialState().is_main_process:
        vae.half().save_pretrained(WEIGHTS / "generator" / "vae")


@torch.no_grad()
def encode_drawings(
    vae: AutoencoderKL, pictures: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode every drawing: mean and standard deviation [N, 4, 8, 8] of its latents."""
    vae.to(memory_format=torch.channels_last)  # with bfloat16 a quarter of the time

    @torch.autocast("cpu", torch.bfloat16)
    def encode_part(part):
        posterior = vae.encode(scale_pixels(part)).latent_dist
        return torch.stack([posterior.mean, posterior.std]).float()

    return torch.cat(share_jobs(pictures.split(64), encode_part, "encoding"), 1).unbind()


def build_tokenizer(captions: list[str]) -> transformers.CLIPTokenizer:
    """Build a byte-level BPE in CLIP's layout.

    The alphabet, the alphabet at a word's end, the merges, two special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = (
        alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    )
    vocabulary = {
        word: i
        for i, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))
    }
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH
    )


def build_generator():
    torch.manual_seed(4)
    pictures, _, captions = make_drawings(TRAINING_SEED)
    tokenizer, folder = build_tokenizer(captions), WEIGHTS / "generator"
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    means, stds = (vae.config.scaling_factor * part for part in encode_drawings(vae, pictures))
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **ARCHITECTURE["text_encoder"],
        )
    )
    unet = UNet2DConditionModel(sample_size=means.shape[-1], **ARCHITECTURE["unet"])
    scheduler = DDPMScheduler(**ARCHITECTURE["scheduler"])
    captions_and_empty = tokenizer(
        [*captions, ""], padding="max_length", return_tensors="pt"
    ).input_ids

    def compute_loss(chosen, generator):
        latents = means[chosen] + stds[chosen] * torch.randn(
            means[chosen].shape, generator=generator
        )
        timesteps = torch.randint(1000, chosen.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        chosen[
            torch.rand(chosen.shape, generator=generator) < 0.1
        ] = -1  # unconditional, for guidance
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, text_encoder(captions_and_empty[chosen])[0]).sample
        snr = compute_snr(scheduler, timesteps)
        return (
            (predicted - noise).square().mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr
        ).mean()  # min-SNR weighting

    trained = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    train_modules(
        "generator", trained, compute_loss, 64, steps=1700, lr=2e-3, weight_decay=0.01, ema=True
    )
    if PartialState().is_main_process:
        pipeline = StableDiffusionPipeline(
            AutoencoderKL.from_pretrained(folder / "vae").half(),
            text_encoder,
            tokenizer,
            unet.half(),
            PNDMScheduler(
                **ARCHITECTURE["scheduler"],
                skip_prk_steps=True,
                steps_offset=1,
                set_alpha_to_one=False,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
        name_weights_as_published(folder / "text_encoder/model.safetensors")
        # vocab.json, merges.txt: as SD 1.4 has them
        tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def name_weights_as_published(file: Path):
    """Rename a text encoder's weights as in SD 1.4's file.

    Every release of transformers reads these names.
    """
    weights = {
        f"text_model.{key.removeprefix('text_model.')}": tensor
        for key, tensor in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def build_clip():
    """Build CLIP from captions of the whole labels.

    All captions of a picture's class are right for it, as in UniCL (2022).
    """
    torch.manual_seed(5)
    pictures, labels, _ = make_drawings(TRAINING_SEED)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(WEIGHTS / "generator/tokenizer")
    folder = WEIGHTS / "clip"
    captions = tokenizer(
        [template.format(label) for label in world.LABELS for template in TEMPLATES],
        padding=True,
        return_tensors="pt",
    )
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": PROMPT_LENGTH,
        **special,
        **ARCHITECTURE["text_encoder"],
    }
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text,
            vision_config=ARCHITECTURE["classifier"],
            projection_dim=text["projection_dim"],
        )
    ).train()

    def compute_loss(chosen, generator):
        numbers = labels[chosen] * len(TEMPLATES) + torch.randint(
            len(TEMPLATES), chosen.shape, generator=generator
        )
        output = model(
            captions.input_ids[numbers],
            degrade_images(scale_pixels(pictures[chosen]), generator),
            captions.attention_mask[numbers],
        )
        is_right = (labels[chosen, None] == labels[chosen]).float()
        targets = is_right / is_right.sum(1, keepdim=True)
        return F.cross_entropy(output.logits_per_image, targets) + F.cross_entropy(
            output.logits_per_text, targets
        )

    train_modules(
        "clip",
        torch.nn.ModuleDict({"model": model}),
        compute_loss,
        128,
        steps=1400,
        lr=1e-3,
        weight_decay=0.05,
    )
    if PartialState().is_main_process:
        for part in (
            model.half(),
            tokenizer,
            transformers.CLIPImageProcessor(
                size={"height": world.SIZE, "width": world.SIZE},
                do_center_crop=False,
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
            ),
        ):
            part.save_pretrained(folder)
        write_text(folder / "labels.txt", "".join(f"{label}\n" for label in world.LABELS))


def build_quality():
    pictures, labels, _ = make_drawings(FRESH_SEED, 2_000)
    measure_quality(
        WEIGHTS, ROOT / "docs/miniature.png", pictures.float() / 255, labels, read_sampling()
    )


# And the file that a stage writes last, in WEIGHTS: a stage killed while saving is not finished.
STAGES = {
    "classifier": (
        functools.partial(
            build_classifier,
            "classifier",
            1,
            TRAINING_SEED,
            1400,
            transformers.ViTForImageClassification,
        ),
        "classifier/preprocessor_config.json",
    ),
    "evaluator": (
        functools.partial(
            build_classifier,
            "evaluator",
            2,
            EVALUATOR_SEED,
            600,
            transformers.ResNetForImageClassification,
        ),
        "evaluator/preprocessor_config.json",
    ),
    "vae": (build_vae, "generator/vae/diffusion_pytorch_model.safetensors"),
    "generator": (build_generator, "generator/tokenizer/merges.txt"),
    "clip": (build_clip, "clip/labels.txt"),
    "quality": (build_quality, None),
    "world": (draw_world, None),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="all by default; delete miniature/weights and miniature/cache to start over",
    )
    for stage in parser.parse_args().stages:
        PartialState(cpu=True).wait_for_everyone()
        build_stage, result = STAGES[stage]
        if result and (WEIGHTS / result).exists():
            print(f"{stage}: already built in {(WEIGHTS / result).parent}")
        else:
            build_stage()


if __name__ == "__main__":
    main()
