"""A tiny generator that knows the placeholder, a loss that judges its images, and trainings that
share them.
"""

import json
from pathlib import Path

import pytest
import torch

from method.class_training import ClassTraining, DivergenceError, TrainingSettings
from method.losses import cross_entropy
from method.update import compute_gradients, fit_token_gradient
from models.classifiers import load_classifier
from models.generator import load_generator
from models.sampling import SamplingSettings
from prompt_datasets import class_name, target_class
from tests.conftest import LABELS

PAPER = SamplingSettings(height=32, width=32, guidance_scale=7.0, num_inference_steps=3)
SHORT = PAPER._replace(timesteps=(999, 600))
SETTINGS = TrainingSettings(
    placeholder_token="newclas",
    initializer_token="a",
    num_vectors=None,
    num_train_epochs=3,
    epoch_size=5,
    number_of_prompts=3,
    target_accuracy=1.0,
    early_stopping=15,
    lr=1.25e-3,
    betas=(0.9, 0.999),
    weight_decay=1e-2,
    eps=1e-8,
    max_grad_norm=1.0,
    seed=35,
    fresh_noise=False,
)


@pytest.fixture
def generator(tiny_model):
    return open_generator(tiny_model, torch.float32)


@pytest.fixture
def loss_fn(tiny_classifier):
    return cross_entropy(load_classifier(tiny_classifier, "cpu"))


def open_generator(model, dtype):
    generator = load_generator(model, "cpu", dtype)
    generator.set_placeholder("newclas")
    return generator


def make_training(generator, folder: Path, index: int = 2, vectors=None, **changes):
    """The training of class `index` (from 0), whose files are below folder/index."""
    target, folder = (
        target_class(index, class_name(LABELS[index]), LABELS[index]),
        folder / str(index),
    )
    vectors = generator.initial_vectors("a") if vectors is None else vectors
    return ClassTraining(
        target,
        vectors,
        SETTINGS._replace(**changes),
        generator.dtype,
        folder / "history.jsonl",
        folder / "state.pt",
        folder / "images",
    )


def train_one(
    generator,
    loss_fn,
    folder: Path,
    index: int = 2,
    sampling=PAPER,
    batch_size=None,
    vectors=None,
    **changes,
):
    """The token of one class; raises what its training raises."""
    training = make_training(generator, folder, index, vectors, **changes)
    end = train_together([training], generator, loss_fn, sampling, batch_size)[index]
    if isinstance(end, DivergenceError):
        raise end
    return end


def train_together(
    trainings, generator, loss_fn, sampling=PAPER, batch_size=None, classes_at_once=2
):
    """As a sweep trains classes; {index: its token, or the error that ended it}."""
    waiting, running, ends = list(trainings), [], {}
    gradient = fit_token_gradient(len(trainings[0].next_images()), batch_size, sampling, "cpu")
    while True:
        while waiting and len(running) < classes_at_once:
            running.append(waiting.pop(0))
        if not running:
            return ends
        figures = compute_gradients(running, generator, loss_fn, sampling, gradient)
        for training, measured in zip(list(running), figures, strict=True):
            index = training.target.index
            try:
                stop = training.finish_update(measured).stop
            except DivergenceError as error:
                ends[index] = error
            else:
                if stop is None:
                    continue
                ends[index] = training.trained_token(stop)
            running.remove(training)


def read_history(folder: Path, index: int = 2):
    return [
        json.loads(line)
        for line in (folder / str(index) / "history.jsonl").read_text().splitlines()
    ]
