"""GRPO on turns: advantages, token weights, the clipped loss and its KL, log-probs of responses.

Every turn (prompt, response) is one training sequence. Turns that begin alike run as one unit:
the common prefix once, then each turn's own tail, which attends to the prefix and to itself only.
Nothing is ever padded.

    pack     = unit | unit | ...                  up to tokens_per_forward tokens
    unit     = prefix | tail 1 | tail 2 | ...     positions restart after the prefix in every tail
    tail     = rest of the prompt + response, less its last token

Loss tensors are flat: one entry per response token, in the order of the turns.

    python grpo.py               a demo: a random model learns to repeat a token, in seconds

It imports none of its siblings: copy it as it is (torch 2.11 to 2.13, transformers 5.17 to 5.23).

Differences from the papers: none in the loss. MEM1 stitches the pruned turns of a trajectory into
one sequence under an attention mask, which is an approximation; one sequence per turn is exact.

Letters in shapes: Q groups, G members, N response tokens, L tokens of a pack, H heads, D head size.
"""

from collections import Counter
from os.path import commonprefix  # of lists as well
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

ATTENTION = "shared_prefix"  # the name of our attention function in transformers' registry
TAILS = 512  # tokens of short tails that share one attention call, under one dense mask
HEAD_CHUNK = 1024  # response positions whose logits exist at one time


# ------------------------------------------------------------------------------------ advantages


def group_advantages(rewards, scale="none", eps=1e-6):
    """Rewards (.., G) -> advantages (.., G), eq. 3: reward - mean of its group (Dr. GRPO).

    scale="group" also divides by the group's unbiased standard deviation + eps (GRPO). One value
    per TRAJECTORY, for all its turns: normalising over turns would weigh long documents more.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    """
    if scale not in ("none", "group"):
        raise ValueError(f"scale is {scale!r}: use none or group")
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(-1, keepdim=True) + eps)
    return advantages


def token_weights(lengths, aggregate, document=None):
    """The share of every response token in the loss, (sum(lengths),), for turns of these lengths.

    aggregate:
      "sequence"  eq. 4: the mean over a turn's tokens, over its document's turns, over documents.
                  document: one hashable per turn; without it all turns are of one document.
      "token"     the mean over all tokens (MemAgent, DAPO).

    Compute it once over an update's turns of all ranks: the gradient then depends neither on
    packing nor on the number of GPUs.

    >>> token_weights([1, 3], "sequence").tolist()[:2], token_weights([1, 3], "token").tolist()[:2]
    ([0.5, 0.1666666716337204], [0.25, 0.25])
    """
    if aggregate == "sequence":
        document = [0] * len(lengths) if document is None else list(document)
        turns = Counter(document)
        weights = []  # of a token, a turn each
        for name, length in zip(document, lengths):
            weights.append(1 / (len(turns) * turns[name] * length))
    elif aggregate == "token":
        weights = [1 / max(sum(lengths), 1)] * len(lengths)
    else:
        raise ValueError(f"aggregate is {aggregate!r}: use sequence or token")
    lengths = torch.as_tensor(lengths, dtype=torch.long)
    return torch.tensor(weights).repeat_interleave(lengths)


# ------------------------------------------------------------------------------------------ loss


def policy_loss(
    logps, old_logps, advantages, weights, *,
    clip_low=0.2, clip_high=0.2, ref_logps=None, kl_coef=0.0,
):  # fmt: skip
    """The GRPO objective to minimise (eq. 4): sum of weights * (surrogate + kl_coef * k3).

    All tensors are (N,). With one update a rollout, old_logps are logps detached: the ratio is 1,
    the clip rests, and the gradient is the plain policy gradient.
    k3 = exp(d) - d - 1 with d = ref - policy log-prob: an unbiased estimate of
    KL(policy || reference) on the policy's samples, not multiplied by the ratio (MemAgent's code).
    -> (loss, metrics): metrics are means over the N tokens, detached.
    """
    # the surrogate, its ratio clipped
    ratio = torch.exp((logps - old_logps).clamp(-20, 20))
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    clipped_high = (ratio > 1 + clip_high) & (advantages > 0)
    clipped_low = (ratio < 1 - clip_low) & (advantages < 0)
    metrics = {
        "clip_high": clipped_high.float().mean(),
        "clip_low": clipped_low.float().mean(),
        "ratio": ratio.mean(),
        "entropy": -logps.mean(),
    }

    # the leash to the reference
    if ref_logps is not None:
        d = (ref_logps - logps).clamp(-20, 20)
        k3 = torch.exp(d) - d - 1
        loss = loss + kl_coef * k3
        metrics["kl"] = k3.mean()

    # the mean, as the weights have it
    return (weights * loss).sum(), {name: value.detach() for name, value in metrics.items()}


# ----------------------------------------------------------------------- packs of shared prefixes


