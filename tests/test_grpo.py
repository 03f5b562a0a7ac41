"""Advantages, weights, loss and the shared-prefix policy, against slow plain versions that share
nothing with them."""

import doctest
import math
import statistics

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import grpo
from grpo import Policy, Unit, group_advantages, pack, policy_loss, shared_prefixes, token_weights

ARCHITECTURES = ["qwen2", "qwen3", "llama"]


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(grpo)
    assert result.attempted >= 4
    assert not result.failed


def test_the_demo_asserts_that_the_model_learns():
    with pytest.raises(AssertionError, match="has not learnt"):
        grpo.demo(steps=2)
    grpo.demo()


# ------------------------------------------------------------------------------------ advantages


def groups_of(size):
    reward = st.sampled_from([0.0, 0.25, 1.0, 1.5])
    return st.lists(st.tuples(*[reward] * size), min_size=1, max_size=4)


reward_groups = st.integers(2, 5).flatmap(groups_of)


@given(reward_groups)
def test_an_advantage_is_the_reward_less_the_mean_of_its_own_group(rewards):
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    for group, row in zip(rewards, advantages.tolist(), strict=True):
        mean = statistics.mean(group)
        assert row == pytest.approx([reward - mean for reward in group])


@given(reward_groups)
def test_scale_group_divides_by_the_unbiased_standard_deviation(rewards):
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale="group")
    for group, row in zip(rewards, advantages.tolist(), strict=True):
        mean, deviation = statistics.mean(group), statistics.stdev(group)
        expected = [(reward - mean) / (deviation + 1e-6) for reward in group]
        assert row == pytest.approx(expected)


@pytest.mark.parametrize("scale", ["none", "group"])
def test_a_group_without_spread_has_no_advantage(scale):
    for reward in (0.0, 1.0):
        assert not group_advantages(torch.full((1, 8), reward), scale).any()


@pytest.mark.parametrize("scale", ["typo", "", None, "Group"])
def test_an_unknown_scale_is_refused(scale):
    with pytest.raises(ValueError, match="none or group"):
        group_advantages(torch.tensor([[1.0, 0.0]]), scale=scale)


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("how, expected", [
    (dict(aggregate="sequence", document="aab"), [1 / 8, 1 / 4, 1 / 6]),
    (dict(aggregate="sequence"), [1 / 6, 1 / 3, 1 / 9]),
    (dict(aggregate="token"), [1 / 6] * 3),
])  # fmt: skip
def test_token_weights_worked_by_hand(how, expected):
    """Turns of 2, 1 and 3 tokens; expected: of a token of each."""
    first, second, third = token_weights([2, 1, 3], **how).split([2, 1, 3])
    for weights, weight in zip((first, second, third), expected):
        assert weights.tolist() == pytest.approx([weight] * len(weights))


turns = st.tuples(st.integers(1, 9), st.integers(0, 2))  # length, document


@given(st.lists(turns, min_size=1, max_size=8))
def test_token_weights_are_the_nested_means_of_equation_4(turns):
    """The loss of arbitrary token losses, against loops that take mean after mean."""
    lengths, documents = zip(*turns)
    mean, tokens, per_document = statistics.fmean, [], {}
    for turn, (length, document) in enumerate(turns):
        losses = [math.sin(10 * turn + token) for token in range(length)]
        tokens += losses
        per_document.setdefault(document, []).append(mean(losses))

    def weighted(*how, **kwargs):
        weights = token_weights(lengths, *how, **kwargs)
        return float((weights * torch.tensor(tokens)).sum())

    nested = mean(map(mean, per_document.values()))
    assert weighted("sequence", documents) == pytest.approx(nested, abs=1e-6)
    assert weighted("token") == pytest.approx(mean(tokens), abs=1e-6)


def test_weights_of_nothing_are_empty_and_an_unknown_aggregate_is_refused():
    for aggregate in ("sequence", "token"):
        assert token_weights([], aggregate, document=[]).shape == (0,)
    with pytest.raises(ValueError, match="mean.*sequence or token"):
        token_weights([1], "mean")


