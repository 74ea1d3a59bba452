"""What ends a run from outside, as the operating system and torch really tell it: full disks and loader processes that die."""

import errno
import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import medvl.model
from medvl.training.callbacks import AtomicCheckpointIO
from medvl.training.signals import explained


class Failing(Dataset):
    """Items of a loader process that fills the disk, or is killed."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/chunk-0-0.bin")
        if self.how == "missing":
            raise OSError(errno.ENOENT, "No such file", "/cache/chunk-0-0.bin")
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(5)


def loaded(how):
    """The error that a training sees."""
    with pytest.raises((OSError, RuntimeError)) as caught:
        list(DataLoader(Failing(how), num_workers=1))
    return caught.value


@pytest.mark.parametrize(("how", "word"), [("full", "the disk is full"), ("killed", "data.init_args.workers")])
def test_what_happens_to_a_loader_process_is_explained(tmp_path, how, word):
    words = explained(loaded(how), tmp_path)
    assert words is not None and word in words and str(tmp_path) in words and "\n" not in words


def test_another_error_of_a_loader_process_is_not_called_a_full_disk(tmp_path):
    assert explained(loaded("missing"), tmp_path) is None


@pytest.mark.parametrize("where", ["write", "flush"])
def test_a_disk_that_fills_up_inside_a_write_leaves_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "resume.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "flush":
            patch.setattr(os, "fsync", full)
        else:
            opened = os.fdopen

            class Full:
                def __init__(self, handle, mode):
                    self.file = opened(handle, mode)

                def __enter__(self):
                    return self

                def __exit__(self, *args):
                    self.file.close()

                def write(self, content):
                    self.file.write(content[:100])
                    full()

            patch.setattr(medvl.model.os, "fdopen", Full)
        with pytest.raises(OSError, match="No space") as caught:
            AtomicCheckpointIO().save_checkpoint({"global_step": 6, "weights": torch.zeros(1000)}, path)
    assert "the disk is full" in (explained(caught.value, tmp_path) or "")
    assert AtomicCheckpointIO().load_checkpoint(path) == {"global_step": 3}
    assert [one.name for one in tmp_path.iterdir()] == ["resume.ckpt"]
