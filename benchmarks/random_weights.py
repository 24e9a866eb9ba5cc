"""Generators and ViT-L/16 from their published configs, with random weights."""

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

NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
# as Stable Diffusion 2.1 base
UNETS = {
    "sd14": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd_turbo": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TINY = 16  # times narrower, to see that everything runs
CLIP_L = (transformers.CLIPTextModel, 768, 12, 12)  # class, width, heads, layers
TEXT_ENCODERS = {
    "sd14": [CLIP_L],
    "sd_turbo": [(transformers.CLIPTextModel, 1024, 16, 23)],
    "sdxl": [CLIP_L, (transformers.CLIPTextModelWithProjection, 1280, 20, 32)],
}


def build_networks(family: str = "sd14", narrowed: int = 1):
    """The networks of a family of UNETS and ViT-L/16, on the default device.

    Text encoders are `narrowed` times narrower than published; above 1 all is shallow, and the rest
    as small as can be.
    """
    settings, channels, vit = dict(UNETS[family]), (128, 256, 512, 512), (1024, 24, 1000)
    if narrowed > 1:
        blocks = len(settings.get("block_out_channels", channels))
        settings |= {
            "block_out_channels": (32,) * blocks,
            "attention_head_dim": 4,
            "layers_per_block": 1,
            "cross_attention_dim": settings["cross_attention_dim"] // narrowed,
            "sample_size": 8,
            "transformer_layers_per_block": 1,
            "norm_num_groups": 8,
        }
        if "addition_embed_type" in settings:
            settings |= {
                name: settings[name] // narrowed
                for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
            }
        channels, vit = (32,) * 4, (64, 1, 16)
    text_encoders = [
        cls(
            transformers.CLIPTextConfig(
                hidden_size=width // narrowed,
                intermediate_size=4 * width // narrowed,
                num_attention_heads=heads,
                num_hidden_layers=layers if narrowed == 1 else 2,
                projection_dim=width // narrowed,
            )
        )
        for cls, width, heads, layers in TEXT_ENCODERS[family]
    ]
    unet = UNet2DConditionModel(**settings)
    vae = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        sample_size=8 * unet.config.sample_size,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    width, layers, labels = vit
    classifier = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=16,
            num_hidden_layers=layers,
            num_labels=labels,
        )
    )
    return text_encoders, unet, vae, classifier


def load_tokenizer():
    """Load the miniature's tokenizer, for 77 tokens."""
    return transformers.CLIPTokenizer.from_pretrained(
        ROOT / "miniature/weights/generator/tokenizer", model_max_length=77
    )


def build_scheduler(family: str):
    if family == "sd14":
        return PNDMScheduler(**NOISE, skip_prk_steps=True)
    return EulerDiscreteScheduler(
        **NOISE, timestep_spacing="trailing" if family == "sd_turbo" else "leading"
    )


def build_generator(
    family: str, device: str = "meta", dtype: torch.dtype = torch.float32, narrowed: int = 1
) -> tuple[StableDiffusion, torch.nn.Module]:
    """Build a generator and its classifier, the latter in float32.

    On the meta device they have neither memory nor values.
    """
    with torch.device(device):
        text_encoders, unet, vae, classifier = build_networks(family, narrowed)
    encoders = tuple(
        PromptEncoder(load_tokenizer(), text_encoder.to(dtype)) for text_encoder in text_encoders
    )
    parts = encoders, unet.to(dtype), vae.to(dtype), build_scheduler(family), device
    if family == "sdxl":
        generator = StableDiffusionXL(*parts, zero_negative=True)
    else:
        generator = StableDiffusion(*parts)
    return generator, classifier.requires_grad_(False).eval()


def build_pipeline(
    device: str = "cpu", dtype: torch.dtype = torch.float32, narrowed: int = 1
) -> tuple[StableDiffusionPipeline, torch.nn.Module]:
    """Build a diffusers pipeline of Stable Diffusion 1.4's sizes, and a classifier in float32."""
    with torch.device(device):
        (text_encoder,), unet, vae, classifier = build_networks("sd14", narrowed)
    pipeline = StableDiffusionPipeline(
        vae,
        text_encoder,
        load_tokenizer(),
        unet,
        build_scheduler("sd14"),
        None,
        None,
        requires_safety_checker=False,
    )
    return pipeline.to(device, dtype), classifier.requires_grad_(False).eval()


def save_sd14(folder: Path) -> dict[str, str]:
    """Write generator and classifier as checkpoints; return the settings that name them."""
    pipeline, classifier = build_pipeline()
    pipeline.save_pretrained(folder / "generator")
    for part in (classifier, transformers.ViTImageProcessor()):
        part.save_pretrained(folder / "classifier")
    return {"model": str(folder / "generator"), "classifier": str(folder / "classifier")}
