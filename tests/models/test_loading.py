"""What a pipeline's folder may hold: every weight arrives, every part is used as its pipeline does,
or is refused.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from models.denoising import encode_images
from models.generator import load_generator
from tests.models.pipelines import PROMPTS, SETTINGS, draw_by_ours, draw_by_pipeline
from utils import UserError


def edit_index(tiny_model: str, tmp_path: Path, **changes) -> str:
    shutil.copytree(tiny_model, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    return str(tmp_path / "model")


def edit_config(tiny_model: str, tmp_path: Path, part: str, **changes) -> str:
    folder = Path(edit_index(tiny_model, tmp_path))
    config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return str(folder)


def load_pipeline(folder: str):
    return DiffusionPipeline.from_pretrained(
        folder,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        torch_dtype=torch.float32,
    )


def compare_with_pipeline(folder: str, settings=SETTINGS):
    generator = load_generator(folder, "cpu", torch.float32)
    assert (
        draw_by_ours(generator, settings) - draw_by_pipeline(load_pipeline(folder), settings)
    ).abs().max() < 1e-4
    return generator


@pytest.mark.parametrize("guidance_scale", [1.5, 8.0])
@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler", "DDIMScheduler"])
def test_guidance_embedding_as_the_pipeline_does(tiny_model, tmp_path, scheduler, guidance_scale):
    folder = edit_config(tiny_model, tmp_path, "unet", time_cond_proj_dim=16)
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config(
        json.loads(Path(folder, "unet/config.json").read_text())
    )
    shutil.rmtree(f"{folder}/unet")
    unet.save_pretrained(f"{folder}/unet")
    index = Path(folder, "model_index.json")
    index.write_text(
        json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", scheduler]})
    )
    settings = SETTINGS._replace(guidance_scale=guidance_scale, num_inference_steps=4)
    generator = compare_with_pipeline(folder, settings)
    calls = []
    generator.unet.register_forward_hook(
        lambda module, inputs, output: calls.append(len(output.sample))
    )
    draw_by_ours(generator, settings)
    assert set(calls) == {len(PROMPTS)}  # no unconditional half


def test_attention_mask_as_the_pipeline_does(tiny_model, tmp_path):
    plain = draw_by_ours(load_generator(tiny_model, "cpu", torch.float32))
    generator = compare_with_pipeline(
        edit_config(tiny_model, tmp_path, "text_encoder", use_attention_mask=True)
    )
    assert (draw_by_ours(generator) - plain).abs().max() > 1e-3


def test_tiny_autoencoder_draws_and_learns(tiny_model, tmp_path):
    folder = edit_index(tiny_model, tmp_path, vae=["diffusers", "AutoencoderTiny"])
    shutil.rmtree(f"{folder}/vae")
    torch.manual_seed(4)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(f"{folder}/vae")
    generator = compare_with_pipeline(folder)
    generator.set_placeholder("newclas")
    vectors = torch.ones(1, 1, 32, requires_grad=True)
    cond = generator.encode(["a newclas crane"], vectors)
    generator.decode(generator.sample(cond, [0], SETTINGS))[0, 0, :8].sum().backward()
    assert vectors.grad.norm() > 0
    assert encode_images(generator, torch.rand(1, 3, 32, 32))[0].shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    "part, changes, reason",
    [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"num_class_embeds": 3}, "num_class_embeds"),
        ("unet", {"addition_embed_type": "text"}, "addition_embed_type"),
        (
            "unet",
            {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32},
            "encoder_hid_dim_type",
        ),
    ],
)
def test_unets_that_need_more_are_refused(tiny_model, tmp_path, part, changes, reason):
    folder = edit_config(tiny_model, tmp_path, part, **changes)
    unet = UNet2DConditionModel.from_config(
        json.loads(Path(folder, "unet/config.json").read_text())
    )
    shutil.rmtree(f"{folder}/unet")
    unet.save_pretrained(f"{folder}/unet")
    with pytest.raises(
        UserError, match=f"needs conditions other than a prompt .*: see {reason} in"
    ):
        load_generator(folder, "cpu", torch.float32)


@pytest.mark.parametrize(
    "part, name",
    [
        ("vae", "ConsistencyDecoderVAE"),
        ("unet", "UNet2DModel"),
        ("text_encoder", "T5EncoderModel"),
        ("tokenizer", "T5Tokenizer"),
    ],
)
def test_other_parts_are_refused_by_name(tiny_model, tmp_path, part, name):
    with pytest.raises(UserError, match=f"{name}.*as its {part}, which must be"):
        load_generator(
            edit_index(tiny_model, tmp_path, **{part: ["library", name]}), "cpu", torch.float32
        )


WEIGHTS = [
    ("text_encoder", "model", "embeddings.token_embedding.weight"),
    ("text_encoder", "model", "layers.0.self_attn.q_proj.weight"),
    ("unet", "diffusion_pytorch_model", "conv_in.weight"),
    ("vae", "diffusion_pytorch_model", "decoder.conv_in.weight"),
]


@pytest.mark.parametrize("part, file, key", WEIGHTS)
@pytest.mark.parametrize("damage", ["dropped", "renamed", "reshaped"])
def test_weights_that_do_not_arrive_are_named(tiny_model, tmp_path, part, file, key, damage):
    folder = edit_index(tiny_model, tmp_path)
    path = Path(folder, part, f"{file}.safetensors")
    state = load_file(path)
    stored = next(name for name in state if name.endswith(key))
    weight = state.pop(stored)
    if damage == "renamed":
        state[stored.replace(".weight", ".base_layer.weight")] = weight
    if damage == "reshaped":
        state[stored] = torch.cat([weight, weight])
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=key) as raised:
        load_generator(folder, "cpu", torch.float32)
    assert "\n" not in str(raised.value)
    assert ("in other shapes" if damage == "reshaped" else "lacks") in str(raised.value)


def test_weights_that_are_not_used_are_named(tiny_model, tmp_path, capsys):
    folder = edit_index(tiny_model, tmp_path)
    path = Path(folder, "text_encoder/model.safetensors")
    save_file(
        {**load_file(path), "text_model.adapter.weight": torch.ones(2)},
        path,
        metadata={"format": "pt"},
    )
    load_generator(folder, "cpu", torch.float32)
    warning = capsys.readouterr().err
    assert "adapter.weight" in warning and "not used" in warning


def test_scheduler_without_its_package_says_what_to_install(tiny_model, tmp_path):
    try:
        import torchsde  # noqa: F401

        pytest.skip("torchsde is installed")
    except ImportError:
        folder = edit_index(tiny_model, tmp_path, scheduler=["diffusers", "DPMSolverSDEScheduler"])
        with pytest.raises(UserError, match="requires the torchsde library.*pip install"):
            load_generator(folder, "cpu", torch.float32)


def test_unet_that_predicts_a_variance_too_is_refused(tiny_model, tmp_path):
    folder = edit_config(tiny_model, tmp_path, "unet", out_channels=8)
    unet = UNet2DConditionModel.from_config(
        json.loads(Path(folder, "unet/config.json").read_text())
    )
    shutil.rmtree(f"{folder}/unet")
    unet.save_pretrained(f"{folder}/unet")
    with pytest.raises(UserError, match="predicts 8 channels"):
        load_generator(folder, "cpu", torch.float32)
