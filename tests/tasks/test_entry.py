"""The command's first step, in processes of its own: what hides our packages is named, and nothing else is in the way."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("medvl", "modalities", "reports", "tasks")


@pytest.fixture
def installed(tmp_path):
    """A regular installation in miniature: our entry, stand-ins for the other packages, and a distribution's metadata."""
    site = tmp_path / "site"
    for name in PACKAGES:
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
    for name in ("_entry.py", "__main__.py"):
        shutil.copy(REPOSITORY / "medvl" / name, site / "medvl")
    command = "import sys\ndef main():\n    sys.stdout.write('ran ' + ' '.join(sys.argv[1:]))\n    return 1\n"
    (site / "tasks/cli.py").write_text(command)
    metadata = site / "medvl-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: medvl\nVersion: 0.1.0\n")
    (metadata / "top_level.txt").write_text("\n".join(PACKAGES))
    (metadata / "entry_points.txt").write_text("[medvl.command]\nmain = tasks.cli:main\n")
    return site


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def run(*arguments, path, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    # -S: without site-packages, so that an installation of the package under test is out of sight
    return subprocess.run([sys.executable, "-S", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_the_command_runs_and_its_exit_code_comes_through(installed, work):
    for arguments in (("-m", "medvl", "a"), ("-c", "from medvl._entry import main; main()", "a")):
        got = run(*arguments, path=[installed], cwd=work)
        assert (got.returncode, got.stdout, got.stderr) == (1, "ran a", "")


@pytest.mark.parametrize("name", ["tasks.py", "tasks/__init__.py", "modalities.py", "reports/__init__.py"])
def test_a_users_own_file_on_the_path_is_named(installed, work, name):
    mine = work / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("raise SystemExit('imported')")
    got = run("-c", "from medvl._entry import main; main()", path=[work, installed], cwd=work.parent)
    assert (got.returncode, got.stdout) == (2, "")
    package = name.split("/")[0].removesuffix(".py")
    assert got.stderr == (
        f"medvl: {mine} hides medvl's own package {package!r} ({installed / package}). Rename it, or take {work} off PYTHONPATH.\n"
    )


def test_a_users_own_file_in_the_working_folder_is_named(installed, work):
    (work / "tasks.py").touch()
    (work / "reports.py").touch()
    got = run("-m", "medvl", path=[installed], cwd=work)
    assert got.returncode == 2
    assert got.stderr.count("run medvl from another folder") == 2
    assert str(work / "tasks.py") in got.stderr and str(work / "reports.py") in got.stderr


def test_a_folder_of_the_same_name_without_python_in_it_does_no_harm(installed, work):
    (work / "reports").mkdir()
    assert run("-m", "medvl", path=[installed], cwd=work).returncode == 1


def test_such_a_folder_is_named_where_it_does_harm(installed, work):
    """An editable installation finds its packages through a hook behind the path, so a bare folder on the path comes first."""
    (work / "reports").mkdir()
    hook = (
        "import importlib.machinery as m, sys\n"
        "class Hook:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        return m.PathFinder.find_spec(name, path or [{str(installed)!r}])\n"
        "sys.meta_path.append(Hook)\n"
    )
    metadata = work.parent / "metadata"
    metadata.mkdir()
    shutil.copytree(installed / "medvl-0.1.0.dist-info", metadata / "medvl-0.1.0.dist-info")
    got = run("-c", hook + "from medvl._entry import main; main()", path=[metadata], cwd=work.parent)
    assert got.returncode == 1, got.stderr
    got = run("-c", hook + "from medvl._entry import main; main()", path=[metadata], cwd=work)
    assert got.returncode == 2
    assert f"{work / 'reports'} hides medvl's own package 'reports' ({installed / 'reports'})" in got.stderr
    assert "run medvl from another folder" in got.stderr


def test_without_pythonpath_the_working_folder_is_blamed(installed, work):
    (work / "tasks.py").touch()
    code = f"import sys; sys.path.append({str(installed)!r}); from medvl._entry import main; main()"  # "" is first on the path with -c
    got = run("-c", code, path=[], cwd=work)
    assert got.returncode == 2
    assert got.stderr.endswith("Rename it, or run medvl from another folder.\n")


def test_an_incomplete_installation_says_so(installed, work):
    (installed / "medvl-0.1.0.dist-info/entry_points.txt").unlink()
    got = run("-m", "medvl", path=[installed], cwd=work)
    assert (got.returncode, "Install medvl again" in got.stderr) == (2, True)
    shutil.rmtree(installed / "reports")
    (installed / "medvl-0.1.0.dist-info/entry_points.txt").write_text("[medvl.command]\nmain = tasks.cli:main\n")
    got = run("-m", "medvl", path=[installed], cwd=work)
    assert (got.returncode, "package 'reports' is not at" in got.stderr) == (2, True)


def test_the_first_step_imports_nothing_heavy(installed, work):
    code = "import sys; from medvl import _entry; _entry._load_command(); sys.stdout.write(' '.join(sys.modules))"
    got = run("-c", code, path=[installed], cwd=work)
    assert not {"torch", "numpy", "click", "pandas"} & set(got.stdout.split())
    assert got.returncode == 0, got.stderr


def test_the_distribution_names_our_packages_and_command():
    try:
        distribution = importlib.metadata.distribution("medvl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("medvl is not installed here")
    assert set(PACKAGES) <= set((distribution.read_text("top_level.txt") or "").split())
    points = {(point.group, point.value) for point in distribution.entry_points}
    assert {("console_scripts", "medvl._entry:main"), ("medvl.command", "tasks.cli:main")} <= points
