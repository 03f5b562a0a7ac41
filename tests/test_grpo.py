"""Advantages, weights, loss and the shared-prefix policy, against slow plain versions that share nothing with them."""

import doctest
import math
import statistics
from itertools import pairwise

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import grpo
from grpo import Policy, attention_plan, group_advantages, pack, policy_loss, shared_prefix_attention, shared_prefixes, token_weights

ARCHITECTURES = ["qwen2", "qwen3", "llama"]


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(grpo)
    assert result.attempted >= 3 and not result.failed


# ----------------------------------------------------------------------------------------------------------- advantages

group_of = lambda size: st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5]), min_size=size, max_size=size)  # noqa: E731
reward_groups = st.integers(2, 5).flatmap(lambda size: st.lists(group_of(size), min_size=1, max_size=4))


@given(reward_groups)
def test_an_advantage_is_the_reward_less_the_mean_of_its_own_group(rewards):
    expected = [[r - statistics.mean(group) for r in group] for group in rewards]
    torch.testing.assert_close(group_advantages(torch.tensor(rewards)), torch.tensor(expected), rtol=1e-6, atol=1e-6)


@given(reward_groups)
def test_scale_group_divides_by_the_unbiased_standard_deviation(rewards):
    expected = [[(r - statistics.mean(group)) / (statistics.stdev(group) + 1e-6) for r in group] for group in rewards]
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale="group")
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))


def test_a_group_without_spread_has_no_advantage_under_either_scale():
    for scale in ("none", "group"):
        assert group_advantages(torch.tensor([[1.0] * 8, [0.0] * 8]), scale).abs().max() == 0


# -------------------------------------------------------------------------------------------------------------- weights


def test_token_weights_worked_by_hand():
    lengths, document = [2, 1, 3], ["a", "a", "b"]
    assert token_weights(lengths, "sequence", document).tolist() == pytest.approx([1 / 8] * 2 + [1 / 4] + [1 / 6] * 3)
    assert token_weights(lengths, "sequence").tolist() == pytest.approx([1 / 6] * 2 + [1 / 3] + [1 / 9] * 3)
    assert token_weights(lengths, "token", document).tolist() == pytest.approx([1 / 6] * 6)
    assert token_weights(lengths, "constant", document, count=10).tolist() == pytest.approx([1 / 30] * 6)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=8))
def test_token_weights_are_the_nested_means_of_equation_4(turns):
    """The loss of arbitrary token losses, against loops in float64 that take mean after mean."""
    lengths, document = zip(*turns)
    losses = [[math.sin(10 * turn + token) for token in range(n)] for turn, n in enumerate(lengths)]
    flat = torch.tensor(sum(losses, []), dtype=torch.float64)
    weighted = lambda *how, **kwargs: float((flat * token_weights(lengths, *how, **kwargs)).sum())  # noqa: E731

    mean = statistics.fmean
    of_document = lambda d: mean(mean(loss) for loss, other in zip(losses, document) if other == d)  # noqa: E731
    assert weighted("sequence", document=document) == pytest.approx(mean(of_document(d) for d in set(document)), abs=1e-6)
    assert weighted("token") == pytest.approx(mean(sum(losses, [])), abs=1e-6)
    assert weighted("constant", count=9) == pytest.approx(mean(sum(loss) / 9 for loss in losses), abs=1e-6)


def test_weights_of_nothing_are_empty_and_an_unknown_aggregate_is_refused():
    for aggregate in ("sequence", "token", "constant"):
        assert token_weights([], aggregate, document=[], count=4).shape == (0,)
    with pytest.raises(ValueError, match="mean.*sequence, token or constant"):
        token_weights([1], "mean")


# ----------------------------------------------------------------------------------------------------------------- loss