# ------------------------------------------------------------------------------------------ loss


def slow_token_loss(logp, old, ref, advantage, low, high, kl_coef):
    """Equation 3 of one token, with one `if` per case, in Python's float64."""
    ratio = math.exp(logp - old)
    if advantage >= 0:
        gain = min(ratio, 1 + high) * advantage
    else:
        gain = max(ratio, 1 - low) * advantage
    k3 = math.exp(ref - logp) - (ref - logp) - 1
    return -gain + kl_coef * k3


def random_numbers():
    """Log-probs, old and reference ones, advantages, weights of 400 tokens."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, 400, generator=generator, dtype=torch.float64)
    logps, old, ref = numbers[:3] - 3
    advantages, weights = numbers[3], numbers[4].abs()
    advantages[:20] = 0
    return logps.requires_grad_(), old, ref, advantages, weights


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_loss_and_gradient_equal_a_slow_plain_version(low, high, kl_coef):
    logps, old, ref, advantages, weights = random_numbers()
    loss, _ = policy_loss(
        logps,
        old,
        advantages,
        weights,
        clip_low=low,
        clip_high=high,
        ref_logps=ref if kl_coef else None,
        kl_coef=kl_coef,
    )
    loss.backward()

    # token by token; gradients by central differences
    total, step, how = 0.0, 1e-6, (low, high, kl_coef)
    columns = (logps, old, ref, advantages, weights, logps.grad)
    for logp, *rest, weight, gradient in zip(*[column.tolist() for column in columns]):
        total += weight * slow_token_loss(logp, *rest, *how)
        above = slow_token_loss(logp + step, *rest, *how)
        below = slow_token_loss(logp - step, *rest, *how)
        slope = weight * (above - below) / (2 * step)
        assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-7)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-12)


def test_metrics_are_means_over_the_tokens():
    logps, old, ref, advantages, weights = random_numbers()
    rest, clip = (advantages, weights), dict(clip_low=0.1, clip_high=0.4)
    _, metrics = policy_loss(logps, old, *rest, **clip, ref_logps=ref)
    counts = dict.fromkeys(["clip_high", "clip_low", "ratio", "entropy", "kl"], 0)
    columns = [column.tolist() for column in (logps, old, ref, advantages)]
    for logp, before, reference, advantage in zip(*columns):
        ratio = math.exp(logp - before)
        counts["clip_high"] += advantage > 0 and ratio > 1.4
        counts["clip_low"] += advantage < 0 and ratio < 0.9
        counts["ratio"] += ratio
        counts["entropy"] -= logp
        counts["kl"] += math.exp(reference - logp) - (reference - logp) - 1
    assert metrics.keys() == counts.keys()
    for name, count in counts.items():
        assert metrics[name] == pytest.approx(count / 400)
        assert not metrics[name].requires_grad
    assert "kl" not in policy_loss(logps, old, advantages, weights)[1]


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.5, 1.0, -1.2, 0.0),  # good and already likelier: no more push
    (0.5, 1.0, -0.5, -0.5),  # good but less likely: full push, by -ratio * advantage
    (0.5, -1.0, 0.8, 0.0),
    (1.5, -1.0, 1.5, 1.5),
    (10.0, -1.0, 10.0, 10.0),
])  # fmt: skip
def test_the_clip_worked_by_hand(ratio, advantage, loss, gradient):
    logps = torch.tensor([ratio]).log().requires_grad_()
    old, weight, advantage = torch.zeros(1), torch.ones(1), torch.tensor([advantage])
    value, _ = policy_loss(logps, old, advantage, weight)
    value.backward()
    assert float(value.detach()) == pytest.approx(loss)
    assert float(logps.grad) == pytest.approx(gradient)


def test_k3_averages_to_the_true_kl_of_policy_to_reference():
    """Enumerated over a vocabulary of six; k3 with its arguments swapped is far away."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    policy, reference = (1.5 * logits).log_softmax(-1)
    rest = torch.zeros(6), torch.zeros(6), policy.exp()  # its own probabilities are the weights

    def mean_k3(logps, ref_logps):
        loss, _ = policy_loss(logps, *rest, ref_logps=ref_logps, kl_coef=1.0)
        return float(loss)

    kl = float((policy.exp() * (policy - reference)).sum())
    assert mean_k3(policy, reference) == pytest.approx(kl, rel=1e-12)
    assert abs(mean_k3(reference, policy) - kl) > 0.2 * kl


