"""train.py: the loop against slow plain versions, the script itself at a tiny size, and what it does with bad input."""

import ast
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import data
import grpo
import rewards
import tiny
import train
from rollout import Turn

ROOT = Path(__file__).parent.parent
FILES = ("data", "rollout", "rewards", "grpo", "tiny")


SIZES = ["--documents_per_step", "4", "--documents_per_update", "4", "--group", "4", "--recalls", "4", "--memory_tokens", "8",
         "--eval_documents", "4", "--eval_every", "0", "--processes", "1"]  # fmt: skip
# An untrained model earns nothing: these rewards depend on the answer in a way that is as good as random, so that every
# step has gradients. The rest is the real script.
ANY_REWARD = """
import sys, zlib
sys.path.insert(0, {root!r})
import rewards, train
rewards.extract_boxed = lambda text: text
rewards.exact_match = lambda answer, golds: float(zlib.crc32((answer or "").encode()) % 3 == 0)
train.search_reward = lambda agent, golds: float(zlib.crc32(str(agent.turns[-1].response_ids).encode()) % 3 == 0)
train.main(sys.argv[1:])
"""


def run(arguments, cwd, ranks=1, code=None, restarts=0):
    """train.py (or `code`) in a process of its own, under torchrun for several ranks."""
    script = [str(ROOT / "train.py")]
    if code:
        script = [str(cwd / "script.py")]
        Path(*script).write_text(code.format(root=str(ROOT)))
    if ranks > 1:
        script = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--max-restarts", str(restarts), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *script, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def metrics_of(out):
    timings = ("rollout_s", "update_s", "tokens_per_s", "memory_gb")
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timings} for line in lines]


# ------------------------------------------------------------------------------------------------------------- structure


