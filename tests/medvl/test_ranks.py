"""Batches shared between processes, and encoded in two passes, against one process with the whole batch at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("ranks_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def found(folder, world_size):
    """What each process wrote."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, WORKER, folder]
    running = [subprocess.Popen([*command, str(rank), str(world_size)], env=env) for rank in range(world_size)]
    assert [process.wait(timeout=240) for process in running] == [0] * world_size
    (folder / "store").unlink(missing_ok=True)
    return [load_file(folder / f"{world_size}-{rank}.safetensors") for rank in range(world_size)]


@pytest.fixture(scope="module")
def alone(folder):
    return found(folder, 1)[0]


def test_two_passes_give_the_gradients_of_one(alone):
    cases = [name for name in alone if "/2/" in name]
    assert len(cases) > 1000
    for name in cases:
        torch.testing.assert_close(alone[name], alone[name.replace("/2/", "/None/")], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_one_process_with_the_joined_batch(folder, alone, world_size):
    """Uneven shares; three processes with the texts all on the first."""
    for shared in found(folder, world_size):
        assert set(shared) == set(alone)
        for name, value in alone.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_an_item_that_could_not_be_read_is_as_one_that_is_dropped(alone):
    cases = [name for name in alone if "/missing/" in name]
    assert len(cases) > 300
    for name in cases:
        torch.testing.assert_close(alone[name], alone[name.replace("/missing/", "/dropped/")], rtol=1e-9, atol=1e-12, msg=name)


def test_every_weight_gets_a_gradient(alone):
    weights = {name.rsplit("/", 1)[1] for name in alone}
    for weight in weights - {"loss"}:
        assert any(value.abs().sum() > 0 for name, value in alone.items() if name.endswith(f"/{weight}")), weight
