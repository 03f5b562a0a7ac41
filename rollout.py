"""Agents with a bounded memory, and the sampler that keeps all of them going in lock step.

An `Agent` asks for text and takes it. A sampler is any callable (prompts, limits, keys) -> list of
`Response`: `Sampler` is a language model behind Hugging Face `generate`; tests have scripted ones.
`rollout` joins the two and records every turn, so that training sees exactly the ids that were
sampled. Nothing is ever decoded and encoded again.

    python rollout.py            a demo: a random model samples, a Reader reads; offline, seconds

It imports none of its siblings: copy it as it is (torch 2.11 to 2.13, transformers 5.17 to 5.23).

Differences from the papers:
  1. The wording of the prompts is ours, and the final answer's prompt holds no section (the text of
     MemTrain says so; its printed template still shows one).
  2. `chunk_first` puts the section before the memory, so that all trajectories of a document share
     its keys and values.
  3. A token is drawn at a uniform number that is a function of (seed, step, document, trajectory,
     turn, position). A rollout does not depend on how rows were batched, cut into segments or
     divided over ranks, up to rounding, and there is no random state to save.

Letters in shapes: B rows, N columns, V vocabulary.
"""

import bisect
import contextlib
import functools
import hashlib
import re
from dataclasses import dataclass, field
from os.path import commonprefix  # of lists as well
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

# -------------------------------------------------------------------------------------- prompts

TAGS = ("problem", "memory", "section", "think", "search", "answer", "information")
FIELD = re.compile(r"(?<!\w)\{(\w+)\}")  # of a template; behind a letter braces are text
CLOSED = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)  # what ends a Searcher's turn
# how models open a thought, and how they close it; in harmony all but the final channel is one
OPENS = re.compile(r"<(\w+:)?think(ing)?>|\[THINK]|◁think▷|<\|START_THINKING\|>|<\|channel\|?>")
CLOSES = re.compile(
    r"</(\w+:)?think(ing)?>|\[/THINK]|◁/think▷|<\|END_THINKING\|>|<channel\|>"
    r"|<\|channel\|>final<\|message\|>"
)
NO_MEMORY = "No previous memory"
STRAGGLERS = 1 / 8  # of a batch's rows: the last ones, put off to end with those of others ..
WORTH = 32  # .. where a prompt has up to so many tokens for each that may be written
PREFILL = 2**28  # most elements of an attention mask (rows * new columns * all columns)

PROBLEM = """One entity was replaced by [MASK] everywhere in a long article. Judging by the whole \
article, which entity does [MASK] stand for?"""

# what the prompts are made of; tags on lines of their own
PROBLEM_BLOCK = "\n<problem>\n{problem}\n</problem>\n"
MEMORY_BLOCK = "\n<memory>\n{memory}\n</memory>\n"
SECTION_BLOCK = "\n<section>\n{section}\n</section>\n"

UPDATE = """You are reading a long article section by section, and only your memory passes from \
one section to the next. Read the section below and write the updated memory: keep what the old \
memory says that may still be needed, add what the section says that helps with the problem, \
and keep other facts (names, places, numbers, dates) that may be asked for later. Be concise, \
and write nothing but the memory.
"""
ANSWER = """You have read a long article section by section, and this memory is all that is \
left of it. Solve the problem from the memory, and put nothing but the final answer into \
\\boxed{}.
"""
RECALL = """Below are your memory of an article and one of its earlier sections, in which an \
entity was replaced by [TARGET]. Use the memory and the section to find out which entity \
[TARGET] stands for, and put nothing but that entity into \\boxed{}.
"""
WHOLE = """Read the article below, solve the problem from it, and put nothing but the final \
answer into \\boxed{}.
"""
SEARCH = """Answer the problem, which may hold several questions joined by semicolons. You may \
search an encyclopedia. In every turn write first, between <think> and </think>, a summary of \
all that you know so far and still need: only your last turn and its search results stay \
visible. Then write either one query between <search> and </search>, whose results will be \
shown between <information> and </information>, or, between <answer> and </answer>, the final \
answers in the order of the questions, joined by semicolons and as short as possible.
"""
CLOSED_BOOK = "Solve the problem, and put nothing but the final answer into \\boxed{}.\n"
YOUR_ANSWER = "\nYour answer:\n"
TURNS_LEFT = "\nTurns left: {turns}; the last one must answer.\n"

