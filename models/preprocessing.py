"""The preprocessing of a transformers checkpoint, on tensors and differentiable."""

from collections.abc import Callable

import torch
import transformers
from transformers import AutoImageProcessor

from models.checkpoints import NO_REMOTE_CODE
from models.hub import locate_source


def load_preprocessing(source: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images [B, 3, H, W] in [0, 1] -> the model's input [B, 3, h, w].

    By the checkpoint's own image processor.
    """
    processor = _load_processor(source)
    scaled = (
        processor.do_rescale
        and processor.rescale_factor == 1 / 255
        and not getattr(processor, "rescale_offset", False)
    )

    def apply_processor(images):  # made for 8-bit values; [0, 1] is what its usual rescaling gives
        return processor(
            images if scaled else images * 255,
            return_tensors="pt",
            **({"do_rescale": False} if scaled else {}),
        ).pixel_values

    return apply_processor


def _load_processor(source: str):
    """The image processor, also by its old name, ViTFeatureExtractor.

    transformers 4.25 to 4.3x wrote that.
    """
    config, _ = transformers.ImageProcessingMixin.get_image_processor_dict(**locate_source(source))
    name = config.get("image_processor_type") or ""
    old, kind, _ = name.partition("FeatureExtractor")
    loader = AutoImageProcessor
    if kind:
        loader = getattr(transformers, f"{old}ImageProcessor", AutoImageProcessor)
    return loader.from_pretrained(**locate_source(source), **NO_REMOTE_CODE)
