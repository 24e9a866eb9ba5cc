"""Stable Diffusion 1.4 and ViT-L/16 built from their configs with random weights: what they cost is the same."""

from pathlib import Path

import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from utils import ROOT


def build_networks():
    """Text encoder, UNet and VAE of Stable Diffusion 1.4 and the classifier ViT-L/16, on the default device."""
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, num_labels=1000))
    return text_encoder, unet, vae, classifier


def save_sd14(folder: Path) -> dict[str, str]:
    """Write both as checkpoints; the settings that name them. The tokenizer is the miniature's, for 77 tokens too."""
    text_encoder, unet, vae, classifier = build_networks()
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              steps_offset=1)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(ROOT / "miniature/weights/generator/tokenizer",
                                                           model_max_length=77)
    StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(folder / "generator")
    for part in (classifier, transformers.ViTImageProcessor()):
        part.save_pretrained(folder / "classifier")
    return {"model": str(folder / "generator"), "classifier": str(folder / "classifier")}