TEMPLATES = {
    "update": UPDATE + PROBLEM_BLOCK + MEMORY_BLOCK + SECTION_BLOCK + "\nUpdated memory:\n",
    "answer": ANSWER + PROBLEM_BLOCK + MEMORY_BLOCK + YOUR_ANSWER,
    "recall": RECALL + MEMORY_BLOCK + SECTION_BLOCK + YOUR_ANSWER,
    "whole": WHOLE + PROBLEM_BLOCK + SECTION_BLOCK + YOUR_ANSWER,
    "closed_book": CLOSED_BOOK + PROBLEM_BLOCK + YOUR_ANSWER,
    "search": SEARCH + PROBLEM_BLOCK + "{previous}" + TURNS_LEFT,
}


def structure_of(tokenizer):
    """The spellings that must not be forged: our tags, and added tokens that look like structure
    (`<|im_end|>`, `[INST]`, `</think>`). An added word ("Rome") or a pad token "0" is text."""
    tokens = [*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())]
    spellings = {token for token in tokens if re.search(r"[<\[\]{|].+[>\[\]}|]", token)}
    spellings |= {f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")}
    return spellings - {"[MASK]", "[TARGET]"}


def cleaner(tokenizer):
    """A function text -> text of the same length in which nothing can pass for structure.

    Every spelling of structure loses its first character to a look-alike; lone surrogates, which
    no tokenizer takes, become U+FFFD. The length stays, so that character spans stay valid.

    >>> from types import SimpleNamespace
    >>> tokens = dict(all_special_tokens=["<|im_end|>", "0"], added_tokens_decoder={})
    >>> clean = cleaner(SimpleNamespace(**tokens))
    >>> clean("a<|im_end|> <b> </memory> [MASK] 100")
    'a‹|im_end|> <b> ‹/memory> [MASK] 100'
    """
    # the first character of each, where the rest follows
    spellings = sorted(structure_of(tokenizer))
    forged = re.compile("|".join(f"{re.escape(x[0])}(?={re.escape(x[1:])})" for x in spellings))
    thoughts = re.compile(f"{OPENS.pattern}|{CLOSES.pattern}")

    def clean(text):
        text = thoughts.sub(lambda mark: "‹" + mark.group()[1:], forged.sub("‹", text))
        return re.sub("[\ud800-\udfff]", "\ufffd", text)

    return clean


def around(tokenizer, text, reply=None):
    """What the chat template puts before and after a user's message: (before, after). Thinking is
    off where it can be. After it comes the prompt for an answer, or what the assistant replies.

    ValueError where the template fails, or does not show the message as it is, once.
    """
    trouble = "it does not show the user's message as it is, once"
    # some templates want a message's content in parts
    for wrap in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        messages = [{"role": "user", "content": wrap(text)}]
        if reply is not None:
            messages.append({"role": "assistant", "content": wrap(reply)})
        try:
            chat = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply is None, enable_thinking=False
            )
        except Exception as error:  # a template is a program of somebody's: it may raise anything
            trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        # some templates strip it
        if chat.count(text.strip()) == 1:
            return chat.split(text.strip())
    raise ValueError(f"the tokenizer's chat template can't be used ({trouble}): mend the template")


def check_texts(texts):
    """ValueError where other wordings {name: text} are not of our templates, or of other fields."""
    for name, text in texts.items():
        if name not in TEMPLATES:
            raise ValueError(f"there is no template {name!r}: known are {', '.join(TEMPLATES)}")
        found, filled = sorted(FIELD.findall(text)), sorted(FIELD.findall(TEMPLATES[name]))
        if found != filled:
            known = f"what is filled is {filled}: name each of these once, and no others"
            raise ValueError(f"template {name!r} has the fields {found}, but {known}")


