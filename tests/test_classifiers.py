"""Every kind of classifier against the library it comes from; preprocessing against the checkpoint's own processor."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import classifiers
from classifiers import load_classifier, load_labels
from tests.conftest import LABELS
from utils import UserError

PROCESSORS = {
    "vit": ViTImageProcessor(size={"height": 48, "width": 48}, resample=3),
    "short side and crop": ViTImageProcessor(size={"shortest_edge": 56}, do_center_crop=True,
                                             crop_size={"height": 48, "width": 48}),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.875),
}


def noise_image(height=96, width=120):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_preprocessing_equals_the_processor(kind):
    """The same pixels but for rounding: the processor's resize rounds, and cuts off, to 8 bits twice."""
    pixels = noise_image()
    theirs = PROCESSORS[kind](Image.fromarray(pixels), return_tensors="pt").pixel_values
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    preprocessing = classifiers._from_processor(PROCESSORS[kind])
    ours = preprocessing(images)
    assert ours.shape == theirs.shape
    levels = (ours - theirs).abs() * max(preprocessing.std) * 255
    assert levels.mean() < 0.5 and levels.max() < 8


def test_transformers_folder(tiny_classifier):
    classifier = load_classifier(tiny_classifier, "cpu")
    assert classifier.labels == LABELS == load_labels(tiny_classifier)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    classifier(images)[:, 0].sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in classifier.model.parameters())
    pixels = noise_image(16, 16)
    inputs = AutoImageProcessor.from_pretrained(tiny_classifier)(Image.fromarray(pixels), return_tensors="pt")
    theirs = ViTForImageClassification.from_pretrained(tiny_classifier)(**inputs).logits
    ours = classifier(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_checkpoint_that_exists_only_as_bin(tiny_classifier, tmp_path):
    """The iNat and CUB classifiers on the hub may be such; the file is read as weights only, nothing is unpickled."""
    old = tmp_path / "old"
    shutil.copytree(tiny_classifier, old, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(Path(tiny_classifier) / "model.safetensors"), old / "pytorch_model.bin")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_classifier(str(old), "cpu")(images), load_classifier(tiny_classifier, "cpu")(images))


def old_vit_keys(state, depth):
    """timm's VisionTransformer weights under the key names of transformers 4.26."""
    old = {"vit.embeddings.cls_token": state["cls_token"], "vit.embeddings.position_embeddings": state["pos_embed"]}
    for kind in ("weight", "bias"):
        old[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        old[f"vit.layernorm.{kind}"] = state[f"fc_norm.{kind}"]
        old[f"classifier.{kind}"] = state[f"head.{kind}"]
        for i in range(depth):
            theirs, ours = f"blocks.{i}", f"vit.encoder.layer.{i}"
            parts = state[f"{theirs}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                old[f"{ours}.attention.attention.{name}.{kind}"] = part
            for name, source in (("attention.output.dense", "attn.proj"), ("layernorm_before", "norm1"),
                                 ("layernorm_after", "norm2"), ("intermediate.dense", "mlp.fc1"),
                                 ("output.dense", "mlp.fc2")):
                old[f"{ours}.{name}.{kind}"] = state[f"{theirs}.{source}.{kind}"]
    return {key: value.contiguous().clone() for key, value in old.items()}


def test_mean_pooled_vit_equals_timm(tmp_path):
    """iNat and CUB: timm's vit_base_patch16_224 with global_pool='avg', saved under transformers 4.26 key names."""
    torch.manual_seed(0)
    reference = timm.create_model("vit_base_patch16_224", global_pool="avg", num_classes=7).eval()
    torch.nn.init.normal_(reference.head.weight, std=0.1)
    torch.nn.init.normal_(reference.fc_norm.weight, 1.0, 0.2)
    save_file(old_vit_keys(reference.state_dict(), 12), tmp_path / "model.safetensors", metadata={"format": "pt"})
    ViTConfig(num_labels=7, layer_norm_eps=1e-6, architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    classifier = load_classifier(f"mean:{tmp_path}", "cpu")
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        theirs = reference(images * 2 - 1)
        assert (classifier(images) - theirs).abs().max() < 1e-4
        assert (load_classifier(str(tmp_path), "cpu")(images) - theirs).abs().max() > 1e-2  # the class token's head


def test_timm_model_from_disk_equals_timm(tmp_path):
    torch.manual_seed(0)
    reference = timm.create_model("resnet18", num_classes=3).eval()
    save_file(reference.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "resnet18", "num_classes": 3, "label_names": ["one", "two", "three"],
        "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.875, "interpolation": "bicubic",
                           "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "num_classes": 3}}))
    classifier = load_classifier(f"timm:local-dir:{tmp_path}", "cpu")
    assert classifier.labels == ["one", "two", "three"]
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    pixels = noise_image()
    with torch.no_grad():
        theirs = model(transform(Image.fromarray(pixels))[None])
        ours = classifier(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    assert torch.allclose(ours, theirs, atol=2e-2)


def test_a_processor_that_does_more_is_refused():
    """EfficientNet's first version normalises a second time; saying nothing would train on wrong pictures."""
    processor = EfficientNetImageProcessor(size={"height": 32, "width": 32}, include_top=True)
    with pytest.raises(UserError, match="EfficientNetImageProcessor.* does more than"):
        classifiers._from_processor(processor)


def test_timm_says_which_models_it_knows():
    with pytest.raises(UserError, match=r"timm knows no classifier 'resnet999'"):
        load_classifier("timm:resnet999", "cpu")


def test_a_checkpoint_without_a_head_is_refused(tiny_classifier, tmp_path):
    state = {key: value for key, value in load_file(f"{tiny_classifier}/model.safetensors").items()
             if not key.startswith("classifier")}
    ViTConfig.from_pretrained(tiny_classifier).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not an image classifier as stored"):
        load_classifier(str(tmp_path), "cpu")


@pytest.mark.parametrize("name, folder", [("inet", "inet"), ("timm:resnet50", "timm_resnet50"),
                                          ("google/vit-base", "google_vit-base"), ("/a/b/my vit/", "b_my_vit")])
def test_folder_names(name, folder):
    assert classifiers.folder_name(name) == folder
