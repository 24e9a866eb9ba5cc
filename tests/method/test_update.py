"""The gradient of one update, and the loop over updates: what changes, what must not, and what fits
into memory.
"""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from evaluation.read_image import load_images
from method.losses import cross_entropy
from method.update import Batch, join_batches, token_gradient
from models.classifiers import load_classifier
from tests.method.conftest import (
    PAPER,
    SHORT,
    make_training,
    open_generator,
    read_history,
    train_one,
    train_together,
)
from utils import UserError

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


def first_gradient(
    generator, loss_fn, folder, classes=(2,), sampling=PAPER, batch_size=5, start=None
):
    """What the classes' first update measures, and dL/dv of each."""
    trainers = [make_training(generator, folder, index, start) for index in classes]
    batch, vectors = join_batches(trainers, generator.device)
    measured = token_gradient(generator, loss_fn, vectors, batch, sampling, batch_size)
    for trainer in trainers:
        trainer.scaler.unscale_(trainer.optimizer)
    return measured, [trainer.vectors.grad for trainer in trainers]


def hash_weights(*networks):
    total = hashlib.sha256()
    for network in networks:
        for key, value in network.state_dict().items():
            total.update(key.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("sampling", [PAPER, SHORT])
def test_gradient_equals_autograd_in_one_piece(generator, loss_fn, batch_size, sampling):
    """Without stages and parts: prompts, images and loss in one graph."""
    torch.manual_seed(0)
    batch = Batch(
        ["a newclas crane", "a photo of a newclas cat"],
        torch.tensor([0, 1, 0, 1, 1]),
        torch.arange(5),
        torch.tensor([2, 0, 2, 0, 1]),
        torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]),
    )
    vectors = torch.randn(2, 2, 32, requires_grad=True)
    cond = generator.encode(batch.prompts, vectors)[batch.prompt_of]
    images = generator.decode(generator.sample(cond, batch.seeds, sampling))
    losses, correct = loss_fn(images, batch.targets, vectors[batch.prompt_of])
    (expected,) = torch.autograd.grad((losses * batch.weights).sum(), vectors)
    pixels = torch.zeros(5, 32, 32, 3)

    def keep_images(chosen, part):
        pixels[chosen] = torch.from_numpy(part).float()

    found, right = token_gradient(
        generator, loss_fn, vectors, batch, sampling, batch_size, keep_images
    )
    assert (vectors.grad - expected).norm() / expected.norm() < 1e-4
    assert torch.allclose(found, losses, atol=1e-5) and torch.equal(right.bool(), correct)
    assert abs(pixels.permute(0, 3, 1, 2) - images * 255).max() < 0.51


def test_cross_entropy_equals_torchs():
    """Of any function of images that gives logits."""
    images, targets = torch.rand(3, 3, 8, 8, requires_grad=True), torch.tensor([0, 2, 1])
    logits = images.mean((2, 3)) * 50
    losses, correct = cross_entropy(lambda images: images.mean((2, 3)) * 50)(images, targets)
    assert torch.allclose(losses, -F.log_softmax(logits, 1)[range(3), targets])
    assert correct.tolist() == [
        bool(row.argmax() == target) for row, target in zip(logits, targets, strict=True)
    ]
    assert losses.requires_grad


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_same_update_gives_the_same_bits_on_two_threads(generator, two_threads):
    """The sum over many images of the same two prompts is where threads could add in any order."""
    sampling = SHORT._replace(timesteps=(600,), guidance_scale=1.0)
    start = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        ["a newclas crane", "a newclas cat"],
        torch.arange(128) % 2,
        torch.arange(128),
        torch.arange(128),
        torch.ones(128),
    )

    def measure_update():
        vectors = start.clone().requires_grad_()
        losses, _ = token_gradient(
            generator,
            lambda images, targets, _: (images[:, :, 9, 9].sum(1), targets > 0),
            vectors,
            batch,
            sampling,
            batch_size=128,
        )
        return losses, vectors.grad

    (losses, gradient), (losses_again, gradient_again) = measure_update(), measure_update()
    assert torch.equal(losses, losses_again) and torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("sampling", [PAPER, SHORT])
