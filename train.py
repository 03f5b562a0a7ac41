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
import sys
import time
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
from rollout import PROBLEM, TEMPLATES, Prompts, Reader, Recaller, Sampler, Turn, rollout


@dataclass
class Config:
    """Defaults are the paper's; POST_TRAINING has those of the other tasks, tiny.CONFIG the pocket-size ones."""

    # task
    task: str = "memtrain"  # memtrain, longqa or searchqa
    objective: str = "full"  # full (both rewards coupled), decoupled (recall trained, not rewarded in R_E) or e2e (no recall)
    model: str = "tiny"  # tiny, a Hub name, a folder with a Hugging Face checkpoint, or the folder of a run
    data: list[str] = field(default_factory=list)  # what `data.py build` wrote, or question files; none: the pocket world
    out: str = ""  # folder of the run (default: runs/TASK)
    resume: bool = False  # continue from the newest complete checkpoint in --out
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
    pocket = tiny.CONFIG | tiny.CONFIG_OF_TASK.get(task, {}) if is_tiny(model) else {}
    cfg = Config(**(POST_TRAINING.get(task, {}) | pocket | given))
    cfg.out = cfg.out or f"runs/{cfg.task}"
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
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = datetime.timedelta(hours=2)  # ranks finish their rollouts at different times
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def everyone(value):
    """The values of all ranks, in the order of ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def checkpoint_path(model):
    """A run's folder stands for its newest checkpoint; anything else for itself."""
    saved = sorted(Path(model).glob("step-*[0-9]"))
    return str(saved[-1]) if saved else model


def is_tiny(model):
    """Whether a model is the pocket one, fresh or from a checkpoint: it brings its own data, templates and sizes."""
    config = Path(checkpoint_path(model)) / "config.json"
    return model == "tiny" or config.is_file() and json.loads(config.read_text()).get("memtrain_world") == "tiny"


def load_model(path, device):
    """-> (causal language model in fp32 on the CPU, tokenizer). The fp32 weights are the master copy that is trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = checkpoint_path(path)
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"--model {path}: not a folder with a checkpoint, nor a model that the Hub gives ({str(error).splitlines()[0]})")


def shard(policy, device):
    """FSDP2 over all ranks: fp32 shards, bf16 compute on CUDA; plain fp32 on a single CPU. -> policy on its device"""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if dist.get_world_size() == 1 and device.type == "cpu":
        return policy
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for layer in policy.lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.to(device)  # buffers
    policy.set_reshard_after_forward(False, recurse=True)
    policy.set_reshard_after_backward(False, recurse=True)
    with torch.no_grad():  # the root must run once before `generate` enters below it
        policy([[0]], [[0]])
    reshard(policy)
    return policy


def reshard(policy):
    """Drops the gathered weights, which are stale after an optimizer step."""
    from torch.distributed.fsdp import FSDPModule

    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def gathered(policy):
    """Inside, every rank holds the whole model, so that `generate` and training rows run without gathering it layer by layer."""
    from torch.distributed.fsdp import FSDPModule

    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    yield
    dist.barrier()
    reshard(policy)


def kv_budget(lm, device):
    """Tokens of KV cache that fit into 60 % of the free memory of the fullest rank (on a CPU: 131072)."""
    if device.type == "cpu":
        return 2**17
    config = lm.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head
    return min(everyone(int(0.6 * torch.cuda.mem_get_info(device)[0] / bytes_per_token)))


# ---------------------------------------------------------------------------------------------------------- data of a step


def load_rows(cfg):
    """-> (training rows, held-out rows): documents for memtrain, questions for the other tasks."""
    if not cfg.data:
        make = {"memtrain": tiny.documents, "longqa": tiny.questions}[cfg.task]
        return make(tiny.TRAIN_DOCUMENTS, seed=cfg.seed), make(cfg.eval_documents, seed=tiny.HELDOUT_SEED)
    if cfg.task == "memtrain":
        from datasets import concatenate_datasets

        return tuple(concatenate_datasets([data.load_documents(path, split) for path in cfg.data]) for split in ("train", "heldout"))
    rows = [row for path in cfg.data for row in data.load_questions(path)]
    return rows, []


def rows_of_step(cfg, rows, step):
    """This rank's share of a step: {slot: row}. A function of (seed, step) alone; every epoch is another permutation."""
    mine = {}
    for slot in range(dist.get_rank(), cfg.documents_per_step, dist.get_world_size()):
        epoch, place = divmod(step * cfg.documents_per_step + slot, len(rows))
        order = random.Random(f"order {cfg.seed} {epoch}").sample(range(len(rows)), len(rows))
        mine[slot] = rows[order[place]]
    return mine


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


