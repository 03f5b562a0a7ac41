"""MemTrain and its post-training: roll out memories, reward them, one GRPO update, again.

    python tests/pocket.py && python train.py              a laptop: pocket world and model
    python train.py --model Qwen/Qwen3-1.7B --data DOCS    one GPU (DOCS: made by data.py build)
    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen3-4B-Instruct-2507 --data DOCS
    torchrun --nproc_per_node 8 train.py --task longqa --model runs/memtrain --data questions.jsonl
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT train.py ..

Read it from the top: settings, the loop, the three tasks, the update. In short: documents of the
step -> rollout of a task -> rewards -> advantages per trajectory -> every turn one training
sequence -> clipped loss -> step. What stands below the line "black boxes" is called above by plain
names. A task is a function (setup, rows, step) -> groups with rewards, in the table TASKS.

Left out on purpose: any trainer class, a serving engine, LoRA, settings that imitate other code.

A run leaves in --out: config.json, metrics.jsonl, samples.jsonl (its fields: `transcript`) and
step-NNNNNN/ (a Hugging Face checkpoint with the trainer's state inside).
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import random
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
from data import InputError
from distributed import all_gather, gathered
from rollout import PROBLEM, Prompts, Reader, Recaller, Sampler, Searcher, Turn, context_of, rollout

# ---------------------------------------------------------------------------------------- config


def flag(default, help, *choices, least=None):
    """A field of Config, and a flag of the command line with its help. least: the smallest value
    that makes sense."""
    metadata = {"help": help, "choices": choices or None, "least": least}
    if default == []:
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """Defaults are the paper's for MemTrain. PAPER, below, has the paper's for the other tasks; a
    model's memtrain.json overrides these, explicit flags override all. Sizes are of a whole step
    over all ranks, but for those of "memory and speed", which are a rank's."""

    # task
    task: str = flag("memtrain", "what to train: a name of TASKS")
    objective: str = flag(
        "full", "recall is in R_E, only trained, or absent", "full", "decoupled", "e2e"
    )
    model: str = flag("cache/pocket/model", "Hub name, folder with a checkpoint or of a run")
    data: list[str] = flag([], "folders that data.py build wrote; or files of questions")
    heldout: list[str] = flag([], "more to evaluate: questions, or folders of documents")
    out: str = flag("", "folder of the run; without it runs/TASK")
    resume: bool = flag(False, "continue from the newest checkpoint in --out, with its settings")
    seed: int = flag(0, "of the data order, the recall draws and the sampling noise")
    # rollout
    steps: int = flag(300, "rollouts, each with its update or updates; 0: evaluate only", least=0)
    documents_per_step: int = flag(32, "documents of a rollout, over all ranks", least=1)
    documents_per_update: int = flag(0, "of an optimizer step; 0: all of the rollout", least=0)
    group: int = flag(8, "trajectories of a document (G1)", least=2)
    recalls: int = flag(8, "samples of one recall (G2)", least=1)
    recall_draw: str = flag("trajectory", "draw k, l, target for each", "trajectory", "document")
    chunk_tokens: int = flag(5120, "tokens of a section", least=1)
    max_chunks: int = flag(8, "sections read; a longer document keeps its head and tail", least=1)
    memory_tokens: int = flag(1024, "most tokens of a memory", least=1)
    answer_tokens: int = flag(1024, "most tokens of an answer", least=1)
    prompt_order: str = flag("memory_first", "what comes first", "memory_first", "chunk_first")
    temperature: float = flag(1.0, "of sampling; divides the logits in training as well")
    # loss
    recall_weight: float = flag(0.5, "lambda of eq. 2", least=0)
    kl: float = flag(1e-3, "weight of the KL to the reference; 0 loads no reference", least=0)
    clip_low: float = flag(0.2, "ratio below 1 - this is clipped", least=0)
    clip_high: float = flag(0.2, "ratio above 1 + this is clipped", least=0)
    scale: str = flag("none", "divide advantages by the group's deviation", "none", "group")
    old_logps: str = flag("trainer", "recomputed, or as they were sampled", "trainer", "sampler")
    aggregate: str = flag("sequence", "mean as in eq. 4, or over all tokens", "sequence", "token")
    filter: bool = flag(True, "leave out groups whose rewards are all alike (DAPO)")
    shuffle_rewards: bool = flag(False, "control: rewards change places within their group")
    # optimizer
    lr: float = flag(1e-6, "learning rate, constant after the warm-up", least=0)
    warmup_steps: int = flag(20, "steps of linear warm-up", least=0)
    beta2: float = flag(0.999, "of AdamW", least=0)
    # memory and speed
    tokens_per_forward: int = flag(32768, "tokens of a pack: the knob of the update", least=1)
    kv_tokens: int = flag(0, "tokens of the KV cache in rollout; 0: measured at the start", least=0)
    gradient_checkpointing: bool = flag(True, "compute activations again in backward")
    # logging
    eval_every: int = flag(50, "steps between evaluations; 0: only before and after", least=0)
    eval_documents: int = flag(256, "held-out rows of each source", least=0)
    save_every: int = flag(50, "steps between checkpoints; 0: only at the end", least=0)
    # search QA
    retriever: str = flag("", "corpus file or http://HOST:PORT/retrieve")
    encoder: str = flag("bm25", "of a corpus file: bm25, or a transformers model")
    passages: int = flag(3, "results of a search", least=1)
    result_tokens: int = flag(1024, "tokens that the results are cut to", least=1)
    objectives: int = flag(2, "questions asked at once", least=1)
    turns: int = flag(6, "most turns of a trajectory", least=1)

    def __post_init__(self):
        self.documents_per_update = self.documents_per_update or self.documents_per_step


