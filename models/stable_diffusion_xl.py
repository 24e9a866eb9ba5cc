"""Stable Diffusion XL (Podell et al. 2023).

Two text encoders, a pooled embedding and the size of the picture.
"""

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.loading import (
    check_index,
    check_layout,
    load_prompt_encoder,
    load_scheduler,
    load_unet_and_vae,
)
from models.placeholder import PromptEncoder
from models.stable_diffusion import StableDiffusion
from utils import require


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion with two text encoders.

    `cond` holds prompt_embeds [P, L, D], both encoders' side by side, and a pooled embedding [P,
    E], in one row [P, L * D + E].
    """

    def __init__(
        self,
        prompt_encoders: tuple[PromptEncoder, ...],
        unet,
        vae,
        scheduler,
        device: str,
        zero_negative: bool,
    ):
        super().__init__(prompt_encoders, unet, vae, scheduler, device)
        self.zero_negative = zero_negative  # guidance leads away from zeros instead of from ""

    def encode(self, prompts: list[str], vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Encode prompts [P] with the token in each [P, K, D] as cond [P, L * D + E].

        The vectors hold one encoder's part after the other's.
        """
        if vectors is None:
            parts = [None] * len(self.token_widths)
        else:
            parts = vectors.split(self.token_widths, dim=-1)
        outputs = [
            encoder.encode(prompts, part, output_hidden_states=True)
            for encoder, part in zip(self.prompt_encoders, parts, strict=True)
        ]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # [P, L, D]
        return torch.cat([embeds.flatten(1), outputs[-1].text_embeds], dim=1)

    def encode_negative(self) -> torch.Tensor:
        """Encode what guidance leads away from, in the form of `encode`."""
        negative = self.encode([""])
        return torch.zeros_like(negative) if self.zero_negative else negative

    def unet_arguments(self, latents: torch.Tensor, cond: torch.Tensor) -> dict:
        """Return what the UNet reads besides latents [B, 4, h, w] and timestep.

        Its size conditions are the picture's own.
        """
        width = self.prompt_encoders[-1].text_encoder.config.projection_dim
        height, side = latents.shape[-2:]
        size = (height * self.scale_factor, side * self.scale_factor)
        time_ids = torch.tensor([[*size, 0, 0, *size]]).to(cond).expand(len(cond), -1)
        return {
            "encoder_hidden_states": (
                cond[:, :-width].unflatten(1, (-1, self.unet.config.cross_attention_dim))
            ),
            "added_cond_kwargs": {"text_embeds": cond[:, -width:], "time_ids": time_ids},
        }

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode z_0 [B, 4, h, w] into images [B, 3, H, W] in [0, 1], float32."""
        config = self.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                torch.tensor(part).view(1, -1, 1, 1).to(latents)
                for part in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean * config.scaling_factor
        return super().decode(latents)


def load_stable_diffusion_xl(
    model: str, source: str, index: dict, device: str, dtype: torch.dtype
) -> StableDiffusionXL:
    """The parts that model_index.json (`index`) names; nothing else of the pipeline is read.

    Raises:
        UserError: the parts are not of one text-to-image model of SDXL's layout.
    """
    check_index(
        model,
        index,
        {
            "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
        },
    )
    encoders = (
        load_prompt_encoder(
            model, source, "tokenizer", CLIPTextModel, "text_encoder", device, dtype
        ),
        load_prompt_encoder(
            model,
            source,
            "tokenizer_2",
            CLIPTextModelWithProjection,
            "text_encoder_2",
            device,
            dtype,
        ),
    )
    unet, vae = load_unet_and_vae(source, index, device, dtype)
    if dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.float()  # SDXL's overflows in float16; its pipeline does so too
    check_layout(model, encoders, unet, vae, {"addition_embed_type": "text_time"})
    ids = unet.add_embedding.linear_1.in_features - encoders[-1].text_encoder.config.projection_dim
    require(
        ids == 6 * unet.config.addition_time_embed_dim,
        f"the UNet of '{model}' does not read the six numbers of size and crop that SDXL's base "
        "model reads",
    )
    # its pipeline's default
    return StableDiffusionXL(
        encoders,
        unet,
        vae,
        load_scheduler(model, source, index),
        device,
        index.get("force_zeros_for_empty_prompt", True),
    )
