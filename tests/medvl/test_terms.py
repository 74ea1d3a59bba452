"""Terms against loops in float64, value and gradients; what is missing is said."""

import math
from dataclasses import replace

import jsonargparse
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from medvl.losses import (
    FalseTextContrast,
    FeatureMimic,
    ImageImageContrast,
    MultiLabelCodes,
    MultiPositiveInfoNCE,
    SentencePrototypes,
    Term,
    TermContext,
    TextTextContrast,
    UniformityAlignment,
    pairs_of,
)
from medvl.losses.terms import drawn, masked_codes, uniformity
from medvl.nn.similarity import PooledSimilarity
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, ReportEncoder, TextBatch, TextFeatures

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


def context(vectors, positives, false, ignore=None, **more):
    images, texts, again = (torch.from_numpy(v).requires_grad_() for v in vectors)
    left_out = None if ignore is None else torch.from_numpy(ignore)
    pairs = pairs_of(torch.from_numpy(positives), positives.shape, left_out, torch.from_numpy(false))
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
def test_a_false_text_counts_against_the_images_that_it_is_false_of(batch, seed):
    """Some false texts are true of another image, or not known there; one is ignored whole."""
    vectors, positives, false = batch
    rng = np.random.default_rng(seed)
    vectors[1] = np.concatenate([vectors[1], rng.standard_normal((3, D))])
    wide = np.zeros((len(positives), positives.shape[1] + 3), dtype=bool)
    wide[:, : positives.shape[1]] = positives
    false = np.append(false, [True] * 3)
    wide |= false & (rng.random(wide.shape) < 0.3)
    ignore = false & ~wide & (rng.random(wide.shape) < 0.3)
    wide[:, -1], ignore[:, -1] = False, True

    def reference(images, texts, again, positives, false):
        scores = normed(images) @ normed(texts).T / 0.1
        rows = []
        for i, row in enumerate(scores):
            wrong = sum(math.exp(row[f]) for f in np.flatnonzero(false) if not positives[i, f] and not ignore[i, f])
            rows.append(np.mean([math.log(1 + wrong / math.exp(row[j])) for j in np.flatnonzero(positives[i])]))
        return float(np.mean(rows))

    check(FalseTextContrast(temperature=0.1), reference, (vectors, wide, false), ignore=ignore)


@pytest.mark.parametrize(
    "term",
    [ImageImageContrast(), TextTextContrast(), FalseTextContrast(), UniformityAlignment(), MultiLabelCodes(D, 3), SentencePrototypes(D, 4)],
    ids=lambda x: type(x).__name__,
)
@given(batches(), st.integers(0, 10**6))
@settings(deadline=None, max_examples=10)
def test_the_order_of_images_and_of_texts_changes_nothing(term, batch, seed):
    vectors, positives, false = batch
    rng = np.random.default_rng(seed)
    labels = rng.choice([0.0, 1.0, -1.0, math.nan], (len(positives), 3))
    i, j = rng.permutation(len(positives)), rng.permutation(len(false))
    made, inputs = context(vectors, positives, false, labels=torch.from_numpy(labels))
    moved = ([vectors[0][i], vectors[1][j], vectors[2][i]], positives[i][:, j], false[j])
    again, others = context(*moved, labels=torch.from_numpy(labels[i]))
    term.double()
    one, other = term(made), term(again)
    assert one.item() == pytest.approx(other.item(), rel=1e-9, abs=1e-10)
    (one + other).backward()
    for mine, theirs, order in zip(inputs, others, (i, j, i), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad[order], theirs.grad, rtol=1e-7, atol=1e-9)


