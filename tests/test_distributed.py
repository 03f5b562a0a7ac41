"""distributed.py: ranks against one process, killed runs that go on, checkpoints, precision."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_train import SIZES, gradient, metrics_of, some_sequences

import distributed
import grpo
import train

ROOT = Path(__file__).parent.parent

# An untrained model earns nothing: these rewards depend on the response in a way that is as good as
# random, so that every step has gradients. The rest is the real script.
ANY_REWARD = """
import sys, zlib
sys.path.insert(0, {root!r})
import distributed, train

def any_reward(plain):
    def rollout(setup, rows, step):
        groups = plain(setup, rows, step)
        for group in groups:
            last = [str(agent.turns[-1].response_ids).encode() for agent in group.agents]
            group.rewards[:] = [float(zlib.crc32(ids) % 3 == 0) for ids in last]
        return groups
    return rollout

for name, task in train.TASKS.items():
    train.TASKS[name] = task._replace(rollout=any_reward(task.rollout))
train.CHECKPOINTS = 9
"""
# It kills itself (rank 1 where there are two) when it comes to a function for the n-th time.
KILLED = """
import os, signal
module, name, count = os.environ.get("KILL", "train main 0").split()
module = {{"train": train, "distributed": distributed}}[module]
function, calls = getattr(module, name), []

def deadly(*arguments, **named):
    calls.append(1)
    if len(calls) == int(count) and os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0"):
        os.kill(os.getpid(), int(os.environ.get("KILL_WITH", signal.SIGKILL)))
    return function(*arguments, **named)

setattr(module, name, deadly)
"""
MAIN = "\ntrain.main(sys.argv[1:])\n"


def run(arguments, folder, code=ANY_REWARD + KILLED + MAIN, ranks=1, restarts=0, **environment):
    """A script in a process of its own, under torchrun for several ranks."""
    script = folder / "script.py"
    script.write_text(code.format(root=str(ROOT)))
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += ["--max-restarts", str(restarts)]
    command += [str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300
    )


def errors_of(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error")]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


# -------------------------------------------------------------------------------- ranks against one


TWO_RANKS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import contextlib, torch
from collections import Counter
import distributed, grpo, train
from conftest import tiny_model
from test_train import Recorder, some_sequences

device = distributed.start_ranks()
share = (lambda s: s.document % 2) if sys.argv[2] == "even" else (lambda s: 0)
mine = [s for s in some_sequences() if share(s) == distributed.rank()]
if sys.argv[2] == "balanced":  # rank 0 had everything
    mine = train.balance(mine)
    assert mine
policy = distributed.shard(grpo.Policy(tiny_model()), device)
recorder = Recorder(policy)
with contextlib.suppress(ConnectionError), torch.no_grad(), distributed.gathered(policy):
    rollout = policy([[1, 2, 3]], [[4, 5]])[0]
    raise ConnectionError  # what is set aside for a rollout is there for the update all the same
train.MAX_GRAD_NORM = 1e9
cfg = train.Config(tokens_per_forward=40)
for _ in range(2):  # the second finds everything as the first did
    train.update(cfg, policy, recorder, mine, Counter())
if distributed.rank() == 0:
    names = [name for name, _ in policy.named_parameters()]
    torch.save((recorder.gradient, names, rollout), sys.argv[1])
distributed.leave()
"""


@pytest.mark.parametrize("share", ["even", "empty", "balanced"])
def test_two_ranks_make_the_gradient_of_one_even_when_one_of_them_has_no_work(
    alone, share, tmp_path, monkeypatch
):
    done = run([tmp_path / "result", share], tmp_path, TWO_RANKS, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    two, names, rollout = torch.load(tmp_path / "result")
    plain = grpo.Policy(tiny_model())
    torch.testing.assert_close(rollout, plain([[1, 2, 3]], [[4, 5]])[0].detach())
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e9)
    one = gradient(train.Config(), some_sequences())
    assert names == [name for name, _ in plain.named_parameters()]
    assert (two - one).norm() / one.norm() < 1e-6


