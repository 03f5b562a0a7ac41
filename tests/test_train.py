"""train.py: config, tasks, rewards, the update against slow plain code, the script, bad input."""

import argparse
import ast
import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pocket
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import data
import distributed
import grpo
import rewards
import train
from rollout import Prompts, Response, Turn

ROOT = Path(__file__).parent.parent
ALONE = ("data", "rollout", "rewards", "grpo", "distributed")  # import none of their siblings
TOP = ("train", "eval")

SIZES = [
    "--documents_per_step", "4", "--documents_per_update", "4", "--group", "4", "--recalls", "4",
]  # fmt: skip
SIZES += ["--memory_tokens", "8", "--eval_documents", "4", "--eval_every", "0"]


def metrics_of(run):
    """The lines of a run's metrics.jsonl, less what differs from run to run."""
    lines = train.read_metrics(run)
    for line in lines:
        for name in ("rollout_s", "update_s", "tokens_per_s", "memory_gb"):
            line.pop(name, None)
    return lines


# ---------------------------------------------------------------------------------------- structure


def imports_of(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("name", ALONE)
def test_a_file_imports_none_of_its_siblings(name):
    assert not imports_of(name) & {*ALONE, *TOP}


def test_train_stands_on_the_five_and_nothing_knows_the_pocket_world_or_the_evaluation():
    assert imports_of("train") & {*ALONE, *TOP} == set(ALONE)
    for name in (*ALONE, "train", "eval"):
        assert not imports_of(name) & {"eval", "pocket", "warm_start"}


# ------------------------------------------------------------------------------------------- config


def test_every_field_is_a_flag_with_help_and_its_default_has_its_type():
    parser = argparse.ArgumentParser()
    train.add_flags(parser)
    for field in dataclasses.fields(train.Config):
        assert field.metadata["help"] and f"--{field.name} " in parser.format_help() + " "
        assert type(getattr(train.Config(), field.name)) in (field.type, list)


def test_explicit_flags_win_over_the_models_settings_and_those_over_the_tasks(tmp_path):
    settings = {"all": {"group": 5, "lr": 0.1}, "longqa": {"lr": 0.2, "data": ["x"]}}
    (tmp_path / "memtrain.json").write_text(json.dumps({"settings": settings}))

    def parse(*flags):
        given = ["--model", str(tmp_path), "--out", str(tmp_path / "out")]
        return train.open_run(train.parse([*given, *flags]))

    cfg = parse("--task", "longqa")
    assert (cfg.group, cfg.lr, cfg.data, cfg.documents_per_update) == (5, 0.2, ["x"], 8)
    cfg = parse("--task", "longqa", "--lr", "0.3", "--documents_per_update", "4", "--resume")
    assert (cfg.group, cfg.lr, cfg.documents_per_update, cfg.resume) == (5, 0.3, 4, True)
    cfg = parse("--data", "y")
    assert (cfg.lr, cfg.data, cfg.aggregate) == (0.1, ["y"], "sequence")


@pytest.mark.parametrize("flags, update", [
    ("", 32),
    ("--documents_per_step 6", 6),  # follows, unless it is given
    ("--documents_per_step 6 --documents_per_update 3", 3),
    ("--task longqa", 8),
    ("--task longqa --documents_per_step 4", 4),
    ("--task longqa --documents_per_step 16", 8),
])  # fmt: skip
def test_an_update_has_all_documents_of_a_step_unless_it_is_given_fewer(flags, update, tmp_path):
    given = train.parse(f"--model {tmp_path} --data x {flags}".split())
    assert train.configure(given).documents_per_update == update


def test_a_run_says_which_settings_are_not_the_defaults_and_where_they_come_from(tmp_path, capsys):
    (tmp_path / "memtrain.json").write_text('{"settings": {"all": {"group": 5, "kl": 0.001}}}')
    given = train.parse(f"--model {tmp_path} --task longqa --data x --lr 0.1".split())
    train.print_settings(train.configure(given), given)
    line = capsys.readouterr().out
    assert "group 5 (memtrain.json)" in line and "lr 0.1 (flag)" in line
    assert "steps 500 (paper's longqa)" in line and "kl" not in line and line.count("\n") == 1


def test_a_setting_that_is_no_flag_is_named(tmp_path):
    (tmp_path / "memtrain.json").write_text('{"settings": {"all": {"chunk_token": 5}}}')
    with pytest.raises(data.InputError, match="chunk_token: no such flag"):
        train.configure({"model": str(tmp_path), "data": ["x"]})


@pytest.mark.parametrize("setting, wanted", [
    ('"objective": "ful"', "full or decoupled or e2e"),
    ('"chunk_tokens": "5000"', "a int"),
    ('"resume": "yes"', "a bool"),
    ('"data": "docs"', "a list"),
])  # fmt: skip
def test_a_setting_of_the_wrong_kind_is_refused_by_name(setting, wanted, tmp_path):
    (tmp_path / "memtrain.json").write_text(f'{{"settings": {{"all": {{"lr": 1, {setting}}}}}}}')
    with pytest.raises(data.InputError, match=f"sets {setting[1:4]}.*{wanted} is wanted"):
        train.configure({"model": str(tmp_path), "data": ["x"]})


# ----------------------------------------------------------------------------------- data of a step


def test_every_epoch_sees_every_document_once_whatever_the_step_size(alone):
    cfg, rows = train.Config(documents_per_step=4, seed=3), list("abcdefgh")
    steps = [list(train.rows_of_step(cfg, rows, step).values()) for step in range(4)]
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert sorted(first) == sorted(second) == rows and first != second


@pytest.mark.parametrize("flags, words", [
    ("--documents_per_step -2", "--documents_per_step -2: at least 1 is wanted"),
    ("--chunk_tokens 0", "--chunk_tokens 0: at least 1"),
    ("--lr nan", "--lr nan: at least 0"),
    ("--group 1", "--group 1: at least 2"),
    ("--temperature inf", "--temperature inf: training samples"),
])  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(flags, words, tmp_path):
    with pytest.raises(data.InputError, match=words):
        train.configure(train.parse(f"--model {tmp_path} --data x {flags}".split()))


@pytest.mark.parametrize("content, name", [
    ("[1]", "it"),
    ('{"settings": []}', "settings"),
    ('{"settings": {"all": []}}', "settings"),
    ('{"problem": 5}', "problem"),
    ('{"templates": {"answer": 5}}', "templates"),
    ('{"prompts": {}}', "prompts"),
])  # fmt: skip
def test_a_memtrain_json_of_other_content_is_refused_by_name(content, name, tmp_path):
    (tmp_path / "memtrain.json").write_text(content)
    with pytest.raises(data.InputError, match=f"memtrain.json: {name} is not understood"):
        train.model_settings(tmp_path)


def test_groups_of_a_task_of_ones_own_are_checked():
    whole = train.Group("trajectory", 0, ["a", "b"], [1.0, 0.0], [1.0, 0.0])
    assert train.checked([whole], {0: "row"}) == [whole]
    for groups in ([], [whole, whole], [whole._replace(kind="recall")]):
        with pytest.raises(ValueError, match="one trajectory group a document is wanted"):
            train.checked(groups, {0: "row"})
    with pytest.raises(ValueError, match="document 0: a reward and a score an agent are wanted"):
        train.checked([whole._replace(rewards=[1.0])], {0: "row"})


@pytest.mark.parametrize("named, own", [(None, []), (301, [301]), ([301, 302], [301, 302])])
def test_a_response_ends_as_the_models_settings_say_and_ends_are_no_text(
    named, own, tokenizer, tmp_path
):
    policy, cfg = grpo.Policy(tiny_model()), train.Config(model=str(tmp_path))
    policy.lm.generation_config.eos_token_id = named
    setup = train.open_setup(cfg, policy, tokenizer, kv_tokens=99, temperature=1.0)
    assert setup.sampler.end_ids == sorted([tokenizer.eos_token_id, *own])
    assert setup.prompts.plain([300, *own, tokenizer.eos_token_id]) == [300]


def test_a_rank_that_does_not_see_what_rank_0_wrote_says_so(alone, tmp_path):
    (tmp_path / "there").touch()
    train.check_shared(tmp_path / "there")
    with pytest.raises(data.InputError, match="rank 0 does not see .* a folder that they share"):
        train.check_shared(tmp_path / "nowhere")


def test_documents_are_no_questions(pocket_model):
    [documents] = train.model_settings(pocket_model)["settings"]["memtrain"]["data"]
    with pytest.raises(data.InputError, match="masked documents, but --task longqa answers"):
        train.load_rows(train.Config(), "longqa", documents)


def test_a_folder_in_which_a_run_failed_before_its_first_line_is_free(tmp_path, pocket_model):
    given = {"model": pocket_model, "out": str(tmp_path)}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    assert train.open_run(dict(given)).out == str(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(data.InputError, match="holds a run already"):
        train.open_run(dict(given))
    (tmp_path / "config.json").write_text('{"config": {"recipe": "paper"}}')
    with pytest.raises(data.InputError, match="begun by another version"):
        train.open_run({**given, "resume": True})
    with pytest.raises(data.InputError, match="config.json is a file"):
        train.open_run({**given, "out": str(tmp_path / "config.json")})


def test_what_max_chunks_leaves_out_is_a_share_of_the_text():
    spans = [(0, 10), (10, 20), (80, 90), (90, 100)]
    chunks = [data.Chunk([], start, end) for start, end in spans]
    assert train.unread("x" * 100, chunks) == 0.6 and train.unread("x" * 20, chunks[:2]) == 0.0
    assert train.unread("x" * 100, chunks[:1]) == 0.9  # --max_chunks 1 keeps the head alone
    assert train.unread("", [data.Chunk([], 0, 0)]) == 0.0


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(0.25), torch.tensor(0.75)])
def test_a_reward_may_be_any_number(value):
    assert train.number(value, "mine") == float(value)