def slow_loss(logps, old, advantages, weights, clip_low, clip_high, dual_clip, ref, kl_coef):
    """Equation 3 with one `if` per case, a token at a time, in Python's float64."""
    total = 0.0
    for token, logp in enumerate(logps):
        ratio, a = math.exp(logp - old[token]), advantages[token]
        if a >= 0:
            gain = min(ratio, 1 + clip_high) * a
        else:
            gain = max(ratio, 1 - clip_low) * a
            if dual_clip:
                gain = max(gain, dual_clip * a)
        kl = math.exp(ref[token] - logp) - (ref[token] - logp) - 1 if ref else 0.0
        total += weights[token] * (-gain + kl_coef * kl)
    return total


@pytest.mark.parametrize("clip_low, clip_high", [(0.2, 0.2), (0.1, 0.4)])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("kl_coef", [None, 0.05])
def test_loss_and_gradient_equal_a_slow_plain_version(clip_low, clip_high, dual_clip, kl_coef):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(400, generator=generator, dtype=torch.float64)  # noqa: E731
    logps, old, ref = (-3 + draw() for _ in range(3))
    advantages, weights = draw(), draw().abs()
    advantages[:20] = 0
    kl = dict(ref_logps=ref, kl_coef=kl_coef) if kl_coef else {}

    def slow(values, token=slice(None)):
        plain = [x[token].tolist() for x in (old, advantages, weights)]
        return slow_loss(values, *plain, clip_low, clip_high, dual_clip, ref[token].tolist() if kl_coef else None, kl_coef or 0)

    logps.requires_grad_()
    loss, metrics = policy_loss(logps, old, advantages, weights, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, **kl)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(slow(logps.tolist()), rel=1e-12)

    step = 1e-6  # central differences; a token's loss depends on its own log-prob alone
    expected = [
        (slow([x + step], slice(i, i + 1)) - slow([x - step], slice(i, i + 1))) / (2 * step) for i, x in enumerate(logps.tolist())
    ]
    torch.testing.assert_close(logps.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)

    ratio = (logps.detach() - old).exp()
    assert metrics["clip_high"] == sum((ratio > 1 + clip_high) & (advantages > 0)) / 400 > 0.05
    assert metrics["clip_low"] == sum((ratio < 1 - clip_low) & (advantages < 0)) / 400 > 0.05
    assert metrics["ratio"] == pytest.approx(float(ratio.mean())) and metrics["entropy"] == -logps.detach().mean()
    assert not any(value.requires_grad for value in metrics.values())


def test_clip_and_dual_clip_worked_by_hand():
    def loss(ratio, advantage, **kwargs):
        logps = torch.tensor([math.log(ratio)], requires_grad=True)
        value, _ = policy_loss(logps, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), **kwargs)
        value.backward()
        return round(float(value.detach()), 4), round(float(logps.grad), 4)  # the gradient of -ratio * A is -ratio * A

    assert loss(1.5, 1.0) == (-1.2, 0.0)  # good and already likelier: no more push
    assert loss(0.5, 1.0) == (-0.5, -0.5)  # good but less likely: full push
    assert loss(0.5, -1.0) == (0.8, 0.0)
    assert loss(1.5, -1.0) == (1.5, 1.5)
    assert loss(10.0, -1.0) == (10.0, 10.0)
    assert loss(10.0, -1.0, dual_clip=3.0) == (3.0, 0.0)
    assert loss(10.0, 1.0, dual_clip=3.0) == (-1.2, 0.0)
    assert loss(2.0, -1.0, dual_clip=3.0) == (2.0, 2.0)


def test_k3_averages_to_the_true_kl_of_policy_to_reference():
    """Enumerated over a vocabulary of six; the reversed KL, and k3 with its arguments swapped, are far away."""
    generator = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)

    def expected_k3(p, q):  # the KL part of the loss, with the policy's own probabilities as weights
        loss, metrics = policy_loss(p, torch.zeros_like(p), torch.zeros_like(p), policy.exp(), ref_logps=q, kl_coef=1.0)
        k3 = [math.exp(b - a) - (b - a) - 1 for a, b in zip(p.tolist(), q.tolist())]
        assert metrics["kl"] == pytest.approx(statistics.fmean(k3))
        return float(loss)

    kl = float((policy.exp() * (policy - reference)).sum())
    assert expected_k3(policy, reference) == pytest.approx(kl, rel=1e-12)
    assert abs(expected_k3(reference, policy) - kl) > 0.2 * kl