def test_two_ranks_train_as_one(pocket_model, tmp_path):
    # small steps: Adam makes much of a gradient near zero, and one other token is another run
    flags = [
        "--model", pocket_model, *SIZES, "--steps", "2", "--lr", "1e-4",
        "--documents_per_update", "2",
    ]  # fmt: skip
    for ranks in (1, 2):
        done = run([*flags, "--out", f"ranks{ranks}"], tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr[-6000:]
    one, two = metrics_of(tmp_path / "ranks1"), metrics_of(tmp_path / "ranks2")
    for a, b in zip(one, two, strict=True):
        assert a.pop("heldout", None) == b.pop("heldout", None)
        assert max(a.pop("mismatch_max", 0), b.pop("mismatch_max", 0)) < 1e-4
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for name, value in weights_of(tmp_path / "ranks1/step-000002").items():
        other = weights_of(tmp_path / "ranks2/step-000002")[name]
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)


OPENED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, train, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

device = distributed.start_ranks()
policy, _ = train.open_policy(sys.argv[1], device)
assert policy.shares and {{p.dtype for p in policy.parameters()}} == {{torch.float32}}
logps = policy([[1, 2, 3], [1, 2, 4]], [[5, 6], [7]])
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
whole = get_model_state_dict(policy, options=options)
if distributed.rank() == 1:
    torch.save([p.detach() for p in logps], sys.argv[2])
else:
    torch.save(whole, sys.argv[2] + ".weights")
torch.distributed.barrier()
distributed.leave()
"""


def test_ranks_that_map_a_checkpoint_hold_its_weights_as_fp32_whatever_its_config_says(
    tokenizer, tmp_path
):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    tokenizer.save_pretrained(tmp_path / "model")
    done = run([tmp_path / "model", tmp_path / "result"], tmp_path, OPENED, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    model, _ = distributed.load_model(str(tmp_path / "model"), torch.float32)
    weights = torch.load(tmp_path / "result.weights")
    for name, value in model.state_dict().items():
        assert weights["lm." + name].dtype == torch.float32 and weights["lm." + name].equal(value)
    expected = grpo.Policy(model)([[1, 2, 3], [1, 2, 4]], [[5, 6], [7]])
    for ours, theirs in zip(torch.load(tmp_path / "result"), expected):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------- precision


BF16 = "\nimport torch\ndistributed.compute_dtype = lambda device: torch.bfloat16\n"


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_runs_on_a_gpu_runs_here_in_its_precision_sharded_and_checkpointed(
    ranks, pocket_model, tmp_path
):
    flags = [
        "--model", pocket_model, *SIZES, "--steps", "2", "--documents_per_update", "2",
        "--kl", "0.1",
    ]  # fmt: skip
    flags += ["--gradient_checkpointing", "--lr", "3e-4", "--eval_documents", "0", "--out", "run"]
    done = run(flags, tmp_path, ANY_REWARD + BF16 + MAIN, ranks=ranks)
    assert done.returncode == 0, done.stderr[-6000:]
    saved = tmp_path / "run" / "step-000002"
    assert {value.dtype for value in weights_of(saved).values()} == {torch.bfloat16}
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    first, second = (line for line in metrics_of(tmp_path / "run") if "grad" in line)
    for line in first, second:
        assert (
            line["ratio"] == pytest.approx(1, abs=0.05)
            and 0 < line["grad"] < 10
            and line["skipped"] == 0
        )
        assert line["kl"] < 0.1 and 1e-4 < line["mismatch"] < 0.1
    # the master weights took the first step, although it is small in bf16
    assert first["kl"] < second["kl"]


def test_tied_weights_are_saved_once_and_load_as_one(alone, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = grpo.Policy(tiny_model(tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(policy.parameters())
    distributed.save_checkpoint(tmp_path, 1, policy, optimizer, tokenizer)
    weights = weights_of(tmp_path / "step-000001")
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-000001")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, policy.lm(ids).logits)


# ------------------------------------------------------------------------------ other architectures


def model_of(architecture):
    """Also of those that keep their decoder layers elsewhere than in .model.layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture != "gemma3":
        sizes = {
            "gpt2": dict(n_embd=32, n_layer=2, n_head=4),
            "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
        }
        return tiny_model(architecture, **sizes.get(architecture, {}))
    text = tiny_model("gemma3_text").config.to_dict()
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    vision |= dict(num_attention_heads=4, image_size=28, patch_size=14)
    ids = dict(image_token_index=63, boi_token_index=62, eoi_token_index=61)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids
        ))  # fmt: skip


# gemma3 with its 3 layers for images; each layer is a unit of its own, and the root
UNITS = {"gemma3": 6, "gpt2": 3, "opt": 3, "stablelm": 3, "nemotron": 3, "biogpt": 3, "mixtral": 3}
TWO = [[1, 2, 3], [1, 2, 4]], [[5, 6], [7]]


