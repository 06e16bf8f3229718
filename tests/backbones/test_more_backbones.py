"""What the contract does not say of single classes: exact positions at every scale, refusals."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from tests.backbones import tiny
from tests.backbones.tiny import CASES

from ditdial import FULL, FlexiDiT, Mode, Schedule, elastify
from ditdial.ops.patching import group_means, ungroup
from ditdial.ops.positions import group_centres, real_rotary_centres

TIME = 700.0


def elastic(name, **method):
    """A tiny model of a case, made elastic."""
    case = CASES[name]
    return elastify(case.model(), FlexiDiT(**{"rank": 3, "scales": case.scales, **method}))


@torch.no_grad()
def output(model, call):
    return model(**call).sample


def returned(handle, module, call, mode):
    """What a submodule returned in a mode."""
    outputs = []
    hook = handle.model.get_submodule(module).register_forward_hook(
        lambda _module, _args, result: outputs.append(result)
    )
    with handle.using(mode):
        output(handle.model, call)
    hook.remove()
    return outputs[0]


@pytest.mark.parametrize("scale", [(1, 1, 1), (1, 2, 2), (2, 3, 4), (1, 5, 6)])
def test_real_rotary_centres_are_phases_of_the_centres_beyond_a_ragged_border_too(scale):
    grid, dims = (3, 7, 10), (4, 6, 6)

    def table(axes):
        places = torch.meshgrid(*axes, indexing="ij")
        facts = {"use_real": True, "freqs_dtype": torch.float64}
        parts = [
            get_1d_rotary_pos_embed(d, place.reshape(-1), 256.0, **facts)
            for d, place in zip(dims, places)
        ]
        return [torch.cat(halves, dim=1).float() for halves in zip(*parts)]

    cos, sin = table([torch.arange(n, dtype=torch.float64) for n in grid])
    expected = table([group_centres(n, k) for n, k in zip(grid, scale)])
    for found, right in zip(real_rotary_centres(cos, sin, grid, scale), expected):
        torch.testing.assert_close(found, right, atol=3e-6, rtol=0)


class TestLTX:
    def test_positions_are_centres_in_seconds_and_pixels(self):
        handle, grid = elastic("ltx"), (4, 8, 6)
        call = tiny.ltx_call(1, grid, TIME)
        axes = [group_centres(n, 2).float() * unit for n, unit in zip(grid, (8 / 25, 32, 32))]
        centres = torch.cartesian_prod(*axes).T[None]
        right = CASES["ltx"].model().rope(call["hidden_states"], video_coords=centres)
        found = returned(handle, "rope", call, Mode((2, 2, 2)))
        torch.testing.assert_close(found, right)

    def test_the_grid_is_read_from_coordinates(self):
        handle = elastic("ltx")
        call = tiny.ltx_coordinates_call(2, (3, 7, 6), TIME)
        bare = without_sides(call)
        for other in (bare, bare | {"num_frames": 1, "height": 1, "width": 1}):
            assert handle.backbone.grid(handle.model, other) == (3, 7, 6)
            for mode in (FULL, *handle.modes):
                if mode != Mode(4):  # has its own rows beyond the border
                    with handle.using(mode):
                        assert torch.equal(output(handle.model, other), output(handle.model, call))

    def test_given_frames_beside_the_grid_are_not_joined_with_others(self):
        handle = elastic("ltx", scales=(2, (2, 1, 1)))
        call = tiny.ltx_coordinates_call(2, (3, 7, 6), TIME)
        latent, places, times = (call[k] for k in ("hidden_states", "video_coords", "timestep"))
        frame = slice(42, 84)
        more = without_sides(call) | {
            "hidden_states": torch.cat([latent, latent[:, frame]], dim=1),
            "video_coords": torch.cat([places, places[:, :, frame]], dim=2),
            "timestep": torch.cat([times, times[:, frame]], dim=1),
        }
        assert handle.backbone.size(handle.model, more) == ((4, 7, 6), 6, True)
        with handle.using(Mode(2)):
            made = output(handle.model, more)
        # To the frame that is there twice the same happens twice.
        torch.testing.assert_close(made[:, 126:], made[:, frame])
        refusal = pytest.raises(
            ValueError, match=r"video_coords .*'patch2x1x1' joins frames; legal"
        )
        with handle.using(Mode((2, 1, 1))), refusal:
            output(handle.model, more)

    def test_part_of_a_frame_beside_the_grid_runs_in_full_mode_only(self):
        handle, stock = elastic("ltx"), CASES["ltx"].model()
        call = tiny.ltx_coordinates_call(2, (3, 7, 6), TIME)
        latent, places, times = (call[k] for k in ("hidden_states", "video_coords", "timestep"))
        frame = slice(0, 30)
        more = without_sides(call) | {
            "hidden_states": torch.cat([latent[:, frame], latent], dim=1),
            "video_coords": torch.cat([places[:, :, frame], places], dim=2),
            "timestep": torch.cat([times[:, frame], times], dim=1),
        }
        with handle.using(FULL):
            assert torch.equal(output(handle.model, more), output(stock, more))
        refusal = pytest.raises(ValueError, match=r"video_coords name 156 .*legal: full mode")
        with handle.using(Mode(2)), refusal:
            output(handle.model, more)

    def test_one_time_may_be_given_with_or_without_a_token_axis(self):
        handle = elastic("ltx")
        call = tiny.ltx_coordinates_call(2, (3, 7, 6), TIME)
        column = call | {"timestep": torch.full((2, 1), TIME)}
        with handle.using(Mode(2)):
            flat = output(handle.model, call | {"timestep": torch.full((2,), TIME)})
            assert torch.equal(output(handle.model, column), flat)
        assert handle.backbone.times.levels(column) == (0.7, 0.7)
        assert handle.backbone.times.levels(call) == (0.7, 0.7)

    def test_times_of_tokens_may_have_an_axis_of_their_own(self):
        """The long multi-prompt pipeline: times ``(B, N, 1)``, sides of 1, coordinates once."""
        handle, stock = elastic("ltx"), CASES["ltx"].model()
        call = tiny.ltx_coordinates_call(2, (3, 7, 6), TIME)
        other = call | {
            "timestep": call["timestep"][..., None],
            "video_coords": call["video_coords"][:1],
            **{"num_frames": 1, "height": 1, "width": 1},
        }
        size = handle.backbone.size(handle.model, other)
        assert size == handle.backbone.size(handle.model, call) == ((3, 7, 6), 6, True)
        assert handle.backbone.times.levels(other) == (0.7, 0.7)
        with handle.using(FULL):
            assert torch.equal(output(handle.model, other), output(stock, other))
        for mode in handle.modes[1:]:
            with handle.using(mode):
                found = output(handle.model, other)
                assert torch.equal(found, output(handle.model, call)), mode
                flat = output(handle.model, call | {"timestep": torch.full((2,), TIME)})
            # The first frame has no noise, unless it shares its tokens with the second.
            joined = mode.patch_scale[0] > 1
            assert torch.allclose(found, flat, atol=1e-4) == joined, mode

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
    def test_other_numbers_of_times_are_refused(self, shape):
        handle = elastic("ltx")
        call = tiny.ltx_call(2, (3, 7, 6), TIME) | {"timestep": torch.full(shape, TIME)}
        refusal = pytest.raises(ValueError, match=r"timestep has 3 times .*legal .* 1, or 126")
        with handle.using(Mode(2)), refusal:
            output(handle.model, call)


def without_sides(call):
    return {key: x for key, x in call.items() if key not in ("num_frames", "height", "width")}


class TestCogVideoX:
    def test_sine_cosine_positions_are_those_of_the_centres(self):
        handle, grid = elastic("cogvideox-2b"), (4, 8, 8)
        module, forward = handle.model.patch_embed, handle._engine.wiring.state
        forward.grid = grid
        stored = module.pos_embedding[:, module.max_text_seq_length :].float()
        torch.testing.assert_close(handle.backbone.positions(module, forward, FULL), stored)
        coarse = handle.backbone.positions(module, forward, Mode((1, 3, 3)))
        middle = stored.unflatten(1, grid)[:, :, 1::3, 1::3][:, :, :2, :2]
        torch.testing.assert_close(coarse.unflatten(1, (4, 3, 3))[:, :, :2, :2], middle)

    def test_learned_positions_have_one_size(self):
        handle = elastic("cogvideox-5b-image")
        call = tiny.cogvideox_rotary_call(1, (4, 4, 16), TIME)
        refusal = pytest.raises(ValueError, match=r"learned positions .*legal in coarse")
        with handle.using(Mode(2)), refusal:
            output(handle.model, call)


class TestSana:
    def test_residuals_of_a_controlnet_are_averaged_over_groups(self):
        handle, call = elastic("sana"), tiny.sana_call(1, (1, 8, 8), TIME)
        quarter = tiny.noise(1, 16, 32, seed=18)
        even = ungroup(quarter.repeat(1, 1, 4), (1, 8, 8), (1, 2, 2))
        zero_mean = even + torch.tensor([1.0, -1.0]).repeat(32)[:, None]  # neighbours apart
        with handle.using(Mode(2)):
            found, moved = (
                output(handle.model, call | {"controlnet_block_samples": (residual,)})
                for residual in (even, zero_mean)
            )
            bare = output(handle.model, call)
        torch.testing.assert_close(found, moved)
        assert not torch.allclose(found, bare)

    def test_noise_levels_of_both_generations(self):
        backbone = elastic("sana").backbone
        assert backbone.times.levels(tiny.sana_call(1, (1, 8, 8), TIME)) == (0.7, 0.7)
        sprint = tiny.sana_sprint_call(1, (1, 8, 8), TIME)
        assert backbone.times.levels(sprint) == pytest.approx((0.7, 0.7))

    def test_another_time_scale_is_refused(self):
        model = diffusers.SanaTransformer2DModel(**CASES["sana"].config, timestep_scale=0.001)
        with pytest.raises(ValueError, match=r"timestep_scale = 0\.001; legal: 1"):
            elastify(model, FlexiDiT())


class TestHunyuanVideo:
    CONFIG = CASES["hunyuan-video"].config

    def test_replaced_tokens_are_refused(self):
        model = diffusers.HunyuanVideoTransformer3DModel(
            **self.CONFIG, image_condition_type="token_replace"
        )
        with pytest.raises(ValueError, match=r"token_replace.*legal: None"):
            elastify(model, FlexiDiT())

    def test_pictures_in_more_channels_work(self):
        config = {**self.CONFIG, "in_channels": 9, "image_condition_type": "latent_concat"}
        model = diffusers.HunyuanVideoTransformer3DModel(**config)
        handle = elastify(model, FlexiDiT(rank=2))
        call = tiny.hunyuan_video_call(1, (2, 4, 4), TIME)
        call["hidden_states"] = tiny.noise(1, 9, 2, 8, 8)
        with handle.using(Mode(2)):
            assert output(model, call).shape == (1, 4, 2, 8, 8)


class TestCogView4:
    CALL = tiny.cogview4_call(1, (1, 7, 6), TIME)

    def test_given_phases_are_for_full_mode(self):
        handle = elastic("cogview4", scales=(2, 3))
        call = self.CALL | {"image_rotary_emb": handle.model.rope(self.CALL["hidden_states"])}
        with handle.using(FULL):
            output(handle.model, call)
        refusal = pytest.raises(ValueError, match=r"image_rotary_emb .*full mode")
        with handle.using(Mode(2)), refusal:
            output(handle.model, call)

    def test_odd_groups_have_their_middle_tokens_phases(self):
        handle = elastic("cogview4", scales=(2, 3))
        tables = returned(handle, "rope", self.CALL, Mode(3))
        stock = CASES["cogview4"].model().rope(self.CALL["hidden_states"])
        for found, own in zip(tables, stock):
            middle = own.unflatten(0, (7, 6))[1:6:3, 1:6:3].flatten(0, 1)
            torch.testing.assert_close(found.unflatten(0, (3, 2))[:2].flatten(0, 1), middle)


class TestZImage:
    @pytest.mark.parametrize("scale", [2, 3, 4, (1, 2, 5)])
    def test_phases_are_those_of_the_centres_beside_and_beyond_the_border(self, scale):
        handle, grid, mode = elastic("z-image", scales=(scale,)), (1, 7, 9), Mode(scale)
        call = tiny.z_image_call(2, grid, TIME)
        seen = []
        hook = handle.model.noise_refiner[0].register_forward_pre_hook(
            lambda _module, args: seen.append(args[2])
        )
        with handle.using(mode):
            output(handle.model, call)
        hook.remove()
        rows, columns = map(group_centres, grid[1:], mode.patch_scale[1:])
        for found, text in zip(seen[0], (32, 64), strict=True):  # prompts of 6 and 40, filled
            frame = torch.tensor([text + 1], dtype=torch.float64)
            places = torch.cartesian_prod(frame, rows, columns)
            filler = torch.zeros(len(found) - len(places), 3, dtype=torch.float64)
            dims, parts = handle.model.axes_dims, []
            for dim, place in zip(dims, torch.cat([places, filler]).T, strict=True):
                exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
                angles = torch.outer(place, 256.0**-exponents)
                parts.append(torch.polar(torch.ones_like(angles), angles))
            right = torch.cat(parts, dim=1).to(found.dtype)
            torch.testing.assert_close(found, right, atol=2e-6, rtol=0)

    def test_a_call_of_tensors_instead_of_lists(self):
        handle, stock = elastic("z-image"), CASES["z-image"].model()
        call = tiny.z_image_call(2, (1, 6, 8), TIME)
        other = call | {"x": torch.stack(call["x"])}
        with torch.no_grad(), handle.using(FULL):
            assert all(map(torch.equal, handle.model(**other).sample, stock(**call).sample))
        with torch.no_grad(), handle.using(Mode(2)):
            found = handle.model(**call).sample
            assert isinstance(found, list)
            assert all(map(torch.equal, handle.model(**other).sample, found))

    def test_guidance_of_two_modes_returns_lists_too(self):
        handle = elastic("z-image")
        call = CASES["z-image"].guided(2, (1, 6, 8), TIME)
        handle.schedule = Schedule.constant(FULL, guide=Mode(2))
        with torch.no_grad():
            found, bare = handle.model(**call).sample, handle.model(**call, return_dict=False)[0]
        assert isinstance(found, list)
        assert isinstance(bare, list)
        assert all(map(torch.equal, found, bare))

    def test_pictures_of_several_sizes_are_refused(self):
        call = tiny.z_image_call(2, (1, 6, 8), TIME)
        call["x"][0] = tiny.z_image_call(1, (1, 6, 6), TIME)["x"][0]
        with pytest.raises(ValueError, match=r"x holds latents of sizes .*legal: all of one size"):
            output(elastic("z-image").model, call)

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({"siglip_feat_dim": 24}, r"siglip_feat_dim = 24; legal: None"),
            (
                {"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)},
                r"all_patch_size = \(2, 4\); legal: \(2,\)",
            ),
        ],
    )
    def test_several_pictures_per_row_and_patch_sizes_of_its_own_are_refused(self, facts, message):
        config = {**CASES["z-image"].config, **facts}
        with pytest.raises(ValueError, match=message):
            elastify(diffusers.ZImageTransformer2DModel(**config), FlexiDiT())

    def test_residuals_of_a_controlnet_reach_the_tokens_that_they_are_for(self):
        handle, stock = elastic("z-image"), CASES["z-image"].model()
        call = tiny.z_image_call(2, (1, 6, 8), TIME)
        residual = tiny.noise(2, 128, 32, seed=18)  # of 48 tokens, 16 fillers and 64 of text
        call["controlnet_block_samples"] = {0: residual}
        with torch.no_grad(), handle.using(FULL):
            assert all(map(torch.equal, handle.model(**call).sample, stock(**call).sample))
        seen = []
        hook = handle.model.layers[1].register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        with torch.no_grad(), handle.using(Mode(2)):
            handle.model(**call)
            handle.model(**tiny.z_image_call(2, (1, 6, 8), TIME))
        hook.remove()
        added = seen[0] - seen[1]
        means = group_means(residual[:, :48], (1, 6, 8), (1, 2, 2))
        torch.testing.assert_close(added[:, :12], means, atol=1e-5, rtol=0)
        assert not added[:, 12:32].any()
        torch.testing.assert_close(added[:, 32:], residual[:, 64:], atol=1e-5, rtol=0)

    def test_a_list_of_pictures_in_a_row_is_refused(self):
        call = tiny.z_image_call(1, (1, 6, 8), TIME)
        call["x"] = [call["x"]]
        with pytest.raises(ValueError, match=r"x holds a list .*legal: one picture in each row"):
            output(elastic("z-image").model, call)

    def test_it_compiles_to_one_graph_per_mode(self):
        handle = elastic("z-image", scales=(2,))
        call = tiny.z_image_call(2, (1, 6, 8), TIME)
        torch._dynamo.reset()
        expected = {}
        for mode in (FULL, Mode(2)):
            with handle.using(mode):
                expected[mode] = output(handle.model, call)
        handle.model.compile(backend="eager", fullgraph=True)
        for mode in (FULL, Mode(2), FULL):
            with handle.using(mode):
                assert all(map(torch.equal, output(handle.model, call), expected[mode]))
