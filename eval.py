"""Evaluation: MemTrain's proxy tasks on held-out documents, long-text QA by length, search QA by set; curves.

    python eval.py memtrain --model runs/memtrain                                      held-out E2E and recall exact match
    python eval.py longqa --model M --data eval_50.json eval_100.json --out FILE.json  RULER-HQA, a row for every file
    python eval.py longqa --model M --data eval_50.json --mode full_context --out ...  the bare model, one context window
    python eval.py searchqa --model M --data nq=nq.jsonl hotpotqa=hp.jsonl --retriever http://127.0.0.1:8000/retrieve --out ...
    python eval.py filter --model M --data FILE --out FILE         drop the questions that the model answers without context
    python eval.py curves runs/a runs/b --out curves.png           reward curves of runs, accuracy by length
    torchrun --nproc_per_node 8 eval.py ...                        the same, samples divided over ranks

Every finished sample is a line of OUT.parts/, so that a stopped evaluation goes on where it was; the table is made of those
lines. Temperature 0.7 and top_p 0.95 unless --greedy (MemAgent's); the noise is a function of the sample, so that neither
stopping nor the number of ranks changes a table. A failed, cut or empty answer counts as wrong, never as missing.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import rewards
import tiny
import train
from rollout import PROBLEM, TEMPLATES, Asker, Prompts, Reader, Sampler, Searcher, rollout

SIZES = ("chunk_tokens", "memory_tokens", "answer_tokens", "kv_tokens", "segment", "prompt_order", "eval_documents", "seed", "chunks",
         "retriever", "encoder", "passages", "result_tokens", "objectives", "turns")  # fmt: skip
SCORES = {"em": rewards.exact_match, "sub_em": rewards.sub_exact_match, "f1": rewards.token_f1, "memagent_sub_em": rewards.memagent_sub_em}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=("memtrain", "longqa", "searchqa", "filter", "curves"))
    parser.add_argument("runs", nargs="*", help="folders of runs, and tables of longqa (curves)")
    parser.add_argument("--model", help="a Hub name, a folder with a checkpoint, or the folder of a run")
    parser.add_argument("--data", nargs="+", default=[], help="[NAME=]FILE; none: the pocket world's own")
    parser.add_argument("--out", help="the table, as JSON (filter: the questions left; curves: the picture)")
    parser.add_argument("--mode", choices=("memory", "full_context"), default="memory", help="longqa: read in chunks, or in one window")
    parser.add_argument("--greedy", action="store_true", help="temperature 0")
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampling [0.7]; memtrain: 1.0, as in training")
    parser.add_argument("--top_p", type=float, default=0.95, help="of sampling [0.95]; memtrain: 1.0")
    parser.add_argument("--samples", type=int, default=1, help="answers to every question [1]")
    parser.add_argument("--batch", type=int, default=32, help="samples in lock step on each rank; what a stopped evaluation loses [32]")
    for item in dataclasses.fields(train.Config):
        if item.name in SIZES:
            parser.add_argument(f"--{item.name}", type=type(item.default), choices=train.CHOICES.get(item.name), help="as in train.py; default: the run's")
    args = parser.parse_args(argv)
    if args.command != "curves" and not args.model:
        raise ValueError(f"{args.command} needs --model: a Hub name, a checkpoint or the folder of a run")
    if args.command in ("filter", "curves") and not args.out:
        raise ValueError(f"{args.command} needs --out")
    return args


def config_of(args):
    """Sizes of the run that the model comes from (train.py's defaults where it is no run), and the flags given here."""
    folder = Path(train.checkpoint_path(args.model)).parent
    saved = json.loads((folder / "config.json").read_text()) if (folder / "metrics.jsonl").exists() else {}
    task = "longqa" if args.command == "filter" else args.command
    base = tiny.CONFIG | tiny.CONFIG_OF_TASK.get(task, {}) if train.is_tiny(args.model) else {}
    sizes = {name: saved[name] for name in SIZES if name in saved and name != "kv_tokens"}
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    return train.Config(**base | sizes | given | {"task": task, "model": args.model, "data": args.data, "max_chunks": 10**9})


def open_kit(args, cfg, device):
    """-> (kit, policy, whether the model is the pocket one)"""
    policy, tokenizer = train.open_policy(args.model, device)
    lm, pocket = policy.eval().lm, train.is_tiny(args.model)
    prompts = Prompts(tokenizer, tiny.TEMPLATES if pocket else TEMPLATES, cfg.prompt_order)
    cfg.kv_tokens = cfg.kv_tokens or train.kv_budget(lm, device)
    temperature, top_p = (1.0, 1.0) if args.command == "memtrain" else (args.temperature, args.top_p)
    sampler = Sampler(lm, train.end_ids(lm, tokenizer), temperature=0 if args.greedy else temperature, top_p=top_p, kv_tokens=cfg.kv_tokens,
                      segment=cfg.segment, seed=cfg.seed, stop=prompts.closed if cfg.task == "searchqa" else None, share=policy.shares)  # fmt: skip
    return train.Kit(cfg, prompts, tiny.PROBLEM if pocket else PROBLEM, sampler), policy, pocket


# ------------------------------------------------------------------------------------------------------ samples to records


def whole_document(kit, row, context, key):
    """An Asker with the whole document in one window of `context` tokens, cut in the middle where it is longer. -> (agent, cut)"""
    cfg, prompts = kit.cfg, kit.prompts
    problem = prompts.encode(row["question"])
    ids = [i for chunk in data.chunks(prompts.clean(row["context"]), prompts.tokenizer, 2**16) for i in chunk.ids]
    room = context - len(prompts.whole) - len(problem) - cfg.answer_tokens
    if room < 0:
        raise ValueError(f"--answer_tokens {cfg.answer_tokens} leaves no room for a document in a context of {context} tokens")
    cut = len(ids) > room
    section = ids[: (room + 1) // 2] + ids[len(ids) - room // 2 :] if cut else ids
    return Asker(prompts, prompts.whole(problem=problem, section=section), cfg.answer_tokens, key), cut


def make_agent(args, kit, row, key, context):
    """-> (agent, whether its document was cut)"""
    cfg, prompts = kit.cfg, kit.prompts
    problem = prompts.encode(row["question"])
    if args.command == "searchqa":
        return Searcher(prompts, problem, cfg.turns, cfg.answer_tokens, cfg.result_tokens, key), False
    if args.command == "filter":
        return Asker(prompts, prompts.closed_book(problem=problem), cfg.answer_tokens, key), False
    if args.mode == "full_context":
        return whole_document(kit, row, context, key)
    sections = [chunk.ids for chunk in data.chunks(prompts.clean(row["context"]), prompts.tokenizer, cfg.chunk_tokens)]
    return Reader(prompts, problem, sections, cfg.memory_tokens, cfg.answer_tokens, key), False


def scores_of(args, agent, golds):
    """-> {score: value}; means over the questions where several were asked at once."""
    if args.command == "searchqa":
        pairs = list(zip(rewards.split_answers(agent.answer, len(golds)), golds))
    else:
        pairs = [(rewards.extract_boxed(agent.answer), golds)]
    answered = sum(answer is not None for answer, _ in pairs)
    return {name: sum(score(answer, gold) for answer, gold in pairs) / len(pairs) for name, score in SCORES.items()} | {"unanswered": 1 - answered / len(pairs)}


def record_of(args, row, sample, agent, cut):
    """The line of one finished sample."""
    turns = agent.turns
    record = {"id": row["id"], "sample": sample, **scores_of(args, agent, row["answers"]), "answer": agent.answer,
              "truncated": float(any(turn.truncated for turn in turns)), "document_cut": float(cut), "turns": len(turns),
              "tokens": sum(len(turn.prompt_ids) + len(turn.response_ids) for turn in turns),
              "peak_context": max(len(turn.prompt_ids) + len(turn.response_ids) for turn in turns)}  # fmt: skip
    if isinstance(agent, Searcher):
        record |= {"searches": agent.searches, "malformed": float(agent.malformed)}
    return record


def run_set(args, kit, policy, name, rows):
    """All samples of one set that are not yet in OUT.parts/. -> records of all ranks, in the order of the samples"""
    parts = Path(f"{args.out}.parts")
    done = {}
    for path in sorted(parts.glob(f"{name}.rank*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # a line without its end was being written when the run was stopped
                record = json.loads(line)
                done[record["index"], record["sample"]] = record
    dist.barrier()  # all ranks have read before any writes
    todo = [(i, s) for i in range(len(rows)) for s in range(args.samples) if (i, s) not in done]
    mine = todo[dist.get_rank() :: dist.get_world_size()]
    bar = tqdm(total=len(rows) * args.samples, initial=len(rows) * args.samples - len(todo), desc=name, disable=dist.get_rank() > 0)
    kit.sampler.step = name
    with torch.no_grad(), train.gathered(policy), (parts / f"{name}.rank{dist.get_rank()}.jsonl").open("a") as file:
        for first in range(0, len(mine), args.batch):
            batch, clock = mine[first : first + args.batch], time.time()
            agents = [make_agent(args, kit, rows[i], (i, s), kit.sampler.model.config.max_position_embeddings) for i, s in batch]
            rollout([agent for agent, _ in agents], kit.sampler, kit.search)
            seconds = (time.time() - clock) / len(batch)
            for (i, s), (agent, cut) in zip(batch, agents):
                done[i, s] = {"index": i, **record_of(args, rows[i], s, agent, cut), "seconds": seconds}
                file.write(json.dumps(done[i, s], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch) * dist.get_world_size())
    bar.close()
    merged = {key: record for rank in train.everyone(done) for key, record in rank.items()}
    return [merged[key] for key in sorted(merged)]


# ---------------------------------------------------------------------------------------------------------------- tables


def summary(records):
    """Means of all numbers of the records; scores with a 95 % interval over questions, [mean, low, high]."""
    by_question = {}
    for record in records:  # several samples of a question are not independent: average them first
        by_question.setdefault(record["index"], []).append(record)
    row = {"n": len(by_question)}
    for key in records[0]:
        if key in ("index", "sample", "id", "answer"):
            continue
        means = [sum(record[key] for record in group) / len(group) for group in by_question.values()]
        row[key] = list(train.interval(means)[:3]) if key in SCORES else sum(means) / len(means)
    return row


def average(scores):
    """The mean of independent scores [mean, low, high], and its own interval: half widths add in quadrature.

    >>> [round(value, 4) for value in average([[0.5, 0.4, 0.6], [0.7, 0.6, 0.8]])]
    [0.6, 0.5293, 0.6707]
    """
    mean, count = sum(score[0] for score in scores) / len(scores), len(scores)
    return [mean, mean - math.hypot(*(score[0] - score[1] for score in scores)) / count, mean + math.hypot(*(score[2] - score[0] for score in scores)) / count]


def print_table(table):
    """Markdown, scores in percent."""
    columns = list(dict.fromkeys(key for row in table.values() for key in row))
    cells = [["set", *columns]]
    for name, row in table.items():
        cells.append([name, *(format_cell(key, row.get(key)) for key in columns)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def format_cell(key, value):
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        mean, low, high = value[:3]
        return f"{100 * mean:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    if key in ("truncated", "unanswered", "document_cut", "malformed"):
        return f"{value:.1%}"
    return f"{value:.0f}" if key in ("n", "tokens", "peak_context") else f"{value:.2f}"


def write_json(path, value):
    """Whole or not at all."""
    if path and dist.get_rank() == 0:
        with data.whole_or_nothing(path) as partial:
            partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------------------------------------- commands


def evaluate_proxy(args, kit, policy, pocket):
    """E2E and recall exact match on held-out documents, sampled at temperature 1, as train.py prints them."""
    heldout = train.load_material(kit.cfg, pocket).heldout
    rows = [heldout[i] for i in range(min(kit.cfg.eval_documents, len(heldout)))]
    if not rows:
        raise ValueError(f"{' '.join(args.data)}: no held-out documents (data.py build --heldout N)")
    result = train.look(kit, policy, rows)
    table = {train.PROXY[kind]: {"n": n, "em": [mean, low, high]} for kind, (mean, low, high, n) in result.items()}
    if dist.get_rank() == 0:
        print_table(table)
    write_json(args.out, table)


def evaluate_questions(args, kit, policy, pocket):
    """Long-text QA or search QA: a row for every set, then their average."""
    Path(f"{args.out}.parts").mkdir(parents=True, exist_ok=True)
    sets = {}
    for place in args.data:
        name, _, path = place.rpartition("=")
        sets[name or Path(path).name.split(".")[0]] = path
    loaded = {name: data.load_questions(path, kit.cfg.objectives if args.command == "searchqa" else None) for name, path in sets.items()}
    if not loaded and pocket:
        loaded = pocket_sets(args, kit.cfg)
    if args.command == "searchqa":
        kit = kit._replace(search=train.open_search(kit.cfg, kit.cfg.retriever) if sets else train.load_material(kit.cfg, pocket).heldout_search)
    table = {name: summary(run_set(args, kit, policy, name, rows)) for name, rows in loaded.items()}
    if len(table) > 1:
        table["average"] = {score: average([row[score] for row in table.values()]) for score in SCORES}
    if dist.get_rank() == 0:
        print_table(table)
    write_json(args.out, {"command": sys.argv[1:], "config": dataclasses.asdict(kit.cfg), "table": table})


def pocket_sets(args, cfg):
    """Questions of the pocket world: by length (1 to 8 times the trained chunks), or about its held-out corpus."""
    if args.command == "searchqa":
        return {"pocket": train.load_material(cfg, True).heldout}
    return {f"{n} chunks": tiny.questions(cfg.eval_documents, tiny.HELDOUT_SEED, n) for n in (cfg.chunks, 2 * cfg.chunks, 4 * cfg.chunks, 8 * cfg.chunks)}


def filter_questions(args, kit, policy, pocket):
    """Drops the questions that the model answers right without their context (any of --samples samples)."""
    Path(f"{args.out}.parts").mkdir(parents=True, exist_ok=True)
    rows = [row for path in args.data for row in data.load_questions(path)]
    known = {record["index"] for record in run_set(args, kit, policy, "filter", rows) if record["em"] == 1}
    if dist.get_rank() == 0:
        with data.whole_or_nothing(args.out) as partial, partial.open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for i, row in enumerate(rows) if i not in known)
        print(f"{args.out}: {len(rows) - len(known)} of {len(rows)} questions left, {len(known)} answered without context")


def curves(args):
    """Reward by step of runs (folders), accuracy by length of longqa tables (.json, log axis, intervals), into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for run in map(Path, args.runs):
        if run.is_dir():
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "R_E" in line]
            drawn = left.plot([line["step"] for line in steps], [line["em"] for line in steps], alpha=0.4)[0]
            looks = [(line["step"], *line["heldout"]["trajectory"][:3]) for line in lines if "heldout" in line]
            if looks:
                x, mean, low, high = zip(*looks)
                left.errorbar(x, mean, [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]], color=drawn.get_color(), marker="o", capsize=3)
            drawn.set_label(run.name)
        else:
            rows = [row for name, row in json.loads(run.read_text())["table"].items() if name != "average"]
            x, (mean, low, high) = [row["tokens"] for row in rows], zip(*(row["em"] for row in rows))
            right.errorbar(x, mean, [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]], marker="o", capsize=3, label=run.stem)
    left.set(xlabel="step", ylabel="exact match (line: training, dots: held-out)", ylim=(0, 1))
    right.set(xlabel="tokens read", ylabel="exact match", xscale="log", ylim=(0, 1))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=150)
    print(args.out)


@train.one_line_errors()
def main(argv=None):
    args = parse(argv)
    if args.command == "curves":
        return curves(args)
    cfg = config_of(args)
    if not args.out and args.command != "memtrain":
        raise ValueError(f"{args.command} needs --out: the table, and where a stopped evaluation goes on")
    if not args.data and not train.is_tiny(args.model):
        raise ValueError(f"{args.command} of {args.model} needs --data")
    kit, policy, pocket = open_kit(args, cfg, train.start_ranks())
    command = {"memtrain": evaluate_proxy, "filter": filter_questions}.get(args.command, evaluate_questions)
    command(args, kit, policy, pocket)


if __name__ == "__main__":
    main()
