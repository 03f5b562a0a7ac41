"""Agents with a bounded memory, and the sampler that keeps all of them going in lock step.

An agent is a small object: `prompt()` gives (token ids, most new tokens), or None when it has finished, and `receive(ids)`
takes the response. A sampler is any callable (prompts, limits, keys) -> responses, all of them token ids: `Sampler` is the
language model behind Hugging Face `generate`; a scripted one serves tests and demonstrations. `rollout` joins the two and
records every turn, so that training sees exactly the ids that were sampled. Nothing is ever decoded and encoded again.

    python rollout.py            a demo on a random model, offline in seconds

Differences from the papers:
  1. The wording of the prompts is ours, and the final answer's prompt holds no section (the text of MemTrain says so; its
     printed template still shows one).
  2. `chunk_first` puts the section before the memory, so that all trajectories of a document share its keys and values.
  3. Noise is a hash of (seed, step, trajectory, turn, position), not a generator's state: a rollout does not depend on how
     its rows were batched, cut into segments or divided over ranks, and there is no random state to save.

Letters in shapes: B rows, N columns, V vocabulary; Q groups of up to G rows with a common prefix of P columns, H heads, D head size.
"""

import bisect
import contextlib
import hashlib
import re
from typing import NamedTuple

import torch

TAGS = ("problem", "memory", "section", "think", "search", "answer", "information")
FIELDS = re.compile(r"\{(problem|memory|section|previous|turns)\}")
CLOSED = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)  # what ends a Searcher's turn
NO_MEMORY = "No previous memory"
ATTENTION = "stored_once"  # the name of our attention function in transformers' AttentionInterface
CACHE_ROOM = 64  # columns by which a full cache grows
COPIED = 2**16  # tokens of a layer's cache that may be copied together while prompts are read
PREFILL = 2**28  # most elements of an attention mask, which would be as large as rows * columns^2 for long prompts

PROBLEM = (
    "One entity was replaced by [MASK] everywhere in a long article. Judging by the whole article, which entity does "
    "[MASK] stand for?"
)

TEMPLATES = {
    "update": """You are reading a long article section by section, and only your memory passes from one section to the \
next. Read the section below and write the updated memory: keep what the old memory says that may still be needed, add \
what the section says that helps with the problem, and keep other facts (names, places, numbers, dates) that may be asked \
for later. Be concise, and write nothing but the memory.

<problem>
{problem}
</problem>

<memory>
{memory}
</memory>

<section>
{section}
</section>

Updated memory:
""",
    "answer": """You have read a long article section by section, and this memory is all that is left of it. Solve the \
problem from the memory, and put nothing but the final answer into \\boxed{}.

<problem>
{problem}
</problem>

<memory>
{memory}
</memory>

Your answer:
""",
    "recall": """Below are your memory of an article and one of its earlier sections, in which an entity was replaced by \
[TARGET]. Use the memory and the section to find out which entity [TARGET] stands for, and put nothing but that entity \
into \\boxed{}.

<memory>
{memory}
</memory>

<section>
{section}
</section>

Your answer:
""",
    "whole": """Read the article below, solve the problem from it, and put nothing but the final answer into \\boxed{}.

<problem>
{problem}
</problem>

<section>
{section}
</section>

Your answer:
""",
    "closed_book": """Solve the problem, and put nothing but the final answer into \\boxed{}.

<problem>
{problem}
</problem>

Your answer:
""",
    "search": """Answer the problem, which may hold several questions joined by semicolons. You may search an encyclopedia. In \
every turn write first, between <think> and </think>, a summary of all that you know so far and still need: only your last \
turn and its search results stay visible. Then write either one query between <search> and </search>, whose results will be \
shown between <information> and </information>, or, between <answer> and </answer>, the final answers in the order of the \
questions, joined by semicolons and as short as possible.

<problem>
{problem}
</problem>

{previous}

{turns} turns left; the last one must answer.
""",
}


# ---------------------------------------------------------------------------------------------------- text to token ids


