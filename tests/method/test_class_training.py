"""One class while it learns: stop rules, updates without finite numbers, and its state after a
kill.
"""

import pytest
import torch

from method.class_training import DivergenceError, judge_progress
from tests.method.conftest import (
    SHORT,
    make_training,
    open_generator,
    read_history,
    train_one,
    train_together,
)
from utils import UserError


class FaultyLoss:
    """A loss that is wrong in some updates: every call is one, for as many images as an update has.

    `bad_loss` adds a nan to the loss and nothing to its gradient, `bad_gradient` the other way
    round, `kill_at` ends the process in that update.
    """

    def __init__(
        self, loss_fn, updates=(), bad_loss=False, bad_gradient=False, index=None, kill_at=None
    ):
        self.loss_fn, self.updates, self.index, self.kill_at = loss_fn, updates, index, kill_at
        self.bad_loss, self.bad_gradient, self.calls = bad_loss, bad_gradient, 0

    def __call__(self, images, targets, vectors):
        update, self.calls = self.calls, self.calls + 1
        if update == self.kill_at:
            raise KeyboardInterrupt
        loss, correct = self.loss_fn(images, targets, vectors)
        bad = (targets == self.index if self.index is not None else targets >= 0) & (
            update in self.updates
        )
        if self.bad_gradient:
            images.register_hook(
                lambda grad: torch.where(bad[:, None, None, None], torch.nan, grad)
            )
        return torch.where(bad, loss + torch.nan, loss) if self.bad_loss else loss, correct


def test_divergence_ends_its_class_alone(generator, loss_fn, tmp_path):
    alone = train_one(generator, loss_fn, tmp_path / "alone")
    faulty = FaultyLoss(loss_fn, updates=[1], bad_loss=True, bad_gradient=True, index=0)
    ends = train_together(
        [make_training(generator, tmp_path, index) for index in (0, 2)], generator, faulty
    )
    failure, end = ends[0], ends[2]
    assert isinstance(failure, DivergenceError)
    assert "update 1 of class 1 (crane, bird)" in str(failure)
    assert "try a lower --lr than 0.00125" in str(failure)
    assert (end.every_update - alone.every_update).abs().max() < 1e-4


@pytest.mark.parametrize(
    "dtype, cause",
    [
        (torch.float32, "does not depend on the token"),
        (torch.float16, "float16 may be too narrow"),
    ],
)
def test_first_gradient_of_zero_ends_the_training(tiny_model, tmp_path, dtype, cause):
    """Weight decay alone would move the vectors from here on."""
    with pytest.raises(DivergenceError, match=f"class 3 .* is exactly zero: .*{cause}"):
        train_one(
            open_generator(tiny_model, dtype),
            lambda images, targets, _: (0 * images.sum((1, 2, 3)), targets > 0),
            tmp_path,
            fresh_noise=True,
        )
    assert not (tmp_path / "2/history.jsonl").exists()


def test_a_class_that_is_right_already_needs_no_gradient(generator, tmp_path):
    end = train_one(
        generator,
        lambda images, targets, _: (0 * images.sum((1, 2, 3)), targets >= 0),
        tmp_path,
        target_accuracy=0.7,
    )
    assert end.stopped == "accuracy 1.00 is above 0.7"


@pytest.mark.parametrize("fault, absent", [("bad_loss", "loss"), ("bad_gradient", "grad_norm")])
def test_non_finite_update_is_skipped(generator, loss_fn, tmp_path, fault, absent):
    """It leaves the vectors where they were and is never the best; the next noise may do better."""
    faulty = FaultyLoss(loss_fn, updates=[0, 2], **{fault: True})
    end = train_one(generator, faulty, tmp_path, num_train_epochs=5, fresh_noise=True, lr=0.05)
    changed = [
        not torch.equal(*pair) for pair in zip(end.every_update, end.every_update[1:], strict=False)
    ]
    assert changed == [False, True, False, True] and end.every_update.isfinite().all()
    lines = read_history(tmp_path)
    assert [line[absent] is None for line in lines] == [True, False, True, False, False]
    if absent == "loss":
        assert [line["accuracy"] for line in lines if line["loss"] is None] == [0, 0]


@pytest.mark.parametrize(
    "fresh_noise, dtype, updates",
    [(False, torch.float32, 1), (True, torch.float32, 11), (False, torch.float16, 11)],
)
def test_skipping_has_an_end(tiny_model, loss_fn, tmp_path, fresh_noise, dtype, updates):
    """At once where the next update would be the same; a scaler of float16 tries smaller scales
    first.
    """
    generator, scales = open_generator(tiny_model, dtype), []
    faulty = FaultyLoss(loss_fn, updates=range(50), bad_loss=True, bad_gradient=True)
    training = make_training(generator, tmp_path, num_train_epochs=50, fresh_noise=fresh_noise)

    def record_scale(images, targets, vectors):
        scales.append(training.scaler.get_scale())
        return faulty(images, targets, vectors)

    failure = train_together([training], generator, record_scale, SHORT)[2]
    assert len(scales) == updates and (
        dtype == torch.float32 or scales == [2.0 ** (10 - i) for i in range(11)]
    )
    assert f"update {updates - 1} of class 3 (tiger cat)" in str(failure)
    assert ", as the last 11 updates:" in str(failure) or updates == 1
    assert str(failure).endswith(
        "try a lower --lr than 0.00125"
        + (", or --mixed_precision bf16 or no" if dtype == torch.float16 else "")
    )


