"""The embedded default: a pocket encyclopedia, its tokenizer, model and oracle, so that everything runs without a download.

    python tiny.py          one masked document, its chunks, and the oracle's way through it (seconds)

The world. Every fact is three words: `Alda sells wool`. 25 made-up cities have 4 attributes of 5 values each, arranged in
orthogonal Latin squares: one clue leaves five candidates, any two clues leave one. These facts never change; they are the
encyclopedia, which the warm start puts into the model. What people like, own, play or wear is drawn anew for every document, so
that nothing but memory can answer for it. A masked document hides one city, with two clues in different chunks, among facts about
people and other cities: what the mask stands for must be inferred from what was kept of several chunks and what the model knows.

The oracle stands in the sampler's place in rollout(): it reads a prompt and writes the response that a model with faithful copying
and a mediocre sense of relevance would write. Fine-tuning on the turns that it leaves behind is the warm start (WARM_START).

How it differs from real data:
1. Every word is one token, every fact three; chunks of a multiple of three tokens never cut a fact (others work, and cut some).
2. A passage is two facts, a line each. Facts about other cities stand in for related passages, people's habits for random ones.
3. Entities are known, not recognised: the names of people and cities, each with its exact span.
4. Prompts are a few words long, since the model has never read anything else.
"""
import random
import re

import torch

MASK, TARGET = "[MASK]", "[TARGET]"
FACT = 3  # tokens of a fact: subject, verb, object
FACTS_PER_CHUNK = 2  # documents(chunks=n) holds n times as many facts

CITIES = ("Alda Brin Cora Dorn Elva Farn Gora Hest Irra Jund Kolm Lira Morn Nava Orsk Pell Quen Rhun Sarn Tarn Ulma Varn Welm "
          "Yarn Zell").split()
