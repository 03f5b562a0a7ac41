"""Our way of sampling and training against the plain way, side by side: seconds, peak memory, tokens through the model.

    python tests/bench.py                                       ten minutes or so on two cores of a CPU
    python tests/bench.py --only update --json bench.json       one row, also written to a file
    python tests/bench.py --plain_logits responses              against a plain way that keeps fewer logits (see below)
    python tests/bench.py --device cuda --dtype bf16 --shape paper      models and lengths of the paper's size on a GPU

The plain way repeats every prompt for each of its samples and pads batches: `generate` on the repeated prompts, then a
training forward on [prompt | response] of every sample with the logits of all positions. `--plain_logits responses` spares
the prompts' logits, as recent versions of TRL do; nothing else in this file changes with it.

Every row is first checked for equal results: the same greedy tokens, and gradients that differ by less than 1e-5 of their
norm (bf16: gradients by less than 5e-2, tokens not at all). Then both ways take turns, three times each, and the medians
count: ratios of one run on one machine are fair even where other work slows it down; seconds of different runs can't be
compared. Both sample at temperature 1 (ours with its hashed noise), and no end token exists, so that all responses have the length
of their limit. Models are randomly initialised.

Peak memory is what a run adds to a process that already holds the model: on a CPU the rise of the resident set's high-water
mark in a fresh process per variant, on a GPU the allocator's peak. Tokens are counted by a hook on the model's body, padding
included; beside them stand the tokens that would do if every common prefix ran once in each call of the sampler and once in
the update.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import grpo
import rollout
import tiny
import train

SMALL = dict(vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64)  # fmt: skip
QWEN3 = dict(vocab_size=151936, num_key_value_heads=8, head_dim=128)
MODELS = {  # the layout of Qwen3; parameters include the tied embedding
    "small": {"5M": SMALL},
    "paper": {
        "0.6B": QWEN3 | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
        "1.7B": QWEN3 | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
        "4B": QWEN3 | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    },
}
SIZES = {  # prompts x tokens, samples of each, new tokens; plain_rows: sequences of a plain training forward
    "small": {
        "recall step": dict(prompts=4, length=512, group=8, new=64, plain_rows=32),
        "update": dict(prompts=1, length=2048, group=8, new=64, plain_rows=8),
        "rollout": dict(prompts=1, length=5120, group=8, new=64),
        "chunk first": dict(chunk=2048, chunks=3, memory=128, group=8, plain_rows=8),
        "ragged": dict(prompts=32, length=64, group=1, new=256),
    },
    "paper": {  # plain_rows 1: eight sequences of full logits fit no GPU
        "recall step": dict(prompts=4, length=6400, group=8, new=256, plain_rows=1),
        "update": dict(prompts=1, length=6400, group=8, new=512, plain_rows=1),
        "rollout": dict(prompts=1, length=6400, group=8, new=512),
        "chunk first": dict(chunk=5120, chunks=3, memory=1024, group=8, plain_rows=1),
        "ragged": dict(prompts=32, length=256, group=1, new=1024),
    },
}
RANKS = dict(prompts=16, length=512, group=8, new=64)  # of the row "two ranks"
MEMORY = ("update", "rollout")  # rows whose peak memory is measured, in further runs
REPEATS = 3


# ------------------------------------------------------------------------------------------------------- the two ways


class Bench:
    """A model twice, with the same weights: as our code runs it (`policy`), and as transformers gives it (`plain`)."""

    def __init__(self, options, model):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.options, self.shape = options, MODELS[options.shape][model]
        config = Qwen3Config(**self.shape, tie_word_embeddings=True, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
        lms = []
        for _ in range(2):
            torch.manual_seed(0)
            with torch.device(options.device):
                lms.append(Qwen3ForCausalLM._from_config(config, dtype=dtype))
            if options.shape == "paper":
                lms[-1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                lms[-1].train()
        self.plain, self.policy = lms[0], grpo.Policy(lms[1], shares=True)  # bf16 may be too coarse to find that out
        self.tokens = dict.fromkeys(("ours", "plain"), 0)
        for side, lm in ("plain", self.plain), ("ours", self.policy.lm):
            lm.base_model.register_forward_pre_hook(lambda *call, side=side: self._count(side, *call), with_kwargs=True)

    def _count(self, side, module, args, kwargs):
        self.tokens[side] += kwargs["input_ids"].numel()

    def prompts(self, count, length, group):
        """`count` random prompts, each `group` times in a row."""
        rng = random.Random(0)
        return [p for p in ([rng.randrange(self.shape["vocab_size"]) for _ in range(length)] for _ in range(count)) for _ in range(group)]

    def sample(self, prompts, limits, keys=None, temperature=1.0):
        """Responses of exactly these lengths, our way."""
        sampler = rollout.Sampler(self.policy.lm, end_ids=[self.shape["vocab_size"]], temperature=temperature, kv_tokens=2**20)
        return sampler(prompts, limits, keys or [(i,) for i in range(len(prompts))])

    @torch.no_grad()
    def plain_sample(self, prompts, limits, keys=None, temperature=1.0):
        """The same in one `generate`: left padding, all rows until the longest is done."""
        from transformers import GenerationConfig

        ids, mask = rollout._pad_left(prompts, 0, self.plain.device)
        self.plain.generation_config = GenerationConfig(
            **(dict(do_sample=True, top_k=0) if temperature else {}), eos_token_id=[self.shape["vocab_size"]], pad_token_id=0
        )
        training = self.plain.training
        out = self.plain.eval().generate(ids, attention_mask=mask, max_new_tokens=max(limits)).tolist()
        self.plain.train(training)
        return [row[ids.shape[1] :][:limit] for row, limit in zip(out, limits)]

    def _loss(self, logps, responses, first, total):
        """A loss as in training: advantages +1 and -1 in turn, the mean over the tokens of the whole step."""
        advantages = torch.tensor([(-1.0) ** (first + i) for i, r in enumerate(responses) for _ in r], device=logps.device)
        return grpo.policy_loss(logps, logps.detach(), advantages, torch.full_like(logps, 1 / total))[0]

    def update(self, prompts, responses):
        """Gradients of the step, in rows of shared prefixes."""
        total = sum(map(len, responses))
        self.policy.zero_grad()
        for _, turns in grpo.pack(prompts, responses, 32768):
            logps = self.policy([prompts[i] for i in turns], [responses[i] for i in turns])
            sum(self._loss(logps[n], [responses[i]], i, total) for n, i in enumerate(turns)).backward()

    def plain_update(self, prompts, responses, rows):
        """Gradients of the step, in padded batches of `rows` sequences: right-padded responses after left-padded prompts."""
        total = sum(map(len, responses))
        self.plain.zero_grad()
        for first in range(0, len(prompts), rows):
            p, r = prompts[first : first + rows], responses[first : first + rows]
            left, left_mask = rollout._pad_left(p, 0, self.plain.device)
            width = max(map(len, r))
            right = torch.tensor([x + [0] * (width - len(x)) for x in r], device=left.device)
            right_mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in r], device=left.device)
            ids, mask = torch.cat([left, right], 1), torch.cat([left_mask, right_mask], 1)
            keep = 0 if self.options.plain_logits == "full" else width + 1
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self.plain(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
            logps = logits[:, -width - 1 : -1].float().log_softmax(-1).gather(-1, right[:, :, None])[..., 0]
            self._loss(logps[right_mask.bool()], r, first, total).backward()

    def equal_tokens(self, prompts, limits):
        """Whether greedy decoding agrees, to the last token; in bf16 rounding makes that a matter of luck: not asked there."""
        return self.options.dtype != "fp32" or self.sample(prompts, limits, temperature=0) == self.plain_sample(prompts, limits, temperature=0)

    def equal_gradients(self, prompts, responses, rows):
        self.update(prompts, responses)
        self.plain_update(prompts, responses, rows)
        pairs = [(a.grad.float(), b.grad.float()) for a, b in zip(self.policy.lm.parameters(), self.plain.parameters())]
        difference, norm = (sum(float(x.square().sum()) for x in xs) ** 0.5 for xs in ([a - b for a, b in pairs], [b for _, b in pairs]))
        return difference < (1e-5 if self.options.dtype == "fp32" else 5e-2) * norm


def distinct(sequences):
    """Tokens that have to run if every common prefix runs once: the nodes of the sequences' tree of prefixes.

    >>> distinct([[1, 2, 3], [1, 2, 4], [1, 2, 3], [5]])
    5
    """
    ordered = sorted(map(list, sequences))
    common = (sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b))) for a, b in zip(ordered, ordered[1:]))
    return sum(map(len, ordered)) - sum(common)


def exact_tokens(calls=(), trained=()):
    """The least tokens of a step. calls: (prompts, responses) of every call of the sampler; trained: of the update."""
    sampled = sum(distinct(prompts) + sum(len(r) - 1 for r in responses) for prompts, responses in calls)
    return sampled + distinct([p + r[:-1] for p, r in zip(*trained)]) if trained else sampled


# --------------------------------------------------------------------------------------------------------------- rows

# A row: bench, size -> an object with check() -> bool, ours() and plain() to be timed, and exact, the least tokens of ours().


def recall_step(bench, size):
    """A recall's group: rollout and update."""
    prompts, limits = bench.prompts(size["prompts"], size["length"], size["group"]), [size["new"]] * (size["prompts"] * size["group"])
    responses = bench.sample(prompts, limits)
    return SimpleNamespace(
        check=lambda: bench.equal_tokens(prompts, limits) and bench.equal_gradients(prompts, responses, size["plain_rows"]),
        ours=lambda: bench.update(prompts, bench.sample(prompts, limits)),
        plain=lambda: bench.plain_update(prompts, bench.plain_sample(prompts, limits), size["plain_rows"]),
        exact=exact_tokens([(prompts, responses)], (prompts, responses)),
    )


