"""Values of the miniature from before the code moved into rooms: gradients, a token, latents,
pictures, metrics.

They were computed by the earlier code with the same libraries' preprocessing. Another processor or
torch rounds otherwise, and optimiser steps magnify it: there the values must agree to 1 %.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from method.class_training import ClassTraining, TrainingSettings
from method.losses import cross_entropy
from method.update import join_batches, token_gradient
from models.classifiers import load_classifier
from models.generator import load_generator
from models.sampling import SamplingSettings
from prompt_datasets import target_class
from run import main
from tokens.class_token import load_token

FOLDER = Path(__file__).parent / "golden"
VALUES = load_file(FOLDER / "golden.safetensors")
RECORD = json.loads((FOLDER / "golden.json").read_text())
SAME_MACHINE = (RECORD["cpu"], RECORD["torch"]) == (
    torch.backends.cpu.get_cpu_capability(),
    torch.__version__,
)
TOLERANCE = 1e-6 if SAME_MACHINE else 1e-2
SHORT = TrainingSettings(
    "newclas", "a", None, 80, 16, 3, 0.96, 15, 5e-3, (0.9, 0.999), 1e-2, 1e-8, 1.0, 1000, True
)
LOOPS = {
    "short": (SHORT, (999, 800, 600)),
    "paper": (SHORT._replace(epoch_size=5, fresh_noise=False), None),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def generator():
    loaded = load_generator("miniature/weights/generator", "cpu", torch.float32)
    loaded.set_placeholder("newclas")
    return loaded


def assert_equal(ours: torch.Tensor, key: str):
    assert (ours.float() - VALUES[key].float()).norm() <= TOLERANCE * VALUES[key].float().norm()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("index, name", [(1, "crane"), (6, "jaguar")])
def test_gradients(generator, tmp_path, loop, index, name):
    settings, timesteps = LOOPS[loop]
    trainer = ClassTraining(
        target_class(index, name, name),
        generator.initial_vectors("a"),
        settings,
        generator.dtype,
        tmp_path / "history",
        tmp_path / "state",
        tmp_path / "images",
    )
    batch, vectors = join_batches([trainer], generator.device)
    losses, correct = token_gradient(
        generator,
        cross_entropy(load_classifier("miniature", "cpu")),
        vectors,
        batch,
        SamplingSettings(64, 64, 3.0, 30, timesteps),
        batch_size=40,
    )
    assert_equal(trainer.vectors.grad[0], f"gradient/{loop}/{index + 1}")
    assert_equal(torch.stack([losses.mean(), correct.mean()]), f"loss/{loop}/{index + 1}")


def test_token_and_metrics(tmp_path):
    """Twelve updates of class 7 and their evaluation, by the command itself."""
    assert (
        main(
            [
                "--config",
                "configs/miniature.yml",
                "--class_index",
                "7",
                "--train",
                "True",
                "--evaluate",
                "True",
                "--num_train_epochs",
                "12",
                "--target_accuracy",
                "1",
                "--test_size",
                "8",
                "--controls",
                "True",
                "--lr",
                "0.005",
                "--epoch_size",
                "16",
                "--train_timesteps",
                "999",
                "800",
                "600",
                "--train_guidance_scale",
                "none",
                "--eval_prompts",
                "A painting of a {}",
                "--output_path",
                str(tmp_path),
            ]
        )
        == 0
    )
    token = next(tmp_path.rglob("learned_embeds.safetensors"))
    assert_equal(load_token(token).vectors[0], "token")
    history = [
        json.loads(line) for line in token.with_name("history.jsonl").read_text().splitlines()
    ]
    assert_equal(torch.tensor([line["loss"] for line in history]), "losses")
    metrics = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    for condition in ("without", "with", "untrained", "random"):
        for role, before in RECORD["metrics"][condition].items():
            assert metrics["conditions"][condition][role]["right"] == before["right"]
            assert metrics["conditions"][condition][role]["accuracy"]["low"] == pytest.approx(
                before["accuracy"]["low"]
            )
            assert metrics["conditions"][condition][role][
                "mean_target_probability"
            ] == pytest.approx(before["mean_target_probability"], rel=1e-4, abs=1e-4)
    assert metrics["mcnemar_p"] == pytest.approx(RECORD["metrics"]["mcnemar_p"])
    kept = metrics["contexts"]["A painting of a {}"]["context_kept"]["with"]["value"]
    assert (
        kept == RECORD["metrics"]["contexts"]["A painting of a {}"]["context_kept"]["with"]["value"]
    )
    distances = json.loads(next(tmp_path.rglob("summary_demo.json")).read_text())["distribution"]
    for condition in ("without", "with", "real"):
        for measure in ("fid", "kid", "precision", "recall", "density", "coverage"):
            assert distances[condition][measure] == pytest.approx(
                RECORD["distribution"][condition][measure], rel=max(1e-4, TOLERANCE), abs=1e-4
            )


def test_latents_and_pictures(generator):
    with torch.no_grad():
        cond = torch.cat(
            [
                generator.encode(["A photo of a jaguar"]).expand(4, -1, -1),
                generator.encode(
                    ["A photo of a newclas jaguar"], VALUES["token"][None, None]
                ).expand(4, -1, -1),
            ]
        )
        latents = generator.sample(cond, [0, 1, 2, 3] * 2, SamplingSettings(64, 64, 3.0, 30))
        assert_equal(latents, "latents")
        pixels = (generator.decode(latents) * 255).round()
    assert (pixels - VALUES["pictures"].float()).abs().max() <= 1
