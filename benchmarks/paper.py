"""The paper's comparison on small real models and real data: every method, several tasks, three seeds, one command.

    python benchmarks/paper.py --masked MODEL --causal MODEL --data FOLDER      # runs what is missing; can be stopped at any time
    python benchmarks/paper.py … --only sst2-16 rte-16 --methods mezo threshold   # a part of it
    python benchmarks/paper.py … --jobs 14                                         # on a machine with cores or a GPU to spare
    python benchmarks/paper_report.py                                             # docs/results.md and its plot

`--masked` is a small masked language model, `--causal` a small causal one. FOLDER holds sst2/ (train.tsv, test.tsv), trec/
(TREC.train.all, TREC.test.all), lmbff_kshot/ (the k-shot splits of LM-BFF), superglue_fewglue/ (FewGLUE and SuperGLUE's
validation splits) and xquad_en/. Each setting is a call of `zorl compare`; the cells are kept in benchmarks/results/paper/.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from common import machine

from zorl.apps.cli import hush

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "benchmarks" / "results" / "paper"
WORK = ROOT / "build" / "paper"
SEEDS = (13, 21, 42)
BATCH, BUDGET, TEST_ROWS = 16, 300, 300
MAIN = (
    "majority", "zero_shot", "threshold", "label_head", "linear_probing", "mezo_published", "mezo_cross_entropy", "mezo",
    "mezo_f1", "lp_mezo", "fine_tuning", "in_context",
)  # fmt: skip
REST = (
    "mezo_published_metric", "mezo_lora", "mezo_prefix", "mezo_head", "mezo_momentum", "mezo_adam", "mezo_one_point",
    "mezo_two_sided", "mezo_n_spsa", "mezo_variance", "mezo_expectation", "mezo_forward_gradient",
    "bbt", "fine_tuning_sgd", "grpo",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One table.

    Attributes:
        title: what the table is called.
        task: of `zorl.tasks`.
        causal: on the causal model; else on the masked one.
        arguments: of `zorl compare`; {data} is the data folder, {pooled} the work folder with what `pool` made.
        pool: file to make → the files whose rows it holds, for tasks that come in splits of a few rows.
        note: what a reader of the table should know.
        ranks: whether the table can rank methods, or only shows that they run.
    """

    title: str
    task: str
    arguments: str
    causal: bool = False
    pool: tuple[tuple[str, tuple[str, ...]], ...] = ()
    note: str = ""
    ranks: bool = True


def _lmbff(task: str, *splits: str) -> tuple[str, ...]:
    return tuple(f"lmbff_kshot/{task}/{split}.tsv" for split in splits)


_FEW = "--dataset {data}/superglue_fewglue/NAME/train.jsonl --eval_dataset {data}/superglue_fewglue/NAME/dev32.jsonl " \
       "--test_dataset {data}/superglue_fewglue/NAME/val.jsonl"  # fmt: skip
SETTINGS = {
    "sst2-16": Setting("SST-2, 16 rows per label", "sst2", "--dataset {data}/sst2 --k_shot 16"),
    "trec-16": Setting("TREC, 16 rows per label", "trec", "--dataset {data}/trec --k_shot 16"),
    "rte-16": Setting(
        "RTE, 16 rows per label", "rte",
        "--dataset {pooled}/train.tsv --test_dataset {data}/lmbff_kshot/RTE/16-42/test.tsv --k_shot 16",
        pool=(("train.tsv", _lmbff("RTE", "16-13/train", "16-13/dev", "16-42/train", "16-42/dev")),),
    ),
    "snli-16": Setting(
        "SNLI, 16 rows per label", "snli", "--dataset {pooled}/train.tsv --test_dataset {pooled}/test.tsv --k_shot 16",
        pool=(
            ("train.tsv", _lmbff("SNLI", "16-13/train", "16-13/dev")),
            ("test.tsv", _lmbff("SNLI", "16-42/train", "16-42/dev")),
        ),
    ),
    "cb-32": Setting("CB, 32 rows", "cb", _FEW.replace("NAME", "CB")),
    "wic-32": Setting("WiC, 32 rows", "wic", _FEW.replace("NAME", "WiC")),
    "boolq-32": Setting(
        "BoolQ, 32 rows", "boolq", f"{_FEW.replace('NAME', 'BoolQ')} --max_length 128",
        note="Prompts are cut to 128 tokens for every method. In-context learning has to fit its demonstrations into them, too.",
    ),
    "copa-32": Setting(
        "COPA, 32 rows, the causal model", "copa", _FEW.replace("NAME", "COPA"), causal=True,
        note="Cross entropy is over a row's two options, for published MeZO and fine-tuning, too; the paper's code takes the "
        "language-modelling loss of the right one here.",
    ),
    "sst2-512": Setting("SST-2, 512 rows per label", "sst2", "--dataset {data}/sst2 --k_shot 512"),
    "squad": Setting(
        "XQuAD (English) as SQuAD, the causal model", "squad",
        "--dataset {data}/xquad_en/xquad.en.json --k_shot 64 --max_completion_length 8", causal=True,
        note="This shows that SQuAD's path runs, and ranks nothing: the model is far too small to answer, most right answers are "
        "longer than the 8 tokens that are generated, and test rows share paragraphs with training rows.",
        ranks=False,
    ),
}  # fmt: skip


def run(name: str, options: argparse.Namespace) -> None:
    """Runs the cells of a setting that are missing, or goes on with those that were cut short.

    Raises:
        ValueError: some failed; the others are kept.
    """
    from zorl.apps import (
        compare,
    )  # not above, where the processes that it starts would load torch before they are prepared

    setting, kept, work = SETTINGS[name], CELLS / name, WORK / name
    work.mkdir(parents=True, exist_ok=True)
    kept.mkdir(parents=True, exist_ok=True)
    if not (work / "cells").exists():
        (work / "cells").symlink_to(kept)  # so that each cell is kept as soon as it has run
    for target, sources in setting.pool:
        parts = [(Path(options.data) / source).read_text(encoding="utf-8").splitlines() for source in sources]
        rows = dict.fromkeys(line for part in parts for line in part[1:])
        (work / target).write_text("\n".join([parts[0][0], *rows]) + "\n", encoding="utf-8")
    arguments = [
        "--model", options.causal if setting.causal else options.masked, "--task", setting.task,
        *setting.arguments.format(data=Path(options.data).resolve(), pooled=work).split(),
        "--budget", str(BUDGET), "--batch_size", str(BATCH), "--test_rows", str(TEST_ROWS), "--jobs", str(options.jobs),
        "--output_dir", str(work), "--methods", *options.methods, "--seeds", *map(str, options.seeds),
    ]  # fmt: skip
    try:
        compare.run(arguments)
    finally:
        for path in kept.glob("*.json"):
            cell = json.loads(path.read_text(encoding="utf-8"))
            if "machine" not in cell:
                path.write_text(
                    json.dumps(cell | {"machine": machine()}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masked", required=True, help="folder or hub name of a masked language model")
    parser.add_argument("--causal", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="folder with the data sets")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to run")
    parser.add_argument("--methods", nargs="+", default=[*MAIN, *REST], help="methods to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    options = parser.parse_args()
    hush()
    failed = 0
    for name in options.only:
        print(SETTINGS[name].title, file=sys.stderr)
        try:
            run(name, options)
        except ValueError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    if failed:
        sys.exit(f"{failed} settings are not whole; the same command tries their missing cells again")


if __name__ == "__main__":
    main()
