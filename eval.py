"""Evaluation: MemTrain's tasks on held-out documents, long-text QA by length, search QA by set.
Looking: questions about a text of one's own, what memories hold, what they forget, curves.

    python eval.py memtrain --model runs/memtrain --data DOCS      end-to-end and recall, held out
    python eval.py longqa --model M --data eval_50.json eval_100.json --out FILE.json
    python eval.py longqa --model M --data eval_50.json --mode full_context --out FILE.json
    python eval.py searchqa --model M --data nq=nq.jsonl hp=hp.jsonl --retriever URL --out FILE.json
    python eval.py filter --model M --data FILE --out FILE.jsonl   drops what needs no context
    python eval.py ask --model M --document FILE "question" ..     reads a text, shows each memory
    python eval.py view runs/memtrain --out page.html              transcripts of a run, as a page
    python eval.py forgetting --model M --data DOCS --out FILE.json [--png FILE]   recall by age
    python eval.py curves runs/a runs/b FILE.json --out curves.png
    torchrun --nproc_per_node 8 eval.py ..                         samples divided over ranks

Prompts, sizes and, without --data, held-out data are those of the model's memtrain.json; flags go
before it. Documents are read whole, however long.

Every finished sample is a line in OUT.parts/, and tables are made of those lines: a stopped
evaluation goes on where it was. The noise is a function of (set, question, sample), so that neither
stopping nor the number of ranks changes a table. An answer that is missing, empty or cut before its
box is closed counts as wrong. Below a table of longqa stands what the authors' released code would
count: the first gold only, and empty outputs not at all.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import html
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import distributed
import rewards
import train
from distributed import InputError, all_gather, gathered
from rollout import Asker, Reader, Recaller, Searcher, rollout

SCORES = {
    "em": rewards.exact_match,
    "sub_em": rewards.sub_exact_match,
    "f1": rewards.token_f1,
    "memagent_sub_em": rewards.memagent_sub_em,
}
# flags of train.py that are flags here
SETTINGS = (
    "chunk_tokens memory_tokens answer_tokens prompt_order kv_tokens segment retriever encoder "
    "passages result_tokens objectives turns eval_documents seed ner recall_window"
).split()

# ------------------------------------------------------------------------ command line and model


def parse(argv=None):
    """Command line -> its flags; those of train.py are there only where they were given."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=list(COMMANDS))
    add(
        "inputs",
        nargs="*",
        default=[],
        help="runs and tables (curves), a run (view), questions (ask)",
    )
    add("--model", help="Hub name, folder with a checkpoint, or folder of a run")
    add("--data", nargs="+", help="[NAME=]FILE .. of questions, folders of documents (memtrain)")
    add("--document", help="a text in UTF-8; - is what comes in (ask)")
    add("--out", help="the table as JSON; questions left (filter); picture (curves); page (view)")
    add("--quiet", action="store_true", help="print the answers alone (ask)")
    add("--html", help="the memories and answers as a page (ask)")
    add("--png", help="the curve as a picture (forgetting)")
    modes = ("memory", "full_context")
    add("--mode", choices=modes, default="memory", help="of reading (longqa, ask)")
    add("--greedy", action="store_true", help="temperature 0")
    add("--temperature", type=float, default=0.7, help="[0.7]; memtrain: as in training")
    add("--top_p", type=float, default=0.95, help="[0.95]; memtrain: 1")
    add("--samples", type=int, default=1, help="answers to every question [1]")
    add("--batch", type=int, default=32, help="samples in lock step on a rank [32]")
    train.add_flags(parser, SETTINGS)
    args = parser.parse_intermixed_args(argv)  # questions may stand after flags

    for name in COMMANDS[args.command].needs:
        if not (getattr(args, name[2:]) if name.startswith("--") else args.inputs):
            raise InputError(f"{args.command} needs {name}")
    return args


def config_of(args):
    """Flags -> train.Config, filled up from the model's memtrain.json."""
    task = COMMANDS[args.command].task
    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    given |= {"task": task, "model": args.model, "max_chunks": 10**9}
    if args.data:
        given["data"] = args.data
    return train.configure(given)


def open_model(args, cfg):
    """-> (Setup, Policy)"""
    device = distributed.start_ranks()
    policy, tokenizer = train.open_policy(cfg.model, device)
    policy.eval()
    search = train.open_search(cfg)
    kv_tokens = cfg.kv_tokens or distributed.kv_budget(policy.lm, device, trained=False)
    temperature, top_p = args.temperature, args.top_p
    if cfg.task == "memtrain":
        temperature, top_p = cfg.temperature, 1.0
    if args.greedy:
        temperature = 0
    sampling = dict(kv_tokens=kv_tokens, search=search, temperature=temperature, top_p=top_p)
    return train.open_setup(cfg, policy, tokenizer, **sampling), policy


