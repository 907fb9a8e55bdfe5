"""The models: what they must not hold, the scoring against its definition, the text encoder against open_clip's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import random_tensor, tiny_config, write_tiny
from torch import Tensor, nn

from lseg import checkpoint
from lseg.model import LSegConfig, LSegImageEncoder
from lseg.similarity import Similarity
from lseg.text import CLIPTextEncoder, TextConfig
from lseg.tokenizer import Tokenizer


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def unit(x: Tensor, dim: int = 1) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True)


@pytest.fixture
def encoder(tmp_path, seed) -> LSegImageEncoder:
    return checkpoint.load_image_encoder(write_tiny(tmp_path / "tiny.safetensors", seed))


def images(seed: int, batch: int = 2) -> Tensor:
    return torch.empty(batch, 3, 64, 64).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))


class TestImageEncoder:
    def test_nothing_without_effect_is_there(self):
        with torch.device("meta"):
            model = LSegImageEncoder()
        assert isinstance(model.vit.norm, nn.Identity) and isinstance(model.vit.head, nn.Identity)
        assert isinstance(model.vit.fc_norm, nn.Identity) and isinstance(model.vit.norm_pre, nn.Identity)
        assert [fusion.skip_unit is None for fusion in model.fusion] == [False, False, False, True]
        assert len(model.vit.blocks) == 1 + max(model.config.taps)  # no block runs behind the last one that is read
        names = [name for name, _ in model.named_modules()]
        assert not any("clip" in name for name in names)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_every_parameter_has_an_effect(self, encoder, seed):
        encoder.requires_grad_(True)
        direction = torch.randn(2, 24, 32, 32, generator=torch.Generator().manual_seed(seed))
        (encoder(images(seed)) * direction).sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

    def test_unit_length_and_type(self, encoder, seed):
        with torch.no_grad():
            embeddings = encoder(images(seed, 3))
        assert embeddings.shape == (3, 24, 32, 32) and embeddings.dtype == torch.float32
        assert (embeddings.double().norm(dim=1) - 1).abs().max() < 1e-6

    def test_an_image_does_not_depend_on_its_batch(self, encoder, seed):
        """So batch normalisation uses what the checkpoint holds, not the batch's own mean."""
        batch = images(seed, 3)
        with torch.no_grad():
            together, alone = encoder(batch), torch.cat([encoder(image[None]) for image in batch])
            assert relative(together, alone) < 1e-6
            encoder.train()  # the comparison would notice
            assert relative(encoder(batch), alone) > 1e-2

    def test_scores_equal_the_embeddings_dot_products(self, encoder, seed):
        """Exact but for the triangular factor, which is computed in float32."""
        encoder.double()
        generator = torch.Generator().manual_seed(seed)
        text = unit(torch.randn(5, 24, dtype=torch.float64, generator=generator))
        x = images(seed).double()
        with torch.no_grad():
            scores = encoder.scores(encoder.decode(encoder.taps(x)), text)
            expected = torch.einsum("nd,bdhw->bnhw", text, encoder(x))
        print(f"relative difference {relative(scores, expected):.1e}")
        assert scores.shape == (2, 5, 32, 32)
        assert relative(scores, expected) < 1e-6

    def test_scores_pass_gradients(self, encoder, seed):
        """The same gradient of the head through both ways of scoring: training uses the cheaper one."""
        encoder.requires_grad_(True)
        text = unit(torch.randn(3, 24, generator=torch.Generator().manual_seed(seed)))
        gradients = []
        for scores in (
            encoder.scores(encoder.decode(encoder.taps(images(seed))), text),
            torch.einsum("nd,bdhw->bnhw", text, encoder(images(seed))),
        ):
            encoder.zero_grad()
            scores[:, 0].square().mean().backward()
            gradients.append(torch.cat([encoder.head.weight.grad.flatten(), encoder.vit.pos_embed.grad.flatten()]))
        assert relative(*gradients) < 1e-4

    def test_config_round_trip(self):
        config = tiny_config()[0]
        assert LSegConfig.from_dict(config.to_dict()) == config
        assert LSegConfig.from_dict({**config.to_dict(), "taps": [0, 2, 3, 5]}) == config  # as JSON gives it
        assert (LSegConfig().grid, config.grid) == (30, 4)
        with pytest.raises(ValueError, match="unknown size.s. in the model's config: dept, hight"):
            LSegConfig.from_dict({"hight": 3, "dept": 2, "width": 5})


def align_corners(size: int) -> np.ndarray:
    """The matrix [2 * size, size] that doubles an axis linearly, its first and last points kept, in float64."""
    at = np.arange(2 * size) * (size - 1) / (2 * size - 1)
    return np.clip(1 - np.abs(at[:, None] - np.arange(size)), 0, None)


