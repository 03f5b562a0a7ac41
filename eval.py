"""Evaluation: MemTrain's tasks on held-out documents, long-text QA by length, search QA by set.

    python eval.py memtrain --model runs/memtrain --data DOCS      end-to-end and recall, held out
    python eval.py longqa --model M --data eval_50.json eval_100.json --out FILE.json
    python eval.py longqa --model M --data eval_50.json --mode full_context --out FILE.json
    python eval.py searchqa --model M --data nq=nq.jsonl hp=hp.jsonl --retriever URL --out FILE.json
    python eval.py filter --model M --data FILE --out FILE.jsonl   drops what needs no context
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
import itertools
import json
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
from distributed import InputError, all_gather, gathered
from rollout import Asker, Reader, Searcher, rollout

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
    add("command", choices=("memtrain", "longqa", "searchqa", "filter", "curves"))
    add("runs", nargs="*", help="folders of runs and tables of longqa (curves)")
    add("--model", help="Hub name, folder with a checkpoint, or folder of a run")
    add("--data", nargs="+", help="[NAME=]FILE .. of questions, folders of documents (memtrain)")
    add("--out", help="the table as JSON; the questions left (filter); the picture (curves)")
    add("--mode", choices=("memory", "full_context"), default="memory", help="of reading (longqa)")
    add("--greedy", action="store_true", help="temperature 0")
    add("--temperature", type=float, default=0.7, help="[0.7]; memtrain: as in training")
    add("--top_p", type=float, default=0.95, help="[0.95]; memtrain: 1")
    add("--samples", type=int, default=1, help="answers to every question [1]")
    add("--batch", type=int, default=32, help="samples in lock step on a rank [32]")
    train.add_flags(parser, SETTINGS)
    args = parser.parse_args(argv)

    needed = {
        "memtrain": ["--model"],
        "filter": ["--model", "--data", "--out"],
        "curves": ["runs", "--out"],
    }
    for name in needed.get(args.command, ["--model", "--out"]):
        if not getattr(args, name.strip("-")):
            raise InputError(f"{args.command} needs {name}")
    return args


def config_of(args):
    """Flags -> train.Config, filled up from the model's memtrain.json."""
    task = "longqa" if args.command == "filter" else args.command
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
    if args.command == "memtrain":
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
    return Reader(prompts, problem, chunks, cfg.memory_tokens, cfg.answer_tokens, key)


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


# -------------------------------------------------------------------------------------- commands


def memtrain(args):
    """E2E and recall exact match on held-out documents, as train.py prints them."""
    cfg = config_of(args)
    setup, policy = open_model(args, cfg)
    rows = []
    for path in cfg.data:
        documents = train.heldout_documents(cfg, path)
        rows += [documents[i] for i in range(min(cfg.eval_documents - len(rows), len(documents)))]
    train.check_budget(setup, rows, policy.lm)
    table = {}
    for kind, (*score, n) in train.evaluate(setup, policy, {"memtrain": rows}).items():
        table[train.KINDS[kind]] = {"n": n, "em": score}
    print_table(table)
    if args.out:
        write_json(args.out, table)


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
            answer, golds = (
                rewards.extract_boxed(record["answer"]),
                rows[record["index"]]["answers"],
            )
            scores.append(rewards.exact_match(answer, golds[:1]))
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


def curves(args):
    """One picture: exact match of runs by step, and of longqa tables by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for path in map(Path, args.runs):
        if path.is_dir():
            # a line of the training batches, dots of the held-out rows
            lines = train.read_metrics(path)
            em = {line["step"]: line["em"] for line in lines if "em" in line}
            (line,) = left.plot(em.keys(), em.values(), alpha=0.4)
            looks = {line["step"]: line["heldout"] for line in lines if "heldout" in line}
            for (kind, called), marker in zip(train.KINDS.items(), "o^s"):
                scores = {step: look[kind][:3] for step, look in looks.items() if kind in look}
                if scores:
                    dots(left, scores, f"{path.name}: {called}", line.get_color(), marker)
        else:
            # a dot for every length
            table = json.loads(path.read_text()).get("table", {})
            rows = [row for row in table.values() if "document_tokens" in row]
            scores = {row["document_tokens"]: row["em"] for row in rows}
            if not scores:
                raise InputError(f"{path}: not a table that eval.py longqa wrote")
            dots(right, scores, path.stem)

    left.set(xlabel="step", ylabel="exact match (line: training, dots: held-out)", ylim=(0, 1))
    right.set(xlabel="tokens of the document", ylabel="exact match", xscale="log", ylim=(0, 1))
    for axes in (left, right):
        if axes.has_data():
            axes.legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=150)
    print(args.out)


def dots(axes, scores, label, color=None, marker="o"):
    """Draws {x: [mean, low, high]}."""
    mean, low, high = np.array(list(scores.values())).reshape(-1, 3).T
    errors = [mean - low, high - mean]
    axes.errorbar(list(scores), mean, errors, marker=marker, capsize=3, label=label, color=color)


@distributed.one_line_errors(data.DataError)
def main(argv=None):
    args = parse(argv)
    command = {"memtrain": memtrain, "curves": curves}.get(args.command, questions)
    command(args)


if __name__ == "__main__":
    main()
