"""The paper's claims on the pocket world: every arm is trained for every seed, and asked by length.

    python tests/study.py            four seeds; goes on where it was stopped
    python tests/study.py --quick    one seed, few steps, short documents: minutes, proves nothing
    python tests/study.py --arms full "warm + QA" "full + QA"    some of the arms

Starts tiny.py, train.py and eval.py as a user would, with one thread each, as many at a time as
there are cores. Every seed has a world of its own: model, documents and questions. Leaves in --out:
results.json (the raw numbers), report.md (the tables) and, where matplotlib is installed,
figure.png. What it found so far stands in study.md.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import tiny  # noqa: E402

# "warm" is the model that tiny.py makes; an arm "X + QA" starts from arm X
OBJECTIVES = {
    "full": ["--objective", "full"],
    "decoupled": ["--objective", "decoupled"],
    "e2e": ["--objective", "e2e"],
    "shuffled": ["--shuffle_rewards"],
    "window before": ["--recall_window", "before"],  # the released code's recalls
}
TWICE, AS_LONG, SLOWER = "warm + twice the QA", "warm + QA as long", "warm + QA at half the rate"
POST_TRAINED = ["warm", *OBJECTIVES]
ARMS = ["warm", *OBJECTIVES, TWICE, AS_LONG, SLOWER]
ARMS += [f"{start} + QA" for start in POST_TRAINED]
DRAWN = ["warm", "full", "shuffled", "warm + QA", TWICE, "full + QA"]  # more would hide each other

# The claims as differences between arms. "QA as long": as many steps as MemTrain + QA.
CLAIMS = {
    "(a) MemTrain alone": ("full", "warm"),
    "(b) MemTrain before QA": ("full + QA", "warm + QA"),
    "(c) the coupled reward, alone": ("full", "decoupled"),
    "(c) the coupled reward, before QA": ("full + QA", "decoupled + QA"),
    "(c) recall, alone": ("full", "e2e"),
    "(c) recall, before QA": ("full + QA", "e2e + QA"),
    "(d) MemTrain, not twice the QA": ("full + QA", TWICE),
    "(d) MemTrain, not QA for all steps": ("full + QA", AS_LONG),
    "the window of recalls, alone": ("full", "window before"),
    "the window of recalls, before QA": ("full + QA", "window before + QA"),
    "QA at half the learning rate": ("warm + QA", SLOWER),
    "control, alone": ("shuffled", "warm"),
    "control, before QA": ("shuffled + QA", "warm + QA"),
}
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # t at 97.5 %, by the number of seeds

# ---------------------------------------------------------------------------------------- running


class Study:
    """Worlds, runs and tables of all seeds, in one folder.

    steps: of MemTrain; qa_steps: of QA; warm_steps: of the warm start; lengths: of the documents
    asked about, in trained ones. What is there already is not made again.
    """

    def __init__(self, out, seeds, *, steps, qa_steps, warm_steps, lengths, arms=ARMS):
        self.out, self.lengths = Path(out), lengths
        self.steps, self.qa_steps, self.warm_steps = steps, qa_steps, warm_steps
        self.seeds = range(901, 901 + seeds)  # smaller ones served the design
        starts = [arm.removesuffix(" + QA") for arm in arms]
        self.arms = [arm for arm in ARMS if arm in ("warm", *starts, *arms)]

    def world(self, seed):
        return self.out / f"tiny-{seed}"

    def questions(self, seed, length):
        return self.world(seed) / "questions" / f"heldout-{length}x.jsonl"

    def run_folder(self, arm, seed):
        return self.out / f"{arm}-{seed}".replace(" ", "")

    def model(self, arm, seed):
        return self.world(seed) / "model" if arm == "warm" else self.run_folder(arm, seed)

    def table(self, arm, seed):
        return self.run_folder(arm, seed).with_suffix(".json")

    def run(self):
        """Trains and evaluates all arms."""
        memtrain = ["--steps", self.steps, "--eval_every", self.steps]
        longqa = ["--task", "longqa", "--eval_documents", 0, "--steps"]
        arms, half = [], tiny.SETTINGS["lr"] / 2
        for seed in self.seeds:
            arms.append((AS_LONG, seed, "warm", [*longqa, self.steps + self.qa_steps]))
            arms.append((TWICE, seed, "warm", [*longqa, 2 * self.qa_steps]))
            arms.append((SLOWER, seed, "warm", [*longqa, self.qa_steps, "--lr", half]))
            for arm, flags in OBJECTIVES.items():
                arms.append((arm, seed, "warm", [*memtrain, *flags]))
            for start in POST_TRAINED:
                arms.append((f"{start} + QA", seed, start, [*longqa, self.qa_steps]))

        # a job waits for the one that makes what it starts from, which has begun before it
        self.out.mkdir(parents=True, exist_ok=True)
        jobs = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for seed in self.seeds:
                jobs["warm", seed] = pool.submit(self.make_world, seed)
            for arm, seed, start, flags in arms:
                if arm in self.arms:
                    before = jobs[start, seed]
                    jobs[arm, seed] = pool.submit(self.train, before, arm, seed, start, flags)
        for job in jobs.values():
            job.result()

    def make_world(self, seed):
        world = self.world(seed)
        if not world.exists():
            flags = ["--seed", seed, "--steps", self.warm_steps, "--out", world]
            self.start(f"{world}.log", "tiny.py", *flags)
        self.evaluate("warm", seed)

    def train(self, before, arm, seed, start, flags):
        before.result()
        folder = self.run_folder(arm, seed)
        if not self.table(arm, seed).exists():
            flags = ["--model", self.model(start, seed), "--seed", seed, *flags]
            self.start(f"{folder}.log", "train.py", *flags, "--resume", "--out", folder)
            self.evaluate(arm, seed)

    def evaluate(self, arm, seed):
        table, folder = self.table(arm, seed), self.run_folder(arm, seed)
        if not table.exists():
            flags = ["--model", self.model(arm, seed), "--batch", 256, "--data"]
            for length in self.lengths:
                flags.append(f"{length}x={self.questions(seed, length)}")
            self.start(f"{folder}.log", "eval.py", "longqa", *flags, "--out", table)

    def start(self, log, script, *flags):
        """Runs a script to its end; what it prints goes to a file."""
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(log, "a") as file:
            run = subprocess.run(command, stdout=file, stderr=file, env=environment)
        if run.returncode:
            sys.exit(f"{' '.join(command)} failed: see {log}; started again, the study goes on")
        print(script, flags[-1], flush=True)

    # ------------------------------------------------------------------------------------ results

    def exact_match(self):
        """-> {arm: {length: a value for every seed}}, and the same for what needs no model."""
        names = ["perfect relevance", "random facts", "guess", *self.arms]
        results = {name: {length: [] for length in self.lengths} for name in names}
        for seed in self.seeds:
            tables = {
                arm: json.loads(self.table(arm, seed).read_text())["table"] for arm in self.arms
            }
            for length in self.lengths:
                rows = data.load_questions(str(self.questions(seed, length)))
                for name, score in without_model(rows).items():
                    results[name][length].append(score)
                for arm in self.arms:
                    results[arm][length].append(tables[arm][f"{length}x"]["em"][0])
        return results

    def looks(self):
        """Exact match on held-out rows, before and after: {arm: {column: values by seed}}"""
        kinds = {"trajectory": "E2E", "recall": "recall", "questions": "questions"}
        results = {arm: {} for arm in self.arms if arm in OBJECTIVES}
        for arm, seed in [(arm, seed) for arm in results for seed in self.seeds]:
            lines = (self.run_folder(arm, seed) / "metrics.jsonl").read_text().splitlines()
            looks = [json.loads(line)["heldout"] for line in lines if "heldout" in line]
            for kind in looks[0]:
                for when, look in ("before", looks[0]), ("after", looks[-1]):
                    column = f"{kinds[kind]} {when}"
                    results[arm].setdefault(column, []).append(look[kind][0])
        return results


def without_model(rows):
    """Exact match of an oracle that keeps all that is asked for, of a memory that is full of random
    facts, and of a guess."""
    scores = {"perfect relevance": [], "random facts": [], "guess": []}
    for row in rows:
        rng, question = random.Random(row["id"]), row["question"].split()
        facts = tiny.read(row["context"].split())
        kept = [fact for fact in facts if rng.random() < tiny.ROOM / len(facts)]
        memories = read_perfectly(question, facts, rng), sum(kept, []), []
        for name, memory in zip(scores, memories):
            scores[name].append(tiny.answer(question, memory, rng) in row["answers"])
    return {name: statistics.fmean(values) for name, values in scores.items()}


def read_perfectly(question, facts, rng):
    """The oracle's memory of a document if it took up and carried on all that is asked for."""
    memory, step = [], tiny.FACTS_PER_CHUNK
    for first in range(0, len(facts), step):
        section = sum(facts[first : first + step], [])
        memory = tiny.update(question, memory, section, tiny.ROOM, rng, asked=(1, 1))
    return memory