class Template:
    """A one-message conversation with fields: `template(memory=ids, section=ids)` -> token ids.

    The text goes through the chat template once; what stands between its fields is tokenised once,
    and what fills them is spliced in as ids. `len()` counts the ids without fields. A field is a
    word in braces; behind a letter braces are text (`\\boxed{answer}`).
    """

    def __init__(self, tokenizer, text):
        # other braces, of the chat template's system prompt, say, are text: hence markers
        pieces = FIELD.split(text)  # literal, field, literal, field, .., literal
        self.fields = pieces[1::2]
        pieces[1::2] = [f"(field-{name})" for name in self.fields]
        before, after = around(tokenizer, "".join(pieces))
        if "(field-" in before + after:
            raise ValueError("the tokenizer's chat template shows parts of the message twice")

        literals = pieces[0::2]
        literals[0] = before + literals[0].lstrip()
        literals[-1] = literals[-1].rstrip() + after
        self.literals = tokenizer(literals, add_special_tokens=False)["input_ids"]

    def __call__(self, **fields):
        ids = list(self.literals[0])
        for name, literal in zip(self.fields, self.literals[1:], strict=True):
            ids += fields[name] + literal
        return ids

    def __len__(self):
        return sum(map(len, self.literals))


class Prompts:
    """All that stands between text and token ids, for one tokenizer.

    A `Template` for every name of TEMPLATES: prompts.update, prompts.answer, ..; `texts` gives
    other wordings. order: "memory_first" (the papers') or "chunk_first". problem: MemTrain's fixed
    question. ends: ids that end a response. thinks: how a thought begins that can't be turned off.
    """

    def __init__(self, tokenizer, texts=None, problem=PROBLEM, order="memory_first"):
        check_texts(texts or {})
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token: set tokenizer.eos_token")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use an instruction-tuned model")
        self.tokenizer, self.clean = tokenizer, cleaner(tokenizer)
        swap = re.compile(r"(<memory>.*</memory>)(.*)(<section>.*</section>)", re.DOTALL)
        for name, text in (TEMPLATES | (texts or {})).items():
            if order == "chunk_first":
                text = swap.sub(r"\3\2\1", text)
            setattr(self, name, Template(tokenizer, text))
        self.problem, self.no_memory = self.encode(problem), self.encode(NO_MEMORY)
        around_results = ["\n<information>\n", "\n</information>"]
        self.information = tokenizer(around_results, add_special_tokens=False)["input_ids"]

        # a response ends as the chat template ends what an assistant says
        opened, said, end = around(tokenizer, "(question)")[1].rstrip(), "", ""
        with contextlib.suppress(ValueError):  # a template may show no assistant's message
            said, _, end = around(tokenizer, "(question)", "(reply)")[1].partition("(reply)")
        structure, added = structure_of(tokenizer), tokenizer.added_tokens_decoder.items()
        tokens = {token_id: token for token_id, token in added if str(token) in structure}
        ends = [i for i, token in tokens.items() if end.lstrip().startswith(str(token))]
        self.ends = {tokenizer.eos_token_id, *ends}

        # what is no text of a response; all_special_ids lacks special tokens without a role
        self.special_ids = self.ends | {i for i, token in tokens.items() if token.special}

        opening = OPENS.search(CLOSES.split(opened)[-1])
        if said.endswith("<|channel|>final<|message|>"):  # harmony: whatever the prompt ends in
            opening = OPENS.search(said)
        self.thinks = opening.group() if opening else None

    def encode(self, text):
        """Token ids of any text, made safe first."""
        return self.tokenizer(self.clean(text), add_special_tokens=False)["input_ids"]

    def plain(self, ids):
        """A response less its end token and whatever else is special: what may be spliced in."""
        return [i for i in ids if i not in self.special_ids]

    def text(self, ids):
        return self.tokenizer.decode(self.plain(ids))

    def spoken(self, ids):
        """The ids of a response behind its thought, if it has one; None where that never ends."""
        said = self.tokenizer.decode(ids)
        thoughts = len(CLOSES.findall(said))
        if thoughts:
            ids = ids[self.shortest(ids, lambda part: len(CLOSES.findall(part)) == thoughts) :]
        elif self.thinks:
            return None
        return None if OPENS.search(CLOSES.split(said)[-1]) else ids

    def closed(self, ids):
        """How many ids complete the first closing tag of a search or an answer; None without."""
        if not CLOSED.search(self.text(ids)):
            return None
        return self.shortest(ids, lambda said: CLOSED.search(said) is not None)

    def shortest(self, ids, holds):
        """How many ids it takes until their text `holds`, which more ids never undo."""
        lengths, decode = range(len(ids)), self.tokenizer.decode
        return bisect.bisect_left(lengths, True, key=lambda length: holds(decode(ids[:length])))