@pytest.mark.parametrize("old", [-1.0, -3.0])
def test_the_kl_term_is_not_multiplied_by_the_ratio(old):
    rest = torch.tensor([old]), torch.zeros(1), torch.ones(1)
    ref = torch.tensor([-2.0])
    loss, metrics = policy_loss(torch.tensor([-1.0]), *rest, ref_logps=ref, kl_coef=1.0)
    assert loss == metrics["kl"] == pytest.approx(math.exp(-1))


def test_log_ratios_are_clamped_before_exp():
    logps = torch.tensor([-1e4, -0.5, 0.0, -200.0], requires_grad=True)
    old = torch.tensor([-0.5, -1e4, -200.0, 0.0])
    ref = torch.tensor([0.0, -1e4, -1e4, 0.0])
    advantages, weights = torch.tensor([1.0, -1.0, -1.0, 1.0]), torch.ones(4)
    loss, metrics = policy_loss(logps, old, advantages, weights, ref_logps=ref, kl_coef=1.0)
    loss.backward()
    for value in (loss, logps.grad, *metrics.values()):
        assert value.isfinite().all()
    assert metrics["ratio"] == pytest.approx(math.exp(20) / 2)


# --------------------------------------------------------------------------------- rows and units

tokens = st.integers(3, 5)
turn_lists = st.lists(  # document, rest of the prompt, response
    st.tuples(
        st.integers(0, 2),
        st.lists(tokens, min_size=1, max_size=3),
        st.lists(tokens, min_size=1, max_size=5),
    ),
    max_size=12,
)


def row_tokens(prompts, responses):
    """Every prefix once, then the tails without their last token."""
    tokens = sum(map(len, responses)) - len(responses)
    for prefix, turns in shared_prefixes(prompts):
        tokens += prefix + sum(len(prompts[i]) - prefix for i in turns)
    return tokens


@given(turn_lists, st.integers(1, 60))
def test_pack_puts_every_turn_into_one_row_and_keeps_to_the_limit(turns, limit):
    prompts = [[document] * 8 + rest for document, rest, _ in turns]
    responses = [response for *_, response in turns]
    rows = pack(prompts, responses, limit)
    assert sorted(sum(rows, [])) == list(range(len(turns)))
    for row in rows:
        tokens = row_tokens([prompts[i] for i in row], [responses[i] for i in row])
        assert tokens <= limit or len(row) == 1


def test_pack_wastes_no_rows_and_begins_with_the_longest():
    def sizes(prompts, limit):
        return list(map(len, pack(prompts, [[0] * 5] * 8, limit)))

    strangers = [[i] * 10 for i in range(8)]  # 8 turns of 14 tokens, nothing shared
    assert sizes(strangers, 28) == [2, 2, 2, 2]
    alike = [[1] * 10] * 8  # a prefix of 9 tokens, then 5 for each
    assert sizes(alike, 49) == [8]
    assert sizes(alike, 48) == [7, 1]
    unequal = [[1] * 3, [2] * 30, [3] * 12]
    assert pack(unequal, [[0]] * 3, 14) == [[1], [2], [0]]


def visible(units):
    """Which positions of a row each position may attend to, from the definition: its prefix, and
    its own tail up to itself."""
    seen, start = [], 0
    for prefix, tails in units:
        shared = range(start, start + prefix)
        seen += [range(start, position + 1) for position in shared]
        start += prefix
        for tail in tails:
            for position in range(start, start + tail):
                seen.append([*shared, *range(start, position + 1)])
            start += tail
    return torch.tensor([[k in row for k in range(start)] for row in seen])