def shared_prefixes(prompts):
    """Groups prompts that begin alike: list of (prefix length, indices).

    Neighbours in sorted order join where they share at least half of a prompt, and where that
    leaves fewer tokens to run. Every prompt keeps at least one token of its own. (grpo.py and
    rollout.py have the same function, so that either file can be copied alone.)

    >>> shared_prefixes([[1, 2, 3, 4], [9, 9], [1, 2, 3, 5], [1, 2, 3, 4]])
    [(3, [0, 3, 2]), (1, [1])]
    """
    groups = []
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        prompt = prompts[i]
        if groups:
            length, members = groups[-1]
            common = len(commonprefix([prompts[members[0]][:length], prompt[:-1]]))
            # a shorter prefix costs each member but the first the difference; one more saves it
            saves = common >= (len(members) - 1) * (length - common)
            if common and saves and 2 * common >= len(prompt) - 1:
                groups[-1] = (common, [*members, i])
                continue
        groups.append((len(prompt) - 1, [i]))
    return groups


def pack(prompts, responses, tokens_per_forward):
    """Divides turns into packs of at most tokens_per_forward tokens: lists of turn indices, by
    which to pick the turns' advantages and weights.

    Turns with a common prefix stay together as far as they fit; a turn that is too long by itself
    gets a pack of its own. The longest pack comes first.
    """
    # units: turns with a common prefix, cut where they outgrow a pack
    units = []  # (tokens, turns)
    for prefix, turns in shared_prefixes(prompts):
        tokens, unit = prefix, []
        for i in turns:
            tail = len(prompts[i]) - prefix + len(responses[i]) - 1
            if unit and tokens + tail > tokens_per_forward:
                units.append((tokens, unit))
                tokens, unit = prefix, []
            tokens += tail
            unit.append(i)
        units.append((tokens, unit))

    # packs: the longest unit first, each into the first pack that has room
    packs = []  # [tokens, turns]
    for tokens, unit in sorted(units, key=lambda unit: -unit[0]):
        for filled in packs:
            if filled[0] + tokens <= tokens_per_forward:
                filled[0] += tokens
                filled[1] += unit
                break
        else:
            packs.append([tokens, list(unit)])

    # a pack's turns are grouped anew when it runs: what is too much then gets packs of its own
    packed = []
    for _, turns in packs:
        while len(turns) > 1 and pack_tokens(prompts, responses, turns) > tokens_per_forward:
            packed.append([turns.pop()])
        packed.append(turns)
    return sorted(packed, key=lambda turns: -pack_tokens(prompts, responses, turns))


def pack_tokens(prompts, responses, turns):
    """The tokens that run in a pack of these turns.

    >>> pack_tokens([[1, 2, 3], [1, 2, 4]], [[5, 6], [7]], [0, 1])
    5
    """
    tokens = sum(len(prompts[i]) + len(responses[i]) - 1 for i in turns)
    for prefix, members in shared_prefixes([prompts[i] for i in turns]):
        tokens -= prefix * (len(members) - 1)
    return tokens


class Unit:
    """Where a unit lies in its pack: its prefix, its tails in groups of up to TAILS tokens, and
    what the tokens of a group see, (tokens, prefix + tokens); None is plain causal attention."""

    def __init__(self, prefix, tails, device):
        self.prefix = prefix
        groups = []
        for tail in tails:
            if groups and sum(groups[-1]) + tail <= TAILS:
                groups[-1].append(tail)
            else:
                groups.append([tail])
        self.groups = [sum(group) for group in groups]
        self.masks = [self._visible(group, device) for group in groups]

    def _visible(self, tails, device):
        if self.prefix == 0 and len(tails) == 1:
            return None
        tail = torch.arange(len(tails), device=device)
        tail = tail.repeat_interleave(torch.tensor(tails, device=device))  # of every token
        own = (tail[:, None] == tail).tril()  # a token sees its own tail up to itself ..
        before = own.new_ones(len(tail), self.prefix)  # .. and the whole prefix
        return torch.cat([before, own], 1)


def shared_prefix_attention(
    module, query, key, value, attention_mask, scaling=None, units=None, **kwargs
):
    """Attention of a pack of units; query (1, H, L, D), key and value (1, H or fewer, L, D)
    -> (1, L, H, D).

    units: list of `Unit`, in the order of the pack. Without it (generation, plain scoring) this is
    transformers' own attention, mask and all.
    """
    if units is None and query.shape[2] == 1 and attention_mask is not None:
        return decoding_attention(query, key, value, attention_mask, scaling), None
    if units is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if query.is_cuda:  # a mask together with enable_gqa falls to the slow kernel there
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, 1)
        value = value.repeat_interleave(repeats, 1)

    def attend(q, k, v, mask):
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=not query.is_cuda
        )

    # split, not index: the backward of an index fills whole tensors with zeros
    sizes = [size for unit in units for size in (unit.prefix, *unit.groups)]
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2))
    outputs = []
    for unit in units:
        prefix_q, prefix_k, prefix_v = next(parts)
        if unit.prefix:
            outputs.append(attend(prefix_q, prefix_k, prefix_v, None))
        for mask in unit.masks:
            q, k, v = next(parts)
            if unit.prefix:
                k = torch.cat([prefix_k, k], 2)
                v = torch.cat([prefix_v, v], 2)
            outputs.append(attend(q, k, v, mask))
    return torch.cat(outputs, 2).transpose(1, 2), None


