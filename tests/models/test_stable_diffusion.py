"""SD 1.4: its layout on a tiny checkpoint, its real sizes on the meta device, and what is said when
it is not there.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from safetensors.torch import load_file

from benchmarks.random_weights import build_networks
from models.denoising import compute_denoising_loss, encode_images
from models.generator import load_generator
from utils import UserError


def test_layout_loads_without_safety_checker_and_feature_extractor(generator):
    assert type(generator.scheduler).__name__ == "PNDMScheduler"
    assert generator.networks == (
        generator.prompt_encoders[0].text_encoder,
        generator.unet,
        generator.vae,
    )
    for network in generator.networks:
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_old_key_names_are_read(tiny_model, generator):
    """SD 1.4's text encoder is stored as text_model.*, its VAE's attention as query, key, value,
    proj_attn; every weight must arrive.
    """
    for part, file, network in (
        ("text_encoder", "model", generator.prompt_encoders[0].text_encoder),
        ("vae", "diffusion_pytorch_model", generator.vae),
    ):
        stored = load_file(Path(tiny_model, part, f"{file}.safetensors"))
        stored.pop("text_model.embeddings.position_ids", None)
        loaded = network.state_dict()
        assert len(stored) == len([key for key in loaded if "position_ids" not in key])
        for key, value in stored.items():
            for old, new in (
                ("query", "to_q"),
                ("key", "to_k"),
                ("value", "to_v"),
                ("proj_attn", "to_out.0"),
            ):
                key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            assert torch.equal(loaded.get(key, loaded.get(key.removeprefix("text_model."))), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stored", ["fp32", "fp16"])
def test_either_variant_serves_either_precision(tiny_model, tmp_path, dtype, stored):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    for file in folder.glob("*/*.safetensors"):
        if (".fp16." in file.name) != (stored == "fp16"):
            file.unlink()
    assert load_generator(str(folder), "cpu", dtype).dtype == dtype


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_missing_part_is_one_line(tiny_model, tmp_path, part):
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(UserError, match="the folder lacks a file|the tokenizer's files"):
        load_generator(str(tmp_path / "model"), "cpu", torch.float32)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            {"_class_name": "FluxPipeline"},
            "is for FluxPipeline; .* are for StableDiffusionPipeline",
        ),
        ({"scheduler": ["diffusers", "NoScheduler"]}, "names the scheduler 'NoScheduler'"),
        ({"scheduler": ["diffusers", "AutoencoderKL"]}, "names the scheduler 'AutoencoderKL'"),
    ],
)
def test_foreign_pipeline_is_one_line(tiny_model, tmp_path, changes, reason):
    shutil.copytree(tiny_model, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    with pytest.raises(UserError, match=reason):
        load_generator(str(tmp_path / "model"), "cpu", torch.float32)


def test_encoded_images_equal_the_latents_of_diffusers(tiny_model, generator):
    vae, images = (
        AutoencoderKL.from_pretrained(tiny_model, subfolder="vae"),
        torch.rand(2, 3, 32, 32),
    )
    with torch.no_grad():
        posterior = vae.encode(images * 2 - 1).latent_dist
    mean, deviation = encode_images(generator, images)
    assert (mean - 0.18215 * posterior.mean).abs().max() < 1e-5
    assert (deviation - 0.18215 * posterior.std).abs().max() < 1e-5


def test_denoising_loss_equals_one_by_hand(tiny_model, generator):
    latents, cond = torch.randn(2, 4, 4, 4), generator.encode(["a crane", "a cat"])
    found = compute_denoising_loss(generator, latents, cond, torch.Generator().manual_seed(5))
    source = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 4, 4, 4, generator=source)
    timesteps = torch.randint(1000, (2,), generator=source)
    noisy = DDPMScheduler.from_pretrained(tiny_model, subfolder="scheduler").add_noise(
        latents, noise, timesteps
    )
    predicted = torch.cat(
        [generator.unet(noisy[i : i + 1], timesteps[i], cond[i : i + 1]).sample for i in range(2)]
    )
    assert found.item() == pytest.approx((predicted - noise).square().mean().item(), rel=1e-5)


def test_real_architectures_have_their_published_sizes():
    """Parameters of SD 1.4's three networks and of ViT-L/16, built from their configs without
    memory.
    """
    with torch.device("meta"):
        (text_encoder,), unet, vae, classifier = build_networks()
        noise = unet(torch.zeros(1, 4, 64, 64), torch.tensor(1), torch.zeros(1, 77, 768)).sample
        images = vae.decode(noise).sample
    sizes = [
        sum(p.numel() for p in network.parameters())
        for network in (unet, vae, text_encoder, classifier)
    ]
    assert sizes == [859_520_964, 83_653_863, 123_060_480, 304_326_632]
    assert images.shape == (1, 3, 512, 512)


@pytest.mark.parametrize(
    "family, sizes",
    [("sd_turbo", [340_387_840, 865_910_724]), ("sdxl", [123_060_480, 694_659_840, 2_567_463_684])],
)
def test_other_families_have_their_published_sizes(family, sizes):
    """Parameters of text encoders and UNet; the VAE is Stable Diffusion 1.4's."""
    with torch.device("meta"):
        text_encoders, unet, _, _ = build_networks(family)
    assert [
        sum(p.numel() for p in network.parameters()) for network in (*text_encoders, unet)
    ] == sizes