def test_the_kl_term_is_not_multiplied_by_the_ratio():
    logps, zero = torch.tensor([-1.0]), torch.zeros(1)
    for old in (-1.0, -3.0):
        loss, _ = policy_loss(logps, torch.tensor([old]), zero, torch.ones(1), ref_logps=torch.tensor([-2.0]), kl_coef=1.0)
        assert loss == pytest.approx(math.exp(-1))


def test_log_ratios_are_clamped_before_exp():
    logps = torch.tensor([-1e4, -0.5, 0.0, -200.0], requires_grad=True)
    old, ref = torch.tensor([-0.5, -1e4, -200.0, 0.0]), torch.tensor([0.0, -1e4, -1e4, 0.0])
    loss, metrics = policy_loss(logps, old, torch.tensor([1.0, -1.0, -1.0, 1.0]), torch.ones(4), ref_logps=ref, kl_coef=1.0)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all() and all(value.isfinite() for value in metrics.values())
    assert metrics["ratio"] == pytest.approx(math.exp(20) / 2)


# --------------------------------------------------------------------------------------- prefixes, rows, attention plan

token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=6)


def common_prefix(a, b):
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@given(st.lists(token_lists, max_size=9))
def test_groups_share_all_that_their_prompts_have_in_common(prompts):
    groups = shared_prefixes(prompts)
    assert sorted(i for _, turns in groups for i in turns) == list(range(len(prompts)))
    for length, turns in groups:
        longest = min([common_prefix(prompts[a], prompts[b]) for a in turns for b in turns])
        assert length == min(longest, min(len(prompts[i]) for i in turns) - 1)  # each keeps a token of its own


turns = st.lists(st.tuples(token_lists, st.lists(st.integers(0, 1), min_size=1, max_size=5)), max_size=9)


@given(turns, st.integers(1, 40))
def test_pack_puts_every_turn_into_one_row_and_keeps_to_the_limit(turns, limit):
    prompts, responses = [p for p, _ in turns], [r for _, r in turns]
    rows = pack(prompts, responses, limit)
    assert sorted(i for _, members in rows for i in members) == list(range(len(turns)))
    assert all(a >= b for (a, _), (b, _) in pairwise(rows))
    for tokens, members in rows:
        assert tokens <= limit or len(members) == 1
        # what the policy will lay out: prefix once, then the tails (it looks for prefixes among the row's turns anew)
        laid_out = 0
        for prefix, unit in shared_prefixes([prompts[i] for i in members]):
            laid_out += prefix + sum(len(prompts[members[j]]) - prefix + len(responses[members[j]]) - 1 for j in unit)
        assert laid_out <= tokens


def test_pack_does_not_waste_rows():
    prompts = [[i] * 10 for i in range(8)]  # 8 turns of 14 tokens, nothing shared
    assert [len(row) for _, row in pack(prompts, [[0] * 5] * 8, 28)] == [2, 2, 2, 2]
    assert [tokens for tokens, _ in pack([[1] * 10] * 8, [[0] * 5] * 8, 9 + 8 * 5)] == [9 + 8 * 5]


def rows_seen(units):
    """Which positions of a row each position may attend to, from the definition: its prefix, and its own tail up to itself."""
    seen, start = [], 0
    for prefix, tails in units:
        seen += [set(range(start, start + n + 1)) for n in range(prefix)]
        shared, start = set(range(start, start + prefix)), start + prefix
        for tail in tails:
            seen += [shared | set(range(start, start + n + 1)) for n in range(tail)]
            start += tail
    return seen


