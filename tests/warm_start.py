"""How the pocket world's model was made: it learns to bind, to quote, and to imitate an oracle.

    python tests/warm_start.py --seed 7      a world of this seed and a model of its own, in minutes

Seed 0 gives tests/pocket.safetensors, up to the rounding of another machine.

The oracle stands in the sampler's place in `rollout`: it reads a prompt and writes the response of
a model that copies without errors. What it has in memory about the one asked for it always carries
on; but a new fact it takes up with chance 0.5, whatever it is about (ASKED, OTHERS). Before it
answers it says what it knows of the one asked for. Its coin is the weakness on purpose: a policy
that drifts under noise, or is merely sampled more sharply, gains nothing by it, so that a rising
curve means that the reward was understood (train.py --shuffle_rewards shows it).
"""

import argparse
import random
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import distributed  # noqa: E402
import pocket  # noqa: E402
import train  # noqa: E402
from data import TARGET  # noqa: E402
from pocket import (  # noqa: E402
    CITIES, ENCYCLOPEDIA, FACT, FACTS_PER_CHUNK, HABITS, HINTS, ID, KNOWN, PEOPLE, ROOM, SUBJECTS,
    THINGS, VERBS, VOCABULARY,
)  # fmt: skip
from rollout import Prompts, Response, Template  # noqa: E402

STEPS = 3200  # at most: of binding, of quoting, and of imitation
GOALS = {"verb": 0.98, "object": 0.98, "quote": 0.9, "answer": 0.9}  # it ends with these `skills`
FALL = 250, 650  # steps of imitation over which the learning rate falls; then a new round begins
WEIGHTS = {"update": 2, "quote": 4, "answer": 2, "recall": 1, "find": 1}  # of kinds of prompts
TOLD = 1 / 8  # share of the practised recalls whose memory tells what is hidden
QUOTE = "quote <section> {section} </section> <problem> {problem} </problem>"  # an exercise
KIND = 2  # where a prompt's first word stands: behind `<|im_start|> user`

# ------------------------------------------------------------------------------------ the oracle

# the chances that a fact of the section is taken up, and that one of the memory is carried on
ASKED = 0.5, 1  # .. if it is about the one whom the problem names
OTHERS = 0.5, 0.5  # .. if it is about others
KEEP_FOUND = 0.8  # how probably a search carries over a fact that it was asked for


def oracle(prompts, limits, keys):
    """A sampler: a `Response` is a function of its prompt, limit and key."""
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


def read(text):
    """The whole facts of a list of words, in order, each once.

    >>> read("tea Ada sells tea Ben grows".split())
    [['Ada', 'sells', 'tea']]
    """
    facts, subjects, things = [], {*SUBJECTS, TARGET}, {*THINGS, TARGET}
    for i in range(len(text) - FACT + 1):
        fact = text[i : i + FACT]
        is_fact = fact[0] in subjects and fact[1] in VERBS and fact[2] in things
        if is_fact and fact not in facts:
            facts.append(fact)
    return facts


def about(problem, text):
    """The facts of a list of words about the one whom the problem names."""
    return [fact for fact in read(text) if fact[0] == problem[0]]


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


# --------------------------------------------------------------------------------------- binding
# In `Ada sells wool Ada grows oats Ben sells figs Ada sells ..` what comes next is wool, which only
# `Ada` and `sells` together tell. Language models learn to copy so early, by attention heads that
# look back and others that look for what stood there ("induction").


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
        ids.append(ids_of(order))
    return torch.tensor(ids), torch.tensor(known)


def any_facts(rng, names, verbs=VERBS):
    """A fact or two about each. Nothing but the text tells what goes together."""
    facts = []
    for name in names:
        for verb in rng.sample(verbs, rng.choice([1, 1, 2])):
            facts.append([name, verb, rng.choice(THINGS)])
    return facts


def ids_of(facts):
    return [ID[word] for word in sum(facts, [])]


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
    found = {"verb": right[known & verbs], "object": right[known & ~verbs]}
    return {name: shares.float().mean().item() for name, shares in found.items()}


