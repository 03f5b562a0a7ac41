"""Our way of sampling and training against the plain way, side by side.

    python tests/bench.py                                   ten minutes on one core of a CPU
    python tests/bench.py --only update --json bench.json   one row, also written to a file
    python tests/bench.py --model DIR                       a pretrained model: folder, or Hub name
    python tests/bench.py --device cuda --dtype bf16 --shape paper

The plain way repeats every prompt for each of its samples and pads batches: `generate` on the
repeated prompts, then a training forward on [prompt | response] of every sample with the logits of
all positions. `--plain_logits responses` spares it the prompts' logits, as recent versions of TRL
do; nothing else changes with it.

Every row is first checked for equal results: the same greedy tokens, and gradients that differ by
less than 1e-5 of their norm (--model: 1e-4; bf16: 5e-2, and tokens not at all). Then both ways
take turns, three times each, and the medians count. Ratios of one run are fair even where other
work slows it down; seconds of different runs can't be compared. Models and ids are random unless
--model is given: then a prompt is a recall about pieces of README.md. Temperature is 1, and no end
token exists, so that all responses are as long as their limit.

Peak memory is what a run adds to a fresh process that holds the model already: of the resident set
on a CPU (Linux), of the allocator on a GPU. Tokens are counted by a hook on the model's body,
padding included.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import distributed
import grpo
import pocket
import rollout

SMALL = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)


def qwen3(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads):
    own = dict(hidden_size=hidden_size, intermediate_size=intermediate_size)
    own |= dict(num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads)
    return dict(vocab_size=151936, num_key_value_heads=8, head_dim=128, **own)


MODELS = {  # the layout of Qwen3; parameters include the tied embedding; none of them with --model
    "small": {"5M": SMALL},
    "short": {"5M": SMALL},
    "paper": {
        "0.6B": qwen3(1024, 3072, 28, 16),
        "1.7B": qwen3(2048, 6144, 28, 16),
        "4B": qwen3(2560, 9728, 36, 32),
    },
}
SIZES = {  # prompts x tokens, samples of each, new tokens
    "small": {
        "recall step": dict(prompts=4, length=512, group=8, new=64),
        "update": dict(prompts=1, length=2048, group=8, new=64),
        "rollout": dict(prompts=1, length=5120, group=8, new=64),
        "chunk first": dict(chunk=2048, chunks=3, memory=128, group=8),
        "ragged": dict(prompts=32, length=64, group=1, new=256),
    },
    "short": dict.fromkeys(  # a quarter of an hour for a model of 135M on one core
        ("recall step", "update", "rollout"), dict(prompts=2, length=256, group=8, new=32)
    ),
    "paper": {
        "recall step": dict(prompts=4, length=6400, group=8, new=256),
        "update": dict(prompts=1, length=6400, group=8, new=512),
        "rollout": dict(prompts=1, length=6400, group=8, new=512),
        "chunk first": dict(chunk=5120, chunks=3, memory=1024, group=8),
        "ragged": dict(prompts=32, length=256, group=1, new=1024),
    },
}
# rows of a plain training forward; more full logits fit no GPU
PLAIN_ROWS = {"small": 32, "short": 8, "paper": 1}
RANKS = dict(prompts=16, length=512, group=8, new=64)  # of the row "two ranks"
MEMORY = ("update", "rollout")  # rows whose peak memory is measured as well
REPEATS = 3


# ---------------------------------------------------------------------------------- the two ways


class Bench:
    """A model twice, with the same weights: as our code runs it (`policy`), and as transformers
    gives it (`plain`). `tokens` counts what passes through either."""

    def __init__(self, options, model):
        self.options, self.layout = options, MODELS[options.shape].get(model)
        self.tokenizer, self.readme = pocket.tokenizer(), None
        self.plain = self._model()
        self.vocabulary = self.plain.config.vocab_size
        # bf16 is too coarse to find out whether prefixes can be shared: Qwen3's can
        self.policy = grpo.Policy(self._model(), shares=None if options.model else True)
        self.tokens = 0
        if options.model:
            text = Path(__file__).parent.parent / "README.md"
            self.recall = rollout.Prompts(self.tokenizer).recall
            self.readme = self.tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
        for lm in (self.plain, self.policy.lm):
            lm.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _model(self):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        dtype = torch.bfloat16 if self.options.dtype == "bf16" else torch.float32
        if self.options.model:
            lm, self.tokenizer = distributed.load_model(self.options.model, dtype)
            lm.to(self.options.device)
        else:
            no_tokens = dict(bos_token_id=None, eos_token_id=None)
            sizes = dict(tie_word_embeddings=True, max_position_embeddings=32768)
            config = Qwen3Config(**self.layout, **sizes, **no_tokens)
            torch.manual_seed(0)
            with torch.device(self.options.device):
                lm = Qwen3ForCausalLM._from_config(config, dtype=dtype)
        if self.options.shape == "paper":
            lm.gradient_checkpointing_enable(dict(use_reentrant=False))
        return lm.train()

    def _count(self, module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        self.tokens += ids.numel()

    def prompts(self, prompts, length, group=1, **_):
        """Different prompts, each `group` times in a row."""
        if self.readme:  # of a pretrained model the first 64 tokens of a text are the memory
            texts = self.texts(prompts, max(length - len(self.recall), 1))
            made = [self.recall(memory=text[:64], section=text[64:]) for text in texts]
        else:
            made = self.texts(prompts, length)
        return [prompt for prompt in made for _ in range(group)]

    def texts(self, count, length):
        """Lists of ids of this length: pieces of the README, or random."""
        rng, result = random.Random(0), []
        for _ in range(count):
            if self.readme:
                start = rng.randrange(len(self.readme) - length)
                result.append(self.readme[start : start + length])
            else:
                result.append(rng.choices(range(self.vocabulary), k=length))
        return result

    def sampler(self, temperature=1.0):
        settings = dict(temperature=temperature, kv_tokens=2**20, share=self.policy.shares)
        return rollout.Sampler(self.policy.lm, [self.vocabulary], **settings)  # no such token

    def sample(self, prompts, limits, temperature=1.0, keys=None):
        """Responses of exactly these lengths, our way."""
        keys = keys or [(i,) for i in range(len(prompts))]
        return [response.ids for response in self.sampler(temperature)(prompts, limits, keys)]

    @torch.no_grad()
    def plain_sample(self, prompts, limits, temperature=1.0):
        """The same in one `generate`: left padding, all rows until the longest is done."""
        from transformers import GenerationConfig

        ids, mask = rollout.pad_left(prompts, self.plain.device)
        sampling = dict(do_sample=True, top_k=0) if temperature else {}
        self.plain.generation_config = GenerationConfig(**sampling, pad_token_id=0)
        self.plain.eval()
        out = self.plain.generate(ids, attention_mask=mask, max_new_tokens=max(limits))
        self.plain.train()
        new = out[:, ids.shape[1] :].tolist()
        return [row[:limit] for row, limit in zip(new, limits)]

    def update(self, prompts, responses, world=1):
        """Gradients of a step, in rows of shared prefixes."""
        total = world * sum(map(len, responses))
        self.policy.zero_grad()
        for row in grpo.pack(prompts, responses, 32768):
            # iterators: FSDP would look for tensors in lists, id by id
            row_prompts = iter([prompts[i] for i in row])
            row_responses = iter([responses[i] for i in row])
            logps = self.policy(row_prompts, row_responses)
            losses = [step_loss(own, i, total) for i, own in zip(row, logps)]
            (world * sum(losses)).backward()  # FSDP averages over ranks

    def plain_update(self, prompts, responses):
        """The same, in padded batches."""
        total, rows = sum(map(len, responses)), PLAIN_ROWS[self.options.shape]
        self.plain.zero_grad()
        for first in range(0, len(prompts), rows):
            turns = list(zip(prompts, responses))[first : first + rows]
            texts = [prompt + response for prompt, response in turns]
            ids, mask = rollout.pad_left(texts, self.plain.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            width = max(len(response) for _, response in turns)
            logits = self.plain(
                ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                use_cache=False,
                logits_to_keep=0 if self.options.plain_logits == "full" else width,
            ).logits[:, -width:]
            logps = logits.float().log_softmax(-1)
            logps = logps.gather(-1, ids[:, -width:, None])[..., 0]  # (rows, width)
            losses = []
            for row, (_, response) in enumerate(turns):
                own = logps[row, width - len(response) :]
                losses.append(step_loss(own, first + row, total))
            sum(losses).backward()

    def equal_tokens(self, prompts, limits):
        """Whether greedy decoding agrees to the last token; in bf16 that is a matter of luck."""
        if self.options.dtype != "fp32":
            return True
        ours = self.sample(prompts, limits, temperature=0)
        return ours == self.plain_sample(prompts, limits, temperature=0)

    def equal_gradients(self, prompts, responses):
        self.update(prompts, responses)
        self.plain_update(prompts, responses)
        differences, norms = [], []
        for ours, plain in zip(self.policy.lm.parameters(), self.plain.parameters()):
            difference = ours.grad - plain.grad
            differences.append(float(difference.float().norm()))
            norms.append(float(plain.grad.float().norm()))
        # thirty trained layers round more: 2e-5 of SmolLM2-135M, which are 1e-14 in fp64
        fp32 = 1e-4 if self.options.model else 1e-5
        bound = fp32 if self.options.dtype == "fp32" else 5e-2
        return math.hypot(*differences) < bound * math.hypot(*norms)


def step_loss(logps, turn, total):
    """Of one turn: advantages +1 and -1 in turns, the mean over the tokens of the whole step."""
    advantages = torch.full_like(logps, (-1.0) ** turn)
    weights = torch.full_like(logps, 1 / total)
    return grpo.policy_loss(logps, logps.detach(), advantages, weights)[0]


# ------------------------------------------------------------------------------------------ rows


class Row(NamedTuple):
    check: object  # () -> whether both ways give the same
    ours: object  # () -> None, timed
    plain: object


def recall_step(bench, size):
    """A recall's group: rollout and update."""
    prompts = bench.prompts(**size)
    limits = [size["new"]] * len(prompts)
    responses = bench.texts(len(prompts), size["new"])

    def check():
        equal = bench.equal_tokens(prompts, limits)
        return equal and bench.equal_gradients(prompts, responses)

    return Row(
        check=check,
        ours=lambda: bench.update(prompts, bench.sample(prompts, limits)),
        plain=lambda: bench.plain_update(prompts, bench.plain_sample(prompts, limits)),
    )