def imports_of(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_none_of_its_siblings(name):
    assert not imports_of(name) & {*FILES, "train", "eval"}


def test_every_flag_has_a_help_text_and_every_default_is_of_its_type():
    source = (ROOT / "train.py").read_text()
    for field in dataclasses.fields(train.Config):
        assert f"    {field.name}: " in source and "  # " in source.split(f"    {field.name}: ")[1].split("\n")[0]


# ------------------------------------------------------------------------------------------------------- data of a step


def test_every_epoch_sees_every_document_once_whatever_the_step_size(alone):
    cfg, rows = train.Config(documents_per_step=4, seed=3), list("abcdefgh")
    epochs = ["".join(row for step in steps for row in train.rows_of_step(cfg, rows, step).values()) for steps in ((0, 1), (2, 3))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows and epochs[0] != epochs[1]


def test_a_longer_document_keeps_its_head_and_tail():
    assert train.head_and_tail([1, 2, 3, 4, 5], 3) == [1, 2, 5] and train.head_and_tail([1, 2], 3) == [1, 2]


# ------------------------------------------------------------------------------------------------------------- rewards


def scripted(prompts, answers):
    """A sampler that answers the last turn of trajectory j of slot s with answers[s][j], and recalls the same way."""
    def sampler(asked, limits, keys):
        texts = [answers[slot][j] for slot, j, *_ in keys]
        return [[*prompts.tokenizer(f"\\boxed{{ {text} }}")["input_ids"], prompts.tokenizer.eos_token_id] for text in texts]

    return sampler


@pytest.mark.parametrize("objective", ["full", "decoupled", "e2e"])
def test_rewards_stay_with_their_rows_and_follow_the_objective(objective):
    prompts, rows = train.Prompts(tiny.tokenizer(), tiny.TEMPLATES), tiny.documents(3, seed=5)
    cfg = train.Config(**tiny.CONFIG | {"objective": objective, "recall_weight": 0.5})
    slots = {2 * i: row for i, row in enumerate(rows)}  # as on the first of two ranks
    answers = {slot: [row["answer"] if (slot + j) % 3 == 0 else "wool" for j in range(4)] for slot, row in slots.items()}
    kit = train.Kit(cfg, prompts, tiny.PROBLEM, scripted(prompts, answers))
    groups = train.read_and_recall(kit, slots, group=4, recalls=0 if objective == "e2e" else 2, salt="x")
    whole = {g.document: g for g in groups if g.kind == "trajectory"}
    recalls = {(g.document, g.agents[0].key[1]): g for g in groups if g.kind == "recall"}
    assert len(recalls) == (0 if objective == "e2e" else 12)
    for slot, row in slots.items():
        for j in range(4):
            right = float(answers[slot][j] == row["answer"])
            assert whole[slot].correct[j] == right
            bonus = 0.5 * sum(recalls[slot, j].rewards) / 2 if objective == "full" else 0.0
            assert whole[slot].rewards[j] == right + bonus


def test_a_recall_reads_the_memory_that_was_written_at_its_step(monkeypatch):
    prompts, drawn, draw = train.Prompts(tiny.tokenizer(), tiny.TEMPLATES), [], data.draw_recall
    monkeypatch.setattr(data, "draw_recall", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])

    def sampler(asked, limits, keys):  # memory number t is the name of city t
        return [[*prompts.encode(tiny.CITIES[key[-1] + 1]), prompts.tokenizer.eos_token_id] for key in keys]

    kit = train.Kit(train.Config(**tiny.CONFIG | {"recall_draw": "trajectory"}), prompts, tiny.PROBLEM, sampler)
    groups = train.read_and_recall(kit, {0: tiny.documents(1, seed=5)[0]}, group=8, recalls=2, salt="x")
    asked = [group.agents[0].ids for group in groups if group.kind == "recall"]
    assert asked == [prompts.recall(memory=prompts.encode(tiny.CITIES[recall.k]), section=recall.ids) for recall in drawn]
    assert len({recall.k for recall in drawn}) > 1


def test_advantages_are_made_on_trajectories_and_flat_groups_are_left_out():
    class Agent:
        def __init__(self, turns):
            self.turns = [Turn([1], [2] * n, False) for n in turns]

    # one trajectory of five turns, one of one: expanding first would pull the mean towards the longer
    uneven = train.Group("trajectory", 7, [Agent([1] * 5), Agent([3])], [1.0, 0.0], [1.0, 0.0])
    flat = train.Group("recall", 7, [Agent([1]), Agent([1])], [1.0, 1.0], [1.0, 1.0])
    sequences = train.training_sequences(train.Config(), [uneven, flat])
    assert [s.advantage for s in sequences] == [0.5] * 5 + [-0.5] and {s.document for s in sequences} == {7}
    assert len(train.training_sequences(train.Config(filter=False), [uneven, flat])) == 8


# ------------------------------------------------------------------------------------------------------------ gradients


def some_sequences(count=12, seed=0):
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(64) for _ in range(n)]  # noqa: E731
    shared = ids(20)
    return [train.Sequence((shared if i % 3 else []) + ids(rng.randint(1, 9)), ids(rng.randint(1, 7)), rng.uniform(-1, 1), i % 4) for i in range(count)]


class Recorder:
    """Stands in the optimizer's place and keeps the gradient, whole."""

    def __init__(self, policy):
        self.parameters, self.gradient = list(policy.parameters()), None

    def step(self):
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in self.parameters]
        self.gradient = torch.cat([grad.flatten() for grad in grads])

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