# ------------------------------------------------------------------- what is imitated, and skills
# A row is (prompt ids, response ids); its kind is the prompt's first word.


def demonstrations(prompts, seed, count, chunks=pocket.CHUNKS):
    """The oracle's turns on `count` fresh documents and questions each and half as many searches:
    the same tasks as in training, with the oracle in the sampler's place. -> rows"""
    corpus = pocket.passages(seed)
    best = data.open_index([row["text"] for row in corpus])

    def lookup(queries):
        return [[corpus[i] for i, _ in hits] for hits in best(queries, 3)]

    flags = pocket.SETTINGS | pocket.SEARCH_SETTINGS | {"group": 1, "recalls": 1}
    setup = train.Setup(train.Config(**flags), prompts, oracle, lookup)
    documents = pocket.documents(count, seed, chunks)
    questions = pocket.questions(count, seed, chunks)
    pairs = data.pair_questions(pocket.search_questions(count // 2 * 2, seed), 2)
    groups = train.memtrain(setup, dict(enumerate(documents)), seed)
    groups += train.longqa(setup, dict(enumerate(questions)), seed)
    groups += train.searchqa(setup, dict(enumerate(pairs)), seed)
    return [(turn.prompt_ids, turn.response_ids) for turn in train.turns_of(groups)]


def exercises(prompts, seed, count):
    """What the oracle writes when it is asked about made-up memories and sections, six prompts for
    each of `count` documents and half as many questions. -> rows"""
    rng, asked = random.Random(f"exercises {seed}"), []
    quote = Template(prompts.tokenizer, QUOTE)
    for row in pocket.documents(count, seed) + pocket.questions(count // 2, seed):
        asked += about_a_text(prompts, row, rng)
        asked += about_any_facts(prompts, quote, row["question"].split(), rng)

    # 99 tokens: here a memory may hold more facts than ROOM
    responses = oracle(asked, [99] * len(asked), range(len(asked)))
    return [(prompt, response.ids) for prompt, response in zip(asked, responses)]


def about_a_text(prompts, row, rng):
    """-> prompts for an answer, an update and a recall, of the facts of a document or question"""
    text = (row.get("text") or row["context"]).split()
    words = row["question"].split()
    facts, hints, problem = read(text), about(words, text), ids_of([words])
    others = [fact for fact in facts if fact not in hints]

    # answer from a memory that holds all that is asked for, among other facts
    memory = hints + rng.sample(others, rng.randint(0, ROOM - HINTS))
    rng.shuffle(memory)
    asked = [prompts.answer(problem=problem, memory=ids_of(memory))]

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
    return asked


def about_any_facts(prompts, quote, words, rng):
    """-> prompts for an update and two quotes, of recombined facts and a problem of these words, in
    which it is about somebody else each time"""
    size = ROOM + FACTS_PER_CHUNK
    facts = any_facts(rng, rng.sample(SUBJECTS, size))[:size]
    rng.shuffle(facts)
    names = [fact[0] for fact in facts]
    old, section = facts[: rng.randint(0, ROOM)], facts[-FACTS_PER_CHUNK:]
    name = rng.choice([names[0], names[1], names[-1], names[-2]])
    problem = ids_of([[name, *words[1:]]])
    asked = [prompts.update(problem=problem, memory=ids_of(old), section=ids_of(section))]

    for _ in range(2):
        rng.shuffle(facts)
        names = [fact[0] for fact in facts]
        section = facts[: rng.randint(3, ROOM)]
        name = rng.choice(names[: len(section) + 2])
        problem = ids_of([[name, *words[1:]]])
        asked.append(quote(problem=problem, section=ids_of(section)))
    return asked


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


# ------------------------------------------------------------------------------------ warm start


def warm_start(seed=0, steps=STEPS):
    """The pocket model, taught to bind, then to quote and answer, then to imitate the oracle in all
    tasks: each at most `steps`, and until its GOALS are reached. In the end the last norm is
    doubled, as if sampled at temperature 0.5: so small a model copies too noisily at 1."""
    lm = pocket.untrained_model(seed)
    prompts = Prompts(pocket.tokenizer(), pocket.TEMPLATES, pocket.PROBLEM)
    optimizers = open_optimizers(lm)
    learn_to_bind(lm, optimizers, seed, steps)
    learn_to_quote(lm, prompts, optimizers, seed, steps)
    learn_to_imitate(lm, prompts, optimizers, seed, steps)
    lm.model.norm.weight.data *= 2
    return lm


def learn_to_bind(lm, optimizers, seed, steps):
    """Until verbs and objects that were said before are right."""
    rng, unseen = random.Random(f"binding {seed}"), said_again(random.Random("unseen"), 128)
    generator, width = torch.Generator().manual_seed(seed), lm.config.hidden_size
    rotation = torch.nn.init.orthogonal_(torch.empty(width, width), generator=generator)
    bar = tqdm(range(steps), desc="warm start, binding")
    for step in bar:
        loss = binding_loss(lm, *said_again(rng, 16), rotation)
        descend(lm, optimizers, loss, min(1, (step + 1) / 30))
        if step % 20 == 19 and reached(binding(lm, *unseen), ("verb", "object"), bar):
            return


def learn_to_quote(lm, prompts, optimizers, seed, steps):
    """Until quotes are right; answers are practised, too. Among all tasks at once, some seeds
    hardly learn to see whether there is anything to be said of the one asked for."""
    bar = tqdm(range(steps), desc="warm start, quoting")
    for step in bar:
        rows = by_kind(exercises(prompts, f"quoting {seed} {step}", 12))
        descend(lm, optimizers, imitation_loss(lm, rows["quote"] + rows["answer"]), 1)
        if step % 25 == 24 and reached(skills(lm, prompts), ["quote"], bar):
            return


def learn_to_imitate(lm, prompts, optimizers, seed, steps):
    """Until all GOALS are reached at a low rate, as only small steps make the model exact."""
    bar = tqdm(range(steps), desc="warm start")
    for step in bar:
        fresh = f"warm start {seed} {step}"
        rows = demonstrations(prompts, fresh, 2) + exercises(prompts, fresh, 12)
        rate = (FALL[1] - step % FALL[1]) / (FALL[1] - FALL[0])
        descend(lm, optimizers, imitation_loss(lm, rows), min(1, max(rate, 0.05)))
        if step % 25 == 24 and reached(skills(lm, prompts), GOALS, bar) and rate < 0.3:
            return
    tqdm.write(f"note: {steps} steps were not enough for {GOALS}: {skills(lm, prompts)}")


def reached(found, names, bar):
    """Whether these of the skills are as good as their GOALS; the bar shows them all."""
    bar.set_postfix(found, refresh=False)
    return all(found[name] >= GOALS[name] for name in names)


def open_optimizers(lm):
    """AdamW, and Muon for the matrices, as copying is learnt in two thirds of the steps then."""
    matrices, others = [], []
    for name, parameter in lm.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    flags = dict(lr=5e-3, weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    muon = torch.optim.Muon(matrices, **flags)
    adamw = torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    return [muon, adamw]


def descend(lm, optimizers, loss, scale):
    """A step of all optimizers, at `scale` times their learning rates."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group.setdefault("peak", group["lr"])
        optimizer.step()
    lm.zero_grad()


@distributed.one_line_errors(data.InputError)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all that is made [0]")
    parser.add_argument("--out", help="the folder to make [cache/pocket-SEED]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a part, at most [{STEPS}]")
    args = parser.parse_args(argv)
    out = args.out or f"cache/pocket-{args.seed}"
    torch.set_num_threads(1)  # two gain a third at best, and lose much where others work as well
    if args.steps < 1:
        raise data.InputError("--steps: the warm start takes at least 1")
    if Path(out).exists():
        print(f"{out} is there already: delete it to make it anew")
        return
    pocket.make(out, args.seed, warm_start(args.seed, args.steps))
    print(f"next: torchrun --nproc_per_node 2 train.py --model {out}/model")


if __name__ == "__main__":
    main()