# ----------------------------------------------------------------------------------------- report


def spread(values):
    """Mean and half of its 95 % interval over seeds (Student's t); None for the half with one seed.

    >>> spread([0.5])
    (0.5, None)
    >>> [round(value, 2) for value in spread([0.2, 0.4])]
    [0.3, 1.27]
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, STUDENT.get(len(values), 2.5) * error


def markdown(title, columns, rows):
    """A table of percents. rows: {name: for every column a value for every seed}."""
    lines = ["| " + " | ".join([title, *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        line = f"| {name} |"
        for mean, half in map(spread, cells):
            line += f" {100 * mean:.1f}"
            if half is not None:
                line += f" ± {100 * half:.1f}"
            line += " |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def report(results, looks, lengths):
    """The tables: exact match by length, the claims as paired differences, the looks."""
    # a row: the values by length, then their mean up to 8x
    rows, up_to_8x = {}, [length for length in lengths if length <= 8] or lengths
    for name, by_length in results.items():
        columns = [by_length[length] for length in lengths]
        averaged = zip(*(by_length[length] for length in up_to_8x))
        rows[name] = [*columns, [statistics.fmean(values) for values in averaged]]

    # differences, seed by seed
    differences = {}
    for claim, (a, b) in CLAIMS.items():
        if a not in rows or b not in rows:
            continue
        cells = []
        for ours, theirs in zip(rows[a], rows[b]):
            cells.append([x - y for x, y in zip(ours, theirs)])
        differences[f"{claim}: {a} - {b}"] = cells

    columns = [f"{length}x" for length in lengths] + ["mean to 8x"]
    rows_of_looks = {arm: list(by_column.values()) for arm, by_column in looks.items()}
    tables = [
        markdown("long-text QA, exact match in %", columns, rows),
        markdown("difference in points, paired by seed", columns, differences),
    ]
    if looks:
        columns = list(next(iter(looks.values())))
        tables.append(markdown("held-out rows, exact match in %", columns, rows_of_looks))
    return "\n".join(tables)


def draw(path, results, lengths):
    """Exact match by length, after MemTrain alone and after QA: what needs no model, and DRAWN."""
    try:
        import matplotlib
    except ImportError:
        return print("no figure: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    axes[0].set(title="after MemTrain alone", ylabel="exact match in %")
    axes[1].set(title="after post-training on long-text QA")
    for name, by_length in results.items():
        if name in ARMS and name not in DRAWN:
            continue
        # a colour for every start, grey for what needs no model
        style, sides = {"color": "grey", "linestyle": ":"}, axes
        if name in ARMS:
            color = f"C{ARMS.index(name.split(' + ')[0])}"
            style = {"color": color, "linestyle": "--" if name == TWICE else "-", "marker": "o"}
            sides = axes[1:] if "QA" in name else axes[:1]
        means, halves = [], []
        for length in lengths:
            mean, half = spread(by_length[length])
            means.append(100 * mean)
            halves.append(100 * (half or 0))
        bars = halves if name in ARMS else None
        for side in sides:
            side.errorbar(lengths, means, bars, label=name, capsize=2, **style)

    for side in axes:
        side.set_xscale("log", base=2)
        side.set(xticks=lengths, xticklabels=[f"{length}x" for length in lengths], ylim=(0, 100))
        side.set_xlabel("length of the document")
        side.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=4, help="[4]")
    add("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help="[all]")
    add("--lengths", nargs="+", type=int, default=list(tiny.LENGTHS), help="in trained texts")
    add("--quick", action="store_true", help="one seed, few steps, short documents")
    add("--out", help="folder of all runs and results [runs/study, runs/quick-study]")
    args = parser.parse_args()
    if args.quick:
        out = args.out or "runs/quick-study"
        sizes = dict(steps=4, qa_steps=2, warm_steps=100, lengths=[1, 2])
        study = Study(out, seeds=1, arms=args.arms, **sizes)
    else:
        study = Study(
            args.out or "runs/study",
            args.seeds,
            steps=tiny.SETTINGS["steps"],
            qa_steps=tiny.QA_STEPS,
            warm_steps=tiny.WARM_STEPS,
            lengths=args.lengths,
            arms=args.arms,
        )
    study.run()

    results, looks = study.exact_match(), study.looks()
    raw = {"exact match by length": results, "looks at held-out rows": looks}
    (study.out / "results.json").write_text(json.dumps(raw, indent=1) + "\n")
    text = report(results, looks, study.lengths)
    text += "\n± half a 95 % interval over seeds (Student's t); lengths in trained documents\n"
    (study.out / "report.md").write_text(text)
    print(text)
    draw(study.out / "figure.png", results, study.lengths)


if __name__ == "__main__":
    main()
