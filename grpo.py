"""GRPO on turns: group advantages, log-probs over shared prefixes without padding, the clipped loss and its KL.

Every turn (prompt, response) is one training sequence. Turns that begin alike run as one unit: the common prefix once, then
each turn's own tail, which attends to the prefix and to itself only:

    row      = unit | unit | ...                      up to tokens_per_forward tokens, nothing is ever padded
    unit     = prefix | tail 1 | tail 2 | ...         positions restart after the prefix in every tail
    tail     = rest of the prompt + response, less its last token

Loss tensors are flat, one entry per response token of the batch, in the order of the turns.

    python grpo.py               a demo: a random model learns to repeat a token, offline in seconds

Differences from the papers: none in the loss. MEM1 stitches the pruned turns of a trajectory into one sequence under an
attention mask, which is an approximation; one sequence per turn is exact.

Letters in shapes: Q groups, G members of a group, N response tokens, L tokens of a row, H heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

ATTENTION = "shared_prefix"  # the name of our attention function in transformers' AttentionInterface
HEAD_CHUNK = 1024  # response positions whose logits exist at one time
BATCHED_SCORES = 2**19  # attention scores (segments * queries * keys) up to which short segments share a call


# ----------------------------------------------------------------------------------------------------------- advantages


def group_advantages(rewards, scale="none", eps=1e-6):
    """Rewards (Q, G) -> advantages (Q, G): reward - mean of its group (Dr. GRPO); scale="group" also divides by the group's
    unbiased standard deviation + eps (GRPO). One value per TRAJECTORY: expand to turns afterwards, never before.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    """
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(-1, keepdim=True) + eps)
    return advantages


def token_weights(lengths, aggregate, document=None, count=None):
    """The share of every response token in the loss (sum(lengths),), for turns of these lengths.

    aggregate: "sequence", eq. 4: mean over a turn's tokens, over a document's turns, over documents (`document`: one
    hashable per turn; without it all turns are of one); "token": mean over all tokens (MemAgent, DAPO); "constant":
    1 / (turns * count), so that long responses weigh more but not less per token than short ones (Dr. GRPO; `count`:
    the response limit).
    Compute it once over the turns of all ranks: the gradient then depends neither on packing nor on the number of GPUs.

    >>> token_weights([1, 3], "sequence").tolist()[:2], token_weights([1, 3], "token").tolist()[:2]
    ([0.5, 0.1666666716337204], [0.25, 0.25])
    """
    lengths = torch.as_tensor(lengths, dtype=torch.long)  # empty ones too
    if aggregate == "sequence":
        document = [0] * len(lengths) if document is None else list(document)
        turns = {d: document.count(d) for d in set(document)}
        per_token = torch.tensor([1 / (len(turns) * turns[d]) for d in document], dtype=torch.float64) / lengths
    elif aggregate == "token":
        per_token = torch.full((len(lengths),), 1 / max(int(lengths.sum()), 1), dtype=torch.float64)
    elif aggregate == "constant":
        per_token = torch.full((len(lengths),), 1 / (max(len(lengths), 1) * count), dtype=torch.float64)
    else:
        raise ValueError(f"aggregate is {aggregate!r}: use sequence, token or constant")
    return per_token.repeat_interleave(lengths).float()


# ----------------------------------------------------------------------------------------------------------------- loss


def policy_loss(logps, old_logps, advantages, weights, *, clip_low=0.2, clip_high=0.2, dual_clip=None, ref_logps=None, kl_coef=0.0):
    """The GRPO objective to minimise (eq. 3, 4): sum of weights * (clipped surrogate + kl_coef * k3). All tensors (N,).

    k3 = exp(d) - d - 1 with d = ref - policy log-prob, an unbiased estimate of KL(policy || reference) on the policy's
    samples, not multiplied by the ratio (MemAgent's code). dual_clip c bounds the loss of tokens with a negative advantage
    at -A * c. -> (loss, metrics): the metrics are means over the N tokens, as detached scalars.
    """
    ratio = torch.exp((logps - old_logps).clamp(-20, 20))
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)  # eq. 3
    if dual_clip:
        loss = torch.where(advantages < 0, torch.min(loss, -advantages * dual_clip), loss)
    metrics = {
        "clip_high": ((ratio > 1 + clip_high) & (advantages > 0)).float().mean(),
        "clip_low": ((ratio < 1 - clip_low) & (advantages < 0)).float().mean(),
        "ratio": ratio.mean(),
        "entropy": -logps.mean(),
    }
    if ref_logps is not None:
        d = (ref_logps - logps).clamp(-20, 20)
        k3 = torch.exp(d) - d - 1
        loss = loss + kl_coef * k3
        metrics["kl"] = k3.mean()
    return (weights * loss).sum(), {name: value.detach() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------- rows of shared prefixes


def shared_prefixes(prompts):
    """Groups prompts by common prefixes: list of (prefix length, indices). Every prompt keeps at least one token of its own.

    Sorted prompts are the leaves of a tree of prefixes. The prompts under a node are either one group, which saves
    (size - 1) * the node's prefix, or stay as its children group them, whichever saves more tokens. (rollout.py has the same
    function: files that import none of each other can be copied alone.)

    >>> shared_prefixes([[1, 2, 3, 4], [9, 9], [1, 2, 3, 5], [1, 2, 3, 4]])
    [(3, [0, 3, 2]), (1, [1])]
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    groups, nodes = [], []  # nodes of the tree of prefixes that are still open: (length, indices, tokens saved, groups)
    for i, following in zip(order, [*order[1:], None]):
        indices, saved, groups = [i], 0, [(len(prompts[i]) - 1, [i])]
        common = -1 if following is None else _common_prefix(prompts[i], prompts[following])
        while nodes and nodes[-1][0] >= common:
            length, indices_before, saved_before, groups_before = nodes.pop()
            indices, saved, groups = indices_before + indices, saved_before + saved, groups_before + groups
            if length == common:
                break  # the next prompt belongs to this node as well
            together = (len(indices) - 1) * length
            if length and together >= saved:
                saved, groups = together, [(length, indices)]
        nodes.append((common, indices, saved, groups))
    return groups


