"""Train the miniature from scratch: drawings, two classifiers, VAE, text encoder and UNet, then measure it.

    python -m miniature.build              # everything; a stage that is done is skipped, a killed one resumes
    python -m miniature.build --stages quality
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m miniature.build    # a worker a core shares each batch

Every step draws its randomness from the seed, its own number and its worker's, so a resumed build is the
uninterrupted one.
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
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from miniature import world
from miniature.quality import measure
from miniature.workers import first_worker, shared, wait_for_the_first, worker
from utils import replacing

HERE = Path(__file__).parent
CACHE, WEIGHTS = HERE / "cache", HERE / "weights"
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                  "num_train_timesteps": 1000}
PROMPT_LENGTH = 32
GUIDING_SEED, EVALUATOR_SEED = 0, 1  # the evaluator is trained on other drawings than everything that guides


# ---------------------------------------------------------------- drawings

def _picture(seed):
    rng = random.Random(seed)
    index, context = world.sample_class(rng), world.sample_context(rng)
    return np.asarray(world.draw(index, rng, context)), index, world.caption(index, rng, context)


def drawings(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pictures uint8 [N, 3, 64, 64], class numbers [N] and captions; drawn once, then read from the cache."""
    path = CACHE / f"drawings_{seed}_{count}.npz"
    if first_worker() and not path.exists():
        CACHE.mkdir(exist_ok=True)
        with Pool(2) as pool:
            seeds = range(seed * 10_000_000, seed * 10_000_000 + count)
            drawn = list(tqdm(pool.imap(_picture, seeds, chunksize=64), total=count, desc="drawing"))
        pictures, labels, captions = zip(*drawn, strict=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, pictures=np.stack(pictures), labels=np.array(labels), captions=np.array(captions))
    wait_for_the_first()
    data = np.load(path)
    pictures = torch.from_numpy(data["pictures"]).permute(0, 3, 1, 2).contiguous()
    return pictures, torch.from_numpy(data["labels"]), data["captions"].tolist()


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


# ---------------------------------------------------------------- the one training loop

def fit(name: str, modules: torch.nn.ModuleDict, loss_at, steps: int, lr: float, weight_decay: float, ema=False):
    """Train `modules` on `loss_at(generator)` for `steps`: warm up, fall to nothing, a checkpoint every 100 steps.

    Several workers each take their share of the batch, with their own `generator`, and average their gradients.
    """
    rank, workers = worker()
    parameters = list(modules.parameters())
    matrices, optimizers = optimizers_for(modules, lr, weight_decay)
    schedules = [LambdaLR(optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps)))
                 for optimizer in optimizers]
    average = EMAModel(parameters, decay=0.999 if ema else 0.0)
    path, start = CACHE / f"{name}_{steps}_{lr}.pt", 0
    stateful = {"modules": modules, "average": average, "muon": optimizers[0], "adamw": optimizers[1],
                "muon_schedule": schedules[0], "adamw_schedule": schedules[1]}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved.pop("step")
        for key, state in saved.items():
            stateful[key].load_state_dict(state)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5, disable=not first_worker())
    for step in bar:
        torch.manual_seed(step * workers + rank)
        loss = loss_at(torch.Generator().manual_seed(step * workers + rank))
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
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if first_worker() and ((step + 1) % 100 == 0 or step + 1 == steps):
            state = {key: thing.state_dict() for key, thing in stateful.items()}
            with replacing(path) as temporary:
                torch.save({**state, "step": step + 1}, temporary)
    if ema:
        average.copy_to(parameters)


def optimizers_for(modules: torch.nn.Module, lr: float, weight_decay: float):
    """Muon for the weights of layers, kernels seen as matrices; AdamW for the rest. Muon needs a third of the steps.

    Returns the pairs (weight, its matrix, the same memory) and both optimizers.
    """
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    weights = [module.weight for module in modules.modules() if isinstance(module, layers) and len(module.weight) > 4]
    matrices = [(weight, torch.nn.Parameter(weight.data.view(len(weight), -1))) for weight in weights]
    chosen = {id(weight) for weight in weights}
    rest = [parameter for parameter in modules.parameters() if id(parameter) not in chosen]
    muon = torch.optim.Muon([matrix for _, matrix in matrices], lr, weight_decay, adjust_lr_fn="match_rms_adamw")
    return matrices, (muon, torch.optim.AdamW(rest, lr, weight_decay=weight_decay))


