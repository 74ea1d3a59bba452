"""Sources of maps against their formulas in loops, what each refuses, and maps made elsewhere with merged biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import medvl
from medvl.model import DualEncoder
from medvl.nn.cross import CrossAttentionSimilarity
from medvl.nn.local import SentenceAttentionSimilarity, WordRegionSimilarity
from medvl.nn.similarity import PooledSimilarity, SliceSimilarity
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, ReportEncoder, TextBatch, TextFeatures
from modalities.ct import CtReader, SlicePooledEncoder
from modalities.export import read_map, write_map
from modalities.pooling import GatedAttention
from modalities.xray import ConvEncoder, TimmEncoder, XrayReader
from tasks.grounding import Grounder, MapSettings, phrase_query
from tasks.grounding.external import ExternalMap, external_maps, from_folder, merged_biases
from tasks.grounding.sources import SOURCES, source

D = 16


class Words(ReportEncoder):
    """Fixed vectors of words, by their letters."""

    embed_dim = D

    def forward(self, batch: TextBatch) -> TextFeatures:
        longest = max(len(text.split()) for text in batch.texts)
        tokens, valid = torch.zeros(len(batch.texts), longest, D), torch.zeros(len(batch.texts), longest, dtype=torch.bool)
        for i, text in enumerate(batch.texts):
            for j, word in enumerate(text.split()):
                tokens[i, j] = torch.randn(D, generator=torch.Generator().manual_seed(sum(map(ord, word))))
                valid[i, j] = True
        return TextFeatures(tokens.sum(1), tokens, valid)


def film(similarity: Any, image: ImageEncoder | None = None) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(image or ConvEncoder(D, (8, 8, 8), (1, 1, 1)), Words(), similarity, XrayReader(size=64)).eval()


def seen(model: DualEncoder, name: str, shape: tuple[int, int] = (64, 40)) -> tuple[Any, Any, torch.Tensor]:
    pixels = np.random.default_rng(0).random(shape).astype(np.float32)
    batch = model.reader.collate([model.read(pixels)])
    made = source(name)
    looked = made.see(model, batch)
    return made, looked, made.scores(model, looked, model.encode_text(["left lung", "a nodule here"]))


def units(features: ImageFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    assert features.tokens is not None and features.token_valid is not None
    return F.normalize(features.tokens[0], dim=-1), features.token_valid[0]


def test_word_attention_is_a_softmax_of_each_word_times_the_tokens() -> None:
    model = film(WordRegionSimilarity())
    _, looked, found = seen(model, "words")
    tokens, valid = units(looked.features)
    texts = model.encode_text(["left lung", "a nodule here"])
    for m in range(2):
        rows = []
        for w in range(int(texts.token_valid[m].sum())):
            cosines = tokens[valid] @ F.normalize(texts.tokens[m, w], dim=-1)
            rows.append((4.0 * cosines).softmax(0) * int(valid.sum()))
        got = found[0, m].flatten()
        torch.testing.assert_close(got[valid], torch.stack(rows).mean(0), atol=1e-4, rtol=1e-4)
        assert got[~valid].isnan().all() and (~valid).any()


def test_attention_is_the_sigmoid_of_the_normed_cosine_over_its_temperature() -> None:
    similarity = SentenceAttentionSimilarity(0.1, attention_temperature=0.2, norm_width=D)
    model = film(similarity)
    _, looked, found = seen(model, "attention")
    texts = model.encode_text(["left lung", "a nodule here"])
    assert similarity.norm is not None
    with torch.inference_mode():
        tokens = F.normalize(similarity.norm(looked.features.tokens[0]), dim=-1)
        expected = (F.normalize(similarity.norm(texts.pooled), dim=-1) @ tokens.T / 0.2).sigmoid()
    valid = looked.features.token_valid[0]
    torch.testing.assert_close(found[0].flatten(1)[:, valid], expected[:, valid], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="SentenceAttentionSimilarity; this one has PooledSimilarity"):
        seen(film(PooledSimilarity()), "attention")


def test_cross_attention_is_the_similarity_s_own_and_needs_it() -> None:
    model = film(CrossAttentionSimilarity(D, layers=1, heads=2, feedforward=16, hidden=(8,)))
    _, looked, found = seen(model, "cross_attention")
    torch.testing.assert_close(
        found, model.similarity.maps(looked.features, model.encode_text(["left lung", "a nodule here"])), equal_nan=True
    )
    with pytest.raises(ValueError, match="CrossAttentionSimilarity"):
        seen(film(PooledSimilarity()), "cross_attention")


@pytest.mark.parametrize("name", ["values", "value_similarity", "early_attention"])
def test_dense_readings_change_the_tokens_of_a_transformer_and_refuse_convolutions(name: str) -> None:
    model = film(PooledSimilarity(), TimmEncoder("vit_tiny_patch16_224", D, image_size=64))
    _, looked, found = seen(model, name)
    tokens, valid = units(looked.features)
    expected = F.normalize(model.encode_text(["left lung", "a nodule here"]).pooled, dim=-1) @ tokens.T
    torch.testing.assert_close(found[0].flatten(1)[:, valid], expected[:, valid], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(looked.features.tokens, model.image(looked.batch).tokens, atol=1e-3)
    with pytest.raises(ValueError, match="self-attentions"):
        seen(film(PooledSimilarity()), name)


class NoTokens(ConvEncoder):
    """A tower that keeps its pooled vector alone."""

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        return ImageFeatures(super().forward(batch).pooled)


def test_gradients_map_a_tower_without_tokens() -> None:
    model = film(PooledSimilarity(), NoTokens(D, (8, 8, 8), (1, 1, 1)))
    _, _, found = seen(model, "gradient")
    assert found.shape[:2] == (1, 2) and found.shape[2] == found.shape[3] and (found >= 0).all() and found.amax() > 0
    with pytest.raises(ValueError, match="keeps no tokens"):
        seen(model, "cosine")


@pytest.mark.parametrize("similarity", [PooledSimilarity(), SliceSimilarity()])
def test_slices_times_tokens_sum_to_the_number_of_tokens(similarity: Any) -> None:
    torch.manual_seed(0)
    tower = SlicePooledEncoder(ConvEncoder(D, (8, 8, 8), (1, 1, 1), in_chans=1, bands=[]), GatedAttention(D), chunk=64)
    reader = CtReader(spacing_mm=(5.0, 4.0, 4.0), shape=(None, 32, 32), windows_hu=((-1000.0, 1000.0),), crop="none")
    model = DualEncoder(tower, Words(), similarity, reader).eval()
    rng = np.random.default_rng(0)
    samples = [model.read(rng.integers(-1000, 1000, (n, 16, 16)).astype(np.int16)) for n in (7, 4)]
    made = source("slices")
    looked = made.see(model, reader.collate(samples))
    found = made.scores(model, looked, model.encode_text(["left lung"]))
    for b in range(2):
        known = found[b, 0][torch.isfinite(found[b, 0])]
        assert known.sum() == pytest.approx(len(known), rel=1e-4)
    assert torch.isnan(found[1]).any()
    features = looked.features
    weights = (
        similarity.weights(features, model.encode_text(["left lung"]))[0, 0]
        if isinstance(similarity, SliceSimilarity)
        else features.slice_weights[0]
    )
    by_slice = found[0, 0].sum((1, 2)) / found[0, 0].numel()
    torch.testing.assert_close(by_slice, weights.float(), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="CT by slices"):
        seen(film(PooledSimilarity()), "slices")


def test_every_source_says_what_it_is() -> None:
    for name, one in SOURCES.items():
        assert one.name == name and one.words and one.unit


def test_crops_need_paths_and_a_reader_of_more_than_one_resolution(tiny: Any) -> None:
    model = medvl.load(tiny.model, device="cpu")
    grounder = Grounder(model, [phrase_query("x")], MapSettings(crops=2))
    with pytest.raises(ValueError, match="read from the image's file"):
        grounder.of_samples([model.read(tiny.png)])
    (maps,) = grounder.of_files([tiny.png])
    (plain,) = Grounder(model, [phrase_query("x")]).of_files([tiny.png])
    assert maps.scores.shape[-1] == 2 * plain.scores.shape[-1]
    with pytest.raises(NotImplementedError, match="keeps the file's own spacing"):
        CtReader(spacing_mm=(3.0, None, None)).enlarged(2)
    big = CtReader(spacing_mm=(3.0, 2.0, 2.0), shape=(None, 32, 48)).enlarged(2)
    assert big.spacing_mm == (3.0, 1.0, 1.0) and big.shape == (None, 64, 96)


# --- maps made elsewhere -----------------------------------------------------------------------------------------------------------


def plain_ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    """Mean structural similarity of 8-bit images over all windows that fit, by the formula (Wang et al. 2004), sample variances."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for i in range(a.shape[0] - window + 1):
        for j in range(a.shape[1] - window + 1):
            x, y = (one[i : i + window, j : j + window].astype(float).ravel() for one in (a, b))
            cov = np.cov(x, y)
            found.append(
                (2 * x.mean() * y.mean() + c1)
                * (2 * cov[0, 1] + c2)
                / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2))
            )
    return float(np.mean(found))