sizes = st.tuples(st.integers(0, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4))


@pytest.mark.parametrize("tails", [1, 7, 1024])
@given(units=st.lists(sizes, min_size=1, max_size=4))
def test_a_position_attends_to_its_prefix_and_its_own_tail_and_to_nothing_else(tails, units):
    """With unit vectors as values, what comes out of attention is the attention itself."""
    seen = visible(units)
    L, heads = len(seen), 2
    generator = torch.Generator().manual_seed(L)
    query, key = torch.randn(2, 1, heads, L, L, generator=generator)
    value = torch.eye(L).expand(1, heads, L, L)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "TAILS", tails)
        laid = [Unit(*unit, "cpu") for unit in units]
    attention, _ = grpo.shared_prefix_attention(
        None, query, key, value, None, scaling=0.3, units=laid
    )
    scores = query @ key.transpose(-1, -2) * 0.3
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(attention.transpose(1, 2), expected)
    assert (attention.transpose(1, 2)[:, :, ~seen] == 0).all()


# ---------------------------------------------------------------------------------------- policy

def word(text):
    """Token ids that read well."""
    return [ord(letter) - ord("A") for letter in text]


P = "abcdefgh"
TURNS = [  # (prompt, response), out of order: equal, partial and nested prefixes, strangers
    (P, "C"),
    ("NOT", "EFGH"),
    (P + "ij", "BCDEFGHIJ"),
    (P, "DDD"),
    ("X", "Y"),
    (P + "i", "JC"),
    ("NOWHERE", "GB"),
    (P, "DDE"),
    ("some", "BzC"),
    ("X", "YZ"),
    ("abcXY", "H"),
]
PROMPTS, RESPONSES = [list(map(word, column)) for column in zip(*TURNS)]


def plain_logps(model, temperature=1.0):
    """Of every turn, by one unpadded forward each of an untouched model."""
    result = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        result.append(logps[range(len(response)), response])
    return result


def assert_close(got, expected):
    assert [len(x) for x in got] == [len(x) for x in expected]
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), rtol=1e-5, atol=1e-5)


def gradients(model, logps):
    """Of a loss that weighs every token differently."""
    model.zero_grad()
    flat = torch.cat(logps)
    (torch.sin(7.0 * torch.arange(len(flat))) * flat).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(got, expected, rtol=1e-5):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_positions_restart_in_every_tail_so_that_the_models_of_the_field_share(architecture):
    """Elsewise a policy would fall back to one turn at a time: as exact, slower, and silent."""
    assert Policy(tiny_model(architecture)).shares
    broken = tiny_model(architecture)

    def count_on(module, args, kwargs):
        length = kwargs["input_ids"].shape[1]
        return args, kwargs | {"position_ids": torch.arange(length)[None]}

    broken.base_model.register_forward_pre_hook(count_on, with_kwargs=True)
    assert not Policy(broken).shares


