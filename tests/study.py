"""The paper's claims on the pocket world: every arm is trained for every seed, and asked by length.

    python tests/study.py            four seeds; continues where it was stopped
    python tests/study.py --quick    one seed, few steps, short texts: minutes, proves nothing

Starts warm_start.py, train.py and eval.py as a user would, with one thread each, as many seeds at a
time as there are cores. Every seed has a world of its own: model, documents and questions. Leaves
in --out: results.json (the raw numbers), report.md (the tables) and figure.png. What it found
stands in study.md.
"""

import argparse
import itertools
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
import pocket  # noqa: E402
import warm_start  # noqa: E402

# "warm" is the model that warm_start.py makes; an arm "X + QA" starts from arm X
OBJECTIVES = {
    "full": ["--objective", "full"],
    "decoupled": ["--objective", "decoupled"],
    "e2e": ["--objective", "e2e"],
    "shuffled": ["--shuffle_rewards"],
}
TWICE = "warm + twice the QA"
ARMS = ["warm", *OBJECTIVES, TWICE, "warm + QA", *(f"{arm} + QA" for arm in OBJECTIVES)]
DRAWN = ["warm", "full", "shuffled", "warm + QA", TWICE, "full + QA"]  # more would hide each other

# The claims as differences between arms.
CLAIMS = {
    "(a) MemTrain alone": ("full", "warm"),
    "(b) MemTrain before QA": ("full + QA", "warm + QA"),
    "(c) the coupled reward, alone": ("full", "decoupled"),
    "(c) the coupled reward, before QA": ("full + QA", "decoupled + QA"),
    "(c) recall, alone": ("full", "e2e"),
    "(c) recall, before QA": ("full + QA", "e2e + QA"),
    "(d) MemTrain, not twice the QA": ("full + QA", TWICE),
    "control, alone": ("shuffled", "warm"),
    "control, before QA": ("shuffled + QA", "warm + QA"),
}
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # t at 97.5 %, by the number of seeds

# ---------------------------------------------------------------------------------------- running


class Study:
    """Worlds, runs and tables of all seeds, in one folder. What is there is not made again.

    steps: of MemTrain; qa_steps: of QA; warm_steps: of the warm start; lengths: of the texts that
        are asked about, in documents
    """

    def __init__(self, out, seeds, *, steps, qa_steps, warm_steps, lengths):
        self.out, self.lengths = Path(out), lengths
        self.steps, self.qa_steps, self.warm_steps = steps, qa_steps, warm_steps
        self.seeds = range(901, 901 + seeds)  # smaller ones served the design

    def world(self, seed):
        return self.out / f"pocket-{seed}"

    def questions(self, seed, length):
        return self.world(seed) / f"questions/heldout-{length}x.jsonl"

    def folder(self, arm, seed):
        return self.out / f"{arm}-{seed}".replace(" ", "")

    def model(self, arm, seed):
        return self.world(seed) / "model" if arm == "warm" else self.folder(arm, seed)

    def table(self, arm, seed):
        return self.folder(arm, seed).with_suffix(".json")

    def run(self):
        """Trains and evaluates all arms of all seeds."""
        self.out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for job in [pool.submit(self.run_seed, seed) for seed in self.seeds]:
                job.result()

    def run_seed(self, seed):
        world = self.world(seed)
        if not world.exists():
            flags = ["--seed", seed, "--steps", self.warm_steps, "--out", world]
            self.start(f"{world}.log", "tests/warm_start.py", *flags)
        self.evaluate("warm", seed)

        memtrain = ["--steps", self.steps, "--eval_every", self.steps]
        for arm, flags in OBJECTIVES.items():
            self.train(arm, seed, "warm", [*memtrain, *flags])
        longqa = ["--task", "longqa", "--eval_documents", 0, "--steps"]
        self.train(TWICE, seed, "warm", [*longqa, 2 * self.qa_steps])
        for start in ["warm", *OBJECTIVES]:
            self.train(f"{start} + QA", seed, start, [*longqa, self.qa_steps])

    def train(self, arm, seed, start, flags):
        folder = self.folder(arm, seed)
        if not self.table(arm, seed).exists():
            flags = ["--model", self.model(start, seed), "--seed", seed, *flags]
            self.start(f"{folder}.log", "train.py", *flags, "--resume", "--out", folder)
            self.evaluate(arm, seed)

    def evaluate(self, arm, seed):
        table, folder = self.table(arm, seed), self.folder(arm, seed)
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
            sys.exit(f"{' '.join(command)} failed: see {log}; start the study again to continue")
        print(script, flags[-1], flush=True)

    # ------------------------------------------------------------------------------------ results

    def exact_match(self):
        """-> {arm: {length: a value for every seed}}, and the same for what needs no model."""
        results = {}
        for seed, length in itertools.product(self.seeds, self.lengths):
            found = without_model(data.load_questions(str(self.questions(seed, length))))
            for arm in ARMS:
                table = json.loads(self.table(arm, seed).read_text())["table"]
                found[arm] = table[f"{length}x"]["em"][0]
            for name, value in found.items():
                results.setdefault(name, {}).setdefault(length, []).append(value)
        return results

    def heldout(self):
        """Exact match on held-out rows, before and after: {arm: {column: values by seed}}"""
        kinds = {"trajectory": "E2E", "recall": "recall", "questions": "questions"}
        results = {arm: {} for arm in OBJECTIVES}
        for arm, seed in itertools.product(OBJECTIVES, self.seeds):
            lines = (self.folder(arm, seed) / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line)["heldout"] for line in lines if "heldout" in line]
            for kind, name in kinds.items():
                results[arm].setdefault(f"{name} before", []).append(found[0][kind][0])
                results[arm].setdefault(f"{name} after", []).append(found[-1][kind][0])
        return results