def gradient(cfg, sequences, old=None, ref=None):
    """The gradient of one update on one rank."""
    policy = grpo.Policy(tiny_model())
    recorder = Recorder(policy)
    norm = train.update(cfg, policy, recorder, sequences, old, ref, train.Counter())
    assert recorder.gradient is None or recorder.gradient.norm() == pytest.approx(norm, rel=1e-4)
    return recorder.gradient


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_the_gradient_is_that_of_a_slow_plain_loss_in_float64(alone, aggregate):
    cfg, sequences = train.Config(aggregate=aggregate, max_grad_norm=1e9, kl=0.1, temperature=0.7), some_sequences()
    generator = torch.Generator().manual_seed(1)
    old, ref = ([-3 + torch.rand(len(s.response), generator=generator) for s in sequences] for _ in range(2))
    ours = gradient(cfg, sequences, old, ref)
    model = tiny_model().double()
    total = 0
    turns_of = {d: sum(s.document == d for s in sequences) for d in {s.document for s in sequences}}
    tokens = sum(len(s.response) for s in sequences)
    for s, o, r in zip(sequences, old, ref):
        ids = torch.tensor([s.prompt + s.response])
        logps = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, ids[0, 1:, None])[len(s.prompt) - 1 :, 0]
        ratio, d = (logps - o).exp(), r - logps
        surrogate = torch.min(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage)
        weight = {"sequence": 1 / (len(turns_of) * turns_of[s.document] * len(s.response)), "token": 1 / tokens,
                  "constant": 1 / (len(sequences) * max(cfg.memory_tokens, cfg.answer_tokens))}[aggregate]  # fmt: skip
        total = total + weight * (-surrogate + 0.1 * (d.exp() - d - 1)).sum()
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (ours - plain).norm() / plain.norm() < 1e-5


def test_the_gradient_does_not_depend_on_the_size_of_a_row(alone):
    wide = gradient(train.Config(max_grad_norm=1e9), some_sequences())
    narrow = gradient(train.Config(max_grad_norm=1e9, tokens_per_forward=24), some_sequences())
    assert (wide - narrow).norm() / wide.norm() < 1e-6


TWO_RANKS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import contextlib, torch, torch.distributed as dist, train, grpo
from test_train import Recorder, some_sequences
from conftest import tiny_model
device = train.start_ranks()
mine = [s for s in some_sequences() if (0 if sys.argv[2] == "empty" else s.document % 2) == dist.get_rank()]
policy = train.shard(grpo.Policy(tiny_model()), device)
recorder = Recorder(policy)
with contextlib.suppress(ConnectionError), torch.no_grad(), train.gathered(policy):
    rollout = policy([[1, 2, 3]], [[4, 5]])[0]
    raise ConnectionError  # what is set aside for a rollout is there for the update all the same
for _ in range(2):  # the second finds everything as the first did
    train.update(train.Config(max_grad_norm=1e9, tokens_per_forward=40), policy, recorder, mine, None, None, train.Counter())
if dist.get_rank() == 0:
    torch.save((recorder.gradient, [name for name, _ in policy.named_parameters()], rollout), sys.argv[1])
