"""The tables of weight names. Oracle: diffusers' one-way converters of single files."""

import pytest
import torch
from diffusers.loaders import single_file_utils as oracle

from ip2p.models import configs, keys
from ip2p.models.load import empty_network, ldm_table

CLIP_L = configs._text_config(
    vocabulary=49408, width=768, tokens=77, inner=3072, layers=12, activation="quick_gelu", projection=768
)
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD1 = {
    "in_channels": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# The published sizes of the three architectures.
FULL = {
    "SD 1.x": {"unet": SD1, "vae": VAE, "text_encoder": CLIP_L},
    "SD 2.x": {
        "unet": SD1
        | {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "text_encoder": configs._text_config(
            vocabulary=49408, width=1024, tokens=77, inner=4096, layers=23, activation="gelu", projection=1024
        ),
    },
    "SDXL": {
        "unet": {
            "in_channels": 8,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "text_encoder": CLIP_L,
        "text_encoder_2": configs._text_config(
            vocabulary=49408, width=1280, tokens=77, inner=5120, layers=32, activation="gelu", projection=1280
        ),
    },
}
# Number of tensors of each network in the published files.
COUNTS = {
    ("SD 1.x", "unet"): 686,
    ("SD 1.x", "vae"): 248,
    ("SD 1.x", "text_encoder"): 196,
    ("SDXL", "unet"): 1680,
    # Without logit_scale, which generation does not use.
    ("SDXL", "text_encoder_2"): 389,
}


class FullSizeNetwork:
    """A network of the published size whose weights take no memory, with its tensors under LDM names."""

    def __init__(self, architecture, part):
        self.architecture, self.part, self.config = architecture, part, FULL[architecture][part]
        self.network = empty_network(part, self.config)
        self.state = self.network.state_dict()
        self.table = ldm_table(part, list(self.state), self.config, {}, architecture)
        self.stored = {key: make() for key, make in keys.to_ldm(self.table, self.state.__getitem__)}


@pytest.fixture(scope="module")
def full():
    networks = {}

    def get(architecture, part):
        if (architecture, part) not in networks:
            networks[architecture, part] = FullSizeNetwork(architecture, part)
        return networks[architecture, part]

    return get


def converted_by_diffusers(one):
    """The stored tensors, renamed by diffusers' converters."""
    if one.part == "unet":
        return oracle.convert_ldm_unet_checkpoint(dict(one.stored), dict(one.network.config))
    if one.part == "vae":
        return oracle.convert_ldm_vae_checkpoint(dict(one.stored), dict(one.network.config))
    if one.part == "text_encoder_2":
        return oracle.convert_open_clip_checkpoint(one.network, dict(one.stored), keys.OPENCLIP_XL)
    if one.architecture == "SD 2.x":
        return oracle.convert_open_clip_checkpoint(one.network, dict(one.stored), keys.OPENCLIP)
    return oracle.convert_ldm_clip_checkpoint(dict(one.stored))


ALL = [(architecture, part) for architecture, parts in FULL.items() for part in parts]


@pytest.mark.parametrize(("architecture", "part"), ALL)
def test_the_name_tables_equal_diffusers_converters_at_full_size(full, architecture, part):
    one = full(architecture, part)
    bare = part == "text_encoder"
    found = {
        (k.removeprefix("text_model.") if bare else k): v.shape
        for k, v in converted_by_diffusers(one).items()
    }
    expected = {(k.removeprefix("text_model.") if bare else k): v.shape for k, v in one.state.items()}
    assert found == expected
    assert len(one.stored) == COUNTS.get((architecture, part), len(one.stored))


@pytest.mark.parametrize(("architecture", "part"), ALL)
def test_stored_shapes_are_predicted_from_the_table(full, architecture, part):
    one = full(architecture, part)
    for name, place in one.table.items():
        assert one.stored[place.key].shape == keys.stored_shape(place, tuple(one.state[name].shape))
        assert keys.from_ldm(place, one.stored[place.key]).shape == one.state[name].shape


@pytest.mark.parametrize("architecture", FULL)
def test_configs_are_inferred_from_shapes(full, architecture):
    parts = [full(architecture, part) for part in FULL[architecture]]
    if architecture != "SD 1.x":
        parts.append(full("SD 1.x", "vae"))
    shapes = {key: tuple(tensor.shape) for one in parts for key, tensor in one.stored.items()}
    assert configs.architecture(shapes) == architecture
    found = configs.ldm_configs(shapes, sigmas={}, velocity=False)
    for part, config in FULL[architecture].items():
        assert found[part].items() >= config.items()
    assert found["vae"].items() >= VAE.items()
    assert found["vae"]["scaling_factor"] == (0.13025 if architecture == "SDXL" else 0.18215)
    assert found["unet"]["sample_size"] == (128 if architecture == "SDXL" else 64)


def test_the_last_text_layer_of_an_original_sd2_file_is_ignored(full):
    one = full("SD 2.x", "text_encoder")
    shapes = {key: tuple(tensor.shape) for key, tensor in one.stored.items()}
    block = keys.OPENCLIP + "transformer.resblocks."
    last = {k.replace(".22.", ".23."): v for k, v in shapes.items() if k.startswith(block + "22.")}
    shapes |= last | {keys.OPENCLIP + "text_projection": (1024, 1024)}
    assert configs._openclip_config(shapes, keys.OPENCLIP)["num_hidden_layers"] == 23


def test_table_entries_equal_the_published_names(full):
    unet = full("SD 1.x", "unet").table
    expected = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
        "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.3.0.op.bias",
        "down_blocks.3.resnets.1.conv2.weight": "input_blocks.11.0.out_layers.3.weight",
        "mid_block.attentions.0.norm.weight": "middle_block.1.norm.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
    }
    for name, key in expected.items():
        assert unet[name].key == "model.diffusion_model." + key
    vae = full("SD 1.x", "vae").table
    assert vae["decoder.up_blocks.0.upsamplers.0.conv.weight"].key == (
        "first_stage_model.decoder.up.3.upsample.conv.weight"
    )
    assert vae["encoder.mid_block.attentions.0.to_out.0.weight"] == keys.WeightName(
        "first_stage_model.encoder.mid.attn_1.proj_out.weight", conv=True
    )


def test_ema_names_are_the_plain_names_without_dots():
    assert keys.ema_name("model.diffusion_model.input_blocks.0.0.weight") == (
        "model_ema.diffusion_modelinput_blocks00weight"
    )


@pytest.mark.parametrize("form", [{"third": 1}, {"turned": True}, {"conv": True}, {}])
def test_conversions_to_and_from_ldm_are_inverses(form):
    tensors = {f"part{i}": torch.randn(3, 3) for i in range(3)}
    table = {
        f"part{i}": keys.WeightName("there" if "third" in form else f"there{i}", **form) for i in range(3)
    }
    if "third" in form:
        table = {f"part{i}": keys.WeightName("there", third=i) for i in range(3)}
    stored = {key: make() for key, make in keys.to_ldm(table, tensors.__getitem__)}
    for name, place in table.items():
        assert torch.equal(keys.from_ldm(place, stored[place.key]), tensors[name])


def test_linear_attention_weights_of_newer_autoencoders_are_read():
    weight = torch.randn(4, 4)
    assert torch.equal(keys.from_ldm(keys.WeightName("q", conv=True), weight), weight)


def test_folder_names_of_other_library_versions_are_recognized():
    names = ["encoder.layers.0.mlp.fc1.weight", "mid_block.attentions.0.to_out.0.bias"]
    stored = ["text_model.encoder.layers.0.mlp.fc1.weight", "mid_block.attentions.0.proj_attn.bias"]
    table = keys.folder_table(stored, names)
    assert [table[name].key for name in names] == stored


def test_blocks_without_an_ldm_name_are_refused():
    from ip2p.base.errors import ModelError

    with pytest.raises(ModelError, match="has no place in an LDM file"):
        keys.unet_table(["down_blocks.0.motion_modules.0.norm.weight"], SD1)
    with pytest.raises(ModelError, match="has no place in an LDM file"):
        keys.unet_table(["down_blocks.0.resnets.0.spatial.weight"], SD1)
