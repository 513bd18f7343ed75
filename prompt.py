"""A conversation with a slot for the video, as ids and labels that are built together.

    ids     <s> i ###Human : <Video> -1 -1 .. -1 </Video> ###Human : What moves ? ###Assistant : A red kite . ###
    labels  .   . .        . .       .  .  .  .  .        .        . .    .     . .            . A red kite . ###

-1 is VIDEO: model.py puts a projected query there. A dot is IGNORE: no loss. Labels stand under their own ids; the
model shifts them. A text is joined first and tokenised once; each id then takes its label from the words it lies in, so
no length is ever guessed. The formats are those of the official videochat2_pt_vicuna.py (stage 2),
videochat2_it_vicuna.py and _mistral.py (stage 3) and mvbench.ipynb. Not here: the tokenizers (tokenizer.py), and what
becomes of VIDEO (model.py).

    pytest tests/test_prompt.py
"""
from dataclasses import dataclass

import torch

VIDEO = -1      # the id that marks one video token
IGNORE = -100   # the label that takes no part in the loss, as in F.cross_entropy

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
ANSWER_PROMPT = "Best option:("  # what the answer begins with, so that the option's letter comes next


@dataclass
class Prompt:
    ids: list     # ids of the LLM's tokenizer, VIDEO where a video token goes
    labels: list  # as long as ids: the id itself where it is to be learnt, else IGNORE
    soft: range = range(0)  # where words stand for a video's tokens and are to be blurred (standins.soft_embed)

    @property
    def slot(self):
        """Index of the first video token; ValueError in a prompt without video."""
        return self.ids.index(VIDEO)

    def fill(self, ids, places=None):
        """Puts the ids of a text in the video's place: at these of its places, or one after another from its first."""
        begin = self.slot
        for place, i in zip(range(len(ids)) if places is None else places, ids, strict=True):
            self.ids[begin + place] = i


def join(tok, parts):
    """One tokenisation of `parts`, a list of (text, trained): an id is trained if its last character's part is."""
    trained = [train for text, train in parts for _ in text]  # of each character
    ids, ends = tok.encode_with_ends("".join(text for text, _ in parts))
    return Prompt(ids, [i if trained[end] else IGNORE for i, end in zip(ids, ends, strict=True)])


def with_video(tok, before, n_video, after):
    """`<s>`, the text `before`, the slot, the prompt `after`."""
    head = tok.encode(before, bos=True) + [VIDEO] * n_video
    return Prompt(head + after.ids, [IGNORE] * len(head) + after.labels)


# ---- stage 2: captions -----------------------------------------------------------------------------------------------

def caption_prompt(tok, caption, n_video, instruction, medium="video", max_text=512):
    """`###Human: <Video>[slot]</Video> {instruction} ###Assistant: ` and, trained, `{caption}###` (max_text ids).

    Source: videochat2_pt_vicuna.py; every piece is tokenised on its own there, so the caption brings its own space.
    """
    tag = medium.capitalize()
    target = tok.encode(caption + "###")[:max_text]
    asked = tok.encode(f"</{tag}> {instruction} ###Assistant: ")
    after = Prompt(asked + target, [IGNORE] * len(asked) + target)
    return with_video(tok, f"###Human: <{tag}>", n_video, after)


# ---- stage 3: conversations ------------------------------------------------------------------------------------------

def conversation_prompt(tok, qas, n_video, message="", medium="video", prompt_style="vicuna", max_text=512,
                        train_separators=False):
    """Instruction, video, and questions with answers; what is learnt: each answer and the mark that ends it.

        vicuna   {i} ###Human: <Video>[slot]</Video> {message} ###Human: {q} ###Assistant: {a} ###
        mistral  {i} [INST] <Video>[slot]</Video> {message} [/INST] [INST] {q} [/INST] {a}</s>

    `qas`: dicts of "q", "a" and, read from the first alone, "i"; an empty q or i is left out. With `medium`
    "text" there is no slot. At most max_text ids remain beside the video's; ValueError if that would cut the slot.
    Source: it_dataset.py, videochat2_it_vicuna.py and videochat2_it_mistral.py.
    """
    if prompt_style not in ("vicuna", "mistral"):
        raise ValueError(f"prompt_style {prompt_style!r}: expected vicuna or mistral")
    human, closing = ("###Human:", "") if prompt_style == "vicuna" else ("[INST]", " [/INST]")
    turns = vicuna_turns(qas, train_separators) if prompt_style == "vicuna" else mistral_turns(qas)
    instruction, message, tag = (qas[0].get("i") or "").rstrip(" "), message.strip(), medium.capitalize()
    if medium == "text":
        before, lead, n_video = "", f"{instruction} {message}".strip(), 0
    else:
        before = f"{instruction} {human} <{tag}>".lstrip(" ")
        lead = f"</{tag}> {message}".rstrip() + closing
    prompt = with_video(tok, before, n_video, join(tok, [(lead, False), *turns]))
    return cut(prompt, max_text + n_video)


