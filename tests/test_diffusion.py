"""The frozen generator against diffusers' own pipeline, and the gradient against a straightforward last step."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

import class_token
from diffusion import encode_prompts, generate_images, initial_latents, load_components, noise_sources, trajectory
from utils import UserError

PROMPTS = ["a photo of a crane", "a photo of a tiger cat", "a crane"]


def sample(components, prompts, seeds, steps=5, guidance_scale=7.0, timesteps=None):
    return generate_images(components, encode_prompts(components, prompts), seeds, 32, 32, guidance_scale, steps,
                           timesteps)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("guidance_scale", [7.0, 1.0])
def test_sampler_equals_diffusers_pipeline(components, scheduler, guidance_scale):
    components = components._replace(scheduler=scheduler.from_config(components.scheduler.config))
    pipeline = StableDiffusionPipeline(components.vae, components.text_encoder, components.tokenizer, components.unet,
                                       scheduler.from_config(components.scheduler.config), None, None,
                                       requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPTS, height=32, width=32, num_inference_steps=5, guidance_scale=guidance_scale,
                      generator=noise_sources([1, 2, 3]), output_type="pt").images
    with torch.no_grad():
        ours = sample(components, PROMPTS, [1, 2, 3], guidance_scale=guidance_scale)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("timesteps", [None, [999, 800, 600]])
def test_batches_change_nothing_but_rounding(components, timesteps):
    with torch.no_grad():
        together = sample(components, PROMPTS, [5, 6, 7], timesteps=timesteps)
        alone = torch.cat([sample(components, [p], [s], timesteps=timesteps) for p, s in zip(PROMPTS, [5, 6, 7],
                                                                                             strict=True)])
    assert (together - alone).abs().max() < 1e-5


def count_calls(unet):
    calls = []
    unet.register_forward_hook(lambda module, args, output: calls.append(output.sample.requires_grad))
    return calls


@pytest.mark.parametrize("timesteps, total", [(None, 7), ([999, 800, 600], 4)])
def test_one_unet_call_builds_a_graph(components, timesteps, total):
    """PNDM has 6 timesteps for 5 steps; the final one makes two calls, of which the conditional has a graph."""
    token_id = class_token.add_placeholder(components.tokenizer, "newclas")
    vector = torch.randn(32, requires_grad=True)
    calls = count_calls(components.unet)
    with class_token.spliced(components.text_encoder, token_id, vector):
        sample(components, ["a newclas crane"], [0], timesteps=timesteps)
    assert calls == [False] * (total - 1) + [True]


@pytest.mark.parametrize("timesteps", [None, [999, 800, 600]])
def test_gradient_equals_a_straightforward_last_step(components, timesteps):
    token_id = class_token.add_placeholder(components.tokenizer, "newclas")
    start = torch.randn(32)

    def gradient(images_of):
        vector = start.clone().requires_grad_()
        with class_token.spliced(components.text_encoder, token_id, vector):
            images = images_of()
        weights = torch.linspace(-1, 1, images.numel()).view_as(images)
        return torch.autograd.grad((images * weights).sum(), vector)[0]

    def straightforward():
        """The last step by hand: both halves in one UNet call, the unconditional prompt and z_t detached."""
        generators = noise_sources([3])
        scheduler = trajectory(components, 5, timesteps)
        latents = initial_latents(components, generators, 32, 32) * scheduler.init_noise_sigma
        embeds = torch.cat([encode_prompts(components, [""]).detach(), encode_prompts(components, ["a newclas crane"])])
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(torch.cat([latents.detach()] * 2), t)
            unconditional, conditional = components.unet(model_input, t, embeds).sample.chunk(2)
            noise_pred = unconditional.detach() + 7.0 * (conditional - unconditional.detach())
            if t != scheduler.timesteps[-1]:
                noise_pred = noise_pred.detach()
            latents = scheduler.step(noise_pred, t, latents.detach()).prev_sample
        images = components.vae.decode(latents / components.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    ours = gradient(lambda: sample(components, ["a newclas crane"], [3], timesteps=timesteps))
    reference = gradient(straightforward)
    assert reference.norm() > 0
    assert (ours - reference).norm() / reference.norm() < 1e-5


def test_gradient_checkpointing_changes_nothing(tiny_model):
    gradients, decoded = [], []
    for checkpointing in (False, True):
        components = load_components(tiny_model, "cpu", torch.float32, checkpointing)
        calls = []
        components.vae.decoder.mid_block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        token_id = class_token.add_placeholder(components.tokenizer, "newclas")
        vector = torch.ones(32, requires_grad=True)
        with class_token.spliced(components.text_encoder, token_id, vector):
            sample(components, ["a newclas crane"], [0]).sum().backward()
        gradients.append(vector.grad)
        decoded.append(len(calls))
    assert decoded == [1, 2]  # forward, and once more on the way back
    assert torch.allclose(*gradients, rtol=1e-5)


def test_pictures_refuse_sizes_and_timesteps_that_cannot_be(components):
    with pytest.raises(UserError, match="divisible by 8"):
        initial_latents(components, noise_sources([0]), 30, 32)
    with pytest.raises(UserError, match="from 999 to 0"):
        trajectory(components, 5, [1200, 600])


def test_explicit_timesteps_end_in_a_jump_whatever_the_checkpoint_says(components):
    """A checkpoint made for Karras sigmas trains on explicit timesteps too, and the last step lands on z_0."""
    karras = DDIMScheduler.from_config(components.scheduler.config)
    karras.register_to_config(use_karras_sigmas=True, final_sigmas_type="sigma_min")
    scheduler = trajectory(components._replace(scheduler=karras), 5, [999, 800, 600])
    assert scheduler.timesteps.tolist() == [999, 800, 600] and scheduler.sigmas[-1] == 0