def decoding_attention(query, key, value, mask, scaling):
    """A new token a row: query (B, H, 1, D), keys of all columns (B, H or fewer, N, D)
    -> (B, 1, H, D). Heads that share a key become its queries: to repeat keys for every head, as
    transformers does where a mask is given, would copy the whole cache for every token."""
    batch, heads, _, size = query.shape
    query = query.reshape(batch, key.shape[1], -1, size)
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return output.reshape(batch, 1, heads, size)


# ---------------------------------------------------------------------------------------- policy


class Float32Logits(torch.autograd.Function):
    """hidden (N, width), weight (V, width), both bf16 -> logits (N, V) in fp32.

    A head that computes in bf16 rounds its logits to 8 bits: at logits of 20 to 28 by 0.02 on
    average, so that a KL of 4e-5 reads 3e-4. (mm with out_dtype has no autograd of its own.)
    """

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        return gradient @ weight, gradient.T @ hidden


def float32_logits(head, hidden):
    """The forward of an output layer, with fp32 logits whatever it computes in."""
    if hidden.dtype == torch.float32:
        return F.linear(hidden, head.weight, head.bias)
    logits = Float32Logits.apply(hidden.flatten(0, -2), head.weight)
    if head.bias is not None:
        logits = logits + head.bias
    return logits.unflatten(0, hidden.shape[:-1])


def switch_off_randomness(lm):
    """Train mode must not change the network: training scores what the sampler drew from. Dropout
    and jitter are modules, or numbers that a module hands to functions."""
    for module in lm.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