@pytest.mark.parametrize("value", [None, float("nan"), "high", torch.zeros(2)])
def test_a_reward_that_is_no_number_is_named_with_the_function_that_gave_it(value, monkeypatch):
    monkeypatch.setattr(rewards, "answer_reward", lambda answer, golds: value)
    with pytest.raises(data.InputError, match="^rewards.answer_reward gave a reward that is no"):
        train.rewarded("Rome", ["Rome"])
    group = train.Group("trajectory", 0, [], [1.0], [value])
    with pytest.raises(data.InputError, match="^task memtrain gave a reward that is no number"):
        train.training_sequences(train.Config(), [group])


def test_a_longer_document_keeps_its_head_and_tail(tokenizer):
    setup = train.Setup(train.Config(chunk_tokens=4, max_chunks=3), Prompts(tokenizer), None)
    text = "The river runs through the old town and into the sea beyond the hills."
    chunks = data.chunks(text, tokenizer, 4)
    assert len(chunks) > 4 and train.chunks_of(setup, text) == [chunks[0], chunks[1], chunks[-1]]


# -------------------------------------------------------------------------------- tasks and rewards


def pocket_setup(sampler, **changes):
    """A pocket-world setup around a scripted sampler: (prompts, limits, keys) -> lists of ids."""
    cfg = train.Config(
        chunk_tokens=6, memory_tokens=13, answer_tokens=6, group=4, recalls=2, **changes
    )
    prompts = Prompts(pocket.tokenizer(), pocket.TEMPLATES, pocket.PROBLEM)

    def respond(asked, limits, keys):
        texts = [sampler(*key) for key in keys]
        ids = prompts.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [Response([*one, prompts.tokenizer.eos_token_id]) for one in ids]

    return train.Setup(cfg, prompts, respond)


