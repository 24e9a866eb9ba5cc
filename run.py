"""Train class tokens and evaluate them.

    python run.py --class_index 283 --train True --evaluate True       Stable Diffusion 1.4 and ImageNet, on a GPU
    python run.py --config configs/miniature.yml --class_index all --train True --evaluate True      without a GPU
    python run.py --config configs/miniature.yml --list_classes
"""

import os
import signal
import sys

from command_line import read_command
from utils import choose_progress, exit_code


def end_process(number: int, _frame=None):
    """End at once, with one line: every file is whole or not there."""
    try:
        os.write(2, f"\nstopped by {signal.Signals(number).name}: the same command resumes, or starts over where "
                    "--skip_exists is False\n".encode())
    finally:  # also where nobody reads
        os._exit(128 + number)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, end_process)
    if _code := exit_code(lambda: read_command(sys.argv[1:], __doc__), debug="--debug" in sys.argv):
        sys.exit(_code)  # before the imports, which take seconds
    choose_progress(quiet="--quiet" in sys.argv)

import contextlib
import functools
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from config import RunConfig, names_deciding
from evaluation.accuracy import describe_gain, judge_class, load_metrics
from evaluation.attention import show_attention
from evaluation.fidelity import COMPARABLE_FID, check_counts
from evaluation.images import ARMS, Arm, Drawer, digest_json, list_arms, list_film_arms
from evaluation.real_images import draw_missing_images, find_real_images
from evaluation.report import show_side_by_side
from evaluation.summary import write_summary
from method.class_token import check_widths, load_token, names_file, start_vectors
from method.losses import LOSSES, build_loss
from method.trainer import TrainingSettings
from models.classifiers import Classifier, load_classifier, load_labels, resolve_name
from models.extractors import describe_features, load_extractor
from models.generator import PRECISIONS, Generator, load_generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, TargetClass, class_name, class_names, number_labels, oracle_words, select_classes
from runs.estimate import EstimateSettings, estimate_run
from runs.folders import RunFolder, check_held_out, describe_paths, list_titles
from runs.tracking import RunTrackers
from runs.workers import Sweep, TrainingJob, choose_device, work_on_classes
from tensor_files import read_tensors
from utils import UserError, list_checkpoint_files, require, to_printable

WARNED = ["model", "guidance_scale", "guidance_rescale", "height", "width", "labels"]  # where training had others
UNNAMED = r"LABEL_\d+|class \d+"  # labels that transformers and we make up


def main(argv: list[str]) -> int:
    """Do what the command line asks for; the exit code: 2 for a user error."""
    with open(os.devnull, "w") if "--quiet" in argv else contextlib.nullcontext(sys.stdout) as out, \
            contextlib.redirect_stdout(out):
        return exit_code(lambda: run_command(argv), debug="--debug" in argv)


def run_command(argv: list[str]):
    config, list_classes = read_command(argv, __doc__)
    if list_classes:
        print(number_labels(load_labels(config.classifier, config.labels)))
    elif config.estimate:
        print(estimate_run(EstimateSettings(**config.pick_settings(EstimateSettings._fields)),
                           SamplingSettings(**config.sampling_settings(training=True))))
    else:
        Run(config).run_sweep()


