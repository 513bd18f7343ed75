"""What is cached is what the ViT computes, and with other clips, frames or weights it is computed again.

    pytest tests/test_feature_cache.py
"""
import json
import shutil
from itertools import pairwise

import pytest
import torch
from PIL import Image

import data
from infra.media import MediaError
from model import PRESETS
from training import feature_cache
from training.annotations import load_corpus
from video import Transform
from vit_video import VisionTransformer

@pytest.fixture
def world(tmp_path):
    """Three clips of a grey bar on the move, and one file that is no video."""
    for k in range(3):
        frames = [Image.new("L", (64, 64), 40 * k) for _ in range(8)]
        for i, frame in enumerate(frames):
            frame.paste(255, (4 * i, 10, 4 * i + 10, 30))
        frames[0].save(tmp_path / f"{k}.gif", save_all=True, append_images=frames[1:], duration=500, loop=0)
    (tmp_path / "3.gif").write_text("no video")
    entries = [{"video": f"{k}.gif", "caption": f"clip {k}"} for k in range(4)]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    return tmp_path

def clips(world, sampling="mvbench", crop=False, anno="captions.json"):
    cfg = PRESETS["micro"]()
    sources = load_corpus([[str(world / anno), str(world), "video"]])
    transform = Transform(cfg.vit.img_size, train=True, crop=crop)
    return data.VideoTextDataset(sources, cfg.align_frames, transform, sampling)

def vit():
    torch.manual_seed(0)
    return VisionTransformer(PRESETS["micro"]().vit).eval()

def test_features_are_the_vits_and_captions_stay_theirs(world, tmp_path):
    plain, kept, model = clips(world), clips(world), vit()
    kept.features = feature_cache.cache_features(model, kept, tmp_path / "kept", "cpu", batch=3)
    for index in range(3):
        with torch.no_grad():
            wanted = model(plain[index]["video"][None])[0]                 # (T, L, C)
        sample = kept[index]
        assert sample["text"] == f"clip {index}" and "video" not in sample
        torch.testing.assert_close(sample["features"], wanted, rtol=1e-3, atol=2e-3)   # kept in half precision

def test_an_unreadable_clip_is_replaced_with_its_caption(world, tmp_path):
    kept = clips(world)
    kept.features = feature_cache.cache_features(vit(), kept, tmp_path / "kept", "cpu")
    with pytest.raises(MediaError, match="3.gif: cannot be decoded"):
        kept.features[kept.path(3)]
    sample = kept[3]
    assert sample["text"] == "clip 0" and "3.gif" in sample["bad"][0]
    torch.testing.assert_close(sample["features"], kept[0]["features"])

def test_what_lies_there_is_used_again_unless_something_changed(world, tmp_path):
    folder, model = tmp_path / "kept", vit()
    made = feature_cache.cache_features(model, clips(world), folder, "cpu").path.stat().st_mtime_ns
    assert feature_cache.cache_features(model, clips(world), folder, "cpu").path.stat().st_mtime_ns == made
    some = clips(world)                                                    # fewer clips, another order: still there
    (world / "some.json").write_text(json.dumps([some.entries[0][2], some.entries[0][1]]))
    some = clips(world, anno="some.json")
    assert feature_cache.cache_features(model, some, folder, "cpu").path.stat().st_mtime_ns == made
    path, seen = some.path(0), [feature_cache.Features(folder)[some.path(0)]]
    assert path.endswith("2.gif") and len(seen[0]["seconds"]) == some.num_frames
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(1.5)
    seen.append(feature_cache.cache_features(model, clips(world), folder, "cpu")[path])
    shutil.copy(world / "1.gif", world / "2.gif")                          # another clip under the same name
    seen.append(feature_cache.cache_features(model, clips(world), folder, "cpu")[path])
    assert not any(torch.allclose(a["features"], b["features"]) for a, b in pairwise(seen))

def test_a_part_of_a_clip_is_refused_although_the_whole_is_kept(world, tmp_path):
    feature_cache.cache_features(vit(), clips(world), tmp_path / "kept", "cpu")
    entries = json.loads((world / "captions.json").read_text())
    entries[1] |= {"start": 0.0, "end": 2.0}
    (world / "captions.json").write_text(json.dumps(entries))
    cut = clips(world)
    with pytest.raises(ValueError, match="whole videos"):
        feature_cache.cache_features(vit(), cut, tmp_path / "kept", "cpu")

@pytest.mark.parametrize("options", [{"sampling": "rand"}, {"sampling": "official"}, {"crop": True}])
def test_clips_that_change_are_refused(world, tmp_path, options):
    with pytest.raises(ValueError, match="--cache-features"):
        feature_cache.cache_features(vit(), clips(world, **options), tmp_path / "kept", "cpu")