def update(bench, size):
    """The update alone, on random responses."""
    prompts = bench.prompts(**size)
    responses = bench.texts(len(prompts), size["new"])
    return Row(
        check=lambda: bench.equal_gradients(prompts, responses),
        ours=lambda: bench.update(prompts, responses),
        plain=lambda: bench.plain_update(prompts, responses),
    )


def sampling(bench, size):
    """The rollout alone."""
    prompts = bench.prompts(**size)
    return _sampling(bench, prompts, [size["new"]] * len(prompts))


def ragged(bench, size):
    """The rollout of one sample a prompt, with limits that use about 38 % of the row-steps."""
    count, limits = size["prompts"], []
    for i in range(count):
        place = (7 * i % count + 0.5) / count  # 0 to 1, shuffled
        limits.append(max(1, round(size["new"] * place**1.63)))
    return _sampling(bench, bench.prompts(**size), limits)


def _sampling(bench, prompts, limits):
    return Row(
        check=lambda: bench.equal_tokens(prompts, limits),
        ours=lambda: bench.sample(prompts, limits),
        plain=lambda: bench.plain_sample(prompts, limits),
    )


def chunk_first(bench, size):
    """The end-to-end task: Readers through all chunks, and the update on their turns. Both orders
    run our way; `plain` is the papers' order, memory first. Checked against the plain way."""
    memory, chunks = size["memory"], bench.texts(size["chunks"], size["chunk"])

    def read(order):
        prompts = rollout.Prompts(bench.tokenizer, order=order)
        readers = []
        for key in range(size["group"]):
            reader = rollout.Reader(prompts, prompts.problem, chunks, memory, memory, (key,))
            readers.append(reader)
        rollout.rollout(readers, bench.sampler())
        turns = [turn for reader in readers for turn in reader.turns]
        return [turn.prompt_ids for turn in turns], [turn.response_ids for turn in turns]

    def check():
        prompts, responses = read("chunk_first")
        second = slice(1, None, size["chunks"] + 1)  # turn of every reader
        prompts, responses = prompts[second], responses[second]
        equal = bench.equal_tokens(prompts, [memory] * len(prompts))
        return equal and bench.equal_gradients(prompts, responses)

    return Row(
        check=check,
        ours=lambda: bench.update(*read("chunk_first")),
        plain=lambda: bench.update(*read("memory_first")),
    )