class Run:
    """One command: its classes and folders, and its models, which are loaded when first needed."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.device = choose_device(config.device, config.mixed_precision, int(os.environ.get("LOCAL_RANK", "-1")))
        self.labels = load_labels(config.classifier, config.labels)
        self.names = class_names(self.labels, config.class_names)
        self.targets = select_classes(config.class_index, self.labels, self.names)
        self.oracle = oracle_words(config.oracle_names, self.labels, self.targets)
        defaults = asdict(RunConfig())
        self.folders = {target: RunFolder(config.output_path, config.classifier, target, config.exp_id, defaults)
                        for target in self.targets}
        self.sampling = SamplingSettings(**config.sampling_settings())
        self.training_sampling = SamplingSettings(**config.sampling_settings(training=True))
        drawn_by = {"weights": list_checkpoint_files(config.model), **config.pick_settings(names_deciding("pictures"))}
        judges = [name for name in (config.classifier, config.evaluator) if name]
        self.judged_by = [judges, [list_checkpoint_files(resolve_name(name)[1]) for name in judges], config.test_size,
                          config.context_judge, config.real_images, self.labels, config.attention_maps]
        self.get_generator = functools.cache(self.load_checked_generator)
        self.get_judges = functools.cache(self.load_judges)
        self.get_loss = functools.cache(
            lambda: build_loss(config.loss, self.get_judges()["classifier"], self.get_generator()))
        self.trackers = RunTrackers(config.report_to, config.output_path, asdict(config)) if config.report_to else None
        self.get_extractor = functools.cache(lambda: load_extractor(config.features, self.device, config.fid_mode,
                                                                    config.labels))
        self.drawer = Drawer(self.get_generator, self.sampling, drawn_by, self.device, config.batch_size)
        self.real: dict[TargetClass, list[Path]] = dict.fromkeys(self.targets, [])

    def run_sweep(self):
        """Train and evaluate the classes that no other process takes; whoever finishes the last writes the summary."""
        config = self.config
        self.check_settings()
        sweep = Sweep(list(self.folders.values()), self.is_finished, start_over=not config.skip_exists)
        untrained = [folder for folder in sweep.folders
                     if config.train and not (config.skip_exists and folder.token_file.exists())]
        if config.token:
            self.import_token()
        for folder in sweep.folders:
            if folder not in untrained and config.evaluate:
                folder.check_token(config.classifier, config.test_size)  # before gigabytes are loaded for nothing
        if config.evaluate and config.real_images:
            self.real = find_real_images(config.real_images, select_classes("all", self.labels, self.names),
                                         {target: folder.images for target, folder in self.folders.items()},
                                         config.test_size + math.ceil(COMPARABLE_FID / len(self.targets)),
                                         sweep.folders[0].cache)
            check_counts(config.test_size * len(self.targets), sum(map(len, self.real.values())))
        if untrained:
            self.get_generator()  # before anything is written
        if any(map(sweep.needs_work, sweep.folders)):
            self.get_judges()
            if untrained:
                self.get_loss()
            if any(self.real.values()):
                self.get_extractor()
        errors = work_on_classes(sweep, self.training_job() if config.train else None,
                                 self.evaluate_class if config.evaluate else lambda folder: None)
        if left := sweep.left_to_others():
            print(f"not finished here, since other processes hold them: {list_titles(left)}")
        done = [folder for folder in sweep.folders if folder in sweep.finished]
        if config.evaluate and done and not left:
            self.summarise_classes(done)
        if done:
            print("token: " + describe_paths(done, "token_file"))
            if config.evaluate:
                print("pictures: " + describe_paths(done, "grid_file"))
        if errors and len(self.targets) == 1:
            raise errors[0]
        require(not errors, f"{len(errors)} of {len(self.targets)} classes failed (see the messages above): "
                            + list_titles(sweep.failed))

    def check_settings(self):
        """Find out before any long work, and before anything is written, what cannot work."""
        config = self.config
        require(config.loss in LOSSES or ":" in config.loss,
                f"loss must be {', '.join(LOSSES)} or module:function, not '{config.loss}'")
        for text in (*(target.name for target in self.targets), *TEMPLATES, *config.eval_prompts):
            require(config.placeholder_token.lower() not in text.lower(),  # the tokenizer would find it in there
                    f"placeholder_token '{config.placeholder_token}' is part of '{text}': take a word that "
                    "stands nowhere else")
        unnamed = [target for target in self.targets if re.fullmatch(UNNAMED, target.label)
                   and target.name == class_name(target.label)]
        if config.train and unnamed:
            print(f"warning: '{config.classifier}' does not name its classes, so prompts will say '{unnamed[0].name}': "
                  "give their names by --class_names", file=sys.stderr)
        if config.train and config.skip_exists:
            for folder in self.folders.values():
                folder.refuse_other_settings(asdict(config), names_deciding("token"))
        if config.train and names_file(config.initializer_token):
            check_held_out(config.initializer_token, load_token(config.initializer_token).header, config.test_size)
        if config.token:
            require(len(self.targets) == 1, "token is one class's: give that class as --class_index")
            check_held_out(config.token, load_token(config.token).header, config.test_size)

    def import_token(self):
        """Copy the token of the setting into the run, once the generator has taken it."""
        config, token, (folder,) = self.config, load_token(self.config.token), self.folders.values()
        if not folder.token_file.exists():
            self.get_generator()
        folder.import_token(token, config.placeholder_token, Path(config.token).name, not config.skip_exists)

    def load_checked_generator(self) -> Generator:
        """The frozen generator, sure to take every prompt of these classes."""
        config = self.config
        generator = load_generator(config.model, self.device, PRECISIONS[config.mixed_precision],
                                   config.gradient_checkpointing, config.torch_compile)
        generator.set_placeholder(config.placeholder_token)
        if config.token:
            check_widths(token := load_token(config.token), generator)
            vectors = token.vectors.to(generator.device)
        else:
            vectors = start_vectors(generator, config.initializer_token, config.num_vectors)
            if len(vectors) > 1:
                print(f"the token has {len(vectors)} vectors, started from '{config.initializer_token}'")
        generator.check_sampling(self.sampling)
        if config.train:
            generator.check_sampling(self.training_sampling, is_training=True)
        for mismatch in generator.describe_mismatches(self.sampling):
            print(f"warning: '{config.model}': {mismatch}", file=sys.stderr)
        templates = [*TEMPLATES[:config.number_of_prompts], *(config.eval_prompts if config.evaluate else [])]
        with torch.no_grad():
            for target in self.targets:
                generator.encode([template.format(f"{config.placeholder_token} {target.name}")
                                  for template in templates], vectors.expand(len(templates), *vectors.shape))
                generator.encode([TEMPLATES[0].format(self.oracle.get(target, ""))])
        return generator

    def load_judges(self) -> dict[str, Classifier]:
        """The guiding classifier, and for an evaluation the evaluator."""
        config = self.config
        more = config.height, config.width, config.labels
        judges = {"classifier": load_classifier(config.classifier, self.device, *more)}
        if config.evaluator and config.evaluate:
            judges["evaluator"] = load_classifier(config.evaluator, self.device, *more)
            require(judges["evaluator"].labels == self.labels,
                    f"the evaluator '{config.evaluator}' must know the same classes in the same order as the "
                    f"classifier '{config.classifier}'")
            if judges["evaluator"].name == judges["classifier"].name:
                print("warning: the evaluator is the guiding classifier itself: a token flatters its own judge",
                      file=sys.stderr)
        return judges

    def training_job(self) -> TrainingJob:
        config = self.config
        settings = TrainingSettings(**config.pick_settings(TrainingSettings._fields))
        return TrainingJob(self.get_generator, self.get_loss, settings, self.training_sampling, asdict(config),
                           names_deciding("token"), config.classes_at_once, config.batch_size, self.trackers)

    def list_class_arms(self, folder: RunFolder) -> tuple[list[Arm], list[Arm]]:
        """The arms that are judged, and those of the film over the updates."""
        config, token, start = self.config, load_token(folder.token_file), self.config.initializer_token
        if config.controls and (config.num_vectors or names_file(start)):  # no words say it exactly
            start = start_vectors(self.get_generator(), start, config.num_vectors).cpu()
        arms = list_arms(folder.target, token, config.placeholder_token, config.test_size, config.eval_prompts,
                         config.controls, start, self.oracle.get(folder.target))
        frames = read_tensors(folder.vectors_file)[0] if folder.vectors_file.exists() else {}
        return arms, list_film_arms(folder.target, config.placeholder_token, frames)

    def digest_evaluation(self, arms: list[Arm]) -> str:
        """Of all that decides a class's metrics.json."""
        return digest_json([self.drawer.describe_arms(arms), self.judged_by])

    def is_finished(self, folder: RunFolder) -> bool:
        """Whether all that this command asks for is there, of these settings."""
        if not (self.config.evaluate and folder.token_file.exists()):
            return folder.token_file.exists()
        try:
            arms, film = self.list_class_arms(folder)
            return (folder.metrics_file.exists()
                    and load_metrics(folder.metrics_file)["evaluation"] == self.digest_evaluation(arms + film)
                    and not self.drawer.find_missing(arms + film, folder.eval_images)[1])
        except UserError:  # truncated or foreign: evaluated again, which says what cannot be
            return False

    def evaluate_class(self, folder: RunFolder):
        """Draw, judge and show the pictures of one class."""
        config, target = self.config, folder.target
        arms, film = self.list_class_arms(folder)
        header = load_token(folder.token_file).header
        warned = WARNED + ["initializer_token", "num_vectors"] * config.controls  # which the untrained arm shows
        if changed := folder.changed_settings(asdict(config), warned):
            print(to_printable(f"warning: the token was trained with {'; '.join(changed)}"), file=sys.stderr)
        if config.evaluator and header.get("guided_by") == config.evaluator:
            print("warning: the evaluator guided this token, which flatters it", file=sys.stderr)
        if not self.drawer.draw_arms(arms + film, folder.eval_images, target.title, folder.results_of_images()):
            folder.notes.append("its pictures are there already")
        drawn = self.drawer.describe_arms(arms)
        looks = show_attention(
            self.get_generator(), arms[1], target.name, config.initializer_token, config.num_vectors, self.sampling,
            folder.eval_images) if config.attention_maps else None
        metrics = judge_class(
            self.get_judges(), target, [arm.folder for arm in arms if "/" not in arm.folder], config.eval_prompts,
            config.context_judge, folder.eval_images, config.test_size, nearest_words=looks,
            pictures=digest_json([drawn[arm] for arm in ARMS]), evaluation=self.digest_evaluation(arms + film),
            film=[arm.folder for arm in film], held_out="seed" in header,
            settings={**asdict(config), "skip_exists": True})  # started over or not: the same results
        real = draw_missing_images(config.real_images, target, self.real[target])
        show_side_by_side(folder, f"class {target.title}", metrics, real)
        folder.save_metrics(metrics)
        folder.notes.append(f"right {describe_gain(metrics, list(self.get_judges())[-1])}")

    def summarise_classes(self, done: list[RunFolder]):
        """Print and write the summary of these classes, unless another process is just writing it."""
        config, summary = self.config, done[0].summary_file
        real = [draw_missing_images(config.real_images, folder.target, self.real[folder.target]) for folder in done]
        try:
            with FileLock(summary.with_name(f".{summary.stem}.lock"), blocking=False):
                write_summary(done, real, self.get_extractor, describe_features(config.features, config.fid_mode))
        except Timeout:
            print(f"another process is writing {summary}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
