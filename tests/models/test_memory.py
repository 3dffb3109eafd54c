import pytest
import torch
from torch import nn

from ip2p.base.devices import NoiseStream
from ip2p.base.errors import InputError, ResourceError
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.editing import editor as editor_module
from ip2p.editing.editor import Editor
from ip2p.models.load import open_model
from ip2p.models.memory import (
    RESERVE,
    Footprint,
    Memory,
    choose_memory,
    footprint,
    footprint_of_stored,
    free_ram,
    offload,
)
from ip2p.pictures.images import to_tensor

GIGA = 10**9
# Roughly SD 1.5 in fp16 with an fp32 autoencoder.
SD = Footprint(
    unet=1_720_000_000,
    vae=335_000_000,
    text=246_000_000,
    control=0,
    cell=26 * 1.5 * 320 * 2,
    pixel=6 * 1.5 * 128 * 4,
)


def choice(gigabytes, size=(512, 512), mode="auto", device="cuda", **more):
    free = None if gigabytes is None else int(gigabytes * GIGA) + RESERVE.get(device, 0)
    return choose_memory(SD, mode, free, size, device=device, **more)


def test_peak_memory_is_that_of_the_largest_stage():
    # Decoding 512² takes 1.2 GB, sampling 0.1 GB a row.
    assert SD.peak(Memory(), (512, 512)) == pytest.approx(2.301e9 + 512 * 512 * SD.pixel, rel=1e-6)
    assert SD.peak(Memory(), (512, 512), batch=16) == pytest.approx(
        2.301e9 + 48 * 64 * 64 * SD.cell, rel=1e-6
    )
    in_turn = SD.peak(Memory(passes_at_once=False), (512, 512), batch=16)
    assert in_turn == pytest.approx(2.301e9 + 16 * 64 * 64 * SD.cell, rel=1e-6)
    assert SD.peak(Memory(offload=True), (512, 512)) == pytest.approx(
        1.72e9 + 3 * 64 * 64 * SD.cell, rel=1e-6
    )


def test_a_smaller_device_gets_a_more_economical_memory_mode():
    assert choice(24) == Memory()
    assert choice(5, batch=8) == Memory()
    assert choice(4, batch=8) == Memory(passes_at_once=False)
    assert choice(2.2) == Memory(offload=True)
    assert choice(1.9) == Memory(passes_at_once=False, offload=True)
    # Only tiling changes the picture, so it comes last.
    assert choice(13.2, (1536, 1536)) == Memory()
    assert choice(11.3, (1536, 1536)) == Memory(offload=True)
    assert choice(5.2, (1536, 1536)) == Memory(vae_tiling=True)
    assert choice(3.6, (1536, 1536)) == Memory(passes_at_once=False, vae_tiling=True)
    assert choice(2.7, (1536, 1536)) == Memory(passes_at_once=False, vae_tiling=True, offload=True)


def test_a_cpu_has_nothing_to_offload_to():
    assert choice(11.3, (1536, 1536), device="cpu") == Memory(vae_tiling=True)
    with pytest.raises(ResourceError, match=r"cpu has 2\.0 GB free.*a smaller model, or dtype bf16"):
        choice(2.0, device="cpu")


def test_an_explicit_offload_setting_is_kept():
    assert choice(24, offload=True) == Memory(offload=True)
    with pytest.raises(ResourceError):
        choice(2.2, offload=False, size=(768, 768))


def test_low_mode_uses_all_lossless_savings_and_high_mode_uses_none():
    assert choice(80, mode="low") == choice(None, mode="low") == Memory(passes_at_once=False, offload=True)
    assert choice(80, mode="low", device="cpu") == Memory(passes_at_once=False)
    # Tiling changes the picture, so it is used only if nothing else fits.
    low = choice(8, (1536, 1536), mode="low")
    assert low == Memory(passes_at_once=False, vae_tiling=True, offload=True)
    assert choice(0.1, mode="high") == Memory()
    with pytest.raises(InputError, match="Memory mode 'some' is not known; use one of low, auto, high"):
        choice(8, mode="some")


def test_unknown_free_memory_counts_as_enough():
    assert choice(None) == Memory()


