"""The pocket world: a made-up encyclopedia and a small model that has read it, to download nothing.

    python tiny.py               makes cache/tiny: model, documents, questions, a search corpus
    python tiny.py show          one masked document, and the oracle's way through it

Every fact is three words: `Brin sells wool`. 25 cities have 4 attributes of 5 values each, such
that one clue leaves five cities and any two clues leave one. These facts never change: they are the
encyclopedia, which the warm start puts into the model. What is said of people is drawn anew for
every document: nothing but memory can answer for it.

A masked document hides one city, with two clues in different chunks, among facts about people
and other cities. The placeholder is a name: the city goes by that of a person who is not in the
document, another one in every document, and the document's own question tells whom it is about:
`Ada is what ?`. Whatever is said of the hidden city is said of people, too: only the question tells
what to keep. That is the skill to be learnt here, and it serves any question: those about long
texts ask for what was said of a person (`Ben sells what ?`), and MemTrain trains on none of them.

The oracle stands in the sampler's place in `rollout`: it reads a prompt and writes the response of
a model that copies without errors. What it has in memory about the one asked for it always carries
on; but a new fact it takes up with chance 0.5, whatever it is about (ASKED, OTHERS). Before it
answers it says what it knows of the one asked for. The warm start ends with fine-tuning on the
turns that it leaves behind. Its coin is the weakness on purpose: a policy that drifts under noise,
or is merely sampled more sharply, gains nothing by it, so that a rising curve means that the reward
was understood (train.py --shuffle_rewards shows it).

How it differs from real data:
  1. Every word is one token, every fact three; chunks of two facts never cut one.
  2. Entities are known, not recognised: cities and objects, each with its exact span.
  3. Prompts are a few words long, since the model has never read anything else.
  4. Instead of [MASK] a person's name stands for what is hidden, and a document has its question.
  5. The trajectories of a document share one recall; post-training makes one update a step.

train.py and eval.py import nothing of this file. What connects them is the folder that it makes,
and in it model/memtrain.json, which holds the prompts, the sizes and where the data lies.
"""

import argparse
import json
import random
import re
import statistics
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

import data
import distributed
import train
from data import MASK, TARGET
from rollout import NO_MEMORY, TAGS, Prompts, Response, Template

# ------------------------------------------------------------------------------------- the world

FACT = 3  # tokens of a fact: subject, verb, object
FACTS_PER_CHUNK = 2
CHUNKS = 6  # of a document that is trained on
ROOM = 6  # facts that a memory holds
HINTS = 2  # facts of a document about the one whom its question names, no two in one chunk

CITIES = (
    "Alda Brin Cora Dorn Elva Farn Gora Hest Irra Jund Kolm Lira Morn Nava Orsk Pell Quen Rhun "
    "Sarn Tarn Ulma Varn Welm Yarn Zell"
).split()
PEOPLE = (
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo June Kai Lea Max Nora Omar Pia Rosa Sam Tess Uma Vera "
    "Will Xena Zoe Amy Bob Carl Dora Emma Fred Gina Hugo Ida Jack Kim Lars Mia Ned Olga Paul Rita "
    "Seth Tim Ursa Vic Wanda Yves Zach"
).split()
CLUES = {  # verb: the values of a city's attribute
    "sells": "wool salt silver glass silk".split(),
    "grows": "barley rye oats flax hops".split(),
    "honours": "bear wolf stag swan hawk".split(),
    "faces": "river sea marsh hills desert".split(),
}
HABITS = {  # verb: what is said of a person, a city's values among them
    "sells": [*CLUES["sells"], *"tea figs honey cheese bread".split()],
    "grows": [*CLUES["grows"], *"beans leeks olives plums kale".split()],
    "honours": [*CLUES["honours"], *"horse goat lynx otter crane".split()],
    "faces": [*CLUES["faces"], *"woods lakes plains cliffs dunes".split()],
}
VERBS = list(CLUES)
SUBJECTS = [*CITIES, *PEOPLE]
THINGS = sum(HABITS.values(), [])
ENTITIES = {*CITIES, *THINGS}  # what recalls hide: of 48 people a guess would hardly be right