dist.destroy_process_group()
"""


OPENED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
device = train.start_ranks()
policy, _ = train.open_policy(sys.argv[1], device)
assert policy.shares and {{p.dtype for p in policy.parameters()}} == {{torch.float32}}
logps = policy([[1, 2, 3], [1, 2, 4]], [[5, 6], [7]])
whole = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 1:
    torch.save([p.detach() for p in logps], sys.argv[2])
elif whole:
    torch.save(whole, sys.argv[2] + ".weights")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks_that_map_a_checkpoint_hold_its_weights_as_fp32_whatever_its_config_says(dtype, tokenizer, tmp_path):
    tiny_model().to(dtype).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    tokenizer.save_pretrained(tmp_path / "model")
    done = run([str(tmp_path / "model"), str(tmp_path / "result")], tmp_path, ranks=2, code=OPENED)
    assert done.returncode == 0, done.stderr[-2000:]
    model, _ = train.load_model(str(tmp_path / "model"), torch.float32)
    weights = torch.load(tmp_path / "result.weights")
    assert all(weights["lm." + name].dtype == torch.float32 and weights["lm." + name].equal(value) for name, value in model.state_dict().items())
    expected = grpo.Policy(model)([[1, 2, 3], [1, 2, 4]], [[5, 6], [7]])
    for ours, theirs in zip(torch.load(tmp_path / "result"), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("share", ["even", "empty"])
def test_two_ranks_make_the_gradient_of_one_even_when_one_of_them_has_no_work(alone, share, tmp_path):
    done = run([str(tmp_path / "result"), share], tmp_path, ranks=2, code=TWO_RANKS)
    assert done.returncode == 0, done.stderr[-2000:]
    two, names, rollout = torch.load(tmp_path / "result")
    torch.testing.assert_close(rollout, grpo.Policy(tiny_model())([[1, 2, 3]], [[4, 5]])[0].detach())
    one = gradient(train.Config(max_grad_norm=1e9), some_sequences())
    assert names == [name for name, _ in grpo.Policy(tiny_model()).named_parameters()]
    assert (two - one).norm() / one.norm() < 1e-6


def test_a_non_finite_gradient_changes_no_weight(alone):
    assert gradient(train.Config(), [train.Sequence([1, 2], [3], math.inf, 0)]) is None


# ----------------------------------------------------------------------------------------------------------- the script


def test_the_script_runs_end_to_end_and_leaves_a_checkpoint_for_transformers(pocket_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run(["--model", pocket_model, "--steps", "2", *SIZES, "--out", str(tmp_path / "run")], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 0002/0002 | R_E" in done.stdout + done.stderr and "before (step    0): E2E EM" in done.stdout
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2] and "heldout" in lines[0] and "heldout" in lines[2]
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["turns"]) == tiny.CONFIG["chunks"] + 1 and len(sample["rewards"]) == 4
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["kv_tokens"] > 0 and config["steps"] == 2
    folder = tmp_path / "run" / "step-000002"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]


def test_documents_that_data_py_built_from_text_are_trained_on_and_looked_at(tokenizer, tmp_path):
    names = ["Ada Lovelace", "Alan Turing", "Grace Hopper", "Kurt Goedel", "Emmy Noether", "Paul Erdos"]
    cities = ["Paris", "London", "Vienna", "Moscow", "Geneva"]
    passages = [{"id": str(i), "title": f"Life {i}", "text": f"{names[i % 6]} lived in {cities[i % 5]} in {1800 + i}. Later {names[(i + 1) % 6]} came to {cities[(i + 2) % 5]}."} for i in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    build = ["build", "--corpus", "corpus.jsonl", "--out", "docs", "--documents", "6", "--heldout", "2", "--related", "2", "--random", "2", "--ner", "rules"]
    built = subprocess.run([sys.executable, str(ROOT / "data.py"), *build], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr[-2000:]
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = run(["--model", "model", "--data", "docs", "--steps", "1", *SIZES, "--chunk_tokens", "64", "--answer_tokens", "4", "--out", "run"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = metrics_of(tmp_path / "run")
    assert first["heldout"]["trajectory"][3] == 2 and "imr" in last and last["turns"] > 2


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


# The same script, which kills itself (rank 1 where there are two) when it comes to a function for the n-th time.
KILLED = (
    ANY_REWARD.replace("train.main(sys.argv[1:])", "")
    + """
import os, signal
name, count = os.environ.get("KILL", "main 0").split()
function, calls = getattr(train, name), []
def deadly(*arguments, **named):
    calls.append(1)
    if len(calls) == int(count) and os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0"):
        os.kill(os.getpid(), int(os.environ.get("KILL_WITH", signal.SIGKILL)))
    return function(*arguments, **named)
