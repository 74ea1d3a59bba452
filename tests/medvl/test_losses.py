"""The objective against its formula in plain floats, one pair at a time, and against gradients written out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.losses import MultiPositiveInfoNCE, MultiPositiveSigmoid, info_nce_of_logits, multi_positive_info_nce


def one_direction(scores, positives):
    """L_image of the formula, in plain Python floats."""
    total = 0.0
    for row, mask in zip(scores, positives, strict=True):
        top = max(row)
        log_z = top + math.log(sum(math.exp(v - top) for v in row))
        total -= sum(v - log_z for v, m in zip(row, mask, strict=True) if m) / sum(mask)
    return total / len(scores)


def reference(scores, positives):
    return (one_direction(scores.tolist(), positives.tolist()) + one_direction(scores.T.tolist(), positives.T.tolist())) / 2


def reference_gradient(scores, positives):
    """dL/ds: softmax minus the share of each positive, both directions, written out by hand."""
    gradient = np.zeros_like(scores)
    for s, p, g in ((scores, positives, gradient), (scores.T, positives.T, gradient.T)):
        for i in range(len(s)):
            e = np.exp(s[i] - s[i].max())
            g[i] += (e / e.sum() - p[i] / p[i].sum()) / len(s) / 2
    return gradient


@st.composite
def problems(draw):
    """Unit vectors and positives in which every row and column has at least one."""
    b, m, d = draw(st.integers(1, 7)), draw(st.integers(1, 12)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.standard_normal((b, d)), rng.standard_normal((m, d))))
    positives = rng.random((b, m)) < draw(st.floats(0, 0.9))
    for i in range(max(b, m)):
        positives[i % b, i % m] = True
    return image, text, positives


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from([0.01, 0.07, 1.0, 10.0]))
def test_loss_and_gradients_match_the_formula(problem, temperature):
    image, text, positives = problem
    leaves = [torch.from_numpy(x).requires_grad_() for x in (image, text)]
    loss = multi_positive_info_nce(*leaves, torch.from_numpy(positives), temperature)
    loss.backward()
    scores = image @ text.T / temperature
    assert loss.item() == pytest.approx(reference(scores, positives), rel=1e-6, abs=1e-12)
    gradient = reference_gradient(scores, positives) / temperature
    np.testing.assert_allclose(leaves[0].grad.numpy(), gradient @ text, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(leaves[1].grad.numpy(), gradient.T @ image, rtol=1e-6, atol=1e-9)


def test_temperature_gets_its_gradient():
    rng = np.random.default_rng(0)
    scores, positives = rng.standard_normal((5, 9)), np.eye(5, 9, dtype=bool) | np.eye(5, 9, 4, dtype=bool)
    positives[0, 8] = True
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    info_nce_of_logits(torch.from_numpy(scores) / temperature, torch.from_numpy(positives)).backward()
    step = 1e-6
    numeric = (reference(scores / (0.3 + step), positives) - reference(scores / (0.3 - step), positives)) / (2 * step)
    assert temperature.grad.item() == pytest.approx(numeric, rel=1e-6)


def test_one_positive_each_is_the_clip_loss_of_open_clip():
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is in the extra 'open_clip'")
    rng = torch.Generator().manual_seed(1)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8, generator=rng, dtype=torch.float64), dim=1) for _ in range(2))
    theirs = open_clip.ClipLoss()(image, text, torch.tensor(1 / 0.07, dtype=torch.float64))
    assert multi_positive_info_nce(image, text, torch.eye(6, dtype=torch.bool), 0.07).item() == pytest.approx(theirs.item(), rel=1e-9)


def test_order_of_the_batch_does_not_matter():
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.standard_normal((6, 10)))
    eye = torch.eye(6, 10, dtype=torch.bool)
    positives = torch.from_numpy(rng.random((6, 10)) < 0.3) | eye | eye.flip(0, 1)
    rows, columns = torch.from_numpy(rng.permutation(6)), torch.from_numpy(rng.permutation(10))
    shuffled = info_nce_of_logits(logits[rows][:, columns], positives[rows][:, columns])
    assert shuffled.item() == pytest.approx(info_nce_of_logits(logits, positives).item(), rel=1e-12)


def test_ignored_pairs_leave_the_denominators_and_whole_rows_and_columns_drop():
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((4, 5))
    positives = np.eye(4, 5, dtype=bool)
    ignore = np.zeros((4, 5), dtype=bool)
    ignore[3], ignore[:, 4], ignore[:, 3], ignore[0, 1] = True, True, True, True
    positives[3, 3] = False
    got = info_nce_of_logits(torch.from_numpy(scores), torch.from_numpy(positives), torch.from_numpy(ignore))
    kept = scores[:3, :3].copy()
    kept[0, 1] = -1e9
    assert got.item() == pytest.approx(reference(kept, positives[:3, :3]), rel=1e-9)


def test_a_row_or_column_without_a_positive_is_refused():
    logits = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"1 of 3 images have no positive text \(first: image 2\)"):
        info_nce_of_logits(logits, torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool))
    with pytest.raises(ValueError, match=r"1 of 3 texts have no positive image \(first: text 1\)"):
        info_nce_of_logits(logits, torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 0]], dtype=torch.bool))
    with pytest.raises(ValueError, match="both positive and ignored"):
        info_nce_of_logits(logits, torch.eye(3, dtype=torch.bool), torch.eye(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="positives must be bool"):
        info_nce_of_logits(logits, torch.eye(3, dtype=torch.int64))


def test_huge_logits_stay_finite_in_bfloat16():
    logits = (torch.eye(4) * 2e4).to(torch.bfloat16).requires_grad_()
    loss = info_nce_of_logits(logits, torch.eye(4, dtype=torch.bool).flip(0))
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=1e-2)
    assert torch.isfinite(logits.grad).all()


def test_objective_weighs_the_parts_of_a_similarity():
    rng = torch.Generator().manual_seed(0)
    parts = {"pooled": torch.randn(3, 3, generator=rng), "tokens": torch.randn(3, 3, generator=rng)}
    positives = torch.eye(3, dtype=torch.bool)
    losses = MultiPositiveInfoNCE({"pooled": 3.0, "tokens": 1.0})(parts, positives)
    pooled, tokens = (reference(parts[name].double().numpy(), positives.numpy()) for name in ("pooled", "tokens"))
    expected = (3 * pooled + tokens) / 4
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no_such"):
        MultiPositiveInfoNCE({"no_such": 1.0})(parts, positives)


def test_the_denominators_of_radzero():
    """Its recipe, against the published rows (a sentence among all images) and columns (an image's sentence among those of others)."""
    import yaml

    from tasks.demo import recipe_path

    rng = np.random.default_rng(3)
    scores, owner = rng.standard_normal((10, 4)) * 3, np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])  # sentences x images
    rows = [-math.log(math.exp(scores[i, g]) / sum(math.exp(v) for v in scores[i])) for i, g in enumerate(owner)]
    columns = [
        -math.log(math.exp(scores[i, g]) / (math.exp(scores[i, g]) + sum(math.exp(scores[k, g]) for k in range(10) if owner[k] != g)))
        for i, g in enumerate(owner)
    ]
    by_image = np.mean([np.mean([c for c, o in zip(columns, owner, strict=True) if o == g]) for g in range(4)])
    options = yaml.safe_load(recipe_path("radzero.yaml").read_text())["model"]["loss"]["init_args"]
    positives = torch.from_numpy(owner[None] == np.arange(4)[:, None])
    loss = MultiPositiveInfoNCE(**options)({"attention": torch.from_numpy(scores.T.copy())}, positives)["loss"]
    assert loss.item() == pytest.approx((np.mean(rows) + by_image) / 2, rel=1e-9)


