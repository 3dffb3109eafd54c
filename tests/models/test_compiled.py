"""The memory layout and compilation of an editor's networks."""

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p.editing.editor import Editor


def test_channels_last_changes_fp32_latents_by_rounding_only(tiny_model_dir, monkeypatch):
    fast = Editor.load(tiny_model_dir, device="cpu", dtype="fp32")
    monkeypatch.setattr("ip2p.editing.editor.use_fast_layout", lambda bundle: None)
    plain = Editor.load(tiny_model_dir, device="cpu", dtype="fp32")
    assert fast.bundle.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.bundle.unet.conv_in.weight.is_contiguous()
    generator = torch.Generator().manual_seed(0)
    x, image = torch.randn((2, 1, 4, 8, 8), generator=generator)
    with torch.inference_mode():
        one, other = (
            editor.model(x, torch.tensor(3.0), editor.encode_text("night"), image) for editor in (fast, plain)
        )
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast.decode(x), plain.decode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(900)  # a busy machine compiles for minutes
def test_a_compiled_edit_equals_the_eager_one(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    page = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    settings = {"steps": 2, "seed": 1, "size": 64}
    eager = Editor.load(tiny_model_dir, device="cpu", dtype="fp32").edit(page, "night", **settings)
    compiled = Editor.load(tiny_model_dir, device="cpu", dtype="fp32", compile=True)
    result = compiled.edit(page, "night", **settings)
    assert any(tmp_path.rglob("*.so"))
    off = np.abs(np.asarray(result[0], int) - np.asarray(eager[0], int)).max(axis=-1)
    assert (off <= 1).mean() >= 0.999
