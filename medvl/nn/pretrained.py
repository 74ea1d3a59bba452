"""Folders of published models: found here or on the Hugging Face hub, and kept in a run so that they point to nothing elsewhere.

A folder holds config.json, safetensors weights and, for text, a tokenizer. No code of a model's repository is run and nothing is
unpickled. Transformers and huggingface_hub are imported when they are needed, not before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_POINTERS = re.compile(r"auto_map|.*_implementation|.*_file|(use_)?(timm_|pretrained_)?backbone.*")
"""Keys of a model's configuration by which transformers would fetch code or weights, or open files elsewhere."""


def model_folder(
    model: str,
    needed: Mapping[str, Sequence[str]],
    patterns: Sequence[str],
    tower: str,
    advice: str,
    revision: str | None = None,
    local_files_only: bool = False,
    instead: str = "",
) -> Path:
    """The local folder of a model: ``model`` itself if it is one, else the hub's snapshot, downloaded if needed and allowed.

    Args:
        model: a folder, or a name on the hub.
        needed: what must be there, in words -> names or patterns of files of which one will do.
        patterns: files to download, none of them in a subfolder.
        tower: who asks, for messages ("report tower").
        advice: how a folder comes to hold what is needed, for messages.
        revision: branch, tag or commit on the hub.
        local_files_only: never ask the hub, use what was downloaded before.
        instead: what else one can do without the hub, for messages.
    Raises:
        FileNotFoundError: no such folder or model, or a folder that lacks some of what is needed.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE

        try:
            folder = Path(
                snapshot_download(
                    model,
                    revision=revision,
                    local_files_only=local_files_only,
                    allow_patterns=list(patterns),
                    ignore_patterns=["*/*"],
                )
            )
        except (OSError, ValueError) as error:  # the hub's errors derive from these; their texts run to many lines
            at = "" if revision is None else f" at revision {revision!r}"
            if local_files_only:
                raise FileNotFoundError(
                    f"{tower} {model!r}{at} is no folder here and is not among the downloaded models in {HF_HUB_CACHE}; the network "
                    f"was not asked. Download it there (hf download {model}), or give the folder of a copy{instead}"
                ) from error
            raise FileNotFoundError(
                f"{tower} {model!r}{at} is no folder here and could not be had from the Hugging Face hub ({type(error).__name__}). "
                f"Check the name and the network, or download the model elsewhere and give its folder{instead}"
            ) from error
    missing = [f"{what} ({' or '.join(files)})" for what, files in needed.items() if not any(any(folder.glob(f)) for f in files)]
    if missing:
        raise FileNotFoundError(f"{tower} {model!r}: {folder} lacks {', '.join(missing)}. {advice}; pickled weights (.bin) are not read")
    return folder


def checked_files(folder: Path, model: Any, kept: str, names: Sequence[str] = ("config.json",)) -> Path:
    """``folder``, if it holds a model's config.json, and no configuration there points to anything elsewhere.

    Args:
        folder: where a saved run carries the files.
        model: what the run was made from, for messages.
        kept: what the run carries, for messages ("config.json of the image backbone").
        names: the configurations to look into, those that are there.
    Raises:
        FileNotFoundError: no configuration there.
        ValueError: a configuration that names code, weights or files elsewhere.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} lacks {kept}, which a run that trained it carries there; put those of {model!r} there, or save the run again"
        )
    for name in names:
        file = folder / name
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if without_pointers(settings) != settings:
            raise ValueError(f"{file} names code, weights or files elsewhere (a key such as auto_map, ..._file, backbone); remove it")
    return folder


def without_pointers(settings: Any) -> Any:
    """A configuration without the keys by which transformers would fetch or open something else."""
    if isinstance(settings, dict):
        return {key: without_pointers(value) for key, value in settings.items() if not _POINTERS.fullmatch(key)}
    return [without_pointers(value) for value in settings] if isinstance(settings, list) else settings


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Transformers draws a bar on standard error for every model it loads; a command that writes JSON wants none."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
