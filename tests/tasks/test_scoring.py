"""Every preset against its published formula, written out with numpy for one image and one class at a time; and each step by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medvl.nn.similarity import PooledSimilarity
from medvl.types import ImageFeatures, Similarity, TextFeatures
from reports.prompts import kinds_of, load_prompts, roll_up, scheme
from tasks.scoring import Rule, Scorer, preset, preset_names
from tasks.scoring.rules import combined, over_classes, pooled_similarities, with_no_finding
from tasks.scoring.scorer import top_token_cosines

D, TAU = 6, 0.2
PROMPTS = load_prompts("chexpert_14")
PLAIN = ("cardiomegaly", "pleural_effusion", "edema", "no_finding")
NAMES = (
    *("chexzero", "ct_clip", "merlin", "xplainer", "radzero", "carzero", "gloria", "medclip", "cxr_clip", "prior", "unimed_clip"),
    *("conceptclip", "biovil", "open_clip", "colipri", "fvlm"),
)


class Fixed(Similarity):
    """Logits that are made of the pooled vectors in a way of its own, as a cross-attention scorer's might be."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Identity()

    def parts(self, images, texts):
        return {"only": (images.pooled @ texts.pooled.T).sin() * 3}

    def maps(self, images, texts):
        raise NotImplementedError


class Model:
    """Texts have embeddings and words of their own, drawn once."""

    def __init__(self, seed, own=False):
        self.similarity = Fixed() if own else PooledSimilarity(TAU).double()
        self.rng = torch.Generator().manual_seed(seed)
        self.known = {}

    def vectors(self, text):
        if text not in self.known:
            self.known[text] = torch.randn(4, D, generator=self.rng, dtype=torch.float64)
        return self.known[text]

    def encode_text(self, texts):
        all_of = torch.stack([self.vectors(text) for text in texts])
        valid = torch.tensor([[True, True, i % 2 == 0] for i in range(len(texts))])
        return TextFeatures(all_of[:, 0] * 3, all_of[:, 1:], valid)


