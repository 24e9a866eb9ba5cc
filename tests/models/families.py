"""Tiny random checkpoints in the published layouts of every family of generators."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from models.sampling import SamplingSettings
from tests.conftest import SCHEDULER

SMALL = SamplingSettings(height=32, width=32, guidance_scale=3.0, num_inference_steps=4)
DISTILLED = SMALL._replace(guidance_scale=0.0)
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **BETAS,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}
SDXL = {**EULER, "timestep_spacing": "leading"}
SD2_768 = {**SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
ZERO_SNR = {**SD2_768, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LCM = {
    "_class_name": "LCMScheduler",
    **BETAS,
    "clip_sample": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
# scheduler_config.json, changes to the UNet, and settings; SD 1.4 itself is everywhere else
FAMILIES = {
    "sd2": (
        {**SCHEDULER, "prediction_type": "epsilon"},
        {"use_linear_projection": True},
        SMALL,
    ),
    "sd2_768": (SD2_768, {"use_linear_projection": True}, SMALL),
    "zero_snr": (ZERO_SNR, {}, SMALL._replace(guidance_rescale=0.7)),
    "sd_turbo": (
        EULER,
        {"use_linear_projection": True},
        DISTILLED._replace(num_inference_steps=1),
    ),
    "lcm": (LCM, {"time_cond_proj_dim": 32}, SMALL._replace(guidance_scale=8.0)),
    "lightning": (EULER, {}, DISTILLED),
    "sdxl": (SDXL, {}, SMALL),
    "sdxl_zero_snr": (
        {**EULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {},
        SMALL._replace(guidance_rescale=0.7),
    ),
    "sdxl_turbo": (
        {**EULER, "_class_name": "EulerAncestralDiscreteScheduler"},
        {},
        DISTILLED._replace(num_inference_steps=1),
    ),
    "sdxl_lightning": (EULER, {}, DISTILLED),
    "sdxl_by_default": (SDXL, {}, SMALL),
    "sdxl_empty_prompt": (SDXL, {}, SMALL),
}
INDEXES = {"sdxl_by_default": {}, "sdxl_empty_prompt": {"force_zeros_for_empty_prompt": False}}


def save_family(name: str, tiny_model: str, folder: Path) -> str:
    """Write the checkpoint of a family, from the parts of the tiny Stable Diffusion 1.4."""
    scheduler, changes, _ = FAMILIES[name]
    shutil.copytree(tiny_model, folder)
    for file in folder.rglob("*.fp16.*"):
        file.unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index = {
        key: value
        for key, value in index.items()
        if key not in ("safety_checker", "feature_extractor")
    }
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    unet = {**json.loads((folder / "unet/config.json").read_text()), **changes}
    if name == "lcm":
        index["_class_name"] = "LatentConsistencyModelPipeline"
    if name.startswith("sdxl"):
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            **INDEXES.get(name, {"force_zeros_for_empty_prompt": True}),
        }
        unet |= {
            "cross_attention_dim": 32 + 48,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 40,
            "use_linear_projection": True,
        }
        save_second_encoder(folder)
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    torch.manual_seed(5)
    UNet2DConditionModel.from_config(unet).save_pretrained(folder / "unet")
    return str(folder)


def save_second_encoder(folder: Path):
    """As in SDXL: OpenCLIP's tokenizer pads with '!', its encoder pools and projects; the VAE is
    upcast.
    """
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / "tokenizer_2" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "!"}))
    size = len(json.loads((folder / "tokenizer/vocab.json").read_text()))
    torch.manual_seed(6)
    CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=24,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
            projection_dim=40,
            hidden_act="gelu",
        )
    ).save_pretrained(folder / "text_encoder_2")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    vae.register_to_config(force_upcast=True, scaling_factor=0.13025)
    vae.save_pretrained(folder / "vae")
