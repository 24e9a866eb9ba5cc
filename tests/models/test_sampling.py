"""The sampler against diffusers' own pipeline, and its gradient against autograd through the same
last steps.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler

from models.generator import load_generator
from models.sampling import SamplingSettings, new_scheduler, seeded_generators
from tests.models.pipelines import as_pipeline
from utils import UserError

PROMPTS = ["a photo of a crane", "a photo of a tiger cat", "a crane"]
PAPER = SamplingSettings(height=32, width=32, guidance_scale=7.0, num_inference_steps=5)
SHORT = PAPER._replace(timesteps=(999, 800, 600))


def draw_images(generator, prompts, seeds, settings, vectors=None, **options):
    cond = generator.encode(prompts, vectors)
    return generator.decode(generator.sample(cond, seeds, settings, **options))


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler]
)
@pytest.mark.parametrize("guidance_scale", [7.0, 1.0])
def test_sampler_equals_diffusers_pipeline(generator, scheduler, guidance_scale):
    generator.scheduler = scheduler.from_config(generator.scheduler.config)
    pipeline = as_pipeline(generator, scheduler.from_config(generator.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        height=32,
        width=32,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        generator=seeded_generators([1, 2, 3]),
        output_type="pt",
    ).images
    with torch.no_grad():
        ours = draw_images(
            generator, PROMPTS, [1, 2, 3], PAPER._replace(guidance_scale=guidance_scale)
        )
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("settings", [PAPER, SHORT])
def test_batches_change_nothing_but_rounding(generator, settings):
    with torch.no_grad():
        together = draw_images(generator, PROMPTS, [5, 6, 7], settings)
        alone = torch.cat(
            [
                draw_images(generator, [prompt], [seed], settings)
                for prompt, seed in zip(PROMPTS, [5, 6, 7], strict=True)
            ]
        )
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("settings, total", [(PAPER, 7), (SHORT, 4)])
def test_one_unet_call_builds_a_graph(generator, settings, total):
    """PNDM has 6 timesteps for 5 steps; the final one makes two calls, of which the conditional has
    a graph.
    """
    generator.set_placeholder("newclas")
    calls = []
    generator.unet.register_forward_hook(
        lambda module, inputs, output: calls.append(output.sample.requires_grad)
    )
    draw_images(
        generator, ["a newclas crane"], [0], settings, torch.randn(1, 1, 32, requires_grad=True)
    )
    assert calls == [False] * (total - 1) + [True]


def draw_by_hand(generator, cond, seeds, settings, grad_steps):
    """Both halves in one UNet call; the unconditional prompt and every step before the last
    `grad_steps` detached.
    """
    scheduler = new_scheduler(generator.scheduler, settings)
    latents = (
        generator.initial_noise(seeded_generators(seeds), settings) * scheduler.init_noise_sigma
    )
    embeds = torch.cat([generator.encode([""] * len(cond)).detach(), cond])
    for t in scheduler.timesteps:
        unconditional, conditional = generator.unet(
            scheduler.scale_model_input(torch.cat([latents] * 2), t),
            t,
            encoder_hidden_states=embeds,
        ).sample.chunk(2)
        noise = unconditional + settings.guidance_scale * (conditional - unconditional)
        if t not in scheduler.timesteps[-grad_steps:]:
            noise = noise.detach()
        latents = scheduler.step(noise, t, latents).prev_sample
    images = generator.vae.decode(latents / generator.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("settings", [PAPER, SHORT])
@pytest.mark.parametrize("grad_steps, batch_size", [(1, None), (1, 1), (2, None), (2, 1)])
def test_gradient_equals_autograd_through_the_last_steps(
    generator, settings, grad_steps, batch_size
):
    generator.set_placeholder("newclas")
    vectors = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cond, seeds = generator.encode(["a newclas crane", "a photo of a newclas cat"], vectors), [3, 4]
    ours = generator.decode(
        generator.sample(
            cond, seeds, settings._replace(grad_steps=grad_steps), batch_size=batch_size
        )
    )
    reference = draw_by_hand(generator, cond, seeds, settings, grad_steps)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    found, expected = (
        torch.autograd.grad((images * weights).sum(), vectors, retain_graph=True)[0]
        for images in (ours, reference)
    )
    assert (ours - reference).abs().max() < 1e-5
    assert expected.norm() > 0 and (found - expected).norm() / expected.norm() < 1e-5


def test_more_steps_with_a_graph_change_the_gradient_alone(generator):
    generator.set_placeholder("newclas")
    vectors = torch.ones(1, 1, 32, requires_grad=True)
    images = [
        draw_images(generator, ["a newclas crane"], [0], PAPER._replace(grad_steps=steps), vectors)
        for steps in (1, 2)
    ]
    one, two = (torch.autograd.grad(drawn[0, 0, :8].sum(), vectors)[0] for drawn in images)
    assert (images[0] - images[1]).abs().max() < 1e-5 and (one - two).norm() / one.norm() > 1e-2


@pytest.mark.parametrize("settings, first", [(PAPER, 801), (SHORT, 999)])
def test_trajectory_from_given_latents_starts_at_their_noised_version(generator, settings, first):
    """What the UNet reads first is z_0 noised to the first timestep as in DDPM."""
    start = torch.randn(2, 4, 4, 4)
    noise = generator.initial_noise(seeded_generators([1, 2]), settings)
    expected = DDPMScheduler.from_config(generator.scheduler.config).add_noise(
        start, noise, torch.tensor([first] * 2)
    )
    inputs = []
    generator.unet.register_forward_pre_hook(lambda module, positional: inputs.append(positional))
    generator.sample(generator.encode(PROMPTS[:2]), [1, 2], settings, start=start)
    latents, t = inputs[0][:2]
    assert t == first and (latents.chunk(2)[0] - expected).abs().max() < 1e-4


def test_gradient_checkpointing_changes_nothing(tiny_model):
    gradients, decoded = [], []
    for checkpointing in (False, True):
        generator = load_generator(
            tiny_model, "cpu", torch.float32, gradient_checkpointing=checkpointing
        )
        generator.set_placeholder("newclas")
        calls = []
        generator.vae.decoder.mid_block.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        vectors = torch.ones(1, 1, 32, requires_grad=True)
        draw_images(generator, ["a newclas crane"], [0], PAPER, vectors).sum().backward()
        gradients.append(vectors.grad)
        decoded.append(len(calls))
    assert decoded == [1, 2]  # forward, and once more in the backward pass
    assert torch.allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"height": 30}, "divisible by 8"),
        ({"timesteps": (1200, 600)}, "train_timesteps .*1200.* 999"),
        (
            {"num_inference_steps": 1001},
            "DDIMScheduler fails at 1001 steps: .* cannot be larger than",
        ),
    ],
)
def test_impossible_settings_are_one_line(generator, changes, reason):
    generator.scheduler = DDIMScheduler.from_config(generator.scheduler.config)
    with pytest.raises(UserError, match=reason):
        generator.check_sampling(PAPER._replace(**changes))


def test_explicit_timesteps_end_in_a_jump_whatever_the_checkpoint_says(generator):
    """A checkpoint made for Karras sigmas trains on explicit timesteps too, and the last step lands
    on z_0.
    """
    karras = DDIMScheduler.from_config(generator.scheduler.config)
    karras.register_to_config(use_karras_sigmas=True, final_sigmas_type="sigma_min")
    scheduler = new_scheduler(karras, SHORT)
    assert scheduler.timesteps.tolist() == [999, 800, 600] and scheduler.sigmas[-1] == 0