PAPER = {  # where the paper's post-training tasks differ
    "longqa": dict(steps=500, documents_per_update=8, group=16, aggregate="token"),
    "searchqa": dict(steps=200, documents_per_update=8, group=16, aggregate="token", lr=5e-7),
}
WEIGHT_DECAY = 0.01  # of AdamW
MAX_GRAD_NORM = 1.0
MAX_SKIPPED = 5  # steps in a row with a non-finite gradient before the run stops
TRANSCRIPTS = 2  # documents of a step that are written to samples.jsonl
CHECKPOINTS = 2  # that are kept

# ------------------------------------------------------------------------------------------ loop


def train(cfg, device):
    """The whole run, from top to bottom."""
    # model and reference, data, search and sampler, optimizer
    policy, tokenizer = open_policy(cfg.model, device)
    reference = open_reference(cfg, policy, device) if cfg.kl > 0 else None
    lm = policy.train().lm
    if cfg.gradient_checkpointing:
        # later transformers warn about the name that 5.17 has alone
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()
    rows = load_training(cfg)
    kv_tokens = cfg.kv_tokens or distributed.kv_budget(lm, device)
    sampling = dict(kv_tokens=kv_tokens, temperature=cfg.temperature, search=open_search(cfg))
    setup = open_setup(cfg, policy, tokenizer, **sampling)
    heldout = []  # [(setup of the task that answers, rows), ..]
    for task, part in load_heldout(cfg).items():
        own = dataclasses.replace(cfg, task=task)
        heldout.append((open_setup(own, policy, tokenizer, **sampling), part))
    for asked, part in [(setup, rows), *heldout]:
        check_context(asked, part, lm)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=cfg.lr,
        betas=(0.9, cfg.beta2),
        weight_decay=WEIGHT_DECAY,
        fused=device.type == "cuda",
    )
    done = distributed.load_trainer(cfg.out, policy, optimizer) if cfg.resume else 0
    open_out(cfg, done)
    leader, skipped, signals = distributed.rank() == 0, 0, distributed.note_signals()
    bar = tqdm(total=cfg.steps, initial=done, desc=cfg.task, disable=not leader)
    if done == 0 and heldout:
        log(cfg, {"step": 0, "heldout": evaluate(policy, heldout)})

    for step in range(done, cfg.steps):
        # rollout: every document's trajectories, then their recalls, then rewards
        started, mine = time.time(), rows_of_step(cfg, rows, step)
        with torch.no_grad(), gathered(policy):
            groups = checked(TASKS[cfg.task].rollout(setup, mine, step), mine)
        if cfg.shuffle_rewards:
            shuffle_rewards(cfg, groups)
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

        # log, evaluate
        metrics = {"step": step + 1, **step_metrics(groups, totals)}
        metrics |= {"grad": max(norms) if finite else None, "skipped": skipped, "lr": lr}
        seconds = rolled_out - started, time.time() - rolled_out
        metrics |= cost_metrics(groups, sequences, *seconds, device)
        last = step + 1 == cfg.steps
        if heldout and (last or cfg.eval_every and (step + 1) % cfg.eval_every == 0):
            metrics["heldout"] = evaluate(policy, heldout)
        if metrics.get("unread"):
            note("--max_chunks leaves a part of the texts unread: metric `unread`")
        bar.update()
        shown = list(mine)[:TRANSCRIPTS] if leader else []
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
            leave_after(stop, step + 1)
    bar.close()
    if leader:
        print_before_and_after(cfg)


# ----------------------------------------------------------------------------------------- tasks


class Setup(NamedTuple):
    """What every rollout needs."""

    cfg: Config
    prompts: Prompts
    sampler: object  # (prompts, limits, keys) -> responses
    search: object = None  # queries -> list of lists of passages