# --------------------------------------------------------------------------------------- agents


class Response(NamedTuple):
    """What a sampler gives for a prompt."""

    ids: list  # with the end token, where there is one
    truncated: bool = False  # the limit cut it before an end token
    logps: list = ()  # of every id, under the distribution that it was drawn from


class Turn(NamedTuple):
    """What the model saw and wrote: later one training sequence."""

    prompt_ids: list
    response_ids: list
    truncated: bool
    logps: list


class Agent:
    """The contract: `rollout` needs nothing else of an agent.

    key: the whole identity of its noise: (step, number of the document in it, trajectory, ..).
    turns: what it has done, a `Turn` each, filled by `rollout`: `receive` finds the new one there.
    query: a text to search for before the next turn, whose results go to `inform(passages)`.
    """

    query = None

    def __init__(self, key):
        self.key, self.turns = tuple(key), []

    def prompt(self):
        """-> (token ids, most new tokens), or None when the agent has finished."""
        raise NotImplementedError

    def receive(self, response_ids):
        """Takes the response to the last prompt."""
        raise NotImplementedError

    def stop(self, response_ids):
        """How many ids make a whole response although no end token came; None: all of them."""


class Reader(Agent):
    """Reads chunk after chunk into a memory, then answers from the memory alone: MemTrain's
    end-to-end task (sections 3.1, 3.3) and MemAgent's long-text QA.

    problem: ids; chunks: list of ids. memories[t] is the memory after turn t, memories[0] the
    empty one; `answer` the text of the last response, None before. A thought is neither of them;
    one that never ends leaves the memory as it was.
    """

    def __init__(self, prompts, problem, chunks, memory_tokens, answer_tokens, key):
        super().__init__(key)
        self.prompts, self.problem, self.chunks = prompts, problem, chunks
        self.memory_tokens, self.answer_tokens = memory_tokens, answer_tokens
        self.memories, self.answer = [prompts.no_memory], None

    def prompt(self):
        memory, chunks_read = self.memories[-1], len(self.memories) - 1
        if chunks_read < len(self.chunks):
            section = self.chunks[chunks_read]
            ids = self.prompts.update(problem=self.problem, memory=memory, section=section)
            return ids, self.memory_tokens
        if self.answer is None:
            return self.prompts.answer(problem=self.problem, memory=memory), self.answer_tokens
        return None

    def receive(self, response_ids):
        spoken = self.prompts.spoken(response_ids)
        if len(self.memories) > len(self.chunks):
            self.answer = self.prompts.text(spoken or [])
        elif spoken is None:
            self.memories.append(self.memories[-1])
        else:
            self.memories.append(self.prompts.plain(spoken))  # all of it is the memory


class Asker(Agent):
    """One prompt, one answer: the base of a Recaller, and reading in one context window."""

    def __init__(self, prompts, ids, answer_tokens, key):
        super().__init__(key)
        self.prompts, self.ids, self.answer_tokens = prompts, ids, answer_tokens
        self.answer = None

    def prompt(self):
        return (self.ids, self.answer_tokens) if self.answer is None else None

    def receive(self, response_ids):
        self.answer = self.prompts.text(self.prompts.spoken(response_ids) or [])