@pytest.mark.parametrize("objective", ["full", "decoupled", "e2e"])
def test_rewards_stay_with_their_rows_and_follow_the_objective(objective):
    rows = dict(zip((0, 2, 4), pocket.documents(3, seed=5)))  # as on the first of two ranks
    answers = {
        n: [row["answer"] if (n + j) % 3 == 0 else "wool" for j in range(4)]
        for n, row in rows.items()
    }
    setup = pocket_setup(
        lambda step, n, j, *more: f"\\boxed{{ {answers[n][j]} }}", objective=objective
    )
    groups = train.memtrain(setup, rows, step="x")
    recalls = {(g.document, g.agents[0].key[2]): g for g in groups if g.kind == "recall"}
    assert len(recalls) == (0 if objective == "e2e" else 12)
    for group in groups:
        for j, right in enumerate(group.exact_match if group.kind == "trajectory" else []):
            assert right == float(answers[group.document][j] == rows[group.document]["answer"])
            bonus = (
                0.5 * sum(recalls[group.document, j].rewards) / 2 if objective == "full" else 0.0
            )
            assert group.rewards[j] == right + bonus


def test_a_recall_reads_the_memory_that_was_written_at_its_step(monkeypatch):
    drawn, draw = [], data.draw_recall

    def recorded(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(data, "draw_recall", recorded)
    # memory t names city t
    setup = pocket_setup(lambda *key: pocket.CITIES[key[-1] + 1], recall_draw="trajectory")
    prompts = setup.prompts
    groups = train.memtrain(setup, dict(enumerate(pocket.documents(4, seed=5))), step="x")
    asked = [group.agents[0].ids for group in groups if group.kind == "recall"]
    expected = [
        prompts.recall(memory=prompts.encode(pocket.CITIES[r.k]), section=r.ids) for r in drawn
    ]
    assert sorted(asked) == sorted(expected) and len({recall.k for recall in drawn}) > 1


@pytest.mark.parametrize("how, most", [("document", 1), ("trajectory", 4)])
def test_recalls_are_drawn_for_a_document_or_for_each_of_its_trajectories(how, most):
    setup = pocket_setup(lambda *key: "Ada", recall_draw=how)
    groups = train.memtrain(setup, dict(enumerate(pocket.documents(4, seed=5))), step="x")
    draws = {document: set() for document in range(4)}
    for group in groups:
        if group.kind == "recall":
            draws[group.document].add((group.drawn.k, group.drawn.l, group.drawn.target))
    assert max(map(len, draws.values())) == most


def test_a_document_may_bring_its_own_question():
    row = pocket.documents(1, seed=5)[0]
    seen = []
    for question in (None, "Ada sells what ?"):
        setup = pocket_setup(lambda *key: "wool")
        groups = train.memtrain(setup, {0: {**row, "question": question}}, step="x")
        seen.append(setup.prompts.text(groups[-1].agents[0].turns[-1].prompt_ids))
    assert pocket.PROBLEM in seen[0]
    assert "Ada sells what ?" in seen[1] and pocket.PROBLEM not in seen[1]


def test_another_reward_changes_what_is_learnt_and_nothing_that_is_reported(monkeypatch):
    monkeypatch.setattr(rewards, "answer_reward", lambda answer, golds: 0.25)
    rows = {0: pocket.documents(1, seed=5)[0]}
    groups = train.memtrain(
        pocket_setup(lambda *key: f"\\boxed{{ {rows[0]['answer']} }}"), rows, step="x"
    )
    whole = groups[-1]
    assert whole.exact_match == [1.0] * 4 and whole.rewards == [0.25 + 0.5 * 0.25] * 4
    question = {"question": "Ada sells what ?", "answers": ["tea"], "context": "Ada sells tea"}
    [group] = train.longqa(pocket_setup(lambda *key: "\\boxed{ tea }"), {0: question}, step="x")
    assert group.exact_match == [1.0] * 4 and group.rewards == [0.25] * 4


@pytest.mark.parametrize(
    "answer, reward", [("tea ; rye", 1.0), ("tea", 0.5), ("rye ; tea", 0.0), ("; rye", 0.5)]
)
def test_a_search_earns_the_share_of_right_answers_by_position(answer, reward):
    setup = pocket_setup(lambda *key: f"<answer> {answer} </answer>", task="searchqa")
    row = {"question": "Ada sells what ? ; Ben grows what ?", "answers": [["tea"], ["rye"]]}
    [group] = train.searchqa(setup, {0: row}, step="x")
    assert group.exact_match == group.rewards == [reward] * 4


def test_advantages_are_made_on_trajectories_and_flat_groups_are_left_out():
    class Agent:
        def __init__(self, turns):
            self.turns = [Turn([1], [2] * n, False, [-1.0] * n) for n in turns]

    # one trajectory of five turns, one of one: expanding first would pull the mean to the longer
    uneven = train.Group("trajectory", 7, [Agent([1] * 5), Agent([3])], [1.0, 0.0], [1.0, 0.0])
    flat = train.Group("recall", 7, [Agent([1]), Agent([1])], [1.0, 1.0], [1.0, 1.0])
    sequences = train.training_sequences(train.Config(), [uneven, flat])
    assert (
        [s.advantage for s in sequences] == [0.5] * 5 + [-0.5]
        and {s.document for s in sequences} == {7}
    )  # fmt: skip
    assert len(train.training_sequences(train.Config(filter=False), [uneven, flat])) == 8


# ---------------------------------------------------------------------------------------- gradients


def some_sequences(count=12, seed=0, old=False, ref=False):
    """Turns of four documents; two of three begin alike."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(1)

    def ids(n):
        return [rng.randrange(64) for _ in range(n)]

    def logps(n):
        return -3 + torch.rand(n, generator=generator)

    shared, sequences = ids(20), []
    for i in range(count):
        prompt = (shared if i % 3 else []) + ids(rng.randint(1, 9))
        response = ids(rng.randint(1, 7))
        turn = Turn(prompt, response, False, logps(len(response)).tolist())
        sequence = train.Sequence(turn, rng.uniform(-1, 1), i % 4)
        sequence.old_logps = logps(len(response)) if old else None
        sequence.ref_logps = logps(len(response)) if ref else None
        sequences.append(sequence)
    return sequences


class Recorder:
    """Stands in the optimizer's place and keeps the gradient, whole."""

    def __init__(self, policy):
        self.parameters, self.gradient = list(policy.parameters()), None

    def step(self):
        grads = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for p in self.parameters
        ]
        self.gradient = torch.cat([grad.flatten() for grad in grads])

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


