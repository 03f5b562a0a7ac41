"""A short supervised start for a small pretrained model, on turns that a rule writes.

    python tests/real_start.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data DOCS --out START

A model of 135M parameters follows none of the paper's prompts: of its answers one in a hundred is
boxed and none is right, so that every group is flat and GRPO has nothing to learn from. Here it
learns the form from some documents of DOCS (data.py build), in 20 minutes on a core: a memory is
what stands around [MASK], then names, joined by semicolons; an answer is a name in a box. Names are
taken up by a coin, so that remembering well is left to MemTrain. START is a model folder for
train.py; its memtrain.json holds the prompts below and their sizes.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import distributed  # noqa: E402
import grpo  # noqa: E402
import train  # noqa: E402
from data import MASK  # noqa: E402
from rollout import Prompts  # noqa: E402

PROBLEM = "Which name does [MASK] hide?"
BLOCKS = "<section>\n{section}\n</section>\n<memory>\n{memory}\n</memory>\n"
UPDATE = "Note the names and dates of the section, and what is said of [MASK].\n"
TEMPLATES = {
    "update": UPDATE + "<problem>{problem}</problem>\n" + BLOCKS + "New memory:",
    "answer": "<memory>\n{memory}\n</memory>\n<problem>{problem}</problem>\nAnswer in a box.",
    "recall": BLOCKS + "Which name does [TARGET] hide? Answer in a box.",
}
SIZES = dict(chunk_tokens=80, max_chunks=2, memory_tokens=40, answer_tokens=14)
SIZES |= dict(prompt_order="chunk_first")


class Lesson(NamedTuple):
    documents: int  # the last ones that no lesson before took
    keep: float  # the chance that a name of the section is taken up
    words: int  # that a memory keeps on either side of [MASK]
    held: bool  # whether recalls ask for what the memory holds alone


LESSONS = [
    Lesson(documents=120, keep=0.5, words=8, held=False),
    Lesson(documents=112, keep=0.6, words=5, held=True),
]
LR, DOCUMENTS_PER_STEP = 2e-4, 4


def turns(setup, row, lesson, rng):
    """The turns of a document as the rule writes them: [(ids of the prompt, of the response), ..]"""
    cfg, prompts = setup.cfg, setup.prompts
    tokenizer, text = prompts.tokenizer, prompts.clean(row["text"])
    row = {**row, "text": text}

    # memories: what is said of [MASK], then names, as many as there is room for
    written, end, names, clue = [], [tokenizer.eos_token_id], [], []
    chunks, memories = train.chunks_of(setup, text), [prompts.no_memory]
    for chunk in chunks:
        part = text[chunk.start : chunk.end]
        spans = [(a, b) for a, b in row["entities"] if chunk.start <= a and b <= chunk.end]
        inside = dict.fromkeys(text[a:b] for a, b in spans if MASK not in text[a:b])
        names += [name for name in inside if name not in names and rng.random() < lesson.keep]
        if not clue and MASK in part:
            before, after = part.split(MASK, 1)
            clue = [*before.split()[-lesson.words :], MASK, *after.split()[: lesson.words]]
        memory = []
        for said in [" ".join(clue), *names] if clue else names:
            longer = prompts.encode("; ".join([*memory, said]))
            if len(longer) > cfg.memory_tokens - 2:
                break
            memory.append(said)
        ids = prompts.encode("; ".join(memory))
        prompt = prompts.update(problem=prompts.problem, memory=memories[-1], section=chunk.ids)
        written.append((prompt, ids + end))
        memories.append(ids)

    # the answer, and one recall of anything or two of what the memory holds
    prompt = prompts.answer(problem=prompts.problem, memory=memories[-1])
    written.append((prompt, prompts.encode(f"\\boxed{{{row['answer']}}}") + end))
    asked = set()
    for _ in range(12 if lesson.held else 1):
        drawn = data.draw_recall(row, chunks, tokenizer, cfg.chunk_tokens, rng)
        if drawn is None or drawn.target in asked:
            continue
        memory = memories[drawn.k]
        if not lesson.held or drawn.target in tokenizer.decode(memory):
            asked.add(drawn.target)
            prompt = prompts.recall(memory=memory, section=drawn.ids)
            written.append((prompt, prompts.encode(f"\\boxed{{{drawn.target}}}") + end))
        if len(asked) == 2:
            break
    return written


def learn(policy, documents):
    """Maximum likelihood of the turns of these documents, every turn with the same weight."""
    optimizer = torch.optim.AdamW(policy.parameters(), LR, betas=(0.9, 0.99), weight_decay=0.0)
    steps = len(documents) // DOCUMENTS_PER_STEP
    for step in range(steps):
        first = step * DOCUMENTS_PER_STEP
        batch = sum(documents[first : first + DOCUMENTS_PER_STEP], [])
        prompts, responses = map(list, zip(*batch))
        total = 0.0
        for pack in grpo.pack(prompts, responses, tokens_per_forward=4096):
            logps = policy([prompts[i] for i in pack], [responses[i] for i in pack])
            loss = -sum(values.mean() for values in logps) / len(batch)
            loss.backward()
            total += loss.item()
        for settings in optimizer.param_groups:
            settings["lr"] = LR * min(1, (step + 1) / 5) * (1 - step / steps)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:02d}/{steps} | loss {total:.3f}", flush=True)


@distributed.one_line_errors(data.InputError)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hub name, or folder with a checkpoint")
    parser.add_argument("--data", required=True, help="folder that data.py build wrote")
    parser.add_argument("--out", required=True, help="folder for the model")
    args = parser.parse_args(argv)
    rows, wanted = list(data.load_documents(args.data, "train")), sum(x.documents for x in LESSONS)
    if len(rows) < wanted:
        raise data.InputError(f"{args.data}: {len(rows)} documents, {wanted} are wanted")
    lm, tokenizer = distributed.load_model(args.model, torch.float32)
    prompts = Prompts(tokenizer, TEMPLATES, PROBLEM, SIZES["prompt_order"])
    setup = train.Setup(train.Config(**SIZES), prompts, None)
    policy = grpo.Policy(lm).train()
    for lesson in LESSONS:
        rng, rows, taken = random.Random(0), rows[: -lesson.documents], rows[-lesson.documents :]
        learn(policy, [turns(setup, row, lesson, rng) for row in taken])

    lm.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    own = {"problem": PROBLEM, "templates": TEMPLATES, "settings": {"all": SIZES}}
    Path(args.out, "memtrain.json").write_text(json.dumps(own, indent=2) + "\n")


if __name__ == "__main__":
    main()