def update(bench, size):
    """The update alone, on random responses."""
    prompts = bench.prompts(size["prompts"], size["length"], size["group"])
    responses = bench.prompts(len(prompts), size["new"], 1)
    return SimpleNamespace(
        check=lambda: bench.equal_gradients(prompts, responses, size["plain_rows"]),
        ours=lambda: bench.update(prompts, responses),
        plain=lambda: bench.plain_update(prompts, responses, size["plain_rows"]),
        exact=exact_tokens(trained=(prompts, responses)),
    )


def sampling(bench, size):
    """The rollout alone. With one sample a prompt it is ragged: the limits 256 * x^1.63 use 38 % of the row-steps."""
    prompts = bench.prompts(size["prompts"], size["length"], size["group"])
    limits = [size["new"]] * len(prompts)
    if size["group"] == 1:
        limits = [max(1, round(size["new"] * ((7 * i % len(prompts) + 0.5) / len(prompts)) ** 1.63)) for i in range(len(prompts))]
        limits[0] = size["new"]
    return SimpleNamespace(
        check=lambda: bench.equal_tokens(prompts, limits),
        ours=lambda: bench.sample(prompts, limits),
        plain=lambda: bench.plain_sample(prompts, limits),
        exact=exact_tokens([(prompts, [[0] * limit for limit in limits])]),
        prefill=lambda: bench.sample(prompts, [1] * len(prompts)),
    )