def test_what_is_not_known_has_no_gradient_and_may_be_anything():
    """Against torch's own loss and a mask by hand; a logit that is not finite does no harm where nothing is known."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 2, (6, 4), generator=rng).double()
    labels[0, 0], labels[3, 1], labels[5] = math.nan, -1, math.nan
    mask = (~labels.isnan() & (labels != -1)).double()
    wanted = logits.clone().requires_grad_()
    weight = torch.tensor(2.0, dtype=torch.float64)
    losses = F.binary_cross_entropy_with_logits(wanted, labels.nan_to_num().clamp_min(0), reduction="none", pos_weight=weight)
    (losses * mask).sum().backward()
    given_logits = torch.where(mask > 0, logits, math.inf)
    given_logits[5] = math.nan
    given_logits.requires_grad_()
    value = masked_codes(given_logits, labels, 2.0)
    value.backward()
    torch.testing.assert_close(value, (losses * mask).sum())
    torch.testing.assert_close(given_logits.grad, wanted.grad)
    assert (given_logits.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("bad", [2.0, -0.5, -math.inf, math.inf])
def test_labels_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="labels must be 1"):
        masked_codes(torch.zeros(1, 2), torch.tensor([[0.0, bad]]))
    with pytest.raises(ValueError, match="labels of shape"):
        masked_codes(torch.zeros(2, 2), torch.zeros(1, 2))


@given(batches(), st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_codes_leave_out_what_is_not_known(batch, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0.0, 1.0, -1.0, math.nan], (len(batch[0][0]), 3))
    term = MultiLabelCodes(D, 3, positive_weight=3.0).double()
    weight, bias = (p.detach().numpy() for p in (term.out.weight, term.out.bias))

    def reference(images, texts, again, positives, false):
        known = (labels == 0) | (labels == 1)
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


def test_draws_follow_the_softmax_and_repeat_by_their_generator():
    scores = torch.tensor([[0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    found = drawn(scores.expand(20000, 4), torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {0.0, 1.0} and (found.sum(1) == 1).all()
    share = np.exp(scores[0].numpy()) / np.exp(scores[0].numpy()).sum()
    np.testing.assert_allclose(found.mean(0).numpy(), share, atol=4 * 0.5 / math.sqrt(20000))
    batch = ([np.eye(3, D)] * 3, np.eye(3, dtype=bool), np.zeros(3, dtype=bool))
    term = SentencePrototypes(D, 8, gumbel=True).double()
    values = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        made, _ = context(*batch, generator=torch.Generator().manual_seed(5))
        values.append(term(made).item())
    assert values[0] == values[1]


def test_gradients_of_draws_are_those_of_the_noisy_softmax():
    rng = np.random.default_rng(0)
    scores, over = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    noise = -np.log(torch.empty(3, 4, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(3)).numpy())

    def soft(x):
        e = np.exp(x + noise)
        return (e / e.sum(1, keepdims=True) * over).sum()

    leaf = torch.from_numpy(scores).requires_grad_()
    (drawn(leaf, torch.Generator().manual_seed(3)) * torch.from_numpy(over)).sum().backward()
    for place in np.ndindex(3, 4):
        step = np.zeros((3, 4))
        step[place] = 1e-6
        assert leaf.grad[place].item() == pytest.approx((soft(scores + step) - soft(scores - step)) / 2e-6, rel=1e-5, abs=1e-8)


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
        (ImageImageContrast(), "data.init_args.second_view"),
        (FeatureMimic(D, D), "model.teacher"),
        (MultiLabelCodes(D, 2), "data.init_args.labels"),
    ):
        with pytest.raises(ValueError, match=message):
            term(bare)
    taught, _ = context([np.eye(2, D)] * 3, np.eye(2, dtype=bool), np.zeros(2, dtype=bool), teacher_images=torch.ones(2, 4))
    with pytest.raises(ValueError, match="teacher_dim is 3, the teacher embeds in 4"):
        FeatureMimic(D, 3)(replace(taught, teacher_texts=torch.ones(2, 4)))


def test_terms_are_built_from_a_recipe():
    """As LightningCLI builds them: class paths and plain arguments, a mistyped one refused."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--terms", type=dict[str, Term])

    def built(terms):
        return parser.instantiate_classes(parser.parse_object({"terms": terms})).terms

    made = built(
        {
            name: {"class_path": f"medvl.losses.{name}", "init_args": arguments}
            for name, arguments in (
                ("ImageImageContrast", {"weight": 1.0, "temperature": 0.1}),
                ("TextTextContrast", {"weight": 0.5}),
                ("FalseTextContrast", {}),
                ("UniformityAlignment", {"alignment": 0.5, "uniformity": 2.0, "t": 3.0}),
                ("FeatureMimic", {"embed_dim": 16, "teacher_dim": 32}),
                ("MultiLabelCodes", {"embed_dim": 16, "codes": 5, "positive_weight": 4.0}),
                ("SentencePrototypes", {"embed_dim": 16, "prototypes": 12, "gumbel": True}),
            )
        }
    )
    assert {name: type(term).__name__ for name, term in made.items()} == {name: name for name in made} and len(made) == 7
    assert made["TextTextContrast"].weight == 0.5 and made["FeatureMimic"].out.weight.shape == (32, 16)
    with pytest.raises(jsonargparse.ArgumentError, match="prototype_count"):
        built({"bank": {"class_path": "medvl.losses.SentencePrototypes", "init_args": {"embed_dim": 16, "prototype_count": 3}}})


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


