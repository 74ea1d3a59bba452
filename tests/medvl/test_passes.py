"""Two-pass encoding against one pass: gradients, random numbers, batch norms, studies of several images, memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from medvl.training.passes import encode_images, encode_texts
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, ReportEncoder, TextFeatures, join_texts

D = 4


class Tower(ImageEncoder):
    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        self.embed_dim, self.seen = D, []
        steps = [nn.Conv2d(1, D, 3), nn.BatchNorm2d(D)] if norm else [nn.Conv2d(1, D, 3)]
        self.layers = nn.Sequential(*steps, nn.GELU(), nn.Dropout(dropout))

    def forward(self, batch):
        self.seen.append(len(batch.pixels))
        made = self.layers(batch.pixels)
        if batch.study is not None:
            count = int(batch.study.max()) + 1
            made = torch.stack([made[batch.study == i].mean(0) for i in range(count)])
        return ImageFeatures(made.mean((2, 3)), made.flatten(2).transpose(1, 2), tuple(made.shape[2:]))


class Words(ReportEncoder):
    def __init__(self):
        super().__init__()
        self.embed_dim, self.table = D, nn.Embedding(26, D)

    def forward(self, batch):
        codes = [torch.tensor([ord(letter) - 97 for letter in text]) for text in batch.texts]
        tokens = nn.utils.rnn.pad_sequence([self.table(one) for one in codes], batch_first=True)
        valid = torch.arange(tokens.shape[1]) < torch.tensor([len(one) for one in codes])[:, None]
        return TextFeatures(tokens.sum(1), tokens, valid, valid.long() - 1)


def gradients(module, features):
    module.zero_grad()
    loss = (features.pooled.tanh() @ features.pooled.T.tanh()).exp().sum() + features.tokens.square().sum()  # of the whole batch
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


def close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("grouped", [False, True])
def test_images(size, grouped):
    tower, pixels = Tower().double(), torch.randn(7, 1, 6, 5, dtype=torch.float64)
    batch = ImageBatch(pixels).grouped([2, 1, 3, 1]) if grouped else ImageBatch(pixels)
    whole, parts = encode_images(tower, batch, None), encode_images(tower, batch, size)
    torch.testing.assert_close(whole.pooled, parts.pooled)
    assert whole.grid == parts.grid and len(parts.pooled) == (4 if grouped else 7)
    close(gradients(tower, whole), gradients(tower, parts))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_texts_of_unequal_length(parts):
    tower, texts = Words().double(), ("abc", "d", "efghi", "zz", "kl")
    whole = encode_texts(tower, texts, 1, torch.device("cpu"))
    found = encode_texts(tower, texts, parts, torch.device("cpu"))
    for name in ("pooled", "tokens", "token_valid", "concepts"):
        torch.testing.assert_close(getattr(whole, name), getattr(found, name))
    close(gradients(tower, whole), gradients(tower, found))


@pytest.mark.parametrize("passes", [0, 2, 3, 5])
def test_a_tower_runs_as_often_as_it_is_told_and_what_is_too_much_counts_nothing(passes):
    """As processes must whose weights are divided: forward and backward alike, whatever their shares."""
    tower, batch = Tower().double(), ImageBatch(torch.randn(5, 1, 6, 5, dtype=torch.float64))
    whole = gradients(tower, encode_images(tower, batch, None))
    tower.seen.clear()
    found = encode_images(tower, batch, 3, passes)
    assert len(tower.seen) == max(2, passes)
    close(whole, gradients(tower, found))
    assert len(tower.seen) == 2 * max(2, passes)
    words, texts, calls = Words().double(), ("abc", "d", "efghi"), []
    words.register_forward_pre_hook(lambda *_: calls.append(1))
    whole = gradients(words, encode_texts(words, texts, 1, torch.device("cpu")))
    calls.clear()
    close(whole, gradients(words, encode_texts(words, texts, 5, torch.device("cpu"))))
    assert len(calls) == 10  # of 5 parts 3 have a text


def test_each_part_is_encoded_twice_and_draws_the_same():
    """With dropout, the gradients of the second pass are those of what the first drew; against a graph kept whole."""
    tower, batch = Tower(dropout=0.5).double(), ImageBatch(torch.randn(6, 1, 5, 5, dtype=torch.float64))
    torch.manual_seed(3)
    kept = [tower(batch.studies(start, start + 2)) for start in (0, 2, 4)]
    whole = ImageFeatures(torch.cat([one.pooled for one in kept]), torch.cat([one.tokens for one in kept]), kept[0].grid)
    expected = gradients(tower, whole)
    tower.seen.clear()
    torch.manual_seed(3)
    found = encode_images(tower, batch, 2)
    torch.rand(5)  # what happens in between does not matter
    torch.testing.assert_close(found.pooled, whole.pooled, rtol=0, atol=0)
    close(gradients(tower, found), expected)
    assert tower.seen == [2] * 6


def test_running_statistics_move_once():
    batch = ImageBatch(torch.randn(6, 1, 5, 5))
    twice, once = Tower(norm=True), Tower(norm=True)
    once.load_state_dict(twice.state_dict())
    gradients(twice, encode_images(twice, batch, 3))
    for start in (0, 3):
        once(batch.studies(start, start + 3))
    for name, buffer in once.named_buffers():
        torch.testing.assert_close(dict(twice.named_buffers())[name], buffer, rtol=0, atol=0)
    assert twice.layers[1].momentum == 0.1


def test_without_gradients_parts_are_encoded_once():
    tower = Tower()
    with torch.no_grad():
        encode_images(tower, ImageBatch(torch.randn(4, 1, 5, 5)), 2)
    assert tower.seen == [2, 2]


def test_no_tensor_of_a_tower_is_larger_than_that_of_a_part():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "conv" in str(func) and isinstance(out, torch.Tensor):
                self.size = max(self.size, len(out))
            return out

    tower, batch = Tower(), ImageBatch(torch.randn(12, 1, 5, 5))
    with Largest() as largest:
        gradients(tower, encode_images(tower, batch, 3))
    assert largest.size == 3


def test_joining_texts_of_towers_without_words():
    parts = [TextFeatures(torch.ones(2, D)), TextFeatures(torch.zeros(1, D))]
    joined = join_texts(parts)
    assert joined.tokens is None and joined.pooled.tolist() == [[1.0] * D, [1.0] * D, [0.0] * D]
    with pytest.raises(ValueError, match="no texts"):
        join_texts([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_random_state_is_restored_and_memory_is_that_of_a_part():
    tower = Tower(dropout=0.5).cuda()
    batch = ImageBatch(torch.randn(512, 1, 64, 64)).to("cuda")
    used = []
    for size in (16, None):
        torch.manual_seed(1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        features = encode_images(tower, batch, size)
        tower.zero_grad()
        features.pooled.square().sum().backward()
        used.append(torch.cuda.max_memory_allocated() - before)
        assert all(p.grad.isfinite().all() for p in tower.parameters())
    assert used[0] < used[1] / 2
    torch.manual_seed(3)
    kept = [tower(batch.studies(start, start + 16)) for start in range(0, 512, 16)]
    expected = gradients(tower, ImageFeatures(torch.cat([one.pooled for one in kept]), torch.cat([one.tokens for one in kept])))
    torch.manual_seed(3)
    found = gradients(tower, encode_images(tower, batch, 16))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
