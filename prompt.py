"""A conversation with a slot for the video, as ids and labels that are built together.

    ids     <s> i ###Human : <Video> -1 -1 .. -1 </Video> ###Human : What moves ? ###Assistant : A red kite . ###
    labels  .   . .        . .       .  .  .  .  .        .        . .    .     . .            . A red kite . ###

-1 is VIDEO: model.py puts a projected query there. A dot is IGNORE: no loss. A label is at the place of its own id; the
model shifts them. A text is joined first and tokenised once; then each id gets its label from the words that it covers,
so no length is ever guessed. Not here: the tokenizers (tokenizer.py) and what replaces VIDEO (model.py).

Source: the official videochat2_pt_vicuna.py (stage 2), videochat2_it_{vicuna,mistral}.py (stage 3), mvbench.ipynb.
Run:    python -m pytest tests/test_prompt.py
"""
import re
import sys
from dataclasses import dataclass
from itertools import groupby

import torch

VIDEO = -1     # the id of one video token
IGNORE = -100  # the label without a loss, as in F.cross_entropy

CAPTION_INSTRUCTIONS = {
    "video": (
        "Say briefly what happens in the video.", "Sum up this clip in a few words.", "What does the video show?",
        "Tell in one sentence what can be seen in this video.", "Give a short caption for the clip.",
        "Describe the following video concisely.", "Put the content of this video into plain words.",
        "Write down the main event of the video.", "What is going on in this clip? Keep it short.",
        "Report what the video presents, without detours."),
    "image": (
        "Say briefly what the image shows.", "Sum up this picture in a few words.", "What can be seen in the image?",
        "Tell in one sentence what this picture is about.", "Give a short caption for the image.",
        "Describe the following image concisely.", "Put the content of this picture into plain words.",
        "Write down the main thing in the image.", "What is depicted here? Keep it short.",
        "Report what the image presents, without detours."),
}

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n")
QUESTION_PROMPT = "Only give the best option."
ANSWER_PROMPT = "Best option:("  # the answer's beginning, so the next token is the letter of an option

@dataclass
class Prompt:
    ids: list     # ids of the LLM's tokenizer, VIDEO where a video token goes
    labels: list  # as long as ids: the id itself where it is to be learned, else IGNORE

    @property
    def slot(self):
        """Index of the first video token; ValueError in a prompt without video."""
        return self.ids.index(VIDEO)

def encode_spans(tok, spans):
    """Spans [(text, trained), ...], joined and tokenised once; an id is trained if its last character's span is.

        [(" ###Assistant: ", False), ("A red kite.", True)]  ->  labels . . . A red kite ."""
    trained_chars = [trained for text, trained in spans for _ in text]
    ids, ends = tok.encode_with_ends("".join(text for text, _ in spans))
    return Prompt(ids, [i if trained_chars[end] else IGNORE for i, end in zip(ids, ends, strict=True)])

def insert_slot(tok, before, n_video, after):
    """`<s>`, the text `before`, n_video times VIDEO, then the Prompt `after`."""
    head = tok.encode(before, bos=True) + [VIDEO] * n_video
    return Prompt(head + after.ids, [IGNORE] * len(head) + after.labels)

# -------------------------------------------------------------- training: captions in stage 2, conversations in stage 3

def caption_prompt(tok, caption, n_video, instruction, medium="video", max_text=512):
    """`###Human: <Video>[slot]</Video> {instruction} ###Assistant: ` and, trained, `{caption}###` (max_text ids).
    The official code tokenises the three texts apart, so that the caption starts with a space."""
    tag = medium.capitalize()
    target = tok.encode(caption + "###")[:max_text]
    request = tok.encode(f"</{tag}> {instruction} ###Assistant: ")
    after = Prompt(request + target, [IGNORE] * len(request) + target)
    return insert_slot(tok, f"###Human: <{tag}>", n_video, after)

