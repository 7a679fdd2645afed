"""`zorl profile`: what tuning a model costs on this machine, in time and memory, and how large a model would still fit.

Measures what Figures 3 and 4 of the paper show (Malladi et al. 2023), but for the user's own model, batch and machine: inference,
a MeZO step on all parameters, a MeZO step on a LoRA adapter, and a fine-tuning step with backpropagation and AdamW.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from zorl.adapters import ALL_LINEAR, adapt
from zorl.apps.arguments import ProfileArguments
from zorl.apps.command_line import build, parse
from zorl.apps.commands import PROFILE
from zorl.apps.embedded import REVIEWER
from zorl.apps.inputs import check_model_folder, say
from zorl.apps.memory import peak_memory
from zorl.devices import best_device
from zorl.mezo import MeZO
from zorl.models import load_model
from zorl.parameters import ParameterSet, select
from zorl.perturbation import replica
from zorl.probe import Scores
from zorl.twin import Twin, twin_or_scratch

CASES = {
    "inference": "inference, one forward pass",
    "mezo": "MeZO, one step",
    "lora_mezo": "MeZO on LoRA, one step",
    "adam": "fine-tuning with AdamW, one step",
}


def run(argv: Sequence[str]) -> str:
    """Measures, writes the plot, and returns what to print.

    Raises:
        ValueError: an argument is out of range, or the model cannot read that many tokens.
    """
    arguments = build(ProfileArguments, parse(PROFILE, argv))
    for name in ("batch_size", "length", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    name = arguments.model or str(REVIEWER)
    check_model_folder(name)
    device = torch.device("cpu") if arguments.use_cpu else best_device()
    available = _memory_of(device)
    _warm_up()
    with peak_memory(device) as nothing:
        pass
    model: Any = load_model(name, arguments.dtype).eval()
    model = model.to(device)
    size = sum(p.numel() for p in model.parameters())
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and arguments.length > longest:
        raise ValueError(f"--length {arguments.length}: the model reads at most {longest} tokens")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (arguments.batch_size, arguments.length), generator=generator).to(device)
    result: dict[str, Any] = {
        "model": name, "parameters": size, "batch": list(tokens.shape), "dtype": arguments.dtype, "device": str(device),
        "memory_mb": round(available / 1e6), "cases": {},
    }  # fmt: skip
    for case in CASES:
        say(f"measuring {CASES[case]} …")
        seconds, megabytes = _measure(case, model, tokens, arguments)
        figures: dict[str, Any] = {"seconds": round(seconds, 4), "peak_memory_mb": megabytes and round(megabytes)}
        if megabytes is not None and nothing.megabytes is not None:
            per_parameter = (megabytes - nothing.megabytes) * 1e6 / size
            figures["bytes_per_parameter"] = round(per_parameter, 2)
            if per_parameter > 0:  # memory does not grow measurably for a very small model
                figures["largest_parameters"] = int((available - nothing.megabytes * 1e6) / per_parameter)
        result["cases"][case] = figures
    path = Path(arguments.plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    _plot(result, path)
    if arguments.json:
        return json.dumps({**result, "plot": str(path)})
    return f"{_table(result)}\n\nplot: {path}"


def _warm_up() -> None:
    """Loads and compiles what all cases need, so that no case is charged for it."""
    import peft  # noqa: F401

    tiny = torch.nn.Linear(4, 4)
    tiny(torch.ones(2, 4)).sum().backward()
    torch.optim.AdamW(tiny.parameters()).step()
    mezo = MeZO(tiny.named_parameters(), distribution="rank1", epsilon=1e-3)
    twin = Twin(tiny, mezo.parameters)
    probe = mezo.ask()
    losses = twin.evaluate_all(
        probe.points, lambda n: [p.sum().item() for p in twin.module(torch.ones(2 * n, 4)).chunk(n)]
    )
    mezo.tell(probe.id, Scores.of_losses(losses))
    mezo.step()


def _measure(case: str, model: Any, tokens: Tensor, arguments: ProfileArguments) -> tuple[float, float | None]:
    """Median seconds and peak memory (MB) of one step. The steps change the weights slightly."""
    model.requires_grad_(True)  # an adapter freezes its base
    step = _step_of(case, model, tokens, arguments.lora_rank)
    step()  # compiles, and allocates buffers that are reused
    with peak_memory(tokens.device) as peak:
        step()
    times = []
    for _ in range(arguments.rounds):
        _wait(tokens.device)
        start = time.perf_counter()
        step()
        _wait(tokens.device)
        times.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return statistics.median(times), peak.megabytes


def _wait(device: torch.device) -> None:
    """Waits for a GPU to finish: calls return before the work is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _step_of(case: str, model: Any, tokens: Tensor, lora_rank: int) -> Callable[[], None]:
    """A function that does one step. All steps read the last position of each row, as prompts with label words do."""
    if case == "inference":

        def infer() -> None:
            with torch.no_grad():
                _loss(model, tokens)

        return infer
    if case == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

        def backpropagate() -> None:
            _loss(model, tokens).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return backpropagate
    if case == "lora_mezo":
        from peft import LoraConfig

        model = adapt(replica(model), LoraConfig(r=lora_rank, target_modules=ALL_LINEAR)).eval()
    mezo = MeZO(ParameterSet(select(model)).items(), lr=1e-9, epsilon=1e-3, distribution="rank1")
    evaluator = twin_or_scratch(model, mezo.parameters, "rank1")

    def perturb() -> None:
        probe = mezo.ask()
        losses = evaluator.evaluate_all(
            probe.points,
            lambda n: [part.mean().item() for part in _loss(evaluator.module, tokens.repeat(n, 1)).chunk(n)],
        )
        mezo.tell(probe.id, Scores.of_losses(losses))
        mezo.step()

    return perturb


