"""What classifiers see in the pictures, against transformers' own code and by hand."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from evaluation.accuracy import accuracy_table, judge_images, measure_context
from evaluation.metrics import ClassMetrics, Judgement, PromptMetrics, load_metrics, save_metrics
from evaluation.statistics import Proportion, count_right
from miniature import world
from models.classifiers import load_classifier
from system.text_files import read_json
from tests.conftest import error_of, flags
from utils import UserError, write_json


def test_judging_equals_transformers_own(tiny_classifier, tmp_path):
    """Accuracy, certainty and what is seen instead, against the checkpoint's own processor and
    model.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    pictures, files = (
        [Image.fromarray(array) for array in pixels],
        [tmp_path / f"{i}.png" for i in range(12)],
    )
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    inputs = ViTImageProcessor.from_pretrained(tiny_classifier)(pictures, return_tensors="pt")
    model = ViTForImageClassification.from_pretrained(tiny_classifier)
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(1)
    seen = probabilities.argmax(1)
    target = seen.mode().values.item()
    judged = judge_images(load_classifier(tiny_classifier, "cpu"), files, target)
    assert judged.right == (seen == target).tolist() and 0 < sum(judged.right) < 12
    assert judged.accuracy.value == pytest.approx((seen == target).float().mean().item())
    assert judged.top5.value == 1  # it has five classes
    assert judged.mean_target_probability == pytest.approx(
        probabilities[:, target].mean().item(), abs=1e-5
    )
    assert judged.predicted_instead == Counter(
        f"{i + 1} ({model.config.id2label[i]})" for i in seen[seen != target].tolist()
    )


def test_contexts_are_judged_by_the_world(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        world.draw(0, random.Random(i), "at night" if i else None).save(file)
    kept = measure_context("miniature.world:context_of", "A photo of a {} at night", files)
    assert kept == Proportion(3, 4)


def judgement(right: list[int], top5: int) -> Judgement:
    right = [bool(part) for part in right]
    return Judgement(
        accuracy=count_right(right),
        top5=Proportion(top5, len(right)),
        mean_target_probability=0.5,
        predicted_instead={"9 (other)": right.count(False)},
        right=right,
    )


def metrics_of(number: int, without: Judgement, with_token: Judgement) -> ClassMetrics:
    conditions = {"without": {"classifier": without}, "with": {"classifier": with_token}}
    in_prompt = PromptMetrics(conditions, {"classifier": 0.5}, {"with": Proportion(1, 4)})
    return ClassMetrics(
        class_index=number,
        label=f"class {number}",
        classes=10,
        images=4,
        judges={"classifier": "vit"},
        conditions=conditions,
        mcnemar_p={"classifier": 0.5},
        contexts={"{} at night": in_prompt},
        film=[],
        held_out=True,
        settings={"lr": 0.1},
        pictures="digest",
        evaluation="digest",
        list_of_classes="digest",
    )


def test_the_table_pools_all_classes():
    """Two classes of four pictures: right 1 + 2 of 8 without, 4 + 3 with; top 5 as stored; five
    gained, one lost.
    """
    metrics = [
        metrics_of(1, judgement([1, 0, 0, 0], 2), judgement([1, 1, 1, 1], 4)),
        metrics_of(2, judgement([1, 1, 0, 0], 3), judgement([1, 0, 1, 1], 4)),
    ]
    lines = {row[1]: row[2] for row in accuracy_table(metrics).rows}
    assert lines["class 1"] == "0.25 -> 1.00"
    assert lines["all"].startswith("0.38 [0.14, 0.69] -> 0.88 [0.53, 0.98]")
    assert (
        lines["all, in the top 5"].startswith("0.62 [")
        and " -> 1.00 [" in lines["all, in the top 5"]
    )
    assert lines["put right, put wrong"] == "5 and 1, p = 0.22"


def test_metrics_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.json"
    metrics = metrics_of(3, judgement([1, 0, 0, 0], 2), judgement([1, 1, 1, 1], 4))
    save_metrics(path, metrics)
    assert load_metrics(path) == metrics
    stored = read_json(path)
    for broken in (
        {"conditions": {"with": {"classifier": {"accuracy": 1}}}},
        {"contexts": {"{} at night": {}}},
    ):
        write_json(path, {**stored, **broken})
        with pytest.raises(UserError, match=r"metrics.json' is broken"):
            load_metrics(path)


def test_metrics_of_an_earlier_version_are_read(tmp_path):
    """Which has the conditions beside the rest, and no digest of the classes."""
    path = tmp_path / "metrics.json"
    metrics = metrics_of(3, judgement([1, 0, 0, 0], 2), judgement([1, 1, 1, 1], 4))
    save_metrics(path, metrics)
    stored = read_json(path)
    for part in (stored, stored["contexts"]["{} at night"]):
        part |= part.pop("conditions")
    del stored["list_of_classes"], stored["nearest_words"]
    write_json(path, stored)
    assert load_metrics(path) == replace(metrics, list_of_classes=None)


def raise_error(image):
    raise LookupError("no such context")


def count_pixels(image) -> int:
    return image.width * image.height


@pytest.mark.parametrize(
    "name, reason",
    [
        ("raise_error", "LookupError no such context"),
        ("count_pixels", "returns int"),
    ],
)
def test_a_context_judge_is_tried_before_any_work(tiny_config, tmp_path, capsys, name, reason):
    line = error_of(
        capsys,
        *flags(
            tiny_config,
            class_index=3,
            train=True,
            evaluate=True,
            context_judge=f"{__name__}:{name}",
        ),
    )
    assert reason in line and not list(tmp_path.rglob("config.yml"))
