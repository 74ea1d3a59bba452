"""``fit``, ``validate`` and ``test`` of a recipe: LightningCLI over our module and data module, with runs that can be killed and resumed.

A run's folder holds ``config.yaml`` (the resolved recipe), ``model.safetensors`` and ``config.json`` (what :func:`medvl.load` reads),
``resume.ckpt``, ``logs/`` and, if anything was left out, ``rejected.csv``.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from rich.console import Console
from rich.progress import Progress

from medvl.data.cache import SampleCache
from medvl.data.shards import ShardStore
from medvl.data.studies import views_of
from medvl.files import write_atomically
from medvl.memory import keep_freed_memory
from medvl.model import CONFIG, WEIGHTS, load_weights
from medvl.nn.projector import ProjectedEncoder
from medvl.training.callbacks import RESOLVED, AtomicCheckpointIO, KeepBest, ListUnread, ResumePoint
from medvl.training.data import REJECTED, StudyDataModule
from medvl.training.estimate import estimate, show
from medvl.training.module import AlignmentModule
from medvl.training.offset import write_offset
from medvl.training.signals import RESUME, SaveOnSignal, explained, no_other_requeue
from medvl.training.watch import Watch

log = logging.getLogger(__name__)


class RunError(RuntimeError):
    """A run that ended for want of something outside it; the message says what to do."""


class SaveResolvedConfig(SaveConfigCallback):
    """Write the resolved recipe beside the weights."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """``config.yaml`` in the run's folder, from fits only."""
        if stage == "fit":
            text = self.parser.dump(self.config, skip_none=False)
            folder = Path(self.config.out)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / RESOLVED, text.encode())