def load_sets(args, cfg):
    """[NAME=]FILE .., or the held-out files of the model's settings -> {name: questions}"""
    sets = {}
    for place in args.data or cfg.heldout:
        name, path = re.fullmatch(r"(?:([^=/]+)=)?(.+)", place).groups()
        name = name or Path(path).name.split(".")[0]
        if name in sets:
            raise InputError(f"--data: two sets are called {name}; write NAME={path}")
        objectives = cfg.objectives if cfg.task == "searchqa" else None
        sets[name] = data.load_questions(path, objectives, long=args.command == "longqa")
    if not sets:
        raise InputError(f"--model {cfg.model} names no held-out questions: add --data FILE ..")
    return sets


# ---------------------------------------------------------------------------- samples to records


class WholeReader(Asker):
    """Reads a document (ids) in one window of `context` tokens; of a longer one head and tail."""

    def __init__(self, prompts, problem, document, context, answer_tokens, key):
        room = context - len(prompts.whole) - len(problem) - answer_tokens
        if room <= 0:
            raise InputError(
                f"--answer_tokens {answer_tokens} leaves no room for a document in the model's "
                f"context of {context} tokens: lower it"
            )
        self.document_tokens = len(document)
        self.document_cut = len(document) > room
        if self.document_cut:
            head, tail = (room + 1) // 2, room // 2
            document = document[:head] + document[len(document) - tail :]
        ids = prompts.whole(problem=problem, section=document)
        super().__init__(prompts, ids, answer_tokens, key)


def make_agent(args, setup, row, key, context):
    """The agent that answers the question of a row; context: tokens of the model's window."""
    cfg, prompts = setup.cfg, setup.prompts
    problem = prompts.encode(row["question"])
    if args.command == "searchqa":
        return Searcher(prompts, problem, cfg.turns, cfg.answer_tokens, cfg.result_tokens, key)
    if args.command == "filter":
        return Asker(prompts, prompts.closed_book(problem=problem), cfg.answer_tokens, key)
    chunks = [chunk.ids for chunk in train.cut(setup, prompts.clean(row["context"]))]
    if args.mode == "full_context":
        document = list(itertools.chain(*chunks))
        return WholeReader(prompts, problem, document, context, cfg.answer_tokens, key)
    reader = ShownReader if args.command == "ask" and not args.quiet else Reader
    return reader(prompts, problem, chunks, cfg.memory_tokens, cfg.answer_tokens, key)


def record_of(agent, row):
    """What is kept of a finished sample: scores in 0..1, the answer, sizes in tokens."""
    # answers and their golds: several, by position, where several questions were asked at once
    if isinstance(agent, Searcher):
        golds = row["answers"]
        answers = rewards.split_answers(agent.answer, len(golds))
    else:
        golds = [row["answers"]]
        answers = [rewards.extract_boxed(agent.answer)]

    record = {name: train.mean(map(score, answers, golds)) for name, score in SCORES.items()}
    sizes = [len(turn.prompt_ids) + len(turn.response_ids) for turn in agent.turns]
    record |= {
        "unanswered": answers.count(None) / len(answers),
        "answer": agent.answer,
        "truncated": float(any(turn.truncated for turn in agent.turns)),
        "turns": len(agent.turns),
        "tokens": sum(sizes),
        "peak_context": max(sizes),
    }
    if isinstance(agent, Reader):
        record["document_tokens"] = sum(map(len, agent.chunks))
    if isinstance(agent, WholeReader):
        record["document_tokens"] = agent.document_tokens
        record["document_cut"] = float(agent.document_cut)
    if isinstance(agent, Searcher):
        record |= {"searches": agent.searches, "malformed": float(agent.malformed)}
    return record


def open_parts(args, cfg):
    """Makes OUT.parts/. ValueError where it holds samples of another model or other settings."""
    free = ("data", "out", "samples", "batch", "kv_tokens", "segment")  # no sample depends on them
    flags = {name: value for name, value in vars(args).items() if name not in free}
    flags["model"] = cfg.model
    file = Path(f"{args.out}.parts", "flags.json")
    if file.exists() and json.loads(file.read_text()) != flags:
        raise InputError(
            f"{file.parent} holds samples of another model or other flags, see {file.name} there: "
            "delete it, or choose another --out"
        )
    write_json(file, flags)


def read_parts(out, name):
    """The finished samples of a set: {(question, sample): record}"""
    done = {}
    for path in Path(f"{out}.parts").glob(f"{name}.rank*.jsonl"):
        with path.open() as lines:
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):  # the last may be broken off
                    record = json.loads(line)
                    done[record["index"], record["sample"]] = record
    return done


