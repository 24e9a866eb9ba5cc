"""SD 1.4: its layout on a tiny checkpoint, its real sizes on the meta device, and what is said when it is not there."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.random_weights import networks
from diffusion import load_components
from utils import UserError


def test_layout_loads_without_safety_checker_and_feature_extractor(tiny_model):
    components = load_components(tiny_model, "cpu", torch.float32)
    assert type(components.scheduler).__name__ == "PNDMScheduler"
    assert components.vae_scale_factor == 8
    for module in (components.text_encoder, components.unet, components.vae):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_old_key_names_are_read(tiny_model, components):
    """SD 1.4's text encoder is stored as text_model.*, its VAE's attention as query, key, value, proj_attn; every
    weight must arrive."""
    for part, file in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        stored = load_file(Path(tiny_model, part, f"{file}.safetensors"))
        stored.pop("text_model.embeddings.position_ids", None)
        loaded = getattr(components, part).state_dict()
        assert len(stored) == len([key for key in loaded if "position_ids" not in key])
        for key, value in stored.items():
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
                key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            assert torch.equal(loaded.get(key, loaded.get(key.removeprefix("text_model."))), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kept", ["fp32", "fp16"])
def test_either_variant_serves_either_precision(tiny_model, tmp_path, dtype, kept):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    for file in folder.glob("*/*.safetensors"):
        if (".fp16." in file.name) != (kept == "fp16"):
            file.unlink()
    assert load_components(str(folder), "cpu", dtype).unet.dtype == dtype


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_a_missing_part_is_one_line(tiny_model, tmp_path, part):
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(UserError, match="the folder lacks a file|the tokenizer's files"):
        load_components(str(tmp_path / "model"), "cpu", torch.float32)


def test_real_architectures_have_their_published_sizes():
    """Parameters of SD 1.4's three networks and of ViT-L/16, built from their configs without memory."""
    with torch.device("meta"):
        text_encoder, unet, vae, classifier = networks()
        noise = unet(torch.zeros(1, 4, 64, 64), torch.tensor(1), torch.zeros(1, 77, 768)).sample
        images = vae.decode(noise).sample
    sizes = [sum(p.numel() for p in m.parameters()) for m in (unet, vae, text_encoder, classifier)]
    assert sizes == [859_520_964, 83_653_863, 123_060_480, 304_326_632]
    assert images.shape == (1, 3, 512, 512)
