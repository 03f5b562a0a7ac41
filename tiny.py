"""The pocket world: a made-up encyclopedia and a small model that has read it, to download nothing.

    python tiny.py               makes cache/tiny: model, documents, questions, a search corpus
    python tiny.py show          one masked document, and the oracle's way through it

Every fact is three words: `Alda sells wool`. 25 cities have 4 attributes of 5 values each, such
that one clue leaves five cities and any two clues leave one. These facts never change: they are the
encyclopedia, which the warm start puts into the model. What people like, own, play or wear is drawn
anew for every document: nothing but memory can answer for it. A masked document hides one city,
with two clues in different chunks, among facts about people and other cities. Long-text questions
are about a person with two facts in the document, however long that is.

The oracle stands in the sampler's place in `rollout`: it reads a prompt and writes the response of
a model that copies faithfully but has a poor sense of relevance. It takes up half of the facts
about what the problem names and three of ten others, and drops any when its memory is full. The
warm start is fine-tuning on the turns that it leaves behind. Such coins are the weakness on
purpose: a policy that drifts under noise, or is merely sampled more sharply, gains nothing by them,
so that a rising curve means that the reward was understood (train.py --shuffle_rewards shows it).

How it differs from real data:
  1. Every word is one token, every fact three; chunks of two facts never cut one.
  2. Entities are known, not recognised: subjects and objects, each with its exact span.
  3. Prompts are a few words long, since the model has never read anything else.

train.py and eval.py know nothing of this file. What connects them is the folder that it makes, and
in it model/memtrain.json, which holds the prompts, the sizes and where the data lies.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
import distributed
import grpo
import train
from data import MASK, TARGET
from rollout import NO_MEMORY, TAGS, Prompts, Response

# ------------------------------------------------------------------------------------- the world

FACT = 3  # tokens of a fact: subject, verb, object
FACTS_PER_CHUNK = 2
CHUNKS = 4  # of a document that is trained on

CITIES = (
    "Alda Brin Cora Dorn Elva Farn Gora Hest Irra Jund Kolm Lira Morn Nava Orsk Pell Quen Rhun "
    "Sarn Tarn Ulma Varn Welm Yarn Zell"
).split()
CLUES = {  # verb: the values of a city's attribute
    "sells": "wool salt silver glass silk".split(),
    "grows": "barley rye oats flax hops".split(),
    "honours": "bear wolf stag swan hawk".split(),
    "faces": "river sea marsh hills desert".split(),
}
PEOPLE = (
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo June Kai Lea Max Nora Omar Pia Rosa Sam Tess Uma Vera "
    "Will Xena Zoe"
).split()
HABITS = {  # verb: what a person may do with, drawn anew for every document
    "likes": "tea figs rice honey cheese soup olives bread".split(),
    "owns": "cat dog horse goat parrot snake rabbit turtle".split(),
    "plays": "harp flute drums chess cello golf tennis piano".split(),
    "wears": "hat scarf cloak boots gloves ring belt sandals".split(),
    "collects": "coins stamps shells maps dolls keys clocks bells".split(),
    "studies": "law physics music botany optics logic history poetry".split(),
    "drives": "van tram truck taxi bus sled tractor wagon".split(),
    "paints": "boats barns roses clouds bridges towers fruit fields".split(),
}
SUBJECTS = {*CITIES, *PEOPLE, MASK, TARGET}
THINGS = {*sum(CLUES.values(), []), *sum(HABITS.values(), []), TARGET}
ENTITIES = SUBJECTS | THINGS

# Latin squares r, c, r + c, r + 2c (mod 5) over the 5 x 5 cities are pairwise orthogonal: any two
# clues meet in exactly one city
ENCYCLOPEDIA = {}  # city: {verb: value}
KNOWN = []  # the same as facts [city, verb, value]
for number, city in enumerate(CITIES):
    r, c = divmod(number, 5)
    places = (r, c, (r + c) % 5, (r + 2 * c) % 5)
    ENCYCLOPEDIA[city] = {verb: CLUES[verb][place] for verb, place in zip(CLUES, places)}
    KNOWN += [[city, verb, thing] for verb, thing in ENCYCLOPEDIA[city].items()]

PROBLEM = f"{MASK} is which city ?"  # the end-to-end question; a person's goes `Ada likes what ?`
TEMPLATES = {
    "update": "update <problem> {problem} </problem> <memory> {memory} </memory> "
    "<section> {section} </section>",
    "answer": "answer <memory> {memory} </memory> <problem> {problem} </problem>",
    "recall": "recall <memory> {memory} </memory> <section> {section} </section>",
    "whole": "answer <section> {section} </section> <problem> {problem} </problem>",
    "closed_book": "answer <problem> {problem} </problem>",
    "search": "find <problem> {problem} </problem> {previous} {turns} turns left",
}
SETTINGS = dict(  # defaults for train.py's flags
    steps=24, documents_per_step=32, documents_per_update=32, recall_draw="document",
    chunk_tokens=FACTS_PER_CHUNK * FACT, memory_tokens=4 * FACT + 1, answer_tokens=6,
    lr=2e-4, kl=2e-2, warmup_steps=3, beta2=0.98, eval_every=8, gradient_checkpointing=False,
)  # fmt: skip
SEARCH_SETTINGS = dict(aggregate="sequence", answer_tokens=24)
LENGTHS = (1, 2, 4, 8)  # of held-out texts with questions, in trained ones
WARM_STEPS = 750

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
    prompts = " ".join([PROBLEM, *TEMPLATES.values(), NO_MEMORY, TARGET, "what user assistant"])
    prompts = re.sub(r"\{\w+\}", " ", prompts).split()
    search = "; Passage ( title : ) nothing found 0 1 2 3 4 5 6 7 8 9".split()
    facts = [*CITIES, *PEOPLE]
    for verb, things in (CLUES | HABITS).items():
        facts += [verb, *things]
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
    """A randomly initialised Qwen3ForCausalLM of about 0.5 million parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=4096, initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        eos_token_id=ID["<|im_end|>"], pad_token_id=ID["<pad>"], bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