def test_merged_biases_are_the_published_formula() -> None:
    rng = np.random.default_rng(0)

    def scaled(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    for _ in range(5):
        activation, image = rng.random((2, 16, 16))
        text = image + 0.3 * rng.random((16, 16))
        a, i, t = scaled(activation), scaled(image), scaled(text)
        m = scaled(i @ t)
        s = max(0.0, plain_ssim(np.round(i * 255).astype(np.uint8), np.round(t * 255).astype(np.uint8)))
        expected = 2 * (1 - s) * s * (m + a + m * a) / 2 + (1 - s) ** 2 * a + s**2 * m
        np.testing.assert_allclose(merged_biases(activation, image, text), expected, atol=1e-6)
    with pytest.raises(ValueError, match="one square"):
        merged_biases(np.zeros((4, 5)), np.zeros((4, 5)), np.zeros((4, 5)))


def test_a_map_from_a_file_is_laid_over_the_whole_image(tmp_path: Path, tiny: Any) -> None:
    model = medvl.load(tiny.model, device="cpu")
    Image.fromarray(np.zeros((60, 40), dtype=np.uint8)).save(tmp_path / "film.png")
    sample, query = model.read(tmp_path / "film.png"), phrase_query("a spot")
    grid = np.zeros((6, 4))
    grid[4, 1] = 1.0
    folder = tmp_path / "maps"
    folder.mkdir()
    np.save(folder / "a_spot.npy", grid)
    found = external_maps(from_folder(folder), tmp_path / "film.png", sample, [query])
    at = np.unravel_index(np.nanargmax(found.native(0)), (60, 40))
    assert 40 <= at[0] < 50 and 10 <= at[1] < 20 and found.unit == "external"
    (folder / "film").mkdir()  # the image's own folder comes first
    native = np.zeros((60, 40))
    native[3, 7] = 2.0
    np.savez(folder / "film" / "a_spot.npz", scores=native)
    np.testing.assert_allclose(external_maps(from_folder(folder), tmp_path / "film.png", sample, [query]).native(0), native)
    for wrong, said in ((np.zeros((2, 3, 4)), "as many axes"), (None, "no map that can be read")):
        (folder / "film" / "a_spot.npz").unlink(missing_ok=True)
        (folder / "film" / "a_spot.npy").write_bytes(b"cut")
        if wrong is not None:
            np.save(folder / "film" / "a_spot.npy", wrong)
        with pytest.raises(ValueError, match=said):
            external_maps(from_folder(folder), tmp_path / "film.png", sample, [query])
    with pytest.raises(ValueError, match=r"no map of film\.png; expected other"):
        external_maps(from_folder(folder), tmp_path / "film.png", sample, [phrase_query("other")])
    function = external_maps(lambda path, query: ExternalMap(native), tmp_path / "film.png", sample, [query])
    np.testing.assert_allclose(function.native(0), native)


def test_a_volume_s_map_comes_back_from_nifti_and_must_lie_on_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((4, 6, 5)).astype(np.float32)
    scores[0] = np.nan
    affine = np.diag([-2.0, -3.0, 4.0, 1.0])[:, [2, 1, 0, 3]]
    write_map(tmp_path / "a_spot.nii.gz", scores, affine)
    values, found = read_map(tmp_path / "a_spot.nii.gz")
    np.testing.assert_allclose(values, scores, equal_nan=True)
    np.testing.assert_allclose(found, affine, atol=1e-6)
    model = DualEncoder(
        NoTokens(D), Words(), PooledSimilarity(), CtReader(spacing_mm=(4.0, 3.0, 2.0), shape=(None, None, None), crop="none")
    )
    from modalities.export import write_nifti

    write_nifti(tmp_path / "ct.nii.gz", np.zeros((4, 6, 5), dtype=np.int16), affine)
    sample = model.read(tmp_path / "ct.nii.gz")
    np.testing.assert_allclose(
        external_maps(from_folder(tmp_path), tmp_path / "ct.nii.gz", sample, [phrase_query("a spot")]).native(0)[1:], scores[1:], atol=1e-6
    )
    write_map(tmp_path / "a_spot.nii.gz", scores, affine + np.eye(4)[:, [3, 0, 1, 2]])
    with pytest.raises(ValueError, match="expected the same grid"):
        external_maps(from_folder(tmp_path), tmp_path / "ct.nii.gz", sample, [phrase_query("a spot")])
