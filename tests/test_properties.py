"""Properties that hold for any input: classes, folders, settings, tokens, and a training killed at
any update.
"""

import re
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import mse_loss

from command_line import parse_settings
from config import SETTINGS, RunConfig, value_type
from method.class_training import ClassTraining, TrainingSettings, UpdateFigures
from prompt_datasets import class_folder, class_name, prompt_folder, select_classes, target_class
from system.tensor_files import write_tensors
from system.text_files import read_yaml, to_words
from tokens.class_token import load_token, save_token
from utils import UserError, write_yaml

COUNT = 1000
LABELS = [f"thing {i}" for i in range(COUNT)]
words = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20
)
printable = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), max_size=40
).filter(str.isprintable)


def parts():
    """'7' or '3-12', and the numbers from 0 that it means."""
    number = st.integers(1, COUNT)
    return st.one_of(
        number.map(lambda n: (str(n), [n - 1])),
        st.tuples(number, number)
        .map(sorted)
        .map(lambda pair: ("-".join(map(str, pair)), list(range(pair[0] - 1, pair[1])))),
    )


@given(st.lists(parts(), min_size=1, max_size=6), st.sampled_from([",", ", ", " ,"]))
def test_a_selection_is_its_parts_in_order_each_class_once(chosen, comma):
    expected = dict.fromkeys(index for _, indexes in chosen for index in indexes)
    selected = select_classes(comma.join(text for text, _ in chosen), LABELS, LABELS)
    assert [target.index for target in selected] == list(expected)
    assert all(target.number == target.index + 1 for target in selected)


@given(st.text(max_size=30))
def test_any_text_selects_classes_or_is_refused(text):
    try:
        chosen = [target.index for target in select_classes(text, LABELS, LABELS)]
    except UserError:
        return
    assert chosen and set(chosen) <= set(range(COUNT)) and len(set(chosen)) == len(chosen)


@given(st.lists(st.text(max_size=400), min_size=1, max_size=20))
def test_folders_are_distinct_plain_and_short(labels):
    folders = [class_folder(i, class_name(label)) for i, label in enumerate(labels, 1)]
    assert len(set(folders)) == len(folders)
    assert all(
        re.fullmatch(r"\d{4}(_[a-z0-9]+)*", folder) and len(folder) <= 85 for folder in folders
    )


@given(st.text(max_size=400))
def test_prompts_have_plain_folders(template):
    assert re.fullmatch(r"[a-z0-9_]{1,70}", prompt_folder(template))


def any_config():
    """Settings that validate, and some that would not: a file gives back what was written either
    way.
    """
    numbers = st.floats(1e-12, 1e9, allow_nan=False)
    return st.builds(
        RunConfig,
        class_index=words,
        train=st.booleans(),
        exp_id=words,
        model=words,
        evaluator=st.none() | words,
        class_names=st.none() | words,
        lr=numbers,
        eps=numbers,
        betas=st.lists(numbers, min_size=1, max_size=3),
        seed=st.integers(0, 2**32),
        batch_size=st.none() | st.integers(1, 99),
        guidance_scale=numbers,
        train_timesteps=st.none() | st.lists(st.integers(0, 999), min_size=1, max_size=5),
        eval_prompts=st.lists(printable.map(lambda text: f"A {text}{{}}"), max_size=3),
        fresh_noise=st.booleans(),
    )


@given(
    any_config().filter(
        lambda config: (
            not {"none", "null", "~", ""} & {str(v) for v in vars(config).values()}
            and not set("~$") & set(f"{config.model}{config.evaluator}{config.class_names}")
        )
    )
)
def test_a_config_comes_back_from_its_file_and_from_flags(config):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yml")
        write_yaml(file, asdict(config))
        assert parse_settings(["--config", str(file)])[0] == config
        assert read_yaml(str(file), "") == to_words(asdict(config))


CHECKED = [name for name, setting in SETTINGS.items() if setting.metadata["check"]]