class Group(NamedTuple):
    """What advantages are relative to: the trajectories of a document, or the samples of a recall.
    A task gives one group of kind "trajectory" for every document, and as many others as it likes.

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
        text = row["text"]
        chunks[document] = chunks_of(setup, text)
        problem = prompts.encode(row["question"]) if row.get("question") else prompts.problem
        readers[document] = make_readers(setup, problem, text, chunks[document], (step, document))
    rollout(sum(readers.values(), []), setup.sampler)

    # recall: of memory m_k of trajectory i, the entity hidden in an earlier chunk c_l
    asked = {} if cfg.objective == "e2e" else readers
    recalls = {}  # (document, i) -> (data.Recall, agents)
    for document, i in [(document, i) for document in asked for i in range(cfg.group)]:
        drawn_for = i if cfg.recall_draw == "trajectory" else "all"
        rng = random.Random(f"recall {cfg.seed} {step} {document} {drawn_for}")
        row, tokenizer = rows[document], prompts.tokenizer
        drawn = data.draw_recall(row, chunks[document], tokenizer, cfg.chunk_tokens, rng)
        if drawn is not None:
            memory = readers[document][i].memories[drawn.k]
            keys = [(step, document, i, j) for j in range(cfg.recalls)]
            agents = [Recaller(prompts, memory, drawn.ids, cfg.answer_tokens, key) for key in keys]
            recalls[document, i] = drawn, agents
    rollout([agent for _, agents in recalls.values() for agent in agents], setup.sampler)

    # rewards: R_I of the recalls (eq. 1), R_E of the trajectories (eq. 2)
    groups = []
    for document, row in rows.items():
        trajectories = scored("trajectory", document, readers[document], [row["answer"]])
        R_E = []
        for i, correct in enumerate(trajectories.rewards):
            R_I = []
            if (document, i) in recalls:
                drawn, agents = recalls[document, i]
                recall = scored("recall", document, agents, [drawn.target], drawn)
                groups.append(recall)
                R_I = recall.rewards
            R_E.append(rewards.end_to_end_reward(correct, R_I, cfg.recall_weight, cfg.objective))
        groups.append(trajectories._replace(rewards=R_E))
    return groups


def longqa(setup, rows, step, agent=Reader):
    """Long-text QA (MemAgent): `group` trajectories read each context {number: row} and answer.
    agent: another kind of Reader."""
    readers = {}
    for document, row in rows.items():
        text = setup.prompts.clean(row["context"])
        problem, chunks = setup.prompts.encode(row["question"]), chunks_of(setup, text)
        readers[document] = make_readers(setup, problem, text, chunks, (step, document), agent)
    rollout(sum(readers.values(), []), setup.sampler)
    groups = []
    for document, row in rows.items():
        groups.append(scored("trajectory", document, readers[document], row["answers"]))
    return groups


def searchqa(setup, rows, step):
    """Search QA (MEM1): `group` trajectories search for the answers of each row's questions; the
    reward is the mean over its questions, by position."""
    cfg, searchers = setup.cfg, {}
    for document, row in rows.items():
        problem, searchers[document] = setup.prompts.encode(row["question"]), []
        for i in range(cfg.group):
            searcher = Searcher(
                setup.prompts,
                problem,
                turns=cfg.turns,
                answer_tokens=cfg.answer_tokens,
                result_tokens=cfg.result_tokens,
                key=(step, document, i),
            )
            searchers[document].append(searcher)
    rollout(sum(searchers.values(), []), setup.sampler, setup.search)

    groups = []
    for document, row in rows.items():
        group = Group("trajectory", document, searchers[document], [], [])
        for agent in group.agents:
            answers = rewards.split_answers(agent.answer, len(row["answers"]))
            pairs = list(zip(answers, row["answers"]))
            group.exact_match.append(mean(rewards.exact_match(*pair) for pair in pairs))
            group.rewards.append(mean(rewarded(*pair) for pair in pairs))
        groups.append(group)
    return groups


class Task(NamedTuple):
    rollout: object  # (setup, rows {document: row}, step) -> groups with rewards
    reads: str  # "documents", "questions" (each with a text), "searches" (questions without)


TASKS = {
    "memtrain": Task(memtrain, "documents"),
    "longqa": Task(longqa, "questions"),  # MemAgent
    "searchqa": Task(searchqa, "searches"),  # MEM1
}


def chunks_of(setup, text):
    """The chunks of a text; of one longer than max_chunks the head and the tail."""
    cfg = setup.cfg
    chunks = data.chunks(text, setup.prompts.tokenizer, cfg.chunk_tokens)
    if len(chunks) > cfg.max_chunks:
        head, tail = (cfg.max_chunks + 1) // 2, cfg.max_chunks // 2
        chunks = chunks[:head] + chunks[len(chunks) - tail :]
    return chunks


def make_readers(setup, problem, text, chunks, key, agent=Reader):
    """The `group` trajectories of one document, whose text is read in these chunks."""
    cfg, ids, readers = setup.cfg, [chunk.ids for chunk in chunks], []
    for i in range(cfg.group):
        own = (*key, i)
        readers.append(
            agent(setup.prompts, problem, ids, cfg.memory_tokens, cfg.answer_tokens, own)
        )
        readers[-1].unread = unread(text, chunks)  # for the metric
    return readers


def scored(kind, document, agents, golds, drawn=None):
    """The group of these agents, each scored by its boxed answer."""
    answers = [rewards.extract_boxed(agent.answer) for agent in agents]
    exact_match = [rewards.exact_match(answer, golds) for answer in answers]
    earned = [rewarded(answer, golds) for answer in answers]
    return Group(kind, document, agents, exact_match, earned, drawn)


def rewarded(answer, golds):
    """What rewards.answer_reward gives, as a number."""
    return number(rewards.answer_reward(answer, golds), "rewards.answer_reward")


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
        earned = [number(reward, f"task {cfg.task}") for reward in group.rewards]
        if cfg.filter and min(earned) == max(earned):
            continue
        advantages = grpo.group_advantages(torch.tensor(earned), cfg.scale)
        for agent, advantage in zip(group.agents, advantages.tolist()):
            for turn in agent.turns:
                sequences.append(Sequence(turn, advantage, group.document))
    return sequences


def updates_of(cfg, sequences):
    """Divides a rollout's sequences into those of its updates, `documents_per_update` each, and
    balances each over the ranks. -> list of this rank's lists"""
    updates = []
    for first in range(0, cfg.documents_per_step, cfg.documents_per_update):
        documents = range(first, first + cfg.documents_per_update)
        updates.append(balance([s for s in sequences if s.document in documents]))
    return updates


