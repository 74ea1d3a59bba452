"""Every objective against its formula, one pair at a time in float64, in value and gradients; in tiles and as a whole matrix."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from medvl.losses import (
    LikenessInfoNCE,
    MultiPositiveInfoNCE,
    MultiPositiveSigmoid,
    info_nce,
    likeness_info_nce,
    multi_positive_info_nce,
    pairs_of,
    sigmoid_loss,
    soft_target_loss,
)
from medvl.types import Product

CHOICES = [
    {"inside": inside, "denominator": denominator, "direction": direction, "soft": soft}
    for inside, denominator, direction, soft in itertools.product(
        (False, True), ("all", "negatives", "each"), ("both", "image", "text"), ("both", "image")
    )
    if not (inside and denominator == "each") and not (soft != "both" and denominator != "all")
]


def line_loss(scores, weights, ignored, inside, denominator):
    """One line of the formula, its scores being scalar tensors."""
    positive = [j for j, w in enumerate(weights) if w > 0]
    negative = [j for j in range(len(scores)) if j not in positive and j not in ignored]
    total = sum(weights[j] for j in positive)
    if inside:
        over = positive + negative if denominator == "all" else negative
        return -(sum(weights[j] * scores[j].exp() for j in positive).log() - sum(scores[k].exp() for k in over).log())
    loss = 0.0
    for j in positive:
        over = {"all": positive + negative, "negatives": negative, "each": [j, *negative]}[denominator]
        loss = loss - weights[j] / total * (scores[j] - sum(scores[k].exp() for k in over).log())
    return loss


def reference_info_nce(scores, weights, ignored, false, inside, denominator, direction, soft):
    """``ignored`` holds pairs; lines that are ignored whole are dropped; false texts have no term."""
    across = {(j, i) for i, j in ignored}
    found = []
    if direction in ("both", "image"):
        taken = weights if soft in ("both", "image") else (weights >= 1).astype(float)
        found.append(one_direction(scores, taken, ignored, (), inside, denominator))
    if direction in ("both", "text"):
        taken = weights if soft in ("both", "text") else (weights >= 1).astype(float)
        found.append(one_direction(scores.T, taken.T, across, false, inside, denominator))
    return sum(found) / len(found)


def one_direction(scores, weights, ignored, silent, inside, denominator):
    """Mean over the rows that are not dropped and not ``silent``."""
    n, m = scores.shape
    rows = [i for i in range(n) if not all((i, j) in ignored for j in range(m))]
    columns = [j for j in range(m) if not all((i, j) in ignored for i in range(n))]
    losses = [
        line_loss(
            [scores[i, j] for j in columns],
            weights[i, columns],
            [k for k, j in enumerate(columns) if (i, j) in ignored],
            inside,
            denominator,
        )
        for i in rows
        if i not in silent
    ]
    return sum(losses) / len(losses)


@st.composite
def batches(draw, soft_lines=True):
    """Vectors, weights with a 1 in every row and column, ignored pairs, a false text at the end (or none), a dropped row (or none)."""
    b, m, d = draw(st.integers(2, 6)), draw(st.integers(2, 8)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.standard_normal((b, d)), rng.standard_normal((m, d))))
    weights = np.zeros((b, m))
    for i in range(max(b, m)):
        weights[i % b, i % m] = 1
    extra = (rng.random((b, m)) < 0.2) & (weights == 0)
    weights[extra] = rng.choice([0.25, 0.5, 1.0], extra.sum()) if soft_lines and draw(st.booleans()) else 1.0
    for i in range(b):  # a negative in every line, for denominators over negatives
        if weights[i].all():
            weights[i, (i + 1) % m] = 0 if weights[:, (i + 1) % m].sum() > weights[i, (i + 1) % m] else weights[i, (i + 1) % m]
    ignored = {(i, j) for i in range(b) for j in range(m) if weights[i, j] == 0 and rng.random() < 0.15}
    false = ()
    if draw(st.booleans()):
        text = np.concatenate([text, rng.standard_normal((1, d))])
        weights, false = np.concatenate([weights, np.zeros((b, 1))], 1), (m,)
    if draw(st.booleans()):
        image = np.concatenate([image, rng.standard_normal((1, d))])
        weights = np.concatenate([weights, np.zeros((1, weights.shape[1]))])
        ignored |= {(b, j) for j in range(weights.shape[1])}
    return image, text, weights, ignored, false


def given_pairs(weights, ignored, false, form):
    """The same pairs, dense or as indices."""
    m = weights.shape[1]
    false_texts = torch.tensor([j in false for j in range(m)])
    if form == "dense":
        ignore = torch.zeros(weights.shape, dtype=torch.bool)
        for i, j in ignored:
            ignore[i, j] = True
        return pairs_of(torch.from_numpy(weights), weights.shape, ignore, false_texts)
    index = torch.tensor(sorted(ignored), dtype=torch.int64).reshape(-1, 2)
    positives = torch.from_numpy(np.argwhere(weights > 0)).flip(0)
    return pairs_of(torch.cat([positives, positives[:1]]), weights.shape, index, false_texts)


def is_usable(weights, ignored, false, choice):
    """Whether the choice has a value for this batch: negatives where it wants them, hard positives where it takes no others."""
    b, m = weights.shape
    rows = [i for i in range(b) if any((i, j) not in ignored for j in range(m))]
    columns = [j for j in range(m) if any((i, j) not in ignored for i in rows)]
    for lines, across, at in ((rows, columns, lambda i, j: (i, j)), ([j for j in columns if j not in false], rows, lambda j, i: (i, j))):
        for line in lines:
            cells = [at(line, other) for other in across]
            if choice["denominator"] == "negatives" and not any(weights[c] == 0 and c not in ignored for c in cells):
                return False
    return True


def check(value, leaves, expected, scores, image, text, scale):
    """Value and the gradients of image, text and scale."""
    assert value.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-12)
    value.backward()
    expected.backward()
    of_scores = scores.grad.numpy()
    np.testing.assert_allclose(leaves[0].grad.numpy(), scale * of_scores @ text, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(leaves[1].grad.numpy(), scale * of_scores.T @ image, rtol=1e-6, atol=1e-9)
    assert leaves[2].grad.item() == pytest.approx((of_scores * (image @ text.T)).sum(), rel=1e-6, abs=1e-9)


def leaves_of(image, text, scale):
    return [
        torch.from_numpy(image).requires_grad_(),
        torch.from_numpy(text).requires_grad_(),
        torch.tensor(scale, dtype=torch.float64, requires_grad=True),
    ]


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from(CHOICES), st.sampled_from([1.0, 5.0, 20.0, 60.0]), st.sampled_from([0, 1, 3, 100]), st.booleans())
def test_info_nce_is_its_formula(batch, choice, scale, chunk_size, product):
    image, text, weights, ignored, false = batch
    assume(is_usable(weights, ignored, false, choice))
    leaves, scores = leaves_of(image, text, scale), torch.from_numpy(scale * image @ text.T).requires_grad_()
    logits = Product(*leaves)
    value = info_nce(logits if product else logits.dense(), given_pairs(weights, ignored, false, "dense"), chunk_size=chunk_size, **choice)
    check(value, leaves, reference_info_nce(scores, weights, ignored, false, **choice), scores, image, text, scale)


@settings(deadline=None, max_examples=60)
@given(batches(soft_lines=False), st.sampled_from([1.0, 14.3, 60.0]), st.sampled_from([0, 1, 3]))
def test_pairs_by_index_are_the_dense_ones(batch, scale, chunk_size):
    image, text, weights, ignored, false = batch
    logits = Product(torch.from_numpy(image), torch.from_numpy(text), torch.tensor(scale, dtype=torch.float64))
    dense, index = (given_pairs(weights, ignored, false, form) for form in ("dense", "index"))
    assert all(torch.equal(getattr(dense, name), getattr(index, name)) for name in ("positive", "ignored", "used_rows", "used_columns"))
    assert info_nce(logits, dense, chunk_size=chunk_size).item() == info_nce(logits, index, chunk_size=chunk_size).item()


@settings(deadline=None, max_examples=80)
@given(batches(), st.floats(-12, 2), st.sampled_from([1.0, 10.0, 60.0]), st.sampled_from([0, 1, 3, 100]), st.booleans())
def test_the_sigmoid_loss_is_its_formula(batch, bias, scale, chunk_size, product):
    image, text, weights, ignored, false = batch
    leaves, scores = leaves_of(image, text, scale), torch.from_numpy(scale * image @ text.T).requires_grad_()
    ours, theirs = (torch.tensor(bias, dtype=torch.float64, requires_grad=True) for _ in range(2))
    logits = Product(*leaves)
    value = sigmoid_loss(logits if product else logits.dense(), ours, given_pairs(weights, ignored, false, "dense"), chunk_size=chunk_size)
    rows = [i for i in range(len(image)) if not all((i, j) in ignored for j in range(len(text)))]
    expected = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.product(rows, range(len(text))):
        if (i, j) not in ignored:
            z, w = scores[i, j] + theirs, weights[i, j]
            expected = expected - w * torch.nn.functional.logsigmoid(z) - (1 - w) * torch.nn.functional.logsigmoid(-z)
    check(value, leaves, expected / len(rows), scores, image, text, scale)
    assert ours.grad.item() == pytest.approx(theirs.grad.item(), rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    batches(),
    st.sampled_from([0.2, 1.0]),
    st.sampled_from([1.0, 14.3, 60.0]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(["both", "image", "text"]),
)
def test_soft_targets_are_their_formula(batch, temperature, scale, chunk_size, direction):
    image, text, *_ = batch
    rng = np.random.default_rng(len(image) * 31 + len(text))
    labels, text_labels = rng.random((len(image), 4)), rng.random((len(text), 4))
    leaves, scores = leaves_of(image, text, scale), torch.from_numpy(scale * image @ text.T).requires_grad_()
    value = soft_target_loss(
        Product(*leaves), torch.from_numpy(labels), torch.from_numpy(text_labels), temperature, direction, chunk_size=chunk_size
    )
    similar = labels @ text_labels.T / temperature
    found = []
    for name, s, like in (("image", scores, similar), ("text", scores.T, similar.T)):
        if direction in ("both", name):
            losses = []
            for line, weights in zip(s, like, strict=True):
                target = np.exp(weights) / np.exp(weights).sum()
                log_z = sum(v.exp() for v in line).log()
                losses.append(-sum(t * (v - log_z) for t, v in zip(target, line, strict=True)))
            found.append(sum(losses) / len(losses))
    check(value, leaves, sum(found) / len(found), scores, image, text, scale)


# ------------------------------------------------------------------------------------------------------------ what must not move it


def random_batch(b=9, m=14, d=6, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    image, text = (torch.nn.functional.normalize(torch.randn(n, d, generator=rng, dtype=dtype), dim=1) for n in (b, m))
    positives = torch.rand(b, m, generator=rng) < 0.15
    for i in range(max(b, m)):
        positives[i % b, i % m] = True
    return image, text, positives


LOSSES: dict[str, Any] = {
    "outside": MultiPositiveInfoNCE(),
    "inside": MultiPositiveInfoNCE(inside=True),
    "decoupled": MultiPositiveInfoNCE(denominator="negatives"),
    "each": MultiPositiveInfoNCE(denominator="each"),
    "sigmoid": MultiPositiveSigmoid(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_temperature_gives_a_nan(name, temperature, chunk_size, autocast):
    image, text, positives = random_batch()
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(1 / temperature, requires_grad=True)]
    loss = LOSSES[name]
    loss.chunk_size = chunk_size
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss({"pooled": Product(*leaves)}, positives)["loss"]
    value.backward()
    assert math.isfinite(value.item()) and value.dtype == torch.float32
    assert all(torch.isfinite(leaf.grad).all() and leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_tiles_are_exact_under_autocast(name):
    """The tiles are not rounded to bfloat16 where the vectors are not."""
    image, text, positives = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name]({"pooled": Product(image, text, torch.tensor(20.0))}, positives)["loss"]
    exact = LOSSES[name]({"pooled": Product(image.double(), text.double(), torch.tensor(20.0, dtype=torch.float64))}, positives)["loss"]
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_order_and_dropped_lines_change_nothing(name):
    image, text, positives = random_batch(dtype=torch.float64)
    loss, scale = LOSSES[name], torch.tensor(14.3, dtype=torch.float64)
    plain = loss({"pooled": Product(image, text, scale)}, positives)["loss"].item()
    rows, columns = torch.randperm(len(image)), torch.randperm(len(text))
    mixed = loss({"pooled": Product(image[rows], text[columns], scale)}, positives[rows][:, columns])["loss"].item()
    assert mixed == pytest.approx(plain, rel=1e-12)
    more = [torch.cat([x, torch.full((2, x.shape[1]), 3.0, dtype=torch.float64)]).requires_grad_() for x in (image, text)]
    padded = torch.nn.functional.pad(positives, (0, 2, 0, 2))
    ignore = torch.nn.functional.pad(torch.zeros_like(positives), (0, 2, 0, 2), value=True)
    value = loss({"pooled": Product(*more, scale)}, padded, ignore)["loss"]
    value.backward()
    assert value.item() == pytest.approx(plain, rel=1e-12)
    assert all(not x.grad[-2:].any() and x.grad[:-2].any() for x in more)


def test_weights_count_by_their_ratio_alone_in_info_nce_and_are_probabilities_in_the_sigmoid():
    image, text, positives = random_batch()
    parts = {"pooled": Product(image, text, torch.tensor(10.0))}
    for name in ("outside", "decoupled", "each"):
        assert LOSSES[name](parts, positives * 0.5)["loss"].item() == pytest.approx(LOSSES[name](parts, positives)["loss"].item(), rel=1e-6)
    with pytest.raises(ValueError, match="weights above 1"):
        LOSSES["sigmoid"](parts, positives * 2.0)


def test_what_has_no_value_is_refused():
    image, text, scale = torch.eye(2), torch.eye(2), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"directions name \['images'\]"):
        MultiPositiveInfoNCE(direction={"images": "image"})({"image": torch.eye(2), "text": torch.eye(2)}, torch.eye(2).bool())
    with pytest.raises(ValueError, match="has no other to share with"):
        MultiPositiveInfoNCE(direction="image", image_share=0.75)
    soft = torch.tensor([[1.0, 0.5], [0.5, 0.0]])
    with pytest.raises(ValueError, match="soft positives alone"):
        info_nce(Product(image, text, scale), pairs_of(soft, (2, 2)), soft="image")
    with pytest.raises(ValueError, match="expected one of all, negatives, each"):
        info_nce(Product(image, text, scale), pairs_of(soft, (2, 2)), denominator="none")
    with pytest.raises(ValueError, match="inside the log"):
        info_nce(Product(image, text, scale), pairs_of(soft, (2, 2)), denominator="each", inside=True)
    with pytest.raises(ValueError, match="goes with denominator all, not each"):
        info_nce(Product(image, text, scale), pairs_of(soft, (2, 2)), denominator="each", soft="image")
    with pytest.raises(ValueError, match="chunk_size is -1"):
        info_nce(Product(image, text, scale), pairs_of(soft, (2, 2)), chunk_size=-1)
    with pytest.raises(ValueError, match="not there"):
        pairs_of(torch.tensor([[0, 2]]), (2, 2))
    with pytest.raises(ValueError, match=r"integer pairs of shape \(K, 2\)"):
        pairs_of(torch.zeros(3, 3, dtype=torch.int64), (2, 2))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 2])
def test_a_line_without_a_negative_has_no_term_where_the_denominator_is_of_negatives(inside, chunk_size):
    """Against the mean over the lines that have one; a batch of one item costs nothing and stops nothing."""
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((3, 4)), rng.standard_normal((4, 4))
    weights = np.array([[1.0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
    leaves, scores = leaves_of(image, text, 1.0), torch.from_numpy(image @ text.T).requires_grad_()
    value = info_nce(
        Product(*leaves), given_pairs(weights, set(), (), "dense"), inside=inside, denominator="negatives", chunk_size=chunk_size
    )
    by_image = [line_loss(scores[i], weights[i], [], inside, "negatives") for i in (1, 2)]
    by_text = [line_loss(scores[:, j], weights[:, j], [], inside, "negatives") for j in range(4)]
    check(value, leaves, (sum(by_image) / 2 + sum(by_text) / 4) / 2, scores, image, text, 1.0)
    one = leaves_of(image[:1], text[:2], 1.0)
    alone = info_nce(Product(*one), pairs_of(torch.ones(1, 2), (1, 2)), inside=inside, denominator="negatives", chunk_size=chunk_size)
    alone.backward()
    assert alone.item() == 0 and not any(leaf.grad.any() for leaf in one)


def test_a_batch_of_which_nothing_is_left_gives_no_gradient_to_vectors():
    leaves = [torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True), torch.tensor(2.0, requires_grad=True)]
    for loss in (MultiPositiveInfoNCE(), MultiPositiveSigmoid()):
        value = loss({"pooled": Product(*leaves)}, torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool))["loss"]
        value.backward()
        assert value.item() == 0 and not any(leaf.grad.any() for leaf in leaves)


def test_the_sigmoid_loss_says_that_its_graph_serves_once():
    image, text, positives = random_batch()
    value = MultiPositiveSigmoid()({"pooled": Product(image.requires_grad_(), text, torch.tensor(1.0))}, positives)["loss"]
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        value.backward()
    plain = MultiPositiveSigmoid(chunk_size=0)({"pooled": Product(image, text, torch.tensor(1.0))}, positives)["loss"]
    plain.backward(retain_graph=True)
    plain.backward()


# ------------------------------------------------------------------------------------------------------------ memory


class Largest(TorchDispatchMode):
    """The most elements that any tensor of the calculation has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


