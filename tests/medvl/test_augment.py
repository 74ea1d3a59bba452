"""Volumes shown by every k-th slice, against indexing one volume at a time; and the memory that a process keeps."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.data.augment import Augment, every_kth_slice
from medvl.types import ImageBatch


@given(slices=st.integers(1, 13), step=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_kth_slice_of_each_volume_with_its_place(slices: int, step: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, slices + 1, 4)
    valid = torch.from_numpy(np.arange(slices)[None] < counts[:, None])
    pixels = torch.arange(4 * 2 * slices * 2 * 3, dtype=torch.float32).view(4, 2, slices, 2, 3)
    place = torch.arange(slices)[None].expand(4, -1) * 7.5
    shown = every_kth_slice(ImageBatch(pixels, valid, place), step, np.random.default_rng(seed))
    assert shown.pixels.shape == (4, 2, -(-slices // step), 2, 3) and shown.valid is not None and shown.position_mm is not None
    for i, count in enumerate(counts):
        seen = shown.position_mm[i][shown.valid[i]] / 7.5
        begin = int(seen[0])
        assert begin < step, "it begins among the first k"
        assert seen.tolist() == list(range(begin, int(count), step))
        assert torch.equal(shown.pixels[i][:, shown.valid[i]], pixels[i][:, begin : int(count) : step])


def test_all_slices_come_in_the_course_of_epochs_and_rotation_moves_them_together() -> None:
    pixels = torch.rand(2, 1, 6, 8, 8)
    batch = ImageBatch(pixels, None, torch.arange(6.0)[None].expand(2, -1))
    still = Augment(rotation_deg=0, scale=0, shift=0, contrast=0, brightness=0, noise=0, slice_step=3)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(30):
        shown = still(batch, rng)
        assert shown.pixels.shape == (2, 1, 2, 8, 8) and shown.position_mm is not None
        at = shown.position_mm[0].long()
        torch.testing.assert_close(shown.pixels[0], pixels[0][:, at], atol=1e-5, rtol=0)
        seen |= set(at.tolist())
    assert seen == set(range(6))
    film = ImageBatch(torch.rand(2, 1, 8, 8))
    assert still(film, rng).pixels.shape == film.pixels.shape, "radiographs have none"
    with pytest.raises(ValueError, match="slice_step is 0"):
        Augment(slice_step=0)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told to keep memory")
def test_a_process_takes_the_memory_again_that_it_freed() -> None:
    """Page faults of blocks of 256 MiB that are taken, written and freed again and again: thousands each, and then next to none."""
    code = """
import resource, numpy as np
from medvl.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.empty(2**28, np.uint8)[:] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults(); kept = keep_freed_memory(); faults(); print(first, kept, faults())
"""
    first, kept, then = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(then) < int(first) / 10
