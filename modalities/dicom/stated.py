"""What a header says that an image is of: modality, part of the body and view, in DICOM's own terms alone.

Other text in these elements may be anything, a name too, and is as if it were not there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from medvl.types import UnreadableImageError
from modalities.dicom.file import ANY_SIZE, opened
from modalities.dicom.image import LATERAL_VIEWS, MODALITIES

BODY_PARTS = frozenset(
    """
    ABDOMEN ABDOMENPELVIS ADRENAL ANKLE ANUS AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS BUTTOCK CALCANEUS CALF CAROTID
    CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE CIRCLEOFWILLIS COCCYX COLON CORNEA CORONARYARTERY CSPINE
    DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FIBULA FINGER FOOT FOREARM GALLBLADDER HAND HEAD HEADNECK HEART
    HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG MAXILLA MEDIASTINUM MOUTH NECK
    NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RECTUM
    RIB SCALP SCAPULA SCLERA SCROTUM SHOULDER SKULL SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THORAX THUMB
    THYMUS THYROID TIBIA TLSPINE TMJ TOE TONGUE TRACHEA TSPINE URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA
    """.split()  # noqa: SIM905 (a hundred lines otherwise)
)
"""Terms of PS3.16 annex L, and THORAX, FOREARM, TIBIA and FIBULA, which many devices write."""
OF_THE_CHEST = frozenset(
    """
    CHEST THORAX LUNG CHESTABDOMEN CHESTABDPELVIS NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV WHOLEBODY BRONCHUS HEART
    MEDIASTINUM RIB STERNUM TRACHEA
    """.split()  # noqa: SIM905 (a hundred lines otherwise)
)
"""Those under which films and volumes of the chest are found."""

FRONTAL, LATERAL, OBLIQUE, MAMMOGRAPHIC = "frontal", "lateral", "oblique", "mammographic"
PROJECTIONS = {
    **dict.fromkeys(("AP", "PA"), FRONTAL),
    **dict.fromkeys(sorted(LATERAL_VIEWS), LATERAL),
    **dict.fromkeys(("RAO", "LAO", "RPO", "LPO", "RLO", "LLO", "OBLIQUE"), OBLIQUE),
    **dict.fromkeys(("CC", "MLO", "ML", "LM", "LMO", "XCC", "XCCL", "XCCM", "FB", "SIO"), MAMMOGRAPHIC),
}
"""View Position (0018,5101) as films have it -> projection."""


@dataclass(frozen=True)
class Stated:
    """Terms from a header; None where it has none of those that are known."""

    modality: str | None = None  # CR, DX, CT, ...
    body_part: str | None = None  # of ``BODY_PARTS``
    view: str | None = None  # a key of ``PROJECTIONS``, as the file has it

    @property
    def projection(self) -> str | None:
        """Which projection the view is."""
        return None if self.view is None else PROJECTIONS[self.view]


def stated(path: Path) -> Stated:
    """The terms of a file; none of one that is no DICOM or has no readable header. Never raises."""
    try:
        with opened(path, header_only=True, largest=ANY_SIZE) as file:
            modality, view, part = (file.header.text(keyword) for keyword in ("Modality", "ViewPosition", "BodyPartExamined"))
    except (UnreadableImageError, OSError):
        return Stated()
    part = re.sub("[ _^-]", "", part)  # T-SPINE, LOWER LEG
    return Stated(modality if modality in MODALITIES else None, part if part in BODY_PARTS else None, view if view in PROJECTIONS else None)