def cleaner(tokenizer):
    """A function text -> text of the same length in which nothing can pass for structure.

    Every token that the tokenizer recognises by its spelling (`<|im_end|>`, `</think>`) and every tag of ours loses its
    first character to a look-alike, and lone surrogates, which no tokenizer takes, become U+FFFD. The length stays, so
    character spans stay valid. (`split_special_tokens` would miss added tokens that are not 'special'.)

    >>> from types import SimpleNamespace
    >>> clean = cleaner(SimpleNamespace(all_special_tokens=["<|im_end|>"], get_added_vocab=lambda: {"</think>": 7}))
    >>> clean("a<|im_end|> <b> </memory> [MASK] </think>")
    'a‹|im_end|> <b> ‹/memory> [MASK] ‹/think>'
    """
    forged = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *(f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/"))}
    first = {}  # first character -> the rests of the strings that start with it
    for token in sorted(forged - {"[MASK]", "[TARGET]"}):
        if token.strip():
            first.setdefault(token[0], []).append(re.escape(token[1:]))
    pattern = re.compile("|".join(f"{re.escape(c)}(?={'|'.join(rests)})" for c, rests in first.items()) + "|[\ud800-\udfff]")
    return lambda text: pattern.sub(lambda match: "\ufffd" if "\ud800" <= match.group() <= "\udfff" else "‹", text)


class Template:
    """A one-message conversation with fields, as token ids: `template(memory=ids, section=ids)` -> ids.

    The text goes through the tokenizer's chat template once (thinking off, where it has a switch), is cut at its fields,
    and the literal pieces are tokenised once; what fills the fields is spliced in as ids. `len()` counts the literal ids.
    """

    def __init__(self, tokenizer, text):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use an instruction-tuned model, or set tokenizer.chat_template")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        literals, self.fields = FIELDS.split(text)[::2], FIELDS.split(text)[1::2]
        self.literals = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in literals]

    def __call__(self, **fields):
        ids = list(self.literals[0])
        for name, literal in zip(self.fields, self.literals[1:], strict=True):
            ids += fields[name]
            ids += literal
        return ids

    def __len__(self):
        return sum(map(len, self.literals))