def _common_prefix(a, b):
    """Tokens that a and b begin with, at most all but the last of the shorter one (bisection: list comparison is fast)."""
    low, high = 0, min(len(a), len(b)) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def pack(prompts, responses, tokens_per_forward):
    """Divides turns into rows of at most tokens_per_forward tokens: list of (tokens, turn indices), longest row first.

    Groups with a common prefix stay together as far as they fit; a turn that is too long by itself gets a row of its own.
    """
    units = []  # (tokens, turns)
    for prefix, turns in shared_prefixes(prompts):
        tokens, unit = prefix, []
        for i in turns:
            tail = len(prompts[i]) - prefix + len(responses[i]) - 1
            if unit and tokens + tail > tokens_per_forward:
                units.append((tokens, unit))
                tokens, unit = prefix, []
            tokens, unit = tokens + tail, [*unit, i]
        units.append((tokens, unit))
    rows = []  # first fit, longest unit first
    for tokens, unit in sorted(units, key=lambda unit: -unit[0]):
        row = next((row for row in rows if row[0] + tokens <= tokens_per_forward), None)
        if row is None:
            rows.append(row := [0, []])
        row[0] += tokens
        row[1] += unit
    return sorted(map(tuple, rows), key=lambda row: -row[0])


def attention_plan(units, device):
    """What attends to what in a row: list of (queries (n, q), keys (n, k), mask), row positions of n segments at a time, and
    the order (L,) that puts the valid outputs of all of them, one after the other, back into the row.

    units: list of (prefix length, tail lengths), in the order of the row. Small segments of similar size share one call, as
    the overhead of a call is larger than their work; they are filled up with position 0, which the mask or the order drops.
    """
    segments, start = [], 0  # (first position of the prefix, its length, first position, length)
    for prefix, tails in units:
        first = start
        for before, length in [(0, prefix), *((prefix, tail) for tail in tails)]:
            if length:
                segments.append((first, before, start, length))
                start += length
    plan, order, batch = [], [], []
    for segment in [*sorted(segments, key=lambda s: (s[1] + s[3], s[3])), None]:
        if batch:
            wide = [*batch, segment] if segment else []
            q, k = (max((n * s[1] + s[3] for s in wide), default=0) for n in (0, 1))
            if segment and len(wide) * q * k <= BATCHED_SCORES and len(wide) * q * k <= 2 * sum(s[3] * (s[1] + s[3]) for s in wide):
                batch = wide
                continue
            q, k = (max(n * s[1] + s[3] for s in batch) for n in (0, 1))
            queries = [[*range(s, s + n)] + [0] * (q - n) for _, _, s, n in batch]
            keys = [[*range(f, f + b), *range(s, s + n)] + [0] * (k - b - n) for f, b, s, n in batch]
            before = torch.tensor([s[1] for s in batch], device=device)[:, None, None, None]
            columns, rows = torch.arange(k, device=device), torch.arange(q, device=device)[:, None]
            # query i of a segment is its key before + i and sees all keys up to there (lower-right causal)
            mask = columns <= before + rows if len(batch) > 1 else causal_lower_right(q, k)
            plan.append((torch.tensor(queries, device=device), torch.tensor(keys, device=device), mask, [s[3] for s in batch]))
            order += [position for _, _, s, n in batch for position in range(s, s + n)]
        batch = [segment]
    return plan, torch.tensor(order, device=device).argsort()


