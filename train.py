"""MemTrain and its post-training: roll out memories, reward them, one GRPO update, again.

    python train.py                                              laptop: pocket world and model, nothing to download
    python train.py --model Qwen/Qwen3-1.7B --data DOCS          one GPU (DOCS: made by `python data.py build`)
    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen3-4B-Instruct-2507 --data DOCS
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...
    torchrun --nproc_per_node 8 train.py --task longqa --model runs/memtrain --data hotpotqa_train_32k.parquet

The loop, top to bottom: documents of the step -> rollout (Readers, then Recallers on their memories) -> rewards R_I, R_E ->
advantages per trajectory -> every turn one training sequence -> clipped loss -> step. One process and torchrun run the same
code: weights are sharded with FSDP2 where there is a GPU or a second rank, and plain on a single CPU.

A run leaves in --out: config.json, metrics.jsonl, samples.jsonl and step-NNNNNN/ (a Hugging Face checkpoint with the
trainer's state inside).
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import grpo
import rewards
import tiny
from rollout import PROBLEM, TEMPLATES, Prompts, Reader, Recaller, Sampler, Searcher, rollout


@dataclass
class Config:
    """Defaults are the paper's; POST_TRAINING has those of the other tasks, tiny.CONFIG the pocket-size ones."""

    # task
    task: str = "memtrain"  # memtrain, longqa or searchqa
    objective: str = "full"  # full (both rewards coupled), decoupled (recall trained, not rewarded in R_E) or e2e (no recall)
    model: str = "tiny"  # tiny, a Hub name, a folder with a Hugging Face checkpoint, or the folder of a run
    data: list[str] = field(default_factory=list)  # what `data.py build` wrote, or question files; none: the pocket world
    out: str = ""  # folder of the run (default: runs/TASK)
    resume: bool = False  # continue from the newest intact checkpoint in --out
    force: bool = False  # resume even though settings or data have changed
    seed: int = 0  # of the data order, the recall draws and the sampling noise
    # rollout
    steps: int = 300  # updates of the sampling policy
    documents_per_step: int = 32  # documents or questions of one rollout, over all ranks
    documents_per_update: int = 32  # documents of one optimizer step; fewer than documents_per_step: several updates a rollout
    group: int = 8  # trajectories of a document (G1)
    recalls: int = 8  # samples of one recall (G2)
    recall_draw: str = "trajectory"  # draw step, section and target of a recall per trajectory or per document
    chunk_tokens: int = 5120  # tokens of a section
    max_chunks: int = 8  # sections read; a longer document keeps its head and tail
    chunks: int = 3  # sections of a pocket document
    memory_tokens: int = 1024  # most tokens of a memory
    answer_tokens: int = 1024  # most tokens of an answer
    prompt_order: str = "memory_first"  # memory_first (the papers') or chunk_first (sections shared by all trajectories)
    temperature: float = 1.0  # of sampling; divides the logits in training as well
    # loss
    recall_weight: float = 0.5  # lambda of eq. 2
    kl: float = 1e-3  # weight of the KL to the reference; 0 loads no reference
    clip_low: float = 0.2  # ratio below 1 - this is clipped
    clip_high: float = 0.2  # ratio above 1 + this is clipped
    dual_clip: float = 0.0  # bound on the loss at negative advantages, in advantages; 0: off
    scale: str = "none"  # advantages: none (Dr. GRPO) or group (divided by the group's standard deviation)
    aggregate: str = "sequence"  # loss mean: sequence (eq. 4), token (MemAgent) or constant (Dr. GRPO)
    filter: bool = True  # leave out groups whose rewards are all alike (DAPO)
    shuffle_rewards: bool = False  # control: rewards change places within their group, so that nothing can be learned
    # optimizer
    lr: float = 1e-6  # learning rate, constant after the warm-up
    warmup_steps: int = 20  # steps of linear warm-up
    weight_decay: float = 0.01  # of AdamW
    beta2: float = 0.999  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # memory and speed
    tokens_per_forward: int = 32768  # tokens of a training row; lower it if you run out of memory
    kv_tokens: int = 0  # tokens of the KV cache in rollout; 0: measured from free memory at the start
    segment: int = 32  # new tokens between looks for finished rows
    gradient_checkpointing: bool = True  # make activations again in backward
    processes: int = 1  # ranks to start by itself on a CPU; on GPUs use torchrun
    # logging
    eval_every: int = 50  # steps between looks at held-out documents; 0: only before and after
    eval_documents: int = 256  # held-out documents of a look
    save_every: int = 50  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    samples: int = 2  # transcripts written to samples.jsonl each step
    # search QA
    retriever: str = ""  # corpus file or http://HOST:PORT/retrieve
    encoder: str = "bm25"  # of a local retriever: bm25, or a transformers model for dense search
    passages: int = 3  # results of a search
    result_tokens: int = 1024  # tokens that the results are cut to
    objectives: int = 2  # questions asked at once
    turns: int = 6  # most turns of a trajectory


CHOICES = {
    "task": ("memtrain", "longqa", "searchqa"),
    "objective": ("full", "decoupled", "e2e"),
    "recall_draw": ("trajectory", "document"),
    "prompt_order": ("memory_first", "chunk_first"),
    "scale": ("none", "group"),
    "aggregate": ("sequence", "token", "constant"),
}
POST_TRAINING = {  # MemAgent's and MEM1's settings, as MemTrain used them
    "longqa": dict(steps=500, documents_per_update=8, group=16, aggregate="token"),
    "searchqa": dict(steps=200, documents_per_update=8, group=16, aggregate="token", lr=5e-7),
}
FREE = {  # what may differ when a run is resumed: where it runs, what it shows, how long it goes on
    *("out", "resume", "force", "processes", "steps", "data", "retriever", "eval_every", "eval_documents", "save_every", "keep", "samples"),
    *("kv_tokens", "segment", "tokens_per_forward", "gradient_checkpointing"),
}
DIGESTS = "digests.json"  # of a checkpoint's files
CHILD = "MEMTRAIN_CHILD"  # set in the ranks of start_processes
MAX_SKIPPED = 5  # updates in a row with a non-finite gradient before the run stops


