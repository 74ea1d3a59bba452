"""Prompts for zero-shot diagnosis and grounding: a versioned registry of sentences per finding, ours or the user's, checked on loading.

A finding has positive prompts ("There is a pleural effusion."), negative prompts and one phrase that grounding looks for; in the richer
sets also uncertain prompts, every severity x subtype x location, visual descriptors, and the kinds that it divides into. The sentences
of our files differ from every sentence that ``reports.synthetic`` can write, so that a score on phantoms is not a lookup.

Descriptors that a language model wrote come in through ``reports.prompts.knowledge``, which is not imported here: it needs the lexicon.
"""

from __future__ import annotations

from reports.prompts.faults import prompt_faults
from reports.prompts.hierarchy import kinds_of, roll_up
from reports.prompts.loading import BUILT_IN, dump_prompts, load_prompts
from reports.prompts.nouns import Noun
from reports.prompts.registry import DescriptorPrompts, FindingWords, PromptPair, PromptSet, Templates, prompt_pair
from reports.prompts.schemes import ClassPrompts, PromptGroup, PromptScheme, scheme, scheme_names

__all__ = [
    "BUILT_IN",
    "ClassPrompts",
    "DescriptorPrompts",
    "FindingWords",
    "Noun",
    "PromptGroup",
    "PromptPair",
    "PromptScheme",
    "PromptSet",
    "Templates",
    "dump_prompts",
    "kinds_of",
    "load_prompts",
    "prompt_faults",
    "prompt_pair",
    "roll_up",
    "scheme",
    "scheme_names",
]