class AlignmentCLI(LightningCLI):
    """LightningCLI with a run folder, exact resuming, and inputs that are checked, listed and counted before the first step."""

    rejected = 0
    _trial: tempfile.TemporaryDirectory[str] | None = None  # of a dry run

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the command line and run.

        Raises:
            RunError: what a person can mend ended the run.
        """
        try:
            super().__init__(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            config = getattr(self, "config", None)  # none where the command line itself was refused
            if config is None or (words := explained(error, Path(config[config.subcommand].out))) is None:
                raise
            raise RunError(words) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Arguments of the run itself."""
        parser.add_argument("--out", type=str, default="runs/last", help="folder of the run: weights, resolved recipe, logs, checkpoint")
        parser.add_argument("--resume", type=bool, default=False, help="go on from the run's resume.ckpt, if there is one")
        parser.add_argument("--checkpoint_every", type=int, default=200, help="steps between two writings of resume.ckpt")
        parser.add_argument("--keep_best", type=bool, default=True, help="keep the best model by --monitor; false keeps the last")
        parser.add_argument("--monitor", type=str, default="val/loss", help="logged value that says which model is the best")
        parser.add_argument("--mode", type=Literal["min", "max"], default="min", help="whether the best is the lowest or the highest")
        parser.add_argument("--dry_run", type=bool, default=False, help="say what the run would cost and write nothing (also --dry-run)")
        parser.add_argument("--wandb", type=bool, default=False, help="log for Weights & Biases too, offline (extra 'wandb')")
        parser.add_argument("--mlflow", type=bool, default=False, help="log for MLflow too, into the run's folder (extra 'mlflow')")
        parser.add_argument("--tensorboard", type=bool, default=False, help="log for TensorBoard too (extra 'tensorboard')")

    def before_instantiate_classes(self) -> None:
        """Find out before any image is read whether the run's folder can be written to, or has the weights to be measured."""
        out = Path(self.config[self.subcommand].out)
        if self.subcommand == "fit" and self.config.fit.dry_run:
            self._trial = tempfile.TemporaryDirectory(prefix="medvl-dry-run-")
            _move_caches(self.config.fit, self._trial.name)
            there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise ValueError(f"--out {out}: cannot be made a folder to write to")
        elif self.subcommand == "fit":
            try:
                out.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=out):
                    pass
            except OSError as error:
                raise ValueError(f"--out {out}: cannot be made a folder to write to: {error.strerror}") from error
        elif not (out / WEIGHTS).is_file():
            raise FileNotFoundError(f"{out / WEIGHTS} does not exist; run `medvl fit` with the same --out first")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with our callbacks, loggers and checkpoint format."""
        config = self.config_init[self.subcommand]
        out = Path(config.out)
        loggers: list[Logger] = [CSVLogger(out, name="logs")]
        dry = self.subcommand == "fit" and config.dry_run
        loggers += [make(out) for name, make in LOGGERS.items() if config[name] and not dry]
        chosen = config.trainer
        callbacks: list[Any] = [*(chosen.callbacks or []), ListUnread(out)]
        if chosen.enable_progress_bar is not False:
            callbacks.append(RichProgressBar(leave=False, console_kwargs={"stderr": True}))
        if self.subcommand == "fit":
            best = KeepBest(out, monitor=config.monitor, best=config.keep_best, mode=config.mode)
            callbacks += [best, ResumePoint(out, config.checkpoint_every), SaveOnSignal(out / RESUME), LearningRateMonitor("step"), Watch()]
        trainer = super().instantiate_trainer(
            callbacks=callbacks,
            logger=loggers if chosen.logger is None else chosen.logger,
            plugins=[*(chosen.plugins or []), AtomicCheckpointIO()],
            default_root_dir=str(out),
            **kwargs,
        )
        no_other_requeue(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; of a fit that is to be tried alone say, in one process, what it would cost."""
        if subcommand != "fit":
            super()._run_subcommand(subcommand)
            return
        with self._on_signal.listening(self.trainer):
            if self.config_init.fit.dry_run:
                self._try()
            else:
                super()._run_subcommand(subcommand)

    def _try(self) -> None:
        data, given = self.datamodule, self.config_init.fit.trainer.callbacks or []
        assert isinstance(data, StudyDataModule) and self._trial is not None
        with self._trial:
            if not self.trainer.is_global_zero:
                return
            self._check(data)
            data.setup()
            callbacks = given if isinstance(given, list) else [given]
            show(estimate(self.model, data, self.trainer, callbacks), console := Console())
        console.print(f"Nothing was written to {self.config_init.fit.out}.")

    @property
    def _on_signal(self) -> SaveOnSignal:
        return next(one for one in self.trainer.callbacks if isinstance(one, SaveOnSignal))  # type: ignore[attr-defined]

    def before_fit(self) -> None:
        """Read every image once, list what cannot be used, embed the texts of a frozen tower, and find the checkpoint."""
        self._prepare(("train", "val"))
        config = self.config_init[self.subcommand]
        checkpoint = Path(config.out) / RESUME
        if config.resume or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:  # a requeued job has the command it began with
            if checkpoint.is_file():
                config.ckpt_path = str(checkpoint)
            else:
                log.warning("%s: nothing to resume from, starting anew", checkpoint)
        if not config.ckpt_path:
            self.model.take_start()
        if self.trainer.strategy.root_device.type == "cpu":  # after the images were read: what is kept of them is not among holes
            keep_freed_memory()
        self._on_signal.leave_rendezvous(self.trainer)

    def before_validate(self) -> None:
        """Take the weights that the run kept."""
        self._prepare(("val",))
        self._load_kept()

    def before_test(self) -> None:
        """Take the weights that the run kept."""
        self._prepare(("test",))
        self._load_kept()

    def _load_kept(self) -> None:
        load_weights(self.model.dual_encoder(self.datamodule.reader), Path(self.config_init[self.subcommand].out))

    def _check(self, data: StudyDataModule) -> None:
        kinds = [data.modality] if isinstance(data.modality, str) else list(data.modality)
        for kind in kinds:
            if views_of(data.views, kind) == "study" and not self.model.image.pools(kind):
                tower = {"xray": "modalities.xray.views.ViewPooledEncoder", "ct": "modalities.ct.studies.SeriesPooledEncoder"}[kind]
                raise ValueError(
                    f"data has views: study, but {type(self.model.image).__name__} encodes images one by one; leave it out, give views for "
                    f"each modality ({{xray: study, ct: image}}), or take {tower} with this tower as its backbone"
                )
        if data.augment is not None and any(isinstance(m, ProjectedEncoder) and m.store.keeps for m in self.model.image.modules()):
            raise ValueError(
                "the image tower is a ProjectedEncoder, which keeps features of images, and data has augment, which gives it other images "
                "in every epoch; leave out augment, or give the tower memory_mib: 0 and no cache_dir"
            )

    def _prepare(self, splits: tuple[str, ...]) -> None:
        data = self.datamodule
        assert isinstance(data, StudyDataModule)
        self._check(data)
        data.setup()
        console = Console(stderr=True)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("reading images", total=sum(len(data.images(split)) for split in splits))
            data.read_images(splits, lambda: progress.advance(task))
            self.model.report.precompute(data.all_texts())
        self.rejected = data.write_skipped(Path(self.config_init[self.subcommand].out))
        counts = ", ".join(f"{len(data.sets[split])} {split}" for split in splits)
        console.print(
            f"{'images' if data.views == 'image' else 'studies'}: {counts}"
            + (f"; {self.rejected} left out or read in part, see {REJECTED}" if self.rejected else "")
        )


