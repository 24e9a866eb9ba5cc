"""CLIP and SigLIP over a list of words against their own logits_per_image; what is refused; a run
of the command.
"""

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torchvision.transforms.functional import to_tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from command_line import parse_settings
from miniature import world
from models.classifiers import load_classifier, load_labels, penultimate_features
from models.extractors import load_extractor
from models.labels import folder_name, read_labels, resolve_name
from models.zero_shot import TEMPLATES, load_zero_shot
from run import main
from runs.evaluation import Evaluation
from runs.session import Session
from tests.conftest import LABELS, error_of, flags, save_tokenizer
from utils import UserError

SIZE = {"height": 16, "width": 16}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,-:/"


def save_clip(folder: Path):
    """A tiny random CLIP in the published layout."""
    torch.manual_seed(0)
    size = save_tokenizer(folder)
    text = {**TOWER, "vocab_size": size, "max_position_embeddings": 40, "eos_token_id": size - 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=1.0)
    model.save_pretrained(folder)
    CLIPImageProcessor(size=SIZE, crop_size=SIZE).save_pretrained(folder)


def save_siglip(folder: Path):
    """A tiny random SigLIP in the published layout, with a tokenizer of letters."""
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.normalizer, letters.pre_tokenizer = (
        normalizers.Lowercase(),
        pre_tokenizers.Split("", "isolated"),
    )
    letters.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=64,
        model_input_names=["input_ids"],
    ).save_pretrained(folder)
    model = SiglipModel(
        SiglipConfig(
            text_config={
                **TOWER,
                "vocab_size": len(vocabulary),
                "max_position_embeddings": 64,
                "projection_size": 32,
            },
            vision_config=VISION,
        )
    )
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=1.0)
    torch.nn.init.constant_(model.logit_scale, 2.0)
    torch.nn.init.constant_(model.logit_bias, -3.0)
    model.save_pretrained(folder)
    SiglipImageProcessor(size=SIZE).save_pretrained(folder)


SAVE = {"clip": save_clip, "siglip": save_siglip}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("zero_shot")
    for kind, save_model in SAVE.items():
        save_model(folder / kind)
    return {kind: str(folder / kind) for kind in SAVE}


@pytest.fixture
def names(tmp_path) -> Path:
    return write_names(tmp_path / "names.txt", *LABELS)


def write_names(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def tokenize_texts(source: str, texts: list[str]):
    padding = "max_length" if "siglip" in source else True
    return AutoTokenizer.from_pretrained(source)(texts, padding=padding, return_tensors="pt")


@pytest.mark.parametrize("kind", SAVE)
def test_logits_are_the_librarys(checkpoints, kind):
    source, pixels = (
        checkpoints[kind],
        np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8),
    )
    labels, model, preprocess, compute_logits = load_zero_shot(
        source, LABELS, "cpu", templates=("a photo of {}.",)
    )
    ours = compute_logits(
        model, preprocess(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    )
    processor = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}[kind].from_pretrained(
        source
    )
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(source)(
            **processor([Image.fromarray(picture) for picture in pixels], return_tensors="pt"),
            **tokenize_texts(source, [f"a photo of {label}." for label in LABELS]),
        ).logits_per_image
    assert labels == LABELS and ours.shape == (3, 5) and (ours - theirs).abs().max() < 1e-4
    # of the words and the pictures
    assert theirs.std(dim=1).min() > 1e-2 and theirs.std(dim=0).min() > 1e-3


@pytest.mark.parametrize("kind", SAVE)
def test_templates_are_an_ensemble(checkpoints, names, kind):
    classifier = load_classifier(f"zero-shot:{checkpoints[kind]}", "cpu", labels_file=str(names))
    reference, images = AutoModel.from_pretrained(checkpoints[kind]), torch.rand(2, 3, 16, 16)
    prepared = classifier.preprocess(images)
    with torch.no_grad():
        features = sum(
            F.normalize(
                reference.get_text_features(
                    **tokenize_texts(
                        checkpoints[kind], [template.format(label) for label in LABELS]
                    )
                ).pooler_output
            )
            for template in TEMPLATES
        )
        pictures = F.normalize(reference.get_image_features(pixel_values=prepared).pooler_output)
        logits = reference.logit_scale.exp() * pictures @ F.normalize(features).T + getattr(
            reference, "logit_bias", 0
        )
        assert (classifier(images) - logits).abs().max() < 1e-4
        assert torch.allclose(penultimate_features(classifier, prepared), pictures, atol=1e-6)


