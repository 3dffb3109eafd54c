"""The pair maker: its pairs, that they do not depend on the batch, and how much work they take."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import make_model
from diffusers import AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor2_0

from ip2p.base.devices import NoiseStream
from ip2p.base.errors import InputError, ModelError
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.editing.editor import Editor
from ip2p.models.text import encode_prompts
from ip2p.settings import EditSettings
from ip2p.synth.pairs import PairMaker, open_painter
from ip2p.synth.records import Candidate, Triple, candidate

STEPS = 3
CAT = Triple(id="1", caption="a cat", instruction="make it night", edited_caption="a cat at night")
DOG = Triple(id="2", caption="a dog", instruction="make it a cat", edited_caption="a cat")
SAME = Triple(id="3", caption="a cat", instruction="nothing", edited_caption="a cat")


def one(
    triple: Triple = CAT, seed: int = 1, p: float = 0.5, scale: float = 3.0, number: int = 0
) -> Candidate:
    return Candidate(triple=triple, number=number, seed=seed, p=p, scale=scale)


def sharp(folder):
    """A random model with uneven attention, so that it matters which map a row uses."""
    bundle = open_painter(folder, device="cpu", dtype="fp32")
    for name, weight in bundle.unet.named_parameters():
        if name.endswith(("to_q.weight", "to_out.0.weight")):
            weight.data *= 8
    return bundle


@pytest.fixture(scope="module")
def bundle(tiny_model_dir):
    return sharp(tiny_model_dir)


@pytest.fixture(scope="module")
def painter_dir(tmp_path_factory: pytest.TempPathFactory):
    """A random Stable Diffusion; its UNet takes only noise."""
    return make_model(tmp_path_factory.mktemp("models") / "painter", in_channels=4)


def maker(bundle, **settings) -> PairMaker:
    return PairMaker(bundle, **({"steps": STEPS, "batch_size": 8} | settings))


def assert_close_pairs(actual, expected, tolerance: float = 1e-4) -> None:
    """Latents and pictures are equal up to rounding."""
    for pair, other in zip(actual, expected, strict=True):
        assert pair.candidate == other.candidate and pair.fate == other.fate == "made"
        torch.testing.assert_close(pair.latents, other.latents, atol=tolerance, rtol=tolerance)
        for name in ("before", "after"):
            levels = np.abs(getattr(pair, name).astype(int) - getattr(other, name).astype(int))
            assert levels.max() <= 1


class ReleasedCode:
    """The released code's loop for one pair, on a diffusers UNet: maps are built and copied."""

    def __init__(self, bundle):
        self.unet, self.share = bundle.unet, False
        self.empty, self.encode = None, lambda texts: encode_prompts(bundle, texts, (64, 64)).hidden
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = torch.cumprod(1 - betas, dim=0).float()
        self.log_sigmas = ((1 - kept) / kept).sqrt().log()

    def attend(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(states)
            for states in (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen))
        )
        sim = torch.einsum("bid,bjd->bij", q, k) * attn.scale
        if self.share and encoder_hidden_states is None:
            parts = sim.chunk(4)
            sim = torch.cat((parts[0], parts[0], parts[2], parts[2]))
        out = torch.einsum("bij,bjd->bid", sim.softmax(dim=-1), v)
        return attn.to_out[0](attn.batch_to_head_dim(out))

    def sigmas(self, steps):
        t = torch.linspace(999, 0, steps)
        low, high, part = t.floor().long(), t.ceil().long(), t.frac()
        levels = (1 - part) * self.log_sigmas[low] + part * self.log_sigmas[high]
        return torch.cat([levels.exp(), torch.zeros(1)])

    def time(self, sigma):
        dists = sigma.log() - self.log_sigmas[:, None]
        low = dists.ge(0).cumsum(dim=0).argmax(dim=0).clamp(max=998)
        part = (self.log_sigmas[low] - sigma.log()) / (self.log_sigmas[low] - self.log_sigmas[low + 1])
        return (1 - part.clamp(0, 1)) * low + part.clamp(0, 1) * (low + 1)

    def denoised(self, x, sigma, scale, cond, uncond):
        x_in, sigma_in = torch.cat([x] * 2), sigma.expand(4)
        channels = x_in / (sigma**2 + 1) ** 0.5
        if self.unet.config.in_channels == 8:
            channels = torch.cat([channels, torch.zeros_like(channels)], dim=1)
        words = torch.cat([uncond, cond])
        noise = self.unet(channels, self.time(sigma_in), encoder_hidden_states=words, return_dict=False)[0]
        neither, full = (x_in - noise * sigma).chunk(2)
        return neither + (full - neither) * scale

    @torch.inference_mode()
    def pair(self, which: Candidate, steps: int):
        class Attend:
            __call__ = staticmethod(self.attend)

        self.unet.set_attn_processor(Attend())
        try:
            cond = self.encode([which.triple.caption, which.triple.edited_caption])
            uncond = self.encode(["", ""])
            sigmas = self.sigmas(steps)
            stream = NoiseStream([which.seed], (4, 16, 16))
            x = (stream() * sigmas[0]).repeat(2, 1, 1, 1)
            for i in range(len(sigmas) - 1):
                self.share = which.p > i / (len(sigmas) - 2)
                here, there = sigmas[i], sigmas[i + 1]
                denoised = self.denoised(x, here, which.scale, cond, uncond)
                up = min(there, (there**2 * (here**2 - there**2) / here**2) ** 0.5)
                down = (there**2 - up**2) ** 0.5
                x = x + (x - denoised) / here * (down - here)
                if there > 0:
                    x = x + stream() * up
            return x
        finally:
            self.unet.set_attn_processor(AttnProcessor2_0())