def add_weights(cfg, sequences):
    """Token weights of this rank's sequences, from the lengths of all ranks' turns."""
    ranks = all_gather([(s.document, len(s.turn.response_ids)) for s in sequences])
    turns = [turn for rank in ranks for turn in rank]
    documents, lengths = [d for d, _ in turns], [n for _, n in turns]
    weights = grpo.token_weights(lengths, cfg.aggregate, document=documents)
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
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
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
        ref_logps=ref,
        kl_coef=cfg.kl,
    )

    # how far training is from what the sampler drew at
    trained = old if old is not None and cfg.old_logps == "trainer" else current
    gap = trained - flat([torch.tensor(s.turn.logps) for s in pack])
    metrics["mismatch"] = gap.abs().mean()
    metrics["mismatch_kl"] = (gap.expm1() - gap).mean()  # k3 of KL(sampler || trainer)
    totals["mismatch_max"] = max(totals["mismatch_max"], float(gap.abs().max()))
    totals["tokens"] += len(logps)
    for name, value in metrics.items():
        totals[name] += float(value) * len(logps)
    return loss


# =================================================================================================
# Black boxes: called above by plain names

# --------------------------------------------------------------------------------------- settings


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
    """Command line -> the flags that it gives, {name: value}."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.usage = "train.py [--flag value ..]"
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        given["resume"] = True  # torchrun --max-restarts started the ranks again
    return given


# flags that may differ when a run is resumed: how long, what it shows and keeps, where it runs
RESUMED = "out resume steps heldout eval_every eval_documents save_every".split()
RESUMED += "kv_tokens tokens_per_forward retriever".split()


def open_run(given):
    """The flags that were given -> Config; of a run that is resumed, its own."""
    out = given["out"] = given.get("out") or f"runs/{given.get('task', Config.task)}"
    saved = Path(out, "config.json")
    if not (given.get("resume") and saved.exists()):
        if os.path.exists(out) and not os.path.isdir(out):
            raise InputError(f"--out {out} is a file: name a folder")
        # what a run leaves that failed before its first line is nothing
        left = [file for file in Path(out).glob("*") if file != saved and file.stat().st_size]
        if left and not given.get("resume"):
            another = "add --resume to continue it, or choose another folder"
            raise InputError(f"--out {out} holds a run already: {another}")
        return configure(given)

    begun = json.loads(saved.read_text())["config"]
    if set(begun) != {field.name for field in dataclasses.fields(Config)}:
        raise InputError(f"--resume: {out} was begun by another version of train.py")
    if "model" in given:
        given["model"] = distributed.checkpoint_path(given["model"])
    for name, value in given.items():
        if name not in RESUMED and begun.get(name) != value:
            raise InputError(
                f"--resume: {out} was begun with --{name} {begun.get(name)}, not {value}: leave "
                "the flag out, or choose another folder"
            )
    return Config(**begun | given)


def configure(given):
    """Flags -> Config, filled up from the model's memtrain.json and the task. InputError where
    settings don't go together."""
    settings = {name: value for name, (value, _) in origins(given).items()}
    step = settings.get("documents_per_step", Config.documents_per_step)
    if "documents_per_update" not in given and settings.get("documents_per_update", 0) > step:
        settings["documents_per_update"] = step  # the task's may be more than a small step has
    cfg = Config(**settings)
    for field in dataclasses.fields(Config):
        value, least = getattr(cfg, field.name), field.metadata["least"]
        if least is not None and not least <= value < math.inf:
            raise InputError(f"--{field.name} {value}: at least {least} is wanted")
    problem = None
    if cfg.objective != "e2e" and cfg.recalls < 2:
        problem = f"--recalls {cfg.recalls}: take at least 2 samples, or --objective e2e"
    elif not cfg.data:
        problem = f"--model {cfg.model} needs --data: folders of documents, or questions"
    elif not 0 < cfg.temperature < math.inf:
        problem = f"--temperature {cfg.temperature}: training samples, take more than 0"
    elif cfg.documents_per_step % cfg.documents_per_update:
        problem = f"--documents_per_step {cfg.documents_per_step} is not a multiple of "
        problem += f"--documents_per_update {cfg.documents_per_update}"
    if problem:
        raise InputError(problem)
    return cfg


