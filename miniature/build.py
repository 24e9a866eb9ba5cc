"""Train the miniature from scratch: drawings, two classifiers, VAE, text encoder and UNet, then measure it.

    python -m miniature.build              # every stage; a finished one is skipped, a killed one resumes
    python -m miniature.build --stages quality
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m miniature.build    # two cores share each batch

Every step seeds its randomness by its own number and its worker's: a resumed build gives the same weights.
"""

import argparse
import json
import os
import random
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from miniature import world
from miniature.quality import draw_world, measure_quality, read_sampling
from miniature.workers import get_worker, is_first_worker, share_jobs, wait_for_workers
from utils import ROOT, replace_file

CACHE, WEIGHTS = ROOT / "miniature/cache", ROOT / "miniature/weights"
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPT_LENGTH = 32
GUIDING_SEED, EVALUATOR_SEED = 0, 1  # the evaluator is trained on other drawings than everything that guides
LABEL_MAPS = {"id2label": dict(enumerate(world.LABELS)), "label2id": {label: i for i, label in enumerate(world.LABELS)}}


def _draw_sample(seed):
    rng = random.Random(seed)
    index, context = world.sample_class(rng), world.sample_context(rng)
    return np.asarray(world.draw(index, rng, context)), index, world.write_caption(index, rng, context)


def load_drawings(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pictures uint8 [N, 3, 64, 64], class numbers [N] and captions; drawn once, then read from the cache."""
    path = CACHE / f"drawings_{seed}_{count}.npz"
    if is_first_worker() and not path.exists():
        seeds = range(seed * 10_000_000, seed * 10_000_000 + count)
        with Pool(2) as pool:
            drawn = list(tqdm(pool.imap(_draw_sample, seeds, chunksize=64), total=count, desc="drawing"))
        pictures, labels, captions = map(np.array, zip(*drawn, strict=True))
        with replace_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, pictures=pictures, labels=labels, captions=captions)
    wait_for_workers()
    pictures, labels, captions = (np.load(path)[key] for key in ("pictures", "labels", "captions"))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), captions.tolist()


def scale_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def sample_batch(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """This worker's share of a batch of `size` out of `count` drawings."""
    return torch.randint(count, (size // get_worker()[1],), generator=generator)


def train_modules(name: str, modules: torch.nn.ModuleDict, compute_loss, steps: int, lr: float, weight_decay: float,
                  ema: bool = False, cache: Path = CACHE):
    """Train `modules` on `compute_loss(generator)`: lr warms up and falls to zero, a checkpoint every 100 steps.

    Each worker computes the loss of its share of the batch, with its own `generator`; gradients are averaged.
    """
    rank, workers = get_worker()
    parameters = list(modules.parameters())
    matrices, optimizers = make_optimizers(modules, lr, weight_decay)
    schedules = [LambdaLR(optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps)))
                 for optimizer in optimizers]
    average = EMAModel(parameters, decay=0.999 if ema else 0.0)
    path, start = cache / f"{name}_{steps}_{lr}.pt", 0
    stateful = dict(zip(("modules", "average", "muon", "adamw", "muon_schedule", "adamw_schedule"),
                        (modules, average, *optimizers, *schedules), strict=True))
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved.pop("step")
        for key, state in saved.items():
            stateful[key].load_state_dict(state)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5, disable=not is_first_worker())
    for step in bar:
        torch.manual_seed(step * workers + rank)
        loss = compute_loss(torch.Generator().manual_seed(step * workers + rank))
        modules.zero_grad()
        loss.backward()
        if workers > 1:
            gradient = parameters_to_vector([parameter.grad for parameter in parameters]) / workers
            dist.all_reduce(gradient)
            vector_to_parameters(gradient, [parameter.grad for parameter in parameters])
        clip_grad_norm_(parameters, 1.0)
        for weight, matrix in matrices:
            matrix.grad = weight.grad.view_as(matrix)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        average.step(parameters)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if is_first_worker() and ((step + 1) % 100 == 0 or step + 1 == steps):
            with replace_file(path) as temporary:
                torch.save({key: part.state_dict() for key, part in stateful.items()} | {"step": step + 1}, temporary)
    if ema:
        average.copy_to(parameters)


def make_optimizers(modules: torch.nn.Module, lr: float, weight_decay: float):
    """Pairs (weight of a layer, its matrix in the same memory); Muon for the matrices and AdamW for the rest."""
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    weights = [module.weight for module in modules.modules() if isinstance(module, layers) and len(module.weight) > 4]
    matrices = [(weight, torch.nn.Parameter(weight.data.view(len(weight), -1))) for weight in weights]
    rest = [parameter for parameter in modules.parameters() if not any(parameter is weight for weight in weights)]
    # with Muon training takes a third of the steps
    muon = torch.optim.Muon([matrix for _, matrix in matrices], lr, weight_decay, adjust_lr_fn="match_rms_adamw")
    return matrices, (muon, torch.optim.AdamW(rest, lr, weight_decay=weight_decay))


def train_classifier(name: str, model: torch.nn.Module, seed: int, steps: int):
    """Train on blurred and noisy drawings too, so that the classifier tolerates what a decoder does to a picture."""
    pictures, labels, _ = load_drawings(seed, 24_000)

    def compute_loss(generator):
        chosen = sample_batch(len(pictures), 64, generator)
        images = scale_pixels(pictures[chosen])
        if torch.rand((), generator=generator) < 0.5:
            images = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator)
        images = images + strength * torch.randn(images.shape, generator=generator)
        return F.cross_entropy(model(images).logits, labels[chosen], label_smoothing=0.05)

    model.train()
    train_modules(name, torch.nn.ModuleDict({"model": model}), compute_loss, steps, lr=1e-3, weight_decay=0.05)
    if is_first_worker():
        model.half().save_pretrained(WEIGHTS / name)
        transformers.ViTImageProcessor(size=world.SIZE).save_pretrained(WEIGHTS / name)


