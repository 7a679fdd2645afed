"""Which parameters are worth tuning first: gradient and curvature, layer by layer.

    python benchmarks/layers.py --model MODEL --data FOLDER      # a few minutes; writes docs/layers.md

MODEL is a small masked language model with BERT's names; FOLDER holds sst2/ (train.tsv) and trec/ (TREC.train.all). MeZO on some
parameters P alone falls by ‖P∇L‖²/(2·tr PHP) a direction at best (docs of `zorl.theory`), so a part with a larger share of
‖∇L‖² than of tr H would be worth tuning alone. Both are measured here, by backpropagation, which zorl itself never needs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

from zorl.tasks import task

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "layers.json"
FITTED, MEASURED, BATCH, DRAWS = 1024, 512, 32, 24  # rows, rows, rows a backward pass, ±1 vectors for the trace


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    layer = re.search(r"layer\.(\d+)\.", name)
    return f"layer {int(layer.group(1)) + 1}" if layer else "embeddings"


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Each part's share of ‖∇L‖² and of tr H, of the cross entropy with a logistic regression as its head."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForMaskedLM.from_pretrained(
        options.model, attn_implementation="eager", dtype=torch.float32
    ).eval()
    found = task(name)
    rows = random.Random(0).sample(found.load("train", Path(options.data) / name), FITTED + MEASURED)
    labels = sorted({str(row["label"]) for row in rows})
    truth = torch.tensor([labels.index(str(row["label"])) for row in rows])
    texts = [str(found.masked).replace("{mask}", tokenizer.mask_token).replace("{text}", row["text"]) for row in rows]

    def states(chosen: slice) -> Tensor:
        encoded = tokenizer(texts[chosen], return_tensors="pt", padding=True)
        hidden: Tensor = model.base_model(**encoded)[0]
        return hidden[encoded["input_ids"] == tokenizer.mask_token_id]

    with torch.no_grad():
        known = torch.cat([states(slice(i, i + BATCH)) for i in range(0, FITTED, BATCH)])
    # One scale for all of the state: a feature that hardly varies, brought to variance one, would outweigh all others.
    scale = known.std(dim=0).mean().item()
    head = LogisticRegression(C=1.0, max_iter=5000).fit(known.numpy() / scale, truth[:FITTED].numpy())
    weight = torch.tensor(head.coef_ / scale, dtype=torch.float32)
    bias = torch.tensor(head.intercept_, dtype=torch.float32)
    if len(labels) == 2:  # one row, for the second label
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    named = [(key, p) for key, p in model.base_model.named_parameters() if "pooler" not in key]
    parameters = [p for _, p in named]

    def loss(chosen: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(states(chosen) @ weight.T + bias, truth[chosen])

    batches = [slice(i, i + BATCH) for i in range(FITTED, FITTED + MEASURED, BATCH)]
    halves = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    for i, batch in enumerate(batches):
        for total, gradient in zip(halves[i % 2], torch.autograd.grad(loss(batch), parameters), strict=True):
            total += gradient / (len(batches) / 2)
    squared, trace, size = defaultdict(float), defaultdict(float), defaultdict(int)
    for (key, p), one, other in zip(named, *halves, strict=True):
        squared[group_of(key)] += (one * other).sum().item()  # of two halves: without the batches' own noise
        size[group_of(key)] += p.numel()
    generator = torch.Generator().manual_seed(0)
    for draw in range(DRAWS):
        gradients = torch.autograd.grad(loss(batches[draw % len(batches)]), parameters, create_graph=True)
        z = [torch.randint(0, 2, p.shape, generator=generator).float() * 2 - 1 for p in parameters]
        slope = torch.stack([(g * v).sum() for g, v in zip(gradients, z, strict=True)]).sum()
        for (key, _), v, product in zip(named, z, torch.autograd.grad(slope, parameters), strict=True):
            trace[group_of(key)] += (v * product).sum().item() / DRAWS
    of = lambda values: {key: value / sum(values.values()) for key, value in values.items()}  # noqa: E731
    shares = {"parameters": of(size), "gradient": of(squared), "trace": of(trace)}
    return {"task": name, **shares}


def report(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Gradient and curvature, layer by layer",
        "",
        f"Written by `benchmarks/layers.py` ({machine()}): a masked language model of 22.7M parameters, that of "
        f"[efficiency.md](efficiency.md), with a logistic regression on the mask's state, close to where tuning starts. "
        f"‖∇L‖² on {MEASURED} rows that the regression did not see, tr H with {DRAWS} random vectors "
        "(Hutchinson), both by backpropagation.",
        "",
        "Tuning one part alone lowers the loss by at most ‖∇L‖²/(2 tr H) per direction, both of that part. So the ratio of the "
        "two shares says how many times faster than all parameters together the part would learn. The traces are noisy, least so "
        "where their share is large.",
        "",
        "| task | part | parameters | ‖∇L‖² | tr H | ratio |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for of in found:
        for part, share in of["parameters"].items():
            gradient, trace = of["gradient"][part], of["trace"][part]
            lines.append(
                f"| {of['task'].upper().replace('SST2', 'SST-2')} | {part} | {share:.0%} | {gradient:.0%} | {trace:.0%} "
                f"| {gradient / trace:.1f} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a masked language model")
    parser.add_argument("--data", required=True, help="folder with the data sets")
    options = parser.parse_args()
    found = [measure(name, options) for name in ("sst2", "trec")]
    RESULTS.write_text(json.dumps({"machine": machine(), "tasks": found}, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "layers.md").write_text(report(found), encoding="utf-8")


if __name__ == "__main__":
    main()
