"""The benchmarks compare like with like: the plain loop takes our steps, and every figure is of the right calls."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from benchmarks import updates
from benchmarks.plain_loop import train_token
from method.losses import classifier_loss
from models.classifiers import load_classifier
from tests.method.conftest import PAPER, SETTINGS, SHORT, make_trainer, open_generator, read_history, train_one
from utils import write_json


def open_pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None,
                                                   feature_extractor=None)


@pytest.mark.parametrize("sampling, fresh_noise", [(PAPER, False), (SHORT, True)])
def test_plain_loop_takes_our_steps(tiny_model, tiny_classifier, tmp_path, sampling, fresh_noise):
    classifier, changes = load_classifier(tiny_classifier, "cpu"), {"lr": 0.02, "fresh_noise": fresh_noise}
    generator = open_generator(tiny_model, torch.float32)
    ours = train_one(generator, classifier_loss(classifier), tmp_path, sampling=sampling, num_train_epochs=4, **changes)
    losses = [line["loss"] for line in read_history(tmp_path)]
    loop = train_token(open_pipeline(tiny_model), classifier, make_trainer(generator, tmp_path / "target").target,
                       SETTINGS._replace(**changes), sampling, tmp_path / "plain")
    plain = [next(loop) for _ in range(4)]
    assert [loss for loss, _ in plain] == pytest.approx(losses, rel=1e-4)
    assert (torch.stack([vector for _, vector in plain])[:, None] - ours.every_update).abs().max() < 1e-4
    saved = open_pipeline(tmp_path / "plain")
    table = saved.text_encoder.get_input_embeddings().weight
    least = ours.every_update[losses.index(min(losses))]
    assert (table[saved.tokenizer.convert_tokens_to_ids("newclas")] - least).abs().max() < 1e-4
    assert torch.equal(table[:-1], generator.text_encoder.get_input_embeddings().weight)


def test_cost_table(tiny_config, tmp_path):
    settings = replace(tiny_config, train=False, class_index="", train_timesteps=[999, 600], epoch_size=3)
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump({k: v for k, v in asdict(settings).items() if v is not None}))
    write_json(tmp_path / "updates.json", {"settings": {"[999, 600] 3": {"median": 4}}})
    done = subprocess.run([sys.executable, "-m", "benchmarks.cost", "--config", tmp_path / "tiny.yml", "--updates", "1",
                           "--rounds", "1", "--out", tmp_path / "cost"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "cost.json").read_text())["rows"]}
    plain, ours, eight = (rows[name] for name in rows if "short trajectory, 3 images" in name)
    paper = rows["ours, paper's trajectory, 5 images"]
    assert (plain["unet_images"], ours["unet_images"], eight["unet_images"]) == (12, 15, 15)
    assert paper["unet_images"] == 5 * (2 * 4 + 1)  # PNDM makes four steps of three; the graph is made again
    assert ours["floor_seconds"] == eight["floor_seconds"] < paper["floor_seconds"]
    assert ours["bytes_per_class"] < 20_000 < plain["bytes_per_class"]
    line, = [line for line in (tmp_path / "cost.md").read_text().splitlines() if line.startswith(f"| {ours['name']} |")]
    assert line.endswith(f"| 4 | {4 * ours['seconds_per_update']:.3g} |")


def test_updates_to_accuracy(tmp_path):
    folders = [tmp_path / str(i) for i in range(3)]
    for folder, shares in zip(folders, ([0.5, 0.8, 0.9], [0.1, 0.2, 0.3], [0.4, 1.0]), strict=True):
        write_json(folder / "accuracy.json",
                   {"updates": 9, "accuracies": {2 * i: share for i, share in enumerate(shares)}})
    assert updates.summarise_classes(folders) == {"median": 4, "classes": [4, None, 2], "updates": [9, 9, 9]}
    assert updates.summarise_classes(folders[1:2])["median"] == "not reached"


def test_nine_of_ten_are_nine_tenths():
    generator = SimpleNamespace(device="cpu", encode=lambda prompts, vectors: vectors,
                                sample=lambda cond, seeds, sampling: cond, decode=lambda latents: latents)
    logits = torch.eye(3)[[2] * 9 + [0]]
    found = updates.judge_updates(generator, lambda images: logits, "a crane", index=2, sampling=SHORT,
                                  vectors=torch.zeros(6, 1, 4), every=3)
    assert found == {0: 0.9}
