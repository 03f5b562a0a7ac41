"""MemTrain and its post-training: roll out memories, reward them, one GRPO update, again.

    python tiny.py && python train.py                      a laptop: pocket world and model
    python train.py --model Qwen/Qwen3-1.7B --data DOCS    one GPU (DOCS: made by data.py build)
    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen3-4B-Instruct-2507 --data DOCS
    torchrun --nproc_per_node 8 train.py --task longqa --model runs/memtrain --data questions.jsonl
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT train.py ..

The loop is `train`, at the end of this file: documents of the step -> rollout of a task -> rewards
-> advantages per trajectory -> every turn one training sequence -> clipped loss -> step. A task is
a function (setup, rows, step) -> groups with rewards, in the table TASKS.

A run leaves in --out: config.json, metrics.jsonl, samples.jsonl (its fields: `transcript`) and
step-NNNNNN/ (a Hugging Face checkpoint with the trainer's state inside).
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import distributed
import grpo
import rewards
from distributed import InputError, all_gather, gathered
from rollout import PROBLEM, Prompts, Reader, Recaller, Sampler, Searcher, Turn, rollout

# ---------------------------------------------------------------------------------------- config

POCKET_MODEL = "cache/tiny/model"  # made by: python tiny.py
OBJECTIVES = ("full", "decoupled", "e2e")  # section 5.1
PROMPT_ORDERS = ("memory_first", "chunk_first")
AGGREGATES = ("sequence", "token", "constant")
# flags that may differ when a run goes on: how long, what it shows and keeps, where it runs
RESUMED = "out resume steps heldout eval_every eval_documents save_every keep samples".split()
RESUMED += "kv_tokens tokens_per_forward compile retriever".split()
MAX_SKIPPED = 5  # steps in a row with a non-finite gradient before the run stops

# RECIPES[recipe][task]: where it differs from the defaults of Config, the paper's for MemTrain
RECIPES = {
    "paper": {
        "memtrain": {},
        "longqa": dict(steps=500, documents_per_update=8, group=16, aggregate="token"),
        "searchqa": dict(steps=200, documents_per_update=8, group=16, aggregate="token", lr=5e-7),
    },
    "released": {  # the scripts of the authors' code, LiliShadow/MemTrain
        "memtrain": dict(
            chunk_tokens=5000, recall_window="before", match="math",
            aggregate="token", dual_clip=3.0, eval_every=5,
        ),
        "longqa": dict(
            steps=500, documents_per_update=8, group=8, chunk_tokens=5000, match="math",
            aggregate="token", dual_clip=3.0,
        ),
        "searchqa": dict(
            steps=1000, documents_per_step=64, documents_per_update=32, group=8, lr=5e-7,
            answer_tokens=1000, result_tokens=1000, aggregate="token", dual_clip=3.0, scale="group",
        ),
    },
    "released_alone": {  # its baseline, long-text QA without MemTrain, has another learning rate
        "longqa": dict(
            steps=1000, documents_per_update=8, group=8, chunk_tokens=5000, match="math",
            aggregate="token", dual_clip=3.0, lr=5e-7,
        ),
    },
}  # fmt: skip


def flag(default, help, *choices):
    """A field of Config, and a flag of the command line with its help."""
    metadata = {"help": help, "choices": choices or None}
    if default == []:
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """Defaults are the paper's for MemTrain. What --recipe has for the task (RECIPES) overrides
    them, a model's memtrain.json overrides that (its sizes and prompts are the model's own),
    explicit flags override all. Sizes are of a whole step over all ranks, but for those of "memory
    and speed", which are a rank's."""

    # task
    task: str = flag("memtrain", "what to train: a name of TASKS")
    recipe: str = flag("paper", "settings of a publication, see RECIPES", *RECIPES)
    objective: str = flag("full", "recall is in R_E, only trained, or absent", *OBJECTIVES)
    model: str = flag(POCKET_MODEL, "Hub name, folder with a checkpoint, or folder of a run")
    data: list[str] = flag([], "documents: data.py build's, the released code's; or questions")
    ner: str = flag(
        "en_core_web_sm", "finds recalls in the released code's files, as data.py build"
    )
    heldout: list[str] = flag([], "questions or documents to answer at every look")
    out: str = flag("", "folder of the run (runs/TASK)")
    resume: bool = flag(False, "go on from the newest checkpoint in --out, with its settings")
    seed: int = flag(0, "of the data order, the recall draws and the sampling noise")
    # rollout
    steps: int = flag(300, "rollouts, each with its update or updates")
    documents_per_step: int = flag(32, "documents or questions of a rollout, over all ranks")
    documents_per_update: int = flag(32, "of an optimizer step; fewer: several steps a rollout")
    group: int = flag(8, "trajectories of a document (G1)")
    recalls: int = flag(8, "samples of one recall (G2)")
    recall_draw: str = flag("trajectory", "draw k, l, target for each", "trajectory", "document")
    recall_window: str = flag("after", "memory after turn k, or before it", "after", "before")
    chunk_tokens: int = flag(5120, "tokens of a section")
    max_chunks: int = flag(8, "sections read; a longer document keeps its head and tail")
    memory_tokens: int = flag(1024, "most tokens of a memory")
    answer_tokens: int = flag(1024, "most tokens of an answer")
    prompt_order: str = flag("memory_first", "what comes first", *PROMPT_ORDERS)
    temperature: float = flag(1.0, "of sampling; divides the logits in training as well")
    # loss
    match: str = flag("squad", "what the reward takes for the same answer", *rewards.MATCHES)
    recall_weight: float = flag(0.5, "lambda of eq. 2")
    kl: float = flag(1e-3, "weight of the KL to the reference; 0 loads no reference")
    clip_low: float = flag(0.2, "ratio below 1 - this is clipped")
    clip_high: float = flag(0.2, "ratio above 1 + this is clipped")
    dual_clip: float = flag(0.0, "most loss at negative advantages, in advantages; 0: off")
    scale: str = flag("none", "divide advantages by the group's deviation", "none", "group")
    old_logps: str = flag("trainer", "recomputed, or as they were sampled", "trainer", "sampler")
    aggregate: str = flag("sequence", "mean as in eq. 4, MemAgent or Dr. GRPO", *AGGREGATES)
    filter: bool = flag(True, "leave out groups whose rewards are all alike (DAPO)")
    shuffle_rewards: bool = flag(False, "control: rewards change places within their group")
    # optimizer
    lr: float = flag(1e-6, "learning rate, constant after the warm-up")
    warmup_steps: int = flag(20, "steps of linear warm-up")
    weight_decay: float = flag(0.01, "of AdamW")
    beta2: float = flag(0.999, "of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    # memory and speed
    tokens_per_forward: int = flag(32768, "tokens of a training row: the knob of the update")
    kv_tokens: int = flag(0, "tokens of the KV cache in rollout; 0: measured at the start")
    segment: int = flag(32, "new tokens between looks for finished rows")
    compile: bool = flag(False, "decode on a GPU with kernels made by torch.compile")
    gradient_checkpointing: bool = flag(True, "make activations again in backward")
    # logging
    eval_every: int = flag(50, "steps between looks at held-out rows; 0: only before and after")
    eval_documents: int = flag(256, "held-out rows of a look")
    save_every: int = flag(50, "steps between checkpoints; 0: only at the end")
    keep: int = flag(2, "checkpoints kept")
    samples: int = flag(2, "transcripts written to samples.jsonl each step")
    # search QA
    retriever: str = flag("", "corpus file or http://HOST:PORT/retrieve")
    encoder: str = flag("bm25", "of a corpus file: bm25, or a transformers model")
    passages: int = flag(3, "results of a search")
    result_tokens: int = flag(1024, "tokens that the results are cut to")
    objectives: int = flag(2, "questions asked at once")
    turns: int = flag(6, "most turns of a trajectory")


def add_flags(parser, names=None):
    """Gives a parser a flag for every field of Config (or for those of `names`)."""
    for field in dataclasses.fields(Config):
        if names and field.name not in names:
            continue
        default = [] if field.default is dataclasses.MISSING else field.default
        kind = {"type": type(default), "choices": field.metadata["choices"]}
        if field.name == "task":
            kind["choices"] = list(TASKS)
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        if default == []:
            kind = {"nargs": "+"}
        text = field.metadata["help"] + (f" [{default}]" if default not in ("", []) else "")
        parser.add_argument(f"--{field.name}", help=text, default=argparse.SUPPRESS, **kind)


def parse(argv=None):
    """Command line -> Config. InputError where settings don't go together."""
    parser = argparse.ArgumentParser(
        usage="train.py [--flag value ..]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    given["out"] = given.get("out") or f"runs/{given.get('task', Config.task)}"
    if "model" in given:
        given["model"] = distributed.checkpoint_path(given["model"])
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        given["resume"] = True  # torchrun --max-restarts started the ranks again

    # a run that goes on has its own settings
    saved = Path(given["out"], "config.json")
    if given.get("resume") and saved.exists():
        before = json.loads(saved.read_text())["config"]
        for name, value in given.items():
            begun = before.get(name)
            if name not in RESUMED and begun != value:
                raise InputError(
                    f"--resume: {given['out']} was begun with --{name} {begun}, not {value}:"
                    " leave the flag out, or choose another folder"
                )
        return Config(**before | given)

    cfg = configure(given)
    if os.path.exists(cfg.out) and os.listdir(cfg.out) and not cfg.resume:
        raise InputError(
            f"--out {cfg.out} holds a run already: add --resume to go on with it, or choose "
            "another folder"
        )
    return cfg


def configure(given):
    """Explicit settings -> Config, filled up from the model's memtrain.json and the task."""
    task, model = given.get("task", Config.task), given.get("model", Config.model)
    model = distributed.checkpoint_path(model)
    if model == POCKET_MODEL and not os.path.exists(model):
        raise InputError(f"--model {model} is not there: make it with: python tiny.py")
    settings = model_settings(model).get("settings", {})
    settings = settings.get("all", {}) | settings.get(task, {})
    unknown = set(settings) - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise InputError(f"{model}/memtrain.json sets {', '.join(unknown)}: no such flag")
    name = given.get("recipe", settings.get("recipe", Config.recipe))
    recipe = RECIPES.get(name, {}).get(task)
    if recipe is None and name != Config.recipe:  # of tasks of yours the paper says nothing
        raise InputError(f"--recipe {name} has no settings for --task {task}, see RECIPES")
    recipe = recipe or {}
    cfg = Config(**recipe | settings | given | {"model": model})
    if cfg.group < 2:
        raise InputError(f"--group {cfg.group}: an advantage is a difference within a group of 2")
    if cfg.objective != "e2e" and cfg.recalls < 2:
        raise InputError(f"--recalls {cfg.recalls}: take at least 2 samples, or --objective e2e")
    if not cfg.data:
        raise InputError(f"--model {model} needs --data: what data.py build wrote, or questions")
    if cfg.temperature <= 0:
        raise InputError(f"--temperature {cfg.temperature}: training samples, take more than 0")
    if cfg.documents_per_step % cfg.documents_per_update:
        raise InputError(
            f"--documents_per_step {cfg.documents_per_step} is not a multiple of "
            f"--documents_per_update {cfg.documents_per_update}"
        )
    return cfg


def model_settings(model):
    """memtrain.json of a model folder, {} without: prompts ("problem", "templates") and defaults
    for flags ("settings": {"all": {..}, task: {..}}) that travel with the model."""
    file = Path(model, "memtrain.json")
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not JSON ({error.msg}); repair it") from None


# ------------------------------------------------------------------------- what a rollout needs


class Setup(NamedTuple):
    """What every rollout needs."""

    cfg: Config
    prompts: Prompts
    sampler: object  # (prompts, limits, keys) -> responses
    search: object = None  # queries -> list of lists of passages


def open_policy(path, device):
    """-> (Policy of a checkpoint, fp32 and sharded over all ranks: the master copy; tokenizer).

    Rank 0 reads the model as fp32 and finds out whether it shares prefixes; the others only map
    its files, of which `shard` copies their part: the host's memory need not hold it once a rank.
    """
    leader = distributed.rank() == 0
    lm, tokenizer = distributed.load_model(path, torch.float32 if leader else "auto")
    if leader:
        policy = grpo.Policy(lm)
        all_gather(policy.shares)
    else:
        shares = all_gather(None)[0]
        policy = grpo.Policy(lm, shares)
    if leader and not policy.shares:
        name = type(lm).__name__
        print(f"note: {name} can't share prefixes; every turn runs by itself", file=sys.stderr)
    return distributed.shard(policy, device), tokenizer


def open_setup(cfg, policy, tokenizer, *, kv_tokens, search=None, temperature, top_p=1.0):
    """Prompts as the model's folder has them, and a sampler of the policy."""
    given = model_settings(cfg.model)
    texts, problem = given.get("templates"), given.get("problem", PROBLEM)
    try:
        prompts = Prompts(tokenizer, texts, problem, cfg.prompt_order)
    except ValueError as error:
        raise InputError(f"--model {cfg.model}: {error}") from None

    # a turn ends with the tokenizer's end token, or with one that the model's settings name
    ends = {tokenizer.eos_token_id}
    named = policy.lm.generation_config.eos_token_id
    if named is not None:
        ends |= set(named if isinstance(named, list) else [named])
    sampler = Sampler(
        policy.lm,
        ends,
        temperature=temperature,
        top_p=top_p,
        kv_tokens=kv_tokens,
        segment=cfg.segment,
        seed=cfg.seed,
        stop=prompts.closed if TASKS[cfg.task].searches else None,
        share=policy.shares,
        compile=cfg.compile,
    )
    return Setup(cfg, prompts, sampler, search)


def open_search(cfg):
    """The search of a task that has one: queries -> list of lists of passages."""
    if not TASKS[cfg.task].searches:
        return None
    if not cfg.retriever:
        raise InputError("searchqa needs --retriever: a corpus file, or http://HOST:PORT/retrieve")
    return functools.partial(data.open_retriever(cfg.retriever, cfg.encoder), k=cfg.passages)


def setup_of(setup, task, **changes):
    """The setup as another task needs it, and with other settings."""
    cfg = dataclasses.replace(setup.cfg, task=task, **changes)
    sampler = setup.sampler
    if TASKS[setup.cfg.task].searches and not TASKS[task].searches:
        sampler = copy.copy(sampler)
        sampler.stop = None  # tags end a turn of search alone
    return setup._replace(cfg=cfg, sampler=sampler)


def check_budget(setup, rows, lm):
    """Nothing may outgrow the model's context; the numbers are known before the run."""
    cfg = setup.cfg
    longest = TASKS[cfg.task].longest(setup, rows)
    context = lm.config.get_text_config().max_position_embeddings
    if longest > context:
        raise InputError(
            f"instructions, question, input and response can come to {longest} tokens, but the "
            f"model's context holds {context}: lower --chunk_tokens {cfg.chunk_tokens}, "
            f"--memory_tokens {cfg.memory_tokens}, --answer_tokens {cfg.answer_tokens} or "
            f"--result_tokens {cfg.result_tokens}"
        )


# ----------------------------------------------------------------------------------- data of a run


def load_documents(cfg, split="train"):
    """The documents of a split of all --data, folders or files."""
    from datasets import concatenate_datasets

    return concatenate_datasets([read_documents(cfg, path, split) for path in cfg.data])


def read_documents(cfg, path, split):
    """The documents of a split of one folder or file; rank 0 finds the entities of a file."""
    if re.search(data.ROW_FILE, path):
        if distributed.rank() == 0:
            data.load_documents(path, split, cfg.ner)
        torch.distributed.barrier()
    return data.load_documents(path, split, cfg.ner)


def load_questions(cfg):
    """The questions of all --data."""
    rows = [read_questions(cfg, path) for path in cfg.data]
    return rows[0] if len(rows) == 1 else sum(map(list, rows), [])


def read_questions(cfg, path):
    """The questions of one file, several in one for search; others need a text to read."""
    searches = TASKS[cfg.task].searches
    return data.load_questions(path, cfg.objectives if searches else None, long=not searches)


def load_heldout(cfg):
    """What is looked at while training: {task that answers: rows}, eval_documents of each source.

    The sources are the held-out part of --data, where it has one, and what --heldout names.
    Training on documents, questions are answered as longqa does; and the other way round."""
    reads = TASKS[cfg.task].load is load_documents
    documents, questions = (cfg.task, "longqa") if reads else ("memtrain", cfg.task)
    sources = [(documents, load_documents(cfg, "heldout"))] if reads else []
    for path in cfg.heldout:
        if reads and path in cfg.data and os.path.isdir(path):
            continue  # what it holds out is looked at already
        if data.holds_documents(path):
            sources.append((documents, heldout_documents(cfg, path)))
        else:
            sources.append((questions, read_questions(cfg, path)))

    heldout = {}
    for task, rows in sources:
        few = [rows[i] for i in range(min(cfg.eval_documents, len(rows)))]
        if few:
            heldout.setdefault(task, []).extend(few)
    return heldout


def heldout_documents(cfg, path):
    """The held-out documents of a folder, all documents of a file."""
    rows = read_documents(cfg, path, "heldout" if os.path.isdir(path) else "train")
    if not len(rows):
        raise InputError(f"{path}: none held out (data.py build --heldout N)")
    return rows


def questions_of(rows):
    """The questions that rows have; None stands for those that have none of their own."""
    if not hasattr(rows, "column_names"):
        return {row.get("question") for row in rows}
    # a data set on disk gives a column without reading the documents beside it
    return set(rows["question"]) if "question" in rows.column_names else {None}


def rows_of_step(cfg, rows, step):
    """This rank's rows of a step, {document: row}, document being the number within the step.
    A function of (seed, step) alone; every epoch is another permutation."""
    mine = {}
    for document in range(distributed.rank(), cfg.documents_per_step, distributed.world_size()):
        epoch, place = divmod(step * cfg.documents_per_step + document, len(rows))
        mine[document] = rows[order_of_epoch(cfg.seed, epoch, len(rows))[place]]
    return mine


@functools.lru_cache(maxsize=2)
def order_of_epoch(seed, epoch, count):
    return random.Random(f"order {seed} {epoch}").sample(range(count), count)


# ----------------------------------------------------------------------------------------- tasks


class Group(NamedTuple):
    """What advantages are relative to: the trajectories of a document, or the samples of a recall.

    Advantages are made of `rewards` alone, what is reported of `exact_match` alone. An agent has an
    `answer`; a row of data has an "id", and "answers" or an "answer". Steps count from 0 here and
    in keys, and from 1 in what is logged; held-out rows have the step "heldout"."""

    kind: str  # "trajectory" or "recall"
    document: int  # number of the document within its step
    agents: list  # with their turns
    exact_match: list  # of every agent's answer, 0 to 1
    rewards: list  # of every agent
    drawn: object = None  # data.Recall: what a recall asks for, and where


def memtrain(setup, rows, step):
    """MemTrain (sections 3.2, 3.3): `group` trajectories read each document {number: row} and
    answer; then a recall, `recalls` times, from a memory of each. Rewards: eq. 1 and 2."""
    cfg, prompts = setup.cfg, setup.prompts

    # end to end: every trajectory reads all chunks, then answers from its memory
    readers, chunks = {}, {}
    rows = {document: {**row, "text": prompts.clean(row["text"])} for document, row in rows.items()}
    for document, row in rows.items():
        chunks[document] = cut(setup, row["text"])
        problem = prompts.encode(row["question"]) if row.get("question") else prompts.problem
        readers[document] = make_readers(setup, problem, chunks[document], (step, document))
    rollout(sum(readers.values(), []), setup.sampler)

    # recall: of memory m_k of trajectory i, the entity hidden in an earlier chunk c_l
    recalls = {}  # (document, i) -> (data.Recall, agents)
    for document, i in readers_to_ask(cfg, readers):
        drawn_for = i if cfg.recall_draw == "trajectory" else "all"
        rng = random.Random(f"recall {cfg.seed} {step} {document} {drawn_for}")
        tokenizer, row = prompts.tokenizer, rows[document]
        sizes = cfg.chunk_tokens, rng, cfg.recall_window
        drawn = data.draw_recall(row, chunks[document], tokenizer, *sizes)
        if drawn is None:
            continue
        memory, agents = readers[document][i].memories[drawn.k], []
        for j in range(cfg.recalls):
            key = (step, document, i, j)
            agents.append(Recaller(prompts, memory, drawn.ids, cfg.answer_tokens, key))
        recalls[document, i] = drawn, agents
    rollout([agent for _, agents in recalls.values() for agent in agents], setup.sampler)

    groups = []
    for document, row in rows.items():
        golds, R_E = [row["answer"]], []
        whole = scored(cfg, "trajectory", document, readers[document], golds)
        for i, earned in enumerate(whole.rewards):
            R_I = []
            if (document, i) in recalls:
                drawn, agents = recalls[document, i]
                recall = scored(cfg, "recall", document, agents, [drawn.target])
                recall = recall._replace(drawn=drawn)
                R_I = recall.rewards  # eq. 1
                groups.append(recall)
            weight, objective = cfg.recall_weight, cfg.objective
            R_E.append(rewards.end_to_end_reward(earned, R_I, weight, objective))  # eq. 2
        groups.append(whole._replace(rewards=R_E))
    return groups


def readers_to_ask(cfg, readers):
    """(document, i) of the trajectories whose memories are asked; none without the recall task."""
    if cfg.objective == "e2e":
        return []
    return [(document, i) for document in readers for i in range(cfg.group)]


def longqa(setup, rows, step):
    """Long-text QA (MemAgent): `group` trajectories read each context {number: row} and answer."""
    readers = {}
    for document, row in rows.items():
        chunks = cut(setup, setup.prompts.clean(row["context"]))
        problem = setup.prompts.encode(row["question"])
        readers[document] = make_readers(setup, problem, chunks, (step, document))
    rollout(sum(readers.values(), []), setup.sampler)
    groups = []
    for document, row in rows.items():
        golds = row["answers"]
        groups.append(scored(setup.cfg, "trajectory", document, readers[document], golds))
    return groups


def searchqa(setup, rows, step):
    """Search QA (MEM1): `group` trajectories search for the answers of each row's questions; the
    reward is the mean over its questions, by position."""
    cfg, searchers = setup.cfg, {}
    sizes = cfg.turns, cfg.answer_tokens, cfg.result_tokens
    for document, row in rows.items():
        problem, searchers[document] = setup.prompts.encode(row["question"]), []
        for i in range(cfg.group):
            searcher = Searcher(setup.prompts, problem, *sizes, key=(step, document, i))
            searchers[document].append(searcher)
    rollout(sum(searchers.values(), []), setup.sampler, setup.search)

    groups = []
    for document, row in rows.items():
        group = Group("trajectory", document, searchers[document], [], [])
        for agent in group.agents:
            answers = rewards.split_answers(agent.answer, len(row["answers"]))
            pairs = list(zip(answers, row["answers"]))
            group.exact_match.append(mean(rewards.exact_match(*pair) for pair in pairs))
            group.rewards.append(mean(rewards.answer_reward(*pair, cfg.match) for pair in pairs))
        groups.append(group)
    return groups


def cut(setup, text):
    """The chunks of a document; of one longer than max_chunks the head and the tail."""
    cfg = setup.cfg
    chunks = data.chunks(text, setup.prompts.tokenizer, cfg.chunk_tokens)
    if len(chunks) > cfg.max_chunks:
        head, tail = (cfg.max_chunks + 1) // 2, cfg.max_chunks // 2
        chunks = chunks[:head] + chunks[len(chunks) - tail :]
    return chunks


def make_readers(setup, problem, chunks, key):
    """The `group` trajectories of one document."""
    cfg, ids = setup.cfg, [chunk.ids for chunk in chunks]
    sizes = cfg.memory_tokens, cfg.answer_tokens
    return [Reader(setup.prompts, problem, ids, *sizes, (*key, i)) for i in range(cfg.group)]


def scored(cfg, kind, document, agents, golds):
    """The group of these agents, each scored by its boxed answer."""
    answers = [rewards.extract_boxed(agent.answer) for agent in agents]
    exact_match = [rewards.exact_match(answer, golds) for answer in answers]
    answers = [rewards.boxed_answer(agent.answer, cfg.match) for agent in agents]
    earned = [rewards.answer_reward(answer, golds, cfg.match) for answer in answers]
    return Group(kind, document, agents, exact_match, earned)


def longest_reading(setup, rows):
    """Tokens of the longest prompt and response of Readers and Recallers on these rows."""
    cfg, prompts = setup.cfg, setup.prompts
    problems = [prompts.encode(text) if text else prompts.problem for text in questions_of(rows)]
    longest = max(problems, key=len)
    return prompts.longest(longest, cfg.chunk_tokens, cfg.memory_tokens, cfg.answer_tokens)


def longest_searching(setup, rows):
    """The same for Searchers."""
    longest = max(map(setup.prompts.encode, questions_of(rows)), key=len)
    return setup.prompts.longest_search(longest, setup.cfg.answer_tokens, setup.cfg.result_tokens)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


class Task(NamedTuple):
    rollout: object  # (setup, rows {document: row}, step) -> groups with rewards
    load: object  # cfg -> rows to train on
    longest: object  # (setup, rows) -> tokens of the longest prompt and response
    searches: bool = False  # has a --retriever, and several questions in one


TASKS = {
    "memtrain": Task(memtrain, load_documents, longest_reading),
    "longqa": Task(longqa, load_questions, longest_reading),  # MemAgent
    "searchqa": Task(searchqa, load_questions, longest_searching, searches=True),  # MEM1
}


# ---------------------------------------------------------------------------------------- update


@dataclass
class Sequence:
    """A turn as it is trained. Log-probs and weights are of the response's tokens, (length,)."""

    turn: Turn
    advantage: float  # of its trajectory
    document: int
    weights: torch.Tensor = None  # the tokens' shares in the loss of an update
    old_logps: torch.Tensor = None  # for the ratio; None: the current ones, so that it is 1
    ref_logps: torch.Tensor = None  # under the reference, for the KL


def training_sequences(cfg, groups):
    """Every turn of every group, with its trajectory's advantage. Groups whose rewards are all
    alike are left out (DAPO) and count nowhere."""
    sequences = []
    for group in groups:
        if cfg.filter and min(group.rewards) == max(group.rewards):
            continue
        advantages = grpo.group_advantages(torch.tensor(group.rewards), cfg.scale)
        for agent, advantage in zip(group.agents, advantages.tolist()):
            for turn in agent.turns:
                sequences.append(Sequence(turn, advantage, group.document))
    return sequences


def updates_of(cfg, sequences):
    """Divides a rollout's sequences into those of its updates, `documents_per_update` each, and
    deals every update's over the ranks. -> list of this rank's lists"""
    updates = []
    for first in range(0, cfg.documents_per_step, cfg.documents_per_update):
        documents = range(first, first + cfg.documents_per_update)
        updates.append(deal([s for s in sequences if s.document in documents]))
    return updates


def deal(sequences):
    """Evens out the ranks' tokens, which the filter left uneven: what a rank has above the mean
    goes to those that have least. Sequences with a common prefix stay together."""
    prompts = [s.turn.prompt_ids for s in sequences]
    responses = [s.turn.response_ids for s in sequences]
    units = [unit for _, unit in grpo.shared_prefixes(prompts)]
    sized = [(grpo.row_tokens(prompts, responses, unit), unit) for unit in units]
    fair = sum(all_gather(sum(tokens for tokens, _ in sized))) / distributed.world_size()

    # keep a fair share, the largest units first
    mine, load, spare = [], 0, []
    for tokens, unit in sorted(sized, key=lambda unit: -unit[0]):
        if load + tokens <= fair:
            mine += [sequences[i] for i in unit]
            load += tokens
        else:
            spare.append((tokens, [sequences[i] for i in unit]))

    # what is left goes, the largest first, to the rank that has least
    loads = all_gather(load)
    spares = sum(all_gather(spare), [])
    for tokens, unit in sorted(spares, key=lambda unit: -unit[0]):
        rank = loads.index(min(loads))
        loads[rank] += tokens
        if rank == distributed.rank():
            mine += unit
    return mine


def add_weights(cfg, sequences):
    """Token weights of this rank's sequences, from the lengths of all ranks' turns."""
    ranks = all_gather([(s.document, len(s.turn.response_ids)) for s in sequences])
    turns = [turn for rank in ranks for turn in rank]
    documents, lengths = [d for d, _ in turns], [n for _, n in turns]
    most = max(cfg.memory_tokens, cfg.answer_tokens)
    weights = grpo.token_weights(lengths, cfg.aggregate, document=documents, count=most)
    before = sum(map(len, ranks[: distributed.rank()]))
    for sequence, own in zip(sequences, weights.split(lengths)[before:] if lengths else []):
        sequence.weights = own


def packed(cfg, policy, sequences):
    """Runs all sequences, packed. Yields (sequences of a pack, the log-probs (length,) of each).

    Ranks run equally many packs, as collectives wait for all: one that is short of them runs a
    token, and yields it with no sequences."""
    prompts = [s.turn.prompt_ids for s in sequences]
    responses = [s.turn.response_ids for s in sequences]
    packs = grpo.pack(prompts, responses, cfg.tokens_per_forward)
    packs += [[]] * (max(all_gather(len(packs))) - len(packs))
    for pack in packs:
        # iterators: FSDP searches lists for tensors, id by id, which takes seconds
        pack_prompts = iter([prompts[i] for i in pack] or [[0]])
        pack_responses = iter([responses[i] for i in pack] or [[0]])
        logps = policy(pack_prompts, pack_responses, cfg.temperature)
        yield [sequences[i] for i in pack], logps


def add_logps(cfg, policy, sequences, name):
    """Log-probs of every sequence under a policy, in its field `name`."""
    with torch.no_grad(), gathered(policy):
        for pack, logps in packed(cfg, policy, sequences):
            for sequence, values in zip(pack, logps):
                setattr(sequence, name, values)


def add_old_logps(cfg, policy, sequences):
    """What the loss's ratio compares with. With one update a rollout that is the policy itself."""
    if cfg.old_logps == "sampler":
        for sequence in sequences:
            sequence.old_logps = torch.tensor(sequence.turn.logps)
    elif cfg.documents_per_update < cfg.documents_per_step:
        add_logps(cfg, policy, sequences, "old_logps")


def update(cfg, policy, optimizer, sequences, totals):
    """One optimizer step on this rank's sequences; a non-finite gradient skips it. -> its norm

    Adds the sums over tokens of the loss's metrics to totals, a Counter."""
    add_weights(cfg, sequences)
    with gathered(policy):
        for pack, logps in packed(cfg, policy, sequences):
            logps = torch.cat(logps)
            loss = pack_loss(cfg, pack, logps, totals) if pack else 0 * logps.sum()
            # FSDP averages over ranks, and the weights are of all ranks already
            (loss * distributed.world_size()).backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def pack_loss(cfg, pack, logps, totals):
    """The loss of a pack's sequences, whose tokens have these log-probs, (N,)."""

    def flat(tensors):
        return torch.cat(tensors).to(logps.device)

    current, old, ref = logps.detach(), None, None
    if pack[0].old_logps is not None:
        old = flat([s.old_logps for s in pack])
    if pack[0].ref_logps is not None:
        ref = flat([s.ref_logps for s in pack])
    loss, metrics = grpo.policy_loss(
        logps,
        current if old is None else old,
        flat([torch.full((len(s.turn.response_ids),), s.advantage) for s in pack]),
        flat([s.weights for s in pack]),
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip or None,
        ref_logps=ref,
        kl_coef=cfg.kl,
    )

    # how far training is from what the sampler drew at
    trained = old if old is not None and cfg.old_logps == "trainer" else current
    gap = trained - flat([torch.tensor(s.turn.logps) for s in pack])
    metrics["mismatch"] = gap.abs().mean()
    metrics["mismatch_kl"] = (gap.exp() - 1 - gap).mean()  # k3 of KL(sampler || trainer)
    totals["mismatch_max"] = max(totals["mismatch_max"], float(gap.abs().max()))
    totals["tokens"] += len(logps)
    for name, value in metrics.items():
        totals[name] += float(value) * len(logps)
    return loss


# ------------------------------------------------------------------------------ what is reported


def interval(scores):
    """Mean of scores in 0..1 with Wilson's 95 % interval: (mean, low, high, n).

    >>> interval([1.0, 0.0, 1.0, 1.0])
    (0.75, 0.3006418401, 0.9544127397, 4)
    """
    n, share, z = len(scores), mean(scores), 1.959964
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return share, round(max(low, 0.0), 10), round(min(high, 1.0), 10), n


def evaluate(setup, policy, heldout):
    """Exact match on held-out rows {task: rows}, one trajectory and one recall each, with the same
    noise every time and on any number of ranks. -> {kind: (mean, low, high, n)}, a 95 % interval"""
    scores = {}
    for task, rows in heldout.items():
        one = setup_of(setup, task, group=1, recalls=1, objective="full")
        numbers = range(distributed.rank(), len(rows), distributed.world_size())
        with torch.no_grad(), gathered(policy):
            mine = {number: rows[number] for number in numbers}
            groups = TASKS[task].rollout(one, mine, "heldout")
        reads = TASKS[task].load is load_documents
        for rank in all_gather([(group.kind, group.exact_match[0]) for group in groups]):
            for kind, score in rank:
                kind = "questions" if kind == "trajectory" and not reads else kind
                scores.setdefault(kind, []).append(score)
    return {kind: interval(scores[kind]) for kind in sorted(scores, reverse=True)}


# kinds of held-out figures: what they are called
KINDS = {"trajectory": "E2E", "recall": "recall", "questions": "QA"}


def heldout_line(result):
    """What a look at held-out rows found, in words."""
    parts = []
    for kind, (share, low, high, n) in result.items():
        parts.append(f"{KINDS[kind]} EM {share:.3f} [{low:.3f}, {high:.3f}] n={n}")
    return " | ".join(parts)


def step_metrics(groups, totals):
    """Means over all ranks of what a step's rollout gave, and its updates: totals over tokens."""
    trajectories = [group for group in groups if group.kind == "trajectory"]
    recalls = [group for group in groups if group.kind == "recall"]
    agents = [agent for group in trajectories for agent in group.agents]
    turns = turns_of(groups)
    searchers = [agent for agent in agents if isinstance(agent, Searcher)]
    local = {
        "R_E": sum((group.rewards for group in trajectories), []),
        "em": sum((group.exact_match for group in trajectories), []),
        "imr": sum((group.exact_match for group in recalls), []),
        "flat": [min(group.rewards) == max(group.rewards) for group in groups],
        "cut": [turn.truncated for turn in turns],
        "len": [len(turn.response_ids) for turn in turns],
        "turns": [len(agent.turns) for agent in agents],
        "malformed": [agent.malformed for agent in searchers],
        "searches": [agent.searches for agent in searchers],
    }
    sums = {name: (float(sum(values)), len(values)) for name, values in local.items()}
    for name in set(totals) - {"tokens", "mismatch_max"}:
        sums[name] = totals[name], totals["tokens"]

    # a rank without work has no totals
    ranks, sum_of, count_of = all_gather((sums, totals["mismatch_max"])), Counter(), Counter()
    for rank, _ in ranks:
        for name, (total, count) in rank.items():
            sum_of[name] += total
            count_of[name] += count
    means = {name: sum_of[name] / count for name, count in count_of.items() if count}
    largest = max(mismatch for _, mismatch in ranks)
    return means | ({"mismatch_max": largest} if "mismatch" in means else {})


def turns_of(groups):
    return [turn for group in groups for agent in group.agents for turn in agent.turns]


def transcript(setup, groups, step, document, row):
    """A line of samples.jsonl: a document as its first trajectory read it, and what all earned.

    step: as in metrics.jsonl, from 1. id, question, golds: of the row of data.
    document: the text as it was read, placeholders included; sections: [start, end] of each section
    in it, in characters. Neither where the row has no text (searchqa): prompts has what turns saw.
    turns: what the first trajectory wrote: its memory after every section, then its answer.
    answers, exact_match, rewards, advantages: of all trajectories, the first one's first.
    recalls: one of each trajectory: {"trajectory": its number, from 0; "k": the memory asked is the
    one after turn k; "l": [TARGET] stands in section l (both from 1); "target": the hidden entity;
    "prompt", and of all its samples "answers", "exact_match", "rewards", "advantages"}.
    """
    cfg, prompts = setup.cfg, setup.prompts
    mine = [group for group in groups if group.document == document]
    (whole,) = [group for group in mine if group.kind == "trajectory"]
    turns = whole.agents[0].turns
    record = {
        "step": step,
        "id": row["id"],
        "question": row.get("question") or prompts.text(prompts.problem),
        "golds": row["answers"] if "answers" in row else [row["answer"]],
    }
    text = prompts.clean(row.get("text") or row.get("context") or "")
    if not text:
        record["prompts"] = [prompts.text(turn.prompt_ids) for turn in turns]
    else:
        record["document"] = text
        record["sections"] = [[chunk.start, chunk.end] for chunk in cut(setup, text)]
    record["turns"] = [prompts.text(turn.response_ids) for turn in turns]
    record |= results(cfg, whole)

    record["recalls"] = []
    for group in mine:
        if group.kind == "recall":
            asked, drawn = group.agents[0], group.drawn
            recall = {"trajectory": asked.key[2], "k": drawn.k, "l": drawn.l}
            recall |= {"target": drawn.target, "prompt": prompts.text(asked.ids)}
            record["recalls"].append(recall | results(cfg, group))
    return record


def results(cfg, group):
    """What the agents of a group answered, and what they got for it."""
    return {
        "answers": [agent.answer for agent in group.agents],
        "exact_match": group.exact_match,
        "rewards": group.rewards,
        "advantages": grpo.group_advantages(torch.tensor(group.rewards), cfg.scale).tolist(),
    }


def log_line(cfg, m):
    """The line that reads aloud."""
    parts = [f"step {m['step']:04d}/{cfg.steps:04d}", f"R_E {m['R_E']:.2f}", f"em {m['em']:.2f}"]
    if "imr" in m:
        parts.append(f"imr {m['imr']:.2f}")
    if "kl" in m:
        parts.append(f"kl {m['kl']:.1e}")
    parts.append(f"clip {m.get('clip_low', 0) + m.get('clip_high', 0):.1%}")
    parts.append(f"flat groups {m['flat']:.0%} | cut {m['cut']:.0%} | len {m['len']:.0f}")
    grad = "not finite, update skipped" if m["grad"] is None else f"{m['grad']:.2f}"
    parts.append(f"grad {grad}")
    parts.append(f"rollout {m['rollout_s']:.1f}s | update {m['update_s']:.1f}s")
    parts.append(f"{m['tokens_per_s'] / 1000:.1f}k tok/s | {m['memory_gb']:.1f} GB")
    return " | ".join(parts)


def log(cfg, metrics, transcripts=()):
    """Lines for metrics.jsonl and samples.jsonl, and what reads aloud; rank 0 alone."""
    if distributed.rank() > 0:
        return
    append(Path(cfg.out, "metrics.jsonl"), [metrics])
    append(Path(cfg.out, "samples.jsonl"), transcripts)
    if "R_E" in metrics:
        tqdm.write(log_line(cfg, metrics))
    if "heldout" in metrics:
        step = f"step {metrics['step']:04d}/{cfg.steps:04d}"
        tqdm.write(f"{step} | held-out {heldout_line(metrics['heldout'])}")


def append(path, records):
    with path.open("a", errors="replace") as file:  # a lone surrogate ends no run
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_metrics(run):
    """The lines of a run's metrics.jsonl."""
    with Path(run, "metrics.jsonl").open() as file:
        return [json.loads(line) for line in file]


def open_out(cfg, done):
    """Writes config.json, and cuts metrics.jsonl and samples.jsonl back to the last step done."""
    import transformers

    out = Path(cfg.out)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {"config": dataclasses.asdict(cfg), "versions": versions}
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        with data.whole_or_nothing(out / "config.json") as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n")
        for file in (out / "metrics.jsonl", out / "samples.jsonl"):
            lines = file.open().readlines() if done and file.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # the last may be broken off
            kept = [line for line in whole if json.loads(line)["step"] <= done]
            with data.whole_or_nothing(file) as partial:
                partial.write_text("".join(kept))
    torch.distributed.barrier()
    if not (out / "config.json").exists():
        raise InputError(
            f"--out {out}: rank {distributed.rank()} does not see what rank 0 wrote there: all "
            "machines need a folder that they share"
        )


def memory_gb(device):
    """Peak memory of this process, of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ------------------------------------------------------------------------------------------ loop


def train(cfg, device):
    """The whole run, from top to bottom."""
    # model and reference, data, search and sampler, optimizer
    distributed.check_memory(cfg.model, device, cfg.tokens_per_forward, cfg.kl > 0)
    policy, tokenizer = open_policy(cfg.model, device)
    reference = open_reference(cfg, policy, device) if cfg.kl > 0 else None
    lm = policy.train().lm
    if cfg.gradient_checkpointing:
        # later transformers warn about the name that 5.17 has alone
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()
    rows, heldout = TASKS[cfg.task].load(cfg), load_heldout(cfg)
    search = open_search(cfg)
    kv_tokens = cfg.kv_tokens or distributed.kv_budget(lm, device)
    sampling = dict(kv_tokens=kv_tokens, temperature=cfg.temperature)
    setup = open_setup(cfg, policy, tokenizer, search=search, **sampling)
    for task, part in [(cfg.task, rows), *heldout.items()]:
        check_budget(setup_of(setup, task), part, lm)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=cfg.lr,
        betas=(0.9, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=device.type == "cuda",
    )
    done = distributed.load_trainer(cfg.out, policy, optimizer) if cfg.resume else 0
    open_out(cfg, done)
    leader, skipped, signals = distributed.rank() == 0, 0, distributed.note_signals()
    bar = tqdm(total=cfg.steps, initial=done, desc=cfg.task, disable=not leader)
    if done == 0 and heldout:
        log(cfg, {"step": 0, "heldout": evaluate(setup, policy, heldout)})

    for step in range(done, cfg.steps):
        # rollout: every document's trajectories, then their recalls, then rewards
        started, mine = time.time(), rows_of_step(cfg, rows, step)
        with torch.no_grad(), gathered(policy):
            groups = TASKS[cfg.task].rollout(setup, mine, step)
        if cfg.shuffle_rewards:
            shuffle_rewards(cfg, groups, step)
        rolled_out = time.time()

        # advantages, one training sequence a turn, and what the loss compares with
        updates = updates_of(cfg, training_sequences(cfg, groups))
        sequences = sum(updates, [])
        add_old_logps(cfg, policy, sequences)
        if reference:
            add_logps(cfg, reference, sequences, "ref_logps")

        # updates, each on its own documents
        lr = cfg.lr * min(1, (step + 1) / max(cfg.warmup_steps, 1))
        for settings in optimizer.param_groups:
            settings["lr"] = lr
        totals, norms = Counter(), []
        for chosen in updates:
            norms.append(update(cfg, policy, optimizer, chosen, totals))
        finite = all(map(math.isfinite, norms))
        skipped = 0 if finite else skipped + 1

        # log, look at held-out rows
        seconds = rolled_out - started, time.time() - rolled_out
        turns = turns_of(groups) + [s.turn for s in sequences]
        tokens = sum(len(turn.prompt_ids) + len(turn.response_ids) for turn in turns)
        metrics = {"step": step + 1, **step_metrics(groups, totals)}
        metrics |= {"grad": max(norms) if finite else None, "skipped": skipped, "lr": lr}
        metrics |= {"rollout_s": seconds[0], "update_s": seconds[1]}
        metrics |= {"tokens_per_s": sum(all_gather(tokens)) / sum(seconds)}
        metrics |= {"memory_gb": memory_gb(device)}
        last = step + 1 == cfg.steps
        if heldout and (last or cfg.eval_every and (step + 1) % cfg.eval_every == 0):
            metrics["heldout"] = evaluate(setup, policy, heldout)
        bar.update()
        shown = list(mine)[: cfg.samples] if leader else []
        log(cfg, metrics, [transcript(setup, groups, step + 1, n, mine[n]) for n in shown])
        if skipped >= MAX_SKIPPED:
            raise InputError(
                f"{skipped} steps in a row had a non-finite gradient: lower --lr or raise --kl; "
                "the last checkpoint is intact"
            )

        # save; after a signal, leave
        stop = max(all_gather(signals[0] if signals else 0))
        if last or stop or cfg.save_every and (step + 1) % cfg.save_every == 0:
            save(cfg, policy, optimizer, tokenizer, step + 1)
        if stop and not last:
            name = signal.Signals(stop).name
            if leader:
                tqdm.write(f"stopped by {name}: step {step + 1} is saved, --resume goes on there")
            sys.exit(128 + stop)
    bar.close()
    if leader:
        print_before_and_after(cfg)


def shuffle_rewards(cfg, groups, step):
    """The control: the same rewards, each for another member of its group."""
    for group in groups:
        rng = random.Random(f"shuffle {cfg.seed} {step} {group.document}")
        rng.shuffle(group.rewards)


def open_reference(cfg, policy, device):
    """The model that the KL holds on to: the one that training began from, in its own dtype."""
    dtype = distributed.compute_dtype(device)
    lm, _ = distributed.load_model(cfg.model, dtype)
    reference = grpo.Policy(lm, policy.shares).requires_grad_(False)
    return distributed.shard(reference, device, master=False).eval()


def save(cfg, policy, optimizer, tokenizer, step):
    """A checkpoint that brings the model's prompts and settings along, and the run's sizes."""
    given = model_settings(cfg.model)
    settings = given.setdefault("settings", {})
    if TASKS[cfg.task].searches:
        place, names = cfg.task, "answer_tokens result_tokens passages objectives turns"
    else:  # whatever reads shares its sizes
        place, names = "all", "chunk_tokens memory_tokens answer_tokens prompt_order recall_window"
    sizes = {name: getattr(cfg, name) for name in names.split()}
    settings[place] = settings.get(place, {}) | sizes
    files = {"memtrain.json": json.dumps(given, indent=2) + "\n"}
    distributed.save_checkpoint(cfg.out, step, policy, optimizer, tokenizer, cfg.keep, files)


def print_before_and_after(cfg):
    looks = [line for line in read_metrics(cfg.out) if "heldout" in line]
    for word, line in zip(("before", "after "), (looks[:1] + looks[-1:])):
        print(f"{word} (step {line['step']:4d}): {heldout_line(line['heldout'])}")
    print(f"checkpoint: {distributed.checkpoint_path(cfg.out)}")


@distributed.one_line_errors(data.DataError)
def main(argv=None):
    train(parse(argv), distributed.start_ranks())


if __name__ == "__main__":
    main()