class Recaller(Asker):
    """Names the entity hidden as [TARGET] in an earlier section, from a memory (section 3.3)."""

    def __init__(self, prompts, memory, section, answer_tokens, key):
        ids = prompts.recall(memory=memory, section=section)
        super().__init__(prompts, ids, answer_tokens, key)


class Searcher(Agent):
    """Answers questions by searching; of the past it sees its last turn and that turn's results
    (MEM1, section 3). result_tokens: results are cut to this.

    `answer` is the text between the answer tags, None without one; `malformed`: a turn closed
    neither tag, which ends the episode; `searches`: queries that got results so far.
    """

    def __init__(self, prompts, problem, turns, answer_tokens, result_tokens, key):
        super().__init__(key)
        self.prompts, self.problem, self.turns_left = prompts, problem, turns
        self.answer_tokens, self.result_tokens = answer_tokens, result_tokens
        self.previous, self.answer, self.malformed, self.searches = [], None, False, 0

    def prompt(self):
        if self.turns_left == 0 or self.answer is not None or self.malformed:
            return None
        turns = self.prompts.encode(str(self.turns_left))
        ids = self.prompts.search(problem=self.problem, previous=self.previous, turns=turns)
        return ids, self.answer_tokens

    def stop(self, response_ids):
        return self.prompts.closed(response_ids)

    def receive(self, response_ids):
        self.turns_left -= 1
        self.previous = self.prompts.plain(response_ids)
        closed = CLOSED.search(self.prompts.text(response_ids))
        if closed is None:
            self.malformed = True
        elif closed[1] == "answer":
            self.answer = closed[2].strip()
        elif self.turns_left:
            self.query = closed[2].strip()

    def inform(self, passages):
        """Results of the query: list of {"title", "text"}."""
        shown = "Passage {} (title: {title}) {text}"
        lines = [shown.format(number, **passage) for number, passage in enumerate(passages, 1)]
        results = self.prompts.encode("\n".join(lines) or "nothing found")[: self.result_tokens]
        before, after = self.prompts.information
        self.previous = [*self.previous, *before, *results, *after]
        self.query = None
        self.searches += 1


def rollout(agents, sampler, search=None):
    """Runs all agents to their end, each turn of all of them in one call; fills `agent.turns`.

    sampler: (prompts, limits, keys) -> list of `Response`, a key being the agent's and its turn.
    search: list of queries -> list of lists of passages.
    ValueError where two agents have the same key, and so would draw the same noise.
    """
    if len({agent.key for agent in agents}) < len(agents):
        raise ValueError("two agents have the same key: give each its own (step, document, ..)")
    while True:
        # one call of the sampler for all agents that have not finished
        prompts = [(agent, agent.prompt()) for agent in agents]
        waiting = [(agent, *prompt) for agent, prompt in prompts if prompt is not None]
        if not waiting:
            return agents
        asked, prompts, limits = map(list, zip(*waiting))
        keys = [(*agent.key, len(agent.turns)) for agent in asked]
        responses = sampler(prompts, limits, keys)

        # hand the responses back, and record what was seen and written
        for agent, prompt, response in zip(asked, prompts, responses, strict=True):
            end = agent.stop(response.ids)
            ids, truncated = response.ids[:end], response.truncated and end is None
            agent.turns.append(Turn(prompt, ids, truncated, response.logps[:end]))
            agent.receive(ids)

        # serve the searches of this turn in one batch
        searching = [agent for agent in asked if agent.query is not None]
        if searching:
            results = search([agent.query for agent in searching])
            for agent, passages in zip(searching, results, strict=True):
                agent.inform(passages)


# ------------------------------------------------------------------------------------- sampling


