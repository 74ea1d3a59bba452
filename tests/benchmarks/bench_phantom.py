"""How fast phantoms are made. Run: ``python tests/benchmarks/bench_phantom.py [--studies 60] [--workers 2]``; prints a table.

The stages are timed in one process; the last line is the whole command with its processes, start included.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from modalities.export import write_radiograph_dicom
from modalities.phantom import project, sample_phantom
from tasks.phantoms import write_cohort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=60)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    stages: dict[str, list[float]] = {"volume and findings": [], "projection": [], "DICOM": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(min(arguments.studies, 20)):
            rng = np.random.default_rng(seed)
            times = [time.process_time()]
            phantom = sample_phantom(rng, arguments.size)
            times.append(time.process_time())
            shot = project(phantom, "PA", rng)
            times.append(time.process_time())
            write_radiograph_dicom(
                Path(folder) / f"{seed}.dcm", shot.pixels, view="PA", spacing_mm=shot.spacing_mm, patient_id="p", study_id=f"s{seed}"
            )
            times.append(time.process_time())
            for name, seconds in zip(stages, np.diff(times), strict=True):
                stages[name].append(float(seconds))
        start = time.perf_counter()
        write_cohort(Path(folder) / "cohort", arguments.studies, 0, size=arguments.size, workers=arguments.workers)
        wall = time.perf_counter() - start
    lines = [f"{'stage':<24}{'CPU ms per study, median':>26}"]
    lines += [f"{name:<24}{1000 * float(np.median(values[1:])):>26.1f}" for name, values in stages.items()]
    lines.append(
        f"write_cohort: {arguments.studies} studies, {arguments.workers} workers: {wall:.1f} s, {arguments.studies / wall:.1f} studies/s"
    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