@pytest.mark.parametrize("head_chunk, tails", [(1024, 1024), (3, 5)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefixes_change_neither_log_probs_nor_gradients(
    architecture, checkpointing, head_chunk, tails, monkeypatch
):
    monkeypatch.setattr(grpo, "HEAD_CHUNK", head_chunk)
    monkeypatch.setattr(grpo, "TAILS", tails)
    policy, plain = Policy(tiny_model(architecture), shares=True), tiny_model(architecture)
    if checkpointing:
        policy.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
        policy.train()
    expected, logps = plain_logps(plain), policy(PROMPTS, RESPONSES)
    assert {x.dtype for x in logps} == {torch.float32}
    assert_close(logps, expected)
    assert_equal_gradients(gradients(policy.lm, logps), gradients(plain, expected))


@pytest.mark.parametrize("config", [
    dict(tie_word_embeddings=True),
    dict(num_key_value_heads=4),  # as many as query heads
    dict(num_key_value_heads=1),
])  # fmt: skip
def test_tied_embeddings_and_any_number_of_key_heads_work_as_well(config):
    policy, plain = Policy(tiny_model(**config), shares=True), tiny_model(**config)
    expected, logps = plain_logps(plain), policy(PROMPTS, RESPONSES)
    assert_close(logps, expected)
    assert_equal_gradients(gradients(policy.lm, logps), gradients(plain, expected))


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_temperature_divides_the_logits_in_the_log_probs(temperature, shares):
    policy = Policy(tiny_model(), shares=shares)
    assert_close(policy(PROMPTS, RESPONSES, temperature), plain_logps(tiny_model(), temperature))


def test_a_common_prefix_runs_once():
    policy, lengths = Policy(tiny_model()), []
    hook = policy.lm.model.embed_tokens.register_forward_hook
    hook(lambda module, args, out: lengths.append(out.shape[1]))
    policy([word(P) * 5] * 8, [word("xyz")] * 8)
    assert lengths == [39 + 8 * 3]


def test_the_end_token_is_trained_even_where_it_is_the_whole_response_and_the_pad():
    """Its log-prob is in the output, and a step along its gradient raises it."""
    end = 2
    policy = Policy(tiny_model(eos_token_id=end, pad_token_id=end))
    turns = [word("xy")] * 2, [[end], [9, end]]
    before = policy(*turns)
    assert list(map(len, before)) == [1, 2]
    (before[0][-1] + before[1][-1]).backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1e-3 * parameter.grad
    for old, new in zip(before, policy(*turns)):
        assert new[-1] > old[-1]


def test_log_probs_stay_with_their_turns_whatever_the_order_or_the_kind_of_iterable():
    policy = Policy(tiny_model(), shares=True)
    straight = policy(PROMPTS, RESPONSES)
    for order in (range(10, -1, -1), [4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3]):
        prompts, responses = [PROMPTS[i] for i in order], [RESPONSES[i] for i in order]
        logps = policy(iter(prompts), iter(responses))
        assert_close(logps, [straight[i] for i in order])
        assert responses == [RESPONSES[i] for i in order]  # nothing was written into


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_the_gradient_of_a_step_does_not_depend_on_tokens_per_forward(aggregate):
    policy, lengths = Policy(tiny_model()), [len(response) for response in RESPONSES]
    documents = [i % 3 for i in range(len(TURNS))]
    weights = token_weights(lengths, aggregate, documents).split(lengths)

    def step(tokens_per_forward):
        policy.zero_grad()
        rows = pack(PROMPTS, RESPONSES, tokens_per_forward)
        for row in rows:
            all_logps = policy([PROMPTS[i] for i in row], [RESPONSES[i] for i in row])
            losses = []
            for i, logps in zip(row, all_logps):
                advantages = torch.full_like(logps, math.sin(i))
                losses.append(policy_loss(logps, logps.detach() + 0.1, advantages, weights[i])[0])
            sum(losses).backward()
        return len(rows), {name: p.grad.clone() for name, p in policy.named_parameters()}

    one, expected = step(10_000)
    some, in_some = step(24)
    all_turns, one_by_one = step(1)
    assert one == 1 < some < all_turns == len(TURNS)
    assert_equal_gradients(in_some, expected, rtol=3e-6)
    assert_equal_gradients(one_by_one, expected, rtol=3e-6)


def test_the_policys_attention_still_obeys_a_padding_mask_outside_of_training():
    """`generate` and plain scoring run on the same weights: left padding must not leak in."""
    policy, plain = Policy(tiny_model()), tiny_model()
    long, short = [5, 6, 7, 8, 9], [10, 11]
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = torch.tensor([long, [0, 0, 0, *short]])
    logits = policy.lm(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    for row, prompt in zip(logits, (long, short)):
        expected = plain(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture, config", [
    ("mistral", dict(sliding_window=4)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    ("lfm2", dict(layer_types=["conv", "full_attention"])),
    ("gemma2", {}),  # soft caps
    ("granite", dict(logits_scaling=4.0)),
    ("cohere", {}),  # logit_scale
])  # fmt: skip
def test_a_model_that_a_row_of_units_would_get_wrong_runs_its_turns_one_by_one(
    architecture, config
):
    policy, plain = Policy(tiny_model(architecture, **config)), tiny_model(architecture, **config)
    assert not policy.shares
    assert_close(policy(PROMPTS, RESPONSES, 0.5), plain_logps(plain, 0.5))


GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)
OPT = dict(ffn_dim=48, word_embed_proj_dim=32)


@pytest.mark.parametrize("architecture, config, random", [
    ("seed_oss", {}, dict(attention_dropout=0.5, residual_dropout=0.5)),
    ("granite", {}, dict(attention_dropout=0.5)),
    ("gpt2", GPT2, dict(embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)),
    ("opt", OPT, dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.1)),
    ("phi3", {}, dict(embd_pdrop=0.5, resid_pdrop=0.5, attention_dropout=0.5)),
    ("stablelm", {}, dict(hidden_dropout=0.5, attention_dropout=0.5)),
    ("gpt_neox", {}, dict(hidden_dropout=0.5, attention_dropout=0.5)),
    ("mixtral", {}, dict(attention_dropout=0.5, router_jitter_noise=0.5)),
])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_scores_what_the_sampler_drew_from_whatever_is_random_in_train_mode(
    architecture, config, random, checkpointing
):
    from rollout import Sampler

    torch.manual_seed(0)
    spoiled = tiny_model(architecture, **config, **random).train()
    ids = torch.tensor([PROMPTS[0]])
    assert not spoiled(ids).logits.equal(spoiled(ids).logits)  # else the test would say nothing

    policy = Policy(tiny_model(architecture, **config, **random)).train()
    if checkpointing:
        policy.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    keys = [(i,) for i in range(len(PROMPTS))]
    sampled = Sampler(policy.lm, [3], share=policy.shares)(PROMPTS, [8] * len(PROMPTS), keys)
    responses = [response.ids for response in sampled]
    trained = policy(PROMPTS, responses)
    for one, other in zip(trained, policy.eval()(PROMPTS, responses), strict=True):
        assert one.equal(other)
    plain = tiny_model(architecture, **config)
    for prompt, response, logps in zip(PROMPTS, sampled, trained):
        assert response.logps == pytest.approx(logps.tolist(), abs=1e-4)
        logits = plain(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(response.ids)), response.ids]
        torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture, shares", [
    ("llama", True), ("olmo2", True), ("gemma", True), ("phi", True), ("starcoder2", True),
    ("smollm3", True), ("persimmon", True), ("glm4", True), ("helium", True), ("apertus", True),
    ("stablelm", False), ("nemotron", False), ("cohere2", False), ("gpt_neo", False),
    ("bloom", False), ("mpt", False), ("gptj", False), ("codegen", False), ("mamba", False),
    ("gemma3_text", False), ("gpt_oss", False), ("xglm", False),
])  # fmt: skip
def test_every_architecture_shares_or_is_known_not_to_and_is_exact(architecture, shares):
    """StableLM and Nemotron raise where a row of units runs through them."""
    sizes = {
        "gptj": GPT2 | dict(rotary_dim=4), "codegen": GPT2 | dict(rotary_dim=4),
        "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
        "mpt": dict(d_model=32, n_heads=4, n_layers=2), "bloom": dict(n_layer=2, n_head=4),
    }.get(architecture, {})  # fmt: skip
    policy = Policy(tiny_model(architecture, **sizes))
    assert policy.shares == shares
    assert_close(policy(PROMPTS, RESPONSES), plain_logps(tiny_model(architecture, **sizes)))