def gradient(cfg, sequences):
    """The gradient of one update on one rank."""
    policy = grpo.Policy(tiny_model())
    recorder = Recorder(policy)
    norm = train.update(cfg, policy, recorder, sequences, Counter())
    assert recorder.gradient is None or recorder.gradient.norm() == pytest.approx(norm, rel=1e-4)
    return recorder.gradient


def plain_loss(cfg, model, sequences):
    """The loss of an update, turn by turn, straight from the equations."""
    turns = Counter(s.document for s in sequences)
    tokens = sum(len(s.turn.response_ids) for s in sequences)
    total = 0
    for s in sequences:
        prompt, response, *_ = s.turn
        ids = torch.tensor([prompt + response])
        logits = model(ids).logits[0, len(prompt) - 1 : -1] / cfg.temperature
        logps = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        ratio, d = (logps - s.old_logps).exp(), s.ref_logps - logps
        surrogate = torch.min(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage)
        weight = {
            "sequence": 1 / (len(turns) * turns[s.document] * len(response)),
            "token": 1 / tokens,
        }[cfg.aggregate]
        total = total + weight * (-surrogate + cfg.kl * (d.exp() - d - 1)).sum()
    return total


@pytest.fixture
def unclipped(monkeypatch):
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e9)


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_the_gradient_is_that_of_a_slow_plain_loss_in_float64(alone, unclipped, aggregate):
    cfg = train.Config(aggregate=aggregate, kl=0.1, temperature=0.7)
    sequences = some_sequences(old=True, ref=True)
    ours, model = gradient(cfg, sequences), tiny_model().double()
    plain_loss(cfg, model, sequences).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (ours - plain).norm() / plain.norm() < 1e-5


def test_the_gradient_does_not_depend_on_the_size_of_a_pack(alone, unclipped):
    wide = gradient(train.Config(), some_sequences())
    narrow = gradient(train.Config(tokens_per_forward=24), some_sequences())
    assert (wide - narrow).norm() / wide.norm() < 1e-6


def test_a_non_finite_gradient_changes_no_weight(alone):
    sequence = train.Sequence(Turn([1, 2], [3], False, [0.0]), math.inf, 0)
    assert gradient(train.Config(), [sequence]) is None


@pytest.mark.parametrize("old_logps", ["trainer", "sampler"])
def test_the_ratio_compares_with_the_policy_that_sampled(alone, old_logps):
    policy, sequences = grpo.Policy(tiny_model()), some_sequences()
    cfg = train.Config(documents_per_step=4, documents_per_update=2, old_logps=old_logps)
    train.add_old_logps(cfg, policy, sequences)
    plain = policy([s.turn.prompt_ids for s in sequences], [s.turn.response_ids for s in sequences])
    for sequence, values in zip(sequences, plain):
        expected = values.detach() if old_logps == "trainer" else torch.tensor(sequence.turn.logps)
        torch.testing.assert_close(sequence.old_logps, expected)


def test_with_one_update_a_rollout_the_ratio_is_one_and_needs_no_pass_of_its_own(alone):
    sequences, totals = some_sequences(), Counter()
    policy = grpo.Policy(tiny_model())
    train.add_old_logps(train.Config(), policy, sequences)
    assert all(sequence.old_logps is None for sequence in sequences)
    train.update(train.Config(), policy, Recorder(policy), sequences, totals)
    assert totals["ratio"] == totals["tokens"] == sum(len(s.turn.response_ids) for s in sequences)