@pytest.mark.parametrize("name", [*LOSSES, "soft targets"])
def test_no_tensor_grows_with_images_times_texts(name):
    """400 images and 500 texts in tiles of 8 rows: nothing larger than a tile or the vectors is made, forward or backward."""
    b, m, d = 400, 500, 6
    rng = torch.Generator().manual_seed(0)
    image, text = torch.randn(b, d, generator=rng, requires_grad=True), torch.randn(m, d, generator=rng, requires_grad=True)
    positives = torch.stack([torch.arange(m) % b, torch.arange(m)], 1)
    product = Product(image, text, torch.tensor(1.0, requires_grad=True))
    with Largest() as largest:
        if name == "soft targets":
            value = soft_target_loss(product, torch.rand(b, 3), torch.rand(m, 3), chunk_size=8)
        else:
            LOSSES[name].chunk_size = 8
            value = LOSSES[name]({"pooled": product}, positives)["loss"]
        value.backward()
    assert m < largest.elements <= 8 * m
    assert image.grad.any() and text.grad.any()


def test_the_fixed_interface_takes_pairs_of_indices_and_both_forms():
    image, text, positives = random_batch(dtype=torch.float64)
    expected = multi_positive_info_nce(image, text, positives, 0.07, chunk_size=0)
    for form in (positives, positives.double(), positives.nonzero(), positives.nonzero().int()):
        assert multi_positive_info_nce(image, text, form, 0.07).item() == pytest.approx(expected.item(), rel=1e-12)