def shared_prefix_attention(module, query, key, value, attention_mask, scaling=None, plan=None, **kwargs):
    """Attention of a row of units; query (1, H, L, D), key and value (1, H or fewer, L, D) -> (1, L, H, D).

    plan: of `attention_plan`. Without it (generation, scoring) this is transformers' own scaled dot-product attention,
    mask and all.
    """
    if plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    segments, order = plan
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda:  # a mask together with enable_gqa falls to the slow kernel there
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, H, D)
    outputs = []
    for queries, keys, mask, lengths in segments:
        q, k, v = query[queries].transpose(1, 2), key[keys].transpose(1, 2), value[keys].transpose(1, 2)  # (n, H, q or k, D)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=grouped and not query.is_cuda).transpose(1, 2)
        outputs += [rows[:length] for rows, length in zip(out, lengths)]
    return torch.cat(outputs)[order][None], None


# --------------------------------------------------------------------------------------------------------------- policy


class Policy(nn.Module):
    """The language model as training sees it, and the root that is sharded: turns in, log-probs of their responses out.

    lm: a causal language model of transformers, loaded as usual; it stays `.lm`, for `generate` and `save_pretrained`.
    `shares`: whether it can run rows of units (full attention in every layer, logits straight from the head), found out
    unless told; other models run every turn by itself, which is slower and as exact.
    """

    def __init__(self, lm, shares=None):
        super().__init__()
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        # The mask function of the same name matters: without one, `generate` would ignore left padding.
        AttentionInterface.register(ATTENTION, shared_prefix_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.lm, own = lm, lm.config._attn_implementation
        lm.set_attn_implementation(ATTENTION)
        self.shares = self._can_share() if shares is None else shares
        if not self.shares:
            lm.set_attn_implementation(own)

    @torch.no_grad()
    def _can_share(self):
        """Whether a unit of three turns gets the log-probs that the plain model gives to each of them: soft caps, scaled
        logits and whatever else a row would leave out show there. Windows and state-space layers stand in the config."""
        config = self.lm.config
        if getattr(config, "sliding_window", None) or {*(getattr(config, "layer_types", None) or [])} - {"full_attention"}:
            return False
        turns = ([1, 2, 3], [6, 7]), ([1, 2, 3], [8]), ([1, 2, 4, 5], [9, 10, 11])
        self.shares, training = True, self.training
        self.eval()
        together, alone = torch.cat(self(*zip(*turns))), torch.cat([self._alone(*turn, 1.0) for turn in turns])
        self.train(training)
        return torch.allclose(together, alone, rtol=1e-3, atol=1e-3)

    def _alone(self, prompt, response, temperature):
        """Log-probs of one response (its length,), by the plain model."""
        ids = torch.tensor([[*prompt, *response]], device=self.lm.device)
        logits = self.lm(ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float() / temperature
        return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]

    def forward(self, prompts, responses, temperature=1.0):
        """Token-id lists, as many of either -> list of (length of response,) fp32 log-probs, in the order given; all in one row.

        temperature divides the logits, as it did when the responses were sampled.
        """
        prompts, responses = list(prompts), list(responses)
        if not self.shares:
            return [self._alone(*turn, temperature) for turn in zip(prompts, responses)]
        row, positions, units, predictors, order = [], [], [], [], []
        for prefix, turns in shared_prefixes(prompts):
            prefix = prefix if len(turns) > 1 else 0
            row += prompts[turns[0]][:prefix]
            positions += range(prefix)
            units.append((prefix, []))
            for i in turns:
                tail = [*prompts[i][prefix:], *responses[i][:-1]]
                # the hidden state at the prompt's last token predicts the response's first
                predictors += range(len(row) + len(prompts[i]) - prefix - 1, len(row) + len(tail))
                row += tail
                positions += range(prefix, prefix + len(tail))
                units[-1][1].append(len(tail))
                order.append(i)
        device = self.lm.device
        # A 4-D mask passes through transformers untouched: an empty one keeps it from building one of L x L.
        hidden = self.lm.base_model(
            input_ids=torch.tensor([row], device=device), position_ids=torch.tensor([positions], device=device),
            attention_mask=torch.empty(1, 1, 0, 0, device=device), use_cache=False,
            plan=attention_plan(units, device),
        ).last_hidden_state[0]  # fmt: skip
        targets = torch.tensor([token for i in order for token in responses[i]], device=device)
        logps = self._token_logps(hidden[torch.tensor(predictors, device=device)], targets, temperature)
        by_turn = dict(zip(order, logps.split([len(responses[i]) for i in order])))
        return [by_turn[i].clone() for i in range(len(prompts))]  # FSDP2 does not take views from its root

    def _token_logps(self, hidden, targets, temperature):
        """Hidden states (N, width), targets (N,) -> log-probs (N,), a chunk of logits at a time, made again in backward."""
        head = self.lm.get_output_embeddings()

        def chunk_logps(h, target):
            logits = head(h).float() / temperature
            return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)

        chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
        return torch.cat([checkpoint(chunk_logps, h, target, use_reentrant=False) for h, target in chunks])


if __name__ == "__main__":
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)  # fmt: skip
    policy, Q, G = Policy(Qwen3ForCausalLM(config)), 8, 8
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(41):
        asked = torch.randint(16, (Q,)).tolist()
        prompts = [[1, 2, 3, token] for token in asked for _ in range(G)]
        with torch.no_grad():  # one-token responses, sampled; the reward is 1 where the prompt's last token is repeated
            sampled = torch.multinomial(policy.lm(torch.tensor(prompts)).logits[:, -1].softmax(-1), 1).tolist()
        rewards = torch.tensor([float(response == prompt[-1:]) for prompt, response in zip(prompts, sampled)]).view(Q, G)
        logps = torch.cat(policy(prompts, sampled))
        weights = token_weights([1] * Q * G, "sequence")
        loss, metrics = policy_loss(logps, logps.detach(), group_advantages(rewards).flatten(), weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:02d} | reward {rewards.mean():.2f} | entropy {metrics['entropy']:.2f}")
