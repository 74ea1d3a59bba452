"""Report towers: a text trunk of Hugging Face or open_clip and a small trained head; a frozen trunk's embeddings are cached."""

from reports.towers.concepts import ConceptReportEncoder as ConceptReportEncoder
from reports.towers.huggingface import HuggingFaceReportEncoder as HuggingFaceReportEncoder
from reports.towers.huggingface import MiniLmReportEncoder as MiniLmReportEncoder
from reports.towers.huggingface import model_folder as model_folder
from reports.towers.lora import Lora as Lora
from reports.towers.openclip import OpenClipReportEncoder as OpenClipReportEncoder
from reports.towers.trunk import weights_sha256 as weights_sha256
from reports.towers.words import overlapping as overlapping