def run_set(args, setup, policy, name, rows):
    """Runs what OUT.parts/ lacks of a set. -> records of all ranks, by question and sample"""
    # this rank's part of it
    done = read_parts(args.out, name)
    torch.distributed.barrier()  # all ranks have read before any writes
    wanted = list(itertools.product(range(len(rows)), range(args.samples)))
    missing = [key for key in wanted if key not in done]
    rank, world = distributed.rank(), distributed.world_size()
    mine = missing[rank::world]

    context = policy.lm.config.get_text_config().max_position_embeddings
    bar = tqdm(total=len(missing), desc=name, disable=rank > 0)
    path = Path(f"{args.out}.parts", f"{name}.rank{rank}.jsonl")
    with torch.no_grad(), gathered(policy), path.open("a") as file:
        file.write("\n")  # ends a line that broke off
        for first in range(0, len(mine), args.batch):
            # a batch of samples in lock step
            batch = mine[first : first + args.batch]
            agents = []
            for index, sample in batch:
                key = (name, index, sample)
                agents.append(make_agent(args, setup, rows[index], key, context))
            rollout(agents, setup.sampler, setup.search)

            # a line for each
            for (index, sample), agent in zip(batch, agents):
                record = {"index": index, "sample": sample, "id": rows[index]["id"]}
                record |= record_of(agent, rows[index])
                done[index, sample] = record
                file.write(json.dumps(record) + "\n")
            file.flush()
            bar.update(len(batch) * world)
    bar.close()

    done = collections.ChainMap(*all_gather(done))
    return [done[key] for key in wanted]


# ---------------------------------------------------------------------------------------- tables


def summary(records):
    """A row of a table: means over questions; of scores [mean, low, high], a 95 % interval.

    Samples of one question are not independent: they are averaged first."""
    samples = {}  # of every question
    for record in records:
        samples.setdefault(record["index"], []).append(record)
    row = {"n": len(samples)}
    for name in records[0]:
        if name not in ("index", "sample", "id", "answer"):
            means = [train.mean(record[name] for record in each) for each in samples.values()]
            row[name] = list(train.interval(means)[:3]) if name in SCORES else train.mean(means)
    return row


