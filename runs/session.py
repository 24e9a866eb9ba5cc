"""A command at work: its classes, folders and models, and the sweep over them."""

import functools
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

from config import RunConfig, names_deciding
from evaluation.files import MANY
from method.class_training import TrainingSettings
from method.losses import LOSSES, build_loss
from models.classifiers import Classifier, load_classifier, load_evaluator, load_labels
from models.generator import PRECISIONS, Generator, load_generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, class_name, class_names, oracle_words, select_classes
from runs.estimate import EstimateSettings, estimate_run
from runs.folders import RunFolder, check_held_out, describe_paths, list_titles
from runs.locks import warn_without_locks
from runs.start import pin_checkpoints
from runs.sweep import Sweep, TrainingJob, choose_device, work_on_classes
from runs.tracking import RunTrackers
from tokens.class_token import check_widths, load_token, names_file, start_vectors
from utils import UserError, require

UNNAMED = r"LABEL_\d+|class \d+"  # labels that transformers and we make up


class Session:
    """One command: its classes and folders, and its models, which are loaded when first needed."""

    def __init__(self, config: RunConfig):
        self.config = config = pin_checkpoints(config)
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
        self.get_generator = functools.cache(self.load_checked_generator)
        self.get_judges = functools.cache(self.load_judges)
        self.get_loss = functools.cache(
            lambda: build_loss(config.loss, self.get_judges()["classifier"], self.get_generator()))
        self.get_evaluation = functools.cache(self.open_evaluation)
        self.trackers = RunTrackers(config.report_to, config.output_path, asdict(config)) if config.report_to else None

    def open_evaluation(self):
        """How these classes are evaluated."""
        from runs.evaluation import Evaluation  # here: plots and distances take seconds to import

        return Evaluation(self)

    def run_sweep(self):
        """Train and evaluate the classes that no other process takes; who finishes the last writes the summary."""
        config = self.config
        warn_without_locks(config.output_path)
        self.check_settings()
        sweep = Sweep(list(self.folders.values()), self.is_finished, start_over=not config.skip_exists)
        self.prepare_models(sweep)
        errors = work_on_classes(sweep, self.training_job() if config.train else None, self.evaluate_class)
        silent = self.tell_results(sweep)
        if errors and len(self.targets) == 1:
            raise errors[0]
        require(not errors, f"{len(errors)} of {len(self.targets)} classes failed (see the messages above): "
                            + list_titles(sweep.failed))
        if silent:
            raise UserError(describe_silent(silent))

    def prepare_models(self, sweep: Sweep):
        """Load what this command needs, and try it, before anything is written."""
        config = self.config
        untrained = [folder for folder in sweep.folders
                     if config.train and not (config.skip_exists and folder.token_file.exists())]
        if config.token:
            self.import_token()
        if config.evaluate:
            for folder in sweep.folders:
                if folder not in untrained:
                    folder.check_token(config.classifier, config.test_size)
            self.get_evaluation().find_real(sweep.folders[0].cache)
        if untrained:
            self.get_generator()
        if any(map(sweep.needs_work, sweep.folders)):
            self.get_judges()
            if untrained:
                self.get_loss()
            if config.evaluate and any(self.get_evaluation().real.values()):
                self.get_evaluation().get_extractor()

    def is_finished(self, folder: RunFolder) -> bool:
        """Whether all that this command asks of a class is there, of these settings."""
        if not folder.token_file.exists():
            return False
        return not self.config.evaluate or self.get_evaluation().is_finished(folder)

    def evaluate_class(self, folder: RunFolder):
        if self.config.evaluate:
            self.get_evaluation().evaluate_class(folder)

    def tell_results(self, sweep: Sweep) -> dict[RunFolder, str]:
        """Print where the results are, and the summary once no other process works on these classes.

        Returns the classes whose holder seems dead, and what to say of their locks.
        """
        evaluates = self.config.evaluate
        left = sweep.left_to_others()
        silences = {folder: folder.describe_silence() for folder in left}
        silent = {folder: text for folder, text in silences.items() if text}
        alive = [folder for folder in left if folder not in silent]
        if alive:
            print(f"not finished here, since other processes hold them: {list_titles(alive)}")
        done = [folder for folder in sweep.folders if folder in sweep.finished]
        if not done:
            return silent
        if evaluates and not left:
            is_new = self.get_evaluation().summarise_classes(done)
            if not is_new and len(done) > MANY:  # a finished thousand is a line
                return silent
        print("token: " + describe_paths(done, "token_file"))
        if evaluates:
            print("pictures: " + describe_paths(done, "grid_file"))
        return silent

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
            check_widths(token := load_token(config.token), generator, config.token)
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
        for target in self.targets:
            prompts = [template.format(f"{config.placeholder_token} {target.name}") for template in templates]
            prompts.append(TEMPLATES[0].format(self.oracle.get(target, "")))
            generator.check_prompts(prompts, len(vectors))
        return generator

    def load_judges(self) -> dict[str, Classifier]:
        """The guiding classifier, and for an evaluation the evaluator."""
        config = self.config
        more = config.height, config.width, config.labels
        judges = {"classifier": load_classifier(config.classifier, self.device, *more)}
        if config.evaluator and config.evaluate:
            judges["evaluator"] = load_evaluator(config.evaluator, self.labels, self.device, *more)
            if judges["evaluator"].name == judges["classifier"].name:
                print("warning: the evaluator is the guiding classifier itself: a token flatters its own judge",
                      file=sys.stderr)
        return judges

    def training_job(self) -> TrainingJob:
        config = self.config
        settings = TrainingSettings(**config.pick_settings(TrainingSettings._fields))
        return TrainingJob(self.get_generator, self.get_loss, settings, self.training_sampling, asdict(config),
                           names_deciding("token"), config.classes_at_once, config.batch_size, self.trackers)


def describe_silent(silences: dict[RunFolder, str]) -> str:
    """What to do about classes whose holders seem dead, by what is to be said of their locks."""
    first, *others = silences
    more = f" (so are {list_titles(others)})" if others else ""
    return f"class {first.target.title} is not finished{more}, and its lock {silences[first]}"


def estimate_training(config: RunConfig) -> str:
    """What training by `config` would take, as text, from configs alone; a UserError for what a run would refuse."""
    settings = EstimateSettings(**config.pick_settings(EstimateSettings._fields))
    return estimate_run(settings, SamplingSettings(**config.sampling_settings(training=True)))
