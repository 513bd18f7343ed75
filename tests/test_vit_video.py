"""python -m pytest tests/test_vit_video.py"""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_tensors
from safetensors.torch import load_file
from torch.testing import assert_close

from vit_video import VisionTransformer, ViTConfig, position_table, sinusoid

TINY = ViTConfig(img_size=16, patch_size=8, width=32, depth=2, heads=4, frames=4)

def load_golden(path):
    """The model of a golden file with the official weights, and the file's tensors."""
    tensors = golden_tensors(path.name)
    official = json.loads(path.with_suffix(".json").read_text())["config"]
    img_size = official["img_size"]
    vit = VisionTransformer(ViTConfig(
        img_size=img_size, patch_size=official["patch_size"], width=official["encoder_embed_dim"],
        depth=official["encoder_depth"] + official["return_index"] + 1,         # 4 blocks, read before the last: 3
        heads=official["encoder_num_heads"], pos_table="sinusoid" if img_size == 224 else "resized14"))
    prefix = "w.encoder."
    vit.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    return vit.eval(), tensors

def clip(B=2, T=4, size=16):
    return torch.randn(B, T, 3, size, size, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize("name", ["vit", "vit_interp", "vit224"])
@pytest.mark.parametrize("medium", ["video", "image"])
def test_forward_equals_the_official_one(golden, name, medium):
    vit, tensors = load_golden(golden / name)
    video = tensors[f"in.{medium}"].transpose(1, 2)                             # official (B, 3, T, H, W) -> ours
    with torch.no_grad():
        assert_close(vit(video), tensors[f"out.{medium}"], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("name", ["vit", "vit_interp", "vit224"])
def test_positions_equal_the_official_tables(golden, name):
    vit, tensors = load_golden(golden / name)
    frames = tensors["in.video"].shape[2]
    for T, key in ((frames, "aux.pos_embed"), (1, "aux.img_pos_embed")):
        assert_close(vit.positions(T, torch.device("cpu")).flatten(0, 1), tensors[key][0], atol=1e-5, rtol=0)

# name -> (pixels, frames) of the real-size tables, width 1024, patch 16, made for 4 frames
REAL_SIZE = {
    "t_784": (224, 4), "t_784_c4": (224, 4), "t_196_img": (224, 1), "t2_384_img": (384, 1),
    "t_8f": (224, 8), "t_16f": (224, 16), "t_32f": (224, 32),
    "nb224_8f": (224, 8), "nb224_16f": (224, 16), "nb224_32f": (224, 32),
    "nb384_4f": (384, 4), "nb384_8f": (384, 8), "nb384_16f": (384, 16),
}

@pytest.mark.parametrize("name", REAL_SIZE)
def test_real_size_tables(golden, name):
    size, T = REAL_SIZE[name]
    recorded = json.loads((golden / "pos_embed.json").read_text())["config"]["cases"][name]
    table = position_table(4, size // 16, 1024, "resized14", T, torch.device("cpu")).flatten(0, 1)
    assert list(table.shape) == recorded["shape"]
    rows = load_file(golden / "pos_embed.safetensors")[f"out.{name}"]
    assert_close(table[recorded["rows"]], rows, atol=1e-5, rtol=0)
    # the whole table, not only the recorded rows
    assert table.double().sum().item() == pytest.approx(recorded["sum"], abs=0.05)
    assert table.double().square().sum().item() == pytest.approx(recorded["sumsq"], rel=1e-7)

def test_sinusoid_by_hand():
    # width 4: the slow pair turns 10000 ** (2/4) = 100 times slower than the fast one
    expected = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.841471, 0.540302, 0.0099998, 0.99995]])
    assert_close(sinusoid(2, 4), expected, atol=1e-6, rtol=0)

def test_frames_are_one_long_line_of_positions():
    table = position_table(2, 3, 8, "sinusoid", 2, torch.device("cpu"))         # 2 frames of 9 patches
    assert_close(table[1, 0], sinusoid(10, 8)[9], atol=0, rtol=0)

def test_an_image_stands_where_a_video_begins():
    vit = VisionTransformer(TINY)
    one, four, eight = (vit.positions(T, torch.device("cpu")) for T in (1, 4, 8))
    assert torch.equal(one[0], four[0])
    assert_close(eight[1], 0.75 * four[0] + 0.25 * four[1])                     # frame 1 of 8 looks at 0.25 of 4

def test_quirk_resized14_differs_from_the_own_grid():
    small, resized = (position_table(4, 4, 32, kind, 4, torch.device("cpu")) for kind in ("sinusoid", "resized14"))
    assert (small - resized).abs().max() > 0.5
    fourteen = sinusoid(196, 32).T.view(1, 32, 14, 14)                          # (1, C, 14, 14)
    expected = F.interpolate(fourteen, size=(4, 4), mode="bicubic", align_corners=False)    # (1, C, 4, 4)
    assert_close(resized[0], expected.flatten(2)[0].T)

def test_checkpointing_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        vit = VisionTransformer(replace(TINY, checkpoint_blocks=recompute)).train()
        vit(clip()).square().mean().backward()
        grads.append([p.grad for p in vit.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert_close(plain, recomputed)

def test_residual_stream_stays_float32_under_autocast_and_bfloat16_when_cast():
    vit = VisionTransformer(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        assert vit(clip()).dtype == torch.float32
    assert vit.bfloat16()(clip().bfloat16()).dtype == torch.bfloat16

def test_positions_grow_with_their_scale():
    cfg = ViTConfig(img_size=32, patch_size=16, width=32, depth=1, heads=2, frames=2)
    once, three_times = (VisionTransformer(replace(cfg, pos_scale=scale)).positions(2, "cpu") for scale in (1.0, 3.0))
    assert torch.equal(three_times, 3 * once)

def test_a_model_from_the_meta_device_has_its_positions():
    """Positions in a buffer would stay on meta, or be garbage, once real weights are assigned."""
    real = VisionTransformer(TINY)
    with torch.device("meta"):
        vit = VisionTransformer(TINY)
    vit.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(vit(clip()), real(clip()))

def test_real_size_has_the_official_number_of_parameters():
    with torch.device("meta"):
        vit = VisionTransformer(ViTConfig())
    assert sum(p.numel() for p in vit.parameters()) == 290_477_056
    assert len(vit.state_dict()) == 301

def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 24, 24\), expected \(B, T, 3, 16, 16\)"):
        VisionTransformer(TINY)(clip(size=24))
    with pytest.raises(ValueError, match="expected"):
        VisionTransformer(TINY)(clip()[0])
    with pytest.raises(ValueError, match="img_size 50"):
        ViTConfig(img_size=50, patch_size=8)
    with pytest.raises(ValueError, match="7 heads"):
        ViTConfig(heads=7)
    with pytest.raises(ValueError, match='pos_table is "learned"'):
        ViTConfig(pos_table="learned")
