"""The evaluation of a session's classes: draw, judge, compare with real pictures, show.

Imported only where a command evaluates: plots and distances take seconds to import.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock

from evaluation.accuracy import check_context_judge, describe_gain, judge_class
from evaluation.attention import show_attention
from evaluation.drawing import (
    PAIR,
    Condition,
    digest_json,
    list_conditions,
    list_controls,
    list_film,
)
from evaluation.fidelity import COMPARABLE_FID, check_counts
from evaluation.metrics import load_metrics, save_metrics
from evaluation.real_images import draw_missing_images, find_real_images
from evaluation.report import show_side_by_side
from evaluation.summary import write_summary
from models.extractors import Extractor, describe_features, load_extractor
from models.labels import resolve_name
from prompt_datasets import TargetClass
from runs.folders import RunFolder
from runs.locks import describe_silence, try_lock
from runs.session import Session
from system.paths import is_same_source, list_checkpoint_files, split_revision
from system.tensor_files import read_tensors
from system.terminal import print_warning
from tokens.class_token import load_token, names_file
from utils import UserError, require, to_printable

# settings worth a warning where the token's training had others
WARNED = [
    "model",
    "classifier",
    "guidance_scale",
    "guidance_rescale",
    "height",
    "width",
    "labels",
]
SUMMARY_PATIENCE = 3600.0  # seconds: features of many pictures come between two signs of life


class Evaluation:
    """Draws, judges and shows the classes of a session."""

    def __init__(self, session: Session):
        self.session = session
        self.config = session.config
        if self.config.context_judge:
            check_context_judge(self.config.context_judge)
        self.judged_by = self.describe_judging()
        self.real: dict[TargetClass, list[Path]] = {target: [] for target in session.targets}

    def describe_judging(self) -> list:
        """Describe all that affects a class's metrics besides its pictures."""
        config = self.config
        judges = [name for name in (config.classifier, config.evaluator) if name]
        weights = [list_checkpoint_files(resolve_name(name)[1]) for name in judges]
        return [
            judges,
            weights,
            config.test_size,
            config.context_judge,
            config.real_images,
            self.session.labels,
            config.attention_maps,
        ]

    def load_extractor(self) -> Extractor:
        """Load the features by which pictures are compared with real ones."""
        config, session = self.config, self.session
        return session.call_once(
            load_extractor, config.features, session.device, config.fid_mode, config.labels
        )

    def find_real(self, cache: Path):
        """Find the real pictures of every class, if the command names any.

        `cache` remembers which are readable.

        Raises:
            UserError: a class without readable pictures, or too few generated ones to compare with.
        """
        config, session = self.config, self.session
        if not config.real_images:
            return
        folders = {target: folder.images for target, folder in session.folders.items()}
        count = config.test_size + math.ceil(COMPARABLE_FID / len(session.targets))
        self.real = find_real_images(
            config.real_images, session.every_class(), folders, count, cache
        )
        generated = config.test_size * len(session.targets)
        check_counts(generated, sum(len(files) for files in self.real.values()))

    def list_class_conditions(self, folder: RunFolder) -> tuple[list[Condition], list[Condition]]:
        """List the conditions that are judged, and those of the film over the updates."""
        config, session, target = self.config, self.session, folder.target
        token = load_token(folder.token_file)
        word = config.placeholder_token
        conditions = list_conditions(
            target,
            token.vectors,
            word,
            config.test_size,
            config.eval_prompts,
            session.better_words.get(target),
        )
        if config.controls:
            start: torch.Tensor | str = config.initializer_token
            if config.num_vectors or names_file(start):  # no words say it exactly
                start = session.start_vectors(session.generator).cpu()
            conditions += list_controls(
                target, token.vectors, token.widths, word, config.test_size, start
            )
        frames = {}
        if folder.vectors_file.exists():
            frames, _ = read_tensors(folder.vectors_file)
        return conditions, list_film(target, word, frames)

    def digest_evaluation(self, conditions: list[Condition]) -> str:
        """Compute a digest of all that affects a class's metrics.json."""
        return digest_json([self.session.drawer.describe_conditions(conditions), self.judged_by])

    def is_finished(self, folder: RunFolder) -> bool:
        """Return whether a trained class has all that this command asks for."""
        if not folder.metrics_file.exists():
            return False
        try:
            judged, film = self.list_class_conditions(folder)
            conditions = judged + film
            found = load_metrics(folder.metrics_file)
            if found.evaluation != self.digest_evaluation(conditions):
                return False
            _, missing = self.session.drawer.find_missing(conditions, folder.eval_images)
            return not missing
        except UserError:  # truncated or foreign: evaluated anew, which says what cannot be
            return False

    def evaluate_class(self, folder: RunFolder) -> list[str]:
        """Draw, judge and show the pictures of one class; return notes on it."""
        config, session, target = self.config, self.session, folder.target
        notes = []
        self.warn_of_token(folder)
        conditions, film = self.list_class_conditions(folder)
        drawn = session.drawer.draw_conditions(
            conditions + film, folder.eval_images, target.title, folder.results_of_images()
        )
        if not drawn:
            notes.append("its pictures are there already")
        looks = None
        if config.attention_maps:
            looks = show_attention(
                session.generator,
                conditions[1],
                target.name,
                session.start_vectors(session.generator),
                session.sampling,
                folder.eval_images,
            )
        records = session.drawer.describe_conditions(conditions)
        metrics = judge_class(
            session.judges,
            target,
            [condition.folder for condition in conditions if "/" not in condition.folder],
            config.eval_prompts,
            config.context_judge,
            folder.eval_images,
            config.test_size,
            nearest_words=looks,
            pictures=digest_json([records[name] for name in PAIR]),
            evaluation=self.digest_evaluation(conditions + film),
            film=[condition.folder for condition in film],
            held_out="seed" in load_token(folder.token_file).header,
            settings={**asdict(config), "skip_exists": True},  # started over or not: alike
        )
        real = draw_missing_images(config.real_images, target, self.real[target])
        show_side_by_side(folder, f"class {target.title}", metrics, real)
        save_metrics(folder.metrics_file, metrics)
        notes.append(f"right {describe_gain(metrics, list(session.judges)[-1])}")
        return notes

    def warn_of_token(self, folder: RunFolder):
        """Warn if a class's token was trained with other settings, or by its judge."""
        config = self.config
        warned = list(WARNED)
        if config.controls:  # which draw with what training started from
            warned += ["initializer_token", "num_vectors"]
        changed = folder.changed_settings(asdict(config), warned)
        if changed:
            print_warning(to_printable(f"the token was trained with {'; '.join(changed)}"))
        trained_by = load_token(folder.token_file).header.get("guided_by")
        if config.evaluator and trained_by:
            evaluator, _ = split_revision(config.evaluator)
            if is_same_source(trained_by, evaluator):
                print_warning("the result is biased: the evaluator also trained this token")

    def summarise_classes(self, done: list[RunFolder]) -> bool:
        """Print and write the summary of these classes, unless another process is writing it.

        Returns whether anything of it was new.
        """
        config = self.config
        summary = done[0].summary_file
        real = []
        for folder in done:
            files = self.real[folder.target]
            real.append(draw_missing_images(config.real_images, folder.target, files))
        features = describe_features(config.features, config.fid_mode)
        lock = FileLock(summary.with_name(f".{summary.stem}.lock"))
        if not try_lock(lock):
            files = [summary, *done[0].cache.glob("*")]
            silence = describe_silence(Path(lock.lock_file), files, SUMMARY_PATIENCE)
            require(
                not silence,
                f"the summary is not written, since another process holds it: {silence}",
            )
            print(f"another process is writing {summary}")
            return True
        try:
            return write_summary(done, real, self.load_extractor, features)
        finally:
            lock.release()
