"""Low-rank adapters of report towers: those of :mod:`medvl.nn.lora`, which image towers have too."""

from __future__ import annotations

from medvl.nn.lora import MARK as MARK
from medvl.nn.lora import Lora as Lora