@pytest.mark.parametrize("p", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("model", ["tiny_model_dir", "painter_dir"])
def test_a_pair_equals_that_of_the_released_code(request, model, p):
    bundle = sharp(request.getfixturevalue(model))
    which = one(p=p)
    expected = ReleasedCode(bundle).pair(which, 5)
    (pair,) = maker(bundle, steps=5)([which])
    torch.testing.assert_close(pair.latents, expected, atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("sampler", "interval"),
    [("euler_ancestral", (0.0, 1.0)), ("dpmpp_2m", (0.0, 1.0)), ("euler_ancestral", (0.4, 1.0))],
)
def test_with_p_zero_both_pictures_equal_the_editors_own_loop(bundle, sampler, interval):
    """Oracle: the editor without an input picture, one text at a time."""
    which = one(DOG, p=0.0)
    (pair,) = maker(bundle, sampler=sampler, cfg_interval=interval)([which])
    editor = Editor(bundle)
    for latents, text in zip(pair.latents, (DOG.caption, DOG.edited_caption), strict=True):
        *_, alone = editor.edit_latents(
            None,
            editor.encode_text(text),
            editor.encode_text(""),
            noise=NoiseStream([which.seed], (4, 16, 16)),
            settings=EditSettings(text_cfg=which.scale, sampler=sampler, cfg_interval=interval),
            sigmas=linspace_sigmas(editor.schedule, STEPS),
        )
        torch.testing.assert_close(latents[None], alone, atol=1e-4, rtol=1e-4)


def test_outside_of_the_guidance_interval_a_step_takes_one_pass_and_still_shares_attention(bundle):
    whole, upper, none = (
        maker(bundle, cfg_interval=ends)([one(p=1.0)])[0]
        for ends in ((0.0, 1.0), (0.6, 1.0), (0.9999, 0.99995))
    )
    assert [pair.evaluations for pair in (whole, upper, none)] == [4 * STEPS, 2 * (STEPS + 1), 2 * STEPS]
    (plain,) = maker(bundle)([one(p=1.0, scale=1.0)])
    torch.testing.assert_close(none.latents, plain.latents, atol=1e-4, rtol=1e-4)
    assert (upper.latents - whole.latents).abs().max() > 1e-2


def test_p_changes_the_edit_and_not_the_source(bundle):
    pairs = maker(bundle)([one(p=p) for p in (0.0, 0.4, 1.0)])
    for k, pair in enumerate(pairs[1:], 1):
        torch.testing.assert_close(pair.latents[0], pairs[0].latents[0])
        assert all((pair.latents[1] - other.latents[1]).abs().max() > 1e-2 for other in pairs[:k])


@pytest.mark.parametrize("attention", ["self", "refine", "replace", "self+refine", "self+replace"])
def test_equal_captions_and_p_one_give_two_equal_pictures(bundle, attention):
    (pair,) = maker(bundle, attention=attention)([one(SAME, p=1.0)])
    torch.testing.assert_close(pair.latents[0], pair.latents[1])
    assert np.array_equal(pair.before, pair.after)


def test_each_attention_setting_gives_a_different_edit(bundle):
    dog = dataclasses.replace(DOG, caption="a dog at night", edited_caption="a cat by night")
    drawn = [
        maker(bundle, attention=way)([one(dog, p=1.0)])[0].latents
        for way in ("self", "refine", "replace", "self+refine", "self+replace")
    ]
    for latents in drawn[1:]:
        torch.testing.assert_close(latents[0], drawn[0][0])
    for k, latents in enumerate(drawn):
        assert all((latents[1] - other[1]).abs().max() > 1e-3 for other in drawn[:k])


def test_replace_falls_back_to_refine_for_captions_with_different_word_counts(bundle):
    results = [maker(bundle, attention=way)([one(CAT, p=0.8)]) for way in ("refine", "replace")]
    assert_close_pairs(*results)


MANY = [candidate(CAT, 0, scale=(2, 4)), candidate(DOG, 0, scale=(2, 4)), one(SAME, seed=7, p=0.0)]


@pytest.mark.parametrize("sampler, attention", [("euler_ancestral", "self"), ("dpmpp_2m", "self+refine")])
def test_results_do_not_depend_on_the_batch(bundle, sampler, attention):
    alone, two, all_ = (
        maker(bundle, steps=3, sampler=sampler, attention=attention, batch_size=size)(MANY)
        for size in (1, 2, 3)
    )
    assert_close_pairs(two, alone)
    assert_close_pairs(all_, alone)
    assert len({pair.latents.sum().item() for pair in alone}) == len(MANY)


def test_results_of_sdxl_and_v_prediction_do_not_depend_on_the_batch(xl_dir, sd2_dir):
    for folder in (xl_dir, sd2_dir):
        model = sharp(folder)
        candidates = [one(CAT), one(DOG, seed=2, p=1.0)]
        results = [maker(model, steps=1, size=64, batch_size=size)(candidates) for size in (1, 2)]
        assert_close_pairs(*results)
        assert results[0][0].before.shape == (64, 64, 3)


class TestSharedSource:
    def test_the_candidates_of_one_source_have_the_same_seed_and_scale(self):
        candidates = [candidate(CAT, number, per_source=3, p=(0.2, 0.4)) for number in range(6)]
        assert [(each.seed, each.scale) for each in candidates[:3]] == [
            (candidates[0].seed, candidates[0].scale)
        ] * 3
        assert candidates[0] == candidate(CAT, 0, p=(0.2, 0.4)) and candidates[3] == candidate(
            CAT, 3, p=(0.2, 0.4)
        )
        assert len({each.p for each in candidates}) == 6 and len({each.id for each in candidates}) == 6
        assert all(0.2 <= each.p < 0.4 for each in candidates)
        assert candidates[4].p == candidate(CAT, 4, p=(0.2, 0.4)).p  # p is not shared
        assert candidate(CAT, 4, per_source=1) == candidate(CAT, 4)

    def test_a_source_is_drawn_once_and_its_pairs_equal_single_ones(self, bundle):
        candidates = [one(CAT, p=p, number=n) for n, p in enumerate((0.2, 0.6, 1.0))]
        drawing = maker(bundle)
        together = drawing(candidates)
        assert drawing.evaluations == 2 * STEPS * (1 + 3)
        assert drawing.decoded == 1 + 3
        assert [each.evaluations for each in together] == [4 * STEPS, 2 * STEPS, 2 * STEPS]
        assert_close_pairs(together, maker(bundle, batch_size=1)(candidates))

    def test_candidates_of_one_source_are_grouped_and_keep_their_order(self, bundle):
        candidates = [one(CAT, number=0), one(DOG), one(SAME, number=1), one(DOG, p=0.9, number=1)]
        drawing = maker(bundle, batch_size=2)
        pairs = drawing(candidates)
        assert [each.candidate for each in pairs] == candidates
        assert drawing.evaluations == 2 * STEPS * (3 + 3)
        assert_close_pairs(pairs, maker(bundle, batch_size=1)(candidates))


class TestRejecting:
    def judge(self, keep, seen):
        def decide(candidates, before, after):
            assert before.shape == after.shape == (len(candidates), 3, 64, 64)
            assert before.min() >= 0 and before.max() <= 1
            seen.append((list(candidates), before, after))
            return [each in keep for each in candidates]

        return decide

    @pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
    def test_early_rejection_saves_work_and_does_not_change_other_pairs(self, bundle, sampler):
        keep = [MANY[0], MANY[2]]
        seen: list = []
        drawing = maker(bundle, sampler=sampler, steps=4, early=self.judge(keep, seen), early_at=0.5)
        pairs = drawing(MANY)
        assert [each.fate for each in pairs] == ["made", "early", "made"]
        assert [each.evaluations for each in pairs] == [16, 8, 16]
        assert drawing.evaluations == sum(each.evaluations for each in pairs)
        assert pairs[1].before is None and pairs[1].latents is None
        assert_close_pairs([pairs[0], pairs[2]], maker(bundle, sampler=sampler, steps=4)(keep))
        assert [len(candidates) for candidates, *_ in seen] == [3]

    def test_a_source_is_drawn_as_long_as_any_of_its_edits(self, bundle):
        candidates = [one(CAT, p=p, number=n) for n, p in enumerate((0.2, 0.6))]
        drawing = maker(bundle, steps=4, early=self.judge(candidates[1:], []), early_at=0.5)
        pairs = drawing(candidates)
        assert [each.evaluations for each in pairs] == [8 + 4, 8]
        assert_close_pairs(pairs[1:], maker(bundle, steps=4)(candidates[1:]))

    def test_rejecting_all_candidates_ends_the_drawing(self, bundle):
        drawing = maker(bundle, early=self.judge([], []), early_at=0.01)
        assert [each.fate for each in drawing(MANY[:2])] == ["early"] * 2
        assert drawing.evaluations == 2 * 2 * 2
        assert drawing.decoded == 4  # for the judge

    def test_the_early_judge_sees_the_predicted_x0(self, bundle):
        """After the first step at p = 0: the first denoised picture, from the editor's own guidance."""
        seen: list = []
        which = one(CAT, p=0.0)
        maker(bundle, early=self.judge([], seen), early_at=0.0)([which])
        editor = Editor(bundle)
        from ip2p.diffusion.guidance import guided

        sigma = linspace_sigmas(editor.schedule, STEPS)[0]
        with torch.inference_mode():
            x0 = guided(
                editor.model,
                text=editor.encode_text(CAT.edited_caption),
                null_text=editor.encode_text(""),
                image=None,
                text_cfg=which.scale,
                image_cfg=1.0,
            )(NoiseStream([1], (4, 16, 16))() * sigma, sigma)
            expected = ((editor.decode(x0) + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(seen[0][2], expected, atol=1e-4, rtol=1e-4)

    def test_the_judge_sees_tiny_autoencoder_previews_and_only_kept_pairs_are_decoded(self, bundle):
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ).eval()
        keep, seen = MANY[1:2], []
        drawing = maker(bundle, steps=2, judge=self.judge(keep, seen), tiny_vae=tiny)
        pairs = drawing(MANY)
        assert [each.fate for each in pairs] == ["judged", "made", "judged"]
        assert (drawing.previewed, drawing.decoded) == (6, 2)
        expected = maker(bundle, steps=2)(keep)
        assert_close_pairs(pairs[1:2], expected)
        with torch.inference_mode():
            shown = (tiny.decode(expected[0].latents).sample.clamp(-1, 1) + 1) / 2
        _, before, after = seen[0]
        torch.testing.assert_close(torch.stack([before[1], after[1]]), shown, atol=1e-4, rtol=1e-4)

    def test_a_tiny_autoencoder_with_other_latents_is_refused(self, bundle):
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
        shapes = "4 latent channels and 2 pixels per cell, the model has 4 and 4"
        with pytest.raises(ModelError, match=shapes):
            maker(bundle, tiny_vae=tiny)

    def test_a_tiny_autoencoder_is_read_from_its_folder(self, bundle, tmp_path):
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
        tiny.save_pretrained(tmp_path)
        opened = maker(bundle, tiny_vae=tmp_path).tiny_vae
        for name, weight in opened.state_dict().items():
            assert torch.equal(weight, tiny.state_dict()[name])

    def test_pictures_that_overflow_are_reported_and_do_not_affect_others(self, bundle):
        candidates = [one(CAT), one(DOG, seed=2, scale=math.inf)]
        pairs = maker(bundle)(candidates)
        assert [each.fate for each in pairs] == ["made", "overflow"]
        assert_close_pairs(pairs[:1], maker(bundle)(candidates[:1]))


def test_a_pair_can_be_converted_to_a_training_row(bundle):
    which = candidate(CAT, 3)
    (pair,) = maker(bundle)([which])
    row = pair.pair(clip_sim_dir=0.25)
    assert (row.id, row.instruction, row.caption) == (which.id, "make it night", "a cat")
    assert row.edited_caption == "a cat at night"
    assert row.before is pair.before and row.before.dtype == np.uint8 and row.before.shape == (64, 64, 3)
    assert row.scores == {
        "seed": which.seed,
        "p2p_threshold": which.p,
        "cfg_scale": which.scale,
        "clip_sim_dir": 0.25,
    }


def test_no_candidates_give_no_pairs(bundle):
    drawing = maker(bundle)
    assert drawing([]) == [] and drawing.evaluations == 0


def test_unsuitable_models_and_settings_are_refused(tmp_path, bundle):
    with pytest.raises(ModelError, match="takes 9 channels; drawing pairs needs a UNet that takes 4"):
        PairMaker(make_model(tmp_path / "nine", in_channels=9), device="cpu")
    for settings, message in (
        ({"steps": 0}, "steps is 0; it must be 1 to 1000"),
        ({"attention": "cross"}, "attention is 'cross'; choose one of"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; choose one of"),
        ({"schedule": "even"}, "schedule is 'even'; choose one of"),
        ({"blend": 1.5}, "blend is 1.5; it must be a number from 0 to 1"),
        ({"reweight": 2.0}, "reweight is for cross-attention; set attention to refine"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1"),
        ({"early_at": 1.5}, "early_at is 1.5; it must be"),
        ({"size": (60, 64)}, "sides must be multiples of"),
    ):
        with pytest.raises(InputError, match=message):
            maker(bundle, **settings)


def test_the_size_defaults_to_the_models_and_can_be_set(tiny_model_dir):
    drawing = PairMaker(tiny_model_dir, device="cpu", dtype="fp32", steps=1)
    assert drawing.size == (64, 64) and drawing.batch_size == 4
    (pair,) = PairMaker(tiny_model_dir, device="cpu", dtype="fp32", steps=1, size=(96, 64))([one()])
    assert pair.before.shape == pair.after.shape == (64, 96, 3)


# --- separate cross-attention share, reweighting, local blend -------------------------------------


def test_self_and_cross_attention_have_separate_shares(bundle):
    way = {"attention": "self+refine"}
    (only_self,) = maker(bundle)([one(p=0.8)])
    (off,) = maker(bundle, **way)([dataclasses.replace(one(p=0.8), p_cross=0.0)])
    assert_close_pairs([dataclasses.replace(off, candidate=only_self.candidate)], [only_self])
    (only_cross,) = maker(bundle, attention="refine")([one(p=0.8)])
    (off,) = maker(bundle, **way)([dataclasses.replace(one(p=0.0), p_cross=0.8)])
    assert_close_pairs([dataclasses.replace(off, candidate=only_cross.candidate)], [only_cross])
    (both,) = maker(bundle, **way)([dataclasses.replace(one(p=0.8), p_cross=0.8)])
    (same,) = maker(bundle, **way)([one(p=0.8)])
    torch.testing.assert_close(both.latents, same.latents)


def test_p_cross_does_not_change_the_other_numbers_of_a_candidate():
    plain, other = candidate(CAT, 3), candidate(CAT, 3, p_cross=(0.4, 0.6))
    assert plain.p_cross is None and 0.4 <= other.p_cross < 0.6
    assert dataclasses.replace(other, p_cross=None) == plain


def test_reweighting_changes_only_the_edit_and_a_weight_of_one_has_no_effect(bundle):
    drawn = [maker(bundle, attention="refine", reweight=w)([one(p=1.0)])[0] for w in (1.0, 4.0)]
    (usual,) = maker(bundle, attention="refine")([one(p=1.0)])
    torch.testing.assert_close(drawn[0].latents, usual.latents)
    torch.testing.assert_close(drawn[1].latents[0], usual.latents[0])
    assert (drawn[1].latents[1] - usual.latents[1]).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_local_blend_changes_only_a_part_of_the_picture(bundle, sampler):
    way = {"attention": "self+refine", "sampler": sampler}
    part = dataclasses.replace(one(p=0.3), triple=dataclasses.replace(CAT, kind="part"))
    (free,) = maker(bundle, **way)([part])
    (blended,) = maker(bundle, blend=0.9, **way)([part])
    torch.testing.assert_close(blended.latents[0], free.latents[0])
    same = (blended.latents[0] == blended.latents[1]).all(dim=0)
    assert 0 < same.float().mean() < 1 and not (free.latents[0] == free.latents[1]).any()
    (all_of_it,) = maker(bundle, blend=0.0, **way)([part])
    torch.testing.assert_close(all_of_it.latents, free.latents)
    # An edit of the whole picture is left alone.
    whole = dataclasses.replace(part, triple=dataclasses.replace(CAT, kind="whole"))
    torch.testing.assert_close(maker(bundle, blend=0.9, **way)([whole])[0].latents, free.latents)


def test_local_blend_does_not_depend_on_the_batch(bundle):
    candidates = [
        dataclasses.replace(each, triple=dataclasses.replace(each.triple, kind="part")) for each in MANY
    ]
    way = {"attention": "refine", "blend": 0.5}
    alone, together = (maker(bundle, batch_size=size, **way)(candidates) for size in (1, 3))
    assert_close_pairs(together, alone)