def conversation_prompt(tok, turns, n_video, message="", medium="video", prompt_style="vicuna", max_text=512,
                        train_separators=False):
    """Instruction, video, questions and answers; trained: each answer and the end after it.

        vicuna   {i} ###Human: <Video>[slot]</Video> {message} ###Human: {q} ###Assistant: {a} ###
        mistral  {i} [INST] <Video>[slot]</Video> {message} [/INST] [INST] {q} [/INST] {a}</s>

    turns: [{"i": "Watch.", "q": "What moves?", "a": "A red kite."}, ...]; "i" is read from the first only, an empty q
    or i is left out. With `medium` "text" there is no slot. At most max_text ids remain besides the video's; ValueError
    if that would cut the slot."""
    if prompt_style not in ("vicuna", "mistral"):
        raise ValueError(f"prompt_style {prompt_style!r}: expected vicuna or mistral")

    # the texts on both sides of the slot
    human, closing = ("###Human:", "") if prompt_style == "vicuna" else ("[INST]", " [/INST]")
    instruction, message, tag = (turns[0].get("i") or "").rstrip(" "), message.strip(), medium.capitalize()
    if medium == "text":
        before, lead, n_video = "", f"{instruction} {message}".strip(), 0
    else:
        before = f"{instruction} {human} <{tag}>".lstrip(" ")
        lead = f"</{tag}> {message}".rstrip() + closing

    # all that follows the slot is one text, tokenised once
    spans = vicuna_turns(turns, train_separators) if prompt_style == "vicuna" else mistral_turns(turns)
    prompt = insert_slot(tok, before, n_video, encode_spans(tok, [(lead, False), *spans]))
    length = max_text + n_video
    if VIDEO in prompt.ids[length:]:
        raise ValueError(f"{prompt.slot} ids of text before the video: shorten the instruction or raise max_text")
    return Prompt(prompt.ids[:length], prompt.labels[:length])

def learnable_conversation(tok, turns, n_video, seconds=(), medium="video", prompt_style="vicuna", max_text=512,
                           train_separators=False):
    """-> (conversation_prompt, with the seconds of the frames as its message; whether an id of an answer is learned).
    If max_text leaves no room for the video, the prompt is the video alone: nothing is learned of it."""
    options = turns, n_video, seconds_message(seconds) if seconds else "", medium, prompt_style
    prompt = conversation_prompt(tok, *options, sys.maxsize, train_separators)
    length = max_text + n_video
    if VIDEO in prompt.ids[length:]:
        return insert_slot(tok, "", n_video, Prompt([], [])), False

    # subtle: with train_separators a label is no answer yet; but only a conversation that is cut may lack one
    is_cut = len(prompt.ids) > length
    answers = conversation_prompt(tok, *options, sys.maxsize) if train_separators and is_cut else prompt
    learns = any(label != IGNORE for label in answers.labels[:length])
    return Prompt(prompt.ids[:length], prompt.labels[:length]), learns

def seconds_message(seconds):
    """[0.31, 0.9] -> "The video contains 2 frames sampled at 0.3, 0.9 seconds.": part of the conversation."""
    times = ", ".join(str(round(s, 1)) for s in seconds)
    return f"The video contains {len(seconds)} frames sampled at {times} seconds."

def vicuna_turns(turns, train_separators):
    """Spans of ` ###Human: {q} ###Assistant: {a} ###`.

    # QUIRK videochat2_it_vicuna.py:268-281: the official labels also hold "###Human:" and "###Assistant:", which the
    # model never has to write; train_separators=True does the same. Otherwise only the ### after an answer is learned.
    """
    spans, after_answer = [], False
    for turn in turns:
        for role, text in (("Human", turn.get("q")), ("Assistant", turn["a"])):
            if text or role == "Assistant":
                spans += [(" ###", after_answer or train_separators), (f"{role}:", train_separators)]
                after_answer = role == "Assistant"
                spans += [(f" {text}", after_answer)]
    return [*spans, (" ###", True)]

def mistral_turns(turns):
    """Spans of ` [INST] {q} [/INST] {a}</s>`."""
    spans = []
    for turn in turns:
        question = f" [INST] {turn['q']} [/INST]" if turn.get("q") else ""
        spans += [(question, False), (f" {turn['a']}</s>", True)]
    return spans

# ----------------------------------------------------------------------------------------- generation: MVBench and chat

def mvbench_question(question, candidates):
    """`Question: {question}\\nOptions:\\n(A) ..\\n(B) ..\\n`; QUESTION_PROMPT comes next."""
    options = "\n".join(f"({chr(ord('A') + i)}) {candidate}" for i, candidate in enumerate(candidates))
    return f"Question: {question}\nOptions:\n{options}".rstrip() + "\n"

