"""Hashes by which texts and results are found again."""

from __future__ import annotations

import hashlib
import json


def text_sha256(text: str) -> str:
    """sha256 of a text's UTF-8, in hex: what a record made elsewhere gives as ``text_sha256``."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def text_key(text: str) -> str:
    """sha256 of a text without its white space, in hex: the same for every way to wrap or tokenise it."""
    return text_sha256("".join(text.split()))


def result_key(text: str, provider: str, version: str, schema_sha256: str, prompt_sha256: str) -> str:
    """sha256, in hex, of everything that a result depends on."""
    return text_sha256(json.dumps([text_sha256(text), provider, version, schema_sha256, prompt_sha256]))