def without_model(rows):
    """Exact match of an oracle that keeps all that is asked for, of a memory that is full of random
    facts, and of a guess."""
    scores = {"perfect relevance": [], "random facts": [], "guess": []}
    for row in rows:
        rng, question = random.Random(row["id"]), row["question"].split()
        facts = warm_start.read(row["context"].split())
        kept = [fact for fact in facts if rng.random() < pocket.ROOM / len(facts)]
        memory = []
        for first in range(0, len(facts), pocket.FACTS_PER_CHUNK):
            section = sum(facts[first : first + pocket.FACTS_PER_CHUNK], [])
            memory = warm_start.update(question, memory, section, pocket.ROOM, rng, asked=(1, 1))
        for name, known in zip(scores, [memory, sum(kept, []), []]):
            scores[name].append(warm_start.answer(question, known, rng) in row["answers"])
    return {name: statistics.fmean(values) for name, values in scores.items()}


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
    return "\n".join(lines) + "\n\n"


def report(results, heldout, lengths):
    """The tables: exact match by length, the claims as paired differences, held-out rows."""
    # a row: the values by length, then their mean up to 8x
    rows = {}
    for name, by_length in results.items():
        to_8x = zip(*(by_length[length] for length in lengths if length <= 8))
        rows[name] = [*by_length.values(), [statistics.fmean(values) for values in to_8x]]

    # differences, seed by seed
    differences = {}
    for claim, (a, b) in CLAIMS.items():
        cells = []
        for ours, theirs in zip(rows[a], rows[b]):
            cells.append([x - y for x, y in zip(ours, theirs)])
        differences[f"{claim}: {a} - {b}"] = cells

    columns = [f"{length}x" for length in lengths] + ["mean to 8x"]
    text = markdown("long-text QA, exact match in %", columns, rows)
    text += markdown("difference in points, paired by seed", columns, differences)
    rows = {arm: by_column.values() for arm, by_column in heldout.items()}
    text += markdown("held-out rows, exact match in %", heldout["full"], rows)
    return text + "± half a 95 % interval over seeds (Student's t); lengths in documents\n"


def draw(path, results, lengths):
    """Exact match by length, after MemTrain alone and after QA: what needs no model, and DRAWN."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    axes[0].set(title="after MemTrain alone", ylabel="exact match in %")
    axes[1].set(title="after post-training on long-text QA")
    for name, by_length in results.items():
        points = [spread(by_length[length]) for length in lengths]
        means = [100 * mean for mean, _ in points]
        halves = [100 * (half or 0) for _, half in points]
        if name not in ARMS:  # grey, on both sides
            for side in axes:
                side.plot(lengths, means, label=name, color="grey", linestyle=":")
        elif name in DRAWN:  # a colour for every start
            color, line = f"C{ARMS.index(name.split(' + ')[0])}", "--" if name == TWICE else "-"
            style = dict(color=color, linestyle=line, marker="o", capsize=2, label=name)
            axes[int("QA" in name)].errorbar(lengths, means, halves, **style)

    for side in axes:
        side.set_xscale("log", base=2)
        side.set(xticks=lengths, xticklabels=[f"{length}x" for length in lengths], ylim=(0, 100))
        side.set_xlabel("length of the document")
        side.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="[4]")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, short texts")
    parser.add_argument("--out", help="folder of all that is made [runs/study, runs/quick-study]")
    args = parser.parse_args()
    out, seeds, lengths = args.out or "runs/study", args.seeds, list(pocket.LENGTHS)
    sizes = {"steps": pocket.SETTINGS["steps"], "qa_steps": pocket.QA_STEPS}
    sizes["warm_steps"] = warm_start.STEPS
    if args.quick:
        out, seeds, lengths = args.out or "runs/quick-study", 1, [1, 2]
        sizes = {"steps": 4, "qa_steps": 2, "warm_steps": 100}
    study = Study(out, seeds, lengths=lengths, **sizes)
    study.run()

    results, heldout = study.exact_match(), study.heldout()
    raw = {"exact match by length": results, "held-out rows": heldout}
    (study.out / "results.json").write_text(json.dumps(raw, indent=1) + "\n")
    text = report(results, heldout, lengths)
    (study.out / "report.md").write_text(text)
    print(text)
    draw(study.out / "figure.png", results, lengths)


if __name__ == "__main__":
    main()
