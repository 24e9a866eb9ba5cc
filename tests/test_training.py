"""The loop: what moves and what must not, when it stops, what it leaves behind."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

import class_token
import training
from classifiers import load_classifier
from diffusion import load_components
from learner import STATE_FILE, Job, start, verdict
from prompt_datasets import class_name
from tests.conftest import LABELS
from training import accumulate_gradients, train_tokens
from utils import ImageWriter, UserError, load_images


@pytest.fixture
def parts(tiny_config, components):
    classifier = load_classifier(tiny_config.classifier, "cpu")
    return components, classifier, class_token.add_placeholder(components.tokenizer, "newclas")


def job_of(class_index, folder):
    return Job(class_index, class_name(LABELS[class_index]), folder / f"{class_index}" / "tokens",
               folder / f"{class_index}" / "images")


def train(config, parts, tmp_path, class_index=2):
    components, classifier, token_id = parts
    (_, trained), = train_tokens(config, components, token_id, classifier, iter([job_of(class_index, tmp_path)]))
    return trained


def gradients(config, parts, folder, classes=(2,), vector=None):
    """(mean loss, share right) and dL/dv of every class after the images of its first update."""
    components, classifier, token_id = parts
    learners = [start(config, components, job_of(class_index, folder)) for class_index in classes]
    if vector is not None:
        learners[0].vector = vector.requires_grad_()
    with ImageWriter() as writer:
        measured = accumulate_gradients(config.batch_size or 5, config, components, classifier, token_id, learners,
                                        writer)
    for learner in learners:
        learner.scaler.unscale_(learner.optimizer)
    return measured, [learner.vector.grad for learner in learners]


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
    losses = [json.loads(line)["loss"] for line in (tmp_path / "2/tokens/history.jsonl").read_text().splitlines()]
    assert len(losses) == len(trained.vectors) == 12
    assert trained.loss == min(losses) < losses[0] - 1e-3


def test_the_kept_vector_is_the_one_that_was_best(tiny_config, parts, tmp_path):
    """Measured again on the same seeds, the kept vector gives the best loss of the history."""
    config = replace(tiny_config, lr=0.3, num_train_epochs=6, train_timesteps=[999, 600])
    trained = train(config, parts, tmp_path)
    ((again, _),), _ = gradients(config, parts, tmp_path / "again", vector=trained.vector)
    assert again == pytest.approx(trained.loss, rel=1e-5)


@pytest.mark.parametrize("timesteps", [None, [999, 800, 600]])
def test_batch_size_changes_only_rounding(tiny_config, parts, tmp_path, timesteps):
    results = []
    for batch_size in (1, 5):
        config = replace(tiny_config, batch_size=batch_size, train_timesteps=timesteps)
        _, (gradient,) = gradients(config, parts, tmp_path / str(batch_size))
        results.append((gradient, load_images(sorted((tmp_path / str(batch_size)).rglob("*.png")))))
    (one, images_one), (five, images_five) = results
    assert (one - five).norm() / one.norm() < 1e-4
    assert (images_one - images_five).abs().max() <= 1 / 255 + 1e-6


def test_seeds_same_in_the_paper_and_fresh_on_demand(tiny_config, parts, tmp_path):
    train(tiny_config, parts, tmp_path / "paper")
    train(replace(tiny_config, fresh_noise=True), parts, tmp_path)

    def seeds(folder):
        updates = sorted((folder / "2/images/train").iterdir())
        return [sorted(int(p.stem) for p in update.glob("*.png")) for update in updates]

    assert seeds(tmp_path / "paper") == [[35, 36, 37, 38, 39]] * 3
    assert seeds(tmp_path) == [[35, 36, 37, 38, 39], [40, 41, 42, 43, 44], [45, 46, 47, 48, 49]]


def test_infinite_loss_ends_its_class_alone(tiny_config, parts, tmp_path, monkeypatch):
    """A vector that is not a number goes through every network in the same batches as its neighbour's."""
    components, classifier, token_id = parts
    alone = train(tiny_config, parts, tmp_path / "alone")

    def diverging(*arguments):
        for learner in arguments[5]:
            if (learner.job.class_index, len(learner.history)) == (0, 1):
                learner.vector.data.fill_(torch.nan)
        return accumulate_gradients(*arguments)

    monkeypatch.setattr("training.accumulate_gradients", diverging)
    jobs = iter([job_of(0, tmp_path), job_of(2, tmp_path)])
    (first, failure), (second, trained) = train_tokens(replace(tiny_config, classes_at_once=2), components, token_id,
                                                       classifier, jobs)
    assert (first.class_index, second.class_index) == (0, 2)
    assert isinstance(failure, UserError)
    assert str(failure) == ("update 1 of class 1 (crane) gave no number as its loss: the vector may have gone too far; "
                            "try a lower --lr than 0.00125")
    assert (trained.vectors - alone.vectors).abs().max() < 1e-4


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_without_numbers_is_skipped(tiny_config, parts, tmp_path, monkeypatch, what):
    """It leaves the vector where it was and is never the one to keep; the next noise may do better."""
    def without_numbers(*arguments):
        learner, = arguments[5]
        (loss, _), = accumulate_gradients(*arguments)
        if len(learner.history) in (0, 2) and what == "gradient":
            learner.vector.grad[3] = torch.inf
        return [(torch.nan if len(learner.history) in (0, 2) and what == "loss" else loss, 0.5)]

    monkeypatch.setattr("training.accumulate_gradients", without_numbers)
    config = replace(tiny_config, num_train_epochs=5, fresh_noise=True, lr=0.05)
    trained = train(config, parts, tmp_path)
    moved = [not torch.equal(*pair) for pair in zip(trained.vectors, trained.vectors[1:], strict=False)]
    assert moved == [False, True, False, True] and trained.vectors.isfinite().all()
    lines = [json.loads(line) for line in (tmp_path / "2/tokens/history.jsonl").read_text().splitlines()]
    absent = "loss" if what == "loss" else "grad_norm"
    assert [line[absent] is None for line in lines] == [True, False, True, False, False]
    if what == "loss":
        assert [line["accuracy"] for line in lines] == [0, 0.5, 0, 0.5, 0.5]