def vicuna_turns(qas, train_separators):
    """(text, trained) parts: ` ###Human: {q} ###Assistant: {a} ###`.

    # QUIRK videochat2_it_vicuna.py:268-281: the official labels also hold "###Human:" and "###Assistant:", which the
    # model never has to say; train_separators=True does so too. Else only the ### behind an answer, its end, is learnt.
    """
    turns = [turn for qa in qas for turn in (("Human", qa.get("q") or ""), ("Assistant", qa["a"]))
             if turn != ("Human", "")]
    parts, answered = [], False
    for role, text in turns:
        parts += [(" ###", answered or train_separators), (f"{role}:", train_separators)]
        answered = role == "Assistant"
        parts += [(f" {text}", answered)]
    return [*parts, (" ###", True)]


def mistral_turns(qas):
    """(text, trained) parts: ` [INST] {q} [/INST] {a}</s>`."""
    parts = []
    for qa in qas:
        parts += [(f" [INST] {qa['q']} [/INST]", False)] if qa.get("q") else []
        parts += [(f" {qa['a']}</s>", True)]
    return parts


def cut(prompt, length):
    """The first `length` ids; the slot must survive whole."""
    if VIDEO in prompt.ids[length:]:
        raise ValueError(f"{prompt.slot} ids of text before the video: shorten the instruction or raise max_text")
    return Prompt(prompt.ids[:length], prompt.labels[:length])


# ---- asking: MVBench and chat ----------------------------------------------------------------------------------------

def mvbench_question(question, candidates):
    """`Question: {question}\\nOptions:\\n(A) ..\\n(B) ..\\n`; QUESTION_PROMPT comes next. Source: mvbench.ipynb."""
    options = "\n".join(f"({chr(ord('A') + i)}) {candidate}" for i, candidate in enumerate(candidates))
    return f"Question: {question}\nOptions:\n{options}".rstrip() + "\n"


def mvbench_prompt(tok, question, candidates, n_video, system=SYSTEM, answer_prompt=ANSWER_PROMPT, prompt_style="vicuna"):
    """The benchmark's prompt, up to the bracket that the answer's letter follows. `system` stands in it twice.

    An empty system or answer_prefix is the paper's table 8 or 9 without it.
    """
    asked = system + mvbench_question(question, candidates) + QUESTION_PROMPT
    return chat_prompt(tok, [], asked, n_video, instruction=system, prompt_style=prompt_style, answer_prompt=answer_prompt)


def chat_prompt(tok, history, question, n_video, instruction="", medium="video", prompt_style="vicuna", answer_prompt=""):
    """A question about a video after `history`, a list of (question, answer); the answer is to follow.

    Turns end in a newline and ###, unlike in training: so did the official chat and benchmark (mvbench.ipynb).
    """
    tag = medium.capitalize()
    if prompt_style == "vicuna":
        before, after = f"{instruction}###Human: <{tag}>", f"</{tag}>\n"
        for q, a in history:
            after += f"###Human: {q}\n###Assistant: {a}\n"
        after += f"###Human: {question}\n###Assistant: {answer_prompt}".rstrip(" ")
    else:
        before, after = f"{instruction}[INST] <{tag}>", f"</{tag}> [/INST] "
        for q, a in history:
            after += f"[INST] {q} [/INST] {a}</s>"
        after += f"[INST] {question} [/INST] {answer_prompt}".rstrip(" ")
    ids = tok.encode(after)
    return with_video(tok, before, n_video, Prompt(ids, [IGNORE] * len(ids)))


# ---- batches ---------------------------------------------------------------------------------------------------------

def is_finished(tok, ids):
    """Whether new ids end an answer: by </s> or ###."""
    return ids[-1] == tok.eos_id or "###" in tok.decode(ids[-4:])


def decode_answer(tok, ids):
    """New ids -> the answer without what ended it."""
    return tok.decode([i for i in ids if i != tok.eos_id]).split("###")[0].strip()


def pad_batch(prompts, pad_id, side="right", multiple=8):
    """ids, labels, mask (1: token, 0: padding), all (B, S) of torch.long, S the longest rounded up to a multiple.

    Training pads on the right; generation on the left, so that all rows end together.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    length = -(-longest // multiple) * multiple            # tensor cores like multiples of 8
    ids = torch.full((len(prompts), length), pad_id)       # (B, S)
    labels = torch.full_like(ids, IGNORE)                  # (B, S)
    mask = torch.zeros_like(ids)                           # (B, S)
    for row, prompt in enumerate(prompts):
        n = len(prompt.ids)
        here = slice(n) if side == "right" else slice(length - n, length)
        ids[row, here] = torch.tensor(prompt.ids)
        labels[row, here] = torch.tensor(prompt.labels)
        mask[row, here] = 1
    return ids, labels, mask


def pad_ids(rows, pad_id):
    """Lists of ids -> ids, mask (B, S), padded on the right."""
    ids, _, mask = pad_batch([Prompt(row, row) for row in rows], pad_id)
    return ids, mask


def pack_rows(t, lengths):
    """Rows t (B, S, ...) of these lengths, without the padding on their right, one after another: (1, N, ...)."""
    return torch.cat([row[:n] for row, n in zip(t, lengths, strict=True)])[None]


def add_packing(batch):
    """A batch of texts with what the loss must know of them; a GPU, asked for it, would have to be waited for.

    Adds lengths, a list of B, and targets (n,): the places, in the texts end to end, whose next word is learnt.
    """
    lengths = batch["mask"].sum(1).tolist()
    targets = (pack_rows(batch["labels"], lengths)[0, 1:] != IGNORE).nonzero()[:, 0]
    return batch | {"lengths": lengths, "targets": targets}