# ----------------------------------------------------------------------- documents and questions
# A fact is [subject, verb, object]. A seed is anything that can be printed: row i of a function
# depends on (seed, i, chunks) alone.


def documents(count, seed, chunks=CHUNKS):
    """Masked documents as data.py makes them; each hides a city, with two clues."""
    rows = []
    for i in range(count):
        rng = random.Random(f"document {seed} {i} {chunks}")
        city = rng.choice(CITIES)
        clues = [[city, verb, ENCYCLOPEDIA[city][verb]] for verb in rng.sample(list(CLUES), 2)]
        text = write(arrange(clues, chunks, rng)).replace(city, MASK)
        words = re.finditer(r"\w+", text)
        spans = [list(word.span()) for word in words if word.group() in ENTITIES]
        rows.append({"id": f"{seed} {i}", "text": text, "answer": city, "entities": spans})
    return rows


def questions(count, seed, chunks=CHUNKS):
    """Questions about long texts: {"id", "question", "answers", "context"}. The person has two
    facts in the context, one of which is asked for."""
    rows = []
    for i in range(count):
        rng = random.Random(f"question {seed} {i} {chunks}")
        person, verbs = rng.choice(PEOPLE), rng.sample(list(HABITS), 2)
        facts = [[person, verb, rng.choice(HABITS[verb])] for verb in verbs]
        context = write(arrange(facts, chunks, rng))
        rows.append(ask(facts[0], f"{seed} {i}", context))
    return rows


def ask(fact, name, context=""):
    """The question for the last word of a fact."""
    subject, verb, thing = fact
    asked = f"{subject} {verb} what ?"
    return {"id": name, "question": asked, "answers": [thing], "context": context}