@pytest.mark.parametrize("fresh, dtype, updates", [(False, torch.float32, 1), (True, torch.float32, 11),
                                                   (False, torch.float16, 11)])
def test_skipping_has_an_end(tiny_config, tiny_model, parts, tmp_path, monkeypatch, fresh, dtype, updates):
    """At once where the next update would be the same; a scaler of float16 tries smaller scales first."""
    seen = []

    def without_numbers(*arguments):
        seen.append(arguments[5][0].scaler.get_scale())
        arguments[5][0].scaler.scale(torch.ones(1))
        arguments[5][0].vector.grad = torch.full_like(arguments[5][0].vector, torch.nan)
        return [(torch.nan, 0.0)]

    monkeypatch.setattr("training.accumulate_gradients", without_numbers)
    components = load_components(tiny_model, "cpu", dtype)
    token_id = class_token.add_placeholder(components.tokenizer, "newclas")
    config = replace(tiny_config, num_train_epochs=50, fresh_noise=fresh, mixed_precision="fp16")
    failure = train(config, (components, parts[1], token_id), tmp_path)
    assert len(seen) == updates and (dtype == torch.float32 or seen == [2.0 ** (10 - i) for i in range(11)])
    assert f"update {updates - 1} of class 3 (tiger cat) gave no number as its loss" in str(failure)
    assert "try a lower --lr than 0.00125, or --mixed_precision bf16 or no" in str(failure)


def test_a_training_without_one_number_is_none(tiny_config, parts, tmp_path, monkeypatch):
    def without_numbers(*arguments):
        arguments[5][0].vector.grad = torch.full_like(arguments[5][0].vector, torch.nan)
        return [(torch.nan, 0.0)]

    monkeypatch.setattr("training.accumulate_gradients", without_numbers)
    failure = train(replace(tiny_config, fresh_noise=True), parts, tmp_path)
    assert isinstance(failure, UserError) and "update 2 of class 3 (tiger cat)" in str(failure)


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
    found = []
    for dtype in (torch.float32, torch.float16):
        components = load_components(tiny_model, "cpu", dtype)
        token_id = class_token.add_placeholder(components.tokenizer, "newclas")
        _, (gradient,) = gradients(replace(tiny_config, train_timesteps=[999, 600]),
                                   (components, parts[1], token_id), tmp_path / str(dtype))
        found.append(gradient)
    full, half = found
    assert half.dtype == torch.float32 and (full - half).norm() / full.norm() < 0.1