def origins(given):
    """Every setting that is not left to Config's defaults: {name: (value, where it comes from)}.
    Flags win over the model's memtrain.json, that over the paper's settings of the task."""
    task = given.get("task", Config.task)
    model = distributed.checkpoint_path(given.get("model", Config.model))
    if model.count("/") > 1 and not os.path.exists(model):  # no name of the Hub
        cure = ": make it with: python tests/pocket.py" if model == Config.model else ""
        raise InputError(f"--model {model} is not there{cure}")
    own = model_settings(model).get("settings", {})
    own = own.get("all", {}) | own.get(task, {})
    fields, merged = {field.name: field for field in dataclasses.fields(Config)}, {}
    for name, value in own.items():
        if name not in fields:
            raise InputError(f"{model}/memtrain.json sets {name}: no such flag")
        choices, plain = fields[name].metadata["choices"], getattr(Config(), name)
        whole = isinstance(plain, float) and type(value) is int
        if choices and value not in choices or type(value) is not type(plain) and not whole:
            wanted = " or ".join(choices) if choices else f"a {type(plain).__name__}"
            raise InputError(f"{model}/memtrain.json sets {name} to {value!r}: {wanted} is wanted")

    layers = {f"paper's {task}": PAPER.get(task, {}), "memtrain.json": own, "flag": given}
    for origin, settings in layers.items():
        for name, value in settings.items():
            merged[name] = value, origin
    merged["model"] = model, "flag"
    return merged


def print_settings(cfg, given):
    """The settings that differ from Config's defaults, and where each comes from."""
    resumed = cfg.resume and Path(cfg.out, "config.json").exists()
    known = dict.fromkeys(given, (None, "flag")) if resumed else origins(given)
    otherwise = None, "the run's own" if resumed else "as documents_per_step"
    plain, parts = dataclasses.asdict(Config()), []
    for name, value in dataclasses.asdict(cfg).items():
        if value != plain[name] and name != "out":
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"{name} {value} ({known.get(name, otherwise)[1]})")
    print("settings:", ", ".join(parts))


def model_settings(model):
    """memtrain.json of a model folder, {} without: prompts ("problem", "templates") and defaults
    for flags ("settings": {"all": {..}, task: {..}}) that travel with the model."""
    file = Path(model, "memtrain.json")
    try:
        own = json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not JSON ({error.msg}); repair it") from None
    kinds, inner = {"problem": str, "task": str}, {"templates": str, "settings": dict}
    for name, value in own.items() if isinstance(own, dict) else [("it", own)]:
        if isinstance(value, dict) and name in inner:
            known = all(isinstance(each, inner[name]) for each in value.values())
        else:
            known = isinstance(value, kinds.get(name, ()))
        if not known:
            wanted = "texts under problem, task and templates, and settings by task"
            raise InputError(f"{file}: {name} is not understood; it holds {wanted}")
    return own


# ---------------------------------------------------------------------------------- model, prompts


def open_policy(path, device, master=True):
    """-> (Policy of a checkpoint, fp32 and sharded over all ranks: the master copy, unless nothing
    is to be trained; tokenizer).

    Rank 0 reads the model as fp32 and finds out whether it shares prefixes; the others only map
    its files, of which `shard` copies their part: the host's memory need not hold it once a rank.
    """
    leader = distributed.rank() == 0
    lm, tokenizer = distributed.load_model(path, torch.float32 if leader else "auto")
    with data.explained(f"--model {path} can't be trained", ValueError):
        shares = all_gather(grpo.Policy(lm).shares if leader else None)[0]
    if not shares:
        note(f"{type(lm).__name__} can't share prefixes; every turn runs by itself")
    return distributed.shard(grpo.Policy(lm, shares), device, master), tokenizer


def open_reference(cfg, policy, device):
    """The model that the KL holds on to: the one that training began from, in its own dtype."""
    dtype = distributed.compute_dtype(device)
    lm, _ = distributed.load_model(cfg.model, dtype)
    reference = grpo.Policy(lm, policy.shares).requires_grad_(False)
    return distributed.shard(reference, device, master=False).eval()


