"""The embedded default: a pocket encyclopedia, its tokenizer, model and oracle, so that everything runs without a download.

    python tiny.py                      one masked document, its chunks, and the oracle's way through it (seconds)
    python tiny.py study [--seeds 3]    the paper's claims on this world, with train.py and eval.py (under two hours; --quick: minutes)

The world. Every fact is three words: `Alda sells wool`. 25 made-up cities have 4 attributes of 5 values each, arranged in
orthogonal Latin squares: one clue leaves five candidates, any two clues leave one. These facts never change; they are the
encyclopedia, which the warm start puts into the model. What people like, own, play or wear is drawn anew for every document, so
that nothing but memory can answer for it. A masked document hides one city, with two clues in different chunks, among facts about
people and other cities: what the mask stands for must be inferred from what was kept of several chunks and what the model knows.

Long-text questions are about a person with two facts in the document, however long that is; all else is about others.

The oracle stands in the sampler's place in rollout(): it reads a prompt and writes the response of a model that copies faithfully
but has a poor sense of relevance: it takes up every second fact about what the problem names, and three of ten others, and drops
any when its memory is full. Fine-tuning on the turns that it leaves behind is the warm start (WARM_START). Such coins are the
weakness on purpose: a policy that drifts under noise, or is merely sampled more sharply, gains nothing by them, so a rising curve
means that the reward was understood (--shuffle_rewards shows it).

How it differs from real data:
1. Every word is one token, every fact three; chunks of a multiple of three tokens never cut a fact (others work, and cut some).
2. A passage is two facts, a line each. Facts about other cities stand in for related passages, people's habits for random ones.
3. Entities are known, not recognised: subjects and objects, each with its exact span.
4. Prompts are a few words long, since the model has never read anything else.
"""
import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

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
CONFIG = dict(steps=24, documents_per_step=32, documents_per_update=32, recall_draw="document", chunks=4, chunk_tokens=6, memory_tokens=13,
              answer_tokens=6, lr=2e-4, kl=2e-2, warmup_steps=3, beta2=0.98, eval_every=8, gradient_checkpointing=False)
