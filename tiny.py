"""The embedded default: a pocket encyclopedia, its tokenizer, model and oracle, so that everything runs without a download.

    python tiny.py                      one masked document, its chunks, and the oracle's way through it (seconds)
    python tiny.py study [--seeds 3]    the paper's claims on this world, with train.py and eval.py (hours; --quick: minutes)

The world. Every fact is three words: `Alda sells wool`. 25 made-up cities have 4 attributes of 5 values each, arranged in
orthogonal Latin squares: one clue leaves five candidates, any two clues leave one. These facts never change; they are the
encyclopedia, which the warm start puts into the model. What people like, own, play or wear is drawn anew for every document, so
that nothing but memory can answer for it. A masked document hides one city, with two clues in different chunks, among facts about
people and other cities: what the mask stands for must be inferred from what was kept of several chunks and what the model knows.

The oracle stands in the sampler's place in rollout(): it reads a prompt and writes the response of a model that copies faithfully
but has no sense of relevance: it takes up two facts of five that it reads, whatever the question. Fine-tuning on the turns that it leaves
behind is the warm start (WARM_START). Such a coin is the weakness on purpose: a policy that drifts under noise, or is merely
sampled more sharply, gains nothing by it, so a rising curve means that the reward was understood (--shuffle_rewards shows it).

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
CONFIG = dict(steps=24, documents_per_step=32, documents_per_update=32, recall_draw="document", chunks=4, chunk_tokens=6, memory_tokens=16,
              answer_tokens=6, lr=2e-4, kl=2e-2, warmup_steps=3, beta2=0.98, eval_every=8, gradient_checkpointing=False)
CONFIG_OF_TASK = {"longqa": dict(aggregate="sequence"), "searchqa": dict(aggregate="sequence", answer_tokens=24)}
# Muon for the matrices (lr), AdamW for embeddings and norms (lr_rest): copying takes about two thirds of AdamW's steps. In the end
# the last norm is multiplied by `sharpen`, as if sampled at temperature 1 / sharpen: so small a model copies too noisily at 1.
WARM_START = dict(lr=5e-3, lr_rest=3e-3, sharpen=2.0, stages=[
    dict(steps=150, chunks=2, rows=dict(documents=7, questions=3, searches=2)),
    dict(steps=600, chunks=4, rows=dict(documents=14, questions=6, searches=4)),
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

    Verbs and objects are dealt like cards, so that those of a short document differ; very long documents say facts twice."""
    who = {verb: rng.sample(PEOPLE, len(PEOPLE)) for verb in HABITS}
    what = {verb: [thing for _ in range(3) for thing in rng.sample(things, len(things))] for verb, things in HABITS.items()}
    habits = [[who[verb][i], verb, what[verb][i]] for i in range(len(PEOPLE)) for verb in rng.sample(list(HABITS), len(HABITS))]
    known = [[other, verb, thing] for other in CITIES for verb, thing in ENCYCLOPEDIA[other].items() if other != city]
    rng.shuffle(known)
    decks = [itertools.cycle(habits), itertools.cycle(known)]
    return [next(decks[kind]) for kind in rng.sample([1] * (count // 5) + [0] * (count - count // 5), count)]


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


def _update(memory, section, room, rng, keep):
    """The next memory: the old facts, then each new one with probability `keep`; what there is no room for is dropped at random."""
    facts = _read(memory)
    facts += [fact for fact in _read(section) if fact not in facts and rng.random() < keep]
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


def oracle(prompts, limits, keys, keep=0.4, keep_found=0.8, seed=0):
    """A sampler for rollout(): lists of token ids in, lists of token ids out, each ending in <|im_end|>.

    It sees nothing but the prompt. `keep` is the probability that a fact of a section is taken up, `keep_found` that a search
    carries over one it was asked for; deterministic in prompt, keys and seed."""
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
            response = _update(memory, section, (limit - 1) // FACT, rng, keep)
        responses.append([_ID[word] for word in response][:limit - 1] + [_ID["<|im_end|>"]])
    return responses


# ---------------------------------------------------------------- study
def arms(steps, more):
    """The runs of a study in order: {name: (arm to start from, flags of train.py)}. "warm" is the warm start itself."""
    runs = {"warm": (None, ["--steps", "1", "--lr", "0"])}
    for objective in ("full", "decoupled", "e2e"):
        runs[objective] = (None, ["--steps", steps, "--objective", objective])
    runs["shuffled"] = (None, ["--steps", steps, "--shuffle_rewards"])
    for start in ("warm", "full", "decoupled", "e2e"):
        runs[f"{start}+qa"] = (start, ["--task", "longqa", "--steps", more])
    runs["warm+longer qa"] = ("warm", ["--task", "longqa", "--steps", steps + more])
    return runs


def guesses(rows, room):
    """What needs no model: exact match of a memory of random facts, of one that keeps what is asked for, and of a guess."""
    scores = {"random facts": [], "oracle memory": [], "guess": []}
    for row in rows:
        facts, question, rng = _read(row["context"].split()), row["question"].split(), random.Random(row["id"])
        kept = [fact for fact in facts if rng.random() < min(1, room / len(facts))]
        for name, memory in ("random facts", kept), ("oracle memory", [fact for fact in facts if fact[0] == question[0]]), ("guess", []):
            scores[name].append(_answer(question, sum(memory, []), rng) in row["answers"])
    return {name: sum(values) / len(values) for name, values in scores.items()}


def spread(values):
    """Mean and half of its 95 % interval over seeds (Student's t); None for the half with one seed."""
    mean, t = statistics.fmean(values), {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.5)
    return mean, t * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def study(args):
    """Trains every arm for every seed and asks it held-out questions by length; goes on where it was stopped.

    Leaves args.out/results.json (the raw numbers), table.md and, where matplotlib is installed, figure.png."""
    out, steps, more, lengths, count = Path(args.out), CONFIG["steps"], CONFIG["steps"], [1, 2, 4, 8, 16, 32], 500
    if args.quick:
        args.seeds, steps, more, lengths, count = 1, 8, 8, [1, 2, 4], 100
    ranks, results = str(min(4, os.cpu_count() or 1)), {}
    python, torchrun = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    root = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (out / "questions").mkdir(parents=True, exist_ok=True)
    files = {n: out / "questions" / f"{n:03d}x.jsonl" for n in lengths}
    for n, file in files.items():
        rows = questions(count, HELDOUT_SEED, n * CONFIG["chunks"])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, score in guesses(rows, (CONFIG["memory_tokens"] - 1) // FACT).items():
            results.setdefault(name, {}).setdefault(n, []).append(score)

    for seed in range(args.seeds):
        for name, (start, flags) in arms(steps, more).items():
            run, table = out / f"{name}-{seed}".replace(" ", "-"), out / f"{name}-{seed}.json".replace(" ", "-")
            model = ["--model", str(out / f"{start}-{seed}")] if start else []
            if not table.exists():
                print(f"== seed {seed}, {name}", flush=True)
                command = [*python, root / "train.py", *model, *flags, "--seed", seed, "--out", run, "--eval_every", 0, "--eval_documents", 0, "--resume"]
                subprocess.run([str(part) for part in command], check=True, env=environment)
                command = [*torchrun, root / "eval.py", "longqa", "--model", run, "--out", table, "--seed", 0, "--data", *files.values()]
                subprocess.run([str(part) for part in command], check=True, env=environment)
            scores = json.loads(table.read_text())["table"]
            for n, file in files.items():
                results.setdefault(name, {}).setdefault(n, []).append(scores[file.stem]["em"][0])
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report(out, results, lengths, args.seeds, count)


def report(out, results, lengths, seeds, count):
    """Prints and writes the table of a study, and draws it."""
    trained = arms(0, 0)
    lines = ["| exact match in % | " + " | ".join(f"{n}x" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name, row in results.items():
        cells = [f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if half is not None and name in trained else "") for mean, half in (spread(row[n]) for n in lengths)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = f"{seeds} seed{'s' * (seeds > 1)}, {count} questions a length, lengths in trained documents of {CONFIG['chunks']} chunks; ± half a 95 % interval over seeds"
    (out / "table.md").write_text("\n".join([*lines, "", note, ""]))
    print("\n".join([*lines, "", note]))
    try:
        import matplotlib
    except ImportError:
        return print("no figure: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, row in results.items():
        means, halves = zip(*(spread(row[n]) for n in lengths))
        style = {"marker": "o"} if name in trained else {"linestyle": ":", "color": "grey"}
        axes.errorbar(lengths, means, [half or 0 for half in halves], label=name, capsize=2, **style)
    axes.set(xscale="log", xticks=lengths, xticklabels=[f"{n}x" for n in lengths], ylim=(0, 1), xlabel="length", ylabel="exact match")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(out / "figure.png", dpi=150, bbox_inches="tight")


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
    options.add_argument("--quick", action="store_true", help="one seed, few steps, short documents: minutes")
    options.add_argument("--out", default="runs/study")
    args = parser.parse_args()
    study(args) if args.command == "study" else demo()


if __name__ == "__main__":
    main()