def test_uniformity_is_made_in_tiles():
    """2000 vectors: no tensor is larger than a tile of 512 rows, forward or backward, and the value is that of all distances."""
    x = F.normalize(torch.randn(2000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    with Largest() as largest:
        value = uniformity(x, 3.0)
        value.backward()
    assert largest.elements <= 512 * 2000
    assert value.item() == pytest.approx((-3 * torch.pdist(x.detach()) ** 2).logsumexp(0).item() - math.log(2000 * 1999 / 2), rel=1e-9)


def test_under_autocast_terms_stay_close():
    rng = np.random.default_rng(2)
    vectors = [rng.standard_normal((count, D)) for count in (6, 8, 6)]
    positives = np.zeros((6, 8), dtype=bool)
    positives[np.arange(8) % 6, np.arange(8)] = True
    false = np.arange(8) == 7
    for term in (ImageImageContrast(), TextTextContrast(), FalseTextContrast(), UniformityAlignment(), SentencePrototypes(D, 4)):
        made, _ = context(vectors, positives, false)
        exact = term.double()(made)
        made, inputs = context([v.astype(np.float32) for v in vectors], positives, false)
        with torch.autocast("cpu", torch.bfloat16):
            near = term.float()(made)
        near.backward()
        assert near.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-5)
        assert all(one.grad is None or one.grad.isfinite().all() for one in inputs)


def test_a_term_of_unknown_labels_alone_is_nothing():
    made, inputs = context([np.eye(2, D)] * 3, np.eye(2, dtype=bool), np.zeros(2, dtype=bool), labels=torch.full((2, 2), math.nan))
    value = MultiLabelCodes(D, 2).double()(made)
    value.backward()
    assert value == 0 and F.normalize(inputs[0].grad, dim=1).abs().sum() == 0


def test_what_the_null_image_has_is_no_positive_of_a_study_in_a_term():
    """With the objective it is aligned with the null image; a term must not pull it back."""
    from medvl.data.studies import StudyBatch
    from medvl.training.module import AlignmentModule

    seen = []

    class Looks(Term):
        def forward(self, context):
            seen.append(context.pairs)
            return context.images.pooled.sum() * 0

    class Images(ImageEncoder):
        embed_dim = 4

        def forward(self, batch):
            return ImageFeatures(batch.pixels.flatten(1))

    class Texts(ReportEncoder):
        embed_dim = 4

        def forward(self, batch):
            return TextFeatures(torch.eye(4)[: len(batch.texts)])

    module = AlignmentModule(Images(), Texts(), PooledSimilarity(), MultiPositiveInfoNCE(), null_target=True, terms={"looks": Looks()})
    module.log = module.log_dict = lambda *args, **kwargs: None
    positives = torch.tensor([[True, False, True], [False, True, False], [False, False, True]])
    null = torch.tensor([False, False, True])
    batch = StudyBatch(ImageBatch(torch.rand(3, 1, 2, 2)), TextBatch(("a", "b", "c")), positives, (1, 2, 3), null_texts=null)
    module.training_step(batch, 0)
    (pairs,) = seen
    assert pairs.positive.tolist() == [[0, 0], [1, 1]]
    assert pairs.used_columns.tolist() == [True, True, False] and pairs.used_rows.tolist() == [True, True, False]
