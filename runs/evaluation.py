"""The evaluation of a session's classes: real pictures found, pictures drawn, judged and shown, a summary.

Imported only where a command evaluates: plots and distances take seconds to import.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from config import names_deciding
from evaluation.accuracy import check_context_judge, describe_gain, judge_class, load_metrics
from evaluation.attention import show_attention
from evaluation.fidelity import COMPARABLE_FID, check_counts
from evaluation.images import ARMS, Arm, Drawer, digest_json, list_arms, list_film_arms
from evaluation.real_images import draw_missing_images, find_real_images
from evaluation.report import show_side_by_side
from evaluation.summary import write_summary
from models.extractors import Extractor, describe_features, load_extractor
from models.labels import resolve_name
from prompt_datasets import TargetClass, select_classes
from runs.folders import RunFolder
from runs.locks import describe_silence, try_lock
from system.paths import is_same_source, list_checkpoint_files, split_revision
from system.tensor_files import read_tensors
from tokens.class_token import load_token, names_file, start_vectors
from utils import UserError, require, to_printable

# settings worth a warning where the token's training had others
WARNED = ["model", "classifier", "guidance_scale", "guidance_rescale", "height", "width", "labels"]
SUMMARY_PATIENCE = 3600.0  # seconds: features of thousands of pictures come between two signs of life


class Evaluation:
    """Draws, judges and shows the classes of a session; its extractor is loaded when first needed."""

    def __init__(self, session):
        """`session` is the Session whose models draw and judge."""
        self.session, self.config = session, session.config
        config = self.config
        if config.context_judge:
            check_context_judge(config.context_judge)
        self.drawer = Drawer(session.get_generator, session.sampling, self.describe_drawing(), session.device,
                             config.batch_size)
        self.judged_by = self.describe_judging()
        self.get_extractor: Callable[[], Extractor] = functools.cache(
            lambda: load_extractor(config.features, session.device, config.fid_mode, config.labels))
        self.real: dict[TargetClass, list[Path]] = dict.fromkeys(session.targets, [])

    def describe_drawing(self) -> dict:
        """All that decides the pictures besides prompt, token and seed."""
        return {"weights": list_checkpoint_files(self.config.model),
                **self.config.pick_settings(names_deciding("pictures"))}

    def describe_judging(self) -> list:
        """All that decides a class's metrics besides its pictures."""
        config = self.config
        judges = [name for name in (config.classifier, config.evaluator) if name]
        weights = [list_checkpoint_files(resolve_name(name)[1]) for name in judges]
        return [judges, weights, config.test_size, config.context_judge, config.real_images, self.session.labels,
                config.attention_maps]

    def find_real(self, cache: Path):
        """Find the real pictures of every class, if the command names any; `cache` remembers which are readable.

        Raises:
            UserError: a class without readable pictures, or too few generated ones to compare with.
        """
        config, session = self.config, self.session
        if not config.real_images:
            return
        every_class = select_classes("all", session.labels, session.names)
        folders = {target: folder.images for target, folder in session.folders.items()}
        count = config.test_size + math.ceil(COMPARABLE_FID / len(session.targets))
        self.real = find_real_images(config.real_images, every_class, folders, count, cache)
        check_counts(config.test_size * len(session.targets), sum(map(len, self.real.values())))

    def list_class_arms(self, folder: RunFolder) -> tuple[list[Arm], list[Arm]]:
        """The arms that are judged, and those of the film over the updates."""
        config, session = self.config, self.session
        token, start = load_token(folder.token_file), config.initializer_token
        if config.controls and (config.num_vectors or names_file(start)):  # no words say it exactly
            start = start_vectors(session.get_generator(), start, config.num_vectors).cpu()
        arms = list_arms(folder.target, token.vectors, token.widths, config.placeholder_token, config.test_size, config.eval_prompts,
                         config.controls, start, session.oracle.get(folder.target))
        frames = read_tensors(folder.vectors_file)[0] if folder.vectors_file.exists() else {}
        return arms, list_film_arms(folder.target, config.placeholder_token, frames)

    def digest_evaluation(self, arms: list[Arm]) -> str:
        """Of all that decides a class's metrics.json."""
        return digest_json([self.drawer.describe_arms(arms), self.judged_by])

    def is_finished(self, folder: RunFolder) -> bool:
        """Whether a class that has its token has all that this command asks for, of these settings."""
        try:
            arms, film = self.list_class_arms(folder)
            return (folder.metrics_file.exists()
                    and load_metrics(folder.metrics_file)["evaluation"] == self.digest_evaluation(arms + film)
                    and not self.drawer.find_missing(arms + film, folder.eval_images)[1])
        except UserError:  # truncated or foreign: evaluated again, which says what cannot be
            return False

    def evaluate_class(self, folder: RunFolder):
        """Draw, judge and show the pictures of one class."""
        config, session, target = self.config, self.session, folder.target
        self.warn_of_token(folder)
        arms, film = self.list_class_arms(folder)
        if not self.drawer.draw_arms(arms + film, folder.eval_images, target.title, folder.results_of_images()):
            folder.notes.append("its pictures are there already")
        drawn = self.drawer.describe_arms(arms)
        looks = show_attention(
            session.get_generator(), arms[1], target.name, start_vectors(
                session.get_generator(), config.initializer_token, config.num_vectors), session.sampling, folder.eval_images) if config.attention_maps else None
        metrics = judge_class(
            session.get_judges(), target, [arm.folder for arm in arms if "/" not in arm.folder], config.eval_prompts,
            config.context_judge, folder.eval_images, config.test_size, nearest_words=looks,
            pictures=digest_json([drawn[arm] for arm in ARMS]), evaluation=self.digest_evaluation(arms + film),
            film=[arm.folder for arm in film], held_out="seed" in load_token(folder.token_file).header,
            settings={**asdict(config), "skip_exists": True})  # started over or not: the same results
        real = draw_missing_images(config.real_images, target, self.real[target])
        show_side_by_side(folder, f"class {target.title}", metrics, real)
        folder.save_metrics(metrics)
        folder.notes.append(f"right {describe_gain(metrics, list(session.get_judges())[-1])}")

    def warn_of_token(self, folder: RunFolder):
        """Say where a class's token was trained otherwise than it is drawn now, or guided by its judge."""
        config = self.config
        warned = WARNED + ["initializer_token", "num_vectors"] * config.controls  # which the untrained arm shows
        changed = folder.changed_settings(asdict(config), warned)
        if changed:
            print(to_printable(f"warning: the token was trained with {'; '.join(changed)}"), file=sys.stderr)
        guide = load_token(folder.token_file).header.get("guided_by")
        if config.evaluator and guide and is_same_source(guide, split_revision(config.evaluator)[0]):
            print("warning: the evaluator guided this token, which flatters it", file=sys.stderr)

    def summarise_classes(self, done: list[RunFolder]) -> bool:
        """Print and write the summary of these classes, unless another process is just writing it.

        Returns whether anything of it was new.
        """
        config, summary = self.config, done[0].summary_file
        real = [draw_missing_images(config.real_images, folder.target, self.real[folder.target]) for folder in done]
        features = describe_features(config.features, config.fid_mode)
        lock = FileLock(summary.with_name(f".{summary.stem}.lock"))
        if not try_lock(lock):
            files = [summary, *done[0].cache.glob("*")]
            silence = describe_silence(Path(lock.lock_file), files, SUMMARY_PATIENCE)
            require(not silence, f"the summary is not written, since another process holds it: {silence}")
            print(f"another process is writing {summary}")
            return True
        try:
            return write_summary(done, real, self.get_extractor, features)
        finally:
            lock.release()