CLUES = {  # verb: the values of a city's attribute
    "sells": "wool salt silver glass silk".split(),
    "grows": "barley rye oats flax hops".split(),
    "honours": "bear wolf stag swan hawk".split(),
    "faces": "river sea marsh hills desert".split(),
}
PEOPLE = ("Ada Ben Cleo Dan Eve Finn Gus Hana Ivo June Kai Lea Max Nora Omar Pia Rosa Sam Tess Uma Vera Will Xena Zoe").split()
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
# Latin squares r, c, r + c, r + 2c (mod 5) over the 5 x 5 cities are pairwise orthogonal: two clues meet in exactly one city.
ENCYCLOPEDIA = {city: {verb: CLUES[verb][value] for verb, value in zip(CLUES, (i // 5, i % 5, (i // 5 + i % 5) % 5, (i // 5 + 2 * (i % 5)) % 5))}
                for i, city in enumerate(CITIES)}

SUBJECTS = {*CITIES, *PEOPLE, MASK, TARGET}
THINGS = {*sum(CLUES.values(), []), *sum(HABITS.values(), []), TARGET}

PROBLEM = f"{MASK} is which city ?"  # the end-to-end question; a person's goes `Ada likes what ?`
TEMPLATES = {
    "update": "update <problem> {problem} </problem> <memory> {memory} </memory> <section> {section} </section>",
    "answer": "answer <memory> {memory} </memory> <problem> {problem} </problem>",
    "recall": "recall <memory> {memory} </memory> <section> {section} </section>",
    "whole": "answer <section> {section} </section> <problem> {problem} </problem>",
    "closed_book": "answer <problem> {problem} </problem>",
    "search": "find <problem> {problem} </problem> {previous} {turns} turns left",
}

TRAIN_DOCUMENTS, HELDOUT_SEED = 2048, 10**9  # training draws from seeds below, held-out rows from this one
CONFIG = dict(steps=80, documents_per_step=8, documents_per_update=8, recall_draw="document", chunks=4, chunk_tokens=6, memory_tokens=16,
              answer_tokens=6, lr=2e-4, kl=1e-2, warmup_steps=5, beta2=0.98, recall_weight=1.0, eval_every=20, gradient_checkpointing=False)
CONFIG_OF_TASK = {"longqa": dict(aggregate="sequence"), "searchqa": dict(aggregate="sequence", answer_tokens=24)}
# Muon for the matrices (lr), AdamW for embeddings and norms (lr_rest): copying takes about two thirds of AdamW's steps
WARM_START = dict(lr=5e-3, lr_rest=3e-3, questions=1 / 3, weights=dict(update=1.0, answer=1.0, recall=0.5), stages=[
    dict(steps=150, documents=12, chunks=2, sizes={}, oracle=dict(keep=0.9)),
    dict(steps=600, documents=24, chunks=4, sizes={}, oracle=dict(keep=0.7)),
])


# ---------------------------------------------------------------- tokenizer and model
STRUCTURE = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
TAGS = [f"<{slash}{name}>" for name in ("problem", "memory", "section", "think", "search", "answer", "information") for slash in ("", "/")]
CHAT = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def words():
    """The vocabulary, in the order of ids: structure, tags, then every word that the world or a template uses."""
    text = " ".join([PROBLEM, *TEMPLATES.values(), "No previous memory user assistant system what which turns left Passage title nothing found", TARGET,
                     "; , . ? : ( ) | 0 1 2 3 4 5 6 7 8 9"])
    facts = [*CITIES, *CLUES, *sum(CLUES.values(), []), *PEOPLE, *HABITS, *sum(HABITS.values(), [])]
    return list(dict.fromkeys([*STRUCTURE, *TAGS, "\\boxed{", "}", *re.sub(r"\{\w+\}", " ", text).split(), *facts]))


def tokenizer():
    """A word-level PreTrainedTokenizerFast: one id a word; tags, `\\boxed{` and `}` are ordinary words of their own."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<unk>"))
    pieces = Regex(r"<\|\w+\|>|</?[a-z]+>|\\boxed\{|\[[A-Z]+\]|\w+|[^\w\s]")
    core.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    tok = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
                                  additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False)
    tok.chat_template = CHAT
    return tok


def model(seed=0):
    """A randomly initialised Qwen3ForCausalLM of about 0.5 million parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    eos, pad = words().index("<|im_end|>"), words().index("<pad>")
    config = Qwen3Config(vocab_size=len(words()), hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                         head_dim=32, intermediate_size=256, max_position_embeddings=4096, tie_word_embeddings=True,
                         initializer_range=0.06, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
                         eos_token_id=eos, pad_token_id=pad, bos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


# ---------------------------------------------------------------- documents and questions
def _facts(rng, count, city):
    """`count` facts [subject, verb, object] for one document: people's habits, and a fifth about cities other than `city`.

    Nobody has two objects for a verb, and no two people share one until all have served: in a document of the usual length
    verb and object tell whom a fact is about. Very long documents run out of facts and say some twice."""
    decks = {verb: rng.sample(things, len(things)) for verb, things in HABITS.items()}
    pairs = rng.sample([(person, verb) for person in PEOPLE for verb in HABITS], len(PEOPLE) * len(HABITS))
    habits = [[person, verb, decks[verb].pop() if decks[verb] else rng.choice(HABITS[verb])] for person, verb in pairs]
    known = [[other, verb, thing] for other in CITIES for verb, thing in ENCYCLOPEDIA[other].items() if other != city]
    rng.shuffle(known)
    share = count // 5  # about a fifth is about other cities
    pool = [known[i % len(known)] for i in range(share)] + [habits[i % len(habits)] for i in range(count - share)]
    rng.shuffle(pool)
    return pool


def _write(facts, answer=None):
    """Text of the facts, a line each, two a passage; the answer masked. -> (text, spans of its other names)"""
    text, spans = "", []
    for i, fact in enumerate(facts):
        for word in fact:
            word = MASK if word == answer else word
            if word in PEOPLE or word in CITIES:
                spans.append([len(text), len(text) + len(word)])
            text += word + " "
        text = text[:-1] + ("\n\n" if i % 2 else "\n")
    return text.strip(), spans


def documents(count, seed, chunks=4, clues=2):
    """Masked documents as data.py makes them: {"id", "text", "answer", "entities": [[start, end], ..]}.

    Document i depends on (seed, i, chunks) alone. Clues stand in different chunks where there are enough."""
    rows = []
    for i in range(count):
        rng = random.Random(f"document {seed} {i} {chunks}")
        answer = rng.choice(CITIES)
        hints = [[answer, verb, ENCYCLOPEDIA[answer][verb]] for verb in rng.sample(list(CLUES), clues)]
        size = FACTS_PER_CHUNK
        facts = _facts(rng, chunks * size - clues, answer)
        places = rng.sample(range(chunks), clues) if chunks >= clues else [j % chunks for j in range(clues)]
        parts = [[hint for hint, place in zip(hints, places) if place == part] for part in range(chunks)]
        for part in parts:
            while len(part) < size:
                part.append(facts.pop())
            rng.shuffle(part)
        text, spans = _write(sum(parts, []), answer)
        rows.append({"id": f"tiny-{seed}-{i}", "text": text, "answer": answer, "entities": spans})
    return rows


def questions(count, seed, chunks=4):
    """Long-text questions about what only the document tells: {"id", "question", "answers", "context"}."""
    rows = []
    for i in range(count):
        rng = random.Random(f"question {seed} {i} {chunks}")
        facts = _facts(rng, chunks * FACTS_PER_CHUNK, None)
        person, verb, thing = rng.choice([fact for fact in facts if fact[1] in HABITS])
        rows.append({"id": f"tiny-qa-{seed}-{i}", "question": f"{person} {verb} what ?", "answers": [thing], "context": _write(facts)[0]})
    return rows


def passages(seed):
    """A corpus for search: what habits every person has, [{"id", "title", "text"}], a passage a person."""
    rng = random.Random(f"passages {seed}")
    decks = {verb: rng.sample(things, len(things)) for verb, things in HABITS.items()}
    rows = []
    for i, person in enumerate(PEOPLE):
        habits = [[person, verb, deck[i % len(deck)]] for verb, deck in decks.items()]
        rows.append({"id": str(i), "title": person, "text": _write(rng.sample(habits, len(habits)))[0]})
    return rows


def search_questions(count, seed):
    """Questions whose answers stand in passages(seed), to be asked two at a time: {"id", "question", "answers", "context": ""}."""
    facts = [fact for row in passages(seed) for fact in _read(row["text"].split())]
    rows = []
    for i in range(count):
        person, verb, thing = random.Random(f"search {seed} {i}").choice(facts)
        rows.append({"id": f"tiny-search-{seed}-{i}", "question": f"{person} {verb} what ?", "answers": [thing], "context": ""})
    return rows


# ---------------------------------------------------------------- the oracle
_VOCABULARY = words()
_ID = {word: i for i, word in enumerate(_VOCABULARY)}


def _block(prompt, tag):
    """Words between <tag> and </tag> of a list of words, or None."""
    if f"<{tag}>" not in prompt:
        return None
    start = prompt.index(f"<{tag}>") + 1
    return prompt[start:prompt.index(f"</{tag}>", start)]


def _read(text):
    """The whole facts [subject, verb, object] of a list of words, in order, each once."""
    facts = []
    for i in range(len(text) - FACT + 1):
        s, v, o = text[i:i + FACT]
        if s in SUBJECTS and o in THINGS and [s, v, o] not in facts:
            facts.append([s, v, o])
    return facts


def _update(problem, memory, section, room, rng, keep, favour):
    """The next memory: old facts, then new ones, each kept with probability `keep`, by odds `favour` times better when the problem
    names its subject or object; as many as there is room for."""
    facts = _read(memory)
    facts += [fact for fact in _read(section) if fact not in facts]
    about = [fact[0] in problem or fact[2] in problem for fact in facts]
    odds = [keep / max(1 - keep, 1e-9) * (favour if a else 1) for a in about]
    kept = [i for i, o in enumerate(odds) if rng.random() < o / (1 + o)]
    while len(kept) > room:
        kept.remove(rng.choices(kept, [1 / favour if about[i] else 1 for i in kept])[0])
    return [word for i in kept for word in facts[i]]


def _answer(problem, memory, rng):
    """What the memory and the encyclopedia say, else a guess among what they leave open."""
    facts = _read(memory)
    if MASK in problem:
        clues = [(v, o) for s, v, o in facts if s == MASK and v in CLUES]
        fits = [city for city in CITIES if all(ENCYCLOPEDIA[city][v] == o for v, o in clues)]
        return rng.choice(fits or CITIES)
    subject, verb = problem[:2]
    return next((o for s, v, o in facts if (s, v) == (subject, verb)), None) or rng.choice(HABITS.get(verb, CITIES))


def _recall(memory, section, rng):
    """The hidden entity: from a fact of the memory that agrees in the other two words, else from the encyclopedia, else a guess."""
    encyclopedia = [[city, v, o] for city in CITIES for v, o in ENCYCLOPEDIA[city].items()]
    hidden = [fact for fact in _read(section) if TARGET in fact]
    for known in (_read(memory), encyclopedia):
        for fact in hidden:
            slot = fact.index(TARGET)
            if found := [other[slot] for other in known if other[1] == fact[1] and other[2 - slot] == fact[2 - slot]]:
                return rng.choice(found)
    s, v, o = hidden[0] if hidden else ("", "", TARGET)
    return rng.choice(PEOPLE if s == TARGET and v in HABITS else CITIES if s == TARGET else HABITS.get(v) or CLUES.get(v) or CITIES)


def _search(text, problem, rng, keep):
    """One turn of a search: what it keeps of what it knew and found, then the first open question's query, or the answers."""
    known = [fact for fact in _read(_block(text, "think") or []) + _read(_block(text, "information") or []) if fact[0] in problem]
    known = [fact for fact in known if rng.random() < keep]
    asked = [question.split()[:2] for question in " ".join(problem).split(";")]
    found = {(s, v): o for s, v, o in known}
    open_ = [pair for pair in asked if tuple(pair) not in found]
    turns = int(text[text.index("turns") - 1])
    summary = ["<think>", *(word for fact in known for word in fact), "</think>"]
    if open_ and turns > 1:
        return [*summary, "<search>", *open_[0], "</search>"]
    answers = [found.get((s, v)) or rng.choice(HABITS[v]) for s, v in asked]
    return [*summary, "<answer>", *" ; ".join(answers).split(), "</answer>"]


def oracle(prompts, limits, keys, keep=0.7, favour=1.5, seed=0):
    """A sampler for rollout(): lists of token ids in, lists of token ids out, each ending in <|im_end|>.

    It sees nothing but the prompt. `keep` is the share of facts that a turn carries over, by odds `favour` times better for
    those about what the problem names; deterministic in prompt, keys and seed."""
    responses = []
    for prompt, limit, key in zip(prompts, limits, keys):
        rng = random.Random(f"oracle {seed} {tuple(key)} {list(prompt)}")
        text = [_VOCABULARY[i] for i in prompt]
        problem, memory, section = (_block(text, tag) for tag in ("problem", "memory", "section"))
        if "turns" in text:
            response = _search(text, problem, rng, keep)
        elif problem is None:
            response = ["\\boxed{", _recall(memory, section, rng), "}"]
        elif memory is None or section is None:  # the answer's turn, or a baseline with the whole text or none at all
            response = ["\\boxed{", _answer(problem, memory or section or [], rng), "}"]
        else:
            response = _update(problem, memory, section, (limit - 1) // FACT, rng, keep, favour)
        responses.append([_ID[word] for word in response][:limit - 1] + [_ID["<|im_end|>"]])
    return responses


# ---------------------------------------------------------------- demo
def main():
    """Prints one document and the oracle's way through it."""
    tok, row = tokenizer(), documents(1, seed=0)[0]
    ids = tok(row["text"], add_special_tokens=False)["input_ids"]
    size, memory = CONFIG["chunk_tokens"], "No previous memory"

    def ask(name, **fields):
        message = [{"role": "user", "content": TEMPLATES[name].format(**fields)}]
        prompt = tok(tok.apply_chat_template(message, tokenize=False, add_generation_prompt=True), add_special_tokens=False)["input_ids"]
        return tok.decode(oracle([prompt], [CONFIG["memory_tokens"]], [(0,)])[0], skip_special_tokens=True)

    print(row["text"], f"\n({MASK} is {row['answer']})\n")
    for start in range(0, len(ids), size):
        section = tok.decode(ids[start:start + size])
        memory = ask("update", problem=PROBLEM, memory=memory, section=section)
        print(f"section  {section}\nmemory   {memory}\n")
    print("problem ", PROBLEM, "\nanswer  ", ask("answer", problem=PROBLEM, memory=memory))
    name = row["text"][slice(*row["entities"][0])]
    section = tok.decode(ids[:size]).replace(name, TARGET)
    print(f"recall   {section}\nanswer   {ask('recall', memory=memory, section=section)} ({name})")


if __name__ == "__main__":
    main()