def print_table(table):
    """{set: row} as Markdown, scores in percent; on rank 0."""
    columns = list(dict.fromkeys(itertools.chain(*table.values())))
    cells = [["set", *columns]]
    for name, row in table.items():
        cells.append([name, *(cell(row.get(column, "")) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells if distributed.rank() == 0 else []:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")


def cell(value):
    """
    >>> cell([0.5, 0.4, 0.625]), cell(28131.25), cell(128)
    ('50.00 [40.0, 62.5]', '28131.25', '128')
    """
    if isinstance(value, list):
        mean, low, high = value
        return f"{100 * mean:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write_json(path, value):
    if distributed.rank() == 0:
        with data.whole_or_nothing(path) as partial:
            partial.write_text(json.dumps(value, indent=2) + "\n")


# ------------------------------------------------------------------------------------- measuring


def memtrain(args):
    """E2E and recall exact match on held-out documents, as train.py prints them."""
    cfg = config_of(args)
    setup, policy = open_model(args, cfg)
    rows = heldout_documents(cfg)
    train.check_budget(setup, rows, policy.lm)
    table = {}
    for kind, (*score, n) in train.evaluate(setup, policy, {"memtrain": rows}).items():
        table[train.KINDS[kind]] = {"n": n, "em": score}
    print_table(table)
    if args.out:
        write_json(args.out, table)


def heldout_documents(cfg):
    """The first eval_documents of what --data holds out; of a file, of all its documents."""
    rows = []
    for path in cfg.data:
        documents = train.heldout_documents(cfg, path)
        rows += [documents[i] for i in range(min(cfg.eval_documents - len(rows), len(documents)))]
    return rows


def questions(args):
    """Answers all sets of questions; then a table (longqa, searchqa), or what is left (filter)."""
    cfg = config_of(args)
    sets = load_sets(args, cfg)
    setup, policy = open_model(args, cfg)
    open_parts(args, cfg)
    records = {}
    for name, rows in sets.items():
        if args.command != "filter" and args.mode == "memory":
            train.check_budget(setup, rows, policy.lm)
        records[name] = run_set(args, setup, policy, name, rows)
    if args.command == "filter":
        write_questions(args.out, sets, records)
    else:
        write_table(args.out, cfg, sets, records)


def write_table(out, cfg, sets, records):
    """A row for every set, then their average. Its interval is wide enough for sets that ask the
    same questions, as files of several lengths do; for others it is wider than need be."""
    table = {name: summary(records[name]) for name in records}
    if len(table) > 1:
        rows, average = list(table.values()), {}
        for score in SCORES:
            average[score] = [train.mean(column) for column in zip(*(row[score] for row in rows))]
        table["average"] = average
    print_table(table)
    record = {"command": sys.argv[1:], "config": dataclasses.asdict(cfg), "table": table}
    if cfg.task == "longqa":
        record["released"] = {name: released_em(sets[name], records[name]) for name in records}
        print_released(table, record["released"])
    write_json(out, record)


def released_em(rows, records):
    """Exact match as the authors' released code counts it: only the first gold counts, and empty
    outputs are left out instead of being wrong. -> {"em": share or None, "n": outputs counted}"""
    scores = []
    for record in records:
        if (record["answer"] or "").strip():
            golds = rows[record["index"]]["answers"]
            scores.append(rewards.exact_match(rewards.extract_boxed(record["answer"]), golds[:1]))
    return {"em": train.mean(scores) if scores else None, "n": len(scores)}


def print_released(table, released):
    """The line below the table: the difference that the other arithmetic makes; on rank 0."""
    parts = []
    for name, counted in released.items():
        theirs = "-" if counted["em"] is None else f"{100 * counted['em']:.2f}"
        parts.append(
            f"{name} {theirs} of {counted['n']} outputs (em above: {cell(table[name]['em'])})"
        )
    if distributed.rank() == 0:
        print("em as the released code counts, first gold only, empty outputs left out:")
        print("\n".join(parts))


def write_questions(out, sets, records):
    """Drops the questions that were answered without their context, in any of the samples."""
    left = []
    for name, rows in sets.items():
        known = {record["index"] for record in records[name] if record["em"] == 1}
        left += [row for index, row in enumerate(rows) if index not in known]
    if distributed.rank() == 0:
        with data.whole_or_nothing(out) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in left))
        print(f"{out}: {len(left)} of {sum(map(len, sets.values()))} questions are left")


# ------------------------------------------------------------------------------------------- ask


class ShownReader(Reader):
    """A Reader that prints its memories as it writes them. Its key: ("ask", number)."""

    def receive(self, response_ids):
        super().receive(response_ids)
        if self.answer is None:
            turn, memory = len(self.memories) - 1, self.prompts.text(self.memories[-1])
            place = f"question {self.key[1] + 1}, memory after section {turn} of {len(self.chunks)}"
            print(f"\n--- {place}\n{memory}", flush=True)


def ask(args):
    """Reads a text and answers questions about it; once for each, as a memory depends on its
    question. Every rank reads for itself (a model may need several GPUs), the first one shows."""
    if not all(question.strip() for question in args.inputs):
        raise InputError('ask: a question is empty; write it in quotes: "who wrote it?"')
    if args.document == "-" and "RANK" in os.environ:
        raise InputError("--document -: ranks of torchrun can't share what comes in; name a file")
    text = read_text(args.document)
    args.data = [args.document]
    cfg = config_of(args)
    setup, policy = open_model(args, cfg)
    args.quiet = args.quiet or distributed.rank() > 0
    rows = []
    for question in args.inputs:
        row = {"id": args.document, "question": question, "context": text, "answers": []}
        rows.append(row)
    if args.mode == "memory":
        train.check_budget(setup, rows, policy.lm)

    # how much there is to read
    sizes = [len(chunk.ids) for chunk in train.cut(setup, setup.prompts.clean(text))]
    if not args.quiet:
        often = f", read {len(rows)} times: a memory depends on its question"
        pieces = f"{sum(sizes)} tokens, {len(sizes)} sections of at most {cfg.chunk_tokens}"
        print(f"{args.document}: {pieces}{often if len(rows) > 1 else ''}")

    # read and answer
    agents = []
    context = policy.lm.config.get_text_config().max_position_embeddings
    for number, row in enumerate(rows):
        agents.append(make_agent(args, setup, row, ("ask", number), context))
    with torch.no_grad(), gathered(policy):
        rollout(agents, setup.sampler)
    if distributed.rank() == 0:
        print_answers(args, agents)
    if args.html and distributed.rank() == 0:
        records = []
        for agent, row in zip(agents, rows):
            group = train.Group("trajectory", 0, [agent], [], [])
            records.append(train.transcript(setup, [group], None, 0, row))
        write_page(args.html, f"{args.model}: {args.document}", records)


def read_text(path):
    """The text of a file in UTF-8, or of what comes in (-). InputError where there is none."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--document {path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"--document {path}: byte {error.start} is not UTF-8: a text is wanted, .txt or .md; "
            "convert it first"
        ) from None
    if "\0" in text or not text.strip():
        raise InputError(f"--document {path}: holds no text: a .txt or .md is wanted")
    return text


def print_answers(args, agents):
    """The answers: what is boxed, where anything is. With --quiet nothing else, a line each."""
    for question, agent in zip(args.inputs, agents):
        answer = rewards.extract_boxed(agent.answer) or agent.answer.strip()
        if args.quiet:
            print(" ".join(answer.split()))
            continue
        if isinstance(agent, WholeReader) and agent.document_cut:
            print("note: the text outgrows the model's context, its middle was left out")
        if agent.turns[-1].truncated:
            print("note: --answer_tokens cut the answer")
        print(f"\nquestion: {question}\nanswer:   {answer}")


# ------------------------------------------------------------------------------------------ view

VIEWED = 48  # most transcripts of a page, spread over a longer run
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>%(title)s</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 80em; margin: auto; padding: 0 1em 3em }
article { display: none } article:target { display: block }
body:not(:has(:target)) article:first-of-type { display: block }
h2, td, pre { unicode-bidi: plaintext } h2, pre, td:first-child { overflow-wrap: anywhere }
h4 { margin: 0; color: #555; font-weight: 500 } nav, table { margin: .7em 0; line-height: 1.7 }
pre { font: inherit; margin: .2em 0; white-space: pre-wrap; max-height: 60vh; overflow-y: auto }
.turn { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5em; border-top: 1px solid #bbb }
.turn > * { min-width: 0; padding: .4em 0 } a { white-space: nowrap }
.recalls { display: grid; grid-template-columns: repeat(auto-fill, minmax(22em, 1fr)); gap: 0 2em }
caption { text-align: start; font-weight: 600 } table { border-collapse: collapse; width: 100%% }
td { border-top: 1px solid #ccc; text-align: start } td:first-child { min-width: 6em }
mark, ins, del { border-radius: 3px; print-color-adjust: exact } mark { background: #fd6 }
.gold { background: #dbf } .target { background: #adf } ins { background: #cec }
del { background: #fcc } del:not(:empty) { margin-inline-end: .3em }
@media (max-width: 45em) { .turn, .recalls { grid-template-columns: 1fr } }
@media print { nav { display: none } pre { max-height: none } body { font-size: 10px }
  table { break-inside: avoid } }
</style><h1>%(title)s</h1><p><mark>[MASK]</mark> is asked for at the end,
<mark class="target">this</mark> in a recall, <mark class="gold">this</mark> is a right answer; in a
memory: <ins>added</ins>, <del>dropped</del>.</p><nav>%(links)s</nav>%(articles)s</html>
"""


def view(args):
    """The transcripts of a run (its folder, or a file of lines of its samples.jsonl) as a page."""
    path = Path(args.inputs[0])
    path = path / "samples.jsonl" if path.is_dir() else path
    records = [row for _, row in data.read_rows(str(path))] if path.exists() else []
    if not records or not all("advantages" in record for record in records):
        raise InputError(f"{path}: no transcripts of this train.py; name the folder of a run")
    places = np.linspace(0, len(records) - 1, min(VIEWED, len(records))).astype(int)
    write_page(args.out, args.inputs[0], [records[i] for i in places])
    print(f"{args.out}: {len(places)} of {len(records)} transcripts")


def write_page(out, title, records):
    """Transcripts as train.transcript makes them -> one HTML file that needs nothing else."""
    links, articles = [], []
    for number, record in enumerate(records):
        name = f"step {record['step']}" if record["step"] else f"question {number + 1}"
        links.append(f'<a href="#t{number}">{name}</a>')
        back = f'<a href="#t{max(number - 1, 0)}">← back</a>'
        on = f'<a href="#t{min(number + 1, len(records) - 1)}">on →</a>'
        head = f"<nav>{back} <b>{name}</b> <bdi>{html.escape(str(record['id']))}</bdi> {on}</nav>"
        articles.append(f'<article id="t{number}">{head}{article(record)}</article>')
    parts = {"title": html.escape(title), "links": "\n".join(links), "articles": "".join(articles)}
    with data.whole_or_nothing(out) as partial:
        partial.write_text(PAGE % parts, encoding="utf-8", errors="replace")


def article(record):
    """HTML of a transcript: sections and memories side by side, answers, recalls."""
    asked = [[gold] if isinstance(gold, str) else gold for gold in record["golds"]]
    golds, right = sum(asked, []), "; ".join(map(" / ".join, asked))
    page = f"<h2>{html.escape(record['question'])}</h2>"
    page += f"right: <bdi>{html.escape(right)}</bdi>" if golds else ""

    # a row for every turn
    sections = [record["document"][a:b] for a, b in record.get("sections", [])]
    *memories, answer = record["turns"]
    what = "section" if sections else "prompt"
    for turn, seen in enumerate(sections or record["prompts"], 1):
        targets = [each["target"] for each in record["recalls"] if each["l"] == turn]
        seen = marked(seen, dict.fromkeys(golds, "gold") | dict.fromkeys(targets, "target"))
        page += f'<div class="turn"><div><h4>{what} {turn}</h4><pre>{seen}</pre></div>'
        if turn <= len(memories):
            memory = changed(memories[turn - 2] if turn > 1 else "", memories[turn - 1])
            page += f"<div><h4>memory {turn}</h4><pre>{memory or '(nothing)'}</pre></div>"
        page += "</div>"
    page += f'<div class="turn"><div><h4>answer</h4><pre>{html.escape(answer)}</pre></div></div>'

    # what it all earned
    if record["rewards"]:
        page += results_table("trajectories: the one above, and its group", record)
    page += '<div class="recalls">'
    for each in record["recalls"]:
        where = f"section {each['l']}, asked of memory {each['k']}"
        caption = f"recall of trajectory {each['trajectory'] + 1}: {each['target']} of {where}"
        prompt = marked(each["prompt"], {data.TARGET: "target"})
        prompt = f"<details><summary>its prompt</summary><pre>{prompt}</pre></details>"
        page += f"<div>{results_table(caption, each)}{prompt}</div>"
    return page + "</div>"


def results_table(caption, results):
    """HTML of the answers of a group, with what they earned."""
    table = f"<table><caption>{html.escape(caption)}</caption>"
    table += "<tr><td>answer<td>exact match<td>reward<td>advantage"
    columns = [results[name] for name in ("answers", "exact_match", "rewards", "advantages")]
    for answer, right, reward, advantage in zip(*columns):
        answer = html.escape((rewards.extract_boxed(answer or "") or answer or "none")[:200])
        table += f"<tr><td>{answer}<td>{right:.2f}<td>{reward:.2f}<td>{advantage:+.2f}"
    return table + "</table>"


def changed(before, after):
    """HTML of a memory, with what it adds to the one before and what it drops of it marked."""
    old, new = (re.findall(r"[^\s。、，；]*[\s。、，；]+|\S+", text) for text in (before, after))
    words = [[word.strip() for word in text] for text in (old, new)]
    page = ""
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        gone, come = marked("".join(old[a:b]).strip()), marked("".join(new[c:d]))
        page += come if kind == "equal" else f"<del>{gone}</del><ins>{come}</ins>"
    return page


def marked(text, names=None):
    """HTML of a text, with [MASK] and the names {name: class} marked where they stand."""
    names = {data.MASK: "mask"} | (names or {})
    names.pop("", None)
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    page = ""
    for part in re.split(rf"(?<!\w)({known})(?!\w)", text):
        escaped = html.escape(part)
        page += f'<mark class="{names[part]}">{escaped}</mark>' if part in names else escaped
    return page


# ------------------------------------------------------------------------------------ forgetting

NO_MEMORY = -1  # the age of a recall that is asked with the first, empty memory


def forgetting(args):
    """Recall by age: how many turns ago the section was read in which the entity is hidden.

    Of every section of a held-out document one entity that stands nowhere else is asked for, with
    the memory right after the section (age 0) and with those a turns later. All answers to it are
    drawn with the same noise, so that only another memory can change them.
      recall     exact match at this age
      written    the entity's name stands in the memory, at this age
      no memory  exact match with the first, empty memory: guesses, and what the model knew before
      capture    exact match at age 0, of the entities that no memory was right about
      retention  exact match at this age, of the captured ones
    Each is a mean over documents of a document's share, with a 95 % interval and the number of
    documents. Age a needs a more sections behind one, so that large ages are about early sections:
    compare models at an age, rather than ages.
    """
    cfg = config_of(args)
    if args.png:
        open_pyplot()  # or say now that it is missing
    setup, policy = open_model(args, cfg)
    rows = heldout_documents(cfg)
    train.check_budget(setup, rows, policy.lm)

    # this rank's documents, a batch at a time
    mine = range(distributed.rank(), len(rows), distributed.world_size())
    recalls = []
    bar = tqdm(total=len(rows), desc="documents", disable=distributed.rank() > 0)
    with torch.no_grad(), gathered(policy):
        for first in range(0, len(mine), args.batch):
            batch = {number: rows[number] for number in mine[first : first + args.batch]}
            recalls += recalls_by_age(setup, batch)
            bar.update(len(batch) * distributed.world_size())
    bar.close()

    recalls = [recall for rank in all_gather(recalls) for recall in rank]
    if not recalls:
        raise InputError(f"{' '.join(cfg.data)}: no entity stands in one section alone")
    table = forgetting_table(recalls)
    rows = {}
    for name, by_age in table.items():
        for age, (*score, n) in by_age.items():
            rows[f"{name}, age {age}"] = {"n": n, "share": score}
    print_table(rows)
    record = {"command": sys.argv[1:], "config": dataclasses.asdict(cfg), "forgetting": table}
    write_json(args.out, record)
    if args.png and distributed.rank() == 0:
        draw(forgetting_series(table, cfg.model), args.png)


def recalls_by_age(setup, rows):
    """Reads documents {number: row} and asks for an entity of each section at every age.
    -> list of (document, {age: (EM, is the name in the memory)}), NO_MEMORY one of the ages"""
    cfg, prompts = setup.cfg, setup.prompts
    setup = setup._replace(cfg=dataclasses.replace(cfg, group=1))

    # read; draw an entity of every section
    readers, drawn = {}, {}
    for number, row in rows.items():
        row = {**row, "text": prompts.clean(row["text"])}
        chunks = train.cut(setup, row["text"])
        problem = prompts.encode(row["question"]) if row.get("question") else prompts.problem
        (readers[number],) = train.make_readers(setup, problem, chunks, ("heldout", number))
        for turn, chunk in enumerate(chunks, 1):
            rng = random.Random(f"forgetting {cfg.seed} {number} {turn}")
            only = {**row, "entities": entities_of(row, chunk)}
            recall = data.draw_recall(only, [chunk], prompts.tokenizer, cfg.chunk_tokens, rng)
            if recall:
                drawn[number, turn] = recall
    rollout(list(readers.values()), setup.sampler)

    # ask with no memory, then age by age
    found = {place: {} for place in drawn}
    most = max(len(reader.chunks) for reader in readers.values())
    for age in (NO_MEMORY, *ages(most)):
        agents, held = {}, {}
        for (number, turn), recall in drawn.items():
            memories = readers[number].memories
            at = 0 if age == NO_MEMORY else turn + age
            if at < len(memories):
                key = ("forgetting", number, turn)  # the same noise at every age
                agent = Recaller(prompts, memories[at], recall.ids, cfg.answer_tokens, key)
                agents[number, turn], held[number, turn] = agent, prompts.text(memories[at])
        rollout(list(agents.values()), setup.sampler)
        for place, agent in agents.items():
            answer, target = rewards.extract_boxed(agent.answer), drawn[place].target
            written = float(bool(data.occurrences(held[place], target)))
            found[place][age] = rewards.exact_match(answer, [target]), written
    return [(number, by_age) for (number, _), by_age in found.items()]


def entities_of(row, chunk):
    """Spans of the entities that stand in this chunk of a document and nowhere else in it."""
    text, spans = row["text"], []
    for start, end in row["entities"]:
        if chunk.start <= start and end <= chunk.end:
            places = data.occurrences(text, text[start:end])
            if places and chunk.start <= places[0] and places[-1] < chunk.end:
                spans.append([start, end])
    return spans


def ages(turns):
    """The ages that are measured in documents of that many turns: all up to 8, then doubling.

    >>> ages(40)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    """
    return [age for age in range(turns) if age <= 8 or age & (age - 1) == 0]


def forgetting_table(recalls):
    """What recalls_by_age gives -> {name: {age: [mean, low, high, n]}}"""
    scores = {}  # (name, age) -> {document: [0 or 1, ..]}
    for document, by_age in recalls:
        known, captured = by_age[NO_MEMORY][0], by_age[0][0]
        rows = {("no memory", 0): known}
        if not known:
            rows["capture", 0] = captured
        for age, (right, written) in by_age.items():
            if age >= 0:
                rows |= {("recall", age): right, ("written", age): written}
            if age > 0 and captured and not known:
                rows["retention", age] = right
        for key, score in rows.items():
            scores.setdefault(key, {}).setdefault(document, []).append(score)

    # recalls of one document are not independent: they are averaged first
    table = {"recall": {}, "written": {}, "no memory": {}, "capture": {}, "retention": {}}
    for name, age in sorted(scores):
        shares = [train.mean(each) for each in scores[name, age].values()]
        table[name][age] = list(train.interval(shares))
    return table


# ---------------------------------------------------------------------------------------- curves
# What is drawn is a list of series: (panel, label, {x: y, or [mean, low, high]}), where a panel is
# what stands at its (x, y).

METRICS = {  # of every step
    "em": "exact match of the answers (dots: held-out)",
    "imr": "exact match of the recalls (dots: held-out)",
    "R_E": "reward of a trajectory",
    "kl": "KL to the reference, per token",
    "len": "tokens of a response",
}
HELDOUT = {"trajectory": METRICS["em"], "recall": METRICS["imr"]}


def curves(args):
    """One picture: what runs did by step, longqa tables by length, forgetting tables by age."""
    series = []
    for path in map(Path, args.inputs):
        if path.is_dir():
            series += run_series(path)
            continue
        other = f"{path}: not a table that eval.py longqa or forgetting wrote"
        with data.explained(other, ValueError):  # not JSON, or not even text
            record = json.loads(path.read_text())
        record = record if isinstance(record, dict) else {}
        rows = [row for row in record.get("table", {}).values() if "document_tokens" in row]
        lengths = {row["document_tokens"]: row["em"] for row in rows}
        if lengths:
            series.append((("tokens of the document", "exact match"), path.stem, lengths))
        elif "forgetting" in record:
            series += forgetting_series(record["forgetting"], path.stem)
        else:
            raise InputError(other)
    draw(series, args.out)


def run_series(run):
    """Lines of a run's metrics by step, dots of its looks at held-out rows."""
    lines, looks, series = train.read_metrics(run), {}, []
    for name, title in METRICS.items():
        values = {line["step"]: line[name] for line in lines if name in line}
        if values:
            series.append((("step", title), run.name, values))
    for line in lines:
        for kind, row in line.get("heldout", {}).items():
            looks.setdefault(kind, {})[line["step"]] = row[:3]
    for kind, scores in looks.items():
        title = HELDOUT.get(kind, f"exact match, held-out {kind}")
        series.append((("step", title), run.name, scores))
    return series


def forgetting_series(table, label):
    """Recall by age, the names in memory by age; capture, a dot at age 0, and retention."""
    both = "share captured (age 0), of these retained"
    panels = {"recall": "exact match of recalls by age", "written": "share of names in memory"}
    panels |= {"capture": both, "retention": both}
    series = []
    for name, title in panels.items():
        scores = {int(age): row[:3] for age, row in table[name].items()}
        if scores:
            series.append((("age: turns since the section", title), label, scores))
    return series


def draw(series, out):
    """A picture with a grid of panels, one colour a label."""
    if not series:
        raise InputError(f"{out}: nothing to draw yet: no step is done")
    pyplot = open_pyplot()
    panels = list(dict.fromkeys(panel for panel, _, _ in series))
    labels = list(dict.fromkeys(label for _, label, _ in series))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5.2 * columns, 3.7 * rows), squeeze=False
    )
    for axes, (x, y) in zip(grid.flat, panels):
        axes.set(xlabel=x, title=y, xscale="log" if x.startswith("tokens") else "linear")
        if y.startswith(("exact match", "share")):
            axes.set(ylim=(0, 1.02))
        if x.startswith("age"):
            axes.locator_params("x", integer=True)
    for axes in grid.flat[len(panels) :]:
        axes.remove()

    for panel, label, values in series:
        axes, color = grid.flat[panels.index(panel)], f"C{labels.index(label)}"
        if isinstance(next(iter(values.values())), list):
            dots(axes, values, label, color)
        else:
            axes.plot(list(values), list(values.values()), alpha=0.5, color=color, label=label)
    for axes in grid.flat[: len(panels)]:
        handles = dict(zip(*reversed(axes.get_legend_handles_labels())))  # each label once
        axes.legend(handles.values(), handles.keys(), fontsize="small")
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    print(out)