def test_the_bias_of_the_sigmoid_loss_is_kept_within_bounds_and_comes_back():
    logits, positives = torch.zeros(2, 2), torch.eye(2, dtype=torch.bool)
    inside, beyond = MultiPositiveSigmoid(bias=-30.0), MultiPositiveSigmoid(bias=-30.0)
    with torch.no_grad():
        beyond.bias.fill_(-100.0)
    values = [loss({"pooled": logits}, positives)["loss"] for loss in (inside, beyond)]
    assert values[0].item() == values[1].item() == pytest.approx(30.0)
    values[1].backward()
    assert beyond.bias.grad.item() == pytest.approx(-1.0)  # one positive an image asks for a higher bias
    with pytest.raises(ValueError, match="bias 11"):
        MultiPositiveSigmoid(bias=11.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu():
    rng = np.random.default_rng(0)
    image, text = (torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((16, 32))).float(), dim=1) for _ in range(2))
    positives = torch.eye(16, dtype=torch.bool)
    values, gradients = [], []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in (image, text)]
        loss = multi_positive_info_nce(*leaves, positives.to(device), 0.07)
        loss.backward()
        values.append(loss.item())
        gradients.append([leaf.grad.cpu() for leaf in leaves])
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for on_cpu, on_cuda in zip(*gradients, strict=True):
        torch.testing.assert_close(on_cpu, on_cuda, rtol=1e-4, atol=1e-6)
    with torch.autocast("cuda", torch.bfloat16):
        half = multi_positive_info_nce(image.cuda(), text.cuda(), positives.cuda(), 0.07)
    assert half.item() == pytest.approx(values[0], rel=2e-2)


def weighted_direction(scores, weights, ignore):
    """L_image with weights and ignored pairs, in plain Python floats; rows without any weight give no term."""
    total, rows = 0.0, 0
    for row, ws, out in zip(scores, weights, ignore, strict=True):
        if sum(ws) == 0:
            continue
        kept = [v for v, o in zip(row, out, strict=True) if not o]
        log_z = max(kept) + math.log(sum(math.exp(v - max(kept)) for v in kept))
        total -= sum(w * (v - log_z) for v, w in zip(row, ws, strict=True) if w) / sum(ws)
        rows += 1
    return total / rows


