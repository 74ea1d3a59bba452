"""A recipe that trains in a second, for tests of whole runs."""

import numpy as np
import pytest
import yaml
from PIL import Image


@pytest.fixture(scope="package")
def recipe(tmp_path_factory):
    """Path of a recipe with tiny towers, beside its table of 24 noise films to train on and 4 to validate on; batches of 6, two epochs."""
    root = tmp_path_factory.mktemp("watch")
    rng = np.random.default_rng(0)
    lines = ["study_id,patient_id,modality,path,split,findings"]
    for i in range(28):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(root / f"{i}.png")
        said = ["No lung nodule.", "There is a nodule in the right lung."][i % 2]
        lines.append(f"s{i},p{i},xray,{i}.png,{'train' if i < 24 else 'val'},{said} The heart is normal. Film {i}.")
    (root / "manifest.csv").write_text("\n".join(lines))
    settings = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 2},
        "model": {
            "image": {"class_path": "modalities.xray.conv.ConvEncoder", "init_args": {"embed_dim": 16, "widths": [8, 8], "blocks": [1, 1]}},
            "report": {"class_path": "reports.towers.MiniLmReportEncoder", "init_args": {"embed_dim": 16, "hidden_dim": 8}},
            "similarity": {"class_path": "medvl.nn.similarity.TokenSimilarity"},
            "loss": {"class_path": "medvl.losses.MultiPositiveInfoNCE"},
        },
        "data": {
            "class_path": "medvl.training.data.StudyDataModule",
            "init_args": {
                "manifest": str(root / "manifest.csv"),
                "reader": {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 32}},
                "texts": {"class_path": "reports.text_source.ReportSentences"},
                "batch_size": 6,
                "sentences_per_image": 1,
            },
        },
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return root / "recipe.yaml"
