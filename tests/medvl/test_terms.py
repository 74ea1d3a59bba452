"""Terms against loops in float64, value and gradients; what is missing is said."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvl.losses import (
    FalseTextContrast,
    FeatureMimic,
    ImageImageContrast,
    MultiLabelCodes,
    SentencePrototypes,
    TermContext,
    TextTextContrast,
    UniformityAlignment,
    pairs_of,
)
from medvl.types import ImageFeatures, TextFeatures

D = 5


def normed(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@st.composite
def batches(draw):
    """Vectors of images, texts and second views, positives with every row and column used, false texts at the end."""
    b, m, f = draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    positives = rng.random((b, m)) < 0.3
    positives[np.arange(b), rng.integers(0, m, b)] = True
    positives[rng.integers(0, b, m), np.arange(m)] = True
    positives = np.concatenate([positives, np.zeros((b, f), dtype=bool)], 1)
    vectors = [rng.standard_normal((count, D)) for count in (b, m + f, b)]
    return vectors, positives, np.arange(m + f) >= m


def context(vectors, positives, false, **more):
    images, texts, again = (torch.from_numpy(v).requires_grad_() for v in vectors)
    pairs = pairs_of(torch.from_numpy(positives), positives.shape, None, torch.from_numpy(false))
    return TermContext(ImageFeatures(images), TextFeatures(texts), pairs, again=ImageFeatures(again), **more), (images, texts, again)


def check(term, reference, batch, **more):
    """The value, and every gradient by central differences of the reference."""
    vectors, positives, false = batch
    made, inputs = context(vectors, positives, false, **more)
    value = term.double()(made)
    assert value.item() == pytest.approx(reference(*vectors, positives, false), rel=1e-9, abs=1e-10)
    value.backward()
    for which, tensor in enumerate(inputs):
        found = np.zeros_like(vectors[which]) if tensor.grad is None else tensor.grad.numpy()
        expected = np.zeros_like(found)
        for place in np.ndindex(*found.shape):
            moved = [[v.copy() for v in vectors] for _ in range(2)]
            moved[0][which][place] += 1e-6
            moved[1][which][place] -= 1e-6
            expected[place] = (reference(*moved[0], positives, false) - reference(*moved[1], positives, false)) / 2e-6
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-7)


def log_softmax_loss(scores, mask, out):
    """Mean over lines with a positive of the mean -log p; ``out`` are left out."""
    total, lines = 0.0, 0
    for row, positive, gone in zip(scores, mask, out, strict=True):
        if positive.any():
            z = math.log(sum(math.exp(s) for s, g in zip(row, gone, strict=True) if not g))
            total -= sum(s - z for s, p in zip(row, positive, strict=True) if p) / positive.sum()
            lines += 1
    return total / lines if lines else 0.0


def image_image(images, texts, again, positives, false):
    scores = normed(images) @ normed(again).T / 0.07
    mask, none = np.eye(len(images), dtype=bool), np.zeros((len(images),) * 2, dtype=bool)
    return (log_softmax_loss(scores, mask, none) + log_softmax_loss(scores.T, mask, none)) / 2


def text_text(images, texts, again, positives, false):
    together = (positives.T.astype(int) @ positives.astype(int)) > 0
    np.fill_diagonal(together, False)
    used = together.any(1)
    if not used.any():
        return 0.0
    scores, mask = (normed(texts) @ normed(texts).T / 0.1)[used][:, used], together[used][:, used]
    return log_softmax_loss(scores, mask, np.eye(used.sum(), dtype=bool))  # both directions are the same


def false_texts(images, texts, again, positives, false):
    if not false.any():
        return 0.0
    scores = normed(images) @ normed(texts).T / 0.1
    rows = []
    for row, positive in zip(scores, positives, strict=True):
        wrong = sum(math.exp(s) for s in row[false])
        rows.append(np.mean([math.log(1 + wrong / math.exp(s)) for s in row[positive]]))
    return float(np.mean(rows))


def spread(images, texts, again, positives, false):
    x, y = normed(images), normed(texts)

    def uniform(v):
        values = [math.exp(-2 * ((v[i] - v[k]) ** 2).sum()) for i in range(len(v)) for k in range(i)]
        return math.log(np.mean(values)) if values else 0.0

    apart = np.mean([((x[i] - y[j]) ** 2).sum() for i, j in zip(*np.nonzero(positives), strict=True)])
    return 0.5 * apart + 2.0 * (uniform(x) + uniform(y)) / 2


@pytest.mark.parametrize(
    ("term", "reference"),
    [
        (ImageImageContrast(), image_image),
        (TextTextContrast(temperature=0.1), text_text),
        (FalseTextContrast(temperature=0.1), false_texts),
        (UniformityAlignment(alignment=0.5, uniformity=2.0), spread),
    ],
    ids=lambda x: type(x).__name__,
)
@given(batches())
@settings(deadline=None, max_examples=25)
def test_against_loops(term, reference, batch):
    check(term, reference, batch)


@given(batches(), st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_codes_leave_out_what_is_not_known(batch, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0.0, 1.0, math.nan], (len(batch[0][0]), 3))
    term = MultiLabelCodes(D, 3, positive_weight=3.0).double()
    weight, bias = (p.detach().numpy() for p in (term.out.weight, term.out.bias))

    def reference(images, texts, again, positives, false):
        known = ~np.isnan(labels)
        p = 1 / (1 + np.exp(-(images @ weight.T + bias)))
        losses = np.where(labels == 1, -3 * np.log(p), -np.log(1 - p))
        return losses[known].sum() / known.sum() if known.any() else 0.0

    check(term, reference, batch, labels=torch.from_numpy(labels))


@given(batches())
@settings(deadline=None, max_examples=25)
def test_prototypes(batch):
    torch.manual_seed(1)
    term = SentencePrototypes(D, 4, temperature=0.2).double()
    bank = normed(term.bank.detach().numpy())

    def softmax(scores):
        e = np.exp(scores - scores.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    fixed = softmax(normed(batch[0][1]) @ bank.T / 0.2)  # where no gradient goes

    def reference(images, texts, again, positives, false):
        shares = softmax(normed(texts) @ bank.T / 0.2)
        rebuilt = ((normed(texts) - normed(shares @ bank)) ** 2).sum(1).mean()
        q = np.log(softmax(normed(images) @ bank.T / 0.2))
        wanted = [fixed[positive].mean(0) for positive in positives]
        return rebuilt - np.mean([(w * row).sum() for w, row in zip(wanted, q, strict=True)])

    check(term, reference, batch)


def test_a_drawn_prototype_is_drawn_in_training_alone():
    batch = ([np.eye(3, D), np.eye(3, D), np.eye(3, D)], np.eye(3, dtype=bool), np.zeros(3, dtype=bool))
    term = SentencePrototypes(D, 8, gumbel=True).double()
    made, _ = context(*batch)
    values = {round(term(made).item(), 9) for _ in range(8)}
    term.eval()
    assert len(values) > 1 and len({round(term(made).item(), 9) for _ in range(4)}) == 1
    term.train()(made).backward()
    assert term.bank.grad.abs().sum() > 0


@pytest.mark.parametrize("width", [D, 7])
def test_mimicry_is_the_squared_distance_to_the_teacher(width):
    torch.manual_seed(0)
    teacher = [torch.randn(count, width, dtype=torch.float64, requires_grad=True) for count in (3, 4)]
    positives = np.ones((3, 4), dtype=bool)
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal((count, D)) for count in (3, 4, 3)]
    term = FeatureMimic(D, width).double()
    matrix = np.eye(D) if width == D else term.out.weight.detach().numpy()
    targets = [normed(one.detach().numpy()) for one in teacher]

    def reference(images, texts, again, positives, false):
        pairs = zip((images, texts), targets, strict=True)
        return sum(((normed(normed(x) @ matrix.T) - t) ** 2).sum(1).mean() for x, t in pairs)

    check(term, reference, (vectors, positives, np.zeros(4, dtype=bool)), teacher_images=teacher[0], teacher_texts=teacher[1])
    assert teacher[0].grad is None


def test_what_a_term_lacks_is_said():
    made, _ = context([np.eye(2, D)] * 3, np.eye(2, dtype=bool), np.zeros(2, dtype=bool))
    bare = TermContext(made.images, made.texts, made.pairs)
    for term, message in (
        (ImageImageContrast(), "augment"),
        (FeatureMimic(D, D), "model.teacher"),
        (MultiLabelCodes(D, 2), "data.init_args.labels"),
    ):
        with pytest.raises(ValueError, match=message):
            term(bare)


def test_under_autocast_terms_stay_close():
    rng = np.random.default_rng(2)
    vectors = [rng.standard_normal((count, D)) for count in (6, 8, 6)]
    positives = np.zeros((6, 8), dtype=bool)
    positives[np.arange(8) % 6, np.arange(8)] = True
    for term in (ImageImageContrast(), TextTextContrast(), UniformityAlignment(), SentencePrototypes(D, 4)):
        made, _ = context(vectors, positives, np.zeros(8, dtype=bool))
        exact = term.double()(made)
        made, _ = context([v.astype(np.float32) for v in vectors], positives, np.zeros(8, dtype=bool))
        with torch.autocast("cpu", torch.bfloat16):
            near = term.float()(made)
        assert near.isfinite() and near.item() == pytest.approx(exact.item(), rel=0.05, abs=0.02)


def test_a_term_of_unknown_labels_alone_is_nothing():
    made, inputs = context([np.eye(2, D)] * 3, np.eye(2, dtype=bool), np.zeros(2, dtype=bool), labels=torch.full((2, 2), math.nan))
    value = MultiLabelCodes(D, 2).double()(made)
    value.backward()
    assert value == 0 and F.normalize(inputs[0].grad, dim=1).abs().sum() == 0