class Policy(nn.Module):
    """A language model as training sees it: turns in, log-probs of their responses out.

    lm: a causal language model of transformers; it stays `.lm`, for `generate` and saving.
    shares: whether it runs packs of units. That takes full attention in every layer and logits
    straight from the head; it is found out unless told. Other models run every turn by itself,
    which is slower and as exact.
    """

    def __init__(self, lm, shares=None):
        super().__init__()
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        # On H100 and later, torch 2.13 tries cuDNN's attention first: it plans anew for every key
        # length (20 to 40 ms a decoded token) and gives NaN gradients for some masked lengths.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Without a mask function of the same name, `generate` would ignore left padding.
        AttentionInterface.register(ATTENTION, shared_prefix_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.lm = lm
        switch_off_randomness(lm)
        head = lm.get_output_embeddings()
        head.forward = MethodType(float32_logits, head)  # in training and in sampling alike
        if shares is None:
            self._check_train_mode()
        own = lm.config._attn_implementation
        lm.set_attn_implementation(ATTENTION)
        self.shares = self._can_share() if shares is None else shares
        if not self.shares:
            lm.set_attn_implementation(own)

    @torch.no_grad()
    def _check_train_mode(self):
        """ValueError where train mode is another network than the one that samples."""
        training, logps = self.lm.training, []
        for mode in (False, True):
            self.lm.train(mode)
            logps += self._one_by_one([[1, 2, 3, 4, 5]], [[6, 7, 8, 9]], 1.0)
        self.lm.train(training)
        if not torch.allclose(*logps, rtol=1e-3, atol=1e-3):
            raise ValueError("its train mode is random, so that training would score other numbers")

    @torch.no_grad()
    def _can_share(self):
        """Whether a unit of three turns gets the log-probs that the plain model gives to each: soft
        caps, scaled logits and the like show there, windows and other layers in the config."""
        config = self.lm.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or [])
        if getattr(config, "sliding_window", None) or layers - {"full_attention"}:
            return False
        prompts = [[1, 2, 3], [1, 2, 3], [1, 2, 4, 5]]
        responses = [[6, 7], [8], [9, 10, 11]]
        alone = torch.cat(self._one_by_one(prompts, responses, 1.0))
        try:
            together = torch.cat(self._one_pack(prompts, responses, 1.0))
        except Exception:  # a model that knows no units may raise anything
            return False
        return torch.allclose(together, alone, rtol=1e-3, atol=1e-3)

    def forward(self, prompts, responses, temperature=1.0):
        """Token-id lists, as many of either -> list of (length of the response,) fp32 log-probs.

        All turns run in one pack. temperature divides the logits, as it did in sampling.
        """
        prompts, responses = list(prompts), list(responses)
        if len(prompts) != len(responses) or not all(prompts) or not all(responses):
            raise ValueError("as many prompts as responses are wanted, a token or more in each")
        run = self._one_pack if self.shares else self._one_by_one
        return run(prompts, responses, temperature)

    def _one_by_one(self, prompts, responses, temperature):
        """Log-probs of the responses, by the plain model."""
        result = []
        for prompt, response in zip(prompts, responses):
            ids = torch.tensor([prompt + response], device=self.lm.device)
            # the logits from the prompt's last token on predict the response
            keep = len(response)
            logits = self.lm(ids[:, :-1], use_cache=False, logits_to_keep=keep).logits[0]
            logps = (logits.float() / temperature).log_softmax(-1)
            chosen = logps.gather(-1, ids[0, -keep:, None])[:, 0]
            result.append(chosen.clone())  # FSDP2 takes no views from its root
        return result

    def _one_pack(self, prompts, responses, temperature):
        """Log-probs of all responses, in one pack of units."""
        # lay it out: ids and positions (L,), where responses are predicted from (N,)
        pack_ids, positions, predictors = [], [], []
        units, order = [], []
        device = self.lm.device
        for prefix, turns in shared_prefixes(prompts):
            prefix = prefix if len(turns) > 1 else 0
            pack_ids += prompts[turns[0]][:prefix]
            positions += range(prefix)
            tails = []
            for i in turns:
                tail = prompts[i][prefix:] + responses[i][:-1]
                # the hidden state at the prompt's last token predicts the response's first
                first = len(pack_ids) + len(prompts[i]) - prefix - 1
                predictors += range(first, len(pack_ids) + len(tail))
                pack_ids += tail
                positions += range(prefix, prefix + len(tail))
                tails.append(len(tail))
            units.append(Unit(prefix, tails, device))
            order += turns

        # run it; a 4-D mask passes through transformers untouched, and keeps it from making one
        hidden = self.lm.base_model(
            input_ids=torch.tensor([pack_ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            attention_mask=torch.empty(1, 1, 0, 0, device=device),
            use_cache=False,
            units=units,
        ).last_hidden_state[0]  # (L, width)

        # log-probs of the responses, put back into the order that was given
        targets = [token for i in order for token in responses[i]]
        chosen = hidden[torch.tensor(predictors, device=device)]  # (N, width)
        logps = self._token_logps(chosen, torch.tensor(targets, device=device), temperature)
        lengths = [len(responses[i]) for i in order]
        result = [None] * len(prompts)
        for i, values in zip(order, logps.split(lengths)):
            result[i] = values.clone()
        return result

    def _token_logps(self, hidden, targets, temperature):
        """Hidden states (N, width), targets (N,) -> log-probs (N,). A chunk of logits exists at a
        time, and is made again in backward."""
        head = self.lm.get_output_embeddings()

        def chunk_logps(hidden, targets):
            logits = head(hidden) / temperature
            chosen = logits.gather(-1, targets[:, None])[:, 0]
            return chosen - logits.logsumexp(-1)

        chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
        logps = [checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(logps)


# ------------------------------------------------------------------------------------------ demo


def demo(steps=61, questions=16, group=8):
    """A random model learns to repeat the prompt's last token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, head_dim=8, vocab_size=16)
    layers = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    policy = Policy(Qwen3ForCausalLM(Qwen3Config(**sizes, **layers, tie_word_embeddings=True)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(steps):
        # rollout
        asked = torch.randint(16, (questions,)).repeat_interleave(group).tolist()
        prompts = [[1, 2, 3, token] for token in asked]
        with torch.no_grad():
            logits = policy.lm(torch.tensor(prompts)).logits[:, -1]
        responses = torch.multinomial(logits.softmax(-1), 1).tolist()

        # rewards and advantages
        right = torch.tensor(responses)[:, 0] == torch.tensor(asked)
        rewards = right.float().view(questions, group)
        advantages = group_advantages(rewards).flatten()

        # update, a pack at a time: a turn has one token, so turns pick tokens
        weights = token_weights([1] * len(prompts), "sequence")
        optimizer.zero_grad()
        for turns in pack(prompts, responses, tokens_per_forward=128):
            logps = policy([prompts[i] for i in turns], [responses[i] for i in turns])
            logps = torch.cat(logps)
            loss, metrics = policy_loss(logps, logps.detach(), advantages[turns], weights[turns])
            loss.backward()
        optimizer.step()
        if step % 15 == 0:
            reward, entropy = rewards.mean(), metrics["entropy"]
            print(f"step {step:02d} | reward {reward:.2f} | entropy {entropy:.2f}")
    assert rewards.mean() > 0.9, "the model has not learnt to repeat the token"


if __name__ == "__main__":
    demo()