ROWS = {
    "recall step": recall_step,
    "update": update,
    "rollout": sampling,
    "chunk first": chunk_first,
    "ragged": ragged,
}


# ---------------------------------------------------------------------------------- measurements


def seconds(run, device):
    """On a CPU those of this process, which runs one thread: other work does not count."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options, model, name):
    """-> one line of the table."""
    size = SIZES[options.shape][name]
    bench = Bench(options, model)
    row = ROWS[name](bench, size)
    equal = row.check()

    # both ways in turns
    times, tokens = {"ours": [], "plain": []}, {}
    for side in [*times] * REPEATS:
        bench.tokens = 0
        times[side].append(seconds(getattr(row, side), options.device))
        tokens[side] = bench.tokens
    ours, plain = [statistics.median(values) for values in times.values()]
    shape = described(f"{name} {Path(model).name}", size)
    result = {"shape": shape, "ours_s": ours, "plain_s": plain}
    result |= {"ratio": plain / ours, "equal": equal}
    result |= {"tokens": tokens["ours"], "plain_tokens": tokens["plain"]}

    # memory, each side in a process of its own
    if name in MEMORY:
        command = [__file__, "--only", name, "--layout", model, *common_flags(options)]
        ours, plain = [run_worker([*command, "--worker", side]) for side in times]
        result |= {"ours_bytes": ours, "plain_bytes": plain, "memory_ratio": ours / plain}
    return result


def described(name, size):
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in size.items())


def common_flags(options):
    flags = ["--model", options.model] if options.model else []
    for name in ("device", "dtype", "shape", "plain_logits"):
        flags += [f"--{name}", getattr(options, name)]
    return flags


def run_worker(command, **environment):
    """Another Python with this command; what it printed last."""
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def memory_worker(options):
    """Prints the bytes that one run of a row's side adds to what is there before."""
    bench, make = Bench(options, options.layout), ROWS[options.only]
    size = SIZES[options.shape][options.only]
    warm_up = make(bench, size | dict(prompts=1, length=8, new=2))
    getattr(warm_up, options.worker)()  # imports, thread pools and the like are loaded
    bench.policy.zero_grad()
    bench.plain.zero_grad()
    row = make(bench, size)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # loading and the warm-up had peaks of theirs
    before = peak_memory(options.device)
    getattr(row, options.worker)()
    print(peak_memory(options.device) - before)


