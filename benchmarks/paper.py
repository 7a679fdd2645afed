"""The paper's comparison on small real models and real data: every method, several tasks, three seeds, one command.

    python benchmarks/paper.py --masked MODEL --causal MODEL --data FOLDER      # runs what is missing; can be stopped at any time
    python benchmarks/paper.py … --only sst2-16 rte-16 --methods mezo threshold   # a part of it
    python benchmarks/paper.py … --jobs 14                                         # on a machine with cores or a GPU to spare
    python benchmarks/paper.py --report                                           # docs/results.md from the cells

`--masked` is a small masked language model, `--causal` a small causal one. FOLDER holds sst2/ (train.tsv, test.tsv), trec/
(TREC.train.all, TREC.test.all), lmbff_kshot/ (the k-shot splits of LM-BFF), superglue_fewglue/ (FewGLUE and SuperGLUE's
validation splits) and xquad_en/. A job is a call of `zorl compare`; the cells are kept in benchmarks/results/paper/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from zorl.apps import compare, compare_report

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "benchmarks" / "results" / "paper"
WORK = ROOT / "build" / "paper"
SEEDS = (13, 21, 42)
BATCH, BUDGET, TEST_ROWS = 16, 300, 300
MAIN = (
    "zero_shot", "threshold", "label_head", "linear_probing", "mezo_published", "mezo_cross_entropy", "mezo", "mezo_f1",
    "lp_mezo", "fine_tuning", "in_context",
)  # fmt: skip
REST = (
    "mezo_published_metric", "mezo_lora", "mezo_prefix", "mezo_head", "mezo_momentum", "mezo_adam", "mezo_one_point",
    "mezo_two_sided", "bbt", "fine_tuning_sgd", "grpo",
)  # fmt: skip
CHEAP = ("zero_shot", "threshold", "label_head", "linear_probing", "in_context")


@dataclass(frozen=True)
class Setting:
    """One table.

    Attributes:
        title: what the table is called.
        task: of `zorl.tasks`.
        causal: on the causal model; else on the masked one.
        arguments: of `zorl compare`; {data} is the data folder, {pooled} the work folder with what `pool` made.
        pool: file to make → the files whose rows it holds, for tasks that come in splits of a few rows.
    """

    title: str
    task: str
    arguments: str
    causal: bool = False
    pool: tuple[tuple[str, tuple[str, ...]], ...] = ()


def _lmbff(task: str, *splits: str) -> tuple[str, ...]:
    return tuple(f"lmbff_kshot/{task}/{split}.tsv" for split in splits)


_FEW = "--dataset {data}/superglue_fewglue/NAME/train.jsonl --eval_dataset {data}/superglue_fewglue/NAME/dev32.jsonl " \
       "--test_dataset {data}/superglue_fewglue/NAME/val.jsonl"  # fmt: skip
SETTINGS = {
    "sst2-16": Setting("SST-2, 16 rows a label", "sst2", "--dataset {data}/sst2 --k_shot 16"),
    "trec-16": Setting("TREC, 16 rows a label", "trec", "--dataset {data}/trec --k_shot 16"),
    "rte-16": Setting(
        "RTE, 16 rows a label", "rte",
        "--dataset {pooled}/train.tsv --test_dataset {data}/lmbff_kshot/RTE/16-42/test.tsv --k_shot 16",
        pool=(("train.tsv", _lmbff("RTE", "16-13/train", "16-13/dev", "16-42/train", "16-42/dev")),),
    ),
    "snli-16": Setting(
        "SNLI, 16 rows a label", "snli", "--dataset {pooled}/train.tsv --test_dataset {pooled}/test.tsv --k_shot 16",
        pool=(
            ("train.tsv", _lmbff("SNLI", "16-13/train", "16-13/dev")),
            ("test.tsv", _lmbff("SNLI", "16-42/train", "16-42/dev")),
        ),
    ),
    "cb-32": Setting("CB, 32 rows", "cb", _FEW.replace("NAME", "CB")),
    "wic-32": Setting("WiC, 32 rows", "wic", _FEW.replace("NAME", "WiC")),
    "boolq-32": Setting("BoolQ, 32 rows", "boolq", f"{_FEW.replace('NAME', 'BoolQ')} --max_length 128"),
    "copa-32": Setting("COPA, 32 rows, the causal model", "copa", _FEW.replace("NAME", "COPA"), causal=True),
    "sst2-512": Setting("SST-2, 512 rows a label", "sst2", "--dataset {data}/sst2 --k_shot 512"),
    "squad": Setting(
        "XQuAD (English) as SQuAD, the causal model", "squad",
        "--dataset {data}/xquad_en/xquad.en.json --k_shot 64 --max_completion_length 8", causal=True,
    ),
}  # fmt: skip


class Job(NamedTuple):
    """A call of `zorl compare`."""

    name: str
    seed: int
    methods: tuple[str, ...]


def missing(options: argparse.Namespace) -> list[Job]:
    """A method a job, and what takes seconds together. A whole row of seeds last: early on there is something of everything."""
    jobs = []
    for seed in options.seeds:
        for name in options.only:
            todo = [method for method in options.methods if not (CELLS / name / f"{method}-{seed}.json").exists()]
            jobs += [Job(name, seed, (method,)) for method in todo if method not in CHEAP]
            if cheap := tuple(method for method in todo if method in CHEAP):
                jobs.append(Job(name, seed, cheap))
    return jobs


def run(job: Job, options: argparse.Namespace) -> None:
    """The job's cells, with those of an earlier try that was cut short."""
    setting, kept = SETTINGS[job.name], CELLS / job.name
    work = WORK / f"{job.name}-{job.seed}-{job.methods[0]}"
    work.mkdir(parents=True, exist_ok=True)
    for target, sources in setting.pool:
        parts = [(Path(options.data) / source).read_text(encoding="utf-8").splitlines() for source in sources]
        rows = dict.fromkeys(line for part in parts for line in part[1:])
        (work / target).write_text("\n".join([parts[0][0], *rows]) + "\n", encoding="utf-8")
    arguments = [
        "--model", options.causal if setting.causal else options.masked, "--task", setting.task,
        *setting.arguments.format(data=Path(options.data).resolve(), pooled=work).split(),
        "--budget", str(BUDGET), "--batch_size", str(BATCH), "--test_rows", str(TEST_ROWS),
        "--output_dir", str(work), "--seeds", str(job.seed), "--methods", *job.methods,
    ]  # fmt: skip
    try:
        with redirect_stderr(StringIO()):  # how each goes on, which the bar over the jobs says
            compare.run(arguments)
    finally:
        kept.mkdir(parents=True, exist_ok=True)
        for path in (work / "cells").glob("*.json"):
            cell = json.loads(path.read_text(encoding="utf-8")) | {"machine": machine()}
            (kept / path.name).write_text(json.dumps(cell, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run_all(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Several at once in processes of their own; a job that fails is told and does not end the others."""
    os.environ |= {
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }  # one bar is enough
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    failed = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        todo = {pool.submit(run, job, options): job for job in jobs}
        try:
            for done in tqdm(as_completed(todo), total=len(todo), unit="job"):
                if (error := done.exception()) is not None:
                    failed += 1
                    job = todo[done]
                    tqdm.write(
                        f"{job.name}, seed {job.seed}, {', '.join(job.methods)}: {type(error).__name__}: {error}"
                    )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        print(f"{failed} jobs failed; the same command tries them again", file=sys.stderr)


def machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def cells_of(name: str) -> list[dict[str, Any]]:
    """In the order of the methods above."""
    order = {method: i for i, method in enumerate((*MAIN, *REST))}
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (CELLS / name).glob("*.json")]
    return sorted(cells, key=lambda cell: (order.get(cell["method"], len(order)), cell["seed"]))


def report() -> str:
    """docs/results.md: a table a setting, and what they say of the paper's claims."""
    found = {name: cells_of(name) for name in SETTINGS}
    found = {name: cells for name, cells in found.items() if cells}
    machines = sorted({cell["machine"] for cells in found.values() for cell in cells})
    minutes = sum(cell.get("seconds", 0.0) for cells in found.values() for cell in cells) / 60
    lines = [
        "# Results",
        "",
        f"Written by `benchmarks/paper.py --report` from the cells in `benchmarks/results/paper/` ({'; '.join(machines)}). The "
        "masked model has 22.7M parameters (6 layers, width 384), the causal one 260,032: far smaller than the paper's, so "
        "compare rows here with each other and not with the paper.",
        "",
        f"A method may spend {BUDGET} forwards of {BATCH} rows in learning; a backward pass counts as two. It chooses settings "
        "and the best of ten looks on development rows that are as many as the training rows. Figures are of at most "
        f"{TEST_ROWS} test rows, mean ± standard deviation over the seeds done ({', '.join(map(str, SEEDS))} are planned; "
        "the last column says how many there are). They draw the rows where a task has enough of them; FewGLUE's 32 rows are "
        "fixed, so there a seed is only the method's own. Forwards are all that were spent in learning: where a method "
        "tries several learning rates, those of each are among them. "
        f"{minutes:.0f} minutes of learning in all, partly beside other work: seconds are no benchmark. "
        "Learning curves at a larger budget are in [efficiency.md](efficiency.md).",
        "",
        *claims(found),
    ]
    for name, cells in found.items():
        setting = SETTINGS[name]
        metrics = metrics_of(cells)
        lines += [f"## {setting.title}", "", compare_report.markdown(compare_report.summary(cells, metrics), metrics)]
    return "\n".join(lines).rstrip() + "\n"


def metrics_of(cells: Sequence[dict[str, Any]]) -> list[str]:
    known = {key for cell in cells for key in cell}
    return [metric for metric in ("accuracy", "f1", "squad_f1", "exact_match") if metric in known]


def claims(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Where MeZO beats what the paper says it beats: the difference of means, with its standard error over the seeds."""
    against = {"zero_shot": "zero-shot", "threshold": "threshold", "in_context": "in-context", "linear_probing": "linear probing",
               "label_head": "label head alone", "fine_tuning": "fine-tuning"}  # fmt: skip
    lines = [
        "## Where MeZO is ahead, and where it is not",
        "",
        "Zorl on the metric itself, less each of the others: the mean over the seeds that both have, ± its standard error. The "
        "paper claims more than zero-shot, in-context and probing, and about as much as fine-tuning.",
        "",
        f"| task | {' | '.join(against.values())} |",
        f"|---|{'---|' * len(against)}",
    ]
    for name, cells in found.items():
        metric = metrics_of(cells)[0]
        by = {(c["method"], c["seed"]): c[metric] for c in cells if c.get(metric) is not None}
        row = []
        for other in against:
            pairs = [by["mezo", s] - by[other, s] for s in SEEDS if ("mezo", s) in by and (other, s) in by]
            row.append(_difference(pairs))
        if any(cell != "—" for cell in row):
            lines.append(f"| {SETTINGS[name].title} ({metric}) | {' | '.join(row)} |")
    return [*lines, ""]


def _difference(pairs: Sequence[float]) -> str:
    if not pairs:
        return "—"
    values = torch.tensor(pairs, dtype=torch.float64)
    if len(pairs) == 1:
        return f"{values.item():+.3f}"
    return f"{values.mean().item():+.3f} ± {(values.std() / len(pairs) ** 0.5).item():.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masked", help="folder or hub name of a masked language model")
    parser.add_argument("--causal", help="folder or hub name of a causal language model")
    parser.add_argument("--data", help="folder with the data sets")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to run")
    parser.add_argument("--methods", nargs="+", default=[*MAIN, *REST], help="methods to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="jobs at once")
    parser.add_argument("--report", action="store_true", help="only write docs/results.md")
    options = parser.parse_args()
    if not options.report:
        if not (options.masked and options.causal and options.data):
            parser.error("--masked, --causal and --data are needed to run; --report alone writes the report")
        run_all(missing(options), options)
    (ROOT / "docs" / "results.md").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