@pytest.mark.parametrize("batched_scores", [0, 200, 2**19])
@given(units=st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=4))
def test_a_position_attends_to_its_prefix_and_its_own_tail_and_to_nothing_else(batched_scores, units):
    """With unit vectors as values, what comes out of attention is the attention itself."""
    seen = rows_seen(units)
    L, heads = len(seen), 2
    generator = torch.Generator().manual_seed(L)
    query, key = torch.randn(2, 1, heads, L, L, generator=generator).unbind()
    value = torch.eye(L).expand(1, heads, L, L)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "BATCHED_SCORES", batched_scores)
        attention, _ = shared_prefix_attention(None, query, key, value, None, scaling=0.3, plan=attention_plan(units, "cpu"))

    visible = torch.tensor([[k in row for k in range(L)] for row in seen])
    expected = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(attention, expected.transpose(1, 2))
    assert (attention[0].transpose(0, 1)[:, ~visible] == 0).all()


# --------------------------------------------------------------------------------------------------------------- policy

P = [7, 8, 9, 10, 11, 12, 13, 14]
TURNS = [  # (prompt, response), out of order: equal prompts, partial and nested prefixes, strangers; responses of 1 to 9 tokens
    (P, [3]),
    ([20, 21, 22], [5, 6, 7, 8]),
    (P + [30, 31], [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (P, [4, 4, 4]),
    ([50], [51]),
    (P + [30], [9, 3]),
    ([20, 21, 23, 24, 25], [6, 2]),
    (P, [4, 4, 5]),
    ([40, 41, 42], [2, 60, 3]),
    ([50], [51, 52]),
    (P[:3] + [33, 34], [7]),
]
PROMPTS, RESPONSES = map(list, zip(*TURNS))


def plain_logps(model, prompt, response, temperature=1.0):
    """One unpadded forward of an untouched model."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(response)), response]


def gradients(model, logps):
    """Of a loss that weighs every token differently."""
    model.zero_grad()
    sum((torch.sin(torch.arange(len(x)) + 7.0 * i) * x).sum() for i, x in enumerate(logps)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(got, expected, rtol=1e-5):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize("head_chunk", [3, 1024])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefixes_change_neither_log_probs_nor_gradients(architecture, checkpointing, head_chunk, monkeypatch):
    monkeypatch.setattr(grpo, "HEAD_CHUNK", head_chunk)
    policy, plain = Policy(tiny_model(architecture)), tiny_model(architecture)
    if checkpointing:
        policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.train()
    expected = [plain_logps(plain, *turn) for turn in TURNS]
    logps = policy(PROMPTS, RESPONSES)
    for got, want in zip(logps, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(gradients(policy.lm, logps), gradients(plain, expected))


@pytest.mark.parametrize("batched_scores", [0, 100])
def test_the_number_of_segments_in_a_call_changes_nothing(batched_scores, monkeypatch):
    policy = Policy(tiny_model())
    expected = torch.cat(policy(PROMPTS, RESPONSES))
    monkeypatch.setattr(grpo, "BATCHED_SCORES", batched_scores)
    torch.testing.assert_close(torch.cat(policy(PROMPTS, RESPONSES)), expected, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_and_as_many_key_heads_as_query_heads_work_as_well():
    for config in (dict(tie_word_embeddings=True), dict(num_key_value_heads=4), dict(num_key_value_heads=1)):
        policy, plain = Policy(tiny_model(**config)), tiny_model(**config)
        expected = [plain_logps(plain, *turn) for turn in TURNS]
        logps = policy(PROMPTS, RESPONSES)
        torch.testing.assert_close(torch.cat(logps), torch.cat(expected), rtol=1e-5, atol=1e-5)
        assert_equal_gradients(gradients(policy.lm, logps), gradients(plain, expected))


def test_temperature_divides_the_logits_in_the_log_probs():
    policy, plain = Policy(tiny_model()), tiny_model()
    for temperature in (0.7, 1.3):
        expected = [plain_logps(plain, *turn, temperature) for turn in TURNS]
        torch.testing.assert_close(torch.cat(policy(PROMPTS, RESPONSES, temperature)), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_the_end_token_is_trained_even_where_it_is_the_whole_response_and_the_pad():
    """Its log-prob is in the output, and raising it by a step of gradient works."""
    end = 2
    policy = Policy(tiny_model(eos_token_id=end, pad_token_id=end))
    before = policy([[5, 6], [5, 6]], [[end], [9, end]])
    assert [len(x) for x in before] == [1, 2]
    (before[0][-1] + before[1][-1]).backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1e-3 * parameter.grad
    after = policy([[5, 6], [5, 6]], [[end], [9, end]])
    assert after[0][-1] > before[0][-1] and after[1][-1] > before[1][-1]


def test_log_probs_stay_with_their_turns_whatever_the_order():
    policy = Policy(tiny_model())
    straight = policy(PROMPTS, RESPONSES)
    for shift in (1, 4):
        shifted = policy(PROMPTS[shift:] + PROMPTS[:shift], RESPONSES[shift:] + RESPONSES[:shift])
        for i, logps in enumerate(shifted):
            torch.testing.assert_close(logps, straight[(i + shift) % len(TURNS)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_the_gradient_of_a_step_does_not_depend_on_tokens_per_forward(aggregate):
    policy, lengths = Policy(tiny_model()), [len(r) for r in RESPONSES]
    weights = token_weights(lengths, aggregate, document=[i % 3 for i in range(len(TURNS))], count=9).split(lengths)

    def gradient(tokens_per_forward):
        policy.zero_grad()
        rows = pack(PROMPTS, RESPONSES, tokens_per_forward)
        for _, row in rows:
            logps = torch.cat(policy([PROMPTS[i] for i in row], [RESPONSES[i] for i in row]))
            advantages = torch.cat([torch.full((lengths[i],), math.sin(i)) for i in row])
            policy_loss(logps, logps.detach() + 0.1, advantages, torch.cat([weights[i] for i in row]))[0].backward()
        return len(rows), {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}

    (one, expected), (some, in_some), (most, one_by_one) = gradient(10_000), gradient(24), gradient(1)
    assert one == 1 < some < most == len(TURNS)
    assert_equal_gradients(in_some, expected, rtol=3e-6)
    assert_equal_gradients(one_by_one, expected, rtol=3e-6)


def test_the_policys_attention_still_obeys_a_padding_mask_outside_of_training():
    """`generate` and plain scoring run on the same weights: left padding must not leak in."""
    policy, plain = Policy(tiny_model()), tiny_model()
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    logits = policy.lm(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -1]
    expected = torch.stack([plain(torch.tensor([p])).logits[0, -1] for p in prompts])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture, config", [
    ("mistral", dict(sliding_window=4)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    ("lfm2", dict(layer_types=["conv", "full_attention"])),
    ("gemma2", {}),  # soft caps
    ("granite", dict(logits_scaling=4.0)),
    ("cohere", {}),  # logit_scale
])  # fmt: skip
def test_a_model_that_a_row_of_units_would_get_wrong_runs_its_turns_one_by_one(architecture, config):
    policy, plain = Policy(tiny_model(architecture, **config)), tiny_model(architecture, **config)
    prompts, responses = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11]], [[12, 13, 2], [14, 2]]
    assert not policy.shares
    for prompt, response, ours in zip(prompts, responses, policy(prompts, responses, temperature=0.5)):
        ids = torch.tensor([prompt + response])
        logps = (plain(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.5).log_softmax(-1)
        torch.testing.assert_close(ours, logps.gather(-1, ids[0, len(prompt) :, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_a_few_steps_on_advantages_make_the_rewarded_responses_likelier():
    policy = Policy(tiny_model())
    prompts, responses = [P] * 4, [[1, 2], [3, 2], [4, 5, 2], [6, 2]]
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0]
    lengths = [len(r) for r in responses]
    probability = lambda: [float(x.detach().sum()) for x in policy(prompts, responses)]  # noqa: E731
    before, optimizer = probability(), torch.optim.SGD(policy.parameters(), lr=0.05)
    for _ in range(5):
        logps = torch.cat(policy(prompts, responses))
        per_token = advantages.repeat_interleave(torch.tensor(lengths))
        loss, _ = policy_loss(logps, logps.detach(), per_token, token_weights(lengths, "sequence"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = probability()
    assert after[0] > before[0] + 0.1 and all(a < b for a, b in zip(after[1:], before[1:]))