class Group(NamedTuple):
    """What advantages are relative to: the trajectories of a document, or the samples of one recall."""

    kind: str  # "trajectory" or "recall"
    document: int  # slot of the document in its step
    agents: list  # with their turns
    correct: list  # exact match of every agent's answer
    rewards: list  # of every agent


def read_documents(kit, rows, group, salt):
    """Long-text QA: `group` trajectories for every row {slot: question}; reward: exact match of the boxed answer."""
    cfg, prompts, groups = kit.cfg, kit.prompts, []
    for slot, row in rows.items():
        chunks = data.chunks(prompts.clean(row["context"]), prompts.tokenizer, cfg.chunk_tokens)
        sections, problem = [chunk.ids for chunk in head_and_tail(chunks, cfg.max_chunks)], prompts.encode(row["question"])
        readers = [Reader(prompts, problem, sections, cfg.memory_tokens, cfg.answer_tokens, (slot, j)) for j in range(group)]
        groups.append((slot, row["answers"], readers))
    rollout([reader for *_, readers in groups for reader in readers], kit.sampler)
    correct = [[rewards.exact_match(rewards.extract_boxed(r.answer), golds) for r in readers] for _, golds, readers in groups]
    return [Group("trajectory", slot, readers, right, right) for (slot, _, readers), right in zip(groups, correct)]


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
    return read_documents(kit, rows, group, salt)


def evaluate(kit, policy, rows):
    """Exact match on held-out rows, one trajectory and one recall each, sampled as in training: {kind: (mean, half a 95 % interval, n)}."""
    mine = {slot: rows[slot] for slot in range(dist.get_rank(), len(rows), dist.get_world_size())}
    kit = kit._replace(cfg=dataclasses.replace(kit.cfg, objective="full"))
    kit.sampler.step = -1  # its own noise, the same at every look
    with torch.no_grad(), gathered(policy):
        groups = play(kit, mine, group=1, recalls=1, salt="held-out")
    result = {}
    for kind in ("trajectory", "recall"):
        scores = [s for rank in everyone([g.correct[0] for g in groups if g.kind == kind]) for s in rank]
        if scores:
            mean = sum(scores) / len(scores)
            result[kind] = mean, 1.96 * math.sqrt(mean * (1 - mean) / len(scores)), len(scores)
    return result


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
        logps = policy([sequences[i].prompt for i in row] or [[0]], [sequences[i].response for i in row] or [[0]], cfg.temperature)
        if backward:
            loss = backward(row, torch.cat(logps)) if row else 0 * logps[0].sum()
            (loss * dist.get_world_size()).backward()  # FSDP averages over ranks; weights are already global
        for i, values in zip(row, logps):
            result[i] = values.detach()
    return result