def open_setup(cfg, policy, tokenizer, *, kv_tokens, search=None, temperature, top_p=1.0):
    """Prompts as the model's folder has them, and a sampler of the policy."""
    own = model_settings(cfg.model)
    try:
        prompts = Prompts(
            tokenizer, own.get("templates"), own.get("problem", PROBLEM), cfg.prompt_order
        )
    except ValueError as error:
        raise InputError(f"--model {cfg.model}: {error}") from None
    if prompts.thinks:
        note(
            f"this model thinks ({prompts.thinks}) whatever it is told: a thought is neither "
            "memory nor answer, and takes of --memory_tokens and --answer_tokens"
        )

    # a response ends as the model's own settings say, else as the chat template ends one
    ends, named = prompts.ends, policy.lm.generation_config.eos_token_id
    if named is not None:
        ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        prompts.special_ids |= ends
    sampler = Sampler(
        policy.lm,
        ends,
        temperature=temperature,
        top_p=top_p,
        kv_tokens=kv_tokens,
        seed=cfg.seed,
        stop=prompts.closed if TASKS[cfg.task].reads == "searches" else None,
        share=policy.shares,
    )
    return Setup(cfg, prompts, sampler, search)


def open_search(cfg):
    """The search of a task that has one: queries -> list of lists of passages."""
    if TASKS[cfg.task].reads != "searches":
        return None
    if not cfg.retriever:
        raise InputError("searchqa needs --retriever: a corpus file, or http://HOST:PORT/retrieve")
    return functools.partial(data.open_retriever(cfg.retriever, cfg.encoder), k=cfg.passages)


def check_context(setup, rows, lm):
    """InputError where a prompt and its response could outgrow the model's context."""
    cfg, longest, context = setup.cfg, longest_turn(setup, rows), context_of(lm)
    if longest > context:
        raise InputError(
            f"instructions, question, input and response can come to {longest} tokens, but the "
            f"model's context holds {context}: lower --chunk_tokens {cfg.chunk_tokens}, "
            f"--memory_tokens {cfg.memory_tokens}, --answer_tokens {cfg.answer_tokens} or "
            f"--result_tokens {cfg.result_tokens}"
        )


def longest_turn(setup, rows):
    """The most tokens that a prompt and its response can come to on these rows."""
    cfg, prompts = setup.cfg, setup.prompts
    problems = [prompts.encode(text) if text else prompts.problem for text in questions_of(rows)]
    question = max(map(len, problems), default=0)
    if TASKS[cfg.task].reads == "searches":  # a Searcher sees its last response and the results
        shown = cfg.answer_tokens + cfg.result_tokens + sum(map(len, prompts.information))
        turns = len(prompts.encode(str(cfg.turns)))
        return len(prompts.search) + question + shown + turns + cfg.answer_tokens
    memory = max(cfg.memory_tokens, len(prompts.no_memory))
    update = len(prompts.update) + question + memory + cfg.chunk_tokens + cfg.memory_tokens
    answer = len(prompts.answer) + question + memory + cfg.answer_tokens
    recall = len(prompts.recall) + memory + cfg.chunk_tokens + cfg.answer_tokens
    return max(update, answer, recall)


# ------------------------------------------------------------------------------------------- data


def load_rows(cfg, task, path, split="train"):
    """What a task reads: the documents of a folder, of its part `split`; or a file's questions."""
    reads = TASKS[task].reads
    if reads == "documents":
        return data.load_documents(path, split)
    if data.holds_documents(path):
        raise InputError(f"{path}: masked documents, but --task {task} answers questions")
    if reads == "questions":
        return data.load_questions(path, long=True)
    return data.load_questions(path, cfg.objectives)


def load_training(cfg):
    """The rows of all --data."""
    parts = [load_rows(cfg, cfg.task, path) for path in cfg.data]
    if TASKS[cfg.task].reads == "documents":
        from datasets import concatenate_datasets

        return concatenate_datasets(parts)
    return sum(parts, [])


def load_heldout(cfg):
    """What is evaluated while training: {task that answers: rows}.

    Sources are what documents hold out, and --heldout; of each the first eval_documents. The task
    that trains answers what it can read, else memtrain documents and longqa questions."""
    on_documents, heldout = TASKS[cfg.task].reads == "documents", {}
    for path in dict.fromkeys([*cfg.data, *cfg.heldout] if on_documents else cfg.heldout):
        documents, task = data.holds_documents(path), cfg.task
        if documents != on_documents:
            task = "memtrain" if documents else "longqa"
        rows = load_rows(cfg, task, path, "heldout")
        if path in cfg.heldout and not len(rows):
            raise InputError(f"{path}: none held out (data.py build --heldout N)")
        few = [rows[i] for i in range(min(cfg.eval_documents, len(rows)))]
        if few:
            heldout.setdefault(task, []).extend(few)
    return heldout


def questions_of(rows):
    """The questions that rows have; None stands for those that have none of their own."""
    if hasattr(rows, "column_names"):  # of a data set on disk, without reading the texts beside it
        return set(rows["question"])
    return {row.get("question") for row in rows}


