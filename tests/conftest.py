"""A tiny random checkpoint in SD 1.4's exact layout, tiny classifiers, and the settings that run on
them.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from config import RunConfig
from models.generator import load_generator
from run import main

LABELS = ["crane, bird", "crane, machine", "tiger cat", "horizontal bar, high bar", "7/8: odd"]
WORDS = [
    "a",
    "photo",
    "of",
    "crane",
    "tiger",
    "cat",
    "high",
    "close",
    "up",
    "image",
    "resolution",
    "realistic",
]
MODEL_INDEX = {  # as in CompVis/stable-diffusion-v1-4
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.2.2",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SCHEDULER = {  # scheduler/scheduler_config.json, likewise
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def save_tokenizer(folder: Path):
    """SD 1.4's tokenizer files: vocab.json, merges.txt, special_tokens_map.json,
    tokenizer_config.json.
    """
    letters = [chr(code) for code in range(33, 127)]
    merges, tokens = [], [*letters, *(letter + "</w>" for letter in letters)]
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                tokens.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = {
        token: i
        for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n"
    )
    special = {
        f"{kind}_token": {
            "content": f"<|{mark}oftext|>",
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }
        for kind, mark in (("bos", "start"), ("eos", "end"), ("unk", "end"))
    }
    (folder / "special_tokens_map.json").write_text(
        json.dumps({**special, "pad_token": "<|endoftext|>"})
    )
    typed = {kind: {"__type": "AddedToken", **token} for kind, token in special.items()}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                **typed,
                "pad_token": "<|endoftext|>",
                "add_prefix_space": False,
                "errors": "replace",
                "do_lower_case": True,
                "model_max_length": 24,
                "name_or_path": "openai/clip",
                "tokenizer_class": "CLIPTokenizer",
            }
        )
    )
    return len(vocabulary)


def rename_keys(folder: Path):
    """Give the weights the names they have in SD 1.4's files: `text_model.*` and the VAE's first
    attention layers.
    """
    for file in (folder / "text_encoder").glob("*.safetensors"):
        state = {
            f"text_model.{key.removeprefix('text_model.')}": value
            for key, value in load_file(file).items()
        }
        state["text_model.embeddings.position_ids"] = torch.arange(24)[None]
        save_file(state, file, metadata={"format": "pt"})
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for file in (folder / "vae").glob("*.safetensors"):
        state = load_file(file)
        for new, name in old.items():
            state = {
                key.replace(f".attentions.0.{new}.", f".attentions.0.{name}."): value
                for key, value in state.items()
            }
        save_file(state, file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Random weights, 32 x 32 images, fp32 and fp16 files."""
    folder = tmp_path_factory.mktemp("tiny") / "stable-diffusion"
    torch.manual_seed(0)
    size = save_tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=24,
            bos_token_id=0,
            eos_token_id=2,
            projection_dim=32,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    for name, module in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        module.save_pretrained(folder / name)
        module.half().save_pretrained(folder / name, variant="fp16")
    rename_keys(folder)
    for name, content in (
        ("model_index.json", MODEL_INDEX),
        ("scheduler/scheduler_config.json", SCHEDULER),
        ("safety_checker/config.json", {"architectures": ["StableDiffusionSafetyChecker"]}),
        ("feature_extractor/preprocessor_config.json", {"crop_size": 224, "size": 224}),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def generator(tiny_model):
    return load_generator(tiny_model, "cpu", torch.float32)


def save_classifier(folder: Path, labels: list[str]) -> str:
    """A tiny random ViT over `labels`, in Hugging Face's layout."""
    torch.manual_seed(1)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = ViTForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifier") / "vit", LABELS)


@pytest.fixture
def tiny_config(tiny_model, tiny_classifier, tmp_path) -> RunConfig:
    return RunConfig(
        class_index="3",
        train=True,
        model=tiny_model,
        classifier=tiny_classifier,
        device="cpu",
        mixed_precision="no",
        height=32,
        width=32,
        num_inference_steps=3,
        num_train_epochs=3,
        test_size=2,
        output_path=str(tmp_path),
        target_accuracy=1.0,
    )


def flags(config: RunConfig, *more: str, **settings) -> list[str]:
    """The command line of a tiny run with the settings given by name, and more words after them."""
    tiny = {
        "model": config.model,
        "classifier": config.classifier,
        "device": "cpu",
        "mixed_precision": "no",
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "test_size": 2,
        "output_path": config.output_path,
    }
    words = []
    for name, value in {**tiny, **settings}.items():
        words += [f"--{name}", str(value)]
    return [*words, *more]


def error_of(capsys, *argv) -> str:
    """The one line that a wrong call prints; its exit code is 2."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def file_times(folder: Path) -> dict[Path, int]:
    """When tokens, what training left and all pictures were written."""
    times = {}
    for path in folder.rglob("*"):
        is_kept = path.suffix == ".png" or "pipeline_token" in path.parts
        if path.is_file() and is_kept and path.suffix != ".lock":
            times[path] = path.stat().st_mtime_ns
    return times