# city (r, c) of a 5 x 5 grid has the values r, c, r + c and r + 2c (mod 5): any two tell r and c
ENCYCLOPEDIA = {}  # city: {verb: value}
KNOWN = []  # the same as facts [city, verb, value]
for number, city in enumerate(CITIES):
    r, c = divmod(number, 5)
    places = (r, c, (r + c) % 5, (r + 2 * c) % 5)
    ENCYCLOPEDIA[city] = {verb: CLUES[verb][place] for verb, place in zip(CLUES, places)}
    KNOWN += [[city, verb, thing] for verb, thing in ENCYCLOPEDIA[city].items()]

PROBLEM = f"{MASK} is what ?"  # of a document without a question of its own
TEMPLATES = {
    "update": "update <problem> {problem} </problem> <memory> {memory} </memory> "
    "<section> {section} </section>",
    "answer": "answer <problem> {problem} </problem> <memory> {memory} </memory>",
    "recall": "recall <memory> {memory} </memory> <section> {section} </section>",
    "whole": "answer <problem> {problem} </problem> <section> {section} </section>",
    "closed_book": "answer <problem> {problem} </problem>",
    "search": "find <problem> {problem} </problem> {previous} {turns} turns left",
}
QUOTE = "quote <section> {section} </section> <problem> {problem} </problem>"  # an exercise
KIND = 2  # where a prompt's first word stands: behind `<|im_start|> user`
SETTINGS = dict(  # defaults for train.py's flags
    steps=40, documents_per_step=32, documents_per_update=32, recall_draw="document",
    chunk_tokens=FACTS_PER_CHUNK * FACT, memory_tokens=ROOM * FACT + 1,  # 1: the end token
    answer_tokens=12,
    lr=3e-4, kl=1e-2, warmup_steps=3, beta2=0.98, eval_every=0, gradient_checkpointing=False,
)  # fmt: skip
SEARCH_SETTINGS = dict(aggregate="sequence", answer_tokens=24)
LENGTHS = {1: 256, 2: 256, 4: 256, 8: 128, 16: 128}  # {length in trained texts: questions held out}
QA_STEPS = 12  # of post-training
LABELLED = 64  # questions to train on: labels are scarce, texts are not
DOCUMENTS = 4096  # to train on: 128 steps see none of them twice
WARM_STEPS = 3200  # of binding, of quoting, and of imitation, at most
FALL = 250, 650  # steps of imitation over which the learning rate falls; then a new round begins
TOLD = 1 / 8  # share of the practised recalls whose memory tells what is hidden
WEIGHTS = {"update": 2, "quote": 4, "answer": 2, "recall": 1, "find": 1}  # of kinds of prompts
GOALS = {"verb": 0.98, "object": 0.98, "quote": 0.9, "answer": 0.9}  # it ends with these `skills`

# --------------------------------------------------------------------------- tokenizer and model

CHAT = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORD = r"<\|\w+\|>|</?[a-z]+>|\\boxed\{|\[[A-Z]+\]|\w+|[^\w\s]"


def words():
    """The vocabulary, in the order of ids: every word that the world or a prompt uses."""
    structure = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "\\boxed{", "}"]
    for tag in TAGS:
        structure += [f"<{tag}>", f"</{tag}>"]
    prompts = " ".join(
        [PROBLEM, *TEMPLATES.values(), QUOTE, NO_MEMORY, TARGET, "user assistant"]
    )
    prompts = re.sub(r"\{\w+\}", " ", prompts).split()
    search = "; Passage ( title : ) nothing found 0 1 2 3 4 5 6 7 8 9".split()
    facts = [*SUBJECTS, *VERBS, *THINGS]
    return list(dict.fromkeys([*structure, *prompts, *search, *facts]))


VOCABULARY = words()
ID = {word: i for i, word in enumerate(VOCABULARY)}


def tokenizer():
    """A PreTrainedTokenizerFast with one id a word; tags, `\\boxed{` and `}` are words as well."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def model(seed=0):
    """A randomly initialised Qwen3ForCausalLM of 185,024 parameters.

    A head matches content in the slow dimensions of RoPE, and finds positions in the fast ones: 32
    dimensions a head and a large theta leave enough of both.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True,
        attention_bias=True, max_position_embeddings=4096, initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=ID["<|im_end|>"], pad_token_id=ID["<pad>"], bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


