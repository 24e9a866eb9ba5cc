"""The page on which a reader meets the paper takes the same steps as the fast update."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from method.losses import cross_entropy
from method.plain_loop import train_token
from models.classifiers import load_classifier
from tests.method.conftest import (
    PAPER,
    SETTINGS,
    SHORT,
    make_training,
    open_generator,
    read_history,
    train_one,
)


def open_pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
    )


@pytest.mark.parametrize(
    "sampling, fresh_noise",
    [(PAPER, False), (SHORT, True), (SHORT._replace(guidance_scale=1.0), False)],
)
def test_plain_loop_takes_our_steps(tiny_model, tiny_classifier, tmp_path, sampling, fresh_noise):
    classifier, changes = (
        load_classifier(tiny_classifier, "cpu"),
        {
            "lr": 0.02,
            "fresh_noise": fresh_noise,
        },
    )
    generator = open_generator(tiny_model, torch.float32)
    ours = train_one(
        generator,
        cross_entropy(classifier),
        tmp_path,
        sampling=sampling,
        num_train_epochs=4,
        **changes,
    )
    losses = [line["loss"] for line in read_history(tmp_path)]
    pipeline = open_pipeline(tiny_model)
    loop = train_token(
        pipeline,
        classifier,
        make_training(generator, tmp_path / "target").target,
        SETTINGS._replace(**changes),
        sampling,
    )
    plain = [next(loop) for _ in range(4)]
    assert [loss for loss, _ in plain] == pytest.approx(losses, rel=1e-4)
    assert (
        torch.stack([vector for _, vector in plain])[:, None] - ours.every_update
    ).abs().max() < 1e-4
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(
        table[:-1], generator.prompt_encoders[0].text_encoder.get_input_embeddings().weight
    )