def update(cfg, policy, optimizer, sequences, old, ref):
    """One optimizer step on these sequences (this rank's share). old: log-probs at sampling time, or None for a single
    update; ref: the reference's, or None. -> summed metrics"""
    device = policy.lm.device
    weights, totals = share_of_weights(cfg, sequences), {}

    def loss_of_row(row, logps):
        flat = lambda tensors: torch.cat([tensors[i] for i in row]).to(device)  # noqa: E731
        advantages = torch.cat([torch.full((len(sequences[i].response),), sequences[i].advantage) for i in row]).to(device)
        loss, metrics = grpo.policy_loss(
            logps, flat(old) if old else logps.detach(), advantages, flat(weights), clip_low=cfg.clip_low, clip_high=cfg.clip_high,
            dual_clip=cfg.dual_clip or None, ref_logps=flat(ref) if ref else None, kl_coef=cfg.kl,
        )  # fmt: skip
        for name, value in {**metrics, "tokens": 1.0}.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(logps)
        return loss

    with gathered(policy):
        forward_rows(cfg, policy, sequences, loss_of_row)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return totals, norm


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(cfg, policy, optimizer, tokenizer, step):
    """out/step-NNNNNN/: the model in Hugging Face format, and trainer/ with fp32 shards, optimizer and step (DCP)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    final, partial = Path(cfg.out, f"step-{step:06d}"), Path(cfg.out, "step.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    model, optim = get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optimizer": optim, "step": step}, checkpoint_id=str(partial / "trainer"))
    whole = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        dtype = torch.bfloat16 if policy.lm.device.type == "cuda" else torch.float32
        policy.lm.config.dtype = dtype
        policy.lm.save_pretrained(partial, state_dict={name.removeprefix("lm."): value.to(dtype) for name, value in whole.items()})
        tokenizer.save_pretrained(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(Path(cfg.out).glob("step-*[0-9]"))[: -cfg.keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_trainer(path, policy, optimizer):
    """Puts fp32 weights and optimizer state back, on any number of ranks. -> step"""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optim = get_state_dict(policy, optimizer)
    state = {"model": model, "optimizer": optim, "step": 0}
    dcp.load(state, checkpoint_id=str(Path(path) / "trainer"))
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


def prepare_out(cfg):
    """Makes or checks --out. -> (checkpoint to resume from or None, metrics so far): metrics.jsonl is cut back to it."""
    out = Path(cfg.out)
    saved = sorted(out.glob("step-*[0-9]"))
    if out.exists() and any(out.iterdir()) and not cfg.resume:
        raise ValueError(f"--out {out} holds a run already: add --resume to go on with it, or choose another folder")
    newest = saved[-1] if saved else None
    step = int(newest.name[5:]) if newest else -1
    dist.barrier()
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            lines = (out / name).read_text().splitlines(keepends=True) if (out / name).exists() else []
            whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            (out / "cut.partial").write_text("".join(whole))
            (out / "cut.partial").rename(out / name)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
    dist.barrier()
    return newest


# ------------------------------------------------------------------------------------------------------------ warm start


def demonstrations(prompts, stage, documents, questions, seed):
    """Turns of tiny's oracle on fresh documents and questions of these numbers: {kind of prompt: turns}."""
    kit = Kit(Config(**tiny.CONFIG | stage["sizes"]), prompts, tiny.PROBLEM, functools.partial(tiny.oracle, **stage["oracle"]))
    documents = {i: tiny.documents(1, f"warm {seed} {i}", stage["chunks"])[0] for i in documents}
    questions = {i: tiny.questions(1, f"warm {seed} {i}", stage["chunks"])[0] for i in questions}
    groups = read_and_recall(kit, documents, group=1, recalls=1, salt=f"warm {seed}")
    groups += read_documents(kit, questions, group=1, salt=f"warm {seed}")
    turns = {"update": [], "answer": [], "recall": []}
    for group in groups:
        for agent in group.agents:
            turns["answer" if group.kind == "trajectory" else "recall"].append(agent.turns[-1])
            turns["update"] += agent.turns[:-1]
    return turns


def warm_start(seed):
    """The pocket model, taught the form of the task by demonstrations: rollout() with tiny's oracle in the sampler's place,
    then fine-tuning on the recorded turns, divided over ranks. Kept in cache/ under a key of its settings. -> its folder"""
    settings = json.dumps([tiny.WARM_START, seed, Path(tiny.__file__).read_text()])
    folder = Path("cache", "warm-start-" + hashlib.sha256(settings.encode()).hexdigest()[:12])
    if all(everyone(folder.exists())):
        return str(folder)
    tokenizer, lm, recipe = tiny.tokenizer(), tiny.model(seed), tiny.WARM_START
    lm.config.memtrain_world = "tiny"
    prompts, policy, rank, world = Prompts(tokenizer, tiny.TEMPLATES), grpo.Policy(lm), dist.get_rank(), dist.get_world_size()
    stages = [stage for stage in recipe["stages"] for _ in range(stage["steps"])]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=recipe["lr"], betas=(0.9, 0.98))
    for step, stage in enumerate(tqdm(stages, desc="warm start", disable=rank > 0)):
        left = 1 - step / len(stages)
        for part in optimizer.param_groups:
            part["lr"] = recipe["lr"] * min(1, (step + 1) / 30, max(left / 0.4, 0.1))
        first, half = step * recipe["documents"], recipe["documents"] // 2
        turns = demonstrations(prompts, stage, range(first + rank, first + half, world), range(first + half + rank, first + 2 * half, world), seed)
        counts = everyone({kind: sum(len(turn.response_ids) for turn in turns[kind]) for kind in turns})
        for kind, weight in recipe["weights"].items():
            logps = torch.cat(policy([turn.prompt_ids for turn in turns[kind]], [turn.response_ids for turn in turns[kind]]))
            (-weight * logps.sum() / sum(count[kind] for count in counts)).backward()
        for parameter in policy.parameters():
            dist.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        partial = folder.with_suffix(".partial")
        lm.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    dist.barrier()
    return str(folder)