def rows_of_step(cfg, rows, step):
    """This rank's rows of a step, {document: row}, document being the number within the step.
    A function of (seed, step) alone; every epoch is another permutation."""
    mine = {}
    for document in range(distributed.rank(), cfg.documents_per_step, distributed.world_size()):
        epoch, number = divmod(step * cfg.documents_per_step + document, len(rows))
        mine[document] = rows[order_of_epoch(cfg.seed, epoch, len(rows))[number]]
    return mine


@functools.lru_cache(maxsize=2)  # a step may lie in two epochs
def order_of_epoch(seed, epoch, count):
    return random.Random(f"order {seed} {epoch}").sample(range(count), count)


def balance(sequences):
    """Deals all ranks' sequences out anew, so that ranks have about equally many tokens to train:
    the longest first, to the rank that has least. Those with a common prefix stay together."""
    prompts = [s.turn.prompt_ids for s in sequences]
    responses = [s.turn.response_ids for s in sequences]
    units = []  # (tokens, sequences)
    for _, unit in grpo.shared_prefixes(prompts):
        tokens = grpo.pack_tokens(prompts, responses, unit)
        units.append((tokens, [sequences[i] for i in unit]))

    loads, mine = [0] * distributed.world_size(), []
    for tokens, unit in sorted(sum(all_gather(units), []), key=lambda unit: -unit[0]):
        rank = loads.index(min(loads))
        loads[rank] += tokens
        mine += unit if rank == distributed.rank() else []
    return mine


def checked(groups, rows):
    """The groups of a rollout. ValueError where a task of somebody's own gave something else."""
    read = sorted(group.document for group in groups if group.kind == "trajectory")
    if read != sorted(rows):
        raise ValueError(f"one trajectory group a document is wanted: {sorted(rows)}, not {read}")
    for group in groups:
        if not len(group.agents) == len(group.rewards) == len(group.exact_match):
            raise ValueError(f"document {group.document}: a reward and a score an agent are wanted")
    return groups


def shuffle_rewards(cfg, groups):
    """The control: the same rewards, each for another member of its group."""
    for group in groups:
        rng = random.Random(f"shuffle {cfg.seed} {group.agents[0].key}")
        rng.shuffle(group.rewards)


def unread(text, chunks):
    """The share of a text that none of these chunks of it holds: what --max_chunks left out."""
    read = sum(chunk.end - chunk.start for chunk in chunks)
    return (len(text) - read) / max(len(text), 1)


# ------------------------------------------------------------------------------ what is reported


@functools.cache  # each once
def note(text):
    """What a user should know, on rank 0."""
    if distributed.rank() == 0:
        tqdm.write(f"note: {text}", file=sys.stderr)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def number(value, giver):
    """A reward as a float: of an int, a bool, a scalar of numpy or torch. InputError for others."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise InputError(f"{giver} gave a reward that is no number; a float is wanted")
    return value


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


def evaluate(policy, heldout):
    """Exact match on held-out rows [(setup, rows), ..], one trajectory and one recall each, with
    the same noise every time and on any number of ranks.
    -> {kind: (mean, low, high, n)}, a 95 % interval"""
    scores = {}
    for setup, rows in heldout:
        once = dataclasses.replace(setup.cfg, group=1, recalls=1, objective="full")
        numbers = range(distributed.rank(), len(rows), distributed.world_size())
        mine = {number: rows[number] for number in numbers}
        task = TASKS[once.task]
        with torch.no_grad(), gathered(policy):
            groups = task.rollout(setup._replace(cfg=once), mine, "heldout")
        for rank in all_gather([(group.kind, group.exact_match[0]) for group in groups]):
            for kind, score in rank:
                kind = "questions" if task.reads != "documents" else kind
                scores.setdefault(kind, []).append(score)
    return {kind: interval(scores[kind]) for kind in sorted(scores, reverse=True)}


# kinds of held-out figures: what they are called
KINDS = {"trajectory": "E2E", "recall": "recall", "questions": "QA"}


def heldout_line(result):
    """What an evaluation found, in words."""
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
        "unread": [agent.unread for agent in agents if hasattr(agent, "unread")],
        "malformed": [agent.malformed for agent in searchers],
        "searches": [agent.searches for agent in searchers],
    }
    sums = {name: (float(sum(values)), len(values)) for name, values in local.items()}
    for name in sorted(set(totals) - {"tokens", "mismatch_max"}):
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


def cost_metrics(groups, sequences, rollout_s, update_s, device):
    """Seconds; tokens read, written and trained per second, over all ranks; this one's memory."""
    turns = turns_of(groups) + [sequence.turn for sequence in sequences]
    tokens = sum(len(turn.prompt_ids) + len(turn.response_ids) for turn in turns)
    per_second = sum(all_gather(tokens)) / (rollout_s + update_s)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
    cost = {"rollout_s": rollout_s, "update_s": update_s, "tokens_per_s": per_second}
    return cost | {"memory_gb": peak}


