"""The pocket world: a small made-up world as files, with a model that has read it. No downloads.

    python tests/pocket.py                      writes cache/pocket, in seconds
    torchrun --nproc_per_node 2 train.py        trains on it, in minutes

THE WORLD. A fact is three words: `Brin sells wool`. Each of 25 cities has a value for four verbs;
these hundred facts never change, and the model knows them by heart. One value leaves five cities,
any two leave one. What people sell, grow, honour and face is drawn anew for every text.

A MASKED DOCUMENT hides a city. Two of its facts, the clues, stand in different chunks, among facts
about others. In place of [MASK] stands the name of a person who is not in the document otherwise;
the document's own question tells whom it is about: `Ada is what ?`. Whatever is said of a hidden
city is said of people as well: only the question tells what to keep in memory.

A QUESTION is about a person in such a text, of up to 16 times the length: `Ben sells what ?`.
MemTrain trains on none. A search question is about a small corpus, two facts a passage.

How it differs from real data:
  1. Every word is one token, every fact three; chunks of two facts never cut one.
  2. Entities are known, not recognised: cities and objects, each with its exact span.
  3. Prompts are a few words long, since the model has never read anything else.
  4. Instead of [MASK] a person's name stands for what is hidden, and a document has its question.
  5. The trajectories of a document share one recall; post-training makes one update a step.

The top level knows nothing of this: model/memtrain.json holds the prompts, the sizes, and where the
data lies. The weights are pocket.safetensors; warm_start.py made them.
"""

import argparse
import itertools
import json
import random
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402
import distributed  # noqa: E402

# ------------------------------------------------------------------------------------- the world

CITIES = (
    "Alda Brin Cora Dorn Elva Farn Gora Hest Irra Jund Kolm Lira Morn Nava Orsk Pell Quen Rhun "
    "Sarn Tarn Ulma Varn Welm Yarn Zell"
).split()
PEOPLE = (
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo June Kai Lea Max Nora Omar Pia Rosa Sam Tess Uma Vera "
    "Will Xena Zoe Amy Bob Carl Dora Emma Fred Gina Hugo Ida Jack Kim Lars Mia Ned Olga Paul Rita "
    "Seth Tim Ursa Vic Wanda Yves Zach"
).split()
HABITS = {  # verb: what is said of people; the first five are said of cities, too
    "sells": "wool salt silver glass silk tea figs honey cheese bread".split(),
    "grows": "barley rye oats flax hops beans leeks olives plums kale".split(),
    "honours": "bear wolf stag swan hawk horse goat lynx otter crane".split(),
    "faces": "river sea marsh hills desert woods lakes plains cliffs dunes".split(),
}
SUBJECTS = [*CITIES, *PEOPLE]
VERBS = list(HABITS)
THINGS = sum(HABITS.values(), [])

# The cities stand on a 5 x 5 grid. Any two of row, column, row + column and row + 2 columns
# (modulo 5) tell the place on it.
ENCYCLOPEDIA = {}  # city: {verb: value}
KNOWN = []  # the same as facts [city, verb, value]
for number, city in enumerate(CITIES):
    row, column = divmod(number, 5)
    values = row, column, (row + column) % 5, (row + 2 * column) % 5
    ENCYCLOPEDIA[city] = {verb: HABITS[verb][value] for verb, value in zip(VERBS, values)}
    KNOWN += [[city, verb, thing] for verb, thing in ENCYCLOPEDIA[city].items()]

# ------------------------------------------------------------------------ documents and questions
# Row i depends on (seed, i, chunks) alone; a seed is anything that can be printed.

FACT = 3  # tokens of a fact
FACTS_PER_CHUNK = 2
CHUNKS = 6  # of a document
HINTS = 2  # facts of a text about the one whom its question names
ENTITIES = {*CITIES, *THINGS}  # what recalls hide: of 48 people a guess would hardly be right


def documents(count, seed, chunks=CHUNKS):
    """Masked documents as data.py builds them: {"id", "text", "answer", "entities", "question"}."""
    rows = []
    for i in range(count):
        rng = random.Random(f"document {seed} {i} {chunks}")
        city = rng.choice(CITIES)
        name = rng.choice(PEOPLE)
        verbs = rng.sample(VERBS, HINTS)
        clues = [[name, verb, ENCYCLOPEDIA[city][verb]] for verb in verbs]
        text = write(mix(clues, chunks, rng, hidden=city))
        words = re.finditer(r"\w+", text)
        spans = [list(word.span()) for word in words if word.group() in ENTITIES]
        row = {"id": f"{seed} {i}", "text": text, "answer": city, "entities": spans}
        rows.append(row | {"question": f"{name} is what ?"})
    return rows


