"""Sentences without visual content: about an earlier study, a talk, a technique, what to do next. No image of the study shows them.

Alone the words decide, and only if the sentence states no finding: "Compared to the prior study the effusion is larger" has content.
"""

from __future__ import annotations

import re

from reports.placeholders import PLACEHOLDER, has_words

_WHO = r"dr|doctor|physicians?|team|nurse|clinician|provider|service|ed|er|icu|resident|attending|referring|ordering|office"
_PATTERNS = (
    # nothing at all
    r"(?:none|n/?a|not applicable|see (?:above|below|findings|impression|report|body of)|as (?:noted )?(?:above|described|stated))\b",
    r"(?:other|additional)? ?findings? (?:as|are) (?:as )?(?:above|described|detailed|noted)\b",
    r"(?:no|without) (?:relevant |available |previous |earlier |old )*(?:prior|comparison|previous|earlier|old)s?\b"
    r"(?:(?: \w+){0,4} (?:study|studies|exams?|examinations?|images?|imaging|films?|radiographs?|x-?rays?|chest|ct|cts))?"
    r"(?: (?:is|are|was|were|available|for|comparison|at|this|time))*[ .]*$",
    # comparison with what is not here
    r"(?:comparison|reference) (?:is|was|has been)? ?(?:made|performed|done)?\b.*\b(?:to|with)\b",
    r"(?:there (?:is|are) no|no) (?:\w+ )?(?:prior|previous|earlier|comparison)s? ?(?:\w+ )?(?:study|studies|exams?|images?|imaging|films?"
    r"|radiographs?|available)\b[^.;,]{0,40}(?:available|comparison|review|correlation)?[ .]*$",
    r"(?:no )?(?:comparisons?|priors?)(?: (?:studies|films|images|chest|x|x-?rays?))*[ ,:.-]*(?:available|none)?[ .]*$",
    # told to somebody
    rf".*\b(?:discussed|communicated|conveyed|relayed|called|telephoned|phoned|reported|notified|paged|informed)\b"
    rf".*\b(?:{_WHO}|at \d|by)\b",
    r".*\b(?:telephone|phone|verbal|direct) (?:call|communication|report|notification)\b",
    r".*\b(?:dictat\w+|transcri\w+|electronically signed|signed by|report (?:was )?(?:approved|finali[sz]ed)|reviewed by|"
    r"i have (?:personally )?reviewed|attending radiologist|resident radiologist|preliminary report|wet read)\b",
    # what to do next
    r"(?:\W*(?:please|suggest|consider|advise|recommend)\b)",
    r".*\b(?:is|are|was|were|would be|may be|can be|could be|should be) (?:recommended|suggested|advised|advisable|warranted|helpful|"
    r"of (?:value|benefit)|obtained|performed)\b",
    r".*\b(?:may|might|can|could|should) be considered(?: (?:if|for|to|when|in|as|at|given|with)\b|[ .]*$)",
    r"(?:clinical|radiographic|ct|imaging|close|short[ -]term|interval) ?(?:\w+ )?(?:correlation|follow[ -]?up)\b",
    r"(?:follow[ -]?up|further evaluation|attention on follow)",
    r"(?:correlate|correlation)\b",
    # how it was made
    r"(?:single|two|three|portable|frontal|lateral|upright|supine|semi-?upright|pa|ap|erect|axial|\d)[ ,/-]+(?:\w+[ ,/-]+){0,7}"
    r"(?:views?|projections?|radiographs?|films?|images?|exams?|examinations?|x-?rays?)"
    r"(?: (?:of|was|were|are|is|the|chest|thorax|obtained|performed|submitted|acquired|provided|available|for|review))*[ .]*$",
    r".*\b(?:contrast (?:was|material|agent)|(?:images?|views?|scans?|sections?|slices?) (?:was|were|are) "
    r"(?:obtained|acquired|performed|taken|reconstructed)|multidetector|reconstruct\w+ (?:was|were)|slice thickness)\b",
    r"(?:the )?(?:\w+ )?exam(?:ination)? consists of\b",
    r"(?:the )?(?:chest|abdomen|pelvis|knee|ankle|foot|hand|wrist|elbow|shoulder|hip|spine|left|right|\W)+$",
    r"(?:ct|computed tomography|examination|exam|study|procedure|technique|indication|history|clinical (?:history|information))[ :]*[.]*$",
    r"(?:the )?(?:exam(?:ination)?|study|patient) (?:was|is) (?:performed|done|obtained|limited by|rotated)\b",
)
_LONGEST = 1000
"""Characters; whatever is longer has content. The patterns take time that grows with the square of the length."""

_NULL = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS), re.IGNORECASE)


def has_no_visual_content(sentence: str) -> bool:
    """Whether the words speak of no image of the study; ask only of a sentence that states no finding.

    Removed words (XXXX, ___) count as nothing. What no pattern knows, and what is very long, is taken to have content.
    """
    words = " ".join(PLACEHOLDER.sub(" ", sentence).split()).strip(" -:;,")
    return not has_words(words) or (len(words) <= _LONGEST and _NULL.match(words) is not None)