def turns_of(groups):
    """All turns of all agents."""
    return [turn for group in groups for agent in group.agents for turn in agent.turns]


def transcript(setup, groups, step, document, row):
    """A line of samples.jsonl: a document as its first trajectory read it, and what all earned.

    step: as in metrics.jsonl, from 1. id, question, golds: of the row of data.
    document: the text as it was read; sections: [start, end] of each section in it, in characters.
    Neither where the row has no text (searchqa): prompts has what turns saw.
    turns: what the first trajectory wrote. answers, exact_match, rewards, advantages: of all.
    recalls: of trajectory i (from 0) the memory after turn k (from 1) was asked for the target that
    [TARGET] hides in section l: {"trajectory", "k", "l", "target", "prompt", and of all its samples
    "answers", "exact_match", "rewards", "advantages"}.
    """
    prompts, mine = setup.prompts, [group for group in groups if group.document == document]
    (trajectories,) = [group for group in mine if group.kind == "trajectory"]
    turns = trajectories.agents[0].turns
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
        record["sections"] = [[chunk.start, chunk.end] for chunk in chunks_of(setup, text)]
    record["turns"] = [prompts.text(turn.response_ids) for turn in turns]
    record |= results(setup.cfg, trajectories)

    record["recalls"] = []
    for group in mine:
        if group.kind == "recall":
            asked, drawn = group.agents[0], group.drawn
            recall = {"trajectory": asked.key[2], "k": drawn.k, "l": drawn.l}
            recall |= {"target": drawn.target, "prompt": prompts.text(asked.ids)}
            record["recalls"].append(recall | results(setup.cfg, group))
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
    grad = "not finite, update skipped" if m["grad"] is None else f"{m['grad']:.2f}"
    imr = f"imr {m['imr']:.2f} | " if "imr" in m else ""
    kl = f"kl {m['kl']:.1e} | " if "kl" in m else ""
    clip = m.get("clip_low", 0) + m.get("clip_high", 0)
    return (
        f"step {m['step']:04d}/{cfg.steps:04d} | R_E {m['R_E']:.2f} | em {m['em']:.2f} | {imr}{kl}"
        f"clip {clip:.1%} | flat groups {m['flat']:.0%} | cut {m['cut']:.0%} | len {m['len']:.0f}"
        f" | grad {grad} | rollout {m['rollout_s']:.1f}s | update {m['update_s']:.1f}s | "
        f"{m['tokens_per_s'] / 1000:.1f}k tok/s | {m['memory_gb']:.1f} GB"
    )


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
    check_shared(out / "config.json")


def check_shared(file):
    """InputError on a rank that does not see a file that rank 0 wrote."""
    torch.distributed.barrier()
    if not file.exists():
        raise InputError(
            f"--out {file.parent}: rank {distributed.rank()} does not see what rank 0 wrote there: "
            "all machines need a folder that they share"
        )


# --------------------------------------------------------------------------------- end of the run


def save(cfg, policy, optimizer, tokenizer, step):
    """A checkpoint that brings the model's prompts and settings along, and the run's sizes."""
    own = model_settings(cfg.model)
    settings = own.setdefault("settings", {})
    if TASKS[cfg.task].reads == "searches":
        whose, names = cfg.task, "answer_tokens result_tokens passages objectives turns"
    else:  # whatever reads shares its sizes
        whose, names = "all", "chunk_tokens memory_tokens answer_tokens prompt_order"
    sizes = {name: getattr(cfg, name) for name in names.split()}
    settings[whose] = settings.get(whose, {}) | sizes
    files = {"memtrain.json": json.dumps(own | {"task": cfg.task}, indent=2) + "\n"}
    distributed.save_checkpoint(cfg.out, step, policy, optimizer, tokenizer, CHECKPOINTS, files)


def print_before_and_after(cfg):
    evaluated = [line for line in read_metrics(cfg.out) if "heldout" in line]
    for word, line in zip(("before", "after "), (evaluated[:1] + evaluated[1:][-1:])):
        print(f"{word} (step {line['step']:4d}): {heldout_line(line['heldout'])}")
    if distributed.checkpoints(cfg.out):
        print(f"checkpoint: {distributed.checkpoint_path(cfg.out)}")


def leave_after(stop, step):
    """Ends the process after a signal, as the shell expects of one that was stopped by it."""
    if distributed.rank() == 0:
        name = signal.Signals(stop).name
        tqdm.write(f"stopped by {name}: step {step} is saved, --resume continues there")
    sys.exit(128 + stop)


@distributed.one_line_errors(InputError)
def main(argv=None):
    given = parse(argv)
    cfg = open_run(given)
    device = distributed.start_ranks()
    if distributed.rank() == 0:
        print_settings(cfg, given)
    train(cfg, device)


if __name__ == "__main__":
    main()
