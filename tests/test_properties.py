"""Properties that hold for any input: classes, folders, settings, tokens, and a training killed at any update."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import mse_loss

import class_token
from config import ALLOWED, MAY_BE_NONE, RunConfig, as_typed, parse, to_yaml
from diffusion import load_components
from learner import Job, start, update
from prompt_datasets import class_folder, class_name, prompt_folder, select_classes
from utils import UserError, read_tensors, read_yaml_mapping, write_tensors

COUNT = 1000
LABELS = [f"thing {i}" for i in range(COUNT)]
words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)
printable = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), max_size=40).filter(
    str.isprintable)


def parts():
    """'7' or '3-12', and the numbers from 0 that it means."""
    number = st.integers(1, COUNT)
    return st.one_of(number.map(lambda n: (str(n), [n - 1])), st.tuples(number, number).map(sorted).map(
        lambda pair: ("-".join(map(str, pair)), list(range(pair[0] - 1, pair[1])))))


@given(st.lists(parts(), min_size=1, max_size=6), st.sampled_from([",", ", ", " ,"]))
def test_a_selection_is_its_parts_in_order_each_class_once(chosen, comma):
    expected = dict.fromkeys(index for _, indexes in chosen for index in indexes)
    assert select_classes(comma.join(text for text, _ in chosen), LABELS, LABELS) == list(expected)


@given(st.text(max_size=30))
def test_any_text_selects_classes_or_is_refused(text):
    try:
        chosen = select_classes(text, LABELS, LABELS)
    except UserError:
        return
    assert chosen and set(chosen) <= set(range(COUNT)) and len(set(chosen)) == len(chosen)


@given(st.lists(st.text(max_size=400), min_size=1, max_size=20))
def test_folders_are_distinct_plain_and_short(labels):
    folders = [class_folder(i, class_name(label)) for i, label in enumerate(labels)]
    assert len(set(folders)) == len(folders)
    assert all(re.fullmatch(r"\d{4}(_[a-z0-9]+)*", folder) and len(folder) <= 85 for folder in folders)


@given(st.text(max_size=400))
def test_prompts_have_plain_folders(template):
    assert re.fullmatch(r"[a-z0-9_]{1,70}", prompt_folder(template))


def any_config():
    """Settings that validate, and some that would not: a file gives back what was written either way."""
    numbers = st.floats(1e-12, 1e9, allow_nan=False)
    return st.builds(
        RunConfig, class_index=words, train=st.booleans(), exp_id=words, model=words, evaluator=st.none() | words,
        class_names=st.none() | words, lr=numbers, eps=numbers, betas=st.lists(numbers, min_size=1, max_size=3),
        seed=st.integers(0, 2**32), batch_size=st.none() | st.integers(1, 99), guidance_scale=numbers,
        train_timesteps=st.none() | st.lists(st.integers(0, 999), min_size=1, max_size=5),
        eval_prompts=st.lists(printable.map(lambda text: f"A {text}{{}}"), max_size=3), fresh_noise=st.booleans())


@given(any_config().filter(lambda config: not {"none", "null", "~", ""} & {str(v) for v in vars(config).values()}))
def test_a_config_comes_back_from_its_file_and_from_flags(config):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yml")
        file.write_text(to_yaml(config), encoding="utf-8")
        assert parse(["--config", str(file)])[0] == config
        assert read_yaml_mapping(str(file), "") == as_typed(config)


@given(st.sampled_from(sorted(ALLOWED)), st.one_of(st.integers(), st.floats(), words, st.just("")))
def test_no_value_of_a_setting_is_more_than_a_line(name, value):
    """Given as a flag: it is one of its kind and allowed, or one line names the setting."""
    try:
        config, _ = parse(["--class_index", "3", "--train", "True", f"--{name}", str(value)])
        replace(config, device="cpu").validate()
    except UserError as error:
        assert "\n" not in str(error) and (name in str(error) or "seed" in str(error))
    else:
        assert getattr(config, name) is not None or name in MAY_BE_NONE


vectors = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64)


@given(words, vectors, st.dictionaries(words, st.text(st.characters(codec="utf-8"), max_size=50), max_size=5))
def test_a_token_comes_back_and_is_the_same_file_again(placeholder, numbers, header):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "token.safetensors")
        class_token.save(file, placeholder, torch.tensor(numbers), header)
        assert class_token.load(file)[0] == placeholder
        assert class_token.load(file)[1].tolist() == torch.tensor(numbers).tolist()
        assert class_token.load(file)[2] == {"format": "pt", **header}
        before = file.read_bytes()
        class_token.save(file, placeholder, torch.tensor(numbers), dict(reversed(header.items())))
        assert file.read_bytes() == before


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_a_token_or_one_line(noise, cut):
    with tempfile.TemporaryDirectory() as folder:
        for data in (noise, whole_token(folder)[:cut] + noise):
            file = Path(folder, "foreign.safetensors")
            file.write_bytes(data)
            try:
                class_token.load(file)
            except UserError as error:
                assert "\n" not in str(error) and "foreign" in str(error)


def whole_token(folder) -> bytes:
    write_tensors(Path(folder, "whole.safetensors"), {"newclas": torch.ones(8)}, {"label": "crane"})
    return Path(folder, "whole.safetensors").read_bytes()


def steps(config, components, job, until: int) -> list[torch.Tensor]:
    """Updates towards a fixed point with noise of their own, up to update `until`; the vectors so far."""
    learner = start(config, components, job)
    goal = torch.linspace(-1, 1, len(learner.vector))
    while len(learner.history) < until:
        noise = torch.randn(len(goal), generator=torch.Generator().manual_seed(len(learner.history)))
        loss = mse_loss(learner.vector, goal + noise)
        learner.scaler.scale(loss).backward()
        if update(config, learner, loss.item(), 0.0):
            break
    learner.bar.close()
    return learner.vectors


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return {dtype: load_components(tiny_model, "cpu", dtype) for dtype in (torch.float32, torch.float16)}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.integers(1, 11), max_size=4).map(sorted), fresh=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float16]), patience=st.integers(1, 12))
def test_a_training_killed_at_any_updates_ends_the_same(loaded, kills, fresh, dtype, patience):
    config = RunConfig(num_train_epochs=12, lr=0.05, fresh_noise=fresh, early_stopping=patience, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(0, "crane", Path(folder, name), Path(folder, name)) for name in ("whole", "killed")]
        expected = steps(config, loaded[dtype], jobs[0], 12)
        for until in [*kills, 12]:
            found = steps(config, loaded[dtype], jobs[1], until)
        assert torch.equal(torch.stack(found), torch.stack(expected))
        histories = [(job.tokens / "history.jsonl").read_text() for job in jobs]
        assert histories[0] == histories[1]
        states = [read_tensors(job.tokens / "training_state.safetensors")[0] for job in jobs]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