def test_a_few_steps_on_advantages_make_the_rewarded_responses_likelier():
    policy = Policy(tiny_model())
    prompts, responses = [word(P)] * 4, list(map(word, ["AB", "CB", "DEB", "FB"]))
    lengths = [len(response) for response in responses]
    weights = token_weights(lengths, "sequence")
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0]
    advantages = advantages.repeat_interleave(torch.tensor(lengths))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    history = []
    for _ in range(6):
        logps = policy(prompts, responses)
        history.append([float(x.detach().sum()) for x in logps])
        flat = torch.cat(logps)
        loss, _ = policy_loss(flat, flat.detach(), advantages, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rewarded, *others = zip(history[0], history[-1])
    assert rewarded[1] > rewarded[0] + 0.1
    assert all(after < before for before, after in others)


def test_logits_are_fp32_where_the_model_computes_in_bf16():
    """Against float64 on the same bf16 weights: logits rounded to bf16 would be off by 1e-2."""
    model = tiny_model().to(torch.bfloat16)
    Policy(model, shares=True)
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    hidden = (8 * torch.randn(1, 5, 32, generator=generator)).bfloat16().requires_grad_()
    logits = head(hidden)
    truth = hidden.detach().double() @ head.weight.detach().double().T
    assert logits.dtype == torch.float32 and truth.abs().max() > 10
    torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-5)

    # gradients are those of the plain product, as exact as bf16 holds them
    upstream = torch.randn(logits.shape, generator=generator)
    logits.backward(upstream)
    weight = head.weight.detach().double()
    expected = upstream.double() @ weight
    assert (hidden.grad.double() - expected).norm() < 1e-2 * expected.norm()
    expected = upstream[0].double().T @ hidden.detach()[0].double()
    assert (head.weight.grad.double() - expected).norm() < 1e-2 * expected.norm()