@pytest.mark.parametrize("old_logps", ["trainer", "sampler"])
def test_the_mismatch_is_the_mean_distance_of_training_and_sampling(alone, old_logps):
    sequences, totals = some_sequences(), Counter()
    policy = grpo.Policy(tiny_model())
    plain = policy([s.turn.prompt_ids for s in sequences], [s.turn.response_ids for s in sequences])
    gaps = [values.detach() - torch.tensor(s.turn.logps) for s, values in zip(sequences, plain)]
    gaps = torch.cat(gaps).double()
    # several packs: the largest is of all
    cfg = train.Config(old_logps=old_logps, tokens_per_forward=40)
    train.add_old_logps(cfg, policy, sequences)
    train.update(cfg, policy, Recorder(policy), sequences, totals)
    found = train.step_metrics([], totals)
    assert found["mismatch"] == pytest.approx(float(gaps.abs().mean()), rel=1e-4)
    assert found["mismatch_max"] == pytest.approx(float(gaps.abs().max()), rel=1e-4)
    # KL(sampler || trainer), of tokens that the sampler drew: the mean of r - 1 - log r, r = p / q
    assert found["mismatch_kl"] == pytest.approx(float((gaps.exp() - 1 - gaps).mean()), rel=1e-4)


def test_the_divergence_of_rounding_alone_is_not_lost_in_rounding(alone):
    sequences, totals, policy = some_sequences(), Counter(), grpo.Policy(tiny_model())
    plain = policy([s.turn.prompt_ids for s in sequences], [s.turn.response_ids for s in sequences])
    for s, values in zip(sequences, plain):
        s.turn = s.turn._replace(logps=(values.detach() + 1e-5).tolist())
    train.update(train.Config(), policy, Recorder(policy), sequences, totals)
    assert train.step_metrics([], totals)["mismatch_kl"] == pytest.approx(5e-11, rel=0.1)


@given(ranks=st.lists(st.lists(st.integers(1, 30), max_size=12), min_size=1, max_size=5))
def test_sequences_are_balanced_so_that_no_rank_has_much_more_than_another_and_none_is_lost(ranks):
    """ranks: of each, the lengths of its sequences' responses."""
    sequences = []
    for number, lengths in enumerate(ranks):
        turns = [
            Turn([100 * number + place], [1] * n, False, []) for place, n in enumerate(lengths)
        ]
        sequences.append([train.Sequence(turn, 0.0, 0) for turn in turns])

    # a thread stands for each rank; collectives wait for all of them
    barrier, said, local = threading.Barrier(len(ranks)), [None] * len(ranks), threading.local()

    def gather(value):
        said[local.rank] = value
        barrier.wait()
        values = list(said)
        barrier.wait()
        return values

    def balance(rank):
        local.rank = rank
        return train.balance(sequences[rank])

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(ranks)) as threads:
        patch.setattr(train, "all_gather", gather)
        patch.setattr(distributed, "rank", lambda: local.rank)
        patch.setattr(distributed, "world_size", lambda: len(ranks))
        dealt = list(threads.map(balance, range(len(ranks))))
    before = sorted(id(s) for own in sequences for s in own)
    assert sorted(id(s) for own in dealt for s in own) == before
    loads = [sum(len(s.turn.response_ids) for s in own) for own in dealt]
    largest = max((n for lengths in ranks for n in lengths), default=0)
    assert max(loads) - min(loads) <= largest


# --------------------------------------------------------------------------------------- the script


def start(arguments, folder, monkeypatch):
    """train.py in this process, in a folder."""
    monkeypatch.chdir(folder)
    train.main([str(argument) for argument in arguments])