def weighted_reference(scores, weights, ignore, false_texts):
    """Both directions, ignored rows and columns left out, columns of false texts in the images' denominators alone."""
    rows = [i for i in range(len(scores)) if not ignore[i].all()]
    columns = [j for j in range(scores.shape[1]) if not ignore[:, j].all()]
    s, w, o = (x[np.ix_(rows, columns)] for x in (scores, weights, ignore))
    assert all(w[:, j].any() or false_texts[columns[j]] for j in range(len(columns)))
    return (weighted_direction(s.tolist(), w.tolist(), o.tolist()) + weighted_direction(s.T.tolist(), w.T.tolist(), o.T.tolist())) / 2


@st.composite
def weighted_problems(draw):
    """Logits, weights, ignored pairs and false texts in which every row and every text that is not false has a weight, or is ignored."""
    b, m = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.standard_normal((b, m)) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    false_texts = rng.random(m) < draw(st.floats(0, 0.5))
    false_texts[0] = False
    weights = rng.random((b, m)) * (rng.random((b, m)) < draw(st.floats(0, 0.9)))
    true = np.flatnonzero(~false_texts)
    for i in range(max(b, len(true))):
        weights[i % b, true[i % len(true)]] = rng.uniform(0.1, 1)
    ignore = (rng.random((b, m)) < draw(st.floats(0, 0.8))) & (weights == 0)
    if draw(st.booleans()) and b > 1 and (weights[1:].any(0) | false_texts).all():
        weights[0], ignore[0] = 0, True
    return scores, weights, ignore, false_texts


@settings(deadline=None, max_examples=120)
@given(weighted_problems())
def test_weights_ignored_pairs_and_false_texts_match_the_formula_and_its_differences(problem):
    scores, weights, ignore, false_texts = problem
    leaf = torch.from_numpy(scores).requires_grad_()
    masks = [torch.from_numpy(x) for x in (weights, ignore, false_texts)]
    loss = info_nce_of_logits(leaf, *masks)
    loss.backward()
    assert loss.item() == pytest.approx(weighted_reference(scores, weights, ignore, false_texts), rel=1e-9, abs=1e-12)
    step, numeric = 1e-5, np.zeros_like(scores)
    for at in np.ndindex(*scores.shape):
        moved = [scores.copy(), scores.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        values = [weighted_reference(x, weights, ignore, false_texts) for x in moved]
        numeric[at] = (values[0] - values[1]) / (2 * step)
    np.testing.assert_allclose(leaf.grad.numpy(), numeric, rtol=1e-4, atol=1e-7)
    scaled = info_nce_of_logits(torch.from_numpy(scores), masks[0] * 7, *masks[1:])
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-9)  # shares count, not sizes


@settings(deadline=None, max_examples=40)
@given(problems())
def test_float_weights_of_one_and_nothing_are_bool_positives(problem):
    image, text, positives = problem
    logits = torch.from_numpy(image @ text.T)
    mask = torch.from_numpy(positives)
    assert torch.equal(info_nce_of_logits(logits, mask), info_nce_of_logits(logits, mask.double()))
    none = torch.zeros(positives.shape[1], dtype=torch.bool)
    assert torch.equal(info_nce_of_logits(logits, mask), info_nce_of_logits(logits, mask, torch.zeros_like(mask), none))


def test_a_false_text_pushes_every_image_away_and_is_nobodys_target():
    logits = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    positives = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    false_texts = torch.tensor([False, False, True])
    info_nce_of_logits(logits, positives, None, false_texts).backward()
    assert (logits.grad[:, 2] > 0).all()
    torch.testing.assert_close(logits.grad[:, 2], torch.full((2,), 1 / 3 / 2 / 2, dtype=torch.float64))  # softmax / B / two directions
    with pytest.raises(ValueError, match="1 of 3 texts have no positive image"):
        info_nce_of_logits(logits, positives)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_that_are_none_are_refused(weight):
    weights = torch.eye(3)
    weights[0, 1] = weight
    with pytest.raises(ValueError, match="finite and 0 or more"):
        info_nce_of_logits(torch.zeros(3, 3), weights)


def test_masks_of_another_shape_are_refused():
    logits, eye = torch.zeros(2, 2), torch.eye(2)
    with pytest.raises(ValueError, match=r"false_texts must be bool of shape \(2,\)"):
        info_nce_of_logits(logits, eye, None, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="ignore must be bool"):
        info_nce_of_logits(logits, eye, eye)


def test_a_batch_of_which_nothing_is_left_costs_nothing_and_moves_nothing():
    logits = torch.tensor([[1.0, math.inf], [2.0, 3.0]], requires_grad=True)
    loss = info_nce_of_logits(logits, torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and logits.grad.tolist() == [[0, 0], [0, 0]]