def parse(argv=None):
    """Command line -> Config. Explicit flags win over tiny.CONFIG, that over the task's defaults, those over the paper's."""
    help_text = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(), re.M))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for item in dataclasses.fields(Config):
        default = "" if item.default in ("", dataclasses.MISSING) else f" [{item.default}]"
        kind = {"choices": CHOICES.get(item.name), "type": type(item.default)}
        if item.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif item.name == "data":
            kind = {"nargs": "+"}
        parser.add_argument(f"--{item.name}", help=(help_text[item.name] + default).replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    task, model = given.get("task", Config.task), given.get("model", Config.model)
    pocket = {}
    if is_tiny(model):
        pocket = {"processes": min(4, os.cpu_count() or 1)} | tiny.CONFIG | tiny.CONFIG_OF_TASK.get(task, {})
    cfg = Config(**(POST_TRAINING.get(task, {}) | pocket | given))
    cfg.out, cfg.model = cfg.out or f"runs/{cfg.task}", checkpoint_path(cfg.model)
    cfg.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun --max-restarts started the ranks again
    if cfg.group < 2:
        raise ValueError(f"--group {cfg.group}: an advantage is a difference within a group, which takes at least 2 trajectories")
    if cfg.objective != "e2e" and cfg.task == "memtrain" and cfg.recalls < 2:
        raise ValueError(f"--recalls {cfg.recalls}: a recall group takes at least 2 samples (or choose --objective e2e)")
    if not cfg.data and not is_tiny(model):
        raise ValueError(f"--model {model} needs --data: documents made by `python data.py build`, or question files")
    if cfg.documents_per_step % cfg.documents_per_update:
        raise ValueError(f"--documents_per_step {cfg.documents_per_step} is not a multiple of --documents_per_update {cfg.documents_per_update}")
    return cfg


# ------------------------------------------------------------------------------------------------------ model and ranks


def start_ranks():
    """Joins torchrun's process group, or makes one of this process alone, so that all code below is the same. -> device"""
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one bar, ours
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = datetime.timedelta(hours=2)  # ranks finish their rollouts at different times
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:  # torchrun starts its ranks again on the same store, where the addresses of dead ones still stand
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    return device


def everyone(value):
    """The values of all ranks, in the order of ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def checkpoints(run):
    """The folders of a run's checkpoints, oldest first."""
    return sorted(Path(run).glob("step-*[0-9]"))


def checkpoint_path(model):
    """A run's folder stands for its newest checkpoint; anything else for itself."""
    saved = checkpoints(model)
    return str(saved[-1]) if saved else model


def is_tiny(model):
    """Whether a model is the pocket one, fresh or from a checkpoint: it brings its own data, templates and sizes."""
    config = Path(checkpoint_path(model)) / "config.json"
    return model == "tiny" or config.is_file() and json.loads(config.read_text()).get("memtrain_world") == "tiny"


def compute_dtype(device):
    """What a model computes in, and its cache and checkpoints hold: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def open_policy(path, device):
    """-> (Policy of a checkpoint, fp32 and sharded over all ranks: the master copy that is trained; tokenizer).

    Rank 0 reads the model as fp32 and finds out whether it shares prefixes; the others only map its files, of which `shard`
    copies their part, so that the memory of a machine need not hold the model once a rank."""
    first = dist.get_rank() == 0
    lm, tokenizer = load_model(path, torch.float32 if first else "auto")
    policy = grpo.Policy(lm) if first else None
    shares = everyone(policy and policy.shares)[0]
    return shard(policy or grpo.Policy(lm, shares), device), tokenizer


def load_model(path, dtype):
    """-> (causal language model on the CPU, tokenizer). dtype "auto": as the weights lie in the files, which are then only mapped."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = checkpoint_path(path)
    try:
        config = AutoConfig.from_pretrained(path)
        config.dtype = None  # "auto" would believe the config rather than the files
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype), AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"--model {path}: not a folder with a checkpoint, nor a model that the Hub gives ({str(error).splitlines()[0]})")


def shard(policy, device, master=True):
    """FSDP2 over all ranks: fp32 shards (unless no master copy is wanted), bf16 compute on CUDA; plain fp32 on a single CPU.
    -> policy on its device"""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = compute_dtype(device)
    if dist.get_world_size() == 1 and dtype == torch.float32:
        return policy
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    # No casts of inputs: layers receive what layers gave, and a plan of attention (grpo.py) would not survive them.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in policy.lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.to(device)  # buffers
    if master:
        policy.float()
    policy.set_reshard_after_forward(False, recurse=True)
    policy.set_reshard_after_backward(False, recurse=True)
    with torch.no_grad():  # the root must run once before `generate` enters below it
        policy([[0]], [[0]])
    reshard(policy)
    return policy


def fsdp_units(policy):
    """The modules that FSDP shards, each by itself; none where the model is plain."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def reshard(policy):
    """Drops the gathered weights, which are stale after an optimizer step."""
    for unit in fsdp_units(policy):
        unit.reshard()


@contextlib.contextmanager
def gathered(policy):
    """Inside, every rank holds the whole model, so that `generate` and training rows run without gathering it layer by layer.

    Where no gradients are wanted, FSDP's hooks have nothing left to do, and would cost 0.3 ms of a CPU a layer and token."""
    units = fsdp_units(policy)
    for unit in units:
        unit.unshard()
    idle = [] if torch.is_grad_enabled() else [(unit, unit._forward_pre_hooks, unit._forward_hooks) for unit in units]
    for unit, *_ in idle:
        unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for unit, before, after in idle:
            unit._forward_pre_hooks, unit._forward_hooks = before, after
    dist.barrier()
    reshard(policy)


def kv_bytes(lm, device):
    """Bytes of a token's keys and values."""
    head = getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads
    return 2 * compute_dtype(device).itemsize * lm.config.num_hidden_layers * lm.config.num_key_value_heads * head