setattr(train, name, deadly)
train.main(sys.argv[1:])
"""
)
thorough = pytest.mark.skipif("THOROUGH" not in os.environ, reason="minutes: set THOROUGH=1 to run every case")
STEPS = [*SIZES[:-2], "--steps", "4", "--documents_per_update", "2", "--save_every", "1", "--keep", "9", "--lr", "1e-3", "--kl", "0.1", "--eval_documents", "0"]


@pytest.fixture(scope="module")
def uninterrupted(pocket_model, tmp_path_factory):
    """(flags of a task and its ranks) -> the folder of a run of four steps that nothing befell; each is made once."""
    made = {}

    def make(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("whole")
            done = run(["--model", pocket_model, *STEPS, *flags, "--out", "run"], made[flags], code=KILLED)
            assert done.returncode == 0, done.stderr[-2000:]
        return made[flags] / "run"

    return make


def assert_same_run(a, b, steps=4):
    assert [line["step"] for line in metrics_of(a)] == list(range(1, steps + 1)) and metrics_of(a) == metrics_of(b)
    assert any(line["grad"] > 0 for line in metrics_of(a)) and (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    for name, value in weights_of(a / f"step-{steps:06d}").items():
        assert torch.equal(value, weights_of(b / f"step-{steps:06d}")[name])


@pytest.mark.parametrize("task, ranks, function, call", [
    ("memtrain", "1", "update", 6),  # between the two updates of a step
    ("memtrain", "1", "digests", 3),  # while a checkpoint is being written
    ("memtrain", "2", "forward_rows", 12),  # one rank of two, in the midst of a step
    pytest.param("memtrain", "1", "play", 3, marks=thorough),  # before a rollout
    pytest.param("memtrain", "2", "save_checkpoint", 3, marks=thorough),
    pytest.param("longqa", "1", "log", 3, marks=thorough),  # between log and checkpoint
    pytest.param("searchqa", "2", "update", 6, marks=thorough),
])  # fmt: skip
def test_a_run_killed_at_any_moment_and_resumed_equals_the_uninterrupted_one_bit_for_bit(task, ranks, function, call, uninterrupted, pocket_model, tmp_path, monkeypatch):
    flags = ("--task", task, "--processes", ranks)
    command = ["--model", pocket_model, *STEPS, *flags, "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setenv("KILL", f"{function} {call}")
        patch.setenv("KILL_RANK", str(int(ranks) - 1))
        assert run(command, tmp_path, code=KILLED).returncode in (-9, 137)
    assert 1 <= len(list((tmp_path / "run").glob("step-*[0-9]"))) and not (tmp_path / "run/step-000004").exists()
    done = run([*command, "--resume"], tmp_path, code=KILLED)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(tmp_path / "run", uninterrupted(*flags))


def test_a_run_goes_on_with_another_number_of_ranks(uninterrupted, pocket_model, tmp_path):
    shutil.copytree(uninterrupted("--task", "memtrain", "--processes", "2"), tmp_path / "run")
    for later in ("000003", "000004"):
        shutil.rmtree(tmp_path / "run" / f"step-{later}", ignore_errors=True)
    done = run(["--model", pocket_model, *STEPS, "--task", "memtrain", "--processes", "1", "--resume", "--out", "run"], tmp_path, code=KILLED)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = uninterrupted("--task", "memtrain", "--processes", "1")
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]
    ids = [[json.loads(line)["id"] for line in (folder / "samples.jsonl").read_text().splitlines()] for folder in (tmp_path / "run", whole)]
    assert ids[0][-1] == ids[1][-1]
    for name, value in weights_of(whole / "step-000004").items():
        torch.testing.assert_close(value, weights_of(tmp_path / "run/step-000004")[name], rtol=1e-3, atol=1e-4)


@thorough
def test_torchrun_recovers_by_itself_from_the_death_of_a_rank(pocket_model, uninterrupted, tmp_path, monkeypatch):
    flags = ("--task", "memtrain", "--processes", "2")
    whole = uninterrupted(*flags)
    monkeypatch.setenv("KILL", "update 6")
    monkeypatch.setenv("KILL_RANK", "1")
    done = run(["--model", pocket_model, *STEPS, *flags, "--out", "run"], tmp_path, ranks=2, code=KILLED, restarts=2)
    assert done.returncode == 0 and "-9" in done.stderr, done.stderr[-2000:]
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", ["SIGTERM", pytest.param("SIGINT", marks=thorough)])
def test_a_signal_lets_the_step_finish_and_saves_it(number, uninterrupted, pocket_model, tmp_path, monkeypatch):
    flags = ("--task", "memtrain", "--processes", "2")
    command = ["--model", pocket_model, *STEPS, *flags, "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setenv("KILL", "play 2")
        patch.setenv("KILL_WITH", str(int(getattr(signal, number))))
        done = run([*command, "--save_every", "50"], tmp_path, code=KILLED)
    assert done.returncode == 128 + getattr(signal, number), done.stderr[-2000:]
    assert f"stopped by {number}: step 2 is saved" in done.stdout + done.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2] and (tmp_path / "run/step-000002").exists()
    assert run([*command, "--resume"], tmp_path, code=KILLED).returncode == 0
    assert_same_run(tmp_path / "run", uninterrupted(*flags))


def resumed(folder, pocket_model, *flags, code=KILLED):
    """train.py --resume on a copy of a finished run, one step further."""
    return run(["--model", pocket_model, *STEPS, "--task", "memtrain", "--processes", "1", "--steps", "5", "--resume", *flags, "--out", "run"], folder, code=code)


@pytest.fixture
def finished(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted("--task", "memtrain", "--processes", "1"), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("file", ["trainer/__0_0.distcp", "digests.json", pytest.param("model.safetensors", marks=thorough)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(file, finished, pocket_model, tmp_path):
    path = finished / "step-000004" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    done = resumed(tmp_path, pocket_model)
    assert done.returncode == 0 and "step-000004" in done.stderr and "is damaged" in done.stderr, done.stderr[-2000:]
    assert "step 0003/" not in done.stdout + done.stderr and "step 0004/" in done.stdout + done.stderr  # the newest that is intact
    assert [line["step"] for line in metrics_of(finished)] == [1, 2, 3, 4, 5] and (finished / "damaged-step-000004").exists()


def test_a_run_is_not_resumed_under_other_settings_or_data_unless_forced(finished, pocket_model, tmp_path):
    refused = resumed(tmp_path, pocket_model, "--lr", "2e-3", "--chunks", "2")
    line = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert refused.returncode == 2 and len(line) == 1 and "lr was 0.001 and is 0.002" in line[0] and "data_fingerprint" in line[0]
    assert len(metrics_of(finished)) == 4
    assert resumed(tmp_path, pocket_model, "--lr", "2e-3", "--force").returncode == 0 and len(metrics_of(finished)) == 5


def test_a_full_disk_stops_the_run_with_one_line_and_leaves_the_last_checkpoint_intact(finished, pocket_model, tmp_path):
    limited = "import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n" + KILLED  # no file above 1 MB, as if the disk were full
    done = resumed(tmp_path, pocket_model, code=limited)
    line = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(line) == 1 and "step-000005 could not be saved" in line[0] and "GB free" in line[0], done.stderr[-2000:]
    assert resumed(tmp_path, pocket_model).returncode == 0 and len(metrics_of(finished)) == 5


def test_two_ranks_train_as_one(pocket_model, tmp_path):
    common = ["--model", pocket_model, *SIZES, "--steps", "2", "--lr", "1e-3"]
    for ranks in (1, 2):
        done = run([*common, "--out", f"ranks{ranks}"], tmp_path, ranks=ranks, code=ANY_REWARD)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = metrics_of(tmp_path / "ranks1"), metrics_of(tmp_path / "ranks2")
    for a, b in zip(one, two, strict=True):
        assert a.pop("heldout", None) == b.pop("heldout", None)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for name, value in weights_of(tmp_path / "ranks1/step-000002").items():
        torch.testing.assert_close(value, weights_of(tmp_path / "ranks2/step-000002")[name], rtol=1e-4, atol=1e-5)


LONE_FAILURE = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed as dist, train
@train.one_line_errors()
def main():
    train.start_ranks()
    if sys.argv[1] == "all" or dist.get_rank() == 1:
        raise ValueError("no such thing")
    dist.barrier()
main()
"""