def test_an_edit_that_does_not_fit_suggests_a_size_that_does():
    with pytest.raises(
        ResourceError, match=r"at 4096x2048 needs about .* GB and cuda has 4\.0 GB free"
    ) as error:
        choice(4, (4096, 2048))
    side = int(str(error.value).split("Try size ")[1].rstrip("."))
    assert side % 64 == 0 and 1024 <= side < 4096
    choice(4, (side, side // 2))
    with pytest.raises(ResourceError, match="Try a batch size of 1"):
        choice(2.5, batch=64)
    with pytest.raises(ResourceError, match="Nothing smaller fits: close other programs.*dtype fp16"):
        choice(0.5)


def test_the_footprint_on_disk_equals_that_of_the_loaded_model(tiny_model_dir, tiny_editor):
    stored = open_model(tiny_model_dir)
    on_disk = footprint_of_stored(stored, torch.float32)
    assert on_disk == footprint(tiny_editor.bundle)
    assert on_disk.unet == sum(4 * weight.numel() for weight in tiny_editor.bundle.unet.parameters())
    half = footprint_of_stored(stored, torch.float16)
    assert half.weights * 2 == on_disk.weights
    assert footprint_of_stored(stored, torch.bfloat16) == half


def fake_machine(root, available, groups=""):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available} kB\nHugePages_Total: 0\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root


def fake_cgroup(folder, limit, used, cache, *, version=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def test_free_ram_respects_the_machine_and_its_cgroups(tmp_path):
    root = fake_machine(tmp_path, 1000, "0::/job/step\n")
    assert free_ram(root) == 1000 * 1024
    fake_cgroup(root / "sys/fs/cgroup/job/step", "max", 10, 0)
    fake_cgroup(root / "sys/fs/cgroup/job", 500_000, 400_000, 50_000)
    assert free_ram(root) == 150_000
    fake_cgroup(root / "sys/fs/cgroup/job/step", 100_000, 40_000, 0)
    assert free_ram(root) == 60_000


def test_free_ram_respects_cgroups_v1_and_container_limits(tmp_path):
    root = fake_machine(tmp_path, 1000, "5:cpu:/x\n4:memory:/docker/abc\n")
    # Inside a container its own cgroup is the root, whatever the path says.
    fake_cgroup(root / "sys/fs/cgroup/memory", 300_000, 100_000, 0, version=1)
    assert free_ram(root) == 200_000


def test_free_ram_is_unknown_without_proc_files(tmp_path):
    assert free_ram(tmp_path) is None


class Part(nn.Module):
    """Records where it is moved; both devices of the test are the CPU."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log
        self.weight = nn.Parameter(torch.ones(1))

    def to(self, device):
        self.log.append((self.name, str(device)))
        return self

    def forward(self, x):
        return x * self.weight


def test_offloading_moves_the_active_group_to_the_device_and_the_others_back():
    log = []
    text, unet, control, vae = (Part(name, log) for name in ("text", "unet", "control", "vae"))
    offload([[text], [unet, control], [vae]], torch.device("cpu", 0))
    assert log == [(name, "cpu") for name in ("text", "unet", "control", "vae")]
    log.clear()
    for part in (text, unet, control, unet, vae, unet):
        assert part(torch.ones(1)).item() == 1
    on_device, on_cpu = "cpu:0", "cpu"
    assert log == [
        ("text", on_device),
        *[("text", on_cpu), ("unet", on_device), ("control", on_device)],
        *[("unet", on_cpu), ("control", on_cpu), ("vae", on_device)],
        *[("vae", on_cpu), ("unet", on_device), ("control", on_device)],
    ]


def decoded_edit(editor, page):
    image = editor.encode_image(to_tensor(page).repeat(2, 1, 1, 1))
    *_, last = editor.edit_latents(
        image,
        editor.encode_text("make it night"),
        editor.encode_text(""),
        noise=NoiseStream([1, 2], image.shape[1:]),
        sigmas=linspace_sigmas(editor.schedule, 3),
    )
    return editor.decode(last)


def test_low_and_high_memory_give_the_same_result(tiny_editor, page):
    calls = []

    def count(module, args):
        calls.append(len(args[0]))

    hook = tiny_editor.bundle.unet.register_forward_pre_hook(count)
    try:
        results = {
            mode: decoded_edit(Editor(tiny_editor.bundle, memory=mode), page) for mode in ("low", "high")
        }
    finally:
        hook.remove()
    assert calls == [2] * 9 + [6] * 3
    torch.testing.assert_close(results["low"], results["high"], rtol=0, atol=1e-3)


def test_an_editor_adapts_to_the_free_memory(tiny_model_dir, tiny_editor, page, monkeypatch):
    usage = footprint(tiny_editor.bundle)
    reserve = RESERVE["cpu"]

    def set_free(free):
        monkeypatch.setattr(editor_module, "free_bytes", lambda device: int(free) + reserve)

    set_free(usage.weights / 2)
    with pytest.raises(ResourceError, match="Nothing smaller fits"):
        Editor.load(tiny_model_dir, device="cpu", dtype="fp32")
    Editor.load(tiny_model_dir, device="cpu", dtype="fp32", memory="high")
    # Free memory excludes the weights that are already loaded.
    set_free(usage.peak(Memory(passes_at_once=False), (64, 64)) - usage.weights + 1000)
    editor = Editor(tiny_editor.bundle)
    editor.edit(page, "make it night", steps=1)
    with pytest.raises(ResourceError, match=r"at 512x512 needs about .* Try size \d+"):
        editor.edit(page, "make it night", steps=1, size=512)
    set_free(1e12)
    editor.batch_size = 4
    assert editor.fitting_batch((64, 64)) == 4
    set_free(usage.peak(Memory(), (256, 256), batch=2) - usage.weights + 1000)
    assert editor.fitting_batch((256, 256)) == 2


def test_a_memory_mode_is_checked_before_anything_is_loaded(tiny_editor):
    with pytest.raises(InputError, match="memory is 'some'; choose one of: auto, low, high"):
        Editor.load("nothing", memory="some")
    with pytest.raises(InputError, match="Memory mode 'some' is not known"):
        Editor(tiny_editor.bundle, memory="some")


def test_an_edit_with_offloaded_components_is_identical(tiny_model_dir, tiny_editor, page, monkeypatch):
    editor = Editor.load(tiny_model_dir, device="cpu", dtype="fp32")
    moved = []

    def watch(name, part):
        def to(place):
            if place != "cpu":
                moved.append(name)
            return part

        monkeypatch.setattr(part, "to", to)

    for name in ("text_encoder", "unet", "vae"):
        watch(name, getattr(editor.bundle, name))
    offload(editor._parts, torch.device("cpu", 0))
    (edited,) = editor.edit(page, "make it night", steps=2)
    (expected,) = tiny_editor.edit(page, "make it night", steps=2)
    assert edited.tobytes() == expected.tobytes()
    assert moved == ["vae", "text_encoder", "unet", "vae"]