def test_bfloat16_names_its_remedy(tiny_model, loss_fn, tmp_path):
    faulty = FaultyLoss(loss_fn, updates=[0], bad_gradient=True)
    with pytest.raises(
        DivergenceError, match="has a non-finite gradient.*, or --mixed_precision no$"
    ):
        train_one(open_generator(tiny_model, torch.bfloat16), faulty, tmp_path, sampling=SHORT)


def test_training_without_one_finite_update_fails(generator, loss_fn, tmp_path):
    faulty = FaultyLoss(loss_fn, updates=range(3), bad_loss=True)
    with pytest.raises(DivergenceError, match=r"update 2 of class 3 \(tiger cat\)"):
        train_one(generator, faulty, tmp_path, sampling=SHORT, fresh_noise=True)


@pytest.mark.parametrize(
    "kill_at, dtype, classes, count",
    [(1, torch.float32, [2], 1), (4, torch.float32, [2], 3), (2, torch.float16, [0, 2], 1)],
)
def test_killed_training_resumes_bit_for_bit(
    tiny_model, loss_fn, tmp_path, kill_at, dtype, classes, count
):
    generator = open_generator(tiny_model, dtype)

    def train_all(folder, loss_fn):
        start = generator.initial_vectors("a").repeat(count, 1)
        trainings = [
            make_training(
                generator, folder, index, start, lr=0.05, num_train_epochs=6, fresh_noise=True
            )
            for index in classes
        ]
        return list(train_together(trainings, generator, loss_fn, SHORT).values())

    undisturbed = train_all(tmp_path / "undisturbed", loss_fn)
    with pytest.raises(KeyboardInterrupt):
        train_all(tmp_path / "killed", FaultyLoss(loss_fn, kill_at=kill_at))
    assert all(len(read_history(tmp_path / "killed", index)) == kill_at for index in classes)
    resumed = FaultyLoss(loss_fn)
    for before, after in zip(undisturbed, train_all(tmp_path / "killed", resumed), strict=True):
        assert torch.equal(before.every_update, after.every_update) and torch.equal(
            before.vectors, after.vectors
        )
        assert (before.loss, before.accuracy, before.stopped) == (
            after.loss,
            after.accuracy,
            after.stopped,
        )
        assert (
            after.every_update.shape == (6, count, 32)
            and after.every_update[0].ne(after.every_update[-1]).any()
        )
    assert resumed.calls == 6 - kill_at
    assert all(
        read_history(tmp_path / "killed", index) == read_history(tmp_path / "undisturbed", index)
        for index in classes
    )


def test_broken_state_is_one_line(generator, loss_fn, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_one(generator, FaultyLoss(loss_fn, kill_at=1), tmp_path, sampling=SHORT)
    state = tmp_path / "2" / "state.pt"
    whole = state.read_bytes()
    for data in (b"", b"not a state", whole[: len(whole) // 2]):
        state.write_bytes(data)
        with pytest.raises(
            UserError, match="is broken .*: --skip_exists False starts the class over"
        ):
            make_training(generator, tmp_path)
    state.write_bytes(whole)
    with pytest.raises(UserError, match="is broken .*: --skip_exists False starts the class over"):
        make_training(generator, tmp_path, vectors=torch.zeros(1, 31))  # the state of another model


def test_stop_rules():
    paper = {"window": 1, "target_accuracy": 0.7, "early_stopping": 15}
    assert judge_progress([(2.0, 0.6)], **paper) == (True, None)
    assert judge_progress([(2.0, 0.6), (1.0, 0.8)], **paper) == (True, "accuracy 0.80 is above 0.7")
    assert judge_progress([(2.0, 0.6), (3.0, 0.8)], **paper) == (True, "accuracy 0.80 is above 0.7")
    assert judge_progress([(2.0, 0.6), (3.0, 0.6)], **paper) == (False, None)
    assert judge_progress([(1.0, 0.0)] + [(1.5, 0.0)] * 14, **paper) == (False, None)
    assert judge_progress([(1.0, 0.0)] + [(1.5, 0.0)] * 15, **paper) == (
        False,
        "no better loss in 15 updates",
    )


def test_one_lucky_update_does_not_fool_fresh_noise():
    """It neither stops the loop nor is it the best: what counts first is the mean over a full
    window.
    """
    rules = {"window": 3, "target_accuracy": 0.9, "early_stopping": 15}
    lucky = [(0.1, 1.0), (1.0, 0.4), (1.0, 0.4)]
    assert judge_progress(lucky[:1], **rules) == (True, None)
    assert judge_progress(lucky, **rules) == (True, None)
    assert judge_progress([*lucky, (0.6, 0.6)], **rules) == (False, None)
    assert judge_progress([*lucky, (0.05, 0.9), (0.04, 1.0)], **rules) == (True, None)
    assert judge_progress([(1.0, 0.4), (0.1, 1.0), (0.1, 1.0), (0.1, 1.0)], **rules) == (
        True,
        "accuracy 1.00 is above 0.9",
    )
