"""Any list of words as a classifier, by CLIP (2021) or SigLIP (2023).

The text model runs once, at load: its features are the weights of a linear layer over a picture's
(CLIP, Sec. 3.1.2).
"""

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

from models.checkpoints import NO_REMOTE_CODE, load_network
from models.hub import locate_source
from models.preprocessing import load_preprocessing
from utils import UserError, require

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a good photo of a {}.",
    "a good photo of the {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
)


def load_zero_shot(
    source: str, labels: list[str], device: str, templates: tuple[str, ...] = TEMPLATES
):
    """Load a vision model and a linear layer over it, as the parts of a Classifier.

    Labels, model, preprocessing and compute_logits.

    Raises:
        UserError: another kind of model, a weight that is missing, or a label that is too long for
            the text model.
    """
    kind = AutoConfig.from_pretrained(**locate_source(source), **NO_REMOTE_CODE).model_type
    require(
        kind in ("clip", "siglip"),
        f"zero-shot reads models of type clip or siglip, and '{source}' is of type '{kind}'",
    )
    encoder = load_network(AutoModel, source, device)
    encoder.eval().to(device)
    features = embed_labels(encoder, _load_tokenizer(source), labels, templates)
    head = torch.nn.Linear(features.shape[1], len(labels), device=device)
    with torch.no_grad():
        head.weight.copy_(encoder.logit_scale.exp() * features)
        head.bias.copy_(
            encoder.logit_bias.expand(len(labels)) if kind == "siglip" else torch.zeros(len(labels))
        )
    del encoder.text_model  # its work is done

    def compute_logits(model, pixel_values):
        return model["head"](
            normalize_features(model["encoder"].get_image_features(pixel_values=pixel_values))
        )

    return (
        labels,
        torch.nn.ModuleDict({"encoder": encoder, "head": head}),
        load_preprocessing(source),
        compute_logits,
    )


def _load_tokenizer(source: str):
    try:
        return AutoTokenizer.from_pretrained(**locate_source(source), **NO_REMOTE_CODE)
    except ImportError as error:
        raise UserError(
            f"the tokenizer of '{source}' needs other packages: pip install sentencepiece protobuf"
        ) from error


@torch.no_grad()
def embed_labels(encoder, tokenizer, labels: list[str], templates: tuple[str, ...]) -> torch.Tensor:
    """Embed the labels as features [C, D] of length 1: the mean over templates.

    CLIP, Sec. 3.1.4.

    Raises:
        UserError: a label that is longer than the text model reads.
    """
    limit, features = encoder.config.text_config.max_position_embeddings, []
    # trained on small letters, padded to the end and not masked
    is_siglip = encoder.config.model_type == "siglip"
    if is_siglip:
        options = {"padding": "max_length", "max_length": limit, "return_attention_mask": False}
    else:  # on the meta device no mask has values to look at
        options = {"padding": True, "return_attention_mask": encoder.device.type != "meta"}
    for label in labels:
        prompts = [template.format(label.lower() if is_siglip else label) for template in templates]
        longest = max(map(len, tokenizer(prompts).input_ids))
        require(
            longest <= limit,
            f"labels: '{label}' is too long: a prompt with it has {longest} tokens, and the text "
            f"model reads {limit}",
        )
        tokens = tokenizer(prompts, return_tensors="pt", **options).to(encoder.device)
        embedded = normalize_features(encoder.get_text_features(**tokens))  # [templates, D]
        features.append(F.normalize(embedded.mean(dim=0), dim=0))
    return torch.stack(features)


def normalize_features(output) -> torch.Tensor:
    """Scale what get_image_features or get_text_features returns to length 1: [B, D]."""
    return F.normalize(output.pooler_output, dim=-1)