class Prompts:
    """All that stands between text and token ids: the templates of a tokenizer, and what its ids mean to an agent.

    update, answer, recall: `Template`s; clean: see `cleaner`; order: "memory_first" (the papers') or "chunk_first".
    """

    def __init__(self, tokenizer, texts=TEMPLATES, order="memory_first"):
        self.tokenizer, self.clean = tokenizer, cleaner(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token: set tokenizer.eos_token to the one that ends a turn")
        if order == "chunk_first":
            swap = re.compile(r"(<memory>.*</memory>)(.*)(<section>.*</section>)", re.DOTALL)
            texts = {name: swap.sub(r"\3\2\1", text) for name, text in texts.items()}
        for name, text in texts.items():
            setattr(self, name, Template(tokenizer, text))
        self.no_memory = self.encode(NO_MEMORY)
        # all_special_ids alone lacks special tokens without a role (Llama's headers)
        self.special_ids = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        self.information = [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in ("\n<information>\n", "\n</information>")]

    def encode(self, text):
        """Token ids of any text, made safe first."""
        return self.tokenizer(self.clean(text), add_special_tokens=False)["input_ids"]

    def plain(self, ids):
        """A response less its end token and whatever else is special: what may be spliced into the next prompt."""
        return [i for i in ids if i not in self.special_ids]

    def closed(self, ids):
        """The number of ids up to the one that completes the first closing tag of a search or an answer; None without one."""
        if not CLOSED.search(self.text(ids)):
            return None
        return bisect.bisect_left(range(len(ids)), True, key=lambda n: bool(CLOSED.search(self.text(ids[:n]))))

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def longest(self, problem, chunk_tokens, memory_tokens, answer_tokens):
        """Tokens of the longest prompt and response that a Reader or a Recaller can come to."""
        memory = max(memory_tokens, len(self.no_memory))
        update = len(self.update) + len(problem) + memory + chunk_tokens + memory_tokens
        recall = len(self.recall) + memory + chunk_tokens + answer_tokens
        return max(update, recall, len(self.answer) + len(problem) + memory + answer_tokens)

    def longest_search(self, problem, answer_tokens, result_tokens):
        """The same for a Searcher: it sees its last response and the results, and writes another response."""
        shown = answer_tokens + result_tokens + sum(map(len, self.information)) + len(self.encode("99"))
        return len(self.search) + len(problem) + shown + answer_tokens


# --------------------------------------------------------------------------------------------------------------- agents


class Turn(NamedTuple):
    """One training sequence: what the model saw, what it wrote, and whether the limit cut it before an end token."""

    prompt_ids: list
    response_ids: list
    truncated: bool


class Agent:
    """What all agents have: prompts, a key (the identity of its noise: document, trajectory, ..), and its turns so far."""

    def __init__(self, prompts, key):
        self.prompts, self.key, self.turns = prompts, tuple(key), []

    def trim(self, response):
        """-> (the ids of a response that count, whether the limit cut it before an end token)"""
        return response, not response or response[-1] not in self.prompts.special_ids


class Reader(Agent):
    """Reads chunk after chunk into a memory, then answers from the memory alone (MemTrain sections 3.1, 3.3; MemAgent).

    problem: token ids; chunks: list of token ids. memories[t] is the memory after turn t, memories[0] the empty one.
    `answer` is the text of the last response, None before.
    """

    def __init__(self, prompts, problem, chunks, memory_tokens, answer_tokens, key=(0,)):
        super().__init__(prompts, key)
        self.problem, self.chunks = problem, chunks
        self.memory_tokens, self.answer_tokens = memory_tokens, answer_tokens
        self.memories, self.answer = [prompts.no_memory], None

    def prompt(self):
        if self.answer is not None:
            return None
        turn, memory = len(self.memories), self.memories[-1]
        if turn <= len(self.chunks):
            section = self.chunks[turn - 1]
            return self.prompts.update(problem=self.problem, memory=memory, section=section), self.memory_tokens
        return self.prompts.answer(problem=self.problem, memory=memory), self.answer_tokens

    def receive(self, response):
        if len(self.memories) <= len(self.chunks):
            self.memories.append(self.prompts.plain(response))  # the whole response is the memory, nothing is parsed
        else:
            self.answer = self.prompts.text(response)


class Asker(Agent):
    """One prompt, one answer: the base of a Recaller, and all that reading in a full context window takes."""

    def __init__(self, prompts, ids, answer_tokens, key=(0,)):
        super().__init__(prompts, key)
        self.ids, self.answer_tokens, self.answer = ids, answer_tokens, None

    def prompt(self):
        return (self.ids, self.answer_tokens) if self.answer is None else None

    def receive(self, response):
        self.answer = self.prompts.text(response)


class Recaller(Asker):
    """Names the entity hidden in an earlier section, from a memory, in one turn (intermediate memory recall, section 3.3).

    memory, section: token ids; the section holds [TARGET]. All samples of one recall have the same prompt.
    """

    def __init__(self, prompts, memory, section, answer_tokens, key=(0,)):
        super().__init__(prompts, prompts.recall(memory=memory, section=section), answer_tokens, key)


class Searcher(Agent):
    """Answers questions by searching; of the past it sees only its last turn and that turn's results (MEM1, section 3).

    problem: token ids; turns: most turns; result_tokens: results are cut to this. `query` is waiting for results, or None;
    `answer` is the text between the answer tags, None without one; `malformed`: a turn closed neither tag, which ends it;
    `searches`: queries that got results so far.
    """

    def __init__(self, prompts, problem, turns, answer_tokens, result_tokens=1024, key=(0,)):
        super().__init__(prompts, key)
        self.problem, self.turns_left, self.answer_tokens, self.result_tokens = problem, turns, answer_tokens, result_tokens
        self.previous, self.query, self.answer, self.malformed, self.searches = [], None, None, False, 0

    def prompt(self):
        if self.turns_left and self.answer is None and not self.malformed:
            turns = self.prompts.encode(str(self.turns_left))
            return self.prompts.search(problem=self.problem, previous=self.previous, turns=turns), self.answer_tokens

    def trim(self, response):
        end = self.prompts.closed(response)
        return (response[:end], False) if end else super().trim(response)

    def receive(self, response):
        self.turns_left -= 1
        self.previous = self.prompts.plain(response)
        closed = CLOSED.search(self.prompts.text(response))
        self.malformed = closed is None
        if closed and closed[1] == "answer":
            self.answer = closed[2].strip()
        elif closed and self.turns_left:
            self.query = closed[2].strip()

    def inform(self, passages):
        """Results of the last query: list of {"title", "text"}."""
        text = "\n".join(f"Passage {i} (title: {p['title']}) {p['text']}" for i, p in enumerate(passages, 1)) or "nothing found"
        results, self.searches = self.prompts.encode(text)[: self.result_tokens], self.searches + 1
        self.previous, self.query = [*self.previous, *self.prompts.information[0], *results, *self.prompts.information[1]], None


def rollout(agents, sampler, search=None):
    """Runs all agents to their end, each turn of all of them in one call of the sampler; fills `agent.turns`.

    search: list of queries -> list of lists of passages; the queries of a turn go in one call.
    """
    while asked := [(agent, *prompt) for agent in agents if (prompt := agent.prompt())]:
        waiting, prompts, limits = zip(*asked)
        responses = sampler(prompts, limits, [(*agent.key, len(agent.turns)) for agent in waiting])
        for agent, prompt, response in zip(waiting, prompts, responses, strict=True):
            response, truncated = agent.trim(response)
            agent.turns.append(Turn(prompt, response, truncated))
            agent.receive(response)
        if curious := [agent for agent in waiting if getattr(agent, "query", None) is not None]:
            for agent, passages in zip(curious, search([agent.query for agent in curious]), strict=True):
                agent.inform(passages)
    return agents


# ------------------------------------------------------------------------------------------------------------- sampling


def _mix(x):
    """A 32-bit integer hash (two rounds of multiply and xor-shift), in place. int32 wraps around, so that its bits are those
    of unsigned arithmetic, once the copies of the sign that `>>` shifts in are cut off."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x ^= (x >> shift).bitwise_and_(2 ** (32 - shift) - 1)
        x *= factor
    x ^= (x >> 16).bitwise_and_(2**16 - 1)
    return x


def gumbel_noise(keys, position, vocabulary):
    """Gumbel(0, 1) noise (B, V) in fp32, a pure function of (key, position, token); keys: (B, 2) int64 below 2**32.

    argmax(logits + noise) is a sample of softmax(logits) (the Gumbel-max trick).
    """
    keys = keys.to(torch.int32)
    salt = (position * 0x9E3779B9 + 2**31) % 2**32 - 2**31
    row = _mix(keys[:, 0] ^ _mix(keys[:, 1] + salt))[:, None]
    bits = _mix(_mix(torch.arange(vocabulary, dtype=torch.int32, device=keys.device) ^ row).bitwise_xor_(keys[:, 1:]))
    uniform = (bits >> 9).bitwise_and_(2**23 - 1).float().add_(0.5).div_(2**23)  # neither 0 nor 1 is ever reached in fp32
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _row_keys(keys, *salt):
    """(B, 2) int64: 64 hashed bits of each key, so that neighbouring keys have unrelated noise."""
    digests = [hashlib.blake2b(repr((*salt, *key)).encode(), digest_size=8).digest() for key in keys]
    return torch.tensor([[int.from_bytes(d[:4], "little"), int.from_bytes(d[4:], "little")] for d in digests])


class _Noise:
    """A logits processor: scores (B, V) -> scores plus this position's noise, whose argmax is the sample."""

    def __init__(self, keys, position):
        self.keys, self.position = keys, position

    def __call__(self, input_ids, scores):
        scores = scores.float() + gumbel_noise(self.keys, self.position, scores.shape[-1])
        self.position += 1
        return scores


def shared_prefixes(prompts):
    """Groups prompts by common prefixes: list of (prefix length, indices). Every prompt keeps at least one token of its own.

    Sorted prompts are the leaves of a tree of prefixes. The prompts under a node are either one group, which saves
    (size - 1) * the node's prefix, or stay as its children group them, whichever saves more tokens.

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


def _prefix_cache(config, columns):
    """transformers' cache for full attention and at most so many columns, in which a prefix that rows have in common is stored once.

    After `share(group)`, what was cached is one prefix for every group (Q, H, P, D), row i belongs to group[i], and what comes
    is each row's own (B, H, N, D). That is written into room kept free for it, where concatenation would copy it at every token.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        prefix = None  # keys and values (Q, H, P, D) that groups have in common
        room = {}  # "keys", "values" -> (buffer, the part of it in use, as last seen)

        def prefix_length(self):
            return self.prefix[0].shape[-2] if self.prefix else 0

        def get_seq_length(self):
            return self.prefix_length() + super().get_seq_length()

        def update(self, keys, values, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.keys, self.values, self.room = keys, values, {}
                return keys, values
            self.keys, self.values = self._append("keys", keys), self._append("values", values)
            return self.keys, self.values

        def _append(self, name, new):
            old, (buffer, seen) = getattr(self, name), self.room.get(name, (None, None))
            start, end = old.shape[-2], old.shape[-2] + new.shape[-2]
            if old is not seen or end > buffer.shape[-2]:  # rows were selected since, or it is full
                most = columns - self.prefix_length()
                buffer = old.new_empty(*old.shape[:-2], max(end, min(end + CACHE_ROOM, most)), old.shape[-1])
                buffer[..., :start, :] = old
            buffer[..., start:end, :] = new
            self.room[name] = buffer, buffer[..., :end, :]
            return self.room[name][1]

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            self.room = {}  # the old buffers go now, not at the next token

    class PrefixCache(DynamicCache):
        group = None  # (B,) of every row; place: (B,) of a row in its group; members: (Q, G) rows of a group, filled up with row 0

        def share(self, group):
            for layer in self.layers:  # contiguous, or every product with it would copy it first
                layer.prefix = layer.keys.contiguous(), layer.values.contiguous()
                layer.keys, layer.values, layer.is_initialized = None, None, False
            self._regroup(group)

        def _regroup(self, group):
            self.group, same = group, group[:, None] == group
            self.place = same.tril(-1).sum(1)
            self.members = group.new_zeros(int(group.max()) + 1, int(self.place.max()) + 1)
            self.members[group, self.place] = torch.arange(len(group), device=group.device)

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            if self.group is not None:
                kept, group = self.group[indices].unique(return_inverse=True)
                if len(kept) < len(self.members):
                    for layer in self.layers:
                        layer.prefix = tuple(shared[kept] for shared in layer.prefix)
                self._regroup(group)

    cache = PrefixCache(config=config)
    cache.layers = [PrefixLayer() for _ in cache.layers]
    return cache


def prefix_attention(module, query, key, value, attention_mask, scaling=None, *, cache, **kwargs):
    """Attention of rows (B, H, 1, D) to their group's prefix in `cache`, and to their own key and value (B, H or fewer, N, D):
    each part by itself, all rows of a group at once to its prefix, then merged by the log-sum-exp of their scores.

    Where rows have several queries (prompts that are read), some rows at a time see a copy of their prefix."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefix = cache.layers[module.layer_idx].prefix
    if not prefix:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (rows, heads, columns, width), (groups, most), length = key.shape, cache.members.shape, prefix[0].shape[2]
    if query.shape[2] > 1:
        outputs, size = [], max(COPIED // (length + columns), 1)
        for part in (slice(first, first + size) for first in range(0, rows, size)):
            whole = [torch.cat([shared[cache.group[part]], own[part]], 2) for shared, own in zip(prefix, (key, value))]
            outputs.append(sdpa_attention_forward(module, query[part], *whole, attention_mask[part], scaling=scaling, **kwargs)[0])
        return torch.cat(outputs), None
    scaling, query = scaling or width**-0.5, query.view(rows, heads, -1, width)  # heads that share keys: side by side, as queries
    shared_mask = own_mask = None
    if attention_mask is not None:
        shared_mask, own_mask = attention_mask[cache.members[:, 0], :, :, :length], attention_mask[..., length:]
    together = query[cache.members].transpose(1, 2).reshape(groups, heads, -1, width)
    shared, shared_weight = (x.view(groups, heads, most, -1, x.shape[-1])[cache.group, :, cache.place] for x in _scored(together, *prefix, shared_mask, scaling))
    own, own_weight = _scored(query, key, value, own_mask, scaling)
    return own.lerp(shared, (shared_weight - own_weight).sigmoid().to(own.dtype)).flatten(1, 2)[:, None], None


def _scored(query, key, value, mask, scaling):
    """-> (softmax(scaling * query key^T) value, the log-sum-exp of these scores in fp32)"""
    if query.is_cuda and query.dtype != torch.float32:  # never rounded to bf16
        scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32).unflatten(0, query.shape[:2]) * scaling
    else:
        scores = (query @ key.mT).float() * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)  # finite: a group without a prefix has weight 0, not nan
    weight = scores.logsumexp(-1, keepdim=True)
    return (scores - weight).exp().to(value.dtype) @ value, weight


def _cache_tokens(rows, groups, prefix, own):
    """-> (tokens in the cache of a batch with so many columns of prefix and of own, whether prefixes are stored once). They are
    where that saves a third of the cache; below, one attention is faster than two."""
    once, repeated = groups * prefix + rows * own, rows * (prefix + own)
    return (once, True) if 3 * once <= 2 * repeated else (repeated, False)


class Sampler:
    """Turns prompts into responses with `model.generate`: (prompts, limits, keys) -> list of response id lists.

    A response ends with its end token, unless its limit cut it. Of prompts that are equal or begin alike, what they have in
    common is prefilled once and stored once; rows are packed under `kv_tokens`, the tokens that the cache may hold, padding
    included; after every `segment` new tokens, finished rows leave the batch. Greedy where temperature is 0.

    model: a causal language model; end_ids, pad_id: its end tokens and any id for padding; seed, step: part of the noise's
    key, as are the keys given with every call; stop: None, or ids -> how many of them make a whole response that needs no
    end token, None while there is none (asked between segments); share: False for a model with other than plain full
    attention in every layer (state-space layers, sliding windows, soft caps): every batch is then one plain `generate`.
    """

    def __init__(self, model, end_ids, pad_id=0, *, temperature=1.0, top_p=1.0, kv_tokens=2**17, segment=32, seed=0, stop=None, share=True):
        self.model, self.end_ids, self.pad_id = model, sorted(end_ids), pad_id
        self.temperature, self.top_p, self.kv_tokens, self.segment = temperature, top_p, kv_tokens, segment
        self.seed, self.step, self.stop, self.share = seed, 0, stop, share
        self.prefill_tokens = self.decode_tokens = 0  # row-tokens that went through the model, padding included
        self.cache = None  # of the batch that is being sampled

    @torch.no_grad()
    def __call__(self, prompts, limits, keys):
        responses = [None] * len(prompts)
        with self._own_settings():
            for batch in self._batches(prompts, limits):
                self._generate(batch, prompts, limits, keys, responses)
        return responses

    @contextlib.contextmanager
    def _own_settings(self):
        """eval() (checkpointing and dropout spoil generation), our attention, and a fresh generation_config on the model itself:
        fields left unset in one that is passed to `generate` would be filled from the checkpoint's (top_k, repetition_penalty)."""
        from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        model = self.model
        shipped, training, attention = model.generation_config, model.training, model.config._attn_implementation
        try:
            model.generation_config = GenerationConfig(do_sample=False, eos_token_id=self.end_ids, pad_token_id=self.pad_id)
            model.eval()
            if self.share:
                AttentionInterface.register(ATTENTION, lambda *args, **kwargs: prefix_attention(*args, cache=self.cache, **kwargs))
                AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without one of that name, left padding would be ignored
                model.set_attn_implementation(ATTENTION)
            yield
        finally:
            if self.share:
                AttentionInterface.register(ATTENTION, sdpa_attention_forward)  # the registry would keep model and cache alive
                model.set_attn_implementation(attention)
            self.cache, model.generation_config = None, shipped
            model.train(training)

    def _batches(self, prompts, limits):
        """Groups -> batches of groups, longest first; what each puts into the cache stays within kv_tokens (one row always fits)."""
        def size(batch):  # -> (columns of the prefixes, columns that every row has of its own)
            rests, most = zip(*((len(prompts[i]) - n, limits[i]) for n, members in batch for i in members))
            return max(n for n, _ in batch), max(rests) + max(most)

        def fits(batch):
            counts = [len(members) for _, members in batch]
            tokens, once = _cache_tokens(sum(counts), len(counts), *size(batch))
            even = len(counts) * max(counts) <= 2 * sum(counts)  # attention to what is stored once fills all groups up to the largest
            return tokens <= self.kv_tokens and (even or not once)

        groups = shared_prefixes(prompts) if self.share else [(0, [i]) for i in range(len(prompts))]
        batches, batch = [], []
        for prefix, rows in sorted(groups, key=lambda group: (len(group[1]) == 1, -sum(size([group])))):
            if batch and not fits([*batch, (prefix, rows)]):
                batches.append(batch)
                batch = []
            if not batch:  # a group is split only when it is too large for a batch of its own
                columns = size([(prefix, rows)])
                most = next((n for n in range(len(rows), 1, -1) if _cache_tokens(n, 1, *columns)[0] <= self.kv_tokens), 1)
                parts = [(prefix, rows[first : first + most]) for first in range(0, len(rows), most)]
                batches += [[part] for part in parts[:-1]]
                rows = parts[-1][1]
            batch.append((prefix, rows))
        return [*batches, batch] if batch else batches

    def _prefill(self, batch, prompts, limits):
        """Columns are [pad | shared prefix][pad | the row's own rest]. -> rows, ids and mask (B, N); self.cache holds the prefixes."""
        device = self.model.device
        prefixes = [prompts[rows[0]][:length] for length, rows in batch]
        rows = [(i, group) for group, (_, members) in enumerate(batch) for i in members]
        rests = [prompts[i][batch[group][0] :] for i, group in rows]
        left, left_mask = _pad_left(prefixes, self.pad_id, device)
        right, right_mask = _pad_left(rests, self.pad_id, device)
        group = torch.tensor([group for _, group in rows], device=device)
        ids, mask = torch.cat([left[group], right], 1), torch.cat([left_mask[group], right_mask], 1)
        self.prefill_tokens += left.numel() + right.numel()
        own = right.shape[1] + max(limits[i] for i, _ in rows)
        self.cache = _prefix_cache(self.model.config, left.shape[1] + own) if self.share else None
        if left.shape[1]:
            self._fill(left, left_mask)
            if _cache_tokens(len(rows), len(batch), left.shape[1], own)[1]:
                self.cache.share(group)
            elif len(rows) > len(batch):
                self.cache.batch_select_indices(group)
        if self.share and ids.numel() * right.shape[1] > PREFILL:
            self._fill(ids[:, :-1], mask[:, :-1])
        return [i for i, _ in rows], ids, mask

    def _fill(self, ids, mask):
        """Runs the columns that the cache lacks, so many at a time that the attention mask stays small."""
        positions, size = (mask.cumsum(-1) - 1).clamp(min=0), max(PREFILL // ids.numel(), 1)
        for start in range(self.cache.get_seq_length(), ids.shape[1], size):
            end = min(start + size, ids.shape[1])
            self.model(ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=self.cache, logits_to_keep=1)

    def _generate(self, batch, prompts, limits, keys, responses):
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        rows, ids, mask = self._prefill(batch, prompts, limits)
        noise_keys = _row_keys([keys[i] for i in rows], self.seed, self.step).to(ids.device)
        start, done = ids.shape[1], 0  # column of the first new token; new tokens so far
        while rows:
            processors = LogitsProcessorList()
            if self.temperature and self.temperature != 1:
                processors.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.temperature and self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
            if self.temperature:
                processors.append(_Noise(noise_keys, done))
            left = max(limits[i] for i in rows) - done
            count = min(self.segment, left) if self.share else left
            ids = self.model.generate(
                ids, attention_mask=mask, past_key_values=self.cache, max_new_tokens=count, min_new_tokens=0,
                logits_processor=processors, use_cache=True,
                synced_gpus=False,  # no collective inside: ranks have different numbers of rows
            )  # fmt: skip
            self.decode_tokens += len(rows) * (ids.shape[1] - start - done)
            done = ids.shape[1] - start
            keep = []
            for row, (i, new) in enumerate(zip(rows, ids[:, start:].tolist())):
                end = next((n + 1 for n, token in enumerate(new[: limits[i]]) if token in self.end_ids), None)
                end = self.stop and self.stop(new[:end]) or end
                if end or done >= limits[i]:
                    responses[i] = new[: end or limits[i]]
                else:
                    keep.append(row)
            if len(keep) < len(rows) and keep:
                select = torch.tensor(keep, device=ids.device)
                self.cache.batch_select_indices(select)
                ids, mask, noise_keys = ids[select], mask[select], noise_keys[select]
            rows = [rows[row] for row in keep]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])], 1)


def _pad_left(sequences, pad_id, device):
    """Lists of ids -> ids (B, N) and mask (B, N), padded on the left."""
    width = max(map(len, sequences))
    ids = [[pad_id] * (width - len(s)) + list(s) for s in sequences]
    mask = [[0] * (width - len(s)) + [1] * len(s) for s in sequences]
    return (torch.tensor(rows, dtype=torch.long, device=device).view(len(sequences), width) for rows in (ids, mask))


if __name__ == "__main__":
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)  # fmt: skip
    sampler = Sampler(Qwen3ForCausalLM(config), end_ids=[0], segment=8)
    prompts, keys = [[5, 6, 7, 8]] * 4 + [[5, 6, 9]], [(0, i) for i in range(5)]
    print("groups:", shared_prefixes(prompts))
    together, alone = sampler(prompts, [20] * 5, keys), [sampler([p], [20], [k])[0] for p, k in zip(prompts, keys)]
    print(*together, sep="\n")
    print("the same, one by one:", together == alone)
