import json
import shutil

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn

from ip2p.base.errors import InputError, ModelError
from ip2p.models.bundle import load_bundle
from ip2p.models.lora import apply_loras, check_loras, write_kohya

RANK, ALPHA = 2, 4.0
UNET = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.proj_in",
    "up_blocks.1.resnets.0.conv1",
    "up_blocks.1.resnets.0.time_emb_proj",
    "down_blocks.0.downsamplers.0.conv",
]
TEXT = [
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
]


@pytest.fixture
def bundle(tiny_model_dir):
    return load_bundle(tiny_model_dir)


def factors(module, seed):
    """down and up of a random LoRA, in the shapes that trainers use."""
    generator = torch.Generator().manual_seed(seed)
    shape = module.weight.shape
    ones = (1,) * (len(shape) - 2)
    down = torch.randn((RANK, *shape[1:]), generator=generator)
    return down, torch.randn((shape[0], RANK, *ones), generator=generator)


def lora_layers(bundle):
    return [("unet", name, bundle.unet.get_submodule(name)) for name in UNET] + [
        ("text_encoder", name, bundle.text_encoder.get_submodule(name)) for name in TEXT
    ]


def kohya(bundle):
    weights = {}
    for seed, (network, name, module) in enumerate(lora_layers(bundle)):
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[network]
        key = prefix + name.replace(".", "_")
        weights[f"{key}.lora_down.weight"], weights[f"{key}.lora_up.weight"] = factors(module, seed)
        weights[f"{key}.alpha"] = torch.tensor(ALPHA)
    return weights


def peft(bundle, text="text_encoder.text_model."):
    weights = {}
    for seed, (network, name, module) in enumerate(lora_layers(bundle)):
        key = {"unet": "unet.", "text_encoder": text}[network] + name
        weights[f"{key}.lora_A.weight"], weights[f"{key}.lora_B.weight"] = factors(module, seed)
    return weights


def old_diffusers(bundle):
    """diffusers' names before PEFT: attention processors, LoRA layers in the text encoder."""
    weights = {}
    for seed, (network, name, module) in enumerate(lora_layers(bundle)):
        key = f"{network}." + ("text_model." if network == "text_encoder" else "") + name
        if ".attn" in name:
            key = key.replace(".to_out.0", ".to_out").replace("attn1.", "attn1.processor.")
            down, up = f"{key}_lora.down.weight", f"{key}_lora.up.weight"
        elif network == "text_encoder":
            down, up = f"{key}.lora_linear_layer.down.weight", f"{key}.lora_linear_layer.up.weight"
        else:
            down, up = f"{key}.lora.down.weight", f"{key}.lora.up.weight"
        weights[down], weights[up] = factors(module, seed)
    return weights


def merged_by_hand(bundle, weight):
    """Each weight after the merge, by an explicit formula."""
    expected = {}
    for seed, (network, name, module) in enumerate(lora_layers(bundle)):
        down, up = factors(module, seed)
        mix = "orab,rikl->oikl" if isinstance(module, nn.Conv2d) else "or,ri->oi"
        expected[network, name] = module.weight + weight * torch.einsum(mix, up, down)
    return expected