def peak_memory(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak, too
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


# -------------------------------------------------------------------------------------- mismatch


@torch.no_grad()
def mismatch(options, model, dtype):
    """How far the log-probs of the training forward are from those that tokens were sampled at, on
    this machine: what the metrics `mismatch`, `mismatch_max` and `mismatch_kl` are made of."""
    bench = Bench(argparse.Namespace(**vars(options) | {"dtype": dtype}), model)
    bench.policy.lm.base_model.norm.weight.fill_(5)  # logits as large as a trained model's
    size = SIZES[options.shape]["recall step"]
    prompts, keys = bench.prompts(**size), [(i,) for i in range(size["prompts"] * size["group"])]
    responses = bench.sampler()(prompts, [size["new"]] * len(prompts), keys)
    sampled = torch.cat([torch.tensor(response.logps) for response in responses])
    ids = [response.ids for response in responses]
    gaps = []
    for pack in grpo.pack(prompts, ids, 32768):
        trained = bench.policy([prompts[i] for i in pack], [ids[i] for i in pack])
        for i, values in zip(pack, trained):
            gaps.append(values.cpu() - torch.tensor(responses[i].logps))
    gap = torch.cat(gaps).double()
    figures = f"mean {gap.abs().mean():.1e}, largest {gap.abs().max():.1e}"
    figures += f", KL {(gap.exp() - 1 - gap).mean():.1e}, entropy {-sampled.mean():.1f}"
    return {"shape": f"mismatch {model} {dtype}: {figures}"}


# ------------------------------------------------------------------------------------- two ranks


def two_ranks(options):
    """The recall step on two gloo ranks against one, of one thread each: `plain` is one rank.
    Equal: the norm of the gradient."""
    times, norms = {2: [], 1: []}, []
    for world in [2, 1] * REPEATS:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [*torchrun, __file__, "--worker", "rank"]
        taken, norm = run_worker(command, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        times[world].append(taken)
        norms.append(norm)
    ours, plain = [statistics.median(values) for values in times.values()]
    equal = max(norms) / min(norms) - 1 < 1e-4
    result = {"shape": described("two ranks 5M", RANKS), "ours_s": ours, "plain_s": plain}
    return result | {"ratio": plain / ours, "equal": equal}


def rank_worker(options):
    """One of the ranks: prompts divided over ranks, sampled, trained; rank 0 prints its seconds
    and the norm of the gradient."""
    import torch.distributed as dist

    device, bench = distributed.start_ranks(), Bench(options, "5M")
    bench.policy = policy = distributed.shard(bench.policy, device)
    world, prompts, keys = distributed.world_size(), [], []
    for i, prompt in enumerate(bench.prompts(**RANKS)):
        if i // RANKS["group"] % world == distributed.rank():
            prompts.append(prompt)
            keys.append((i,))
    limits = [RANKS["new"]] * len(prompts)

    for _ in range(2):  # the first one warms up
        policy.zero_grad()  # of the shards, which `update` can't see inside `gathered`
        dist.barrier()
        start = time.perf_counter()
        with torch.no_grad(), distributed.gathered(policy):
            responses = bench.sample(prompts, limits, keys=keys)
        with distributed.gathered(policy):
            bench.update(prompts, responses, world)
        taken = time.perf_counter() - start
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9)
    norm = float(norm.full_tensor() if world > 1 else norm)
    if distributed.rank() == 0:
        print(json.dumps([taken, norm]))
    distributed.leave()


# ------------------------------------------------------------------------------------- documents


def data_rate(options):
    """256 documents out of 4,000 synthetic passages, entities by rules, in one process; `ours_s`
    is one document's time."""
    import data

    rng = random.Random(0)
    words = ["river", "of", "stone", "kept", "under", "the", "old", "market.", "seven", "roads"]
    names = [f"N{number}" for number in range(5000)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        corpus = Path(folder, "corpus.jsonl")
        with corpus.open("w") as file:
            for i in range(4000):
                text = rng.choices(words, k=142) + rng.choices(names, k=18)
                rng.shuffle(text)
                row = {"id": str(i), "title": f"t{i}", "text": " ".join(text)}
                file.write(json.dumps(row) + "\n")
        command = ["build", "--corpus", str(corpus), "--out", f"{folder}/documents"]
        command += ["--documents", "256", "--heldout", "0", "--ner", "rules", "--processes", "1"]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            data.main(command)
    rate = float(re.search(r"(\S+) documents/s", said.getvalue())[1])
    return {"shape": "data: documents of 150 passages x 160 words", "ours_s": 1 / rate}


EXTRA = {"two ranks": two_ranks, "data": data_rate}


# ------------------------------------------------------------------------------------------ main

NOTHING = {"plain_s": None, "ratio": None, "memory_ratio": None, "equal": None}
COLUMNS = ("ours_s", "plain_s", "ratio", "memory_ratio", "tokens", "plain_tokens", "equal")


def table_line(shape, values):
    cells = []
    for name, value in zip(COLUMNS, values):
        text = "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
        cells.append(f"{text:>{max(len(name), 7) + 2}}")
    return f"{shape:<62}" + "".join(cells)


def parse():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=style, allow_abbrev=False
    )
    shapes = "small: 5M parameters; paper: Qwen3 of 0.6B, 1.7B, 4B (not run yet); short: of --model"
    parser.add_argument("--only", choices=[*ROWS, "mismatch", *EXTRA], help="one row")
    parser.add_argument("--json", help="file for the results, a list of objects")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--model", help="a pretrained model instead: a folder, or a Hub name")
    parser.add_argument("--shape", choices=[*SIZES], help=shapes)
    logits = dict(choices=["full", "responses"], default="full")
    what = "positions whose logits the plain update computes"
    parser.add_argument("--plain_logits", **logits, help=what)
    # how this file starts itself
    parser.add_argument("--worker", choices=["ours", "plain", "rank"], help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shape = options.shape or ("short" if options.model else "small")
    return options


def main():
    options = parse()
    torch.set_num_threads(1)
    if options.worker:
        worker = rank_worker if options.worker == "rank" else memory_worker
        return worker(options)

    # the rows that are wanted
    jobs = []
    for model in [options.model] if options.model else MODELS[options.shape]:
        jobs += [(name, measure, options, model, name) for name in SIZES[options.shape]]
        if not options.model:
            jobs += [("mismatch", mismatch, options, model, dtype) for dtype in ("fp32", "bf16")]
    if options.device == "cpu" and not options.model:
        jobs += [(name, run, options) for name, run in EXTRA.items()]

    # one after the other
    print(table_line("shape", COLUMNS))
    results = []
    for name, run, *args in jobs:
        if options.only not in (None, name):
            continue
        result = NOTHING | run(*args)
        results.append(result)
        print(table_line(result["shape"], map(result.get, COLUMNS)), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    if not results:
        sys.exit(f"no row {options.only!r} with these flags")
    sys.exit(any(result["equal"] is False for result in results))


if __name__ == "__main__":
    main()
