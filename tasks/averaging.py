"""Averages of two models in weight space: a fine-tuned model drawn back towards the one that it started from.

Source: WiSE-FT, "Robust fine-tuning of zero-shot models", arXiv:2109.01903.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl.model import CONFIG, ConfigError, DualEncoder, load

NOT_ARCHITECTURE = frozenset(
    (
        *("pretrained", "checkpoint", "initial_weights", "revision", "local_files_only"),
        *("freeze", "frozen", "drop_rate", "dropout", "lora", "gradient_checkpointing"),
        *("cache_dir", "memory_mib", "batch_size", "keep_tokens"),
    )
)
"""Arguments of towers that two models of one architecture may differ in: where weights came from, and how they were trained."""


def average_models(start: Path, finetuned: Path, alpha: float) -> DualEncoder:
    """The model with (1 - alpha) of the weights of ``start`` and alpha of those of ``finetuned``; otherwise ``finetuned``.

    Batch statistics are averaged like weights. Adapters (LoRA) of image towers are merged first. ``alpha`` is chosen on validation, never
    on test.

    Args:
        start, finetuned: folders of runs.
        alpha: in [0, 1].
    Raises:
        ValueError: an alpha outside it, or models that differ in more than weights.
        FileNotFoundError, ConfigError: of :func:`medvl.load`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected 0 (the start) to 1 (the fine-tuned model)")
    first, second = load(start, device="cpu"), load(finetuned, device="cpu")
    check_same_architecture(first, second)
    second.load_state_dict(interpolated(first.state_dict(), second.state_dict(), alpha))
    return second


def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) start + alpha end of every tensor, computed in float64, in the type of ``end``.

    Raises:
        ValueError: other names or shapes, or whole numbers (hashes of frozen trunks, say) that differ.
    """
    if odd := sorted(start.keys() ^ end.keys()):
        raise ValueError(f"the models do not have the same weights: {len(odd)} are in one alone (first: {odd[0]})")
    found: dict[str, Tensor] = {}
    for name, last in end.items():
        first = start[name]
        if first.shape != last.shape:
            raise ValueError(f"{name} has shape {tuple(first.shape)} in the start and {tuple(last.shape)} in the fine-tuned model")
        if last.is_floating_point():
            found[name] = ((1 - alpha) * first.double() + alpha * last.double()).to(last.dtype)
        elif name.endswith("num_batches_tracked") or torch.equal(first, last):
            found[name] = last.clone()
        else:
            raise ValueError(f"{name} differs between the models and has no mean: a part of them that is frozen is another model's")
    return found


def check_same_architecture(one: DualEncoder, other: DualEncoder) -> None:
    """Raise ValueError unless two models differ in weights alone, and in how these came about."""
    for part, spec in architecture(one.spec()).items():
        if spec != (found := architecture(other.spec())[part]):
            raise ValueError(f"the models have different parts, {part} for one: {_difference(spec, found)}; average models of one recipe")


def architecture(spec: Any) -> Any:
    """A spec without the arguments that change no architecture."""
    if isinstance(spec, dict):
        return {key: architecture(value) for key, value in spec.items() if key not in NOT_ARCHITECTURE}
    return [architecture(value) for value in spec] if isinstance(spec, list) else spec


def _difference(one: Any, other: Any, place: str = "") -> str:
    """The first place where two specs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                return _difference(one.get(key), other.get(key), f"{place}.{key}".lstrip("."))
    return f"{place} is {one!r} and {other!r}"


def save_average(start: Path, finetuned: Path, alpha: float, out: Path) -> Path:
    """:func:`average_models`, written to ``out`` with the provenance of both.

    Raises:
        ValueError: of it, or an ``out`` that is one of the two.
    """
    if out.resolve() in (start.resolve(), finetuned.resolve()):
        raise ValueError(f"{out} is one of the two models; give another folder")
    model = average_models(start, finetuned, alpha)
    facts = {name: _facts(folder) for name, folder in (("start", start), ("finetuned", finetuned))}
    chosen = {**(facts["finetuned"]["provenance"] or {}), "chosen_by": f"alpha = {alpha} between two models", "value": None}
    return model.save(out, **{**chosen, "averaged": {"alpha": alpha, **facts}})


def _facts(folder: Path) -> dict[str, Any]:
    """What a run's config.json says of its weights and how they came about.

    Raises:
        ConfigError: no configuration that can be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG}: not a medvl config.json") from error
    return {name: config.get(name) for name in ("weights_sha256", "medvl", "provenance")}