# ----------------------------------------------------------------------- documents and questions
# A fact is [subject, verb, object]. A seed is anything that can be printed: row i of a function
# depends on (seed, i, chunks) alone.


def documents(count, seed, chunks=CHUNKS):
    """Rows as data.py's masked documents, each with its own question. A city goes by the name of a
    person; two of its facts, the clues, stand in different chunks."""
    rows = []
    for i in range(count):
        rng = random.Random(f"document {seed} {i} {chunks}")
        city, name = rng.choice(CITIES), rng.choice(PEOPLE)
        verbs = rng.sample(VERBS, HINTS)
        clues = [[name, verb, ENCYCLOPEDIA[city][verb]] for verb in verbs]
        text = write(arrange(clues, chunks, rng, without=city))
        found = re.finditer(r"\w+", text)
        spans = [list(word.span()) for word in found if word.group() in ENTITIES]
        row = {"id": f"{seed} {i}", "text": text, "answer": city, "entities": spans}
        rows.append(row | {"question": f"{name} is what ?"})
    return rows


def questions(count, seed, chunks=CHUNKS):
    """Questions about long texts: {"id", "question", "answers", "context"}. The person has two
    facts in the context, one of which is asked for."""
    rows = []
    for i in range(count):
        rng = random.Random(f"question {seed} {i} {chunks}")
        person, verbs = rng.choice(PEOPLE), rng.sample(VERBS, HINTS)
        facts = [[person, verb, rng.choice(HABITS[verb])] for verb in verbs]
        context = write(arrange(facts, chunks, rng))
        rows.append(ask(facts[0], f"{seed} {i}", context))
    return rows


def ask(fact, row_id, context=""):
    """The question for the last word of a fact."""
    subject, verb, thing = fact
    asked = f"{subject} {verb} what ?"
    return {"id": row_id, "question": asked, "answers": [thing], "context": context}