def images(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    made = torch.randn(count, 6, D, generator=rng, dtype=torch.float64)
    return ImageFeatures(made[:, 0], made[:, 1:], (5, 1))


def unit(v):
    return v / np.linalg.norm(v)


def softmax(values):
    e = np.exp(np.array(values) - max(values))
    return e / e.sum()


def published(name, model, scorer, found):
    """(N, F): the formulas of the table, for studies of one image each; ``found`` are the features of the N images."""
    e = {text: model.vectors(text)[0].numpy() * 3 for text in scorer.texts}
    words = {text: scorer.features.tokens[j][scorer.features.token_valid[j]].numpy() for j, text in enumerate(scorer.texts)}
    rule, n = scheme(scorer.rule.prompts), len(found.pooled)
    classes = rule.prompts(PROMPTS, scorer.findings)
    v = [unit(one) for one in found.pooled.numpy()]
    patches = [[unit(one) for one in tokens] for tokens in found.tokens.numpy()]

    def s(i, text):
        return v[i] @ unit(e[text])

    def model_logit(i, text):
        if isinstance(model.similarity, Fixed):
            return 3 * np.sin(found.pooled[i].numpy() @ e[text])
        return s(i, text) / TAU

    def mean_norm(texts):
        return unit(np.mean([unit(e[text]) for text in texts], 0))

    def one(i, group):
        plus, minus = group.positive, group.negative
        if name == "chexzero":
            a, b = v[i] @ mean_norm(plus), v[i] @ mean_norm(minus)
            return np.exp(a) / (np.exp(a) + np.exp(b))
        if name in ("ct_clip", "colipri", "fvlm"):
            return softmax([s(i, plus[0]) / TAU, s(i, minus[0]) / TAU])[0]
        if name == "merlin":
            return np.mean([s(i, t) for t in plus]) - np.mean([s(i, t) for t in minus])
        if name == "xplainer":
            return softmax([s(i, plus[0]) / 0.5, s(i, minus[0]) / 0.5])[0]
        if name == "radzero":
            return 1 / (1 + np.exp(-model_logit(i, plus[0])))
        if name in ("carzero", "prior"):
            return np.mean([model_logit(i, t) for t in plus])
        if name == "gloria":
            return max(model_logit(i, t) for t in plus)
        if name == "medclip":
            return np.mean([s(i, t) / TAU for t in plus])
        if name == "cxr_clip":
            return softmax([s(i, minus[0]), s(i, plus[0])])[1]
        if name == "unimed_clip":
            return v[i] @ mean_norm(plus) - v[i] @ mean_norm(minus)
        if name == "biovil":
            return v[i] @ unit(np.mean([e[t] for t in plus], 0)) - v[i] @ unit(np.mean([e[t] for t in minus], 0))
        if name == "open_clip":
            return 100 * v[i] @ mean_norm(plus)
        raise AssertionError(name)

    if name == "conceptclip":
        glob, local = np.zeros((2, n, len(classes)))
        for i in range(n):
            for f, c in enumerate(classes):
                (text,) = c.groups[0].positive
                cosines = sorted((p @ unit(w) for p in patches[i] for w in words[text]), reverse=True)
                glob[i, f], local[i, f] = s(i, text) / TAU, np.mean(cosines[:128]) / TAU
        return np.array([0.5 * softmax(glob[i]) + 0.5 * softmax(local[i]) for i in range(n)])
    if name == "xplainer":
        table = np.array(
            [[np.exp(np.mean([np.log(one(i, g)) for g in c.groups])) if c.groups else np.nan for c in classes] for i in range(n)]
        )
        normal = [c.finding == "no_finding" for c in classes]
        table[:, normal] = (1 - np.nanmax(table, 1))[:, None]
        return table
    table = np.array([[one(i, c.groups[0]) for c in classes] for i in range(n)])
    if name == "gloria":
        return (table - table.mean(0)) / table.std(0)
    if name in ("medclip", "prior", "open_clip"):
        return np.array([softmax(row) for row in table])
    return table


def findings_of(name):
    return PLAIN if scheme(preset(name).prompts).over not in ("expansion",) else PLAIN[:3]


@pytest.mark.parametrize(
    ("name", "own"), [(name, own) for name in NAMES for own in (False, True) if not own or preset(name).similarity == {"model": 1.0}]
)
def test_a_preset_is_its_published_formula(name, own):
    """With ``own`` a similarity that is no cosine, where a rule takes the model's."""
    rule = preset(name)
    for seed in range(3):
        model, found = Model(seed, own), images(5, seed)
        scorer = Scorer.of(model, rule, PROMPTS, findings_of(name))
        groups = scorer.group_scores(model, found)
        studies = torch.stack([scorer.study_scores(one[None]) for one in groups])
        np.testing.assert_allclose(scorer.scores(studies).numpy(), published(name, model, scorer, found), rtol=1e-6, atol=1e-9)
        if not rule.depends_on_run:  # study by study is the same
            alone = torch.cat([scorer.scores(one[None]) for one in studies])
            torch.testing.assert_close(alone, scorer.scores(studies), rtol=1e-12, atol=0)
        if rule.in_unit_interval:
            assert ((scorer.scores(studies) >= 0) & (scorer.scores(studies) <= 1)).all()


def test_the_presets_are_those_of_the_table_and_ours():
    assert set(preset_names()) == {*NAMES, "medvl", "chils"}
    assert [name for name in preset_names() if preset(name).depends_on_run] == ["gloria"]
    for name in preset_names():
        assert preset(name).source and preset(name).prompts
    with pytest.raises(KeyError, match="known are medvl, chexzero"):
        preset("chexone")


def test_views_of_a_study_are_joined_in_each_group():
    """Xplainer: the mean of p_d over views, then the geometric mean over descriptors."""
    model, found = Model(0), images(3)
    scorer = Scorer.of(model, preset("xplainer"), PROMPTS, ("cardiomegaly", "edema"))
    groups = scorer.group_scores(model, found)
    expected = []
    for f in range(2):
        own = [g for g, one in enumerate(scorer.groups) if one.finding == f]
        expected.append(np.exp(np.mean([np.log(np.mean(groups[:, 0, g].numpy())) for g in own])))
    np.testing.assert_allclose(scorer.study_scores(groups)[0].numpy(), expected, rtol=1e-12)
    named = list(scorer.signs(groups))
    assert len(named) == len(scorer.groups) and named[0][0].about == PROMPTS.descriptors("cardiomegaly")[0].descriptor
    assert named[0][1] == pytest.approx(groups[:, 0, 0].mean().item())


def test_ours_is_the_score_of_diagnosis():
    from tasks.zero_shot import PromptBank, score

    model, found = Model(1), images(4)
    scorer = Scorer.of(model, preset("medvl"), PROMPTS, PLAIN)
    sides = torch.zeros(2, len(PLAIN), len(scorer.texts), dtype=torch.float64)
    for one in scorer.groups:
        for side, texts in zip(sides, (one.positive, one.negative), strict=True):
            side[one.finding, list(texts)] = 1 / len(texts)
    bank = PromptBank(PLAIN, scorer.features, *sides)
    studies = torch.stack([scorer.study_scores(one[None]) for one in scorer.group_scores(model, found)])
    torch.testing.assert_close(scorer.scores(studies), score(model, found, bank), rtol=1e-9, atol=0)


def test_the_best_pairs_of_tokens_are_averaged():
    """Fewer than there are, and words of no concept left out."""
    found, texts = images(2), Model(3).encode_text(["a", "b"])
    texts = TextFeatures(texts.pooled, texts.tokens, texts.token_valid, torch.tensor([[-1, 0, 0], [-1, -1, -1]]))
    found = found.replace(token_valid=torch.tensor([[True] * 5, [True, True, False, False, False]]))
    made = top_token_cosines(found, texts, 3)
    for i, j in np.ndindex(2, 2):
        words = [k for k in range(3) if texts.token_valid[j, k] and (j == 1 or texts.concepts[j, k] >= 0)]
        patches = [n for n in range(5) if found.token_valid[i, n]]
        cosines = sorted(
            (unit(found.tokens[i, n].numpy()) @ unit(texts.tokens[j, k].numpy()) for n in patches for k in words), reverse=True
        )
        assert made[i, j].item() == pytest.approx(np.mean(cosines[:3]))


def test_what_a_rule_cannot_have_is_refused():
    model = Model(0)
    for wrong, said in (
        ({"pool": "median"}, "pool is 'median'"),
        ({"similarity": {"cosine": 1.0}}, "expected weights of model"),
        ({"pool": "embedding_norm"}, "of pooled vectors"),
        ({"contrast": "none", "no_finding": "one_minus_max"}, "one_minus_max needs scores"),
        ({"contrast": "difference", "combine": "geometric"}, "combine geometric"),
        ({"temperature": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Rule("mine", "pair", **wrong)
    with pytest.raises(ValueError, match="none against cardiomegaly"):
        Scorer.of(model, Rule("mine", "radzero"), PROMPTS, ["cardiomegaly"])
    with pytest.raises(ValueError, match="no prompts for no_finding"):
        Scorer.of(model, preset("gloria"), PROMPTS, PLAIN)
    scorer = Scorer.of(Model(0, own=True), preset("ct_clip"), PROMPTS, ["edema"])
    bare = Model(0, own=True)
    bare.similarity.temperature = None
    with pytest.raises(ValueError, match="takes the model's temperature, and Fixed has none"):
        scorer.group_scores(bare, images(1))


def test_the_hash_says_what_a_score_depends_on():
    model = Model(0)
    of = {name: Scorer.of(model, preset(name), PROMPTS, ["edema", "cardiomegaly"]) for name in ("chexzero", "ct_clip")}
    assert len({one.preset_sha256 for one in of.values()}) == 2
    assert Scorer.of(Model(9), preset("chexzero"), PROMPTS, ["edema", "cardiomegaly"]).preset_sha256 == of["chexzero"].preset_sha256
    assert Scorer.of(model, preset("chexzero"), PROMPTS, ["edema"]).preset_sha256 != of["chexzero"].preset_sha256
    found = of["chexzero"].provenance()
    assert found["calibrated"] is False and found["preset"] == "chexzero" and found["prompts_sha256"] == PROMPTS.sha256


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 8), st.randoms(use_true_random=False))
def test_poolings_of_similarities(b, p, k, random):
    values = torch.tensor([[random.uniform(-1, 1) for _ in range(p)] for _ in range(b)], dtype=torch.float64)
    side = sorted(random.sample(range(p), random.randint(1, p)))
    columns = values[:, side].numpy()
    np.testing.assert_allclose(pooled_similarities(values, [side], "mean")[:, 0], columns.mean(1))
    np.testing.assert_allclose(pooled_similarities(values, [side], "max")[:, 0], columns.max(1))
    np.testing.assert_allclose(pooled_similarities(values, [side], "top_k", k)[:, 0], np.sort(columns, 1)[:, ::-1][:, :k].mean(1))


def test_classes_without_a_score_and_studies_that_are_alike():
    scores = torch.tensor([[0.2, 0.9, torch.nan], [0.2, 0.1, torch.nan]], dtype=torch.float64)
    shared = over_classes(scores, "softmax")
    np.testing.assert_allclose(shared[:, :2].sum(1), 1)
    assert shared[:, 2].isnan().all()
    z = over_classes(scores[:, :2], "zscore")
    np.testing.assert_allclose(z, [[0, 1], [0, -1]])
    found = with_no_finding(torch.tensor([[0.2, 0.7, torch.nan]]), [False, False, True], "one_minus_max")
    np.testing.assert_allclose(found, [[0.2, 0.7, 0.3]], rtol=1e-6)
    assert combined(torch.rand(2, 3), [[0, 1], []], "mean")[:, 1].isnan().all()


def test_roll_up_is_the_label_times_its_likeliest_kind():
    """CHiLS for findings of which several can be true, in plain numbers, and against the function of the prompts' own hierarchy."""
    names = ("lung_opacity", "pleural_effusion", "consolidation", "fracture", "pneumothorax")
    prompts = load_prompts("chest_xray")
    model, found = Model(8), images(4, 9)
    scorer = Scorer.of(model, preset("chils"), prompts, names)
    got = scorer.scores(torch.stack([scorer.study_scores(one[None]) for one in scorer.group_scores(model, found)])).numpy()

    def score(i, finding):
        v, pair = unit(found.pooled[i].numpy()), prompts.findings[finding]
        sides = [np.mean([v @ unit(model.vectors(t)[0].numpy() * 3) / TAU for t in texts]) for texts in (pair.positive, pair.negative)]
        return 1 / (1 + np.exp(sides[1] - sides[0]))

    kinds, mask = kinds_of(prompts, names)
    assert mask.sum() > len(names) and "hydropneumothorax" in kinds, "a kind of two labels, and labels with several kinds"
    for i in range(4):
        own, of_kinds = np.array([score(i, name) for name in names]), np.array([score(i, kind) for kind in kinds])
        by_hand = [own[f] * max([own[f], *(of_kinds[k] for k in range(len(kinds)) if mask[f, k])]) for f in range(len(names))]
        np.testing.assert_allclose(got[i], by_hand, atol=1e-6)
        np.testing.assert_allclose(got[i], roll_up(own, of_kinds, mask), atol=1e-6)


@pytest.mark.parametrize("name", ["chexzero", "xplainer", "radzero", "medclip", "chils"])
def test_a_slice_is_scored_as_if_it_were_the_study(name):
    model, pixels = Model(3), torch.Generator().manual_seed(4)
    slices = torch.randn(2, 3, D, generator=pixels, dtype=torch.float64)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    volumes = ImageFeatures(slices.mean(1), slices=slices, slice_valid=valid)
    scorer = Scorer.of(model, preset(name), PROMPTS, ("cardiomegaly", "pleural_effusion", "edema"))
    got = scorer.slice_scores(model, volumes)
    assert got.shape == (2, 3, 3)
    for b in range(2):
        for s in range(3):
            if not valid[b, s]:
                assert got[b, :, s].isnan().all()
                continue
            alone = scorer.group_scores(model, ImageFeatures(slices[b, s][None]))
            np.testing.assert_allclose(got[b, :, s], scorer.scores(scorer.study_scores(alone)[None])[0], atol=1e-9)
    with pytest.raises(ValueError, match="against each other"):
        Scorer.of(model, preset("gloria"), PROMPTS, ("edema",)).slice_scores(model, volumes)
