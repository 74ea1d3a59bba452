"""A callback for runs in processes of their own: notes the batch of every step, and interrupts the run at a step. Not a test by itself."""

import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.callbacks import Callback

from medvl.types import UnreadableImageError
from modalities.xray.reader import XrayReader


class Interrupt(Callback):
    """Appends ``[step, rank, manifest rows]`` to the file of BATCH_LOG; at step INTERRUPT_AT kills all processes of the run (KILL), after a
    random delay that falls anywhere in the step, or asks the first of them to stop (TERM, USR1), or all with their loaders (GROUP).
    """

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with Path(os.environ["BATCH_LOG"]).open("a") as file:
            file.write(json.dumps([trainer.global_step, trainer.global_rank, list(batch.rows)]) + "\n")
        step, how = int(os.environ.get("INTERRUPT_AT", -1)), os.environ.get("INTERRUPT_BY")
        if trainer.global_step != step or trainer.global_rank != 0:
            return
        if how in ("TERM", "USR1"):
            os.kill(os.getpid(), getattr(signal, f"SIG{how}"))
        elif how == "GROUP":
            # from outside, as a scheduler does it: what a loader process hears from its trainer is another thing
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgid(0)}"], start_new_session=True, check=True)
        else:
            delay = random.random() * 0.2
            threading.Thread(target=lambda: (time.sleep(delay), os.killpg(os.getpgid(0), signal.SIGKILL)), daemon=True).start()


class Lose(Callback):
    """Before the first step deletes the files of the manifest rows in LOST, or with LOST=all every file."""

    def on_train_start(self, trainer, pl_module):
        lost = os.environ["LOST"]
        for image in trainer.datamodule.images("train"):
            if lost == "all" or str(image.row) in lost.split(","):
                image.path.unlink(missing_ok=True)


class Stop(Callback):
    """In this process: ends a fit before batch ``batch`` of an epoch, or in the validation after step ``validation``; notes validations."""

    batch: ClassVar[int | None] = None
    validation: ClassVar[int | None] = None
    validated: ClassVar[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == Stop.batch:
            raise KeyboardInterrupt

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == Stop.validation:
            raise KeyboardInterrupt
        Stop.validated.append(trainer.global_step)


class Shaky(XrayReader):
    """Cannot read the film 3 in the second process of a run."""

    def read(self, path):
        if path.stem == "3" and os.environ.get("LOCAL_RANK") == "1":
            raise UnreadableImageError(f"{path}: the storage was away for a moment")
        return super().read(path)