def arrange(hints, chunks, rng, without=None):
    """The facts of a document, in order: `hints`, all of one subject and each in another chunk,
    among facts about other people and, one in ten, about cities, none of them `without`. There are
    enough for 105 chunks."""
    # a person and a verb come once at most, so that nobody contradicts himself
    pairs = [(who, verb) for who in PEOPLE for verb in VERBS if who != hints[0][0]]
    rng.shuffle(pairs)
    habits = [[who, verb, rng.choice(HABITS[verb])] for who, verb in pairs]
    known = [fact for fact in KNOWN if fact[0] != without]
    rng.shuffle(known)

    count = chunks * FACTS_PER_CHUNK - len(hints)
    others = known[: count // 10] + habits[: count - count // 10]
    rng.shuffle(others)

    # chunk by chunk
    facts, places = [], rng.sample(range(chunks), len(hints))
    for chunk in range(chunks):
        part = [hint for hint, place in zip(hints, places) if place == chunk]
        while len(part) < FACTS_PER_CHUNK:
            part.append(others.pop())
        rng.shuffle(part)
        facts += part
    return facts


def write(facts):
    """Facts -> text, a line each."""
    return "\n".join(" ".join(fact) for fact in facts)


def read(text):
    """The whole facts of a list of words, in order, each once.

    >>> read("tea Ada sells tea Ben grows".split())
    [['Ada', 'sells', 'tea']]
    """
    facts, subjects, things = [], {*SUBJECTS, TARGET}, {*THINGS, TARGET}
    for i in range(len(text) - FACT + 1):
        fact = text[i : i + FACT]
        if fact[0] in subjects and fact[1] in VERBS and fact[2] in things and fact not in facts:
            facts.append(fact)
    return facts


def passages(seed):
    """A search corpus, all habits of all people: [{"id", "title", "text"}], two facts a passage."""
    rng = random.Random(f"passages {seed}")
    rows = []
    for person in PEOPLE:
        habits = [[person, verb, rng.choice(things)] for verb, things in HABITS.items()]
        rng.shuffle(habits)
        for i in range(0, len(habits), 2):
            text = write(habits[i : i + 2])
            rows.append({"id": str(len(rows)), "title": person, "text": text})
    return rows


def search_questions(count, seed, part="train"):
    """Questions about facts of passages(seed): {"id", "question", "answers", "context": ""}. A
    quarter of the facts is asked for by part "heldout", and never by part "train"."""
    facts = []
    for row in passages(seed):
        facts += read(row["text"].split())
    random.Random(f"part {seed}").shuffle(facts)
    fourth = len(facts) // 4
    facts = facts[:fourth] if part == "heldout" else facts[fourth:]
    rng = random.Random(f"search {part} {seed}")
    return [ask(rng.choice(facts), f"{part} {seed} {i}") for i in range(count)]


# ------------------------------------------------------------------------------------ the oracle

# the chances that a fact of the section is taken up, and that one of the memory is carried on
ASKED = 0.5, 1  # .. if it is about the one whom the problem names
OTHERS = 0.5, 0.5  # .. if it is about others
KEEP_FOUND = 0.8  # how probably a search carries over a fact that it was asked for


def oracle(prompts, limits, keys):
    """A sampler: (prompts, limits, keys) -> `Response`s, each a function of its prompt, limit and
    key."""
    responses = []
    for prompt, limit, key in zip(prompts, limits, keys):
        rng = random.Random(f"oracle {key} {prompt}")
        text = [VOCABULARY[i] for i in prompt]
        kind = text[KIND]
        problem, memory, section = (block(text, tag) for tag in ("problem", "memory", "section"))
        if kind == "find":
            response = search(text, problem, rng)
        elif kind == "quote":
            response = sum(about(problem, section), [])
        elif kind == "recall":
            response = ["\\boxed{", recall(memory, section, rng), "}"]
        elif kind == "answer":
            known = memory or section or []  # from memory, from the whole text, or from no text
            said = sum(about(problem, known), [])
            response = [*said, "\\boxed{", answer(problem, known, rng), "}"]
        else:
            response = update(problem, memory, section, (limit - 1) // FACT, rng)
        ids = [ID[word] for word in response[: limit - 1]]
        responses.append(Response([*ids, ID["<|im_end|>"]]))
    return responses


def block(text, tag):
    """What stands between <tag> and </tag> in a list of words; None without such tags."""
    if f"<{tag}>" not in text:
        return None
    start = text.index(f"<{tag}>") + 1
    return text[start : text.index(f"</{tag}>", start)]


def update(problem, memory, section, room, rng, asked=ASKED, others=OTHERS):
    """The next memory: old facts, then new ones, each by chance; of too many any are dropped."""
    old, facts = read(memory), []
    new = [fact for fact in read(section) if fact not in old]
    for fact in old + new:
        take, carry = asked if fact[0] == problem[0] else others
        if rng.random() < (take if fact in new else carry):
            facts.append(fact)
    kept = sorted(rng.sample(range(len(facts)), min(room, len(facts))))
    return sum((facts[i] for i in kept), [])


def about(problem, text):
    """The facts of a list of words about the one whom the problem names."""
    return [fact for fact in read(text) if fact[0] == problem[0]]


def answer(problem, memory, rng):
    """What memory and encyclopedia say, else a guess among what they leave open."""
    facts = about(problem, memory)
    if problem[1] == "is":
        clues = {(verb, thing) for _, verb, thing in facts}
        fits = [city for city in CITIES if clues <= {*ENCYCLOPEDIA[city].items()}]
        return rng.choice(fits or CITIES)
    for fact in facts:
        if fact[:2] == problem[:2]:
            return fact[2]
    return rng.choice(HABITS[problem[1]])


def recall(memory, section, rng):
    """The hidden entity: from a fact of the memory that agrees in the other two words, else from
    the encyclopedia, else a guess."""
    hidden = [fact for fact in read(section) if TARGET in fact]
    for known in (read(memory), KNOWN):
        for fact in hidden:
            gap = fact.index(TARGET)  # 0 or 2: its subject or its object
            rest = fact[1], fact[2 - gap]
            found = [other[gap] for other in known if (other[1], other[2 - gap]) == rest]
            if found:
                return rng.choice(found)
    return rng.choice(HABITS[hidden[0][1]])


def search(text, problem, rng):
    """One turn of a search: what it keeps of what it was asked for, then a query for the first open
    question, or the answers."""
    asked = [tuple(each.split()[:2]) for each in " ".join(problem).split(";")]
    shown = read(block(text, "think") or []) + read(block(text, "information") or [])
    found = {}
    for subject, verb, thing in shown:
        if (subject, verb) in asked and rng.random() < KEEP_FOUND:
            found[subject, verb] = thing
    summary = ["<think>"]
    for pair, thing in found.items():
        summary += [*pair, thing]
    summary.append("</think>")

    # the last turn has to answer
    missing = [pair for pair in asked if pair not in found]
    if missing and text[text.index("turns") - 1] != "1":
        return [*summary, "<search>", *missing[0], "</search>"]
    answers = [found.get(pair) or rng.choice(HABITS[pair[1]]) for pair in asked]
    return [*summary, "<answer>", *" ; ".join(answers).split(), "</answer>"]


# ------------------------------------------------------------------------------------ warm start
# First the model learns to bind: in `Ada sells wool Ada grows oats Ben sells figs Ada sells ..`
# what comes next is wool, which only `Ada` and `sells` together tell. Language models learn to copy
# so early, by attention heads that look back and others that look for what stood there
# ("induction"). Then it quotes and answers, and at last it imitates the oracle, on all tasks and on
# exercises. A row to imitate is (prompt ids, response ids); its kind is the prompt's first word.


def said_again(rng, count, length=63):
    """Recombined facts, again and again in random order. -> ids (count, length), and which of them
    can be known from what was said before, the same shape"""
    ids, known = [], []
    for _ in range(count):
        # in half of the rows things stand in place of verbs: of four verbs a guess is right too
        # often for much to be learnt
        verbs = rng.choice([VERBS, THINGS])
        facts = any_facts(rng, rng.sample(SUBJECTS, rng.randint(2, 6)), verbs)
        names = [fact[0] for fact in facts]
        order = facts + rng.choices(facts, k=length // FACT - len(facts))
        rng.shuffle(order)

        # a name tells its verb if it has one fact, name and verb together tell the object
        row, seen = [], []
        for fact in order:
            said = fact in seen
            row += [False, said and names.count(fact[0]) == 1, said]
            seen.append(fact)
        known.append(row)
        ids.append([ID[word] for word in sum(order, [])])
    return torch.tensor(ids), torch.tensor(known)


def any_facts(rng, names, verbs=VERBS):
    """A fact or two about each. Nothing but the text tells what goes together."""
    facts = []
    for name in names:
        for verb in rng.sample(verbs, rng.choice([1, 1, 2])):
            facts.append([name, verb, rng.choice(THINGS)])
    return facts


def binding_loss(lm, ids, known, rotation):
    """-log p of what can be known. And of the words one and two places back, told by the first
    layer alone: without this its heads take minutes to find out where to look.

    rotation: orthogonal, (hidden, hidden); applied once for the word one place back and twice for
        the other, so that the two don't share directions
    """
    output = lm.model(ids, output_hidden_states=True)
    embeddings = lm.model.embed_tokens.weight  # (V, hidden)
    scores, targets = output.last_hidden_state[:, :-1] @ embeddings.T, ids[:, 1:]

    # verbs are guessed so well that they come late, or, with some seeds, never: they weigh more
    place, loss = torch.arange(1, ids.shape[1]) % FACT, 0
    for wanted, weight in (1, 3), (2, 1):  # verbs, objects
        chosen = known[:, 1:] & (place == wanted)
        loss = loss + weight * functional.cross_entropy(scores[chosen], targets[chosen])

    # which words stand before
    first = functional.rms_norm(output.hidden_states[1], embeddings.shape[1:])
    for back in 1, 2:
        first = first @ rotation
        scores = first[:, back:] @ embeddings.detach().T
        loss = loss + functional.cross_entropy(scores.flatten(0, 1), ids[:, :-back].flatten())
    return loss


@torch.no_grad()
def binding(lm, ids, known):
    """Shares of right verbs and objects of facts said again, each after what comes before it."""
    right = lm(ids[:, :-1]).logits.argmax(-1) == ids[:, 1:]
    known, verbs = known[:, 1:], torch.arange(1, ids.shape[1]) % FACT == 1
    places = {"verb": known & verbs, "object": known & ~verbs}
    return {name: right[chosen].float().mean().item() for name, chosen in places.items()}


def demonstrations(prompts, seed, count, chunks):
    """The oracle's turns on `count` fresh documents and questions each and half as many searches:
    the same tasks as in training, with the oracle in the sampler's place. -> rows"""
    corpus = passages(seed)
    best = data.open_search([row["text"] for row in corpus])

    def lookup(queries):
        return [[corpus[i] for i, _ in hits] for hits in best(queries, 3)]

    cfg = train.Config(**SETTINGS | SEARCH_SETTINGS | dict(group=1, recalls=1))
    setup = train.Setup(cfg, prompts, oracle, lookup)
    pairs = data.pair_questions(search_questions(count // 2 * 2, seed), 2)
    groups = train.memtrain(setup, dict(enumerate(documents(count, seed, chunks))), seed)
    groups += train.longqa(setup, dict(enumerate(questions(count, seed, chunks))), seed)
    groups += train.searchqa(setup, dict(enumerate(pairs)), seed)
    return [(turn.prompt_ids, turn.response_ids) for turn in train.turns_of(groups)]


def exercises(prompts, seed, count):
    """What the oracle writes when it is asked about made-up memories and sections, six prompts for
    each of `count` documents and half as many questions. -> rows"""
    rng, asked = random.Random(f"exercises {seed}"), []
    quote = Template(prompts.tokenizer, QUOTE)
    for row in documents(count, seed) + questions(count // 2, seed):
        text = (row.get("text") or row["context"]).split()
        words = row["question"].split()
        facts, hints, problem = read(text), about(words, text), ids_of([words])
        others = [fact for fact in facts if fact not in hints]

        # answer from a memory that holds all that is asked for, among other facts
        memory = hints + rng.sample(others, rng.randint(0, ROOM - HINTS))
        rng.shuffle(memory)
        asked.append(prompts.answer(problem=problem, memory=ids_of(memory)))

        # update a memory that may know the section, or repeat itself: the next one has a fact once
        section = ids_of(rng.sample(others, FACTS_PER_CHUNK))
        again = rng.choices(memory, k=rng.randint(1, ROOM))
        old = ids_of(rng.choice([memory, again, sorted(again)]))
        asked.append(prompts.update(problem=problem, memory=old, section=section))

        # recall what few memories tell: where none does, one guess is as good as another
        people = [fact for fact in facts if fact[0] in PEOPLE]
        rng.shuffle(people)
        subject, verb, _ = people[0]
        section = [[subject, verb, TARGET], *people[1:FACTS_PER_CHUNK]]
        rng.shuffle(section)
        memory = people[FACTS_PER_CHUNK : FACTS_PER_CHUNK + rng.randint(0, ROOM - 1)]
        if rng.random() < TOLD:
            memory.append(people[0])
        rng.shuffle(memory)
        asked.append(prompts.recall(memory=ids_of(memory), section=ids_of(section)))

        # update and quote, of recombined facts: nothing but the text tells what goes together
        size = ROOM + FACTS_PER_CHUNK
        facts = any_facts(rng, rng.sample(SUBJECTS, size))[:size]
        rng.shuffle(facts)
        names = [fact[0] for fact in facts]
        old, section = facts[: rng.randint(0, ROOM)], facts[-FACTS_PER_CHUNK:]
        problem[0] = ID[rng.choice([names[0], names[1], names[-1], names[-2]])]
        asked.append(prompts.update(problem=problem, memory=ids_of(old), section=ids_of(section)))
        for _ in range(2):
            rng.shuffle(facts)
            names = [fact[0] for fact in facts]
            section = facts[: rng.randint(3, ROOM)]
            problem[0] = ID[rng.choice(names[: len(section) + 2])]
            asked.append(quote(problem=problem, section=ids_of(section)))

    # 99 tokens: here a memory may hold more facts than ROOM
    responses = oracle(asked, [99] * len(asked), range(len(asked)))
    return [(prompt, response.ids) for prompt, response in zip(asked, responses)]


def ids_of(facts):
    return [ID[word] for word in sum(facts, [])]


def by_kind(rows):
    """{first word of the prompt: rows}"""
    kinds = {}
    for row in rows:
        kinds.setdefault(VOCABULARY[row[0][KIND]], []).append(row)
    return kinds


def scores_of(lm, rows):
    """-> scores and ids of all response tokens, (N, V) and (N,), and how many each row has"""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    written = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        written[i, len(prompt) : end] = True
    hidden = lm.model(ids[:, :-1]).last_hidden_state[written[:, 1:]]
    lengths = [len(response) for _, response in rows]
    return hidden @ lm.model.embed_tokens.weight.T, ids[written], lengths


def imitation_loss(lm, rows):
    """The mean of -log p over the response tokens of a kind, summed over kinds by WEIGHTS."""
    loss = 0
    for kind, alike in by_kind(rows).items():
        scores, ids, _ = scores_of(lm, alike)
        loss = loss + WEIGHTS[kind] * functional.cross_entropy(scores, ids)
    return loss


@torch.no_grad()
def skills(lm, prompts):
    """On exercises that are never trained on: shares of answers and quotes that are right in every
    word; and of right verbs and objects in quotes, each after what comes before."""
    rows, found = by_kind(exercises(prompts, "skills", 128)), {}
    for kind in "answer", "quote":
        scores, ids, lengths = scores_of(lm, rows[kind])
        right = scores.argmax(-1) == ids
        found[kind] = statistics.fmean(bool(row.all()) for row in right.split(lengths))
    # `ids` and `right` are those of the quotes now
    for name, words in ("verb", VERBS), ("object", THINGS):
        chosen = torch.isin(ids, torch.tensor([ID[word] for word in words]))
        found[name] = right[chosen].float().mean().item()
    return found


def warm_start(seed=0, steps=WARM_STEPS):
    """The pocket model, taught to bind, then to quote and answer, then to imitate the oracle in all
    tasks: each at most `steps`, and until its GOALS are reached. Those of binding are verb and
    object, that of quoting is quote; imitation ends with all four, once its rate is low.

    In the end the last norm is doubled, as if sampled at temperature 0.5: so small a model copies
    too noisily at 1.
    """
    lm, prompts = model(seed), Prompts(tokenizer(), TEMPLATES, PROBLEM)
    optimizers, rng = open_optimizers(lm), random.Random(f"binding {seed}")
    generator, width = torch.Generator().manual_seed(seed), lm.config.hidden_size
    rotation = torch.nn.init.orthogonal_(torch.empty(width, width), generator=generator)

    # bind
    unseen = said_again(random.Random("unseen"), 128)
    bar = tqdm(range(steps), desc="warm start, binding")
    for step in bar:
        loss = binding_loss(lm, *said_again(rng, 16), rotation)
        descend(lm, optimizers, loss, min(1, (step + 1) / 30))
        if step % 20 == 19:
            found = binding(lm, *unseen)
            bar.set_postfix(found, refresh=False)
            if all(found[name] >= GOALS[name] for name in found):
                break

    # quote and answer: among all tasks at once, some seeds hardly learn to see whether there is
    # anything to be said of the one asked for
    bar = tqdm(range(steps), desc="warm start, quoting")
    for step in bar:
        rows = by_kind(exercises(prompts, f"quoting {seed} {step}", 12))
        descend(lm, optimizers, imitation_loss(lm, rows["quote"] + rows["answer"]), 1)
        if step % 25 == 24:
            found = skills(lm, prompts)
            bar.set_postfix(found, refresh=False)
            if found["quote"] >= GOALS["quote"]:
                break

    # imitate: goals count once the rate is low, as only small steps make the model exact
    bar = tqdm(range(steps), desc="warm start")
    for step in bar:
        fresh = f"warm start {seed} {step}"
        rows = demonstrations(prompts, fresh, 2, CHUNKS) + exercises(prompts, fresh, 12)
        rate = (FALL[1] - step % FALL[1]) / (FALL[1] - FALL[0])
        descend(lm, optimizers, imitation_loss(lm, rows), min(1, max(rate, 0.05)))
        if step % 25 == 24:
            found = skills(lm, prompts)
            bar.set_postfix(found, refresh=False)
            if rate < 0.3 and all(found[name] >= goal for name, goal in GOALS.items()):
                break
    else:
        tqdm.write(f"note: {steps} steps were not enough for {GOALS}: {skills(lm, prompts)}")
    lm.model.norm.weight.data *= 2
    return lm


def open_optimizers(lm):
    """Muon for the matrices, as copying is learnt in two thirds of AdamW's steps; AdamW for all
    else."""
    matrices, others = [], []
    for name, parameter in lm.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    flags = dict(lr=5e-3, weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    return [
        torch.optim.Muon(matrices, **flags),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def descend(lm, optimizers, loss, scale):
    """A step of all optimizers, at `scale` times their learning rates."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group.setdefault("peak", group["lr"])
        optimizer.step()
    lm.zero_grad()


# ------------------------------------------------------------------------------------- the files


def settings(out):
    """What memtrain.json holds: prompts, and defaults for train.py's flags, by task."""
    questions = [f"{out}/questions/heldout-1x.jsonl"]
    memtrain = {"data": [f"{out}/documents"], "heldout": questions}
    longqa = {"data": [f"{out}/questions/train.jsonl"], "heldout": questions, "steps": QA_STEPS}
    searchqa = SEARCH_SETTINGS | {
        "data": [f"{out}/search-train.jsonl"],
        "heldout": [f"{out}/search-heldout.jsonl"],
        "retriever": f"{out}/passages.jsonl",
    }
    tasks = {"all": SETTINGS, "memtrain": memtrain, "longqa": longqa, "searchqa": searchqa}
    return {"problem": PROBLEM, "templates": TEMPLATES, "settings": tasks}


def make(out, seed=0, steps=WARM_STEPS):
    """Writes the folder `out`, whole or not at all."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one bar, ours
    files = {
        "questions/train": questions(LABELLED, f"train {seed}"),
        "passages": passages(seed),
        "search-train": search_questions(4096, seed),
        "search-heldout": search_questions(512, seed, "heldout"),
    }
    for length, count in LENGTHS.items():
        rows = questions(count, f"heldout {seed}", length * CHUNKS)
        files[f"questions/heldout-{length}x"] = rows
    parts = {
        "train": documents(DOCUMENTS, f"train {seed}"),
        "heldout": documents(256, f"heldout {seed}"),
    }
    with data.whole_or_nothing(out) as folder:
        # data
        (folder / "questions").mkdir(parents=True)
        for name, rows in files.items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        data.save_documents(folder / "documents", parts)

        # model, with its prompts and settings
        lm = warm_start(seed, steps)
        lm.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        text = json.dumps(settings(out), indent=2)
        (folder / "model/memtrain.json").write_text(text + "\n")


def show():
    """Prints a document; then the oracle's prompts and responses: a recall, the document's turns,
    and those of a question about another text."""
    prompts = Prompts(tokenizer(), TEMPLATES, PROBLEM)
    (row,) = documents(1, "shown")
    print(f"{row['text']}\n\n{row['question']} {row['answer']}\n")
    for prompt, response in demonstrations(prompts, "shown", 1, CHUNKS):
        print(prompts.text(prompt))
        print("   ", prompts.text(response), "\n")


@distributed.one_line_errors()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", default="make", choices=("make", "show"))
    parser.add_argument("--out", default="cache/tiny", help="the folder to make [cache/tiny]")
    parser.add_argument("--seed", type=int, default=0, help="of everything in it [0]")
    help = f"of binding, of quoting, and of imitation, at most [{WARM_STEPS}]"
    parser.add_argument("--steps", type=int, default=WARM_STEPS, help=help)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # two gain a third at best, and lose much where others work as well
    if args.steps < 1:
        raise distributed.InputError("--steps: the warm start takes at least 1")
    if args.command == "show":
        show()
    elif Path(args.out).exists():
        print(f"{args.out} is there already: delete it to make it anew")
    else:
        make(args.out, args.seed, args.steps)
        print(
            f"{args.out}/model        the warm-started model, with its prompts and settings\n"
            f"{args.out}/documents    masked documents (--task memtrain)\n"
            f"{args.out}/questions    questions about long texts (--task longqa)\n"
            f"{args.out}/*.jsonl      search corpus and questions (--task searchqa)\n"
            f"next: torchrun --nproc_per_node 2 train.py --model {args.out}/model"
        )


if __name__ == "__main__":
    main()
