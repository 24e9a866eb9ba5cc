"""The loop: what moves and what must not, when it stops, what it leaves behind."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

import class_token
from classifiers import load_classifier
from diffusion import load_components
from training import accumulate_gradient, train_token, verdict
from utils import UserError, load_images


@pytest.fixture
def parts(tiny_config, components):
    classifier = load_classifier(tiny_config.classifier, "cpu")
    return components, classifier, class_token.add_placeholder(components.tokenizer, "newclas")


def train(config, parts, tmp_path, class_index=2):
    components, classifier, token_id = parts
    return train_token(config, components, token_id, classifier, class_index, "tiger cat", tmp_path / "train",
                       tmp_path / "history.jsonl")


def digest(*modules):
    total = hashlib.sha256()
    for module in modules:
        for key, value in module.state_dict().items():
            total.update(key.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("changes", [{}, {"train_timesteps": [999, 800, 600], "fresh_noise": True}])
def test_only_the_vector_moves(tiny_config, parts, tmp_path, changes):
    components, classifier, _ = parts
    frozen = (components.text_encoder, components.unet, components.vae, classifier.model)
    before = digest(*frozen)
    start = class_token.initial_vector(components.tokenizer, components.text_encoder, "a")
    trained = train(replace(tiny_config, lr=0.05, **changes), parts, tmp_path)
    assert digest(*frozen) == before
    assert trained.vector.shape == start.shape and trained.vector.dtype == torch.float32
    assert all(p.grad is None for module in frozen for p in module.parameters())


def test_training_lowers_the_loss(tiny_config, parts, tmp_path):
    config = replace(tiny_config, lr=0.1, num_train_epochs=12, train_timesteps=[999, 600], target_accuracy=1.0)
    trained = train(config, parts, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert len(losses) == len(trained.vectors) == 12
    assert trained.loss == min(losses) < losses[0] - 1e-3


def test_the_kept_vector_is_the_one_that_was_best(tiny_config, parts, tmp_path):
    """Measured again on the same seeds, the kept vector gives the best loss of the history."""
    components, classifier, token_id = parts
    config = replace(tiny_config, lr=0.3, num_train_epochs=6, train_timesteps=[999, 600])
    trained = train(config, parts, tmp_path)
    again, _ = accumulate_gradient(config, components, classifier, 2, "tiger cat", token_id,
                                   trained.vector.requires_grad_(), 0, torch.amp.GradScaler("cpu", enabled=False),
                                   tmp_path / "again")
    assert again == pytest.approx(trained.loss, rel=1e-5)


@pytest.mark.parametrize("timesteps", [None, [999, 800, 600]])
def test_batch_size_changes_only_rounding(tiny_config, parts, tmp_path, timesteps):
    components, classifier, token_id = parts
    results = []
    for batch_size in (1, 5):
        config = replace(tiny_config, batch_size=batch_size, train_timesteps=timesteps)
        vector = class_token.initial_vector(components.tokenizer, components.text_encoder, "a").requires_grad_()
        folder = tmp_path / str(batch_size)
        accumulate_gradient(config, components, classifier, 2, "tiger cat", token_id, vector, 0,
                            torch.amp.GradScaler("cpu", enabled=False), folder)
        results.append((vector.grad, load_images(sorted(folder.glob("*.png")))))
    (one, images_one), (five, images_five) = results
    assert (one - five).norm() / one.norm() < 1e-4
    assert (images_one - images_five).abs().max() <= 1 / 255 + 1e-6


def test_seeds_same_in_the_paper_and_fresh_on_demand(tiny_config, parts, tmp_path):
    (tmp_path / "paper").mkdir()
    train(tiny_config, parts, tmp_path / "paper")
    train(replace(tiny_config, fresh_noise=True), parts, tmp_path)

    def seeds(folder):
        return [sorted(int(p.stem) for p in update.glob("*.png")) for update in sorted((folder / "train").iterdir())]

    assert seeds(tmp_path / "paper") == [[35, 36, 37, 38, 39]] * 3
    assert seeds(tmp_path) == [[35, 36, 37, 38, 39], [40, 41, 42, 43, 44], [45, 46, 47, 48, 49]]


def test_infinite_loss_is_one_line(tiny_config, parts, tmp_path):
    components, classifier, token_id = parts
    broken = classifier._replace(forward=lambda model, pixels: pixels.mean((2, 3)) * torch.nan)
    with pytest.raises(UserError, match="loss of update 0 is nan"):
        train(tiny_config, (components, broken, token_id), tmp_path)


def test_stop_rules():
    paper = {"window": 1, "target_accuracy": 0.7, "early_stopping": 15}
    assert verdict([(2.0, 0.6)], **paper) == (True, None)
    assert verdict([(2.0, 0.6), (1.0, 0.8)], **paper) == (True, "accuracy 0.80 is above 0.7")
    assert verdict([(2.0, 0.6), (3.0, 0.8)], **paper) == (True, "accuracy 0.80 is above 0.7")
    assert verdict([(2.0, 0.6), (3.0, 0.6)], **paper) == (False, None)
    assert verdict([(1.0, 0.0)] + [(1.5, 0.0)] * 14, **paper) == (False, None)
    assert verdict([(1.0, 0.0)] + [(1.5, 0.0)] * 15, **paper) == (False, "no better loss in 15 updates")


def test_one_lucky_update_does_not_fool_fresh_noise():
    """It neither stops the loop nor is it the best: what counts first is the mean over a full window."""
    rules = {"window": 3, "target_accuracy": 0.9, "early_stopping": 15}
    lucky = [(0.1, 1.0), (1.0, 0.4), (1.0, 0.4)]
    assert verdict(lucky[:1], **rules) == (True, None)
    assert verdict(lucky, **rules) == (True, None)
    assert verdict([*lucky, (0.6, 0.6)], **rules) == (False, None)
    assert verdict([*lucky, (0.05, 0.9), (0.04, 1.0)], **rules) == (True, None)
    assert verdict([(1.0, 0.4), (0.1, 1.0), (0.1, 1.0), (0.1, 1.0)], **rules) == (True, "accuracy 1.00 is above 0.9")


def test_half_precision_gradient_is_scaled_and_unscaled(tiny_config, tiny_model, parts, tmp_path):
    """float16 weights under an enabled scaler give the float32 gradient, to half precision's accuracy."""
    gradients = []
    for dtype in (torch.float32, torch.float16):
        components = load_components(tiny_model, "cpu", dtype)
        token_id = class_token.add_placeholder(components.tokenizer, "newclas")
        vector = class_token.initial_vector(components.tokenizer, components.text_encoder, "a").requires_grad_()
        optimizer = torch.optim.AdamW([vector])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
        accumulate_gradient(replace(tiny_config, train_timesteps=[999, 600]), components, parts[1], 2, "tiger cat",
                            token_id, vector, 0, scaler, tmp_path)
        scaler.unscale_(optimizer)
        gradients.append(vector.grad)
    full, half = gradients
    assert half.dtype == torch.float32 and (full - half).norm() / full.norm() < 0.1
