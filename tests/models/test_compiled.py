"""The layout and the compilation of an editor's networks."""

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p.editing.editor import Editor
from ip2p.models import compiled

FAST = {"steps": 2, "size": 32, "text_cfg": 2.0, "image_cfg": 1.5}


@pytest.fixture
def picture():
    return Image.linear_gradient("L").resize((32, 32)).convert("RGB")


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


def test_compiled_pictures_equal_eager_ones(tiny_model_dir, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    eager = Editor.load(tiny_model_dir, device="cpu", dtype="fp32")
    made = Editor.load(tiny_model_dir, device="cpu", dtype="fp32", compile=True)
    one, other = (
        np.asarray(editor.edit(picture, "make it night", **FAST)[0], dtype=int) for editor in (eager, made)
    )
    assert (abs(one - other) <= 1).mean() >= 0.999
    assert any((tmp_path / "kernels").rglob("*.so"))  # for the next process


def test_weights_that_move_are_not_compiled(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(compiled, "_compile_blocks", lambda networks: pytest.fail("compiled"))
    monkeypatch.setattr(Editor, "_offloads", True, raising=False)
    monkeypatch.setattr(Editor, "__init__", lambda self, *args, **kwargs: None)
    with pytest.warns(UserWarning, match="Nothing is compiled"):
        Editor.load(tiny_model_dir, device="cpu", dtype="fp32", compile=True)