def kv_budget(lm, device, to_come=0):
    """Tokens of KV cache that fit into 60 % of the free memory of the fullest rank, less the gathered weights and `to_come` bytes
    (on a CPU: 131072)."""
    if device.type == "cpu":
        return 2**17
    weights = compute_dtype(device).itemsize * sum(parameter.numel() for parameter in lm.parameters())
    room = min(everyone(torch.cuda.mem_get_info(device)[0])) - weights - to_come
    if room <= 0:
        raise ValueError(f"the model leaves no memory for a rollout ({-room / 1e9:.1f} GB short on a GPU): use more GPUs, or a smaller model")
    return int(0.6 * room / kv_bytes(lm, device))


def plan_memory(cfg, lm, device):
    """Sets cfg.kv_tokens where it is 0, from the memory that training will leave. -> a line with a rank's memory by purpose"""
    count, world = sum(parameter.numel() for parameter in lm.parameters()), dist.get_world_size()
    width, whole = compute_dtype(device).itemsize, device.type == "cuda" or world > 1
    size = {"weights": 4 * count / world, "gradients": 4 * count / world, "optimizer": 8 * count / world,
            "reference": width * count / world * (cfg.kl > 0), "gathered weights": width * count * whole}  # fmt: skip
    cfg.kv_tokens = cfg.kv_tokens or kv_budget(lm, device, size["gradients"] + size["optimizer"])
    size["KV cache up to"] = cfg.kv_tokens * kv_bytes(lm, device)
    parts = " + ".join(f"{name} {value / 1e9:.2f}" for name, value in size.items() if value)
    return f"{count / 1e6:.1f}M parameters; memory of a rank, activations aside: {parts} = {sum(size.values()) / 1e9:.2f} GB"


# ---------------------------------------------------------------------------------------------------------- data of a step


class Material(NamedTuple):
    """What a run trains on, and what it looks at: documents for memtrain, questions for the other tasks."""

    rows: list
    heldout: list
    search: object = None  # queries -> list of lists of passages, for searchqa
    heldout_search: object = None


def load_material(cfg, pocket):
    if pocket and not cfg.data:
        return pocket_material(cfg)
    if cfg.task == "memtrain":
        from datasets import concatenate_datasets

        return Material(*(concatenate_datasets([data.load_documents(path, split) for path in cfg.data]) for split in ("train", "heldout")))
    search = open_search(cfg, cfg.retriever) if cfg.task == "searchqa" else None
    parts = [data.load_questions(path, cfg.objectives if search else None) for path in cfg.data]
    return Material(parts[0] if len(parts) == 1 else [row for part in parts for row in part], [], search, search)


def pocket_material(cfg):
    """Documents, questions and corpora of the pocket world, made on the spot."""
    count, seeds = cfg.eval_documents, (cfg.seed, tiny.HELDOUT_SEED)
    if cfg.task == "memtrain":
        return Material(tiny.documents(tiny.TRAIN_DOCUMENTS, seeds[0], cfg.chunks), tiny.documents(count, seeds[1], cfg.chunks))
    if cfg.task == "longqa":
        return Material(tiny.questions(tiny.TRAIN_DOCUMENTS, seeds[0], cfg.chunks), tiny.questions(count, seeds[1], cfg.chunks))
    corpora = []
    for seed in seeds:  # a corpus for training, another for the look at held-out questions
        path = Path("cache", f"passages-{seed}.jsonl")
        if dist.get_rank() == 0:
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in tiny.passages(seed)))
        dist.barrier()
        corpora.append(open_search(cfg, str(path)))
    rows = (data.pair_questions(tiny.search_questions(n * cfg.objectives, seed), cfg.objectives) for n, seed in zip((tiny.TRAIN_DOCUMENTS, count), seeds))
    return Material(*rows, *corpora)


def open_search(cfg, source):
    if not source:
        raise ValueError("--task searchqa needs --retriever: a corpus file, or http://HOST:PORT/retrieve")
    return functools.partial(data.open_retriever(source, encoder=cfg.encoder), k=cfg.passages)


def check_budget(cfg, prompts, material, problem, lm):
    """Nothing may outgrow the model's context; the numbers are known before the run."""
    rows = material.rows
    if cfg.task != "memtrain":  # a data set on disk gives a column without reading the documents beside it
        problem = max(rows["question"] if hasattr(rows, "column_names") else [row["question"] for row in rows], key=len)
    problem = prompts.encode(problem)
    if cfg.task == "searchqa":
        longest = prompts.longest_search(problem, cfg.answer_tokens, cfg.result_tokens)
    else:
        longest = prompts.longest(problem, cfg.chunk_tokens, cfg.memory_tokens, cfg.answer_tokens)
    context = lm.config.max_position_embeddings
    if longest > context:
        raise ValueError(f"instructions, question, input and response can come to {longest} tokens, but the model's context holds {context}: lower "
                         f"--chunk_tokens {cfg.chunk_tokens}, --memory_tokens {cfg.memory_tokens}, --answer_tokens {cfg.answer_tokens} or --result_tokens {cfg.result_tokens}")  # fmt: skip


def divided(rows):
    """This rank's share of rows, {slot: row}."""
    return {slot: rows[slot] for slot in range(dist.get_rank(), len(rows), dist.get_world_size())}


def rows_of_step(cfg, rows, step):
    """This rank's share of a step: {slot: row}. A function of (seed, step) alone; every epoch is another permutation."""
    mine = {}
    for slot in range(dist.get_rank(), cfg.documents_per_step, dist.get_world_size()):
        epoch, place = divmod(step * cfg.documents_per_step + slot, len(rows))
        mine[slot] = rows[order_of_epoch(cfg.seed, epoch, len(rows))[place]]
    return mine


@functools.lru_cache(maxsize=2)
def order_of_epoch(seed, epoch, count):
    return random.Random(f"order {seed} {epoch}").sample(range(count), count)


