"""The same pictures by diffusers' own pipeline and by ours."""

import torch
from diffusers import StableDiffusionPipeline

from models.sampling import SamplingSettings, seeded_generators

SETTINGS = SamplingSettings(height=32, width=32, guidance_scale=3.0, num_inference_steps=6)
PROMPTS, SEEDS = ["a photo of a crane", "a crane"], [7, 8]


def as_pipeline(generator, scheduler) -> StableDiffusionPipeline:
    """Diffusers' pipeline of our generator's parts."""
    (encoder,) = generator.prompt_encoders
    return StableDiffusionPipeline(
        generator.vae,
        encoder.text_encoder,
        encoder.tokenizer,
        generator.unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def draw_by_pipeline(pipeline, settings=SETTINGS) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    more = {"guidance_rescale": settings.guidance_rescale} if settings.guidance_rescale else {}
    return pipeline(
        PROMPTS,
        height=settings.height,
        width=settings.width,
        guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.num_inference_steps,
        generator=seeded_generators(SEEDS),
        output_type="pt",
        **more,
    ).images


@torch.no_grad()
def draw_by_ours(generator, settings=SETTINGS) -> torch.Tensor:
    return generator.decode(generator.sample(generator.encode(PROMPTS), SEEDS, settings))