def score_as_the_official_code(embeddings: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Upsamples all D channels of [B, D, h, w] and takes the dot products then: scores [B, N, 2h, 2w] in float64."""
    rows, columns = (align_corners(size) for size in embeddings.shape[2:])
    large = np.einsum("yi,xj,bdij->bdyx", rows, columns, embeddings.astype(np.float64))
    return np.einsum("nd,bdyx->bnyx", text.astype(np.float64), large)


class TestSimilarity:
    @pytest.mark.parametrize("shape", [(2, 5, 7), (1, 8, 8), (3, 1, 6)], ids=str)
    @pytest.mark.parametrize("count", [1, 2, 9])
    def test_against_the_definition(self, shape, count, seed):
        batch, height, width = shape
        rng = np.random.default_rng(seed)
        embeddings = rng.standard_normal((batch, 16, height, width))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        text = rng.standard_normal((count, 16))
        text /= np.linalg.norm(text, axis=1, keepdims=True)
        expected = score_as_the_official_code(embeddings, text)

        labels, best, scores = Similarity()(torch.from_numpy(embeddings), torch.from_numpy(text))
        assert (labels.dtype, best.dtype, scores.dtype) == (torch.int32, torch.float64, torch.float64)
        np.testing.assert_allclose(scores, expected, atol=1e-13)
        np.testing.assert_allclose(best, expected.max(axis=1), atol=1e-13)
        np.testing.assert_array_equal(labels, expected.argmax(axis=1))

        single = Similarity()(torch.from_numpy(embeddings).float(), torch.from_numpy(text).float())
        assert [x.dtype for x in single] == [torch.int32, torch.float32, torch.float32]
        np.testing.assert_allclose(single[2], expected, atol=3e-6)
        chosen = np.take_along_axis(expected, single[0].numpy()[:, None].astype(int), axis=1)[:, 0]
        assert (expected.max(axis=1) - chosen).max() < 6e-6  # another label only where both are as near

    def test_of_equal_scores_the_first_wins(self, seed):
        embeddings = unit(torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(seed)))
        text = torch.ones(3, 8) / 8**0.5
        assert Similarity()(embeddings, text)[0].unique().tolist() == [0]


def text_tower(width: int, layers: int, heads: int, embedding: int, quick: bool = True) -> nn.Module:
    """open_clip's CLIP with a text tower of these sizes and next to no image tower."""
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers}
    return open_clip.CLIP(embed_dim=embedding, vision_cfg=vision, text_cfg=text, quick_gelu=quick)


class TestTextEncoder:
    TEXTS = ("dog", "", "a photo of a traffic light", "car " * 75)

    @pytest.mark.parametrize("sizes", [(64, 3, 4, 40), (512, 12, 8, 512)], ids=["small", "ViT-B/32"])
    def test_equals_open_clip(self, sizes, seed):
        import open_clip

        width, layers, heads, embedding = sizes
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):
            reference, gelu = (text_tower(*sizes, quick) for quick in (True, False))
        state = {
            name: random_tensor(name, tuple(tensor.shape), generator).double()
            for name, tensor in reference.state_dict().items()
            if not name.startswith("visual.")
        }
        mine = CLIPTextEncoder(TextConfig(width=width, layers=layers, heads=heads, embedding=embedding)).double()
        mine.load_state_dict({name: tensor for name, tensor in state.items() if name != "logit_scale"})
        mask = torch.full((77, 77), float("-inf")).triu(1)
        for model in (reference, gelu):
            model.load_state_dict(state, assign=True, strict=False)
            model.attn_mask = mask.double()

        tokens = open_clip.tokenize(list(self.TEXTS))
        np.testing.assert_array_equal(tokens, Tokenizer()(self.TEXTS))
        with torch.no_grad():
            expected = unit(reference.encode_text(tokens))
            found = mine.eval()(tokens)
            other = unit(gelu.encode_text(tokens))
        print(
            f"relative difference {relative(found, expected):.1e}; with the exact GELU {relative(other, expected):.1e}"
        )
        assert found.shape == (4, embedding) and found.dtype == torch.float64
        assert relative(found, expected) < 1e-10
        assert relative(other, expected) > 1e-5  # the comparison tells the two apart

    def test_unit_length_and_token_types(self, tmp_path, seed):
        encoder = checkpoint.load_text_encoder(write_tiny(tmp_path / "tiny.safetensors", seed))
        tokens = torch.from_numpy(Tokenizer()(self.TEXTS))
        assert tokens.dtype == torch.int32
        vectors = encoder(tokens)
        assert vectors.shape == (4, 24) and vectors.dtype == torch.float32
        assert (vectors.double().norm(dim=1) - 1).abs().max() < 1e-6
        assert torch.equal(vectors, encoder(tokens.long()))

    def test_what_follows_the_end_token_does_not_matter(self, tmp_path, seed):
        encoder = checkpoint.load_text_encoder(write_tiny(tmp_path / "tiny.safetensors", seed))
        tokens = torch.from_numpy(Tokenizer()(["dog", "a traffic light"]))
        changed = torch.where(tokens == 0, 320, tokens)
        assert not torch.equal(tokens, changed)
        assert relative(encoder(changed), encoder(tokens)) < 1e-6
        assert relative(encoder(tokens[:1]), encoder(tokens)[:1]) < 1e-6

    def test_config_round_trip(self):
        config = tiny_config()[1]
        assert TextConfig.from_dict(config.to_dict()) == config
        with pytest.raises(ValueError, match="unknown size.s. in the text encoder's config: with"):
            TextConfig.from_dict({"with": 512})