def chunk_first(bench, size):
    """The end-to-end task: Readers through all chunks, and the update on their turns. Both orders run our way; `plain` is the
    papers' order, memory first. Checked against the plain way on the turns that chunk first led to."""
    rng, most = random.Random(0), size["memory"]
    chunks = [[rng.randrange(256, bench.shape["vocab_size"]) for _ in range(size["chunk"])] for _ in range(size["chunks"])]

    def step(order, train=True):
        prompts = rollout.Prompts(tiny.tokenizer(), tiny.TEMPLATES, order)
        readers = [rollout.Reader(prompts, prompts.encode(tiny.PROBLEM), chunks, most, most, (j,)) for j in range(size["group"])]
        turns = list(zip(*(reader.turns for reader in rollout.rollout(readers, bench.sample))))
        calls = [([turn.prompt_ids for turn in call], [turn.response_ids for turn in call]) for call in turns]
        flat = [sum(part, []) for part in zip(*calls)]
        if train:
            bench.update(*flat)
        return calls, flat

    calls, flat = step("chunk_first", train=False)
    return SimpleNamespace(
        check=lambda: bench.equal_tokens(calls[1][0], [most] * size["group"]) and bench.equal_gradients(*flat, size["plain_rows"]),
        ours=lambda: step("chunk_first"),
        plain=lambda: step("memory_first"),
        exact=exact_tokens(calls, flat),
    )


ROWS = {"recall step": recall_step, "update": update, "rollout": sampling, "chunk first": chunk_first, "ragged": sampling}


# -------------------------------------------------------------------------------------------------------- measurements