def build_classifier():
    torch.manual_seed(1)
    config = transformers.ViTConfig(image_size=world.SIZE, patch_size=8, hidden_size=96, num_hidden_layers=4,
                                    num_attention_heads=4, intermediate_size=192, **LABEL_MAPS)
    train_classifier("classifier", transformers.ViTForImageClassification(config), GUIDING_SEED, steps=1400)


def build_evaluator():
    torch.manual_seed(2)
    config = transformers.ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1],
                                       layer_type="basic", **LABEL_MAPS)
    train_classifier("evaluator", transformers.ResNetForImageClassification(config), EVALUATOR_SEED, steps=600)


def build_vae():
    torch.manual_seed(3)
    pictures, _, _ = load_drawings(GUIDING_SEED, 24_000)
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        block_out_channels=[16, 32, 64, 64], layers_per_block=1, latent_channels=4, norm_num_groups=4,
                        sample_size=world.SIZE)

    def compute_loss(generator):
        images = scale_pixels(pictures[sample_batch(len(pictures), 16, generator)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        divergence = posterior.kl().float().mean() / images[0].numel()
        areas = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8))
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + areas + 1e-3 * divergence

    def compute_decoder_loss(generator):
        images = scale_pixels(pictures[sample_batch(len(pictures), 16, generator)])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.sample(generator)
            return F.l1_loss(vae.decode(latents).sample.float(), images)  # squares would blur

    train_modules("vae", torch.nn.ModuleDict({"vae": vae}), compute_loss, steps=850, lr=4e-3, weight_decay=0.0)
    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    train_modules("decoder", decoder, compute_decoder_loss, steps=600, lr=2e-3, weight_decay=0.0, ema=True)
    with torch.no_grad():
        latents = vae.encode(scale_pixels(pictures[:512])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    if is_first_worker():
        vae.half().save_pretrained(WEIGHTS / "generator" / "vae")


@torch.no_grad()
def encode_drawings(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [N, 4, 8, 8] of every drawing's latents."""
    vae.to(memory_format=torch.channels_last)  # with bfloat16 a quarter of the time

    def encode_part(part):
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(scale_pixels(part)).latent_dist
        return torch.stack([posterior.mean, posterior.std]).float()

    return torch.cat(share_jobs(pictures.split(64), encode_part, "encoding"), 1).unbind()


def build_tokenizer(captions: list[str]) -> transformers.CLIPTokenizer:
    """A byte-level BPE in CLIP's layout: the alphabet, the alphabet at a word's end, the merges, two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, end_of_word_suffix="</w>", initial_alphabet=alphabet,
                                  show_progress=False)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH)


def build_generator():
    torch.manual_seed(4)
    pictures, _, captions = load_drawings(GUIDING_SEED, 24_000)
    tokenizer, folder = build_tokenizer(captions), WEIGHTS / "generator"
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    means, stds = (vae.config.scaling_factor * part for part in encode_drawings(vae, pictures))
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, projection_dim=64))
    unet = UNet2DConditionModel(
        sample_size=means.shape[-1], block_out_channels=(48, 96), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=16)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    captions_and_empty = tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids

    def compute_loss(generator):
        chosen = sample_batch(len(pictures), 64, generator)
        latents = means[chosen] + stds[chosen] * torch.randn(means[chosen].shape, generator=generator)
        timesteps = torch.randint(1000, chosen.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        chosen[torch.rand(chosen.shape, generator=generator) < 0.1] = -1  # unconditional, for guidance
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, text_encoder(captions_and_empty[chosen])[0]).sample
        snr = compute_snr(scheduler, timesteps)
        return ((predicted - noise).square().mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr).mean()  # min-SNR weighting

    trained = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    train_modules("generator", trained, compute_loss, steps=1700, lr=2e-3, weight_decay=0.01, ema=True)
    if is_first_worker():
        pipeline = StableDiffusionPipeline(
            AutoencoderKL.from_pretrained(folder / "vae"), text_encoder, tokenizer, unet,
            PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipeline.to(dtype=torch.float16).save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json, merges.txt: as SD 1.4 has them


def build_quality():
    pictures, labels, _ = load_drawings(2, 2_000)
    measure_quality(WEIGHTS, ROOT / "docs/miniature.png", pictures.float() / 255, labels, read_sampling())


STAGES = {  # and the file that a stage writes last, in WEIGHTS: a stage killed while saving is not finished
    "classifier": (build_classifier, "classifier/preprocessor_config.json"),
    "evaluator": (build_evaluator, "evaluator/preprocessor_config.json"),
    "vae": (build_vae, "generator/vae/diffusion_pytorch_model.safetensors"),
    "generator": (build_generator, "generator/tokenizer/merges.txt"),
    "quality": (build_quality, None), "world": (draw_world, None)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES),
                        help="all by default; delete miniature/weights and miniature/cache to start over")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    for stage in parser.parse_args().stages:
        wait_for_workers()
        build_stage, result = STAGES[stage]
        if result and (WEIGHTS / result).exists():
            print(f"{stage}: already built in {(WEIGHTS / result).parent}")
        else:
            build_stage()


if __name__ == "__main__":
    main()