@pytest.mark.parametrize("who", ["all", "rank 1"])
def test_an_error_of_one_rank_or_of_all_is_one_line_and_ends_the_run(who, tmp_path):
    done = run([who], tmp_path, ranks=2, code=LONE_FAILURE)
    assert done.returncode == 1 and done.stderr.count("error: no such thing") == 1, done.stderr[-2000:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_runs_on_a_gpu_runs_here_in_its_precision_sharded_and_checkpointed(ranks, pocket_model, tmp_path):
    code = ANY_REWARD.replace("train.main", "import torch\ntrain.compute_dtype = lambda device: torch.bfloat16\ntrain.main")
    flags = ["--steps", "2", "--documents_per_update", "2", "--gradient_checkpointing", "--kl", "0.1", "--lr", "1e-3", "--eval_documents", "0"]
    done = run(["--model", pocket_model, *SIZES, *flags, "--out", "run"], tmp_path, ranks=ranks, code=code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {value.dtype for value in weights_of(tmp_path / "run" / "step-000002").values()} == {torch.bfloat16}
    first, second = (line for line in metrics_of(tmp_path / "run") if "grad" in line)
    for line in first, second:
        assert line["ratio"] == pytest.approx(1, abs=0.05) and 0 < line["grad"] < 10 and line["skipped"] == 0 and line["kl"] < 0.1
    assert first["kl"] < second["kl"]  # the master weights took the first step, although it is small in bf16


# ---------------------------------------------------------------------------------------------------------- it can learn


def learn(monkeypatch, folder, pocket_model, *flags):
    """Thirty steps in which an answer earns 1 when its first word is a city's, whatever the document: what an untrained
    model can stumble on. -> held-out exact match before and after"""
    cities = {city.lower() for city in tiny.CITIES}
    monkeypatch.setattr(rewards, "extract_boxed", lambda text: text)
    monkeypatch.setattr(rewards, "exact_match", lambda answer, golds: float((answer or "").lower().split(" ")[0] in cities))
    monkeypatch.chdir(folder)
    train.main(["--model", pocket_model, "--steps", "30", "--documents_per_step", "4", "--documents_per_update", "4", "--group", "8", "--objective", "e2e",
                "--memory_tokens", "2", "--answer_tokens", "1", "--chunks", "1", "--eval_documents", "64", "--eval_every", "0", "--kl", "0", "--lr", "1e-3",
                "--warmup_steps", "1", "--processes", "1", "--out", "run", *flags])  # fmt: skip
    looks = [line["heldout"]["trajectory"][0] for line in metrics_of(folder / "run") if "heldout" in line]
    return looks[0], looks[-1]


def test_the_loop_learns_what_is_rewarded(monkeypatch, tmp_path, pocket_model):
    before, after = learn(monkeypatch, tmp_path, pocket_model)
    assert before < 0.35 and after > 0.8


def test_nothing_is_learned_from_shuffled_rewards(monkeypatch, tmp_path, pocket_model):
    before, after = learn(monkeypatch, tmp_path, pocket_model, "--shuffle_rewards")
    assert abs(after - before) < 0.25


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def no_template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_template")
    tiny.model().save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("arguments, words", [
    (["--model", "{pocket}", "--group", "1"], "--group 1"),
    (["--model", "{pocket}", "--data", "nowhere"], "nowhere"),
    (["--model", "nowhere", "--data", "x"], "nowhere"),
    (["--model", "{pocket}", "--chunk_tokens", "100000"], "the model's context holds 4096"),
    (["--model", "{no_template}", "--data", "x"], "chat template"),
    (["--model", "{no_template}"], "needs --data"),
    (["--model", "{pocket}", "--documents_per_update", "3"], "multiple"),
    (["--task", "longqa", "--model", "{pocket}", "--data", "broken.jsonl"], "broken.jsonl:2"),
    (["--task", "longqa", "--model", "{pocket}", "--data", "empty.jsonl"], "empty.jsonl"),
])  # fmt: skip
def test_bad_input_gets_one_line_and_status_2_and_leaves_nothing(arguments, words, pocket_model, no_template, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.jsonl").write_text('{"question": "Who?", "answers": ["Ann"], "context": "x"}\n{"question": \n')
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main([a.format(pocket=pocket_model, no_template=no_template) for a in arguments] + ["--out", "out", "--processes", "1"])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0]
    assert not Path("out").exists()


def test_an_unknown_flag_and_an_abbreviated_one_are_refused(capsys):
    for flag in ("--nonsense", "--top_p", "--step"):
        with pytest.raises(SystemExit) as stopped:
            train.main([flag, "1"])
        assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_used_folder_is_refused_without_resume(tmp_path, capsys, pocket_model):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", pocket_model, "--out", str(tmp_path), "--processes", "1"])
    assert stopped.value.code == 2 and "--resume" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
