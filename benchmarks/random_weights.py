"""Stable Diffusion 1.4 and ViT-L/16 built from their configs with random weights: what they cost is the same."""

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torchvision.transforms import InterpolationMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ViTConfig, ViTForImageClassification

from classifiers import Classifier, Preprocessing
from diffusion import Components
from utils import ROOT


def networks():
    """Text encoder, UNet and VAE of Stable Diffusion 1.4 and the classifier ViT-L/16, on the default device."""
    text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    classifier = ViTForImageClassification(ViTConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, num_labels=1000))
    return text_encoder, unet, vae, classifier


def sd14(device: str, dtype: torch.dtype) -> tuple[Components, Classifier]:
    """The generator and its guide; the tokenizer is the miniature's, with as many tokens to a prompt."""
    torch.manual_seed(0)
    with torch.device(device):
        text_encoder, unet, vae, vit = networks()
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "miniature/weights/generator/tokenizer", model_max_length=77)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              steps_offset=1)
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval().to(device, dtype)
        if device.startswith("cuda"):
            module.to(memory_format=torch.channels_last)
    preprocessing = Preprocessing((224, 224), None, InterpolationMode.BILINEAR, [0.5] * 3, [0.5] * 3)
    classifier = Classifier("vit-large-patch16-224", [f"class {i + 1}" for i in range(1000)],
                            vit.requires_grad_(False).eval(), preprocessing,
                            lambda model, pixels: model(pixel_values=pixels).logits)
    return Components(tokenizer, text_encoder, unet, vae, scheduler), classifier
