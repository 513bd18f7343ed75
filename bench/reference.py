"""MVBench the plain way: one question at a time, each step where the official notebook has it. Slow, and easy to check.

    video, frame by frame -> ViT -> Q-Former -> prompt -> LLM, word by word -> first line

mvbench.py gives the same answers in a fraction of the time; bench.py and the tests hold the two against each other. The
LLM is ours, or transformers' LLaMA with peft's LoRA, on which the official code runs, with the same weights. Not here:
controls, files, scores. Source: mvbench.ipynb, infer_mvbench and the loop around it; conversation.py, answer.

    python bench.py mvbench --ckpt runs/toy/stage3
"""
import os
import time
from collections import defaultdict
from pathlib import Path

import decord
import numpy as np
import torch
from PIL import Image

from llama import KVCache
from prompt import SYSTEM, decode_answer, is_finished, mvbench_prompt, pad_ids
from video import FOLDER_FPS, NORMS, eval_frame_indices
from weights.checkpoint import find_llm, read_config


def read_clip(path, bound, cfg):
    """A video, or a folder of frames, decoded and resized one frame after the other -> (1, T, 3, size, size)."""
    if os.path.isdir(path):
        count = len(os.listdir(path))
        frames = (Image.open(Path(path) / f"{i:05d}.jpg").convert("RGB")
                  for i in eval_frame_indices(cfg.eval_frames, count, FOLDER_FPS, bound, 1))
    else:
        reader = decord.VideoReader(str(path), num_threads=1)
        last = len(reader) - 1
        frames = (Image.fromarray(reader[min(i, last)].asnumpy())
                  for i in eval_frame_indices(cfg.eval_frames, last, reader.get_avg_fps(), bound))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMS[cfg.eval_norm])
    shown = [(torch.from_numpy(np.array(sized(frame, cfg))).permute(2, 0, 1).float() / 255 - mean) / std
             for frame in frames]
    return torch.stack(shown)[None]


def sized(image, cfg):
    """Short side to the model's size, and the centre of it; or the whole, where the model takes no crops."""
    size = cfg.vit.img_size
    if not cfg.crop:
        return image.resize((size, size), Image.BICUBIC)
    short = min(image.size)
    image = image.resize((size * image.width // short, size * image.height // short), Image.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def own_llm(model, tok):
    """embeds (1, S, D) -> new ids: our LLaMA, one word after the other, with a cache."""
    llm = model.llama_model

    def generate(embeds):
        cache, new = KVCache(llm.cfg.depth), []
        while len(new) < 100 and not (new and is_finished(tok, new)):
            new.append(llm.lm_head(llm(embeds, cache=cache)[:, -1]).argmax(-1).item())
            embeds = llm.embed(torch.tensor([new[-1:]], device=embeds.device))
        return new
    return generate


def transformers_llm(model, tok, ckpt):
    """The same by transformers and peft, with the weights of our model's LLM and LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Complete(StoppingCriteria):
        def __call__(self, ids, scores, **more):
            return is_finished(tok, ids[0].tolist())

    cfg, record = read_config(ckpt)
    llm = LlamaForCausalLM.from_pretrained(find_llm(ckpt, record["llm"]["path"]), dtype=torch.float32)
    llm = get_peft_model(llm, LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=list(cfg.lora_names)))
    own = {name.replace("llama_model.", "base_model.model.").replace(".weight", ".default.weight"): t
           for name, t in model.state_dict().items() if "lora_" in name}
    unknown = llm.load_state_dict(own, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"peft has no {unknown[0]}")
    llm.to(model.device).eval()

    def generate(embeds):
        return llm.generate(inputs_embeds=embeds, max_new_tokens=100, num_beams=1, do_sample=False, min_length=1,
                            repetition_penalty=1.0, length_penalty=1.0, pad_token_id=tok.eos_id,
                            stopping_criteria=StoppingCriteriaList([Complete()]))[0].tolist()
    return generate


@torch.no_grad()
def answers(model, wordpiece, tok, questions, generate):
    """-> (the predictions, one after the other; seconds of each part)."""
    cfg, seconds, found = model.cfg, defaultdict(float), []
    n_video = cfg.n_query + cfg.n_extra
    for q in questions:
        marks = [time.perf_counter()]
        video = read_clip(q["media"], q["bound"], cfg).to(model.device)                        # (1, T, 3, H, W)
        marks.append(time.perf_counter())
        vision = model.encode_video(video)                                                           # (1, N, C)
        marks.append(time.perf_counter())
        words = wordpiece.encode(SYSTEM, min(cfg.max_text, cfg.qformer.max_positions), sep=True, truncate="left")
        tokens = model.video_tokens(vision, *(t.to(model.device) for t in pad_ids([words], wordpiece.pad_id)))   # (1, Q, D)
        marks.append(time.perf_counter())
        prompt = mvbench_prompt(tok, q["question"], q["candidates"], n_video, prompt_style=cfg.prompt_style)
        new = generate(model.insert_video_tokens(torch.tensor([prompt.ids], device=model.device), tokens))
        found.append("(" + decode_answer(tok, new).split("\n")[0].rstrip())
        marks.append(time.perf_counter())
        for part, begun, ended in zip(("data", "ViT", "Q-Former", "LLM"), marks[:-1], marks[1:], strict=True):
            seconds[part] += ended - begun
    return found, dict(seconds)
