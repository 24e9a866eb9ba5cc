"""The same pictures by diffusers' own pipeline and by ours."""

import torch
from diffusers import StableDiffusionPipeline

from models.sampling import SamplingSettings, seeded_generators

SETTINGS = SamplingSettings(height=32, width=32, guidance_scale=3.0, num_inference_steps=6)
PROMPTS, SEEDS = ["a photo of a crane", "a crane"], [7, 8]


def draw_by_pipeline(generator, scheduler, settings=SETTINGS) -> torch.Tensor:
    pipeline = StableDiffusionPipeline(generator.vae, generator.text_encoder, generator.tokenizer, generator.unet,
                                       scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, height=32, width=32, num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale, generator=seeded_generators(SEEDS),
                    output_type="pt").images


@torch.no_grad()
def draw_by_ours(generator, settings=SETTINGS) -> torch.Tensor:
    return generator.decode(generator.sample(generator.encode(PROMPTS), SEEDS, settings))