CONFIG_OF_TASK = {"longqa": dict(aggregate="sequence"), "searchqa": dict(aggregate="sequence", answer_tokens=24)}
# Muon for the matrices (lr), AdamW for embeddings and norms (lr_rest): copying takes about two thirds of AdamW's steps. In the end
# the last norm is multiplied by `sharpen`, as if sampled at temperature 1 / sharpen: so small a model copies too noisily at 1.
WARM_START = dict(lr=5e-3, lr_rest=3e-3, sharpen=2.0, stages=[
    dict(steps=150, chunks=2, rows=dict(documents=5, questions=5, searches=2)),
    dict(steps=600, chunks=4, rows=dict(documents=10, questions=10, searches=4)),
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
def _document(rng, hints, chunks):
    """Facts [subject, verb, object] of one document, in order: `hints`, all of one subject and in different chunks where there are
    enough, among people's habits and a fifth of facts about cities, none of them of that subject.

    Verbs and objects are dealt like cards, so that those of a short document differ; very long ones say facts twice."""
    subject, taken = hints[0][0], [verb for _, verb, _ in hints]
    who = {verb: rng.sample(PEOPLE, len(PEOPLE)) for verb in HABITS}
    what = {verb: [thing for _ in range(3) for thing in rng.sample(things, len(things))] for verb, things in HABITS.items()}
    deals = [sorted(rng.sample(list(HABITS), len(HABITS)), key=taken.__contains__) for _ in PEOPLE]
    habits = [[who[verb][i], verb, what[verb][i]] for i, verbs in enumerate(deals) for verb in verbs if who[verb][i] != subject]
    known = [[city, verb, thing] for city in CITIES for verb, thing in ENCYCLOPEDIA[city].items() if city != subject]
    rng.shuffle(known)
    count = chunks * FACTS_PER_CHUNK - len(hints)
    decks = [itertools.cycle(habits), itertools.cycle(known)]
    others = [next(decks[kind]) for kind in rng.sample([1] * (count // 5) + [0] * (count - count // 5), count)]
    places = rng.sample(range(chunks), len(hints)) if chunks >= len(hints) else [i % chunks for i in range(len(hints))]
    parts = [[hint for hint, place in zip(hints, places) if place == part] for part in range(chunks)]
    for part in parts:
        while len(part) < FACTS_PER_CHUNK:
            part.append(others.pop())
        rng.shuffle(part)
    return sum(parts, [])


def _write(facts, answer=None):
    """Text of the facts, a line each, two a passage; the answer masked. -> (text, spans of subjects and objects)"""
    text, spans = "", []
    for i, fact in enumerate(facts):
        for word in fact:
            word = MASK if word == answer else word
            if word not in (MASK, fact[1]):
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
        text, spans = _write(_document(rng, hints, chunks), answer)
        rows.append({"id": f"tiny-{seed}-{i}", "text": text, "answer": answer, "entities": spans})
    return rows


def questions(count, seed, chunks=4, clues=2):
    """Long-text questions about what only the document tells of a person: {"id", "question", "answers", "context"}.

    The person has `clues` facts in the document, one of which is asked for."""
    rows = []
    for i in range(count):
        rng = random.Random(f"question {seed} {i} {chunks}")
        person = rng.choice(PEOPLE)
        hints = [[person, verb, rng.choice(HABITS[verb])] for verb in rng.sample(list(HABITS), clues)]
        facts, (_, verb, thing) = _document(rng, hints, chunks), hints[0]
        rows.append({"id": f"tiny-qa-{seed}-{i}", "question": f"{person} {verb} what ?", "answers": [thing], "context": _write(facts)[0]})
    return rows


def passages(seed):
    """A corpus for search: all habits of all people, [{"id", "title", "text"}], two facts a passage."""
    rng = random.Random(f"passages {seed}")
    rows = []
    for person in PEOPLE:
        habits = [[person, verb, rng.choice(things)] for verb, things in HABITS.items()]
        rng.shuffle(habits)
        rows += [{"id": str(len(rows) + i), "title": person, "text": _write(habits[2 * i:2 * i + 2])[0]} for i in range(len(habits) // 2)]
    return rows


def search_questions(count, seed):
    """Questions whose answers stand in passages(seed), to be asked two at a time: {"id", "question", "answers", "context": ""}."""
    facts = [fact for row in passages(seed) for fact in _read(row["text"].split())]
    rows = []
    for i in range(count):
        person, verb, thing = random.Random(f"search {seed} {i}").choice(facts)
        rows.append({"id": f"tiny-search-{seed}-{i}", "question": f"{person} {verb} what ?", "answers": [thing], "context": ""})
    return rows


def lookup(rows, k=3):
    """A search for passages by shared words, for demonstrations: queries -> for each the best k passages that share any."""
    def best(query):
        shared = [len({*query.split()} & {*row["text"].split()}) for row in rows]
        return [rows[i] for i in sorted(range(len(rows)), key=lambda i: -shared[i])[:k] if shared[i]]

    return lambda queries: [best(query) for query in queries]


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


def _update(problem, memory, section, room, rng, keep, keep_asked):
    """The next memory: the old facts, then each new one with probability `keep` (`keep_asked`, if the problem names its subject);
    what there is no room for is dropped at random."""
    facts = _read(memory)
    facts += [fact for fact in _read(section) if fact not in facts and rng.random() < (keep_asked if fact[0] in problem else keep)]
    kept = sorted(rng.sample(range(len(facts)), min(room, len(facts))))
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
    """One turn of a search: what it keeps of what it was asked for, then the first open question's query, or the answers."""
    asked = [question.split()[:2] for question in " ".join(problem).split(";")]
    shown = [fact for tag in ("think", "information") for fact in _read(_block(text, tag) or [])]
    found = {(s, v): o for s, v, o in shown if [s, v] in asked and rng.random() < keep}
    missing = [pair for pair in asked if tuple(pair) not in found]
    summary = ["<think>", *(word for (s, v), o in found.items() for word in (s, v, o)), "</think>"]
    if missing and int(text[text.index("turns") - 1]) > 1:
        return [*summary, "<search>", *missing[0], "</search>"]
    answers = [found.get((s, v)) or rng.choice(HABITS[v]) for s, v in asked]
    return [*summary, "<answer>", *" ; ".join(answers).split(), "</answer>"]


def oracle(prompts, limits, keys, keep=0.3, keep_asked=0.5, keep_found=0.8, seed=0):
    """A sampler for rollout(): lists of token ids in, lists of token ids out, each ending in <|im_end|>.

    It sees nothing but the prompt. `keep` is the probability that a fact of a section is taken up, `keep_asked` if its subject
    stands in the problem, `keep_found` that a search carries over one it was asked for; deterministic in prompt, keys and seed."""
    responses = []
    for prompt, limit, key in zip(prompts, limits, keys):
        rng = random.Random(f"oracle {seed} {tuple(key)} {list(prompt)}")
        text = [_VOCABULARY[i] for i in prompt]
        problem, memory, section = (_block(text, tag) for tag in ("problem", "memory", "section"))
        if "turns" in text:
            response = _search(text, problem, rng, keep_found)
        elif problem is None:
            response = ["\\boxed{", _recall(memory, section, rng), "}"]
        elif memory is None or section is None:  # the answer's turn, or a baseline with the whole text or none at all
            response = ["\\boxed{", _answer(problem, memory or section or [], rng), "}"]
        else:
            response = _update(problem, memory, section, (limit - 1) // FACT, rng, keep, keep_asked)
        responses.append([_ID[word] for word in response][:limit - 1] + [_ID["<|im_end|>"]])
    return responses


# ---------------------------------------------------------------- study
def arms(steps):
    """The runs of a study in order: {name: (arm to start from, flags of train.py)}. "warm" is the warm start itself."""
    memtrain = ["--steps", steps, "--eval_every", steps]
    longqa = ["--task", "longqa", "--group", 8, "--eval_documents", 0, "--steps"]
    runs = {"warm": (None, ["--steps", 1, "--lr", 0, "--eval_documents", 0])}
    runs |= {objective: ("warm", [*memtrain, "--objective", objective]) for objective in ("full", "decoupled", "e2e")}
    runs["shuffled"] = ("warm", [*memtrain, "--shuffle_rewards"])
    runs["warm + longer QA"] = ("warm", [*longqa, 2 * steps])
    return runs | {f"{start} + QA": (start, [*longqa, steps]) for start in ("warm", "full", "decoupled", "e2e")}


# The paper's claims as differences between arms. MemTrain + QA and the longer QA see as many steps.
CLAIMS = {
    "(a) MemTrain alone": ("full", "warm"),
    "(b) MemTrain before QA": ("full + QA", "warm + QA"),
    "(c) the coupled reward, alone": ("full", "decoupled"),
    "(c) the coupled reward, before QA": ("full + QA", "decoupled + QA"),
    "(c) recall, alone": ("full", "e2e"),
    "(c) recall, before QA": ("full + QA", "e2e + QA"),
    "(d) MemTrain, not more QA": ("full + QA", "warm + longer QA"),
    "control": ("shuffled", "warm"),
}


def guesses(rows, room):
    """What needs no model: exact match of a memory of random facts, of one that keeps what is asked for, and of a guess."""
    scores = {"random facts": [], "oracle memory": [], "guess": []}
    for row in rows:
        facts, question, rng = _read(row["context"].split()), row["question"].split(), random.Random(row["id"])
        kept = [fact for fact in facts if rng.random() < min(1, room / len(facts))]
        for name, memory in ("random facts", kept), ("oracle memory", [fact for fact in facts if fact[0] == question[0]]), ("guess", []):
            scores[name].append(_answer(question, sum(memory, []), rng) in row["answers"])
    return {name: statistics.fmean(values) for name, values in scores.items()}


def spread(values):
    """Mean and half of its 95 % interval over seeds (Student's t); None for the half with one seed."""
    mean, t = statistics.fmean(values), {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.5)
    return mean, t * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def study(args):
    """Trains every arm for every seed and asks it held-out questions by length, one process an arm, as many at a time as there
    are cores; goes on where it was stopped.

    Leaves results.json (the raw numbers), report.md and, where matplotlib is installed, figure.png."""
    steps, lengths, count = CONFIG["steps"], args.lengths, 500
    if args.quick:
        args.seeds, steps, lengths, count = 1, 8, [1, 2, 4], 100
    out = Path(args.out or ("runs/quick-study" if args.quick else "runs/study"))
    (out / "questions").mkdir(parents=True, exist_ok=True)
    files, results = {n: out / "questions" / f"{n:03d}x.jsonl" for n in lengths}, {}
    for n, file in files.items():
        rows = questions(count, HELDOUT_SEED, n * CONFIG["chunks"])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, score in guesses(rows, (CONFIG["memory_tokens"] - 1) // FACT).items():
            results.setdefault(name, {})[n] = [score]
    runs = arms(steps)
    folders = run_arms(out, runs, args.seeds, [*files.values()])
    for name in runs:
        tables = [json.loads(Path(f"{folder}.json").read_text())["table"] for folder in folders[name]]
        results[name] = {n: [table[file.stem]["em"][0] for table in tables] for n, file in files.items()}
    proxy = {name: [heldout_looks(folder) for folder in folders[name]] for name in ("full", "decoupled", "e2e", "shuffled")}
    (out / "results.json").write_text(json.dumps({"exact match by length": results, "held-out proxy tasks": proxy}, indent=1) + "\n")
    text = report(results, proxy, lengths)
    text += (f"\n{args.seeds} seed{'s' * (args.seeds > 1)}, {count} questions a length, in trained documents of {CONFIG['chunks']} chunks; "
             f"± half a 95 % interval over seeds\n")  # fmt: skip
    (out / "report.md").write_text(text)
    print(text)
    draw(out / "figure.png", results, lengths, runs)


def run_arms(out, runs, seeds, files):
    """Trains and evaluates what of `runs` is not there yet. -> {arm: its folder for every seed}; the table of eval.py on `files`
    lies beside each, as folder.json"""
    jobs, clock, root = {}, time.time(), Path(__file__).parent

    def run(name, seed, start, flags):
        folder, table = (out / f"{name}-{seed}{end}".replace(" ", "") for end in ("", ".json"))
        model = [] if start is None else ["--model", jobs[start, seed].result()]
        train = ["train.py", *model, *flags, "--seed", seed, "--out", folder, "--processes", 1, "--resume"]
        test = ["eval.py", "longqa", "--model", folder, "--seed", 0, "--batch", 250, "--data", *files, "--out", table]
        if not table.exists() or not {file.stem for file in files} <= {*json.loads(table.read_text())["table"]}:
            with open(f"{folder}.log", "w") as log:
                for script, *rest in train, test:
                    command = [sys.executable, str(root / script), *map(str, rest)]
                    if subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
                        raise SystemExit(f"{' '.join(command)} failed: see {log.name}; the same study goes on once that is mended")
            print(f"{(time.time() - clock) / 60:.0f} min: {name}, seed {seed}; {sum(job.done() for job in jobs.values()) + 1} of {len(jobs)}", flush=True)
        return folder

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, (start, flags) in runs.items():  # in this order, so that none waits for one that comes after it
            for seed in range(seeds):
                jobs[name, seed] = pool.submit(run, name, seed, start, flags)
        try:
            for job in as_completed(jobs.values()):
                job.result()
        finally:  # after a failure, or Ctrl-C, what runs may end, and nothing more begins
            pool.shutdown(wait=False, cancel_futures=True)
    return {name: [jobs[name, seed].result() for seed in range(seeds)] for name in runs}


def heldout_looks(folder):
    """Exact match on held-out documents, of a run's first look and its last: {"E2E before", "E2E after", "recall before", "recall after"}."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    looks = [line["heldout"] for line in lines if "heldout" in line]
    return {f"{task} {when}": look[kind][0] for task, kind in (("E2E", "trajectory"), ("recall", "recall"))
            for when, look in (("before", looks[0]), ("after", looks[-1]))}  # fmt: skip


def markdown(title, columns, rows):
    """A table of percents; rows: {name: a list of values over seeds for every column}."""
    lines = ["| " + " | ".join([title, *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        spreads = [spread(values) for values in cells]
        lines.append("| " + " | ".join([name, *(f"{100 * mean:.1f}" + ("" if half is None else f" ± {100 * half:.1f}") for mean, half in spreads)]) + " |")
    return "\n".join(lines) + "\n"


def report(results, proxy, lengths):
    """The tables of a study: exact match by length, the claims as paired differences, the proxy tasks."""
    columns = [f"{n}x" for n in lengths] + ["mean"]

    def row(by_length):
        return [by_length[n] for n in lengths] + [[statistics.fmean(values) for values in zip(*(by_length[n] for n in lengths))]]

    rows = {name: row(by_length) for name, by_length in results.items()}
    differences = {f"{claim}: {a} - {b}": [[x - y for x, y in zip(*pair)] for pair in zip(rows[a], rows[b])] for claim, (a, b) in CLAIMS.items()}
    looks = {name: [[look[column] for look in seeds] for column in seeds[0]] for name, seeds in proxy.items()}
    return "\n".join([markdown("long-text QA, exact match in %", columns, rows), markdown("difference in points, paired by seed", columns, differences),
                      markdown("held-out proxy tasks, exact match in %", list(proxy["full"][0]), looks)])  # fmt: skip


def draw(path, results, lengths, runs):
    try:
        import matplotlib
    except ImportError:
        return print("no figure: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for name, row in results.items():
        means, halves = zip(*(spread([100 * value for value in row[n]]) for n in lengths))
        style = {"linestyle": {"random facts": ":", "oracle memory": "-", "guess": "--"}.get(name), "color": "grey"}
        if name in runs:  # a colour for every start
            style = {"marker": "o", "linestyle": "--" if "longer" in name else "-", "color": f"C{list(runs).index(name.split(' + ')[0])}"}
        for side, wanted in zip(axes, ("QA" not in name, "QA" in name or name not in runs)):
            if wanted:
                side.errorbar(lengths, means, [half or 0 for half in halves], label=name, capsize=2, **style)
    for side, title in zip(axes, ("after MemTrain alone", "after post-training on long-text QA")):
        side.set_xscale("log", base=2)
        side.set(xticks=lengths, xticklabels=[f"{n}x" for n in lengths], ylim=(0, 100), xlabel="length of the document", title=title)
        side.legend(fontsize=7)
    axes[0].set_ylabel("exact match in %")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(path)


# ---------------------------------------------------------------- demo
def demo():
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command")
    options = commands.add_parser("study", help="the paper's claims at pocket size")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N", help="of the documents asked about, in trained ones")
    options.add_argument("--quick", action="store_true", help="one seed, few steps, short documents: minutes")
    options.add_argument("--out", help="folder for all runs and results [runs/study, runs/quick-study]")
    args = parser.parse_args()
    study(args) if args.command == "study" else demo()


if __name__ == "__main__":
    main()