def test_rounded_tiles_are_near():
    image, text, positives = random_batch(30, 40, 64)
    exact, rounded = (
        MultiPositiveInfoNCE(matmul=matmul)({"pooled": Product(image, text, torch.tensor(14.3))}, positives)["loss"]
        for matmul in ("exact", "bfloat16")
    )
    assert rounded.item() != exact.item() and rounded.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", LOSSES)
def test_cuda_gives_the_same_and_no_more_memory_than_tiles(name):
    image, text, positives = random_batch(3000, 4000, 64)
    found = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (image, text)]
        loss = LOSSES[name].to(device)
        loss.chunk_size = 64
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        value = loss({"pooled": Product(*leaves, torch.tensor(14.3, device=device))}, positives.nonzero().to(device))["loss"]
        value.backward()
        found.append([value.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    assert torch.cuda.max_memory_allocated() - before < 3000 * 4000 * 4 / 2


def likeness(weights, ignored, false, vectors, anchor):
    """w_ij of the formula, every pair by itself: the given weight of a positive, 0 of what is ignored or made to be false."""

    def unit(v):
        return v / max(np.linalg.norm(v), 1e-12)

    b, m = weights.shape
    own = [unit(v) for v in vectors]
    if anchor == "text":
        images = [unit(sum(weights[i, j] * own[j] for j in range(m))) for i in range(b)]
        texts = own
    else:
        images = own
        texts = [unit(sum(weights[i, j] * own[i] for i in range(b))) for j in range(m)]
    found = np.zeros((b, m))
    for i, j in itertools.product(range(b), range(m)):
        if weights[i, j] > 0:
            found[i, j] = weights[i, j]
        elif (i, j) not in ignored and not (j in false and anchor == "text"):
            found[i, j] = (1 + images[i] @ texts[j]) / 2
    return found


@pytest.mark.parametrize("chunk_size", [0, 1, 3])
@pytest.mark.parametrize("anchor", ["text", "image"])
@pytest.mark.parametrize("direction", ["both", "image", "text"])
@settings(deadline=None, max_examples=15)
@given(batch=batches(), scale=st.sampled_from([0.5, 10.0]))
def test_likeness_info_nce_is_its_formula(chunk_size, anchor, direction, batch, scale):
    image, text, weights, ignored, false = batch
    soft = likeness(weights, ignored, false, text if anchor == "text" else image, anchor)
    leaves = leaves_of(image, text, scale)
    value = likeness_info_nce(
        Product(*leaves), given_pairs(weights, ignored, false, "dense"), anchor, direction=direction, chunk_size=chunk_size
    )
    scores = torch.from_numpy(scale * image @ text.T).requires_grad_()
    wanted = {"image": soft if anchor == "text" else weights, "text": soft if anchor == "image" else weights}
    across = {(j, i) for i, j in ignored}
    found = []
    if direction != "text":
        found.append(weighted_direction(scores, wanted["image"], ignored, ()))
    if direction != "image":
        found.append(weighted_direction(scores.T, wanted["text"].T, across, false))
    expected = sum(found) / len(found)
    check(value, leaves, expected, scores, image, text, scale)


def weighted_direction(scores, weights, ignored, silent):
    """Mean over the lines that are not dropped and not silent, of the weighted mean of log-shares."""
    losses = []
    for i in range(len(scores)):
        over = [j for j in range(scores.shape[1]) if (i, j) not in ignored]
        if not over or i in silent:
            continue
        log_sum = torch.stack([scores[i, j] for j in over]).logsumexp(0)
        losses.append(-sum(weights[i, j] * (scores[i, j] - log_sum) for j in over) / sum(weights[i, j] for j in over))
    return sum(losses) / len(losses)


def test_likeness_holds_no_matrix_and_wants_vectors():
    images, texts = torch.randn(3000, 8, requires_grad=True), torch.randn(4000, 8, requires_grad=True)
    index = torch.arange(4000)
    pairs = pairs_of(torch.stack([index % 3000, index], 1), (3000, 4000))
    with Largest() as largest:
        likeness_info_nce(Product(images, texts, torch.tensor(10.0)), pairs, "text", chunk_size=64).backward()
    assert largest.elements <= 64 * 4000
    with pytest.raises(ValueError, match="part 'tokens' has no vectors"):
        LikenessInfoNCE()({"tokens": torch.zeros(2, 2)}, torch.eye(2).bool())