def test_batch_size_changes_only_rounding(generator, loss_fn, tmp_path, sampling):
    ends = [
        train_one(generator, loss_fn, tmp_path / str(size), sampling=sampling, batch_size=size)
        for size in (1, 5)
    ]
    assert (ends[0].every_update - ends[1].every_update).norm() / ends[1].every_update.norm() < 1e-4
    ones, fives = (load_images(sorted((tmp_path / size).rglob("*.png"))) for size in ("1", "5"))
    assert (ones - fives).abs().max() <= 1 / 255 + 1e-6


def test_images_lie_by_update_and_seed(generator, loss_fn, tmp_path):
    """The paper's same seeds, or new ones in every update."""
    train_one(generator, loss_fn, tmp_path / "paper")
    train_one(generator, loss_fn, tmp_path / "fresh", fresh_noise=True)

    def seeds(run):
        updates = sorted((tmp_path / run / "2/images").iterdir())
        return [sorted(int(path.stem) for path in update.glob("*.png")) for update in updates]

    assert seeds("paper") == [[35, 36, 37, 38, 39]] * 3
    assert seeds("fresh") == [[35, 36, 37, 38, 39], [40, 41, 42, 43, 44], [45, 46, 47, 48, 49]]


@pytest.mark.parametrize(
    "count, sampling, fresh_noise", [(1, PAPER, False), (1, SHORT, True), (2, SHORT, False)]
)
def test_only_the_vectors_change(
    generator, tiny_classifier, tmp_path, count, sampling, fresh_noise
):
    classifier = load_classifier(tiny_classifier, "cpu")
    frozen = (*generator.networks, classifier.model)
    before, start = hash_weights(*frozen), generator.initial_vectors("a").repeat(count, 1)
    end = train_one(
        generator,
        cross_entropy(classifier),
        tmp_path,
        sampling=sampling,
        vectors=start,
        lr=0.05,
        fresh_noise=fresh_noise,
    )
    assert hash_weights(*frozen) == before and all(
        p.grad is None for network in frozen for p in network.parameters()
    )
    assert end.vectors.shape == (count, 32) and end.vectors.dtype == torch.float32
    assert (
        torch.equal(end.every_update[0], start)
        and not (end.every_update[0] == end.every_update[-1]).any()
    )


def test_training_lowers_the_loss(generator, loss_fn, tmp_path):
    end = train_one(generator, loss_fn, tmp_path, sampling=SHORT, lr=0.1, num_train_epochs=12)
    losses = [line["loss"] for line in read_history(tmp_path)]
    assert len(losses) == len(end.every_update) == 12
    assert end.loss == min(losses) < losses[0] - 1e-3


def test_returned_vectors_are_the_best(generator, loss_fn, tmp_path):
    """Measured again on the same seeds, they give the best loss of the history."""
    end = train_one(generator, loss_fn, tmp_path, sampling=SHORT, lr=0.3, num_train_epochs=6)
    again, _ = first_gradient(
        generator, loss_fn, tmp_path / "again", sampling=SHORT, start=end.vectors
    )
    assert again[0].mean().item() == pytest.approx(end.loss, rel=1e-5)


def test_half_precision_gradient_is_scaled_and_unscaled(tiny_model, loss_fn, tmp_path):
    """float16 weights under an enabled scaler give the float32 gradient, to half precision's
    accuracy.
    """
    generators = [open_generator(tiny_model, dtype) for dtype in (torch.float32, torch.float16)]
    full, half = (
        first_gradient(generator, loss_fn, tmp_path, sampling=SHORT)[1][0]
        for generator in generators
    )
    assert half.dtype == torch.float32 and (full - half).norm() / full.norm() < 0.1


