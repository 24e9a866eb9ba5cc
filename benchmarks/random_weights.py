"""Generators and ViT-L/16 built from their published configs with random weights: what they cost is the same."""

from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from models.placeholder import PromptEncoder
from models.stable_diffusion import StableDiffusion
from models.stable_diffusion_xl import StableDiffusionXL
from utils import ROOT

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
UNETS = {
    "sd14": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd_turbo": {"sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
                 "use_linear_projection": True},  # as Stable Diffusion 2.1 base
    "sdxl": {"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
             "use_linear_projection": True, "block_out_channels": (320, 640, 1280),
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
             "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}}
CLIP_L = (transformers.CLIPTextModel, 768, 12, 12)  # class, width, heads, layers
TEXT_ENCODERS = {"sd14": [CLIP_L], "sd_turbo": [(transformers.CLIPTextModel, 1024, 16, 23)],
                 "sdxl": [CLIP_L, (transformers.CLIPTextModelWithProjection, 1280, 20, 32)]}


def build_networks(family: str = "sd14"):
    """Text encoders, UNet and VAE of a family of UNETS and the classifier ViT-L/16, on the default device."""
    text_encoders = [cls(transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, num_hidden_layers=layers,
        projection_dim=width)) for cls, width, heads, layers in TEXT_ENCODERS[family]]
    unet = UNet2DConditionModel(**UNETS[family])
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                        sample_size=8 * unet.config.sample_size, down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, num_labels=1000))
    return text_encoders, unet, vae, classifier


def load_tokenizer():
    """The miniature's, for 77 tokens too."""
    return transformers.CLIPTokenizer.from_pretrained(ROOT / "miniature/weights/generator/tokenizer",
                                                      model_max_length=77)


def build_scheduler(family: str):
    if family == "sd14":
        return PNDMScheduler(**NOISE, skip_prk_steps=True)
    return EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing" if family == "sd_turbo" else "leading")


def build_meta_generator(family: str) -> tuple[StableDiffusion, torch.nn.Module]:
    """A generator and its classifier without weights or memory: whatever they compute has a shape and no values."""
    with torch.device("meta"):
        text_encoders, unet, vae, classifier = build_networks(family)
    encoders = tuple(PromptEncoder(load_tokenizer(), text_encoder) for text_encoder in text_encoders)
    parts = encoders, unet, vae, build_scheduler(family), "meta"
    generator = StableDiffusionXL(*parts, zero_negative=True) if family == "sdxl" else StableDiffusion(*parts)
    return generator, classifier.requires_grad_(False).eval()


def save_sd14(folder: Path) -> dict[str, str]:
    """Write generator and classifier as checkpoints; the settings that name them."""
    (text_encoder,), unet, vae, classifier = build_networks()
    StableDiffusionPipeline(vae, text_encoder, load_tokenizer(), unet, build_scheduler("sd14"), None, None,
                            requires_safety_checker=False).save_pretrained(folder / "generator")
    for part in (classifier, transformers.ViTImageProcessor()):
        part.save_pretrained(folder / "classifier")
    return {"model": str(folder / "generator"), "classifier": str(folder / "classifier")}
