"""The parts of a pipeline's folder, read one by one and checked before anything is drawn."""

import diffusers
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from models.checkpoints import load_part
from models.hub import locate_source
from models.placeholder import PromptEncoder
from models.sampling import scheduler_class
from models.stable_diffusion import StableDiffusion
from utils import require

PARTS = {  # and the classes that may be in model_index.json
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
# by StableDiffusionPipeline, for old checkpoints
SCHEDULER_CHANGES = {
    "clip_sample": False,
    "steps_offset": 1,
}
MORE_CONDITIONS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
)


def load_stable_diffusion(
    model: str, source: str, index: dict, device: str, dtype: torch.dtype
) -> StableDiffusion:
    """The parts that model_index.json (`index`) names; nothing else of the pipeline is read.

    Raises:
        UserError: the parts are not of one text-to-image model that draws from noise and a prompt
            alone.
    """
    check_index(model, index, {})
    encoders = (
        load_prompt_encoder(
            model, source, "tokenizer", CLIPTextModel, "text_encoder", device, dtype
        ),
    )
    unet, vae = load_unet_and_vae(source, index, device, dtype)
    check_layout(model, encoders, unet, vae, {})
    changes = SCHEDULER_CHANGES if index["_class_name"] == "StableDiffusionPipeline" else {}
    return StableDiffusion(
        encoders, unet, vae, load_scheduler(model, source, index, **changes), device
    )


def check_index(model: str, index: dict, more_parts: dict[str, tuple[str, ...]]):
    """Raise UserError if model_index.json names a part of an unknown class.

    PARTS and `more_parts` hold the known ones.
    """
    for part, known in {**PARTS, **more_parts}.items():
        require(
            index.get(part, [None, None])[1] in known,
            f"model_index.json of '{model}' names {index.get(part)} as its {part}, which must be "
            + " or ".join(known),
        )


def load_prompt_encoder(
    model: str,
    source: str,
    tokenizer: str,
    cls: type,
    text_encoder: str,
    device: str,
    dtype: torch.dtype,
) -> PromptEncoder:
    """Load the tokenizer and the text encoder in these folders.

    Raises UserError if they do not belong together.
    """
    encoder = PromptEncoder(
        CLIPTokenizer.from_pretrained(**locate_source(source), subfolder=tokenizer),
        load_part(cls, source, text_encoder, device, dtype),
    )
    require(
        encoder.tokenizer.model_max_length <= encoder.text_encoder.config.max_position_embeddings,
        f"the {tokenizer}'s files of '{model}' are missing or belong to another model",
    )
    return encoder


def load_scheduler(model: str, source: str, index: dict, **changes):
    """Load the scheduler that model_index.json names, with `changes` to its config."""
    kind = scheduler_class(index["scheduler"][1], model)
    scheduler = kind.from_pretrained(**locate_source(source), subfolder="scheduler")
    return type(scheduler).from_config(scheduler.config, **changes)


def load_unet_and_vae(source: str, index: dict, device: str, dtype: torch.dtype) -> tuple:
    """Load both networks, with every weight."""
    return (
        load_part(diffusers.UNet2DConditionModel, source, "unet", device, dtype),
        load_part(getattr(diffusers, index["vae"][1]), source, "vae", device, dtype),
    )


def check_layout(
    model: str, encoders: tuple[PromptEncoder, ...], unet, vae, conditions: dict[str, str]
):
    """Raise UserError if the parts do not fit.

    Or if the UNet reads more than the prompt and `conditions`.
    """
    width = sum(encoder.token_width for encoder in encoders)
    fits = (
        unet.config.in_channels == unet.config.out_channels == vae.config.latent_channels
        and unet.config.cross_attention_dim == width
    )
    require(
        fits,
        f"the parts of '{model}' are not of one Stable Diffusion model: its UNet reads "
        f"{unet.config.in_channels} channels, predicts {unet.config.out_channels} channels and "
        f"reads embeddings of {unet.config.cross_attention_dim}, its VAE makes "
        f"{vae.config.latent_channels} and its text encoder {width}",
    )
    more = [name for name in MORE_CONDITIONS if unet.config.get(name) != conditions.get(name)]
    require(
        not more,
        f"the UNet of '{model}' needs conditions other than a prompt and what its pipeline adds: "
        f"see {', '.join(more)} in its config",
    )