def mvbench_prompt(tok, question, candidates, n_video, system=SYSTEM, answer_prompt=ANSWER_PROMPT,
                   prompt_style="vicuna"):
    """The benchmark's prompt, up to the bracket before the answer's letter. `system` is in it twice. An empty system or
    answer_prompt gives the ablation of the paper's table 8 or 9."""
    text = system + mvbench_question(question, candidates) + QUESTION_PROMPT
    return chat_prompt(tok, [], text, n_video, system, prompt_style=prompt_style, answer_prompt=answer_prompt)

def chat_prompt(tok, history, question, n_video, instruction="", prompt_style="vicuna", answer_prompt=""):
    """A question about a video after `history`, a list of (question, answer); the LLM writes the next answer. Turns end
    in a newline, as in the official chat and benchmark, unlike those of training."""
    human, closing, turn, end = (
        ("###Human:", "\n", "###Human: {}\n###Assistant: {}", "\n") if prompt_style == "vicuna" else
        ("[INST]", " [/INST] ", "[INST] {} [/INST] {}", "</s>"))
    turns = end.join(turn.format(q, a) for q, a in [*history, (question, answer_prompt)])

    # subtle: no space at the end, also where the answer has no prompt; a generated answer begins with its own
    ids = tok.encode(f"</Video>{closing}{turns}".rstrip(" "))
    return insert_slot(tok, f"{instruction}{human} <Video>", n_video, Prompt(ids, [IGNORE] * len(ids)))

def is_finished(tok, ids):
    """Whether these new ids end an answer: with </s> or ###."""
    return ids[-1] == tok.eos_id or "###" in tok.decode(ids[-4:])

def decode_answer(tok, ids):
    """New ids -> the answer, without its end."""
    return tok.decode([i for i in ids if i != tok.eos_id]).split("###")[0].strip()

def decode_official(tok, ids):
    """New ids -> the answer as the official evaluation scores it: its first line counts.

    # QUIRK mvbench.ipynb answer: a final </s> stays in the text, and what stands before the last "Assistant:" is cut"""
    for special in (tok.unk_id, tok.bos_id):                   # one of each is removed from the start
        ids = ids[1:] if ids[:1] == [special] else ids

    # special tokens are spelt out, as by transformers' LlamaTokenizer
    names = {i: name for name, i in tok.special.items()}
    text = "".join("".join(map(names.get, run)) if is_special else tok.decode(list(run))
                   for is_special, run in groupby(ids, lambda i: i in names))
    return text.split("###")[0].split("Assistant:")[-1].strip()

def check_text(text):
    """ValueError for a text that has no UTF-8 or that no file takes: a lone surrogate, as of a cut emoji; or NUL."""
    if odd := re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"{ascii(text):.60} holds {ascii(odd[0])}, which is no character of a text")

# -------------------------------------------------------------------------------------------------------------- batches

def pad_batch(prompts, pad_id, side="right", multiple=8):
    """Prompts -> ids, labels, mask (1: token), each (B, S) torch.long. To generate, pad left: all rows end together."""
    ids, mask = pad_ids([prompt.ids for prompt in prompts], pad_id, side, multiple)
    labels, _ = pad_ids([prompt.labels for prompt in prompts], IGNORE, side, multiple)
    return ids, labels, mask

def pad_ids(rows, pad_id, side="right", multiple=8):
    """Lists of ids -> ids, mask, each (B, S); S is the longest row, rounded up: tensor cores need multiples of 8."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), length), pad_id)           # (B, S)
    mask = torch.zeros_like(ids)                            # (B, S)
    for i, row in enumerate(rows):
        columns = slice(len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, columns] = torch.tensor(row)
        mask[i, columns] = 1
    return ids, mask

def pack_rows(t, lengths):
    """Rows t (B, S, ...) of these lengths, one after another without the padding on their right: (1, N, ...)."""
    return torch.cat([row[:n] for row, n in zip(t, lengths, strict=True)])[None]

def add_packing(batch):
    """Adds to a batch of ids, labels and mask what the loss needs: lengths, a list of B ints, and targets (n,), the
    positions in the packed rows whose next id is learned. Computed later, on a GPU, this would sync it."""
    lengths = batch["mask"].sum(1).tolist()
    targets = (pack_rows(batch["labels"], lengths)[0, 1:] != IGNORE).nonzero()[:, 0]
    return batch | {"lengths": lengths, "targets": targets}