def step_of(policy):
    """The log-probs of TWO in train mode, and one optimizer step on them."""
    optimizer = torch.optim.AdamW(policy.train().parameters(), lr=1e-3)
    with distributed.gathered(policy):
        logps = torch.cat(policy(*TWO))
        (-logps.sum()).backward()
    optimizer.step()
    return logps.detach(), optimizer


@pytest.mark.parametrize("architecture", UNITS)
def test_decoder_layers_are_found_wherever_a_model_keeps_them(architecture, alone, monkeypatch):
    from rollout import Sampler

    policy = grpo.Policy(model_of(architecture))
    with torch.no_grad():
        expected = torch.cat(policy(*TWO))
    monkeypatch.setattr(distributed, "compute_dtype", lambda device: torch.bfloat16)
    policy = distributed.shard(policy, alone)
    assert len(distributed._fsdp_units(policy)) == UNITS[architecture]
    with torch.no_grad(), distributed.gathered(policy):
        sampler = Sampler(policy.lm, [3], share=policy.shares)
        sampled = sampler([[1, 2, 3]] * 2, [6] * 2, [(0,), (1,)])
        trained = policy([[1, 2, 3]] * 2, [response.ids for response in sampled])
    for response, logps in zip(sampled, trained):
        assert response.logps == pytest.approx(logps.tolist(), abs=0.1)
    logps, _ = step_of(policy)
    torch.testing.assert_close(logps, expected, rtol=0, atol=0.1)
    with torch.no_grad():
        assert torch.cat(policy(*TWO)).sum() > logps.sum()


IMAGES = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import distributed, grpo
from conftest import tiny_model
from test_distributed import model_of, step_of

device = distributed.start_ranks()
policy = distributed.shard(grpo.Policy(model_of("gemma3")), device)
logps, optimizer = step_of(policy)
class NoTokenizer:
    def save_pretrained(self, folder):
        pass
distributed.save_checkpoint(".", 1, policy, optimizer, NoTokenizer())
if distributed.rank() == 0:
    torch.save(logps, "logps")
