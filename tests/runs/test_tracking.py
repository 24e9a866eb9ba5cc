"""--report_to: what the trackers' own files hold afterwards."""

import json

import pytest

from runs import tracking
from tests.test_run import error_of, flags


def test_tensorboard_s_files_hold_every_update(tiny_config, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from run import main
    assert main(flags(tiny_config, "--class_index", "2,3", "--train", "True", "--classes_at_once", "2", "--report_to",
                      "tensorboard", "--num_train_epochs", "3")) == 0
    for history in sorted(tmp_path.glob("pipeline_token/*/*/demo/history.jsonl")):
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        run = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "/".join(history.parts[-4:-1])))
        run.Reload()
        for key in ("loss", "accuracy", "grad_norm", "vector_norm"):
            events = run.Scalars(key)
            assert [event.step for event in events] == [line["update"] for line in lines]
            assert [event.value for event in events] == pytest.approx([line[key] for line in lines], rel=1e-6)
        assert [event.step for event in run.Images("pictures")] == [line["update"] for line in lines]
    assert len(list(tmp_path.glob("pipeline_token/*/*/demo/history.jsonl"))) == 2


def test_a_missing_package_is_one_line(capsys, tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name, needed in (("wandb", "wandb"), ("all", "tensorboard or wandb or trackio")):
        message = error_of(capsys, *flags(tiny_config, "--class_index", "3", "--train", "True", "--report_to", name))
        assert f"report_to '{name}' needs {needed}, which is not installed" in message
    assert not list(tmp_path.glob("pipeline_token/*"))