def test_classes_learn_together_as_they_do_alone(generator, loss_fn, tmp_path):
    """Three classes on two places, two of them of the same name; the last takes the place of the
    first to end.
    """
    changes = {
        "lr": 0.02,
        "num_train_epochs": 8,
        "early_stopping": 8,
        "target_accuracy": 0.99,
        "fresh_noise": True,
    }

    def judge_second_right(images, targets, words):
        return loss_fn(images, targets, words)[0], targets == 1

    alone = [
        train_one(generator, judge_second_right, tmp_path / "alone", i, SHORT, **changes)
        for i in range(3)
    ]
    trainings = [make_training(generator, tmp_path / "together", i, **changes) for i in range(3)]
    together = train_together(trainings, generator, judge_second_right, SHORT)
    assert sorted(together) == [0, 1, 2]
    assert [len(end.every_update) for end in alone] == [8, 3, 8]
    for i, end in together.items():
        assert len(end.every_update) == len(alone[i].every_update)
        assert (end.every_update - alone[i].every_update).abs().max() < 1e-4
    assert (together[0].vectors - alone[1].vectors).abs().max() > 1e-2


def test_non_finite_vectors_do_not_reach_their_neighbours(generator, loss_fn, tmp_path):
    """They go through every network in the same batches."""
    _, (alone,) = first_gradient(generator, loss_fn, tmp_path / "alone", (2,))
    diverged, neighbour = (
        make_training(generator, tmp_path, 0),
        make_training(generator, tmp_path, 2),
    )
    with torch.no_grad():
        diverged.vectors.fill_(torch.nan)
    batch, vectors = join_batches([diverged, neighbour], generator.device)
    losses, _ = token_gradient(generator, loss_fn, vectors, batch, PAPER, 10)
    assert losses[:5].isnan().all() and losses[5:].isfinite().all()
    assert (neighbour.vectors.grad - alone).norm() / alone.norm() < 1e-4


class ShortOfMemory:
    """A loss that runs out of memory for more than `most` images, and in its calls number
    `failing`.
    """

    def __init__(self, loss_fn, most=0, failing=()):
        self.loss_fn, self.most, self.failing, self.asked = loss_fn, most, failing, []

    def __call__(self, images, targets, vectors):
        self.asked.append(len(images))
        if len(images) > self.most or len(self.asked) in self.failing:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return self.loss_fn(images, targets, vectors)


def test_batch_size_is_halved_until_memory_suffices(generator, loss_fn, tmp_path):
    """Also in the middle of an update, part of which is backward already: that part does not count
    twice.
    """
    expected = train_one(generator, loss_fn, tmp_path / "expected")
    short = ShortOfMemory(loss_fn, most=2, failing=[7])
    end = train_one(generator, short, tmp_path / "halved")
    assert short.asked == [5, 5, 2, 2, 1, 2, 2, *[1] * 10]
    assert (end.every_update - expected.every_update).abs().max() < 1e-4


@pytest.mark.parametrize(
    "batch_size, reason",
    [
        (None, "--gradient_checkpointing"),
        (
            4,
            (
                "not enough memory for 4 images at a time: give a smaller --batch_size, or none for"
                " as many"
            ),
        ),
    ],
)
def test_no_memory_is_one_line(generator, loss_fn, tmp_path, batch_size, reason):
    with pytest.raises(UserError, match=reason):
        train_one(generator, ShortOfMemory(loss_fn), tmp_path, batch_size=batch_size)


def test_graphs_are_never_in_memory_together(generator, loss_fn, tmp_path):
    """While classifier and VAE go backwards the UNet holds no activations: they are computed again
    in its turn.
    """
    text_encoder, unet, vae = generator.networks
    calls = []
    for name, network in (("text", text_encoder), ("unet", unet), ("vae", vae.decoder)):
        network.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    vae.decoder.register_full_backward_hook(lambda *_: calls.append("vae back"))
    first_gradient(generator, loss_fn, tmp_path, sampling=SHORT, batch_size=2)
    assert calls == ["text"] * 2 + ["unet"] * 5 + ["vae", "vae back"] * 3 + ["unet"] * 3