distributed.leave()
"""


def test_a_model_that_reads_images_too_is_trained_and_saved_by_two_ranks_as_by_one(
    alone, tmp_path
):
    from transformers import AutoModelForCausalLM

    done = run([], tmp_path, IMAGES, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    policy = grpo.Policy(model_of("gemma3"))
    logps, _ = step_of(policy)
    torch.testing.assert_close(torch.load(tmp_path / "logps"), logps, rtol=1e-4, atol=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "step-000001")
    assert type(saved) is type(policy.lm)
    after, expected = grpo.Policy(saved)(*TWO), policy(*TWO)
    torch.testing.assert_close(torch.cat(after), torch.cat(expected), rtol=1e-3, atol=1e-3)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_tokenizer_files(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


SPOILED = {  # how a checkpoint's folder is spoiled, and what is said of it
    "quantized": (
        lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantized",
    ),
    "a tokenizer of bytes": (
        lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer"),
        "no tokenizer.json",
    ),
    "a tokenizer without its library": (
        lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="SiglipTokenizer"),
        "SentencePiece",
    ),
    "no tokenizer": (without_tokenizer_files, "tokenizer"),
    "half a tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "Expecting"),
    "weights cut short": (
        lambda folder: os.truncate(folder / "model.safetensors", 9999),
        "deserializing",
    ),
    "other sizes": (lambda folder: edit(folder / "config.json", hidden_size=96), "mismatched"),
    "sizes that are none": (
        lambda folder: edit(folder / "config.json", hidden_size="a"), "hidden_size",
    ),
    "missing weights": (
        lambda folder: edit(folder / "config.json", tie_word_embeddings=False),
        "lacks weights: lm_head.weight",
    ),
    "another kind of model": (
        lambda folder: edit(folder / "config.json", model_type="t5"), "T5Config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_a_checkpoint_that_can_not_be_trained_is_refused_in_one_line(how, pocket_model, tmp_path):
    folder, (spoil, words) = tmp_path / "model", SPOILED[how]
    shutil.copytree(pocket_model, folder)
    if how.startswith("a tokenizer"):
        (folder / "tokenizer.json").unlink()
    spoil(folder)
    with pytest.raises(OSError, match=words) as error:
        distributed.load_model(str(folder), torch.float32)
    assert str(error.value).startswith(f"--model {folder}: ") and "\n" not in str(error.value)


# ------------------------------------------------------------------ runs that are killed, and go on


thorough = pytest.mark.skipif(
    "THOROUGH" not in os.environ, reason="minutes: set THOROUGH=1 to run every case"
)
STEPS = [*SIZES, "--steps", "4", "--documents_per_update", "2", "--save_every", "1"]
STEPS += ["--lr", "1e-3", "--kl", "0.1", "--eval_documents", "0"]


@pytest.fixture(scope="module")
def uninterrupted(pocket_model, tmp_path_factory):
    """(task, ranks) -> the folder of a run of four steps that nothing befell; each is made once."""
    made = {}

    def make(task="memtrain", ranks=1):
        if (task, ranks) not in made:
            made[task, ranks] = folder = tmp_path_factory.mktemp("whole")
            flags = ["--model", pocket_model, "--task", task, *STEPS, "--out", "run"]
            done = run(flags, folder, ranks=ranks)
            assert done.returncode == 0, done.stderr[-6000:]
        return made[task, ranks] / "run"

    return make


def assert_same_run(a, b, steps=4):
    assert [line["step"] for line in metrics_of(a)] == list(range(1, steps + 1))
    assert metrics_of(a) == metrics_of(b) and any(line["grad"] > 0 for line in metrics_of(a))
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    for name, value in weights_of(a / f"step-{steps:06d}").items():
        assert torch.equal(value, weights_of(b / f"step-{steps:06d}")[name])


@pytest.mark.parametrize(
    "task, ranks, place",
    [
        ("memtrain", 1, "train update 6"),  # between the two updates of a step
        ("memtrain", 1, "distributed _save_pretrained 3"),  # while a checkpoint is being written
        ("memtrain", 2, "train pack_loss 6"),  # one rank of two, in the midst of a step
        pytest.param("memtrain", 1, "train rows_of_step 3", marks=thorough),  # before a rollout
        pytest.param("memtrain", 2, "distributed save_checkpoint 3", marks=thorough),
        pytest.param("longqa", 1, "train log 3", marks=thorough),  # between log and checkpoint
        pytest.param("searchqa", 2, "train update 6", marks=thorough),
    ],
)
def test_a_run_killed_at_any_moment_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
    task, ranks, place, uninterrupted, pocket_model, tmp_path
):
    command = ["--model", pocket_model, "--task", task, *STEPS, "--out", "run"]
    killed = run(command, tmp_path, ranks=ranks, KILL=place, KILL_RANK=str(ranks - 1))
    assert killed.returncode != 0 and "error:" not in killed.stderr
    assert 1 <= len(distributed.checkpoints(tmp_path / "run")) < 4
    # its settings are its own
    done = run(["--task", task, "--resume", "--out", "run"], tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr[-6000:]
    assert_same_run(tmp_path / "run", uninterrupted(task, ranks))


def test_a_run_goes_on_with_another_number_of_ranks(uninterrupted, tmp_path):
    whole = uninterrupted()
    shutil.copytree(whole, tmp_path / "run")
    for later in ("000003", "000004"):
        shutil.rmtree(tmp_path / "run" / f"step-{later}")
    done = run(["--resume", "--out", "run"], tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]
    last = [
        (folder / "samples.jsonl").read_text().splitlines()[-1]
        for folder in (tmp_path / "run", whole)
    ]
    assert json.loads(last[0])["step"] == json.loads(last[1])["step"] == 4
    for name, value in weights_of(whole / "step-000004").items():
        other = weights_of(tmp_path / "run/step-000004")[name]
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4)


@thorough
def test_torchrun_recovers_by_itself_from_the_death_of_a_rank(
    pocket_model, uninterrupted, tmp_path
):
    command = ["--model", pocket_model, *STEPS, "--out", "run"]
    done = run(command, tmp_path, ranks=2, restarts=2, KILL="train update 6", KILL_RANK="1")
    assert done.returncode == 0 and "-9" in done.stderr, done.stderr[-6000:]
    assert_same_run(tmp_path / "run", uninterrupted("memtrain", 2))


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=thorough)])
def test_a_signal_lets_the_step_finish_and_saves_it(name, uninterrupted, pocket_model, tmp_path):
    number = int(getattr(signal, name))
    command = ["--model", pocket_model, *STEPS, "--out", "run"]
    place = dict(KILL="train rows_of_step 2", KILL_WITH=str(number))
    done = run([*command, "--save_every", "50"], tmp_path, **place)
    assert done.returncode == 128 + number, done.stderr[-6000:]
    assert f"stopped by {name}: step 2 is saved" in done.stdout + done.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    assert run(["--resume", "--out", "run"], tmp_path).returncode == 0
    assert_same_run(tmp_path / "run", uninterrupted())


@pytest.fixture
def finished(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted(), tmp_path / "run")
    return tmp_path / "run"


def goes_on(monkeypatch, folder, *flags):
    """train.py --resume, one step further, in this process."""
    monkeypatch.chdir(folder)
    train.main(["--resume", "--steps", "5", "--out", "run", *flags])


@pytest.mark.parametrize("damage", ["cut in half", "gone"])
def test_a_checkpoint_that_can_not_be_read_is_named_and_the_one_before_it_is_used(
    damage, finished, tmp_path, monkeypatch, capsys, signals
):
    file = finished / "step-000004" / "trainer" / "__0_0.distcp"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut in half":
        file.write_bytes(content[: len(content) // 2])
    goes_on(monkeypatch, tmp_path)
    shown = capsys.readouterr()
    assert "step-000004 can't be read; the one before it is used" in shown.err
    assert "step 0003/" not in shown.out and "step 0004/" in shown.out
    assert [line["step"] for line in metrics_of(finished)] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_with_its_own_settings_and_refuses_others(
    finished, tmp_path, monkeypatch, capsys, signals
):
    with pytest.raises(SystemExit) as stopped:
        goes_on(monkeypatch, tmp_path, "--lr", "2e-3")
    assert (
        stopped.value.code == 2
        and "was begun with --lr 0.001, not 0.002" in capsys.readouterr().err
    )
    assert len(metrics_of(finished)) == 4
    goes_on(monkeypatch, tmp_path, "--lr", "1e-3")
    assert len(metrics_of(finished)) == 5
    assert json.loads((finished / "config.json").read_text())["config"]["documents_per_update"] == 2


def test_resume_starts_afresh_where_there_is_nothing(pocket_model, tmp_path, monkeypatch, signals):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", pocket_model, *SIZES, "--steps", "1", "--eval_documents", "0"]
    train.main([*flags, "--resume", "--out", "run"])
    assert [line["step"] for line in metrics_of("run")] == [1]


def test_a_full_disk_stops_the_run_with_one_line_and_leaves_the_last_checkpoint_intact(
    finished, tmp_path
):
    # no file above 1 MB, as if the disk were full
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
    go_on = ["--resume", "--steps", "5", "--out", "run"]
    done = run(go_on, tmp_path, full + ANY_REWARD + MAIN)
    [line] = errors_of(done)
    assert done.returncode == 2 and "step-000005 could not be saved" in line and "GB free" in line
    assert (
        run(go_on, tmp_path, ANY_REWARD + MAIN).returncode == 0 and len(metrics_of(finished)) == 5
    )


def test_only_the_last_checkpoints_are_kept(alone, tokenizer, tmp_path):
    policy = grpo.Policy(tiny_model())
    optimizer = torch.optim.AdamW(policy.parameters())
    for step in (1, 2, 3):
        distributed.save_checkpoint(
            tmp_path, step, policy, optimizer, tokenizer, keep=2, files={"a.txt": "a"}
        )
    assert [folder.name for folder in distributed.checkpoints(tmp_path)] == [
        "step-000002",
        "step-000003",
    ]
    assert distributed.checkpoint_path(tmp_path) == str(tmp_path / "step-000003")
    assert (tmp_path / "step-000003" / "a.txt").read_text() == "a"


def test_weights_and_optimizer_come_back_as_they_were(alone, tokenizer, tmp_path):
    policy = grpo.Policy(tiny_model())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    policy([[1, 2]], [[3]])[0].sum().backward()
    optimizer.step()
    distributed.save_checkpoint(tmp_path, 7, policy, optimizer, tokenizer)
    other = grpo.Policy(tiny_model(seed=1))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    assert distributed.load_trainer(tmp_path, other, other_optimizer) == 7
    for p, q in zip(policy.parameters(), other.parameters()):
        assert p.equal(q)
        ours, theirs = optimizer.state[p], other_optimizer.state[q]
        assert ours["exp_avg"].equal(theirs["exp_avg"])


# ------------------------------------------------------------------------------------------- errors


def test_a_full_gpu_is_one_line_that_names_the_knobs(capsys):
    with pytest.raises(SystemExit) as stopped, distributed.one_line_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: the GPU's memory is full: lower")
    assert "--tokens_per_forward" in line and "--kv_tokens" in line and "2 GiB" in line


def test_ranks_wait_for_each_other_as_long_as_an_evaluation_takes(monkeypatch):
    seen = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **how: seen.update(how))
    distributed.start_ranks()
    assert seen["timeout"].days >= 1 and seen["world_size"] == 1


UNEVEN = """
import datetime, sys, time
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import distributed