def uniform_noise(key, count):
    """The first `count` of endless numbers in [0, 1) that a key, a tuple, determines."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"))  # counter-based
    return np.random.Generator(philox).random(count)


class Draw:
    """A logits processor that draws the next token of every row: the one at which the cumulative
    distribution passes the row's uniform number, (B, positions); greedy where that is None. `logps`
    collects what was drawn at, (B,) a position."""

    def __init__(self, uniform):
        self.uniform, self.logps = uniform, []

    def __call__(self, input_ids, scores):
        probabilities = scores.float().softmax(-1)  # (B, V)
        if self.uniform is None:
            token = probabilities.argmax(-1, keepdim=True)  # (B, 1)
        else:
            cumulative = probabilities.cumsum(-1, dtype=torch.float64)
            number = self.uniform[:, len(self.logps), None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, number, right=True)
            token = token.clamp(max=scores.shape[-1] - 1)
        self.logps.append(probabilities.gather(-1, token)[:, 0].log())
        # `generate` takes the largest score: leave it no choice
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def shared_prefixes(prompts):
    """Groups prompts that begin alike: list of (prefix length, indices).

    Neighbours in sorted order join where they share at least half of a prompt, and where that
    leaves fewer tokens to run. (The same as in grpo.py, so that either file can be copied alone.)
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