def assert_merged(bundle, expected):
    for (network, name), weight in expected.items():
        actual = getattr(bundle, network).get_submodule(name).weight
        torch.testing.assert_close(actual, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("naming", [kohya, peft, old_diffusers])
def test_every_naming_scheme_merges_the_same(bundle, naming, tmp_path):
    path = tmp_path / "one.safetensors"
    save_file(naming(bundle), path)
    scale = ALPHA / RANK if naming is kohya else 1.0
    expected = merged_by_hand(bundle, 0.7 * scale)
    others = {name: weight.clone() for name, weight in bundle.unet.state_dict().items()}
    apply_loras(bundle, [(path, 0.7)])
    assert_merged(bundle, expected)
    for name, weight in bundle.unet.state_dict().items():
        if name.removesuffix(".weight") not in UNET:
            assert torch.equal(weight, others[name]), name


def test_alpha_is_read_from_diffusers_metadata(bundle, tmp_path):
    path = tmp_path / "one.safetensors"
    metadata = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 1}}
    metadata |= {"text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True}
    save_file(peft(bundle), path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    expected = {}
    for seed, (network, name, module) in enumerate(lora_layers(bundle)):
        scale = 8 / RANK**0.5 if network == "text_encoder" else 1 / RANK if "to_q" in name else 6 / RANK
        down, up = factors(module, seed)
        expected[network, name] = module.weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(
            module.weight.shape
        )
    apply_loras(bundle, [(path, 1.0)])
    assert_merged(bundle, expected)


def test_pefts_own_names_apply_to_the_unet(bundle, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    weights = {
        key.replace("unet.", "base_model.model.").replace(".lora_A.", ".lora_A.default."): value
        for key, value in peft(bundle).items()
        if key.startswith("unet.")
    }
    save_file(weights, path)
    expected = {place: w for place, w in merged_by_hand(bundle, 1.0).items() if place[0] == "unet"}
    apply_loras(bundle, [(path, 1.0)])
    assert_merged(bundle, expected)


def test_a_mid_tensor_is_applied_between_down_and_up(bundle, tmp_path):
    name = "up_blocks.1.resnets.0.conv1"
    module = bundle.unet.get_submodule(name)
    out, into = module.weight.shape[:2]
    down, mid, up = torch.randn(2, into, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(out, 3, 1, 1)
    key = "lora_unet_" + name.replace(".", "_")
    path = tmp_path / "locon.safetensors"
    save_file(
        {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}, path
    )
    x = torch.randn(1, into, 8, 8)
    conv = nn.functional.conv2d
    expected = module(x) + conv(conv(conv(x, down), mid, padding=1), up)
    apply_loras(bundle, [(path, 1.0)])
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_several_loras_add_up_and_a_weight_of_zero_has_no_effect(bundle, tmp_path):
    path = tmp_path / "one.safetensors"
    save_file(kohya(bundle), path)
    expected = merged_by_hand(bundle, ALPHA / RANK * 0.5)
    apply_loras(bundle, [(path, 1.0), (path, -0.5), (path, 0.0)])
    assert_merged(bundle, expected)


def test_merging_keeps_half_precision(tiny_model_dir, tmp_path):
    bundle = load_bundle(tiny_model_dir, dtype=torch.float16)
    path = tmp_path / "one.safetensors"
    save_file(kohya(bundle), path)
    apply_loras(bundle, [(path, 0.1)])
    assert {weight.dtype for weight in bundle.unet.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    "change",
    [
        {"lora_unet_no_such_layer.lora_down.weight": torch.zeros(2, 4)},
        {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.zeros(2, 4)},
        {"lora_unet_mid_block_attentions_0_proj_out.hada_w1_a": torch.zeros(2, 4)},
        {"lora_unet_mid_block_attentions_0_proj_out.lora_down.weight": torch.zeros(2, 4)},
        {
            "lora_unet_time_embedding_linear_1.lora_down.weight": torch.zeros(2, 5),
            "lora_unet_time_embedding_linear_1.lora_up.weight": torch.zeros(128, 2),
        },
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)},
    ],
    ids=["unknown", "dora", "loha", "half", "shape", "no second encoder"],
)
def test_unmatched_keys_are_reported_and_nothing_is_merged(bundle, tmp_path, change):
    path = tmp_path / "strange.safetensors"
    save_file(kohya(bundle) | change, path)
    expected = merged_by_hand(bundle, 0.0)
    first = next(iter(change))
    with pytest.raises(ModelError, match=rf"strange\.safetensors: {len(change)} of \d+ keys.*{first} first"):
        apply_loras(bundle, [(path, 1.0)])
    assert_merged(bundle, expected)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(weight):
    with pytest.raises(InputError, match=r"weight of some\.safetensors is (nan|inf)"):
        check_loras([("some.safetensors", weight)])


def test_a_missing_file_gets_a_suggestion_and_an_unreadable_one_is_named(bundle, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"no such LoRA file\. Did you mean .*style\.safetensors"):
        check_loras([(tmp_path / "stile.safetensors", 1.0)])
    with pytest.raises(ModelError, match="style.safetensors cannot be read"):
        apply_loras(bundle, [(tmp_path / "style.safetensors", 1.0)])


def test_kohyas_names_agree_with_diffusers_conversion(bundle, tmp_path):
    # Oracle: diffusers converts Kohya's names to its own; the result merges the same here.
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(kohya(bundle))
    assert set(alphas.values()) == {ALPHA}
    path = tmp_path / "converted.safetensors"
    save_file(theirs, path)
    expected = merged_by_hand(bundle, 1.0)
    apply_loras(bundle, [(path, 1.0)])
    assert_merged(bundle, expected)


def test_kohyas_names_for_sdxl_follow_the_ldm_code(xl_dir, tmp_path):
    bundle = load_bundle(xl_dir)
    lora_layers = {
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k": (
            bundle.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
        ),
        "lora_unet_middle_block_0_in_layers_2": bundle.unet.mid_block.resnets[0].conv1,
        "lora_unet_input_blocks_2_0_op": bundle.unet.down_blocks[0].downsamplers[0].conv,
        "lora_unet_label_emb_0_2": bundle.unet.add_embedding.linear_2,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": bundle.text_encoder.encoder.layers[0].mlp.fc1,
        "lora_te2_text_model_encoder_layers_2_self_attn_v_proj": (
            bundle.text_encoder_2.text_model.encoder.layers[2].self_attn.v_proj
        ),
    }
    weights, expected = {}, {}
    for seed, (key, module) in enumerate(lora_layers.items()):
        down, up = factors(module, seed)
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        expected[key] = module.weight + (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    file = xl_dir / "unet" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    apply_loras(bundle, [(_saved(weights, tmp_path), 1.0)])
    for key, module in lora_layers.items():
        torch.testing.assert_close(module.weight, expected[key], rtol=1e-6, atol=1e-6)
    assert file.read_bytes() == before  # the weights may be mapped from it


def test_the_editor_loads_with_loras(tiny_model_dir, bundle, tmp_path):
    from ip2p.editing.editor import Editor

    path = shutil.copy(_saved(kohya(bundle), tmp_path), tmp_path / "two.safetensors")
    expected = merged_by_hand(bundle, ALPHA / RANK * 0.3)
    editor = Editor.load(tiny_model_dir, device="cpu", dtype="fp32", loras=[(path, 0.3)])
    assert_merged(editor.bundle, expected)


def _saved(weights, folder):
    save_file(weights, folder / "one.safetensors")
    return folder / "one.safetensors"


# --- Kohya's names ---


def write_peft(bundle, path, *, text=True, **metadata):
    """Write a LoRA file like PEFT and diffusers do."""
    state = {}
    for number, (network, name, module) in enumerate(lora_layers(bundle)):
        if network == "unet" or text:
            down, up = factors(module, number)
            state[f"{network}.{name}.lora_A.weight"], state[f"{network}.{name}.lora_B.weight"] = down, up
    safetensors.torch.save_file(state, path, {"format": "pt", **metadata})
    return state


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("stabilized", [False, True])
def test_a_file_written_with_kohyas_names_merges_like_the_peft_file(
    tiny_model_dir, tmp_path, alpha, stabilized
):
    ours, theirs = load_bundle(tiny_model_dir), load_bundle(tiny_model_dir)
    settings = {"unet.lora_alpha": alpha, "text_encoder.lora_alpha": alpha, "unet.use_rslora": stabilized}
    metadata = {} if alpha is None else {"lora_adapter_metadata": json.dumps(settings)}
    state = write_peft(ours, tmp_path / "peft.safetensors", **metadata)
    layers = write_kohya(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors")
    found = safetensors.torch.load_file(tmp_path / "kohya.safetensors")
    assert len(found) == 3 * layers and 2 * layers == len(state)
    assert {key.split(".", 1)[1] for key in found} == {"lora_down.weight", "lora_up.weight", "alpha"}
    apply_loras(ours, [(tmp_path / "peft.safetensors", 0.7)])
    apply_loras(theirs, [(tmp_path / "kohya.safetensors", 0.7)])
    for network in ("unet", "text_encoder"):
        mine, its = getattr(ours, network).state_dict(), getattr(theirs, network).state_dict()
        for name in mine:
            torch.testing.assert_close(mine[name], its[name], rtol=0, atol=1e-6)


def test_written_kohya_names_equal_diffusers_conversion(tiny_model_dir, tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya

    bundle = load_bundle(tiny_model_dir)
    state = write_peft(bundle, tmp_path / "peft.safetensors", text=False)
    write_kohya(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors")
    found = safetensors.torch.load_file(tmp_path / "kohya.safetensors")
    expected = convert_state_dict_to_kohya(dict(state))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value.to(found[key])) for key, value in expected.items())


def test_sdxls_text_encoders_are_numbered_in_kohyas_names(tmp_path):
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    for name, start in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        layer = f"{name}.text_model.encoder.layers.0.self_attn.q_proj"
        other = "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj"
        state = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        state |= {f"{other}.lora_A.weight": down.clone(), f"{other}.lora_B.weight": up.clone()}
        safetensors.torch.save_file(state, tmp_path / "peft.safetensors")
        write_kohya(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors")
        found = safetensors.torch.load_file(tmp_path / "kohya.safetensors")
        assert f"{start}text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in found
    # Kohya's own names pass unchanged.
    write_kohya(tmp_path / "kohya.safetensors", tmp_path / "again.safetensors")
    assert safetensors.torch.load_file(tmp_path / "again.safetensors").keys() == found.keys()


def test_tensors_without_a_kohya_name_are_refused(tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{layer}.lora_magnitude_vector": torch.ones(4), f"{layer}.lora_A.weight": torch.ones(2, 4)}
    safetensors.torch.save_file(state, tmp_path / "dora.safetensors")
    with pytest.raises(ModelError, match="lora_magnitude_vector has no name of Kohya's"):
        write_kohya(tmp_path / "dora.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
