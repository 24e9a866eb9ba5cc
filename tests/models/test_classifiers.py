"""Every kind of classifier against the library it comes from; its preprocessing against the
library's 8-bit path.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from models.classifiers import check_classifier, load_classifier, load_labels, penultimate_features
from models.labels import IMAGENET_LABELS, find_labels, folder_name, resolve_name
from system.paths import list_checkpoint_files
from tests.conftest import LABELS, save_classifier
from utils import UserError

SIZE = {"height": 48, "width": 48}
PROCESSORS = {  # the last three feed their networks something else than (x / 255 - mean) / std
    "vit": ViTImageProcessor(size=SIZE, resample=3),
    "short side and crop": ViTImageProcessor(
        size={"shortest_edge": 56}, do_center_crop=True, crop_size=SIZE
    ),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.875),
    "normalised twice": EfficientNetImageProcessor(size=SIZE, include_top=True),
    "blue first": MobileViTImageProcessor(size={"shortest_edge": 48}, crop_size=SIZE),
    "offset": EfficientNetImageProcessor(
        size=SIZE, rescale_offset=True, rescale_factor=1 / 127.5, include_top=False
    ),
    "other factor": ViTImageProcessor(
        size=SIZE, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3
    ),
    "no factor": ViTImageProcessor(
        size=SIZE, do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5] * 3
    ),
}


def save_resnet(folder):
    """A tiny random classifier that takes pictures of any size."""
    torch.manual_seed(0)
    ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    ).save_pretrained(folder)


def noise_image(height=96, width=120):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_images(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def check_preprocessing(ours, float_path, eight_bit_path, images, level):
    """Within 1e-5 of the library on float tensors, within `level`, in the mean, of the library on
    8-bit pictures, which rounds after it resizes; and differentiable.
    """
    assert ours.shape == float_path.shape == eight_bit_path.shape
    assert (ours - float_path).abs().max() < 1e-5
    assert (ours - eight_bit_path).abs().mean() < level
    (gradient,) = torch.autograd.grad(ours.square().sum(), images)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", PROCESSORS)
def test_preprocessing_is_the_processors_own(tmp_path, kind):
    processor, pixels = PROCESSORS[kind], noise_image()
    save_resnet(tmp_path)
    processor.save_pretrained(tmp_path)
    images = as_images(pixels).requires_grad_()
    ours = load_classifier(str(tmp_path), "cpu").preprocess(images)
    float_path = processor(images.detach() * 255, return_tensors="pt").pixel_values
    eight_bit_path = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    level = (eight_bit_path.max() - eight_bit_path.min()) / (pixels.max() - pixels.min())
    check_preprocessing(ours, float_path, eight_bit_path, images, level)


def test_transformers_folder(tiny_classifier):
    classifier = load_classifier(tiny_classifier, "cpu")
    assert classifier.labels == LABELS == load_labels(tiny_classifier)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    classifier(images)[:, 0].sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in classifier.model.parameters())
    pixels = noise_image(16, 16)
    inputs = AutoImageProcessor.from_pretrained(tiny_classifier)(
        Image.fromarray(pixels), return_tensors="pt"
    )
    theirs = ViTForImageClassification.from_pretrained(tiny_classifier)(**inputs).logits
    assert torch.allclose(classifier(as_images(pixels)), theirs, atol=1e-4)


def test_features_are_what_the_last_linear_layer_reads(tiny_classifier):
    classifier, images = load_classifier(tiny_classifier, "cpu"), torch.rand(2, 3, 32, 32)
    prepared = classifier.preprocess(images)
    head = ViTForImageClassification.from_pretrained(tiny_classifier).classifier
    assert torch.allclose(
        head(penultimate_features(classifier, prepared)), classifier(images), atol=1e-5
    )
    with pytest.raises(UserError, match="linear layer"):
        penultimate_features(classifier._replace(labels=["one"]), prepared)


def test_checkpoint_that_exists_only_as_bin(tiny_classifier, tmp_path):
    """The iNat and CUB classifiers on the hub may be such; the file is read as weights only,
    nothing is unpickled.
    """
    old = tmp_path / "old"
    shutil.copytree(tiny_classifier, old, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(Path(tiny_classifier) / "model.safetensors"), old / "pytorch_model.bin")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(
        load_classifier(str(old), "cpu")(images), load_classifier(tiny_classifier, "cpu")(images)
    )


def old_vit_keys(state, depth):
    """timm's VisionTransformer weights under the key names of transformers 4.26."""
    old = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        old[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[
            f"patch_embed.proj.{kind}"
        ]
        old[f"vit.layernorm.{kind}"] = state[f"fc_norm.{kind}"]
        old[f"classifier.{kind}"] = state[f"head.{kind}"]
        for i in range(depth):
            theirs, ours = f"blocks.{i}", f"vit.encoder.layer.{i}"
            parts = state[f"{theirs}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                old[f"{ours}.attention.attention.{name}.{kind}"] = part
            for name, source in (
                ("attention.output.dense", "attn.proj"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("intermediate.dense", "mlp.fc1"),
                ("output.dense", "mlp.fc2"),
            ):
                old[f"{ours}.{name}.{kind}"] = state[f"{theirs}.{source}.{kind}"]
    return {key: value.contiguous().clone() for key, value in old.items()}


def test_mean_pooled_vit_equals_timm(tmp_path):
    """iNat and CUB: timm's vit_base_patch16_224 with global_pool='avg', saved under transformers
    4.26 key names.
    """
    torch.manual_seed(0)
    reference = timm.create_model("vit_base_patch16_224", global_pool="avg", num_classes=7).eval()
    torch.nn.init.normal_(reference.head.weight, std=0.1)
    torch.nn.init.normal_(reference.fc_norm.weight, 1.0, 0.2)
    save_file(
        old_vit_keys(reference.state_dict(), 12),
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    ViTConfig(
        num_labels=7, layer_norm_eps=1e-6, architectures=["ViTForImageClassification"]
    ).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    mean_pooled, class_token_head = (
        load_classifier(name, "cpu") for name in (f"mean:{tmp_path}", str(tmp_path))
    )
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        theirs = reference(images * 2 - 1)
        assert (mean_pooled(images) - theirs).abs().max() < 1e-4
        assert (class_token_head(images) - theirs).abs().max() > 1e-2


def test_timm_model_from_disk_equals_timm(tmp_path):
    torch.manual_seed(0)
    reference = timm.create_model("resnet18", num_classes=3).eval()
    save_file(reference.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "resnet18",
                "num_classes": 3,
                "label_names": ["one", "two", "three"],
                "pretrained_cfg": {
                    "input_size": [3, 64, 64],
                    "crop_pct": 0.875,
                    "interpolation": "bicubic",
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.25, 0.25, 0.25],
                    "num_classes": 3,
                },
            }
        )
    )
    classifier = load_classifier(f"timm:local-dir:{tmp_path}", "cpu")
    assert classifier.labels == ["one", "two", "three"] == load_labels(f"timm:local-dir:{tmp_path}")
    transform = create_transform(
        **resolve_model_data_config(reference, pretrained_cfg=classifier.model.pretrained_cfg)
    )
    pixels = noise_image()
    images = as_images(pixels).requires_grad_()
    eight_bit_path = transform(Image.fromarray(pixels))[None]
    check_preprocessing(
        classifier.preprocess(images),
        transform(images.detach()),
        eight_bit_path,
        images,
        level=1 / 255 / 0.25,
    )
    with torch.no_grad():
        assert torch.allclose(classifier(images), reference(eight_bit_path), atol=2e-2)


def test_timm_says_which_models_it_knows():
    with pytest.raises(UserError, match=r"timm knows no classifier 'resnet999'"):
        load_classifier("timm:resnet999", "cpu")


def test_checkpoint_without_a_head_is_refused(tiny_classifier, tmp_path):
    state = {
        key: value
        for key, value in load_file(f"{tiny_classifier}/model.safetensors").items()
        if not key.startswith("classifier")
    }
    ViTConfig.from_pretrained(tiny_classifier).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the checkpoint lacks classifier.bias, classifier.weight"):
        load_classifier(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    "name, folder",
    [
        ("inet", "inet"),
        ("timm:resnet50", "timm_resnet50"),
        ("google/vit-base", "google_vit-base"),
        ("/a/b/my vit/", "b_my_vit"),
    ],
)
def test_folder_names(name, folder):
    assert folder_name(name) == folder


def edit_preprocessor(tiny_classifier, tmp_path, **changes) -> str:
    shutil.copytree(tiny_classifier, tmp_path / "vit")
    file = tmp_path / "vit/preprocessor_config.json"
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    return str(tmp_path / "vit")


OLD = {"do_rescale": ..., "rescale_factor": ..., "size": 16}  # as transformers 4.2x wrote it


@pytest.mark.parametrize(
    "kind",
    [
        {"image_processor_type": name}
        for name in (
            "ViTFeatureExtractor",
            "ViTFeatureExtractorFast",
            "ViTImageProcessor",
            "ViTImageProcessorFast",
        )
    ]
    + [
        {"image_processor_type": ..., "feature_extractor_type": "ViTFeatureExtractor"},
        {"image_processor_type": ...},
    ],
)
@pytest.mark.parametrize("age", [{}, OLD])
def test_every_name_of_a_processor_is_read(tiny_classifier, tmp_path, kind, age):
    images = torch.rand(2, 3, 40, 30)
    classifier = load_classifier(edit_preprocessor(tiny_classifier, tmp_path, **kind, **age), "cpu")
    assert torch.equal(classifier(images), load_classifier(tiny_classifier, "cpu")(images))


@pytest.mark.parametrize(
    "settings, size",
    [
        ({"image_processor_type": "ConvNextFeatureExtractor", "size": 384, "crop_pct": None}, 384),
        ({"image_processor_type": "ConvNextFeatureExtractor", "size": 48, "crop_pct": 0.875}, 48),
        ({"image_processor_type": "LevitFeatureExtractor", "size": 48, "do_center_crop": True}, 48),
        (
            {
                "image_processor_type": "LevitImageProcessor",
                "size": {"shortest_edge": 48},
                "crop_size": SIZE,
            },
            48,
        ),
    ],
)
def test_other_processors_of_that_age(tmp_path, settings, size):
    save_resnet(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_normalize": True,
                "do_resize": True,
                "image_mean": [0.5] * 3,
                "image_std": [0.2] * 3,
                "resample": 3,
                **settings,
            }
        )
    )
    classifier, pixels = load_classifier(str(tmp_path), "cpu"), noise_image()
    kind = getattr(
        transformers, settings["image_processor_type"].replace("FeatureExtractor", "ImageProcessor")
    )
    theirs = kind.from_pretrained(tmp_path)(
        Image.fromarray(pixels), return_tensors="pt"
    ).pixel_values
    ours = classifier.preprocess(as_images(pixels))
    assert ours.shape == theirs.shape
    if settings["image_processor_type"].startswith("ConvNext"):
        assert ours.shape[-1] == size
    assert (ours - theirs).abs().mean() < 1 / 255 / 0.2


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"size": {"height": 24, "width": 24}}, r"cannot classify an RGB picture .*24\*24"),
        ({"image_std": [0.0] * 3}, "non-finite logits|cannot classify"),
    ],
)
def test_processor_of_another_model_is_found_at_load(tiny_classifier, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        load_classifier(edit_preprocessor(tiny_classifier, tmp_path, **changes), "cpu")


def save_timm(folder, labels: list[str], channels=3):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=16, in_chans=channels)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architecture": "resnet18",
                "num_classes": 16,
                "label_names": labels,
                "model_args": {"in_chans": channels},
                "pretrained_cfg": {
                    "input_size": [channels, 64, 64],
                    "mean": [0.5] * channels,
                    "std": [0.25] * channels,
                    "num_classes": 16,
                },
            }
        )
    )
    return f"timm:local-dir:{folder}"