def test_siglip_reads_small_letters(checkpoints):
    weights = [
        load_zero_shot(checkpoints["siglip"], labels, "cpu")[1]["head"].weight
        for labels in (["Tiger Cat", "OWL"], ["tiger cat", "owl"])
    ]
    assert torch.equal(*weights)


@pytest.mark.parametrize("kind", SAVE)
def test_it_guides_and_is_frozen(checkpoints, names, kind):
    classifier = load_classifier(
        f"zero-shot:{checkpoints[kind]}", "cpu", 32, 40, labels_file=str(names)
    )
    # no text any more
    assert classifier.labels == LABELS and not hasattr(classifier.model["encoder"], "text_model")
    assert not any(parameter.requires_grad for parameter in classifier.model.parameters())
    assert not classifier.model.training
    images = torch.rand(2, 3, 32, 40, requires_grad=True)
    F.cross_entropy(classifier(images), torch.tensor([0, 3])).backward()
    assert images.grad.isfinite().all() and images.grad.flatten(1).any(dim=1).all()


def test_labels_are_read_without_weights(names):
    names.write_text("\ufeff" + names.read_text().replace("\n", "\r\n\r\n  "), encoding="utf-8")
    assert load_labels("zero-shot:no/such-model", str(names)) == LABELS
    assert resolve_name("zero-shot:no/such-model") == ("zero-shot", "no/such-model")
    assert (
        folder_name("zero-shot:openai/clip-vit-base-patch32")
        == "zero-shot_openai_clip-vit-base-patch32"
    )


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "holds no labels"),
        (b"\n \n", "holds no labels"),
        (b"crane\n", "holds 1 label"),
        (b"crane\n\nowl\n Crane\n", "line 4: 'Crane' is already on line 1"),
        (b"crane\nowl\x1b[2J\n", "line 2 has unprintable characters"),
        (b"\x89PNG\xff", "is not a text file in UTF-8"),
    ],
)
def test_wrong_labels(tmp_path, content, reason):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_labels(str(tmp_path / "names.txt"))
    assert str(tmp_path / "names.txt") in str(error.value)


@pytest.mark.parametrize("kind", SAVE)
def test_label_that_is_too_long(checkpoints, tmp_path, kind):
    names = write_names(tmp_path / "names.txt", "crane", "crane " * 40)
    with pytest.raises(
        UserError, match=r"'crane crane .*' is too long: .* tokens, and the text model reads \d+"
    ):
        load_classifier(f"zero-shot:{checkpoints[kind]}", "cpu", labels_file=str(names))


def test_other_models_are_refused(tiny_classifier, names):
    with pytest.raises(UserError, match="clip or siglip, and '.*' is of type 'vit'"):
        load_classifier(f"zero-shot:{tiny_classifier}", "cpu", labels_file=str(names))
    with pytest.raises(UserError, match="needs --labels names.txt"):
        load_classifier(f"zero-shot:{tiny_classifier}", "cpu")
    with pytest.raises(UserError, match="cannot open 'zero-shot:no/such-model'"):
        load_classifier("zero-shot:no/such-model", "cpu", labels_file=str(names))


def test_tokenizer_of_other_packages(checkpoints, names, tmp_path):
    """SigLIP's published one is SentencePiece's."""
    if find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    shutil.copytree(checkpoints["siglip"], tmp_path / "siglip")
    file = tmp_path / "siglip/tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "tokenizer_class": "SiglipTokenizer"})
    )
    with pytest.raises(UserError, match="needs other packages: pip install sentencepiece protobuf"):
        load_classifier(f"zero-shot:{tmp_path / 'siglip'}", "cpu", labels_file=str(names))