def test_a_bf16_models_sampled_and_trained_log_probs_are_those_of_fp32_logits():
    from rollout import Sampler

    policy = Policy(tiny_model().to(torch.bfloat16), shares=True)
    prompts = [[5, 6, 7, 8]] * 4
    sampled = Sampler(policy.lm, end_ids=[63])(prompts, [6] * 4, [(i,) for i in range(4)])
    trained = policy(prompts, [response.ids for response in sampled])
    for response, logps in zip(sampled, trained):
        gap = (torch.tensor(response.logps) - logps).abs().max()
        assert 0 < gap < 0.2 and logps.dtype == torch.float32


# ------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("prompts, responses", [
    ([[1]], [[2], [3]]), ([[]], [[1]]), ([[1]], [[]]), ([[1], [1, 2]], [[1]]),
])  # fmt: skip
def test_turns_without_a_prompt_or_a_response_are_refused(prompts, responses):
    with pytest.raises(ValueError, match="as many prompts as responses"):
        Policy(tiny_model())(prompts, responses)


def test_a_model_that_stays_random_in_train_mode_is_refused():
    lm = tiny_model()
    plain = lm.model.norm.forward

    def noisy(hidden):  # where no name gives it away
        return plain(hidden) + (0.5 * torch.randn_like(hidden) if lm.training else 0)

    lm.model.norm.forward = noisy
    with pytest.raises(ValueError, match="its train mode is random"):
        Policy(lm)
    assert not lm.training


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return result


@torch.no_grad()
def test_a_decoding_step_copies_no_cache_and_equals_the_whole_forward():
    """Keys of fewer heads than queries, rows of different lengths in a cache of fixed size."""
    policy = Policy(tiny_model())
    assert policy.shares
    lm, generator = policy.lm, torch.Generator().manual_seed(0)
    ids = torch.randint(64, (3, 41), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, :30] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = StaticCache(config=lm.config, max_cache_len=64)
    lm(
        ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        past_key_values=cache,
    )
    with Largest() as largest:
        step = lm(
            ids[:, -1:],
            attention_mask=mask,
            position_ids=positions[:, -1:],
            past_key_values=cache,
        )
    assert largest.numbers == cache.layers[0].keys.numel()  # what the cache gives out
    for row in range(3):
        alone = lm(ids[row : row + 1, mask[row].bool()]).logits[0, -1]
        torch.testing.assert_close(step.logits[row, -1], alone, rtol=1e-4, atol=1e-5)