def test_a_run_leaves_its_files_and_a_checkpoint_for_transformers(
    pocket_model, tmp_path, monkeypatch, signals, capsys
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start(["--model", pocket_model, "--steps", "2", *SIZES, "--out", "run"], tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert "step 0002/0002 | R_E" in shown and "before (step    0): E2E EM" in shown
    lines, run = metrics_of("run"), Path("run")
    assert (
        [line["step"] for line in lines] == [0, 1, 2]
        and "heldout" in lines[0]
        and "heldout" in lines[2]
    )
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["turns"]) == pocket.CHUNKS + 1 and len(sample["rewards"]) == 4
    config = json.loads((run / "config.json").read_text())["config"]
    # kv_tokens 0: measured anew wherever the run goes on
    assert config["kv_tokens"] == 0 and config["steps"] == 2
    # the pocket's settings: 3e-4 after three steps of warm-up
    assert [line["lr"] for line in lines[1:]] == pytest.approx([1e-4, 2e-4])

    # the checkpoint is a model like any other, and brings prompts and settings along
    saved = run / "step-000002"
    assert json.loads((saved / "config.json").read_text())["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    chat = [{"role": "user", "content": "Ada sells tea"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    cfg = train.configure({"model": "run"})
    assert cfg.data == train.configure({"model": pocket_model}).data and cfg.memory_tokens == 8
    assert train.configure({"model": "run", "task": "searchqa"}).answer_tokens == 24


def test_the_sampler_and_the_training_forward_agree_on_every_token(
    pocket_model, tmp_path, monkeypatch, signals
):
    flags = [
        "--model", pocket_model, "--steps", "1", *SIZES, "--no-filter", "--eval_documents", "0",
    ]  # fmt: skip
    start([*flags, "--out", "run"], tmp_path, monkeypatch)
    [line] = metrics_of("run")
    assert 0 < line["mismatch"] < 1e-5 and line["ratio"] == pytest.approx(1)


@pytest.mark.parametrize("task", ["longqa", "searchqa"])
def test_post_training_takes_its_own_updates_from_every_rollout(
    task, pocket_model, tmp_path, monkeypatch, signals
):
    seen, plain = [], train.update

    def recorded(cfg, policy, optimizer, sequences, totals):
        seen.append({sequence.document for sequence in sequences})
        return plain(cfg, policy, optimizer, sequences, totals)

    monkeypatch.setattr(train, "update", recorded)
    flags = [
        "--task", task, "--model", pocket_model, "--steps", "1", *SIZES,
        "--documents_per_update", "2",
    ]  # fmt: skip
    start([*flags, "--no-filter", "--out", "run"], tmp_path, monkeypatch)
    assert seen == [{0, 1}, {2, 3}]
    first, last = metrics_of("run")
    assert first["heldout"]["questions"][3] == 4 and last["turns"] >= 1 and "imr" not in last


def first_rows(pocket_model, task, count, folder):
    """A file with the first held-out questions that a model's settings name."""
    [path] = train.model_settings(pocket_model)["settings"][task]["heldout"]
    lines = Path(path).read_text().splitlines(keepends=True)[:count]
    file = folder / f"{task}.jsonl"
    file.write_text("".join(lines))
    return str(file)


@pytest.mark.parametrize("task", ["memtrain", "longqa", "searchqa"])
def test_questions_and_documents_are_looked_at_while_any_task_trains(
    task, pocket_model, tmp_path, monkeypatch, signals, capsys
):
    [documents] = train.model_settings(pocket_model)["settings"]["memtrain"]["data"]
    questions = first_rows(
        pocket_model, "searchqa" if task == "searchqa" else "longqa", 6, tmp_path
    )
    flags = [
        "--task", task, "--model", pocket_model, "--steps", "2", *SIZES, "--eval_documents", "3",
    ]  # fmt: skip
    heldout = [questions] if task == "memtrain" else [questions, documents]
    start(
        [*flags, "--eval_every", "1", "--out", "run", "--heldout", *heldout], tmp_path, monkeypatch
    )

    looks = [line["heldout"] for line in metrics_of("run")]
    assert [list(look) for look in looks] == [["trajectory", "recall", "questions"]] * 3
    assert [score[3] for look in looks for score in look.values()] == [3] * 9
    shown = capsys.readouterr().out
    for line in ("step 0001/0002 | held-out", "before (step    0):", "after  (step    2):"):
        [line] = [each for each in shown.splitlines() if each.startswith(line)]
        assert all(word in line for word in ("E2E EM 0.", "| recall EM 0.", "| QA EM 0."))


def test_a_folder_is_evaluated_once_and_one_that_holds_nothing_out_is_refused(
    pocket_model, tmp_path
):
    [documents] = train.model_settings(pocket_model)["settings"]["memtrain"]["data"]
    once = train.load_heldout(train.Config(data=[documents]))
    assert train.load_heldout(train.Config(data=[documents], heldout=[documents])) == once
    assert list(once) == ["memtrain"] and len(once["memtrain"]) == 256
    row = dict(once["memtrain"][0])
    data.save_documents(tmp_path / "docs", {"train": iter([row]), "heldout": iter([])})
    assert train.load_heldout(train.Config(data=[str(tmp_path / "docs")])) == {}
    with pytest.raises(data.InputError, match="docs: none held out"):
        train.load_heldout(train.Config(data=[documents], heldout=[str(tmp_path / "docs")]))


def test_searchqa_trains_on_joined_questions_and_evaluates_others(
    tokenizer, tmp_path, monkeypatch, signals
):
    monkeypatch.chdir(tmp_path)
    sizes = dict(max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id)
    tiny_model(vocab_size=len(tokenizer), **sizes).save_pretrained("model")
    tokenizer.save_pretrained("model")
    joined = {"question": "Who?; Where?", "answers": [["Ann", "Anna"], ["Rome"]]}
    single = {"question": "Who?", "answers": ["a"]}
    Path("train.jsonl").write_text(f"{json.dumps(joined)}\n" * 4)
    Path("dev.jsonl").write_text(f"{json.dumps(single)}\n" * 6)
    Path("passages.jsonl").write_text('{"id": "1", "title": "Rome", "text": "A city."}\n')
    flags = "--task searchqa --model model --data train.jsonl --heldout dev.jsonl --objectives 3"
    flags += " --steps 1 --documents_per_step 2 --group 2 --answer_tokens 4 --result_tokens 4"
    train.main([*flags.split(), "--retriever", "passages.jsonl", "--out", "run"])
    first, last = train.read_metrics("run")
    assert first["heldout"]["questions"][3] == 2 and last["turns"] >= 1
    sample = json.loads(Path("run/samples.jsonl").read_text().splitlines()[0])
    assert sample["golds"] == [["Ann", "Anna"], ["Rome"]]


def test_an_evaluation_gives_every_question_to_the_task_that_can_answer_it(alone, monkeypatch):
    """Documents by memtrain, questions by longqa or a training searchqa, each with its settings."""
    seen = []

    def task(name):
        def rollout(setup, rows, step):
            sizes = setup.cfg.group, setup.cfg.recalls, setup.cfg.objective
            seen.append((name, setup.cfg.task, sizes, setup.sampler, rows))
            return [train.Group("trajectory", n, [], [1.0], [1.0]) for n in rows]

        return train.TASKS[name]._replace(rollout=rollout)

    for name in train.TASKS:
        monkeypatch.setitem(train.TASKS, name, task(name))
    sources = {"memtrain": ["a"], "searchqa": ["b", "c"]}
    heldout = []
    for name, rows in sources.items():
        cfg = train.Config(task=name, objective="e2e")  # recalls are evaluated all the same
        heldout.append((train.Setup(cfg, None, f"sampler of {name}"), rows))
    result = train.evaluate(torch.nn.Module(), heldout)
    assert seen == [
        ("memtrain", "memtrain", (1, 1, "full"), "sampler of memtrain", {0: "a"}),
        ("searchqa", "searchqa", (1, 1, "full"), "sampler of searchqa", {0: "b", 1: "c"}),
    ]
    assert {kind: score[::3] for kind, score in result.items()} == {
        "trajectory": (1.0, 1),
        "questions": (1.0, 2),
    }


def test_a_held_out_question_that_outgrows_the_context_stops_the_run_before_it_begins(
    pocket_model, tmp_path, monkeypatch, capsys
):
    row = {"question": "who " * 5000, "answers": ["Ann"], "context": "x"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        start(
            ["--model", pocket_model, "--heldout", "long.jsonl", "--out", "run"],
            tmp_path, monkeypatch,
        )  # fmt: skip
    assert "the model's context holds" in capsys.readouterr().err and not Path("run").exists()


def test_documents_that_data_py_built_from_text_are_trained_on_and_looked_at(
    tokenizer, tmp_path, monkeypatch, signals
):
    names = [
        "Ada Lovelace", "Alan Turing", "Grace Hopper", "Kurt Goedel", "Emmy Noether", "Paul Erdos",
    ]  # fmt: skip
    cities = ["Paris", "London", "Vienna", "Moscow", "Geneva"]
    with (tmp_path / "corpus.jsonl").open("w") as corpus:
        for i in range(40):
            text = f"{names[i % 6]} lived in {cities[i % 5]} in {1800 + i}. "
            text += f"Later {names[(i + 1) % 6]} came to {cities[(i + 2) % 5]}."
            corpus.write(json.dumps({"id": str(i), "title": f"Life {i}", "text": text}) + "\n")
    monkeypatch.chdir(tmp_path)
    build = (
        "build --corpus corpus.jsonl --out docs --documents 6 --heldout 2 "
        "--related 2 --random 2 --ner rules"
    )
    assert not data.main(build.split())
    sizes = dict(
        vocab_size=len(tokenizer), max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id
    )
    tiny_model(**sizes).save_pretrained("model")
    tokenizer.save_pretrained("model")
    flags = ["--model", "model", "--data", "docs", "--steps", "1", *SIZES, "--chunk_tokens", "64"]
    start([*flags, "--answer_tokens", "4", "--out", "run"], tmp_path, monkeypatch)
    first, last = metrics_of("run")
    assert first["heldout"]["trajectory"][3] == 2 and "imr" in last and last["turns"] > 2


# ------------------------------------------------------------------------------------- it can learn


def learn(monkeypatch, folder, pocket_model, *flags):
    """Sixteen steps in which an answer earns 1 if its first word is a city, whatever the document:
    what an untrained model can stumble on. -> mean reward of the first step and the last three"""
    cities = {city.lower() for city in pocket.CITIES}

    def starts_with_a_city(answer, golds):
        return float(answer.lower().split(" ")[0] in cities)

    monkeypatch.setattr(rewards, "extract_boxed", lambda text: text)
    monkeypatch.setattr(rewards, "answer_reward", starts_with_a_city)
    sizes = [
        "--documents_per_step", "16", "--documents_per_update", "16", "--group", "8",
        "--objective", "e2e",
    ]  # fmt: skip
    sizes += [
        "--memory_tokens", "2", "--answer_tokens", "1", "--chunk_tokens", "24",
        "--eval_documents", "0",
    ]  # fmt: skip
    course = ["--steps", "16", "--kl", "0", "--lr", "3e-3", "--warmup_steps", "1"]
    untrained = str(shutil.copytree(pocket_model, folder / "untrained"))
    pocket.untrained_model().save_pretrained(untrained)
    start(["--model", untrained, *sizes, *course, *flags, "--out", "run"], folder, monkeypatch)
    earned = [line["R_E"] for line in metrics_of("run")]
    return earned[0], sum(earned[-3:]) / 3


def test_the_loop_learns_what_is_rewarded(monkeypatch, tmp_path, pocket_model, signals):
    before, after = learn(monkeypatch, tmp_path, pocket_model)
    assert before < 0.35 and after > 0.85


def test_nothing_is_learned_from_shuffled_rewards(monkeypatch, tmp_path, pocket_model, signals):
    before, after = learn(monkeypatch, tmp_path, pocket_model, "--shuffle_rewards")
    assert before < 0.35 and after < 0.55


# ---------------------------------------------------------------------------------------- reporting


def test_the_interval_is_wilsons_and_stays_inside():
    assert train.interval([1.0, 0.0, 1.0, 1.0]) == pytest.approx(
        (0.75, 0.3006418401, 0.9544127397, 4)
    )
    assert train.interval([0.0] * 10)[:2] == (0.0, 0.0) and train.interval([1.0] * 10)[2] == 1.0


def test_transcripts_with_any_kind_of_line_break_are_read_back(tmp_path):
    record = {"step": 1, "answer": "a\u2028b\u0085c\r\nd"}
    train.append(tmp_path / "metrics.jsonl", [record, record])
    assert train.read_metrics(tmp_path) == [record, record]


def test_every_rank_evaluates_its_own_share_of_the_held_out_rows(alone, monkeypatch):
    """Four ranks, one after the other: together they see every row once."""
    seen = []

    def task(setup, rows, step):
        seen.append(sorted(rows))
        return [train.Group("trajectory", n, [], [0.5], [0.5]) for n in rows]

    monkeypatch.setitem(train.TASKS, "memtrain", train.TASKS["memtrain"]._replace(rollout=task))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    setup = train.Setup(train.Config(), None, None)
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(train, "all_gather", lambda value: [value])
        train.evaluate(torch.nn.Module(), [(setup, list("abcdefghij"))])
    assert seen == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def no_template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_template")
    pocket.untrained_model().save_pretrained(folder)
    tokenizer = pocket.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--model {pocket} --group 1", "--group 1"),
        ("--model {pocket} --data nowhere", "nowhere"),
        ("--model nowhere --data x", "nowhere"),
        ("--model no/such/folder", "no/such/folder is not there"),
        ("", "python tests/pocket.py"),
        ("--model {pocket} --chunk_tokens 100000", "the model's context holds 4096"),
        ("--model {no_template}", "needs --data"),
        ("--model {no_template} --task longqa --data fine.jsonl", "chat template"),
        ("--model {pocket} --documents_per_update 3", "multiple"),
        ("--model {pocket} --temperature 0", "--temperature 0.0"),
        ("--task longqa --model {pocket} --data broken.jsonl", "broken.jsonl:2"),
        ("--task longqa --model {pocket} --data empty.jsonl", "empty.jsonl"),
        ("--task searchqa --model {pocket} --retriever nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_bad_input_gets_one_line_and_status_2_and_leaves_nothing(
    arguments, words, pocket_model, no_template, tmp_path, monkeypatch, capsys
):
    fine = '{"question": "Who?", "answers": ["Ann"], "context": "x"}\n'
    (tmp_path / "fine.jsonl").write_text(fine)
    (tmp_path / "broken.jsonl").write_text(fine + '{"question": \n')
    (tmp_path / "empty.jsonl").write_text("")
    arguments = arguments.format(pocket=pocket_model, no_template=no_template).split()
    with pytest.raises(SystemExit) as stopped:
        start([*arguments, "--out", "out"], tmp_path, monkeypatch)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0]
    assert not Path("out").exists()


def test_a_model_folder_that_can_not_be_understood_is_bad_input(tmp_path):
    (tmp_path / "memtrain.json").write_text('{\n"problem": ')
    with pytest.raises(data.InputError, match="memtrain.json:2: not JSON"):
        train.configure({"model": str(tmp_path), "data": ["x"]})
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(OSError, match="not a folder with a checkpoint"):
        distributed.load_model(str(tmp_path), "auto")


def test_a_mistake_in_the_code_is_no_bad_input_and_keeps_its_traceback():
    with (
        pytest.raises(ValueError, match="invalid literal"),
        distributed.one_line_errors(data.InputError),
    ):
        int("a mistake")


@pytest.mark.parametrize("flag", ["--nonsense", "--top_p", "--step"])
def test_an_unknown_flag_and_an_abbreviated_one_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([flag, "1"])
    assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_used_folder_is_refused_without_resume(tmp_path, capsys, pocket_model):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", pocket_model, "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "--resume" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


# --------------------------------------------------------------------------------------- the README


def test_the_agent_of_the_readme_trains_and_is_evaluated_by_its_own_task(pocket_model, tmp_path):
    readme = (ROOT / "README.md").read_text()
    [code] = re.findall(r"```python\n(# doubt.py.*?)```", readme, re.DOTALL)
    (tmp_path / "doubt.py").write_text(code)
    questions = Path(pocket_model).parent / "questions"
    flags = ["--task", "doubt", "--model", pocket_model, "--out", "run", "--steps", "1"]
    flags += ["--data", questions / "train.jsonl", "--heldout", questions / "heldout-1x.jsonl"]
    flags += ["--documents_per_step", "2", "--group", "4", "--eval_documents", "2", "--no-filter"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "doubt.py", *map(str, flags)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before, step = metrics_of(tmp_path / "run")
    assert step["turns"] == pocket.CHUNKS + 2 and before["heldout"]["questions"][3] == 2
    settings = json.loads((tmp_path / "run/step-000001/memtrain.json").read_text())
    assert settings["task"] == "doubt"


def test_no_line_of_the_readme_names_a_flag_that_is_not_there():
    parser = argparse.ArgumentParser()
    train.add_flags(parser)
    known = parser.format_help()
    for file in ("data.py", "eval.py", "tests/bench.py", "tests/warm_start.py", "tests/study.py"):
        known += (ROOT / file).read_text()
    others = {"--nproc_per_node", "--max-restarts", "--shutdown-timeout"}  # torchrun's
    for flag in set(re.findall(r"--[a-z][\w-]+", (ROOT / "README.md").read_text())) - others:
        assert flag in known or f"--no-{flag[2:]}" in known, flag