def test_every_weight_must_arrive(checkpoints, names, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(checkpoints["clip"], folder)
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the checkpoint lacks visual_projection.weight"):
        load_classifier(f"zero-shot:{folder}", "cpu", labels_file=str(names))


def test_features_of_pictures(checkpoints, names):
    extractor = load_extractor(f"zero-shot:{checkpoints['clip']}", "cpu", "clean", str(names))
    pictures = torch.stack(
        [extractor.prepare(torch.full((3, 40, 50), value).byte()) for value in (10, 200)]
    )
    features = extractor.extract_features(pictures)
    assert features.shape == (2, 24) and torch.allclose(features.norm(dim=1), torch.ones(2))


@pytest.fixture
def zero_shot_flags(tiny_config, checkpoints, names):
    tiny_config.classifier = f"zero-shot:{checkpoints['clip']}"
    return flags(tiny_config, labels=names)


def test_a_run_of_the_command(capsys, zero_shot_flags, checkpoints, names, tmp_path):
    assert main([*zero_shot_flags, "--list_classes"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "    3  tiger cat"
    argv = [
        *zero_shot_flags,
        "--class_index",
        "3",
        "--train",
        "True",
        "--num_train_epochs",
        "1",
        "--evaluate",
        "True",
        "--evaluator",
        f"zero-shot:{checkpoints['siglip']}",
    ]
    assert main(argv) == 0
    metrics_file = next(tmp_path.rglob("metrics.json"))
    metrics = json.loads(metrics_file.read_text())
    assert metrics["class_index"] == 3 and set(metrics["conditions"]["with"]) == {
        "classifier",
        "evaluator",
    }
    token, written = (
        next(tmp_path.rglob("learned_embeds.safetensors")),
        metrics_file.stat().st_mtime_ns,
    )
    assert (token.parent / "labels.txt").read_text().split("\n") == [*LABELS, ""]
    assert main(argv) == 0 and metrics_file.stat().st_mtime_ns == written
    shutil.copy(names, tmp_path / "same.txt")
    assert main([*argv, "--labels", str(tmp_path / "same.txt")]) == 0  # the same words
    assert main(["--config", str(token.parent / "config.yml")]) == 0
    assert metrics_file.stat().st_mtime_ns == written
    names.write_text(names.read_text() + "owl\n")
    assert "was trained with the labels of '" in error_of(capsys, *argv)
    assert main([*argv, "--train", "False"]) == 0
    assert "trained with the labels of" in capsys.readouterr().err
    assert metrics_file.stat().st_mtime_ns != written


def test_other_labels_under_one_exp_id(capsys, zero_shot_flags, tmp_path):
    argv = [*zero_shot_flags, "--class_index", "3", "--train", "True", "--num_train_epochs", "1"]
    assert main(argv) == 0
    other = write_names(tmp_path / "other.txt", "owl", *LABELS[1:])
    assert "give a new --exp_id" in error_of(capsys, *argv, "--labels", other)
    assert main([*argv, "--labels", str(other), "--skip_exists", "False"]) == 0
    assert "owl" in next(tmp_path.rglob("pipeline_token/**/labels.txt")).read_text()


def test_content_of_the_labels_decides_an_evaluation(tiny_config, checkpoints, names):
    tiny_config.classifier, tiny_config.labels = f"zero-shot:{checkpoints['clip']}", str(names)
    before = Evaluation(Session(tiny_config)).digest_evaluation([])
    assert Evaluation(Session(tiny_config)).digest_evaluation([]) == before
    names.write_text(names.read_text().replace("7/8: odd", "odd"))
    assert Evaluation(Session(tiny_config)).digest_evaluation([]) != before


def test_labels_where_they_belong(capsys, tiny_config, zero_shot_flags, checkpoints, names):
    asked, more = ["--class_index", "3", "--train", "True"], ["--labels", str(names)]
    assert f"classifier '{tiny_config.classifier}': give --labels names.txt" in error_of(
        capsys, *zero_shot_flags, *asked, "--labels", "none"
    )
    assert "no file 'nowhere.txt'" in error_of(
        capsys, *zero_shot_flags, *asked, "--labels", "nowhere.txt"
    )
    for extra in (asked, ["--list_classes"]):
        assert "has labels of its own" in error_of(
            capsys, *zero_shot_flags, *extra, "--classifier", "miniature", *more
        )
    evaluator = f"zero-shot:{checkpoints['clip']}"
    assert f"evaluator '{evaluator}': give --labels" in error_of(
        capsys,
        *zero_shot_flags,
        *asked,
        "--classifier",
        "miniature",
        "--evaluator",
        evaluator,
        "--labels",
        "none",
    )


def test_the_miniatures_clip_knows_its_world():
    """By words alone, on drawings that it was not trained on."""
    config, _ = parse_settings(["--config", "configs/miniature_zero_shot.yml"])
    classifier = load_classifier(config.classifier, "cpu", labels_file=config.labels)
    assert classifier.labels == list(world.LABELS)
    drawings = torch.stack(
        [to_tensor(world.draw(i % 16, random.Random(f"new {i}"))) for i in range(160)]
    )
    with torch.no_grad():
        right = classifier(drawings).argmax(1) == torch.arange(160) % 16
    assert right.float().mean() > 0.95
