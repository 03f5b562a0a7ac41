"""Evaluation: MemTrain's tasks on held-out documents, long-text QA by length, search QA by set; and
what shows more than a number: questions about a text of one's own, transcripts, forgetting, curves.

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
before it. Documents are read whole, however long (train.py reads --max_chunks sections of them).

Every finished sample is a line in OUT.parts/, and tables are made of those lines: an evaluation
that was stopped resumes there. The noise is a function of (set, question, sample), so that neither
stopping nor the number of ranks changes a table. An answer that is missing, empty or cut before its
box is closed counts as wrong.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import hashlib
import html
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import distributed
import rewards
import train
from data import InputError
from distributed import all_gather, gathered
from rollout import Asker, Reader, Recaller, Searcher, rollout

SCORES = {
    "em": rewards.exact_match,
    "sub_em": rewards.sub_exact_match,
    "f1": rewards.token_f1,
    "memagent_sub_em": rewards.memagent_sub_em,
}

# ------------------------------------------------------------------------------------- measuring


def memtrain(args):
    """E2E and recall exact match on held-out documents, as train.py prints them."""
    setup, policy = open_model(args, config_of(args))
    documents = heldout_documents(setup.cfg)
    train.check_context(setup, documents, policy.lm)
    table = {}
    for kind, (*score, n) in train.evaluate(policy, [(setup, documents)]).items():
        table[train.KINDS[kind]] = {"n": n, "em": score}
    print_table(table)
    if args.out:
        write_json(args.out, table)


def questions(args):
    """Answers all sets of questions; then a table (longqa, searchqa), or what is left (filter)."""
    cfg = config_of(args)
    sets = load_sets(args, cfg)
    setup, policy = open_model(args, cfg)
    open_parts(args, cfg, sets)
    train.check_shared(Path(f"{args.out}.parts", "flags.json"))
    records = {}
    for name, rows in sets.items():
        if args.command != "filter" and args.mode == "memory":
            train.check_context(setup, rows, policy.lm)
        records[name] = run_set(args, setup, policy, name, rows)
    if args.command == "filter":
        write_questions(args.out, sets, records)
    else:
        write_table(args.out, cfg, records)


def make_agent(args, setup, policy, row, key):
    """The agent that answers the question of a row."""
    cfg, prompts = setup.cfg, setup.prompts
    problem = prompts.encode(row["question"])
    if args.command == "searchqa":
        return Searcher(prompts, problem, cfg.turns, cfg.answer_tokens, cfg.result_tokens, key)
    if args.command == "filter":
        return Asker(prompts, prompts.closed_book(problem=problem), cfg.answer_tokens, key)
    if args.mode == "full_context":
        document, context = prompts.encode(row["context"]), train.context_of(policy.lm)
        return WholeReader(prompts, problem, document, context, cfg.answer_tokens, key)
    chunks = [chunk.ids for chunk in train.chunks_of(setup, prompts.clean(row["context"]))]
    reader = ShownReader if args.command == "ask" and not args.quiet else Reader
    return reader(prompts, problem, chunks, cfg.memory_tokens, cfg.answer_tokens, key)


class WholeReader(Asker):
    """Reads a document (ids) in one window of `context` tokens; of a longer one head and tail."""

    def __init__(self, prompts, problem, document, context, answer_tokens, key):
        room = context - len(prompts.whole) - len(problem) - answer_tokens
        if room <= 0:
            raise InputError(f"the model's context holds {context} tokens: lower --answer_tokens")
        self.document_tokens, self.document_cut = len(document), len(document) > room
        if self.document_cut:
            head, tail = (room + 1) // 2, room // 2
            document = document[:head] + document[len(document) - tail :]
        ids = prompts.whole(problem=problem, section=document)
        super().__init__(prompts, ids, answer_tokens, key)


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
    for name in ("document_tokens", "document_cut", "searches", "malformed"):
        if hasattr(agent, name):
            record[name] = float(getattr(agent, name))
    return record


def run_set(args, setup, policy, name, rows):
    """Runs what OUT.parts/ lacks of a set. -> records of all ranks, by question and sample"""
    # what is there already, of any number of ranks
    folder, done = Path(f"{args.out}.parts", name), {}
    for path in folder.glob("rank*.jsonl"):
        for line in path.open():
            with contextlib.suppress(json.JSONDecodeError):  # the last may be broken off
                record = json.loads(line)
                done[record["index"], record["sample"]] = record
    torch.distributed.barrier()  # all ranks have read before any writes
    wanted = list(itertools.product(range(len(rows)), range(args.samples)))
    missing = [key for key in wanted if key not in done]

    # the rest, a batch in lock step, a line for each sample
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"rank{distributed.rank()}.jsonl").open("a")
    with torch.no_grad(), gathered(policy), file:
        file.write("\n")  # ends a line that broke off
        for batch in batches(missing, args.batch, name):
            agents = []
            for index, sample in batch:
                agents.append(make_agent(args, setup, policy, rows[index], (name, index, sample)))
            rollout(agents, setup.sampler, setup.search)
            for (index, sample), agent in zip(batch, agents):
                record = {"index": index, "sample": sample, "id": rows[index]["id"]}
                record |= record_of(agent, rows[index])
                done[index, sample] = record
                file.write(json.dumps(record) + "\n")
            file.flush()
    done = collections.ChainMap(*all_gather(done))
    return [done[key] for key in wanted]


def batches(items, size, name):
    """This rank's part of a list, `size` at a time, under a bar of all ranks' progress."""
    rank, world = distributed.rank(), distributed.world_size()
    mine = items[rank::world]
    with tqdm(total=len(items), desc=name, disable=rank > 0) as bar:
        for first in range(0, len(mine), size):
            batch = mine[first : first + size]
            yield batch
            bar.update(len(batch) * world)


def open_parts(args, cfg, sets):
    """Makes OUT.parts/. InputError where it holds samples of another model, flags or questions,
    though their names may be the same."""
    if distributed.rank() > 0:
        return
    free = ("data", "out", "samples", "batch", "kv_tokens")  # no sample depends on them
    flags = {name: value for name, value in vars(args).items() if name not in free}
    content = {"flags": flags, "model": content_of_model(cfg)}
    for name, rows in sets.items():
        texts = [[row["question"], row["answers"], row["context"]] for row in rows]
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        content[f"questions of {name}"] = digest

    file = Path(f"{args.out}.parts", "flags.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    for name, value in content.items():
        if before.get(name, value) != value:
            raise InputError(
                f"{file.parent} holds samples of another model, other flags or other questions: "
                f"other {name}, see {file.name} there: delete the folder, or choose another --out"
            )
    write_json(file, before | content)


def content_of_model(cfg):
    """What answers depend on beside flags: sizes and times of a model's files, prompts and settings
    that it brings, the corpus that is searched. A snapshot of the Hub is named after its commit."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(cfg.model)
    if not folder.is_dir():
        folder = Path(try_to_load_from_cache(cfg.model, "config.json") or f"{cfg.model}/x").parent
    paths = [Path(cfg.retriever)] if os.path.isfile(cfg.retriever) else []
    for pattern in ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "chat_template*"):
        paths += folder.glob(pattern)
    content = {"folder": str(folder), "memtrain.json": train.model_settings(cfg.model)}
    for path in paths:
        content[path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return content


# ---------------------------------------------------------------------------------------- tables


def summary(records):
    """The figures of a set: means over questions; of scores [mean, low, high], a 95 % interval.

    Samples of one question are not independent: they are averaged first."""
    samples = {}  # of every question
    for record in records:
        samples.setdefault(record["index"], []).append(record)
    figures = {"n": len(samples)}
    for name in records[0]:
        if name in ("index", "sample", "id", "answer"):
            continue
        means = [train.mean(record[name] for record in each) for each in samples.values()]
        figures[name] = list(train.interval(means)[:3]) if name in SCORES else train.mean(means)
    return figures


def write_table(out, cfg, records):
    """The figures of every set, then their average. Its interval is wide enough for sets that ask
    the same questions, as files of several lengths do; for others it is wider than need be."""
    table = {name: summary(records[name]) for name in records}
    if len(table) > 1:
        sets, average = list(table.values()), {}
        for score in SCORES:
            average[score] = [train.mean(each) for each in zip(*(one[score] for one in sets))]
        table["average"] = average
    print_table(table)
    record = {"command": sys.argv[1:], "config": dataclasses.asdict(cfg), "table": table}
    write_json(out, record)


def write_questions(out, sets, records):
    """Drops the questions that were answered without their context, in any of the samples."""
    left = []
    for name, rows in sets.items():
        known = set()
        for record in records[name]:  # who knows an answer may have forgotten its box
            answer = rewards.extract_boxed(record["answer"]) or record["answer"]
            if rewards.exact_match(answer, rows[record["index"]]["answers"]):
                known.add(record["index"])
        left += [row for index, row in enumerate(rows) if index not in known]
    if distributed.rank() == 0:
        with data.whole_or_nothing(out) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in left))
        print(f"{out}: {len(left)} of {sum(map(len, sets.values()))} questions are left")