def _move_caches(config: Any, folder: str) -> None:
    """Of what a recipe keeps on disk between runs keep nothing: images in ``folder``, for as long as it lasts, and features nowhere.

    Images are written there, so that a batch that comes again takes the time that it takes in all epochs but the first. Shards were there
    before, and are read where they are.

    Args:
        config: of the fit; changed.
    """
    _set_everywhere(config, "cache_dir", None)
    arguments: Any = config.data.get("init_args") or Namespace()
    cache = arguments.get("cache")
    if isinstance(cache, str) and cache.strip() and cache != "memory":
        arguments.cache = folder
    elif isinstance(cache, Namespace):
        module, _, name = cache.class_path.rpartition(".")
        kind = getattr(import_module(module), name)
        if issubclass(kind, SampleCache):
            cache.init_args.folder = folder
        elif not issubclass(kind, ShardStore):
            arguments.cache = False


def _set_everywhere(config: Any, name: str, value: object) -> None:
    """Set every argument ``name`` of a recipe, however deep: towers may hold towers, by themselves, in lists and in mappings."""
    if isinstance(config, Namespace | dict):
        entries = config if isinstance(config, dict) else vars(config)
        for key, inner in entries.items():
            if key == name:
                entries[key] = value
            else:
                _set_everywhere(inner, name, value)
    elif isinstance(config, list | tuple):
        for inner in config:
            _set_everywhere(inner, name, value)


def _tensorboard(out: Path) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    with _extra("tensorboard", "TensorBoard"):
        return TensorBoardLogger(out, name="tensorboard")


def _wandb(out: Path) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    # what stands on the console and the command line may name studies and folders
    quiet = {"console": "off", "x_disable_meta": True, "disable_git": True, "disable_code": True}
    with _extra("wandb", "Weights & Biases"):
        offline = os.environ.get("WANDB_MODE", "offline") == "offline"
        return WandbLogger(save_dir=out, project="medvl", name=out.name, offline=offline, settings=quiet)


def _mlflow(out: Path) -> Logger:
    from lightning.pytorch.loggers import MLFlowLogger

    folder = out.resolve()  # MLflow has given up its store of plain files
    with _extra("mlflow", "MLflow"):
        return MLFlowLogger(
            "medvl",
            run_name=out.name,
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"),
            artifact_location=(folder / "mlartifacts").as_uri() if "MLFLOW_TRACKING_URI" not in os.environ else None,
        )


LOGGERS: Mapping[str, Callable[[Path], Logger]] = MappingProxyType({"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow})
"""What logs beside the CSV, by the argument that asks for it. No text and no path of an image is ever logged."""


@contextmanager
def _extra(name: str, title: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{title} is not installed; install the extra: pip install 'medvl[{name}]'") from error


def run(subcommand: str, args: list[str], finished: Callable[[Path], object] | None = None) -> int:
    """Run ``fit``, ``validate`` or ``test`` with the command line ``args``.

    Args:
        finished: called in one process, after the last step, with the run's folder if a model is in it.
    Returns:
        0, or 1 if some inputs were left out.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips and device lists; what matters is on the console
    frozen = r"Found \d+ module\(s\) in eval mode"  # as the recipe has it
    for message in ("LightningCLI's args parameter", ".*LeafSpec.* is deprecated", "The number of training batches", frozen):
        warnings.filterwarnings("ignore", message=message)
    args = ["--dry_run=true" if one == "--dry-run" else one for one in args]
    cli = _cli(subcommand, args)
    out = Path(cli.config[subcommand].out)
    if cli.trainer.is_global_zero and (out / CONFIG).is_file() and not cli.config[subcommand].get("dry_run"):
        if subcommand == "fit" and not cli.trainer.interrupted:
            write_offset(out, cli.datamodule.some_batches, cli.trainer.strategy.root_device)
        if finished is not None:
            finished(out)
    return 1 if cli.rejected or cli.datamodule.unread or cli.datamodule.elsewhere else 0


def _cli(subcommand: str, args: list[str]) -> AlignmentCLI:
    return AlignmentCLI(
        AlignmentModule,
        StudyDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveResolvedConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={
            "reload_dataloaders_every_n_epochs": 1,  # the loader is made for the step that the trainer is at
            "use_distributed_sampler": False,  # ours knows its rank
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,  # ours: ResumePoint and KeepBest
            "enable_model_summary": False,
        },
        args=[subcommand, *args],
        parser_kwargs={"prog": "medvl"},
    )