@given(st.sampled_from(CHECKED), st.one_of(st.integers(), st.floats(), words, st.just("")))
def test_no_value_of_a_setting_is_more_than_a_line(name, value):
    """Given as a flag: it is one of its kind and allowed, or one line names the setting."""
    try:
        config, _ = parse_settings(
            ["--class_index", "3", "--train", "True", f"--{name}", str(value)]
        )
        config.validate_settings()
    except UserError as error:
        assert "\n" not in str(error) and (name in str(error) or "seed" in str(error))
    else:
        assert getattr(config, name) is not None or value_type(SETTINGS[name])[2]


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.integers(1, 64).flatmap(
    lambda width: st.lists(
        st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=3
    )
)


@given(
    words,
    vectors,
    st.dictionaries(words, st.text(st.characters(codec="utf-8"), max_size=50), max_size=5),
)
def test_a_token_comes_back_and_is_the_same_file_again(placeholder, rows, header):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "token.safetensors")
        save_token(file, placeholder, torch.tensor(rows), (len(rows[0]),), header)
        token = load_token(file)
        assert (
            token.placeholder == placeholder
            and token.vectors.tolist() == torch.tensor(rows).tolist()
        )
        assert token.header == {"format": "pt", **header}
        before = file.read_bytes()
        save_token(
            file, placeholder, torch.tensor(rows), (len(rows[0]),), dict(reversed(header.items()))
        )
        assert file.read_bytes() == before


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_a_token_or_one_line(noise, cut):
    with tempfile.TemporaryDirectory() as folder:
        for data in (noise, whole_token(folder)[:cut] + noise):
            file = Path(folder, "foreign.safetensors")
            file.write_bytes(data)
            try:
                load_token(file)
            except UserError as error:
                assert "\n" not in str(error) and "foreign" in str(error)


def whole_token(folder) -> bytes:
    write_tensors(Path(folder, "whole.safetensors"), {"newclas": torch.ones(8)}, {"label": "crane"})
    return Path(folder, "whole.safetensors").read_bytes()


def train_until(folder: Path, settings: TrainingSettings, dtype: torch.dtype, until: int):
    """Updates towards a fixed point with noise of their own, up to update `until`; the end where
    there is one.
    """
    target = target_class(0, "crane", "crane, bird")
    trainer = ClassTraining(
        target,
        torch.zeros(2, 8),
        settings,
        dtype,
        folder / "history.jsonl",
        folder / "state.pt",
        folder,
    )
    goal, stop = torch.linspace(-1, 1, 16).view(2, 8), None
    while stop is None and len(trainer.history) < until:
        noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(len(trainer.history)))
        losses = mse_loss(trainer.vectors, goal + noise).expand(settings.epoch_size)
        (losses * trainer.image_weights()).sum().backward()
        stop = trainer.finish_update(
            UpdateFigures(losses.detach(), torch.zeros(settings.epoch_size), 0.0)
        ).stop
    trainer.bar.close()
    return trainer.trained_token(stop) if stop else None


@settings(max_examples=25, deadline=None)
@given(
    kills=st.lists(st.integers(1, 11), max_size=4).map(sorted),
    fresh_noise=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    patience=st.integers(1, 12),
)
def test_a_training_killed_at_any_updates_ends_the_same(kills, fresh_noise, dtype, patience):
    config = RunConfig(
        num_train_epochs=12, epoch_size=1, lr=0.05, fresh_noise=fresh_noise, early_stopping=patience
    )
    training = TrainingSettings(**config.pick_settings(TrainingSettings._fields))
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        expected = train_until(whole, training, dtype, until=12)
        for until in [*kills, 12]:
            found = train_until(killed, training, dtype, until)
        assert torch.equal(found.every_update, expected.every_update) and torch.equal(
            found.vectors, expected.vectors
        )
        assert (found.loss, found.accuracy, found.stopped) == (
            expected.loss,
            expected.accuracy,
            expected.stopped,
        )
        assert (whole / "history.jsonl").read_text() == (killed / "history.jsonl").read_text()
        states = [torch.load(file, weights_only=True) for file in Path(folder).glob("*/state.pt")]
        assert all(
            torch.equal(states[0][key], states[1][key]) for key in ("vectors", "past") if states
        )