# ------------------------------------------------------------------------------------------------------------------ main


def transcript(kit, groups, step, slot, row):
    """What one trajectory of a document read, kept and answered, in plain text, for samples.jsonl."""
    text = kit.prompts.text
    mine = [g for g in groups if g.document == slot]
    whole = next(g for g in mine if g.kind == "trajectory")
    recalls = [{"prompt": text(g.agents[0].turns[0].prompt_ids), "answers": [a.answer for a in g.agents], "rewards": g.rewards}
               for g in mine if g.kind == "recall"][:1]  # fmt: skip
    reader = whole.agents[0]
    return {"step": step, "id": row["id"], "golds": row.get("answers") or [row["answer"]], "memories": [text(m) for m in reader.memories[1:]],
            "answer": reader.answer, "correct": whole.correct, "rewards": whole.rewards, "recalls": recalls}  # fmt: skip


def step_metrics(groups, totals):
    """Means over all ranks of what a step's rollout and update gave."""
    local = {
        "R_E": [r for g in groups if g.kind == "trajectory" for r in g.rewards],
        "em": [c for g in groups if g.kind == "trajectory" for c in g.correct],
        "imr": [c for g in groups if g.kind == "recall" for c in g.correct],
        "flat": [float(min(g.rewards) == max(g.rewards)) for g in groups],
        "cut": [float(turn.truncated) for g in groups for a in g.agents for turn in a.turns],
        "len": [len(turn.response_ids) for g in groups for a in g.agents for turn in a.turns],
    }
    ranks = everyone(({name: (sum(v), len(v)) for name, v in local.items()}, totals))
    metrics = {}
    for name in local:
        total, count = (sum(values[name][i] for values, _ in ranks) for i in (0, 1))
        if count:
            metrics[name] = total / count
    tokens = sum(totals.get("tokens", 0) for _, totals in ranks)
    for name in sorted({name for _, totals in ranks for name in totals} - {"tokens"}):
        metrics[name] = sum(totals.get(name, 0.0) for _, totals in ranks) / tokens
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
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one bar, ours
    # model, reference, optimizer
    start_from = prepare_out(cfg)
    model_path = warm_start(cfg.seed) if cfg.model == "tiny" else cfg.model
    lm, tokenizer = load_model(model_path, device)
    pocket = is_tiny(model_path)
    prompts = Prompts(tokenizer, tiny.TEMPLATES if pocket else TEMPLATES, cfg.prompt_order)
    problem = tiny.PROBLEM if pocket else PROBLEM
    if cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = shard(grpo.Policy(lm), device).train()
    reference = None
    if cfg.kl > 0:
        reference = shard(grpo.Policy(load_model(model_path, device)[0]).requires_grad_(False), device).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    done = load_trainer(start_from, policy, optimizer) if start_from else 0

    # data and sampler
    rows, heldout = load_rows(cfg)
    cfg.kv_tokens = cfg.kv_tokens or kv_budget(lm, device)
    end_ids = {tokenizer.eos_token_id, *([lm.generation_config.eos_token_id] if isinstance(lm.generation_config.eos_token_id, int) else lm.generation_config.eos_token_id or [])}
    sampler = Sampler(lm, end_ids, temperature=cfg.temperature, kv_tokens=cfg.kv_tokens, segment=cfg.segment, seed=cfg.seed)
    kit, leader, skipped = Kit(cfg, prompts, problem, sampler), dist.get_rank() == 0, 0
    heldout = [heldout[i] for i in range(min(cfg.eval_documents, len(heldout)))]
    bar = tqdm(total=cfg.steps, initial=done, desc=cfg.task, disable=not leader)

    def look(step):
        """Held-out exact match, into metrics.jsonl."""
        if not heldout:
            return
        result = evaluate(kit, policy, heldout)
        if leader:
            tqdm.write(f"step {step:04d}/{cfg.steps:04d} | held-out " + " | ".join(f"{kind} {m:.3f} ± {half:.3f}" for kind, (m, half, n) in result.items()))
            write(cfg, "metrics", {"step": step, "heldout": result})

    if done == 0:
        look(0)
    for step in range(done, cfg.steps):
        # rollout: every document's trajectories, then their recalls, then rewards
        clock, mine, sampler.step = time.time(), rows_of_step(cfg, rows, step), step
        sampler.prefill_tokens = sampler.decode_tokens = 0
        with torch.no_grad(), gathered(policy):
            groups = play(kit, mine, cfg.group, cfg.recalls if cfg.objective != "e2e" else 0, salt=f"{cfg.seed} {step}")
        if cfg.shuffle_rewards:
            for g in groups:
                random.Random(f"shuffle {cfg.seed} {step} {g.document}").shuffle(g.rewards)
        rollout_s, clock = time.time() - clock, time.time()

        # advantages, then log-probs of the sampling policy (for several updates) and of the reference
        sequences, totals, norms = training_sequences(cfg, groups), {}, []
        old = ref = None
        with torch.no_grad():
            if cfg.documents_per_update < cfg.documents_per_step:
                with gathered(policy):
                    old = forward_rows(cfg, policy, sequences)
            if reference:
                with gathered(reference):
                    ref = forward_rows(cfg, reference, sequences)

        # updates
        for part in optimizer.param_groups:
            part["lr"] = cfg.lr * min(1, (step + 1) / max(cfg.warmup_steps, 1))
        for first in range(0, cfg.documents_per_step, cfg.documents_per_update):
            chosen = [i for i, s in enumerate(sequences) if first <= s.document < first + cfg.documents_per_update]
            part = lambda values: values and [values[i] for i in chosen]  # noqa: E731
            counted, norm = update(cfg, policy, optimizer, part(sequences), part(old), part(ref))
            totals = {name: totals.get(name, 0.0) + counted.get(name, 0.0) for name in {*totals, *counted}}
            norms.append(norm)
        skipped = skipped + 1 if not all(map(math.isfinite, norms)) else 0

        # log and save
        update_s = time.time() - clock
        tokens = sum(everyone(sampler.prefill_tokens + sampler.decode_tokens + sum(len(s.prompt) + len(s.response) for s in sequences)))
        metrics = {"step": step + 1, **step_metrics(groups, totals), "grad": max(norms), "skipped": skipped, "lr": optimizer.param_groups[0]["lr"],
                   "rollout_s": rollout_s, "update_s": update_s, "tokens_per_s": tokens / (rollout_s + update_s), "memory_gb": memory_gb(device)}  # fmt: skip
        if leader:
            tqdm.write(log_line(cfg, metrics))
            bar.update()
            write(cfg, "metrics", metrics)
            for slot in list(mine)[: cfg.samples]:
                write(cfg, "samples", transcript(kit, groups, step + 1, slot, mine[slot]))
        if skipped >= MAX_SKIPPED:
            raise ValueError(f"{skipped} updates in a row had a non-finite gradient: lower --lr or raise --kl; the last checkpoint is intact")
        last = step + 1 == cfg.steps
        if last or cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            look(step + 1)
        if last or (step + 1) % cfg.save_every == 0:
            save_checkpoint(cfg, policy, optimizer, tokenizer, step + 1)


def write(cfg, name, record):
    """Appends one line to out/NAME.jsonl."""
    with Path(cfg.out, f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(argv=None):
    try:
        cfg = parse(argv)
        if cfg.processes > 1 and "RANK" not in os.environ and not torch.cuda.is_available():
            # Small models gain little from threads within an operation and nearly all from ranks of one thread each.
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(cfg.processes)]
            os.execvpe(sys.executable, [*command, *sys.argv], {"OMP_NUM_THREADS": "1", **os.environ})
        train(cfg, start_ranks())
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