def arrange(hints, chunks, rng):
    """The facts of a document, in order: `hints`, all of one subject and each in another chunk,
    among people's habits and a fifth of facts about cities, none of them of that subject."""
    subject = hints[0][0]
    habits = [fact for fact in deal_habits(hints, rng) if fact[0] != subject]
    known = [fact for fact in KNOWN if fact[0] != subject]
    rng.shuffle(known)

    count = chunks * FACTS_PER_CHUNK - len(hints)
    others = known[: count // 5] + habits[: count - count // 5]
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


def deal_habits(hints, rng):
    """A habit for every person and verb, dealt like cards, so that the verbs and things of a short
    document differ; the verbs of the hints come last."""
    people, things = {}, {}
    for verb, values in HABITS.items():
        people[verb] = rng.sample(PEOPLE, len(PEOPLE))
        things[verb] = sum((rng.sample(values, len(values)) for _ in range(3)), [])
    taken = [verb for _, verb, _ in hints]
    facts = []
    for i in range(len(PEOPLE)):
        verbs = rng.sample(list(HABITS), len(HABITS))
        for verb in sorted(verbs, key=taken.__contains__):
            facts.append([people[verb][i], verb, things[verb][i]])
    return facts


def write(facts):
    """Facts -> text, a line each."""
    return "\n".join(" ".join(fact) for fact in facts)


def read(text):
    """The whole facts of a list of words, in order, each once.

    >>> read("tea Ada likes tea Ben owns".split())
    [['Ada', 'likes', 'tea']]
    """
    facts = []
    for i in range(len(text) - FACT + 1):
        fact = text[i : i + FACT]
        if fact[0] in SUBJECTS and fact[2] in THINGS and fact not in facts:
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

KEEP = 0.3  # how probably a fact of a section is taken up
KEEP_ASKED = 0.5  # .. where the problem names its subject
KEEP_FOUND = 0.8  # how probably a search carries over a fact that it was asked for


def oracle(prompts, limits, keys):
    """A sampler: (prompts, limits, keys) -> `Response`s, a function of prompt and key alone."""
    responses = []
    for prompt, limit, key in zip(prompts, limits, keys):
        rng = random.Random(f"oracle {key} {prompt}")
        text = [VOCABULARY[i] for i in prompt]
        problem, memory, section = (block(text, tag) for tag in ("problem", "memory", "section"))
        if "turns" in text:
            response = search(text, problem, rng)
        elif problem is None:
            response = ["\\boxed{", recall(memory, section, rng), "}"]
        elif memory is None or section is None:  # the answer's turn, or the whole text, or no text
            response = ["\\boxed{", answer(problem, memory or section or [], rng), "}"]
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


def update(problem, memory, section, room, rng):
    """The next memory: the old facts, then new ones by chance; what there is no room for is dropped
    at random."""
    facts = read(memory)
    for fact in read(section):
        chance = KEEP_ASKED if fact[0] in problem else KEEP
        if fact not in facts and rng.random() < chance:
            facts.append(fact)
    kept = sorted(rng.sample(range(len(facts)), min(room, len(facts))))
    return sum((facts[i] for i in kept), [])


def answer(problem, memory, rng):
    """What memory and encyclopedia say, else a guess among what they leave open."""
    facts = read(memory)
    if MASK in problem:
        clues = [(verb, thing) for subject, verb, thing in facts if subject == MASK]
        fits = [city for city in CITIES if {*clues} <= {*ENCYCLOPEDIA[city].items()}]
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
            gap = fact.index(TARGET)
            rest = fact[1], fact[2 - gap]
            found = [other[gap] for other in known if (other[1], other[2 - gap]) == rest]
            if found:
                return rng.choice(found)
    subject, verb, _ = hidden[0]
    if subject == TARGET:
        return rng.choice(PEOPLE if verb in HABITS else CITIES)
    return rng.choice((CLUES | HABITS)[verb])


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


def demonstrations(prompts, name, count, chunks):
    """The oracle's turns on `count` fresh documents and questions each and half as many searches:
    list of (kind, Turn). The same tasks as in training, with the oracle in the sampler's place."""
    corpus = passages(name)
    best = data.open_search([row["text"] for row in corpus])

    def lookup(queries):
        return [[corpus[i] for i, _ in hits] for hits in best(queries, 3)]

    # roll the three tasks out, one trajectory each
    cfg = train.Config(**SETTINGS | SEARCH_SETTINGS, group=1, recalls=2)
    setup = train.Setup(cfg, prompts, oracle, lookup)
    pairs = data.pair_questions(search_questions(count // 2 * 2, name), 2)
    reading = train.memtrain(setup, dict(enumerate(documents(count, name, chunks))), name)
    reading += train.longqa(setup, dict(enumerate(questions(count, name, chunks))), name)
    searching = train.searchqa(setup, dict(enumerate(pairs)), name)

    # their turns: updates of a memory, then an answer; a recall; searches
    turns = []
    for group in reading:
        last = "recall" if group.kind == "recall" else "answer"
        for agent in group.agents:
            turns += [("update", turn) for turn in agent.turns[:-1]]
            turns.append((last, agent.turns[-1]))
    for group in searching:
        turns += [("search", turn) for turn in group.agents[0].turns]
    return turns


def imitation_loss(policy, turns):
    """The mean of -log p over the response tokens of a kind of turn, summed over kinds."""
    prompts = [turn.prompt_ids for _, turn in turns]
    responses = [turn.response_ids for _, turn in turns]
    sums, tokens = Counter(), Counter()
    for (kind, _), logps in zip(turns, policy(prompts, responses)):
        sums[kind] -= logps.sum()
        tokens[kind] += len(logps)
    return sum(sums[kind] / tokens[kind] for kind in sums)


def warm_start(seed=0, steps=WARM_STEPS):
    """The pocket model, taught the form of the tasks by demonstrations.

    In the end the last norm is doubled, as if sampled at temperature 0.5: so small a model copies
    too noisily at 1.
    """
    lm = model(seed)
    policy, prompts = grpo.Policy(lm), Prompts(tokenizer(), TEMPLATES, PROBLEM)

    # Muon for the matrices: it learns to copy in two thirds of AdamW's steps
    matrices, others = [], []
    for name, parameter in lm.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.01, ns_steps=3,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]  # fmt: skip

    def schedule(step):  # up over 30 steps, down over the last two fifths
        return min(1, (step + 1) / 30, max((1 - step / steps) / 0.4, 0.1))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, schedule) for each in optimizers]
    bar = tqdm(range(steps), desc="warm start")
    for step in bar:
        # short documents first
        count, chunks = (5, 2) if step < steps / 5 else (10, CHUNKS)
        turns = demonstrations(prompts, f"warm start {seed} {step}", count, chunks)
        loss = imitation_loss(policy, turns)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        for each in [*optimizers, *schedulers]:
            each.step()
        lm.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    lm.model.norm.weight.data *= 2
    return lm