def context_of(model):
    """The tokens of a model's window, within which what it computes of a token stays the same: RoPE
    that depends on the length of the batch (longrope, dynamic) holds up to its original one. YaRN's
    factor counts."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 2**62  # state-space models
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or context
    if rope.get("rope_type") in ("longrope", "dynamic"):
        return min(original, context)
    if rope.get("rope_type") == "yarn":
        return max(context, int((rope.get("factor") or 1) * original))
    return context


@dataclass
class Row:
    """A prompt on its way to its response."""

    prompt: list
    limit: int
    key: tuple
    ids: list = field(default_factory=list)  # what is written so far ..
    logps: list = field(default_factory=list)  # .. and what it was drawn at
    truncated: bool = False

    @property
    def left(self):
        return self.limit - len(self.ids)


class Sampler:
    """Turns prompts into responses with `model.generate`: (prompts, limits, keys) -> `Response`s.

    What prompts have in common is read once; rows are packed under `kv_tokens`, the tokens that the
    cache may hold, padding included; after every `segment` new tokens, finished rows leave the
    batch, and the last ones of several batches end together. Greedy where temperature is 0.
    ValueError where a turn outgrows the model's context.

    model: a causal language model. seed: part of all noise, with the keys given in every call.
    stop: None, or what agents have as their own `stop`, so that such rows leave at once.
    share: False for a model with other than plain full attention in every layer (state-space
    layers, sliding windows, soft caps, ALiBi): every batch is then one plain `generate`.
    """

    def __init__(
        self, model, end_ids, *, temperature=1.0, top_p=1.0, kv_tokens=2**17, segment=32,
        seed=0, stop=None, share=True,
    ):  # fmt: skip
        from transformers import __version__ as version

        self.model, self.end_ids = model, sorted(end_ids)
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.kv_tokens, self.segment, self.stop, self.share = kv_tokens, segment, stop, share
        self.context = context_of(model)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length of the cache
        if tuple(map(int, version.split(".")[:2])) < (5, 17):  # shared prefixes are read wrongly
            raise ImportError(f"transformers {version}: 5.17 or later is needed")

    @torch.no_grad()
    def __call__(self, prompts, limits, keys):
        from transformers import GenerationConfig

        longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
        if longest > self.context:
            raise ValueError(f"a turn of {longest} tokens outgrows the model's {self.context}")

        # eval(): checkpointing spoils generation. The settings are the model's own ones for now:
        # what a config passed to `generate` leaves unset (top_k, repetition_penalty) would be
        # filled from those that came with the checkpoint.
        model, shipped, training = self.model, self.model.generation_config, self.model.training
        model.generation_config = GenerationConfig(
            eos_token_id=self.end_ids,
            pad_token_id=0,  # any id: padding is masked wherever it stands
            # on CUDA a StaticCache would let `generate` compile by itself, into CUDA graphs, which
            # remember where weights lie: sharded ones are gathered somewhere else in every step
            disable_compile=True,
        )
        model.eval()
        rows = [Row(*row) for row in zip(prompts, limits, keys, strict=True)]
        waiting = rows
        try:
            while waiting:
                # the last rows of several batches end together, if to read their prompts again
                # is not more than to wait for them
                worth = all(len(row.prompt) <= WORTH * row.limit for row in waiting)
                batches, waiting = list(self._batches(waiting)), []
                put_off = STRAGGLERS if self.share and worth and len(batches) > 1 else 0
                for batch in batches:
                    waiting += self._sample(batch, few=put_off * len(batch))
        finally:
            model.generation_config = shipped
            model.train(training)
        return [Response(row.ids, row.truncated, row.logps) for row in rows]

    def _batches(self, rows):
        """Lists of (prefix, rest, row), longest first. What a batch puts into the cache, rows *
        columns, stays within kv_tokens; one row always fits."""
        texts = [row.prompt + row.ids for row in rows]
        groups = shared_prefixes(texts) if self.share else [(0, [i]) for i in range(len(rows))]
        groups.sort(key=lambda group: -len(texts[group[1][0]]) - rows[group[1][0]].left)
        batch, widths = [], (0, 0, 0)
        for prefix, members in groups:
            for i in members:
                # the longest prefix, the longest rest, the most new tokens
                own = (prefix, len(texts[i]) - prefix, rows[i].left)
                widths = tuple(map(max, widths, own))
                if batch and (len(batch) + 1) * columns_of(*widths) > self.kv_tokens:
                    yield batch
                    batch, widths = [], own
                batch.append((texts[i][:prefix], texts[i][prefix:], rows[i]))
        if batch:
            yield batch

    def _read(self, batch, new_tokens):
        """-> ids (B, N), mask (B, N), and a cache of all but the last column, with room for more.

        Columns are [pad | common prefix][pad | the row's own rest][new tokens]."""
        from transformers import DynamicCache, StaticCache

        prefixes, group = [], []  # group (B,): of a row, its prefix
        for prefix, _, _ in batch:
            if prefix not in prefixes[-1:]:
                prefixes.append(prefix)
            group.append(len(prefixes) - 1)
        group = torch.tensor(group, device=self.model.device)
        prefix_ids, prefix_mask = pad_left(prefixes, self.model.device)
        rest_ids, rest_mask = pad_left([rest for _, rest, _ in batch], self.model.device)
        ids = torch.cat([prefix_ids[group], rest_ids], 1)
        mask = torch.cat([prefix_mask[group], rest_mask], 1)
        if not self.share:
            return ids, mask, None

        # every prefix is read once, and copied into the rows that begin with it ..
        columns = columns_of(ids.shape[1], new_tokens)
        cache = StaticCache(config=self.model.config, max_cache_len=columns)
        if prefix_ids.shape[1]:
            once = DynamicCache(config=self.model.config)
            self._fill(once, prefix_ids, prefix_mask, prefix_ids.shape[1])
            for layer, read in zip(cache.layers, once.layers, strict=True):
                layer.update(read.keys[group], read.values[group])
                read.keys = read.values = None  # or the memory would hold both
        # .. then the rests, but for the last token
        self._fill(cache, ids[:, :-1], mask[:, :-1], columns)
        return ids, mask, cache

    def _fill(self, cache, ids, mask, columns):
        """Reads what the cache does not hold yet, in pieces whose attention mask has up to PREFILL
        elements."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        piece = max(PREFILL // (len(ids) * columns), 1)
        for start in range(int(cache.get_seq_length()), ids.shape[1], piece):
            end = start + piece
            self.model(
                ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache,
                position_ids=positions[:, start:end], logits_to_keep=1,
            )  # fmt: skip

    def _sample(self, batch, few):
        """Writes on until all rows of a batch but a few have their responses. -> those few"""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        rows = [row for _, _, row in batch]
        most = max(row.left for row in rows)
        ids, mask, cache = self._read(batch, most)

        # noise (B, most new tokens), temperature and top_p
        uniform, warpers = None, []
        if self.temperature:
            counts = [len(row.ids) + most for row in rows]
            noise = [uniform_noise((self.seed, *row.key), n) for row, n in zip(rows, counts)]
            noise = np.stack([numbers[-most:] for numbers in noise])
            uniform = torch.from_numpy(noise).to(ids.device)
        if self.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.temperature and self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))

        while len(rows) > few:
            # a segment of new tokens for all rows
            start, left = ids.shape[1], max(row.left for row in rows)
            segment = min(self.segment, left) if self.share else left
            draw = Draw(uniform)
            ids = self.model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=segment,
                logits_processor=LogitsProcessorList([*warpers, draw]),
                synced_gpus=False,  # no collective inside: ranks have different numbers of rows
            )  # fmt: skip
            drawn = torch.stack(draw.logps, 1)  # (B, new tokens)
            mask = torch.cat([mask, mask.new_ones(drawn.shape)], 1)
            uniform = None if uniform is None else uniform[:, drawn.shape[1] :]
            for row, new, logps in zip(rows, ids[:, start:].tolist(), drawn.tolist()):
                row.ids, row.logps = row.ids + new, row.logps + logps

            # those whose response is complete leave
            going = [n for n, row in enumerate(rows) if not self._finish(row)]
            if len(going) < len(rows):
                keep = torch.tensor(going, dtype=torch.long, device=ids.device)
                for layer in cache.layers if cache and going else []:
                    layer.keys, layer.values = layer.keys[keep], layer.values[keep]
                ids, mask = ids[keep], mask[keep]
                uniform = None if uniform is None else uniform[keep]
                rows = [rows[n] for n in going]
        return rows

    def _finish(self, row):
        """Cuts a row where its response ends. -> whether it does"""
        ids = row.ids[: row.limit]
        ends = [n for n, token in enumerate(ids, 1) if token in self.end_ids]
        length = ends[0] if ends else len(ids)
        stopped = self.stop(ids[:length]) if self.stop else None
        ended = bool(stopped or ends)
        if not ended and len(ids) < row.limit:
            return False
        row.ids, row.logps = row.ids[: stopped or length], row.logps[: stopped or length]
        row.truncated = not ended
        return True


def columns_of(*widths):
    """Columns of a cache for these: in eights, or attention on a GPU would pad its mask in every
    layer and step."""
    return -(-sum(widths) // 8) * 8


def pad_left(sequences, device):
    """Lists of ids -> ids (B, N) and mask (B, N), padded on the left."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows).to(device), pad([torch.ones_like(row) for row in rows]).to(device)


# ----------------------------------------------------------------------------------------- demo


def demo():
    """Samples together and one by one, on a random model: the responses are the same."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, head_dim=8, vocab_size=64)
    layers = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    sampler = Sampler(Qwen3ForCausalLM(Qwen3Config(**sizes, **layers)), end_ids=[0], segment=8)
    prompts, keys = [[5, 6, 7, 8]] * 4 + [[5, 6, 9]], [(0, i) for i in range(5)]
    together = sampler(prompts, [20] * 5, keys)
    alone = [sampler([prompt], [20], [key])[0] for prompt, key in zip(prompts, keys)]
    assert [response.ids for response in together] == [response.ids for response in alone]
    print("the same together as one by one:", *[response.ids for response in alone], sep="\n")


def demo_reader():
    """A Reader reads two sections, then answers; what it writes is a script's, not a model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

    prompts = Prompts(tokenizer)
    chunks = [prompts.encode("Ann built a mill. "), prompts.encode("Bob bought it in 1811.")]
    script = iter(["Ann built a mill.", "Ann's mill is Bob's since 1811.", "\\boxed{Bob}"])
    reader = Reader(prompts, prompts.encode("Who owns the mill?"), chunks, 64, 64, key=(0,))
    rollout([reader], lambda asked, limits, keys: [Response(prompts.encode(next(script)))])
    for number, turn in enumerate(reader.turns, 1):
        print(f"\n==== turn {number}\n{prompts.text(turn.prompt_ids)}")
        print(f"---- wrote\n{prompts.text(turn.response_ids)}")


if __name__ == "__main__":
    demo()
    demo_reader()