def batch_of(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """This worker's share of a batch of `size` out of `count` drawings."""
    return torch.randint(count, (size // worker()[1],), generator=generator)


# ---------------------------------------------------------------- stages

def build_classifier(name: str, model: torch.nn.Module, seed: int, steps: int):
    """A classifier that tolerates what a decoder does to a picture: trained on blurred and noisy drawings too."""
    pictures, labels, _ = drawings(seed, 24_000)

    def loss_at(generator):
        chosen = batch_of(len(pictures), 64, generator)
        images = scaled(pictures[chosen])
        if torch.rand((), generator=generator) < 0.5:
            images = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator)
        images = images + strength * torch.randn(images.shape, generator=generator)
        return F.cross_entropy(model(images).logits, labels[chosen], label_smoothing=0.05)

    model.train()
    fit(name, torch.nn.ModuleDict({"model": model}), loss_at, steps, lr=1e-3, weight_decay=0.05)
    if first_worker():
        model.half().save_pretrained(WEIGHTS / name)
        ViTImageProcessor(size={"height": world.SIZE, "width": world.SIZE}).save_pretrained(WEIGHTS / name)


def label_maps():
    return {"id2label": dict(enumerate(world.LABELS)), "label2id": {label: i for i, label in enumerate(world.LABELS)}}


def stage_classifier():
    torch.manual_seed(1)
    config = ViTConfig(image_size=world.SIZE, patch_size=8, hidden_size=96, num_hidden_layers=4,
                       num_attention_heads=4, intermediate_size=192, **label_maps())
    build_classifier("classifier", ViTForImageClassification(config), GUIDING_SEED, steps=1400)


def stage_evaluator():
    torch.manual_seed(2)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic",
                          **label_maps())
    build_classifier("evaluator", ResNetForImageClassification(config), EVALUATOR_SEED, steps=600)


def stage_vae():
    torch.manual_seed(3)
    pictures, _, _ = drawings(GUIDING_SEED, 24_000)
    levels = 4
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[16, 32, 64, 64], layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=world.SIZE)

    def loss_at(generator):
        images = scaled(pictures[batch_of(len(pictures), 16, generator)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        divergence = posterior.kl().float().mean() / images[0].numel()
        areas = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8))
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + areas + 1e-3 * divergence

    def sharper_at(generator):
        images = scaled(pictures[batch_of(len(pictures), 16, generator)])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.sample(generator)
            return F.l1_loss(vae.decode(latents).sample.float(), images)  # squares would blur

    fit("vae", torch.nn.ModuleDict({"vae": vae}), loss_at, steps=850, lr=4e-3, weight_decay=0.0)
    fit("decoder", torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}), sharper_at,
        steps=600, lr=2e-3, weight_decay=0.0, ema=True)
    with torch.no_grad():
        latents = vae.encode(scaled(pictures[:512])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    if first_worker():
        vae.half().save_pretrained(WEIGHTS / "generator" / "vae")


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [N, 4, 8, 8] of every drawing's latents."""
    vae.to(memory_format=torch.channels_last)  # with bfloat16 a quarter of the time
    bar = tqdm(total=len(pictures) // worker()[1], desc="encoding", disable=not first_worker())

    def encode(part):
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(scaled(part)).latent_dist
        bar.update(len(part))
        return torch.stack([posterior.mean, posterior.std]).float()

    return torch.cat(shared(pictures.split(64), encode), 1).unbind()


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's layout: the alphabet, the alphabet at a word's end, the merges, two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, end_of_word_suffix="</w>", initial_alphabet=alphabet,
                                  show_progress=False)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges),
             "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH)


def stage_generator():
    torch.manual_seed(4)
    pictures, _, captions = drawings(GUIDING_SEED, 24_000)
    tokenizer = build_tokenizer(captions)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "generator" / "vae", torch_dtype=torch.float32).eval()
    means, stds = (vae.config.scaling_factor * part for part in encoded(vae, pictures))
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, projection_dim=64))
    unet = UNet2DConditionModel(
        sample_size=means.shape[-1], block_out_channels=(48, 96), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=16)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    captions_and_empty = tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids

    def loss_at(generator):
        chosen = batch_of(len(pictures), 64, generator)
        latents = means[chosen] + stds[chosen] * torch.randn(means[chosen].shape, generator=generator)
        timesteps = torch.randint(1000, chosen.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        chosen[torch.rand(chosen.shape, generator=generator) < 0.1] = -1  # unconditional, for guidance
        prompt_embeds = text_encoder(captions_and_empty[chosen])[0]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample
        snr = compute_snr(scheduler, timesteps)
        return ((predicted - noise).square().mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr).mean()  # min-SNR weighting

    fit("generator", torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}), loss_at, steps=1700, lr=2e-3,
        weight_decay=0.01, ema=True)
    if first_worker():
        save_generator(tokenizer, text_encoder, unet)


def save_generator(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
    """A StableDiffusionPipeline's folder, in half precision; vocab.json and merges.txt too, as SD 1.4 has them."""
    folder = WEIGHTS / "generator"
    pipeline = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(folder / "vae"), text_encoder, tokenizer, unet,
        PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def stage_quality():
    pictures, labels, _ = drawings(2, 2_000)
    measure(WEIGHTS, HERE.parent / "docs" / "miniature.png", pictures.float() / 255, labels)


STAGES = {"classifier": stage_classifier, "evaluator": stage_evaluator, "vae": stage_vae,
          "generator": stage_generator, "quality": stage_quality}
RESULTS = {  # the file that a stage writes last: a stage killed while saving is not done
    "classifier": WEIGHTS / "classifier" / "preprocessor_config.json",
    "evaluator": WEIGHTS / "evaluator" / "preprocessor_config.json",
    "vae": WEIGHTS / "generator" / "vae" / "diffusion_pytorch_model.safetensors",
    "generator": WEIGHTS / "generator" / "tokenizer" / "merges.txt"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES),
                        help="stages to run, in this order (all); a stage whose result exists is skipped: delete "
                             "miniature/weights and miniature/cache to start afresh")
    stages = parser.parse_args().stages
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    for stage in stages:
        wait_for_the_first()
        if stage in RESULTS and RESULTS[stage].exists():
            print(f"{stage}: already built in {RESULTS[stage].parent}")
        else:
            STAGES[stage]()


if __name__ == "__main__":
    main()