def seconds(run, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(options, model, name, side):
    """Bytes that one run of a row's side adds to what is there before."""
    bench = Bench(options, model)
    row = ROWS[name](bench, SIZES[options.shape][name] | dict(prompts=1, length=8, chunk=8, new=2, memory=2))
    getattr(row, side)()  # imports, thread pools and the like are loaded
    row = ROWS[name](bench, SIZES[options.shape][name])
    bench.policy.zero_grad()
    bench.plain.zero_grad()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(row, side)()
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    getattr(row, side)()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def in_fresh_process(function, *args):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


def measure(options, model, name):
    """-> one line of the table."""
    size = SIZES[options.shape][name]
    bench, result = Bench(options, model), {"shape": f"{name} {model}: " + ", ".join(f"{k} {v}" for k, v in size.items() if k != "plain_rows")}
    row = ROWS[name](bench, size)
    result["equal"] = row.check()
    times, tokens = {"ours": [], "plain": []}, {}
    for _ in range(REPEATS):
        for side in times:
            bench.tokens = dict.fromkeys(bench.tokens, 0)
            times[side].append(seconds(getattr(row, side), options.device))
            tokens[side] = sum(bench.tokens.values())
    ours, plain = (statistics.median(times[side]) for side in ("ours", "plain"))
    result |= {"ours_s": ours, "plain_s": plain, "ratio": plain / ours, "tokens": tokens["ours"], "plain_tokens": tokens["plain"],
               "tokens_over_exact": tokens["ours"] / row.exact}  # fmt: skip
    if options.device == "cuda":
        result |= utilisation(options, bench, row, name, ours, tokens["ours"])
    del bench, row
    gc.collect()  # hooks hold the models in a cycle
    if options.device == "cuda":
        torch.cuda.empty_cache()
    if name in MEMORY:
        ours, plain = (in_fresh_process(peak_memory, options, model, name, side) for side in ("ours", "plain"))
        result |= {"ours_bytes": ours, "plain_bytes": plain, "memory_ratio": ours / plain if plain else None}
    return result


def utilisation(options, bench, row, name, ours_s, tokens):
    """Of a GPU: tokens/s; for the update its share of the peak FLOPs (6 per parameter and token, attention and recomputation
    not counted); for the rollout the share of memory bandwidth in decoding (weights and the mean of the cache, each step)."""
    parameters = sum(p.numel() for p in bench.policy.lm.parameters())
    extra = {"tokens_per_s": tokens / ours_s}
    if name == "update":
        extra["mfu"] = 6 * parameters * tokens / ours_s / (options.peak_tflops * 1e12)
    if name == "rollout":
        size, shape = SIZES[options.shape][name], bench.shape
        decode_s = ours_s - statistics.median(seconds(row.prefill, options.device) for _ in range(REPEATS))
        width = 2 if options.dtype == "bf16" else 4
        cache = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * width
        step = parameters * width + size["prompts"] * (size["length"] + size["group"] * size["new"] / 2) * cache  # prefixes are read once
        extra["bandwidth"] = step * (size["new"] - 1) / decode_s / (options.peak_gb_s * 1e9)
    return extra


def ranks_worker(options):
    """One of the ranks under torchrun: the recall step of train.py's parts, prompts divided over ranks; rank 0 prints."""
    import torch.distributed as dist

    device, cfg = train.start_ranks(), train.Config(tokens_per_forward=8192)
    bench = Bench(options, "5M")
    policy, vocabulary = train.shard(bench.policy, device).train(), bench.shape["vocab_size"]
    rank, world, times = dist.get_rank(), dist.get_world_size(), []
    prompts = bench.prompts(RANKS["prompts"], RANKS["length"], RANKS["group"])
    mine = [i for i in range(len(prompts)) if i // RANKS["group"] % world == rank]
    total = len(prompts) * RANKS["new"]
    for _ in range(2):  # the first one warms up
        dist.barrier()
        start = time.perf_counter()
        with torch.no_grad(), train.gathered(policy):
            sampler = rollout.Sampler(policy.lm, [vocabulary], kv_tokens=2**20)
            responses = sampler([prompts[i] for i in mine], [RANKS["new"]] * len(mine), [(i,) for i in mine])
        sequences = [train.Sequence(prompts[i], response, (-1.0) ** i, 0) for i, response in zip(mine, responses)]

        def loss(row, logps):
            advantages = torch.tensor([s.advantage for i in row for s in [sequences[i]] for _ in s.response])
            return grpo.policy_loss(logps, logps.detach(), advantages, torch.full_like(logps, 1 / total))[0]

        with train.gathered(policy):
            train.forward_rows(cfg, policy, sequences, loss)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9)
        policy.zero_grad()
        dist.barrier()
        times.append(time.perf_counter() - start)
    if rank == 0:
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        print(json.dumps({"s": times[-1], "norm": norm}))
    dist.destroy_process_group()


def two_ranks(options):
    """Two gloo ranks against one, of the same threads each: `plain` is one rank. Equal: the norm of the gradient."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    results, alone = {2: [], 1: []}, os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for world in [2, 1] * REPEATS:
        done = subprocess.run([*command, str(world), __file__, "--worker"], capture_output=True, text=True, check=True, env=alone)
        results[world].append(json.loads(done.stdout.splitlines()[-1]))
    ours, plain = (statistics.median(result["s"] for result in results[world]) for world in (2, 1))
    equal = abs(results[2][0]["norm"] / results[1][0]["norm"] - 1) < 1e-5
    return {"shape": "two ranks 5M: " + ", ".join(f"{k} {v}" for k, v in RANKS.items()), "ours_s": ours, "plain_s": plain,
            "ratio": plain / ours, "equal": equal}  # fmt: skip


def passages(count, rng):
    """Synthetic articles of one passage each: 160 words, every ninth a name out of 5,000."""
    syllables = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
    names = ["".join(rng.choices(syllables, k=3)).capitalize() for _ in range(5000)]
    words = ["".join(rng.choices(syllables, k=2)) for _ in range(3000)]
    for i in range(count):
        text = [rng.choice(names) if n % 9 == 4 else rng.choice(words) + "." * (n % 16 == 15) for n in range(160)]
        yield {"id": str(i), "title": f"t{i}", "text": " ".join(text)}


def data_rate(options):
    """256 documents out of 4,000 synthetic passages, entities by rules, one process; `ours_s` is one document's time. What the
    corpus costs once (reading, entities, index) stands beside it, per 1,000 passages."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        corpus = Path(folder, "corpus.jsonl")
        corpus.write_text("".join(json.dumps(row) + "\n" for row in passages(4000, random.Random(0))))
        build = ["build", "--corpus", str(corpus), "--out", f"{folder}/documents", "--documents", "256", "--heldout", "0"]
        data.main([*build, "--ner", "rules", "--processes", "1"])
    once, rate = map(float, re.search(r"(\S+) s to read, tag and index, (\S+) documents/s", said.getvalue()).groups())
    return {"shape": "data: documents of 150 passages x 160 words", "ours_s": 1 / rate, "documents_per_s": rate,
            "once_s_per_1000_passages": once / 4, "hours_for_30000_documents": 30000 / rate / 3600}  # fmt: skip


EXTRA = {"two ranks": two_ranks, "data": data_rate}


# --------------------------------------------------------------------------------------------------------------- main

COLUMNS = {"ours_s": ".2f", "plain_s": ".2f", "ratio": ".2f", "memory_ratio": ".2f", "tokens": "d", "tokens_over_exact": ".2f", "equal": ""}
MORE = ("tokens_per_s", "mfu", "bandwidth", "documents_per_s", "once_s_per_1000_passages", "hours_for_30000_documents")


def line(shape, cells, more=""):
    return f"{shape:<62}" + "".join(f"{cell:>{max(len(name), 7) + 2}}" for name, cell in zip(COLUMNS, cells)) + more


def result_line(result):
    values = {name: result.get(name) for name in COLUMNS}
    cells = ["-" if value is None else str(value) if name == "equal" else format(value, COLUMNS[name]) for name, value in values.items()]
    return line(result["shape"], cells, "".join(f"  {name} {result[name]:.3g}" for name in MORE if name in result))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", choices=[*ROWS, *EXTRA], help="one row")
    parser.add_argument("--json", help="file for the results, a list of objects")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    shapes = "small: 5M parameters; paper: Qwen3 of 0.6B, 1.7B, 4B (written where no GPU was at hand, and not run yet)"
    parser.add_argument("--shape", choices=tuple(SIZES), default="small", help=shapes)
    parser.add_argument("--plain_logits", choices=("full", "responses"), default="full", help="positions whose logits the plain update computes")
    parser.add_argument("--peak_tflops", type=float, default=989, help="dense bf16 peak of the GPU (default: H100)")
    parser.add_argument("--peak_gb_s", type=float, default=3350, help="memory bandwidth of the GPU (default: H100)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a rank of the row "two ranks"
    options = parser.parse_args()
    if options.worker:
        return ranks_worker(options)
    multiprocessing.forkserver.ensure_running()  # now, while this process is small: children inherit its high-water mark
    rows = [(model, name) for model in MODELS[options.shape] for name in ROWS if options.only in (None, name)]
    jobs = [lambda row=row: measure(options, *row) for row in rows]
    if options.device == "cpu":
        jobs += [lambda name=name: EXTRA[name](options) for name in EXTRA if options.only in (None, name)]
    print(line("shape", COLUMNS))
    results = []
    for job in jobs:
        results.append({"plain_s": None, "ratio": None, "memory_ratio": None, "equal": None} | job())
        print(result_line(results[-1]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(any(result["equal"] is False for result in results))


if __name__ == "__main__":
    main()
