"""Features of pictures for FID and the like: the published InceptionV3's, or a classifier's own."""

import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from models.checkpoints import opening_checkpoint
from models.classifiers import Classifier, load_classifier, penultimate_features
from models.labels import resolve_name
from system.paths import list_checkpoint_files, stamp_file
from utils import require

INCEPTION, INCEPTION_SIDE = "InceptionV3", 299


class Extractor(NamedTuple):
    """Computes features [B, D] of pictures that `prepare` has resized to one size."""

    name: str
    prepare: Callable[[torch.Tensor], torch.Tensor]  # uint8 [3, H, W] -> [3, h, w]
    extract_features: Callable[[torch.Tensor], torch.Tensor]  # [B, 3, h, w] -> [B, D]
    fid_mode: str | None = None  # of InceptionV3
    identity: list | None = None  # as describe_features gives it


def describe_features(name: str, fid_mode: str) -> list:
    """Describe what affects the features of `load_extractor`: weights' files, and the resizing."""
    kind, _, weights = name.partition(":")
    if kind == "inception":
        return [name, fid_mode, stamp_file(Path(weights)) if Path(weights).is_file() else None]
    return [name, list_checkpoint_files(resolve_name(name)[1])]


def resize_legacy(image: torch.Tensor) -> torch.Tensor:
    """Resize [3, H, W] to [3, 299, 299] in [0, 255] as torch-fidelity does.

    TensorFlow 1's bilinear interpolation, without antialiasing.
    """
    return interpolate_bilinear_2d_like_tensorflow1x(
        image[None].float(), [INCEPTION_SIDE] * 2, align_corners=False
    )[0]


def resize_clean(image: torch.Tensor) -> torch.Tensor:
    """Resize [3, H, W] to [3, 299, 299] in [0, 255] as clean-fid does (Parmar et al. 2022).

    Pillow's bicubic interpolation, not rounded.
    """
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in image]
    resized = [
        np.asarray(channel.resize([INCEPTION_SIDE] * 2, Image.Resampling.BICUBIC))
        for channel in channels
    ]
    return torch.from_numpy(np.stack(resized)).clip(0, 255)


FID_MODES = {"legacy": resize_legacy, "clean": resize_clean}


@torch.no_grad()
def check_extractor(extractor: Extractor) -> Extractor:
    """Return `extractor` after a dry run, so that it fails now and not after drawing."""
    prepared = [
        extractor.prepare(torch.arange(3 * 64 * width).view(3, 64, width).byte())
        for width in (64, 96)
    ]
    require(
        prepared[0].shape == prepared[1].shape,
        f"features: '{extractor.name}' does not resize pictures to one size, so it cannot compare "
        "them",
    )
    found = extractor.extract_features(torch.stack(prepared))
    require(
        found.ndim == 2 and len(found) == 2 and found.isfinite().all(),
        f"features: '{extractor.name}' gives {tuple(found.shape)} for two pictures, or non-finite "
        "values",
    )
    return extractor


def classifier_extractor(classifier: Classifier, identity: list | None = None) -> Extractor:
    """Extract what a classifier's last linear layer reads; raise UserError without one."""
    return check_extractor(
        Extractor(
            classifier.name,
            lambda image: classifier.preprocess(image[None].float() / 255)[0],
            lambda prepared: penultimate_features(classifier, prepared.to(classifier.device)),
            None,
            identity,
        )
    )


def is_torchscript(file: str) -> bool:
    """Return whether a file is a network saved by torch.jit."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_extractor(
    name: str, device: str, fid_mode: str, labels_file: str | None = None
) -> Extractor:
    """Load 'inception', 'inception:<file of weights>', or a classifier's penultimate features.

    The first is downloaded. `labels_file` is as in `load_classifier`.
    """
    identity = describe_features(name, fid_mode)
    if name.split(":")[0] != "inception":
        return classifier_extractor(
            load_classifier(name, device, labels_file=labels_file), identity
        )
    weights = name.partition(":")[2] or None
    require(weights is None or Path(weights).is_file(), f"features '{name}': no file '{weights}'")
    with opening_checkpoint(
        name, weights, instead="or give --features inception:<file of weights> or a classifier"
    ):
        if weights:  # the libraries unpickle freely, so they get no file that needs it
            require(
                not is_torchscript(weights),
                f"'{weights}' is TorchScript, which is code, such as clean-fid's "
                f"file: give torch-fidelity's, {URL_INCEPTION_V3}, which holds the same weights",
            )
            torch.load(weights, map_location="cpu", weights_only=True)
        else:
            torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
    # its forward resizes
    layers = torch.nn.Sequential(*list(model.children())[:-1], torch.nn.Flatten()).to(device)
    is_published = (
        weights is None or sha256(Path(weights).read_bytes()).hexdigest()[:8] in URL_INCEPTION_V3
    )
    return check_extractor(
        Extractor(
            INCEPTION if is_published else f"{INCEPTION} with other weights",
            FID_MODES[fid_mode],
            lambda prepared: layers((prepared.to(device) - 128) / 128),
            fid_mode,
            identity,
        )
    )