def test_a_class_learns_the_same_in_company(tiny_config, parts, tmp_path):
    """Twenty updates beside others, one of them of the same name, or alone; each takes the next free place."""
    components, classifier, token_id = parts
    config = replace(tiny_config, lr=0.02, num_train_epochs=20, early_stopping=20, target_accuracy=0.99,
                     train_timesteps=[999, 600], fresh_noise=True, classes_at_once=2)
    alone = [train(replace(config, classes_at_once=1), parts, tmp_path / "alone", i) for i in range(3)]
    jobs = (job_of(i, tmp_path / "together") for i in range(3))
    together = dict(train_tokens(config, components, token_id, classifier, jobs))
    assert sorted(job.class_index for job in together) == [0, 1, 2]
    assert [len(trained.vectors) for trained in alone] == [20, 3, 20]  # the second is right from the start
    for job, trained in together.items():
        assert len(trained.vectors) == len(alone[job.class_index].vectors)
        assert (trained.vectors - alone[job.class_index].vectors).abs().max() < 1e-4
    assert (together[job_of(0, tmp_path / "together")].vector - alone[1].vector).abs().max() > 1e-2


@pytest.mark.parametrize("killed_at, dtype, classes", [(1, torch.float32, [2]), (4, torch.float32, [2]),
                                                       (2, torch.float16, [0, 2])])
def test_a_killed_training_goes_on_exactly(tiny_config, tiny_model, parts, tmp_path, monkeypatch, killed_at, dtype,
                                           classes):
    config = replace(tiny_config, lr=0.05, num_train_epochs=6, train_timesteps=[999, 600], fresh_noise=True,
                     classes_at_once=len(classes))
    components = load_components(tiny_model, "cpu", dtype)
    token_id = class_token.add_placeholder(components.tokenizer, "newclas")

    def run(folder):
        jobs = iter([job_of(class_index, folder) for class_index in classes])
        return [trained for _, trained in train_tokens(config, components, token_id, parts[1], jobs)]

    undisturbed = run(tmp_path / "undisturbed")

    def killed(*arguments):
        if len(arguments[5][0].history) == killed_at:
            raise KeyboardInterrupt
        return accumulate_gradients(*arguments)

    with monkeypatch.context() as until_killed:
        until_killed.setattr("training.accumulate_gradients", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    assert (tmp_path / f"killed/{classes[0]}/tokens" / STATE_FILE).exists()
    for before, after in zip(undisturbed, run(tmp_path / "killed"), strict=True):
        assert torch.equal(before.vectors, after.vectors) and torch.equal(before.vector, after.vector)
        assert after.vectors[0].ne(after.vectors[-1]).any()
    for class_index in classes:
        histories = [(tmp_path / run / f"{class_index}/tokens/history.jsonl").read_text()
                     for run in ("undisturbed", "killed")]
        assert histories[0] == histories[1] and histories[0].count("\n") == 6


def test_the_batch_size_is_halved_until_memory_suffices(tiny_config, parts, tmp_path, monkeypatch):
    """Also in the midst of an update, part of which went backwards already: that part does not count twice."""
    original, asked = training.decode, []

    def short_of_memory(components, latents):
        asked.append(len(latents))
        if len(latents) > 2 or len(asked) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(components, latents)

    expected = train(tiny_config, parts, tmp_path / "expected")
    monkeypatch.setattr("training.decode", short_of_memory)
    trained = train(tiny_config, parts, tmp_path / "halved")
    assert asked == [5, 2, 2, 1, 2, 2, *[1] * 10]
    assert (trained.vectors - expected.vectors).abs().max() < 1e-4


def test_no_memory_for_one_image_is_one_line(tiny_config, parts, tmp_path, monkeypatch):
    def short_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("training.decode", short_of_memory)
    with pytest.raises(UserError, match="memory does not suffice for one image at a time: try --gradient_checkpoint"):
        train(tiny_config, parts, tmp_path)


def test_a_given_batch_size_is_not_changed(tiny_config, parts, tmp_path, monkeypatch):
    def short_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("training.decode", short_of_memory)
    with pytest.raises(UserError, match="for 4 images at a time: give a smaller --batch_size, or none for as many"):
        train(replace(tiny_config, batch_size=4), parts, tmp_path)


def test_graphs_are_never_in_memory_together(tiny_config, parts, tmp_path):
    """While classifier and VAE go backwards the UNet keeps no activations: they are made anew when its turn comes."""
    components, classifier, token_id = parts
    calls = []
    for name, module in (("text", components.text_encoder), ("unet", components.unet), ("vae", components.vae.decoder)):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    components.vae.decoder.register_full_backward_hook(lambda *_: calls.append("vae back"))
    gradients(replace(tiny_config, train_timesteps=[999, 600], batch_size=2), parts, tmp_path)
    assert calls == ["text"] * 2 + ["unet"] * 5 + ["vae", "vae back"] * 3 + ["unet"] * 3 + ["text"]