# three hours pass in a second
def shortened(**length):
    return datetime.timedelta(**length) / (3 * 60 * 60)

distributed.datetime = SimpleNamespace(timedelta=shortened)
distributed.start_ranks()
time.sleep(4 * distributed.rank())
print(distributed.all_gather("done"))
distributed.leave()
"""


def test_a_rank_without_work_waits_for_one_that_has_work_for_half_a_day(tmp_path):
    done = run([], tmp_path, UNEVEN, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == "['done', 'done']\n" * 2


def test_a_model_that_is_not_trained_has_no_master_copy(alone, monkeypatch):
    monkeypatch.setattr(distributed, "compute_dtype", lambda device: torch.bfloat16)
    policy = distributed.shard(grpo.Policy(tiny_model()), alone, master=False)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in policy.buffers()} == {torch.float32}  # RoPE's
    assert not distributed._fsdp_units(policy)
    [logps] = policy([[1, 2, 3]], [[4, 5]])
    [exact] = grpo.Policy(tiny_model())([[1, 2, 3]], [[4, 5]])
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, exact, rtol=0.1, atol=0.1)


LONE_FAILURE = """
import sys
sys.path.insert(0, {root!r})
import distributed

@distributed.one_line_errors()
def main():
    distributed.start_ranks()
    if sys.argv[1] == "all" or distributed.rank() == 1:
        raise OSError("no such thing")
    distributed.dist.barrier()