def test_labels_of_another_model_are_found_at_load(tmp_path):
    with pytest.raises(UserError, match=r"\[1, 16\] logits .* 10 labels"):
        load_classifier(save_timm(tmp_path, [f"label {i}" for i in range(10)]), "cpu")


def test_classifier_of_grey_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot classify an RGB picture"):
        load_classifier(save_timm(tmp_path, [f"label {i}" for i in range(16)], channels=1), "cpu")


def test_classifier_of_one_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="has one class"):
        load_classifier(save_classifier(tmp_path / "one", ["crane"]), "cpu")


@pytest.mark.parametrize(
    "numbers, right",
    [
        ([0, 1, 2, 3, 4, 6], "no class 5"),
        ([1, 2, 3], "no class 0"),
        ([0, 2, 5], "no class 1"),
        ([], "names no classes"),
    ],
)
def test_labels_with_a_gap(tiny_classifier, tmp_path, numbers, right):
    shutil.copytree(tiny_classifier, tmp_path / "vit")
    file = tmp_path / "vit" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "id2label": {i: f"label {i}" for i in numbers}})
    )
    with pytest.raises(UserError, match=f"{tmp_path}/vit.*{right}"):
        load_labels(str(tmp_path / "vit"))


def test_the_runs_own_size_is_tried(tiny_classifier, tmp_path):
    name = edit_preprocessor(tiny_classifier, tmp_path, do_resize=False)
    load_classifier(name, "cpu", 16, 16)
    with pytest.raises(UserError, match=r"cannot classify an RGB picture .*32\*32"):
        load_classifier(name, "cpu", 32, 32)


