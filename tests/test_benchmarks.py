"""The benchmarks compare like with like: the plain loop takes our steps, and every figure is of the right calls."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import yaml

import class_token
from benchmarks import plain_loop, updates
from classifiers import load_classifier
from diffusion import load_components
from learner import Job
from prompt_datasets import class_name
from tests.conftest import LABELS
from training import train_tokens
from utils import write_json


@pytest.mark.parametrize("changes", [{}, {"train_timesteps": [999, 600], "fresh_noise": True}])
def test_the_plain_loop_takes_our_steps(tiny_config, tiny_model, components, tmp_path, changes):
    config = replace(tiny_config, lr=0.02, num_train_epochs=4, **changes)
    classifier = load_classifier(config.classifier, "cpu")
    name = class_name(LABELS[2])
    loop = plain_loop.train(config, load_components(tiny_model, "cpu", torch.float32), classifier, 2, name,
                            tmp_path / "plain")
    plain = [next(loop) for _ in range(4)]
    job = Job(2, name, tmp_path / "tokens", tmp_path / "images")
    token_id = class_token.add_placeholder(components.tokenizer, config.placeholder_token)
    (_, ours), = train_tokens(config, components, token_id, classifier, iter([job]))
    losses = [json.loads(line)["loss"] for line in (job.tokens / "history.jsonl").read_text().splitlines()]
    assert [loss for loss, _ in plain] == pytest.approx(losses, rel=1e-4)
    assert (torch.stack([vector for _, vector in plain]) - ours.vectors).abs().max() < 1e-4
    saved = load_components(str(tmp_path / "plain"), "cpu", torch.float32)
    table = saved.text_encoder.get_input_embeddings().weight
    least = ours.vectors[losses.index(min(losses))]
    assert (table[saved.tokenizer.convert_tokens_to_ids("newclas")] - least).abs().max() < 1e-4
    assert torch.equal(table[:-1], components.text_encoder.get_input_embeddings().weight)


def test_the_cost_table(tiny_config, tmp_path):
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
    assert paper["unet_images"] == 5 * (2 * 4 + 1)  # PNDM makes four steps of three; the graph is made anew
    assert ours["floor_seconds"] == eight["floor_seconds"] < paper["floor_seconds"]
    assert all(0 <= row["share_outside_networks"] < 1 for row in rows.values())
    assert ours["bytes_a_class"] < 20_000 < plain["bytes_a_class"]
    line, = [line for line in (tmp_path / "cost.md").read_text().splitlines() if line.startswith(f"| {ours['name']} |")]
    assert line.endswith(f"| 4 | {4 * ours['seconds_per_update']:.3g} |")


def test_updates_to_accuracy(tmp_path):
    jobs = [Job(i, "crane", tmp_path / f"{i}", tmp_path) for i in range(3)]
    for job, shares in zip(jobs, ([0.5, 0.8, 0.9], [0.1, 0.2, 0.3], [0.4, 1.0]), strict=True):
        write_json(job.tokens / "accuracy.json",
                   {"updates": 9, "accuracies": {2 * i: share for i, share in enumerate(shares)}})
    assert updates.summary(jobs) == {"median": 4, "classes": [4, None, 2], "updates": [9, 9, 9]}
    assert updates.summary(jobs[1:2])["median"] == "not reached"


def test_nine_of_ten_are_nine_tenths(tiny_config, monkeypatch):
    monkeypatch.setattr(updates, "embed", lambda *_: None)
    monkeypatch.setattr(updates, "draw_some", lambda *_: torch.zeros(10, 3, 8, 8))
    logits = torch.eye(3)[[2] * 9 + [0]]
    models = None, 0, None, lambda pictures: logits
    job = Job(2, "crane", None, None)
    assert updates.accuracy(replace(tiny_config, test_size=10), models, job, torch.zeros(4)) == 0.9