def head_and_tail(chunks, most):
    """At most `most` chunks: the first half and the last half of a longer document."""
    return chunks if len(chunks) <= most else chunks[: (most + 1) // 2] + chunks[len(chunks) - most // 2 :]


# -------------------------------------------------------------------------------------------------- rollouts and rewards


class Kit(NamedTuple):
    """What every rollout needs."""

    cfg: Config
    prompts: Prompts
    problem: str  # MemTrain's fixed question
    sampler: object  # (prompts, limits, keys) -> responses
    search: object = None  # queries -> list of lists of passages


class Group(NamedTuple):
    """What advantages are relative to: the trajectories of a document, or the samples of one recall."""

    kind: str  # "trajectory" or "recall"
    document: int  # slot of the document in its step
    agents: list  # with their turns
    correct: list  # exact match of every agent's answer; the share of right answers where several questions were asked
    rewards: list  # of every agent


def read_documents(kit, rows, group):
    """Long-text QA: `group` trajectories for every row {slot: question}; reward: exact match of the boxed answer."""
    cfg, prompts, readers = kit.cfg, kit.prompts, {}
    for slot, row in rows.items():
        chunks = data.chunks(prompts.clean(row["context"]), prompts.tokenizer, cfg.chunk_tokens)
        sections, problem = [chunk.ids for chunk in head_and_tail(chunks, cfg.max_chunks)], prompts.encode(row["question"])
        readers[slot] = [Reader(prompts, problem, sections, cfg.memory_tokens, cfg.answer_tokens, (slot, j)) for j in range(group)]
    rollout(sum(readers.values(), []), kit.sampler)
    correct = {slot: [rewards.exact_match(rewards.extract_boxed(r.answer), row["answers"]) for r in readers[slot]] for slot, row in rows.items()}
    return [Group("trajectory", slot, readers[slot], correct[slot], list(correct[slot])) for slot in rows]


def search_and_answer(kit, rows, group):
    """Search QA: `group` trajectories for every row {slot: questions}; reward: the share of right answers (MEM1)."""
    cfg, prompts, searchers = kit.cfg, kit.prompts, {}
    for slot, row in rows.items():
        problem = prompts.encode(row["question"])
        searchers[slot] = [Searcher(prompts, problem, cfg.turns, cfg.answer_tokens, cfg.result_tokens, (slot, j)) for j in range(group)]
    rollout(sum(searchers.values(), []), kit.sampler, kit.search)
    correct = {slot: [search_reward(agent, row["answers"]) for agent in searchers[slot]] for slot, row in rows.items()}
    return [Group("trajectory", slot, searchers[slot], correct[slot], list(correct[slot])) for slot in rows]


def search_reward(agent, golds):
    """Mean exact match over the questions, by position; golds: a list per question."""
    answers = rewards.split_answers(agent.answer, len(golds))
    return sum(map(rewards.exact_match, answers, golds)) / len(golds)


def read_and_recall(kit, rows, group, recalls, salt):
    """MemTrain: `group` trajectories for every row {slot: document}, then `recalls` samples of one recall on each.

    salt: what the draws of step, section and target depend on besides the slot. Rewards: eq. 1 and 2.
    """
    cfg, prompts, problem = kit.cfg, kit.prompts, kit.prompts.encode(kit.problem)
    readers, recallers, groups = {}, {}, []
    rows = {slot: {**row, "text": prompts.clean(row["text"])} for slot, row in rows.items()}
    chunked = {slot: head_and_tail(data.chunks(row["text"], prompts.tokenizer, cfg.chunk_tokens), cfg.max_chunks) for slot, row in rows.items()}
    for slot in rows:
        sections = [chunk.ids for chunk in chunked[slot]]
        readers[slot] = [Reader(prompts, problem, sections, cfg.memory_tokens, cfg.answer_tokens, (slot, j)) for j in range(group)]
    rollout(sum(readers.values(), []), kit.sampler)

    for slot, row in rows.items():
        for j, reader in enumerate(readers[slot] if recalls else []):
            rng = random.Random(f"recall {salt} {slot} {0 if cfg.recall_draw == 'document' else j}")
            if recall := data.draw_recall(row, chunked[slot], prompts.tokenizer, cfg.chunk_tokens, rng):
                memory = reader.memories[recall.k]
                agents = [Recaller(prompts, memory, recall.ids, cfg.answer_tokens, (slot, j, s)) for s in range(recalls)]
                recallers[slot, j] = recall, agents
    rollout([agent for _, agents in recallers.values() for agent in agents], kit.sampler)

    for slot, row in rows.items():
        correct = [rewards.exact_match(rewards.extract_boxed(reader.answer), [row["answer"]]) for reader in readers[slot]]
        earned = []
        for j, right in enumerate(correct):
            recall, agents = recallers.get((slot, j), (None, []))
            recalled = [rewards.exact_match(rewards.extract_boxed(agent.answer), [recall.target]) for agent in agents]  # eq. 1
            if agents:
                groups.append(Group("recall", slot, agents, recalled, recalled))
            earned.append(rewards.end_to_end_reward(right, recalled, cfg.recall_weight, cfg.objective))  # eq. 2
        groups.append(Group("trajectory", slot, readers[slot], correct, earned))
    return groups


def play(kit, rows, group, recalls, salt):
    """The rollout of any task: {slot: row} -> groups with rewards."""
    if kit.cfg.task == "memtrain":
        return read_and_recall(kit, rows, group, recalls, salt)
    return (read_documents if kit.cfg.task == "longqa" else search_and_answer)(kit, rows, group)


def look(kit, policy, rows):
    """Exact match on held-out rows, one trajectory and one recall each, sampled as in training.

    -> {kind: (mean, low, high, n)} with a 95 % interval; the same noise at every look, and on any number of ranks."""
    kit = kit._replace(cfg=dataclasses.replace(kit.cfg, objective="full"))
    kit.sampler.step = "held-out"
    with torch.no_grad(), gathered(policy):
        groups = play(kit, divided(rows), group=1, recalls=1, salt="held-out")
    ranks = everyone([(group.kind, group.correct[0]) for group in groups])
    scores = {kind: [score for rank in ranks for k, score in rank if k == kind] for kind in ("trajectory", "recall")}
    return {kind: interval(values) for kind, values in scores.items() if values}


def interval(scores):
    """Mean of scores in 0..1 with Wilson's 95 % interval: (mean, low, high, n). It stays inside 0..1 and is wide at 0 of n.

    >>> interval([1.0, 0.0, 1.0, 1.0])
    (0.75, 0.3006418401, 0.9544127397, 4)
    """
    n, mean, z = len(scores), sum(scores) / len(scores), 1.959964
    middle, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return mean, round(max(low, 0.0), 10), round(min(high, 1.0), 10), n


# --------------------------------------------------------------------------------------------------------------- update


class Sequence(NamedTuple):
    """One turn, as it is trained."""

    prompt: list
    response: list
    advantage: float
    document: int


def training_sequences(cfg, groups):
    """Every turn of every group, with its trajectory's advantage; flat groups are left out (DAPO), the turns of a filtered
    group do not count anywhere."""
    sequences = []
    for group in groups:
        earned = torch.tensor([group.rewards])
        if cfg.filter and earned.min() == earned.max():
            continue
        for agent, advantage in zip(group.agents, grpo.group_advantages(earned, cfg.scale)[0].tolist()):
            sequences += [Sequence(turn.prompt_ids, turn.response_ids, advantage, group.document) for turn in agent.turns]
    return sequences


def share_of_weights(cfg, sequences):
    """Token weights of this rank's sequences (one tensor each), computed from the lengths of all ranks."""
    ranks = everyone([(s.document, len(s.response)) for s in sequences])
    flat = [item for rank in ranks for item in rank]
    if not flat:
        return []
    most = max(cfg.memory_tokens, cfg.answer_tokens)
    weights = grpo.token_weights([n for _, n in flat], cfg.aggregate, document=[d for d, _ in flat], count=most)
    per_turn = weights.split([n for _, n in flat])
    before = sum(map(len, ranks[: dist.get_rank()]))
    return per_turn[before : before + len(sequences)]


def forward_rows(cfg, policy, sequences, backward=None):
    """Runs all sequences in packed rows, equally many on every rank (a rank short of rows runs a token of weight zero, as
    collectives wait for all). -> detached log-probs per sequence; backward(indices, logps) -> loss of a row."""
    rows = [turns for _, turns in grpo.pack([s.prompt for s in sequences], [s.response for s in sequences], cfg.tokens_per_forward)]
    rows += [[]] * (max(everyone(len(rows))) - len(rows))
    result = [None] * len(sequences)
    for row in rows:
        prompts, responses = [sequences[i].prompt for i in row] or [[0]], [sequences[i].response for i in row] or [[0]]
        logps = policy(iter(prompts), iter(responses), cfg.temperature)  # FSDP would search lists for tensors, id by id: seconds
        if backward:
            loss = backward(row, torch.cat(logps)) if row else 0 * logps[0].sum()
            (loss * dist.get_world_size()).backward()  # FSDP averages over ranks; weights are already global
        for i, values in zip(row, logps):
            result[i] = values.detach()
    return result


def update(cfg, policy, optimizer, sequences, old, ref, totals):
    """One optimizer step on these sequences (this rank's share); a non-finite gradient skips it. -> gradient norm

    old: log-probs at sampling time per sequence, None where this is the rollout's only update; ref: the reference's, or
    None. Adds this rank's sums of metrics over tokens to totals.
    """
    device, weights = policy.lm.device, share_of_weights(cfg, sequences)

    def loss_of_row(row, logps):
        def flat(per_turn):
            return torch.cat([per_turn[i] for i in row]).to(device)

        advantages = flat([torch.full((len(s.response),), s.advantage) for s in sequences])
        loss, metrics = grpo.policy_loss(
            logps, flat(old) if old else logps.detach(), advantages, flat(weights), clip_low=cfg.clip_low, clip_high=cfg.clip_high,
            dual_clip=cfg.dual_clip or None, ref_logps=flat(ref) if ref else None, kl_coef=cfg.kl,
        )  # fmt: skip
        totals.update({name: float(value) * len(logps) for name, value in {**metrics, "tokens": 1.0}.items()})
        return loss

    with gathered(policy):
        forward_rows(cfg, policy, sequences, loss_of_row)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(cfg, policy, optimizer, tokenizer, step):
    """out/step-NNNNNN/: the model in Hugging Face format, and trainer/ with fp32 shards, optimizer and step (DCP).

    Written beside, digested, then renamed, so that a folder of that name is whole; OSError where it can't be written."""
    import torch.distributed.checkpoint as dcp
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    final, partial, trouble = Path(cfg.out, f"step-{step:06d}"), Path(cfg.out, "step.partial"), None
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    model, optim = get_state_dict(policy, optimizer)
    whole = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    try:
        dcp.save({"model": model, "optimizer": optim, "step": step}, checkpoint_id=str(partial / "trainer"))
        if dist.get_rank() == 0:
            policy.lm.config.dtype = dtype = compute_dtype(policy.lm.device)
            policy.lm.save_pretrained(partial, state_dict={name.removeprefix("lm."): value.to(dtype) for name, value in whole.items()})
            tokenizer.save_pretrained(partial)
    except dcp.api.CheckpointException as error:
        trouble = next(iter(error.failures.values()))[0]
    except (OSError, SafetensorError) as error:
        trouble = error
    if trouble := next(filter(None, everyone(trouble and str(trouble).splitlines()[0])), None):
        free = shutil.disk_usage(cfg.out).free / 1e9
        raise OSError(f"{final} could not be saved ({trouble}; {free:.1f} GB free); earlier checkpoints are intact: make room, then --resume")
    written = digests(partial)
    if dist.get_rank() == 0:
        (partial / DIGESTS).write_text(json.dumps(written, indent=0) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(cfg.out)[: -cfg.keep]:
            shutil.rmtree(old)
    dist.barrier()


def digests(folder):
    """{file: sha256} of all that lies in a checkpoint, worked out by all ranks together."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != DIGESTS)
    mine = {}
    for path in files[dist.get_rank() :: dist.get_world_size()]:
        with path.open("rb") as file:
            mine[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return {name: digest for part in everyone(mine) for name, digest in part.items()}


def damage(folder):
    """What is wrong with a checkpoint since it was saved: the name of a file that is missing or has changed, or None."""
    try:
        written = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError):
        return DIGESTS
    found = digests(folder)
    return next((name for name, digest in written.items() if found.get(name) != digest), None)


def load_trainer(path, policy, optimizer):
    """Puts fp32 weights and optimizer state back, on any number of ranks. -> step"""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optim = get_state_dict(policy, optimizer)
    state = {"model": model, "optimizer": optim, "step": 0}
    dcp.load(state, checkpoint_id=str(Path(path) / "trainer"))
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


def checkpoint_to_resume(cfg):
    """Refuses a used --out without --resume; sets damaged checkpoints aside. -> the newest intact one, None to start afresh"""
    out = Path(cfg.out)
    if out.exists() and any(out.iterdir()) and not cfg.resume:
        raise ValueError(f"--out {out} holds a run already: add --resume to go on with it, or choose another folder")
    saved = checkpoints(out)
    for folder in reversed(saved):
        if not (file := damage(folder)):
            return folder
        if dist.get_rank() == 0:
            aside = folder.with_name("damaged-" + folder.name)
            print(f"note: {folder}/{file} is damaged; the checkpoint is set aside as {aside}", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        dist.barrier()
    if saved:
        raise ValueError(f"--resume: no checkpoint in {out} is intact; start again in another folder")
    return None


def course(cfg, material):
    """All that decides a run's course: its settings, and a fingerprint of its data (the number of rows, and a hundred of them)."""
    rows = material.rows
    some = [rows[i] for i in sorted({i * (len(rows) - 1) // 99 for i in range(100)})]
    digest = hashlib.sha256(json.dumps([len(rows), some], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return {name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE} | {"data_fingerprint": digest}


def check_course(cfg, now):
    """Refuses to go on with a run under other settings or data; takes over its KV budget on as many ranks, unless another was asked for."""
    before = json.loads(Path(cfg.out, "config.json").read_text())
    if before["ranks"] == dist.get_world_size():  # on more or fewer, other parts of the model lie on each
        cfg.kv_tokens = cfg.kv_tokens or before["kv_tokens"]
    changed = [f"{name} was {before.get(name)} and is {value}" for name, value in now.items() if before.get(name) != value]
    if changed and not cfg.force:
        raise ValueError(f"--resume: {cfg.out} was begun otherwise ({'; '.join(changed)}): put that back, or add --force")


def open_out(cfg, step, now):
    """Writes config.json and cuts metrics.jsonl and samples.jsonl back to the step that is resumed from."""
    import transformers

    out = Path(cfg.out)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        with data.whole_or_nothing(out / "config.json") as partial:
            partial.write_text(json.dumps(dataclasses.asdict(cfg) | now | {"versions": versions, "ranks": dist.get_world_size()}, indent=2) + "\n")
        for file in (out / "metrics.jsonl", out / "samples.jsonl"):
            lines = file.read_text().splitlines(keepends=True) if step and file.exists() else []
            with data.whole_or_nothing(file) as partial:
                partial.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
    dist.barrier()


@contextlib.contextmanager
def noted_signals():
    """Inside, the first Ctrl-C or SIGTERM is only noted, in the list that this gives, so that the step can be finished and
    saved; a second one acts as ever."""
    noted, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        noted.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------ warm start


def demonstrations(prompts, stage, step, seed):
    """Turns of tiny's oracle on this rank's share of a step's fresh documents, questions and searches: list of (kind, turn)."""
    fresh, count = f"warm start {seed} {step}", stage["rows"]
    kit = Kit(Config(**tiny.CONFIG), prompts, tiny.PROBLEM, tiny.oracle)
    searching = kit._replace(cfg=Config(**tiny.CONFIG | tiny.CONFIG_OF_TASK["searchqa"]), search=tiny.lookup(tiny.passages(fresh)))
    pairs = data.pair_questions(tiny.search_questions(2 * count["searches"], fresh), 2)

    groups = read_and_recall(kit, divided(tiny.documents(count["documents"], fresh, stage["chunks"])), group=1, recalls=2, salt=fresh)
    groups += read_documents(kit, divided(tiny.questions(count["questions"], fresh, stage["chunks"])), group=1)
    turns = [("search", turn) for group in search_and_answer(searching, divided(pairs), group=1) for turn in group.agents[0].turns]
    for group in groups:
        for agent in group.agents:
            turns += [("update", turn) for turn in agent.turns[:-1]]
            turns.append(("answer" if group.kind == "trajectory" else "recall", agent.turns[-1]))
    return turns


def warm_start(seed):
    """The pocket model, taught the form of the task by demonstrations: rollout() with tiny's oracle in the sampler's place,
    then fine-tuning on the recorded turns, divided over ranks. -> its folder in cache/, named by a hash of what it learned from"""
    recipe, rank = tiny.WARM_START, dist.get_rank()
    tokenizer, lm = tiny.tokenizer(), tiny.model(seed)
    lm.config.memtrain_world = "tiny"
    prompts, policy = Prompts(tokenizer, tiny.TEMPLATES), grpo.Policy(lm)
    first = everyone([(turn.prompt_ids, turn.response_ids) for stage in recipe["stages"] for _, turn in demonstrations(prompts, stage, 0, seed)])
    settings = json.dumps([recipe, lm.config.to_dict(), sorted(sum(first, []))], default=str)  # whatever changes the world changes these
    folder = Path("cache", "warm-start-" + hashlib.sha256(settings.encode()).hexdigest()[:12])
    if all(everyone(folder.exists())):
        return str(folder)
    matrices = [p for name, p in policy.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in policy.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=recipe["lr"], weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=recipe["lr_rest"], betas=(0.9, 0.98), weight_decay=0.01)]  # fmt: skip
    stages = [stage for stage in recipe["stages"] for _ in range(stage["steps"])]
    for step, stage in enumerate(tqdm(stages, desc="warm start", disable=rank > 0)):
        scale = min(1, (step + 1) / 30, max((1 - step / len(stages)) / 0.4, 0.1))
        for optimizer, lr in zip(optimizers, (recipe["lr"], recipe["lr_rest"])):
            optimizer.param_groups[0]["lr"] = lr * scale
        turns = demonstrations(prompts, stage, step, seed)
        counts = Counter()
        for kind, tokens in (pair for pairs in everyone([(kind, len(turn.response_ids)) for kind, turn in turns]) for pair in pairs):
            counts[kind] += tokens
        logps = policy([turn.prompt_ids for _, turn in turns], [turn.response_ids for _, turn in turns])
        sum(-values.sum() / counts[kind] for (kind, _), values in zip(turns, logps)).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        dist.all_reduce(gradient)
        torch.nn.utils.vector_to_parameters(gradient, [parameter.grad for parameter in policy.parameters()])
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    lm.model.norm.weight.data *= recipe["sharpen"]
    if rank == 0:
        with data.whole_or_nothing(folder) as partial:
            lm.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    dist.barrier()
    return str(folder)


# ------------------------------------------------------------------------------------------------------------------ main


def transcript(kit, groups, step, slot, row):
    """What the first trajectory of a document wrote, turn by turn, and a recall on it, in plain text, for samples.jsonl."""
    text, mine = kit.prompts.text, [group for group in groups if group.document == slot]
    whole = next(group for group in mine if group.kind == "trajectory")
    record = {"step": step, "id": row["id"], "golds": row.get("answers") or [row["answer"]], "correct": whole.correct, "rewards": whole.rewards,
              "turns": [text(turn.response_ids) for turn in whole.agents[0].turns], "answer": whole.agents[0].answer}  # fmt: skip
    for recall in mine[:1]:
        if recall.kind == "recall":
            record["recall"] = {"prompt": text(recall.agents[0].ids), "answers": [a.answer for a in recall.agents], "rewards": recall.rewards}
    return record


def step_metrics(groups, totals):
    """Means over all ranks of what a step's rollout and updates gave."""
    whole = [group for group in groups if group.kind == "trajectory"]
    agents = [agent for group in whole for agent in group.agents]
    turns = [turn for group in groups for agent in group.agents for turn in agent.turns]
    local = {
        "R_E": [reward for group in whole for reward in group.rewards],
        "em": [score for group in whole for score in group.correct],
        "imr": [score for group in groups if group.kind == "recall" for score in group.correct],
        "flat": [float(min(group.rewards) == max(group.rewards)) for group in groups],
        "cut": [float(turn.truncated) for turn in turns],
        "len": [len(turn.response_ids) for turn in turns],
        "turns": [len(agent.turns) for agent in agents],
        "malformed": [float(agent.malformed) for agent in agents if isinstance(agent, Searcher)],
        "searches": [agent.searches for agent in agents if isinstance(agent, Searcher)],
    }
    ranks = everyone(({name: (sum(values), len(values)) for name, values in local.items()}, totals))
    metrics = {}
    for name in local:
        total, count = (sum(values[name][i] for values, _ in ranks) for i in (0, 1))
        if count:
            metrics[name] = total / count
    for name in sorted({name for _, totals in ranks for name in totals} - {"tokens"}):
        metrics[name] = sum(totals.get(name, 0.0) for _, totals in ranks) / sum(totals.get("tokens", 0.0) for _, totals in ranks)
    return metrics


def memory_gb(device):
    """Peak memory of this process, in GB: of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def log_line(cfg, m):
    """The line that reads aloud."""
    recall = f" | imr {m['imr']:.2f}" if "imr" in m else ""
    kl = f" | kl {m['kl']:.1e}" if "kl" in m else ""
    return (f"step {m['step']:04d}/{cfg.steps:04d} | R_E {m['R_E']:.2f} | em {m['em']:.2f}{recall}{kl} | clip {m.get('clip_low', 0) + m.get('clip_high', 0):.1%}"
            f" | flat groups {m['flat']:.0%} | cut {m['cut']:.0%} | len {m['len']:.0f} | grad {m['grad']:.2f} | rollout {m['rollout_s']:.1f}s"
            f" | update {m['update_s']:.1f}s | {m['tokens_per_s'] / 1000:.1f}k tok/s | {m['memory_gb']:.1f} GB")  # fmt: skip


def train(cfg, device):
    """The whole run: a loop that reads top to bottom."""
    # model, tokenizer, data, sampler
    start_from = checkpoint_to_resume(cfg)
    model_path = warm_start(cfg.seed) if cfg.model == "tiny" else cfg.model
    policy, tokenizer = open_policy(model_path, device)
    lm, pocket, reference = policy.train().lm, is_tiny(model_path), None
    prompts, problem = Prompts(tokenizer, tiny.TEMPLATES if pocket else TEMPLATES, cfg.prompt_order), tiny.PROBLEM if pocket else PROBLEM
    material = load_material(cfg, pocket)
    now = course(cfg, material)
    if start_from:
        check_course(cfg, now)
    check_budget(cfg, prompts, material, problem, lm)
    if cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cfg.kl > 0:
        reference = grpo.Policy(load_model(model_path, compute_dtype(device))[0], policy.shares)
        reference = shard(reference.requires_grad_(False), device, master=False).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    done = load_trainer(start_from, policy, optimizer) if start_from else 0
    memory = plan_memory(cfg, lm, device)
    sampler = Sampler(lm, end_ids(lm, tokenizer), temperature=cfg.temperature, kv_tokens=cfg.kv_tokens, segment=cfg.segment, seed=cfg.seed,
                      stop=prompts.closed if cfg.task == "searchqa" else None, share=policy.shares)  # fmt: skip
    if not policy.shares and dist.get_rank() == 0:
        print(f"note: {type(lm).__name__} has attention that can't share prefixes; every turn runs by itself, which is slower and as exact", file=sys.stderr)
    kit, skipped = Kit(cfg, prompts, problem, sampler, material.search), 0
    heldout = [material.heldout[i] for i in range(min(cfg.eval_documents, len(material.heldout)))]
    kit_heldout = kit._replace(search=material.heldout_search)
    leader = dist.get_rank() == 0
    open_out(cfg, done, now)
    if leader:
        print(memory)
    bar = tqdm(total=cfg.steps, initial=done, desc=cfg.task, disable=not leader)
    if done == 0 and heldout:
        log(cfg, {"step": 0, "heldout": look(kit_heldout, policy, heldout)})

    with noted_signals() as noted:
        for step in range(done, cfg.steps):
            # rollout: every document's trajectories, then their recalls, then rewards
            clock, rows, sampler.step = time.time(), rows_of_step(cfg, material.rows, step), step
            sampler.prefill_tokens = sampler.decode_tokens = 0
            with torch.no_grad(), gathered(policy):
                groups = play(kit, rows, cfg.group, cfg.recalls if cfg.objective != "e2e" else 0, salt=f"{cfg.seed} {step}")
            for group in groups if cfg.shuffle_rewards else []:
                random.Random(f"shuffle {cfg.seed} {step} {group.document}").shuffle(group.rewards)
            rollout_s, clock = time.time() - clock, time.time()

            # advantages, then log-probs of the sampling policy (where it takes several updates) and of the reference
            sequences, old, ref = training_sequences(cfg, groups), None, None
            with torch.no_grad():
                if cfg.documents_per_update < cfg.documents_per_step:
                    with gathered(policy):
                        old = forward_rows(cfg, policy, sequences)
                if reference:
                    with gathered(reference):
                        ref = forward_rows(cfg, reference, sequences)

            # updates, each on its own documents
            for settings in optimizer.param_groups:
                settings["lr"] = cfg.lr * min(1, (step + 1) / max(cfg.warmup_steps, 1))
            totals, norms = Counter(), []
            for first in range(0, cfg.documents_per_step, cfg.documents_per_update):
                chosen = [i for i, s in enumerate(sequences) if first <= s.document < first + cfg.documents_per_update]
                part = [values and [values[i] for i in chosen] for values in (sequences, old, ref)]
                norms.append(update(cfg, policy, optimizer, *part, totals))
            skipped = 0 if all(map(math.isfinite, norms)) else skipped + 1

            # log, look, save
            update_s = time.time() - clock
            tokens = sum(everyone(sampler.prefill_tokens + sampler.decode_tokens + sum(len(s.prompt) + len(s.response) for s in sequences)))
            metrics = {"step": step + 1, **step_metrics(groups, totals), "grad": max(norms), "skipped": skipped, "lr": optimizer.param_groups[0]["lr"],
                       "rollout_s": rollout_s, "update_s": update_s, "tokens_per_s": tokens / (rollout_s + update_s), "memory_gb": memory_gb(device)}  # fmt: skip
            last = step + 1 == cfg.steps
            if heldout and (last or cfg.eval_every and (step + 1) % cfg.eval_every == 0):
                metrics["heldout"] = look(kit_heldout, policy, heldout)
            bar.update()
            log(cfg, metrics, [transcript(kit, groups, step + 1, slot, rows[slot]) for slot in list(rows)[: cfg.samples]])
            if skipped >= MAX_SKIPPED:
                raise ValueError(f"{skipped} updates in a row had a non-finite gradient: lower --lr or raise --kl; the last checkpoint is intact")
            stop = max(everyone(noted[0] if noted else 0))
            if last or stop or (step + 1) % cfg.save_every == 0:
                save_checkpoint(cfg, policy, optimizer, tokenizer, step + 1)
            if stop and not last:
                if leader:
                    tqdm.write(f"stopped by {signal.Signals(stop).name}: step {step + 1} is saved, --resume goes on from there")
                sys.exit(128 + stop)
    bar.close()
    if leader and heldout:
        print_before_and_after(cfg)


def end_ids(lm, tokenizer):
    """The tokens that end a turn: the tokenizer's, and those that the model's own settings name."""
    named = lm.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named] if named is not None else [])}


def log(cfg, metrics, transcripts=()):
    """One line for metrics.jsonl, the transcripts for samples.jsonl, and what reads aloud for the terminal; rank 0 alone."""
    if dist.get_rank() > 0:
        return
    for name, records in ("metrics", [metrics]), ("samples", transcripts):
        with Path(cfg.out, f"{name}.jsonl").open("a") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if "R_E" in metrics:
        tqdm.write(log_line(cfg, metrics))
    if "heldout" in metrics:
        tqdm.write(f"step {metrics['step']:04d}/{cfg.steps:04d} | held-out {held_out_line(metrics['heldout'])}")


PROXY = {"trajectory": "E2E", "recall": "recall"}  # what a look at held-out rows is made of


def held_out_line(result):
    """What a look found, in words."""
    return " | ".join(f"{PROXY[kind]} EM {mean:.3f} [{low:.3f}, {high:.3f}] n={n}" for kind, (mean, low, high, n) in result.items())


def print_before_and_after(cfg):
    lines = [json.loads(line) for line in Path(cfg.out, "metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if "heldout" in line]
    for line, word in (looks[0], "before"), (looks[-1], "after "):
        print(f"{word} (step {line['step']:4d}): {held_out_line(line['heldout'])}")
    print(f"checkpoint: {checkpoint_path(cfg.out)}")


def start_processes(count):
    """Runs this command as `count` ranks on a CPU, where small models gain little from threads within an operation and
    nearly all from ranks of one thread each. -> exit status of the first that fails, or 0"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"OMP_NUM_THREADS": "1", **os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, CHILD: "1"}
    start = functools.partial(subprocess.Popen, [sys.executable, *sys.argv], stdin=subprocess.PIPE, start_new_session=True)
    ranks = [start(env=shared | {"RANK": str(rank)}) for rank in range(count)]
    for number in (signal.SIGINT, signal.SIGTERM):  # a rank finishes its step and saves, see noted_signals
        signal.signal(number, lambda number, frame: [rank.send_signal(number) for rank in ranks])
    while not any(rank.poll() for rank in ranks) and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(timeout=10)  # the others notice by themselves that one is gone
        rank.kill()
    return 128 - status if status < 0 else status


def leave_with_parent():
    """Ends a rank of start_processes when the process that started it is gone, however it went."""
    while os.read(0, 1024):
        pass
    os._exit(1)


@contextlib.contextmanager
def one_line_errors():
    """Bad input ends in one line, and status 2. A rank that fails just leaves, and torchrun ends the others: to take the process
    group apart, it would have to wait for them."""
    try:
        yield
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # where all ranks fail, rank 0 speaks for them, and they are ended before they do
        tqdm.write(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


@one_line_errors()
def main(argv=None):
    cfg = parse(argv)
    if cfg.processes > 1 and "RANK" not in os.environ and not torch.cuda.is_available():
        sys.exit(start_processes(cfg.processes))
    if CHILD in os.environ:
        threading.Thread(target=leave_with_parent, daemon=True).start()
    train(cfg, start_ranks())


if __name__ == "__main__":
    main()