def print_table(table):
    """{set: figures} as Markdown, scores in percent; on rank 0."""
    columns = list(dict.fromkeys(itertools.chain(*table.values())))
    lines = [["set", *columns]]
    for name, figures in table.items():
        lines.append([name, *(cell(figures.get(column, "")) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines if distributed.rank() == 0 else []:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")


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


# ----------------------------------------------------------- showing: ask, view, forgetting, curves


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
    asked = {"id": args.document, "context": text, "answers": []}
    rows = [{**asked, "question": question} for question in args.inputs]
    if args.mode == "memory":
        train.check_context(setup, rows, policy.lm)

    # how much there is to read
    sizes = [len(chunk.ids) for chunk in train.chunks_of(setup, setup.prompts.clean(text))]
    if not args.quiet:
        pieces = f"{sum(sizes)} tokens, {len(sizes)} sections of at most {cfg.chunk_tokens}"
        often = f", read {len(rows)} times: a memory depends on its question"
        print(f"{args.document}: {pieces}{often if len(rows) > 1 else ''}")

    # read and answer
    agents = []
    for number, row in enumerate(rows):
        agents.append(make_agent(args, setup, policy, row, ("ask", number)))
    with torch.no_grad(), gathered(policy):
        rollout(agents, setup.sampler)
    if distributed.rank() > 0:
        return
    print_answers(args, agents)
    if args.html:
        records = []
        for agent, row in zip(agents, rows):
            group = train.Group("trajectory", 0, [agent], [], [])
            records.append(train.transcript(setup, [group], None, 0, row))
        write_page(args.html, f"{args.model}: {args.document}", records)


class ShownReader(Reader):
    """A Reader that prints its memories as it writes them. Its key: ("ask", number)."""

    def receive(self, response_ids):
        super().receive(response_ids)
        if self.answer is None:
            turn, memory = len(self.memories) - 1, self.prompts.text(self.memories[-1])
            which = f"question {self.key[1] + 1}, memory after section {turn} of {len(self.chunks)}"
            print(f"\n--- {which}\n{memory}", flush=True)


def read_text(path):
    """The text of a file in UTF-8, or of what comes in (-). InputError where there is none."""
    wanted = f"--document {path}: a text in UTF-8 is wanted, .txt or .md"
    with data.explained(wanted, OSError, UnicodeDecodeError):
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    if "\0" in text or not text.strip():
        raise InputError(f"{wanted}; this holds no text")
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


# ---- view ----------------------------------------------------------------------------------------

VIEWED = 48  # most transcripts of a page, spread over a longer run
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>%(title)s</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 80em; margin: auto; padding: 0 1em }
article { display: none } article:target { display: block } caption { font-weight: 600 }
body:not(:has(:target)) article:first-of-type { display: block } table { width: 100%% }
h2, td, pre { unicode-bidi: plaintext; overflow-wrap: anywhere } td { border-top: 1px solid #ccc }
pre { font: inherit; white-space: pre-wrap; max-height: 60vh; overflow-y: auto }
.turn { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5em; border-top: 1px solid #bbb }
.turn > * { min-width: 0 } mark { background: #fd6 } .gold { background: #dbf }
.target { background: #adf } ins { background: #cec } del { background: #fcc; margin: .2em }
</style><h1>%(title)s</h1><p><mark>[MASK]</mark> is asked for at the end,
<mark class="target">this</mark> in a recall, <mark class="gold">this</mark> is a right answer; in a
memory: <ins>added</ins>, <del>dropped</del>.</p><nav>%(links)s</nav>%(articles)s</html>
"""


def view(args):
    """The transcripts of a run (its folder, or a file of lines of its samples.jsonl) as a page."""
    path = Path(args.inputs[0])
    path = path / "samples.jsonl" if path.is_dir() else path
    records = [record for _, record in data.read_rows(str(path))] if path.exists() else []
    if not records or not all("advantages" in record for record in records):
        raise InputError(f"{path}: no transcripts of this train.py; name the folder of a run")
    chosen = np.linspace(0, len(records) - 1, min(VIEWED, len(records))).astype(int)
    write_page(args.out, args.inputs[0], [records[i] for i in chosen])
    print(f"{args.out}: {len(chosen)} of {len(records)} transcripts")


def write_page(out, title, records):
    """Transcripts as train.transcript makes them -> one HTML file that needs nothing else."""
    links, articles = [], []
    for number, record in enumerate(records):
        name = f"step {record['step']}" if record["step"] else f"question {number + 1}"
        links.append(f'<a href="#t{number}">{name}</a>')
        heading = f"<b>{name}</b> <bdi>{html.escape(str(record['id']))}</bdi>"
        articles.append(f'<article id="t{number}">{heading}{article(record)}</article>')
    parts = {"title": html.escape(title), "links": "\n".join(links), "articles": "".join(articles)}
    with data.whole_or_nothing(out) as partial:
        partial.write_text(PAGE % parts, encoding="utf-8", errors="replace")


def article(record):
    """HTML of a transcript: what every turn saw beside what it wrote, then what that earned."""
    asked = [[gold] if isinstance(gold, str) else gold for gold in record["golds"]]
    golds, right = sum(asked, []), "; ".join(map(" / ".join, asked))
    page = f"<h2>{html.escape(record['question'])}</h2>"
    page += f"right: <bdi>{html.escape(right)}</bdi>" if golds else ""

    # memories, and at last the answer
    sections = [record["document"][a:b] for a, b in record.get("sections", [])]
    what, shown, before = "section" if sections else "prompt", sections or record["prompts"], ""
    for turn, text in enumerate(record["turns"], 1):
        page += '<div class="turn"><div>'
        if turn <= len(shown):
            targets = [recall["target"] for recall in record["recalls"] if recall["l"] == turn]
            names = dict.fromkeys(golds, "gold") | dict.fromkeys(targets, "target")
            page += f"<h4>{what} {turn}</h4><pre>{marked(shown[turn - 1], names)}</pre>"
        title, wrote = f"memory {turn}", changed(before, text)
        if turn == len(record["turns"]):
            title, wrote = "answer", html.escape(text)
        page += f"</div><div><h4>{title}</h4><pre>{wrote or '(nothing)'}</pre></div></div>"
        before = text

    # a table of the trajectories, one of every recall; its section and memory are shown above
    if record["rewards"]:
        page += results_table("trajectories: the one above, and its group", record)
    for recall in record["recalls"]:
        where = f"section {recall['l']}, asked of memory {recall['k']}"
        caption = f"recall of trajectory {recall['trajectory'] + 1}: {recall['target']} of {where}"
        page += results_table(caption, recall)
    return page


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
    pieces = re.compile(r"[^\s。、，；]*[\s。、，；]+|\S+")
    old, new = pieces.findall(before), pieces.findall(after)
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


# ---- forgetting ----------------------------------------------------------------------------------


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
    documents. Large ages are about early sections: compare models at an age, rather than ages.
    """
    cfg = config_of(args)
    setup, policy = open_model(args, cfg)
    documents = heldout_documents(cfg)
    train.check_context(setup, documents, policy.lm)
    recalls = []
    with torch.no_grad(), gathered(policy):
        for batch in batches(range(len(documents)), args.batch, "documents"):
            recalls += recalls_by_age(setup, {number: documents[number] for number in batch})
    recalls = sum(all_gather(recalls), [])
    if not recalls:
        raise InputError(f"{' '.join(cfg.data)}: no entity stands in one section alone")

    table, lines = forgetting_table(recalls), {}
    for name, by_age in table.items():
        for age, (*score, n) in by_age.items():
            lines[f"{name}, age {age}"] = {"n": n, "share": score}
    print_table(lines)
    record = {"command": sys.argv[1:], "config": dataclasses.asdict(cfg), "forgetting": table}
    write_json(args.out, record)
    if args.png and distributed.rank() == 0:
        draw([(cfg.model, AGE, table)], args.png)


def recalls_by_age(setup, documents):
    """Reads documents {number: row} and asks for an entity of each section at every age.
    -> list of (document, EM without a memory, {age: (EM, is the name in the memory)})"""
    cfg, prompts = setup.cfg, setup.prompts

    # read, and draw an entity of every section
    readers, drawn = {}, {}  # {document: Reader}, {(document, turn): data.Recall}
    for number, row in documents.items():
        row = {**row, "text": prompts.clean(row["text"])}
        chunks = train.chunks_of(setup, row["text"])
        ids = [chunk.ids for chunk in chunks]
        problem = prompts.encode(row["question"]) if row.get("question") else prompts.problem
        key = ("heldout", number, 0)
        reader = Reader(prompts, problem, ids, cfg.memory_tokens, cfg.answer_tokens, key)
        readers[number] = reader
        for turn, chunk in enumerate(chunks, 1):
            rng = random.Random(f"forgetting {cfg.seed} {number} {turn}")
            only = {**row, "entities": entities_of(row, chunk)}
            recall = data.draw_recall(only, [chunk], prompts.tokenizer, cfg.chunk_tokens, rng)
            if recall:
                drawn[number, turn] = recall
    rollout(list(readers.values()), setup.sampler)

    # ask without a memory, then of the memories age by age
    known = answers_from(setup, drawn, dict.fromkeys(drawn, prompts.no_memory))
    found = {which: {} for which in drawn}
    for age in ages(max(len(reader.chunks) for reader in readers.values())):
        memories = {}
        for number, turn in drawn:
            if turn + age < len(readers[number].memories):
                memories[number, turn] = readers[number].memories[turn + age]
        for which, right in answers_from(setup, drawn, memories).items():
            named = data.occurrences(prompts.text(memories[which]), drawn[which].target)
            found[which][age] = right, float(bool(named))
    return [(number, known[number, turn], found[number, turn]) for number, turn in drawn]


def entities_of(row, chunk):
    """Spans of the entities that stand in this chunk of a document and nowhere else in it."""
    text, spans = row["text"], []
    for start, end in row["entities"]:
        if chunk.start <= start and end <= chunk.end:
            found = data.occurrences(text, text[start:end])
            if found and chunk.start <= found[0] and found[-1] < chunk.end:
                spans.append([start, end])
    return spans


def answers_from(setup, drawn, memories):
    """Asks the recalls {(document, turn): recall} of these memories {(document, turn): ids}.
    -> {(document, turn): EM}"""
    agents = {}
    for which, memory in memories.items():
        key = ("forgetting", *which)  # the same noise at every age
        limit = setup.cfg.answer_tokens
        agents[which] = Recaller(setup.prompts, memory, drawn[which].ids, limit, key)
    rollout(list(agents.values()), setup.sampler)
    right = {}
    for which, agent in agents.items():
        answer = rewards.extract_boxed(agent.answer)
        right[which] = rewards.exact_match(answer, [drawn[which].target])
    return right


def ages(turns):
    """The ages that are measured in documents of that many turns: all up to 8, then doubling.

    >>> ages(40)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    """
    return [age for age in range(turns) if age <= 8 or age & (age - 1) == 0]


def forgetting_table(recalls):
    """What recalls_by_age gives -> {name: {age: [mean, low, high, n]}}"""
    scores = {}  # (name, age) -> {document: [0 or 1, ..]}
    for document, known, by_age in recalls:
        measured = {("no memory", 0): known}
        captured = by_age[0][0] and not known
        if not known:
            measured["capture", 0] = by_age[0][0]
        for age, (right, written) in by_age.items():
            measured |= {("recall", age): right, ("written", age): written}
            if age > 0 and captured:
                measured["retention", age] = right
        for key, score in measured.items():
            scores.setdefault(key, {}).setdefault(document, []).append(score)

    # recalls of one document are not independent: they are averaged first
    table = {"recall": {}, "written": {}, "no memory": {}, "capture": {}, "retention": {}}
    for name, age in sorted(scores):
        shares = [train.mean(each) for each in scores[name, age].values()]
        table[name][age] = list(train.interval(shares))
    return table


# ---- curves --------------------------------------------------------------------------------------

AGE = "age: turns since the section"
ANSWERS, RECALLS = "exact match of the answers", "exact match of the recalls"
CAPTURED = "share captured (age 0), of these retained"
TITLES = {  # of what is drawn: metrics of every step, held-out figures of a run, measures by age
    **{"em": ANSWERS, "trajectory": ANSWERS, "imr": RECALLS, "recall": RECALLS},
    "questions": "exact match of held-out questions",
    "R_E": "reward of a trajectory",
    "kl": "KL to the reference, per token",
    "len": "tokens of a response",
    "written": "share of names in memory",
    **{"capture": CAPTURED, "retention": CAPTURED},
}


def curves(args):
    """One picture: what runs did by step, longqa tables by length, forgetting tables by age."""
    draw([(given, *values_of(Path(given))) for given in args.inputs], args.out)


def values_of(path):
    """-> (what stands at the x axis, {name, in TITLES: {x: y, or [mean, low, high, ..]}}) of a
    run's folder, or of a table of longqa or forgetting. InputError for anything else."""
    if path.is_dir():
        values = {}
        for line in train.read_metrics(path):
            for name, value in (line | line.get("heldout", {})).items():
                values.setdefault(name, {})[line["step"]] = value
        return "step", values

    other = f"{path}: not a table that eval.py longqa or forgetting wrote"
    with data.explained(other, ValueError):  # not JSON, or not even text
        record = json.loads(path.read_text())
    record = record if isinstance(record, dict) else {}
    if "forgetting" in record:
        return AGE, record["forgetting"]
    sets = [each for each in record.get("table", {}).values() if "document_tokens" in each]
    if not sets:
        raise InputError(other)
    return "tokens of the document", {"em": {each["document_tokens"]: each["em"] for each in sets}}


def draw(sources, out):
    """A picture of [(label, x, values)], see values_of: a panel a title, one colour a label; lines
    are what training measured, dots with their intervals what was measured on other data."""
    from matplotlib.figure import Figure

    panels = {}  # (x, title) -> [(values, style)]
    for number, (label, x, values) in enumerate(sources):
        for name, title in TITLES.items():
            if values.get(name):
                style = {"label": label, "color": f"C{number}"}
                panels.setdefault((x, title), []).append((values[name], style))
    if not panels:
        raise InputError(f"{out}: nothing to draw yet: no step is done")

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.7 * lines), layout="tight")
    for number, ((x, title), drawn) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, number, xlabel=x, title=title)
        if title.startswith(("exact match", "share")):
            axes.set(ylim=(-0.02, 1.02))
        for values, style in drawn:
            at, y = [float(each) for each in values], np.array(list(values.values()))
            if y.ndim == 1:
                axes.plot(at, y, alpha=0.5, **style)
            else:
                mean, low, high = y[:, :3].T
                axes.errorbar(at, mean, [mean - low, high - mean], marker="o", capsize=3, **style)
        axes.set(xscale="log" if x.startswith("tokens") else "linear")  # now: limits are known
        handles = dict(zip(*reversed(axes.get_legend_handles_labels())))  # each label once
        axes.legend(handles.values(), handles.keys(), fontsize="small")
    with data.explained(f"--out {out}", ValueError), data.whole_or_nothing(out) as partial:
        figure.savefig(partial, dpi=150, format=Path(out).suffix[1:] or "png")
    print(out)


# ------------------------------------------------------------- command line, model, held-out data

COMMANDS = {  # name: (function, task of train.py whose settings it takes, what it needs)
    "memtrain": (memtrain, "memtrain", ["--model"]),
    "longqa": (questions, "longqa", ["--model", "--out"]),
    "searchqa": (questions, "searchqa", ["--model", "--out"]),
    "filter": (questions, "longqa", ["--model", "--data", "--out"]),
    "ask": (ask, "longqa", ["--model", "--document", "a question"]),
    "view": (view, None, ["a run", "--out"]),
    "forgetting": (forgetting, "memtrain", ["--model", "--out"]),
    "curves": (curves, None, ["runs", "--out"]),
}
# flags of train.py that are flags here
SETTINGS = (
    "chunk_tokens memory_tokens answer_tokens prompt_order kv_tokens retriever encoder passages "
    "result_tokens objectives turns eval_documents seed"
).split()


def parse(argv=None):
    """Command line -> its flags; those of train.py are there only where they were given."""
    parser = argparse.ArgumentParser(
        usage="eval.py COMMAND [inputs ..] [--flag value ..]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", choices=list(COMMANDS))
    inputs = "runs and tables (curves), a run (view), questions (ask)"
    add("inputs", nargs="*", default=[], help=inputs)
    add("--model", help="Hub name, folder with a checkpoint, or folder of a run")
    sources = "[NAME=]FILE .. of questions; folders of documents (memtrain, forgetting)"
    add("--data", nargs="+", help=sources)
    add("--document", help="a text in UTF-8; - is what comes in (ask)")
    add("--out", help="the table as JSON; questions left (filter); picture (curves); page (view)")
    add("--quiet", action="store_true", help="print the answers alone (ask)")
    add("--html", help="the memories and answers as a page (ask)")
    add("--png", help="the curve as a picture (forgetting)")
    modes = ("memory", "full_context")
    add("--mode", choices=modes, default="memory", help="of reading (longqa, ask) [memory]")
    add("--greedy", action="store_true", help="temperature 0")
    add("--temperature", type=float, default=0.7, help="[0.7]; documents: as in training")
    add("--top_p", type=float, default=0.95, help="[0.95]; documents: 1")
    add("--samples", type=int, default=1, help="answers to every question [1]")
    add("--batch", type=int, default=32, help="samples in lock step on a rank [32]")
    settings = "settings", "without the flag those of the model's memtrain.json; else as in [..]"
    train.add_flags(parser.add_argument_group(*settings), SETTINGS)
    args = parser.parse_intermixed_args(argv)  # questions may stand after flags

    _, _, needs = COMMANDS[args.command]
    for name in needs:
        if not (getattr(args, name[2:]) if name.startswith("--") else args.inputs):
            raise InputError(f"{args.command} needs {name}")
    for name, least, most in ("batch", 1, 10**9), ("samples", 1, 10**9), ("top_p", 1e-9, 1):
        if not least <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)}: {least} to {most} is wanted")
    if not 0 <= args.temperature < float("inf"):
        raise InputError(f"--temperature {args.temperature}: 0 or more is wanted")
    if "eval_documents" in args and args.command not in ("memtrain", "forgetting"):
        raise InputError("--eval_documents: sets of questions are asked whole; shorten the file")
    return args


def config_of(args):
    """Flags -> train.Config, filled up from the model's memtrain.json."""
    _, task, _ = COMMANDS[args.command]
    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    given |= {"task": task, "model": args.model, "max_chunks": 10**9}
    if args.data:
        given["data"] = args.data
    return train.configure(given)


def open_model(args, cfg):
    """-> (Setup, Policy)"""
    device = distributed.start_ranks()
    policy, tokenizer = train.open_policy(cfg.model, device, master=False)
    policy.eval()
    search = train.open_search(cfg)
    kv_tokens = cfg.kv_tokens or distributed.kv_budget(policy.lm, device, trained=False)
    temperature, top_p = args.temperature, args.top_p
    if cfg.task == "memtrain":
        temperature, top_p = cfg.temperature, 1.0
    if args.greedy:
        temperature = 0
    sampling = dict(kv_tokens=kv_tokens, search=search, temperature=temperature, top_p=top_p)
    setup = train.open_setup(cfg, policy, tokenizer, **sampling)

    # where the model learned to answer as another agent than the one that answers here
    agents = {"memtrain": "Reader", "longqa": "Reader", "searchqa": "Searcher"}
    learned, agent = train.model_settings(cfg.model).get("task", cfg.task), agents[cfg.task]
    plain = args.mode == "full_context" or args.command == "filter"
    if agents.get(learned) != agent and not plain:
        answers = f"this command answers with a {agent}"
        train.note(f"{cfg.model} was trained by --task {learned}; {answers}")
    return setup, policy


def load_sets(args, cfg):
    """[NAME=]FILE .., or the held-out files of the model's settings -> {name: questions}"""
    sets = {}
    for given in args.data or cfg.heldout:
        named = re.fullmatch(r"([^=/]+)=(.+)", given)
        if named and not os.path.exists(given):
            name, path = named.groups()
        else:
            name, path = Path(given).name.split(".")[0], given
        if name in (*sets, "average"):
            raise InputError(f"--data: two sets are called {name}; write NAME={path}")
        objectives = cfg.objectives if cfg.task == "searchqa" else None
        sets[name] = data.load_questions(path, objectives, long=args.command == "longqa")
    if not sets:
        raise InputError(f"--model {cfg.model} names no held-out questions: add --data FILE ..")
    return sets


def heldout_documents(cfg):
    """The first eval_documents of those that the folders of --data hold out."""
    rows = []
    for path in cfg.data:
        documents = data.load_documents(path, "heldout")
        if not len(documents):
            raise InputError(f"{path}: none held out (data.py build --heldout N)")
        rows += [documents[i] for i in range(min(cfg.eval_documents - len(rows), len(documents)))]
    return rows


@distributed.one_line_errors(InputError)
def main(argv=None):
    args = parse(argv)
    run, _, _ = COMMANDS[args.command]
    run(args)


if __name__ == "__main__":
    main()