# ------------------------------------------------------------------------------------- the files


def settings(out):
    """What memtrain.json holds: prompts, and defaults for train.py's flags, by task."""
    longqa = {
        "data": [f"{out}/questions/train.jsonl"],
        "heldout": [f"{out}/questions/heldout-1x.jsonl"],
        "aggregate": "sequence",
    }
    searchqa = SEARCH_SETTINGS | {
        "data": [f"{out}/search-train.jsonl"],
        "heldout": [f"{out}/search-heldout.jsonl"],
        "retriever": f"{out}/passages.jsonl",
    }
    memtrain = {"data": [f"{out}/documents"]}
    tasks = {"all": SETTINGS, "memtrain": memtrain, "longqa": longqa, "searchqa": searchqa}
    return {"problem": PROBLEM, "templates": TEMPLATES, "settings": tasks}


def make(out, seed=0, steps=WARM_STEPS):
    """Writes the folder `out`, whole or not at all."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one bar, ours
    files = {
        "questions/train": questions(2048, f"train {seed}"),
        "passages": passages(seed),
        "search-train": search_questions(4096, seed),
        "search-heldout": search_questions(512, seed, "heldout"),
    }
    for length in LENGTHS:
        rows = questions(512, f"heldout {seed}", length * CHUNKS)
        files[f"questions/heldout-{length}x"] = rows
    parts = {
        "train": documents(2048, f"train {seed}"),
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
    """Prints a document and a question, and the oracle's way through them, prompt by prompt."""
    prompts = Prompts(tokenizer(), TEMPLATES, PROBLEM)
    (row,) = documents(1, "shown")
    print(f"{row['text']}\n\n{MASK} is {row['answer']}\n")
    turns = demonstrations(prompts, "shown", 1, CHUNKS)
    for kind, turn in sorted(turns, key=lambda pair: pair[0] == "recall"):  # recalls last
        print(kind, "|", prompts.text(turn.prompt_ids))
        print("    ", prompts.text(turn.response_ids), "\n")


@distributed.one_line_errors()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", default="make", choices=("make", "show"))
    parser.add_argument("--out", default="cache/tiny", help="the folder to make [cache/tiny]")
    parser.add_argument("--seed", type=int, default=0, help="of everything in it [0]")
    help = f"of the warm start [{WARM_STEPS}]"
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