def test_timm_weights_that_do_not_arrive_are_named(tmp_path):
    name = save_timm(tmp_path, [f"label {i}" for i in range(16)])
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if key != "fc.weight"},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match="fc.weight"):
        load_classifier(name, "cpu")


def test_weights_of_timm_are_known_by_their_files(tmp_path):
    name = save_timm(tmp_path, [f"label {i}" for i in range(16)])
    assert "model.safetensors" in list_checkpoint_files(resolve_name(name)[1])
    with pytest.raises(UserError, match="is timm's: write timm:local-dir"):
        load_classifier(str(tmp_path), "cpu")


def test_counters_that_nothing_reads_may_be_missing(tmp_path):
    save_resnet(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 48}).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if "num_batches" not in key},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    load_classifier(str(tmp_path), "cpu")


def test_memory_that_runs_out_is_no_misfit(tiny_classifier):
    def run_out(model, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        check_classifier(
            load_classifier(tiny_classifier, "cpu")._replace(compute_logits=run_out), "vit", 64, 64
        )


def test_imagenets_labels_are_those_of_timm():
    info = ImageNetInfo("imagenet-1k")
    assert IMAGENET_LABELS.read_text(encoding="utf-8").splitlines() == [
        info.index_to_description(i) for i in range(1000)
    ]


@pytest.mark.parametrize("name", ["miniature", "miniature_evaluator"])
def test_labels_from_files_are_those_of_the_loaded_model(name):
    assert find_labels(name) == load_labels(name) == load_classifier(name, "cpu").labels


def test_labels_that_only_loading_tells(tmp_path):
    assert (
        find_labels("timm:resnet50")
        == find_labels("nobody/nothing")
        == find_labels(str(tmp_path))
        == []
    )


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_classifier_of_several_labels_per_picture_is_refused(tiny_classifier, tmp_path, problem):
    """Its logits are no softmax's; before torch is imported, and by whoever loads it."""
    shutil.copytree(tiny_classifier, tmp_path / "vit")
    config = json.loads((tmp_path / "vit/config.json").read_text())
    (tmp_path / "vit/config.json").write_text(json.dumps({**config, "problem_type": problem}))
    for use in (load_classifier, lambda name, _: find_labels(name)):
        with pytest.raises(UserError, match=f"is for {problem}"):
            use(str(tmp_path / "vit"), "cpu")
    (tmp_path / "vit/config.json").write_text(
        json.dumps({**config, "problem_type": "single_label_classification"})
    )
    assert load_classifier(str(tmp_path / "vit"), "cpu").labels == LABELS