def _loss(model: Any, tokens: Tensor) -> Tensor:
    """Cross entropy of a token at the last position, one number per row. The head computes only that position."""
    embedding = model.get_output_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
    try:
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    finally:
        handle.remove()
    return F.cross_entropy(logits[:, -1].float(), tokens[:, 0], reduction="none")


def _memory_of(device: torch.device) -> float:
    """Memory of the machine, or of its GPU, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(psutil.virtual_memory().total)


def _table(result: dict[str, Any]) -> str:
    size, (rows, length) = result["parameters"], result["batch"]
    lines = [
        f"{result['model']}: {_short(size)} parameters, {result['dtype']}, batch of {rows} x {length} tokens, {result['device']} "
        f"with {result['memory_mb'] / 1000:.1f} GB",
        "",
        f"{'':32}{'seconds':>10}{'memory MB':>12}{'bytes/param':>13}{'largest here':>14}",
    ]
    for case, label in CASES.items():
        figures = result["cases"][case]
        memory = figures["peak_memory_mb"]
        lines.append(
            f"{label:32}{figures['seconds']:>10.3f}{'?' if memory is None else memory:>12}"
            f"{figures.get('bytes_per_parameter', '?'):>13}{_short(figures.get('largest_parameters')):>14}"
        )
    lines += [
        "",
        "Memory is that of the whole process (on a GPU: its allocations). 'largest here' is an estimate: the model's memory,",
        "without that of Python, scaled up to this machine's memory, for the same architecture, dtype and batch.",
    ]
    return "\n".join(lines)


def _short(number: int | None) -> str:
    if number is None:
        return "?"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = (
        ("peak_memory_mb", "memory, MB", 1.0),
        ("seconds", "seconds per step", 1.0),
        ("largest_parameters", "largest model here, millions of parameters", 1e-6),
    )
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    labels = list(CASES.values())
    for axis, (key, title, scale) in zip(axes, panels, strict=True):
        values = [(result["cases"][case].get(key) or 0) * scale for case in CASES]
        bars = axis.barh(labels, values, color=["#8a8a8a", "#1f5aa6", "#4d8fd6", "#c2571a"])
        axis.bar_label(
            bars, labels=[f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(values) * 1.25 or 1)
    axes[0].invert_yaxis()
    rows, length = result["batch"]
    figure.suptitle(
        f"{Path(result['model']).name}, {_short(result['parameters'])} parameters, batch {rows} x {length}, {result['dtype']}"
    )
    figure.savefig(path, dpi=150)