main()
"""


@pytest.mark.parametrize("who", ["all", "rank 1"])
def test_an_error_of_one_rank_or_of_all_is_one_line_and_ends_the_run(who, tmp_path):
    done = run([who], tmp_path, LONE_FAILURE, ranks=2)
    assert done.returncode == 1 and errors_of(done) == ["error: no such thing"], done.stderr[-6000:]


ENDING = """
import atexit, os, sys
sys.path.insert(0, {root!r})
import distributed

@distributed.one_line_errors()
def main():
    distributed.start_ranks()
    ranks = distributed.all_gather(distributed.rank())
    if distributed.rank() == 0:
        print(ranks)

atexit.register(os.abort)  # gloo's threads do that now and then, while Python takes a process apart
main()
"""


def test_ranks_whose_work_is_done_end_well_whatever_python_would_do_at_its_exit(tmp_path):
    done = run([], tmp_path, ENDING, ranks=2)
    assert done.returncode == 0 and done.stdout == "[0, 1]\n", done.stderr[-6000:]


# ------------------------------------------------------------------------------------------- memory


def test_the_kv_budget_is_what_gathered_weights_gradients_and_optimizer_leave(alone, monkeypatch):
    """Two layers of two key heads of 8 in bf16: 128 bytes a token; 3/4 of what is free is used."""
    lm, device = tiny_model(), torch.device("cuda")
    parameters = sum(parameter.numel() for parameter in lm.parameters())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * parameters + 128_000, 0))
    assert distributed.kv_budget(lm, device) == 750
    # weights that are not sharded, and not trained, are there already
    assert distributed.kv_budget(lm, device, trained=False) == int(
        0.75 * (14 * parameters + 128_000) / 128
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * parameters - 1, 0))
    with pytest.raises(MemoryError, match="leaves no memory for a rollout"):
        distributed.kv_budget(lm, device)
    assert distributed.kv_budget(lm, torch.device("cpu")) == 131072


def test_the_kv_budget_of_an_older_model_counts_all_its_heads(alone, monkeypatch):
    lm = model_of("gpt2")
    del lm.config.num_key_value_heads  # its config knows but heads: four of 8
    parameters = sum(parameter.numel() for parameter in lm.parameters())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * parameters + 256_000, 0))
    assert distributed.kv_budget(lm, torch.device("cuda")) == 750