def dots(axes, scores, label, color):
    """Draws {x: [mean, low, high]}."""
    mean, low, high = np.array(list(scores.values())).T
    errors = [mean - low, high - mean]
    axes.errorbar(list(scores), mean, errors, marker="o", capsize=3, label=label, color=color)


def open_pyplot():
    """matplotlib is optional. DataError where it is missing."""
    with data.explained("a picture needs matplotlib: pip install matplotlib", ImportError):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    return pyplot


# -------------------------------------------------------------------------------------- commands


class Command(NamedTuple):
    run: object  # args -> what it prints and writes
    task: str  # of train.py, whose settings it takes
    needs: tuple  # flags, or words for the inputs


COMMANDS = {
    "memtrain": Command(memtrain, "memtrain", ("--model",)),
    "longqa": Command(questions, "longqa", ("--model", "--out")),
    "searchqa": Command(questions, "searchqa", ("--model", "--out")),
    "filter": Command(questions, "longqa", ("--model", "--data", "--out")),
    "ask": Command(ask, "longqa", ("--model", "--document", "a question")),
    "view": Command(view, None, ("a run", "--out")),
    "forgetting": Command(forgetting, "memtrain", ("--model", "--out")),
    "curves": Command(curves, None, ("runs", "--out")),
}


@distributed.one_line_errors(data.DataError)
def main(argv=None):
    args = parse(argv)
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    main()
