"""The parts of a pipeline's folder, read one by one and checked before anything is drawn with them."""

import diffusers
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from models.checkpoints import load_part
from models.sampling import scheduler_class
from models.stable_diffusion import StableDiffusion
from utils import require

VAES = ("AutoencoderKL", "AutoencoderTiny")
MORE_CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")


def load_stable_diffusion(model: str, source: str, index: dict, device: str, dtype: torch.dtype) -> StableDiffusion:
    """The parts that model_index.json (`index`) names; nothing else of the pipeline is read.

    Raises:
        UserError: the parts are not of one text-to-image model that draws from noise and a prompt alone.
    """
    for part, known in (("tokenizer", ("CLIPTokenizer", "CLIPTokenizerFast")), ("text_encoder", ("CLIPTextModel",)),
                        ("unet", ("UNet2DConditionModel",)), ("vae", VAES)):
        require(index.get(part, [None, None])[1] in known,
                f"model_index.json of '{model}' names {index.get(part)} as its {part}, which must be "
                + " or ".join(known))
    scheduler = scheduler_class(index["scheduler"][1], model).from_pretrained(source, subfolder="scheduler")
    generator = StableDiffusion(
        CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
        load_part(CLIPTextModel, source, "text_encoder", dtype=dtype),
        load_part(diffusers.UNet2DConditionModel, source, "unet", torch_dtype=dtype),
        load_part(getattr(diffusers, index["vae"][1]), source, "vae", torch_dtype=dtype), scheduler, device)
    text, unet, vae = (network.config for network in generator.networks)
    require(generator.tokenizer.model_max_length <= text.max_position_embeddings,
            f"the tokenizer's files of '{model}' are missing or another model's")
    fits = unet.in_channels == unet.out_channels == vae.latent_channels and unet.cross_attention_dim == text.hidden_size
    require(fits, f"'{model}' is not laid out as Stable Diffusion 1 or 2: its UNet reads {unet.in_channels} channels, "
                  f"predicts {unet.out_channels} channels and reads embeddings of {unet.cross_attention_dim}, its VAE "
                  f"makes {vae.latent_channels} and its text encoder {text.hidden_size}")
    more = [name for name in MORE_CONDITIONS if unet.get(name) is not None]
    require(not more, f"the UNet of '{model}' needs more than a prompt: its config has {', '.join(more)}")
    return generator