def questions(count, seed, chunks=CHUNKS):
    """Questions about long texts, {"id", "question", "answers", "context"}: for one of the two
    facts that the text tells of a person."""
    rows = []
    for i in range(count):
        rng = random.Random(f"question {seed} {i} {chunks}")
        person = rng.choice(PEOPLE)
        verbs = rng.sample(VERBS, HINTS)
        hints = [[person, verb, rng.choice(HABITS[verb])] for verb in verbs]
        context = write(mix(hints, chunks, rng))
        rows.append(question_for(hints[0], f"{seed} {i}", context))
    return rows


def question_for(fact, row_id, context):
    """The row that asks for the last word of a fact."""
    subject, verb, thing = fact
    asked = f"{subject} {verb} what ?"
    return {"id": row_id, "question": asked, "answers": [thing], "context": context}


def mix(hints, chunks, rng, hidden=None):
    """The facts of a text in order: `hints`, which are of one subject, each in another chunk; and
    facts about others, one in ten about cities, though never about the `hidden` one. There are
    enough for 105 chunks."""
    # everybody does one thing of a kind, so that nobody contradicts himself
    others = [person for person in PEOPLE if person != hints[0][0]]
    pairs = list(itertools.product(others, VERBS))
    rng.shuffle(pairs)
    habits = [[person, verb, rng.choice(HABITS[verb])] for person, verb in pairs]
    known = [fact for fact in KNOWN if fact[0] != hidden]
    rng.shuffle(known)

    # one in ten
    count = chunks * FACTS_PER_CHUNK - len(hints)
    facts = known[: count // 10] + habits[: count - count // 10]
    rng.shuffle(facts)

    # chunk by chunk
    hint_in = dict(zip(rng.sample(range(chunks), len(hints)), hints))  # {chunk: hint}
    text = []
    for chunk in range(chunks):
        part = [hint_in[chunk]] if chunk in hint_in else []
        while len(part) < FACTS_PER_CHUNK:
            part.append(facts.pop())
        rng.shuffle(part)
        text += part
    return text


def write(facts):
    """Facts -> text, a line each."""
    return "\n".join(" ".join(fact) for fact in facts)


def passages(seed):
    """A search corpus, what all people do: [{"id", "title", "text"}], two facts a passage."""
    rng = random.Random(f"passages {seed}")
    rows = []
    for person in PEOPLE:
        habits = [[person, verb, rng.choice(things)] for verb, things in HABITS.items()]
        rng.shuffle(habits)
        for pair in habits[:2], habits[2:]:
            rows.append({"id": str(len(rows)), "title": person, "text": write(pair)})
    return rows


def search_questions(count, seed, part="train"):
    """Questions about facts of passages(seed), as `questions` with an empty context. A quarter of
    the facts is asked for by part "heldout", the others by part "train"."""
    facts = []
    for passage in passages(seed):
        facts += [line.split() for line in passage["text"].splitlines()]
    random.Random(f"part {seed}").shuffle(facts)
    quarter = len(facts) // 4
    facts = facts[:quarter] if part == "heldout" else facts[quarter:]

    rng = random.Random(f"search {part} {seed}")
    return [question_for(rng.choice(facts), f"{part} {seed} {i}", "") for i in range(count)]


# -------------------------------------------------------------------- prompts, tokenizer, model

PROBLEM = "[MASK] is what ?"  # of a document without a question of its own: here none
TEMPLATES = {
    "update": "update <problem> {problem} </problem> <memory> {memory} </memory> "
    "<section> {section} </section>",
    "answer": "answer <problem> {problem} </problem> <memory> {memory} </memory>",
    "recall": "recall <memory> {memory} </memory> <section> {section} </section>",
    "whole": "answer <problem> {problem} </problem> <section> {section} </section>",
    "closed_book": "answer <problem> {problem} </problem>",
    "search": "find <problem> {problem} </problem> {previous} {turns} turns left",
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The vocabulary, in the order of ids; the weights are made for this order.
WORDS = (
    r"<pad> <unk> <|im_start|> <|im_end|> \boxed{ } <problem> </problem> <memory> </memory> "
    "<section> </section> <think> </think> <search> </search> <answer> </answer> <information> "
    "</information> [MASK] is what ? update answer recall find turns left quote No previous memory "
    "[TARGET] user assistant ; Passage ( title : ) nothing found 0 1 2 3 4 5 6 7 8 9"
).split()
VOCABULARY = [*WORDS, *SUBJECTS, *VERBS, *THINGS]
ID = {word: i for i, word in enumerate(VOCABULARY)}
PATTERN = r"<\|\w+\|>|</?[a-z]+>|\\boxed\{|\[[A-Z]+\]|\w+|[^\w\s]"  # what is a word in a text

WEIGHTS = HERE / "pocket.safetensors"


def tokenizer():
    """A PreTrainedTokenizerFast with one id a word; tags, `\\boxed{` and `}` are words as well."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def untrained_model(seed=0):
    """A Qwen3ForCausalLM of 185,024 parameters with random weights.

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


def trained_model():
    """The same with the weights that come with it."""
    from safetensors.torch import load_model

    lm = untrained_model()
    load_model(lm, WEIGHTS)
    return lm


# -------------------------------------------------------------------------------------- the files

ROOM = 6  # facts that a memory holds
SETTINGS = dict(  # defaults for train.py's flags
    steps=40, documents_per_step=32, documents_per_update=0, recall_draw="document",
    chunk_tokens=FACTS_PER_CHUNK * FACT, memory_tokens=ROOM * FACT + 1,  # 1: the end token
    answer_tokens=12,
    lr=3e-4, kl=1e-2, warmup_steps=3, beta2=0.98, eval_every=0, gradient_checkpointing=False,
)  # fmt: skip
SEARCH_SETTINGS = dict(aggregate="sequence", answer_tokens=24)
QA_STEPS = 12  # of training on questions
DOCUMENTS = 4096  # to train on: 128 steps see none of them twice
LABELLED = 64  # questions to train on: labels are scarce, texts are not
LENGTHS = {1: 256, 2: 256, 4: 256, 8: 128, 16: 128}  # {length in documents: questions held out}


def settings(out):
    """What memtrain.json holds: prompts, and defaults for train.py's flags, by task."""
    heldout = [f"{out}/questions/heldout-1x.jsonl"]
    memtrain = {"data": [f"{out}/documents"], "heldout": heldout}
    longqa = {"data": [f"{out}/questions/train.jsonl"], "heldout": heldout, "steps": QA_STEPS}
    searchqa = SEARCH_SETTINGS | {
        "data": [f"{out}/search-train.jsonl"],
        "heldout": [f"{out}/search-heldout.jsonl"],
        "retriever": f"{out}/passages.jsonl",
    }
    tasks = {"all": SETTINGS, "memtrain": memtrain, "longqa": longqa, "searchqa": searchqa}
    return {"problem": PROBLEM, "templates": TEMPLATES, "settings": tasks}


def make(out, seed=0, lm=None):
    """Writes the folder `out`, whole or not at all: the texts of this seed and a model, unless
    another is given the one that comes with this file."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with data.whole_or_nothing(out) as folder:
        train = documents(DOCUMENTS, f"train {seed}")
        heldout = documents(256, f"heldout {seed}")
        data.save_documents(folder / "documents", {"train": train, "heldout": heldout})

        (folder / "questions").mkdir()
        save_rows(folder / "questions/train.jsonl", questions(LABELLED, f"train {seed}"))
        for length, count in LENGTHS.items():
            rows = questions(count, f"heldout {seed}", length * CHUNKS)
            save_rows(folder / f"questions/heldout-{length}x.jsonl", rows)

        save_rows(folder / "passages.jsonl", passages(seed))
        save_rows(folder / "search-train.jsonl", search_questions(4096, seed))
        save_rows(folder / "search-heldout.jsonl", search_questions(512, seed, "heldout"))

        lm = lm or trained_model()
        lm.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        (folder / "model/memtrain.json").write_text(json.dumps(settings(out), indent=2) + "\n")


def save_rows(path, rows):
    """A JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@distributed.one_line_errors(data.InputError)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="cache/pocket", help="the folder to write [cache/pocket]")
    out = parser.parse_args(argv).out
    if Path(out).exists():
        print(f"{out} is there already: delete it to make it anew")
        return
    make(out)
    flag = "" if out == parser.get_default("out") else f" --model {out}/model"
    print(
        f"{out}/model        a small model, with its prompts and settings\n"
        f"{out}/documents    masked documents (--task memtrain)\n"
        f"{out}/questions    questions about long texts (--task longqa)\n"
        f"{out}/*.jsonl      search corpus and questions (--task searchqa)\n"
        f"next: torchrun --nproc_per_node 2 train.py{flag}"
    )


if __name__ == "__main__":
    main()
