"""The process that tunes while people judge: `python -m zorl.apps.tuner --run DIR`, started by `zorl judge`.

It owns the model and writes pairs ahead of the people; a probe whose pairs are all judged becomes one MeZO step. It meets
the page in the store alone. The store's `steps` row is the commit: the trajectory beside it is brought into line with it
whenever this process starts, so that it may be killed at any moment.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zorl.apps.judge_settings import JudgeSettings
from zorl.directions import derive_seed
from zorl.drift import StartingModel, drift
from zorl.generation import Generation
from zorl.mezo import MeZO
from zorl.models import load_model, load_processing_class
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Choice, Probe, Verdict, Verdicts
from zorl.prompts import Answer, Prompt
from zorl.rewards.judgment_store import JudgmentStore, NewPair, StoredProbe, StoredStep, Vote
from zorl.run_folder import RunFolder
from zorl.trajectory import Record, Trajectory, TrajectoryError, read

_AHEAD = 2  # probes that people can work on: one that is being judged, one that is ready when it is done
_MOST_UPDATES = 1  # that θ may have seen since a probe was written
_IDLE_SECONDS = 0.1


class Tuner:
    """One run's model, optimizer and store, from the moment it starts to where it is told to stop or go back.

    Args:
        run: the run's folder, with its settings.

    Raises:
        ValueError: there is no run, or it does not fit its files; the message says how.
    """

    def __init__(self, run: Path) -> None:
        self.run_folder = run
        self.settings = JudgeSettings.read(run)
        self.store = JudgmentStore(run / "judgments.sqlite")
        self.store.set_tuner("starting", f"loading {Path(self.settings.model).name}")
        self.model = load_model(self.settings.model)
        self.tokenizer = load_processing_class(self.settings.model)
        tuned = ParameterSet(select(self.model, self.settings.parameters or None))
        self.policy = self._policy(Scratch(self.model, tuned))
        self.start = self._policy(StartingModel(self.model, tuned))
        self.mezo = self._optimizer(tuned)
        self.probes = {stored.step: self._reopened(stored) for stored in self.store.open_probes()}
        self.compared_at = -1
        self.paused = False

    # --- the loop ---------------------------------------------------------------------------------------------------

    def work(self, stop: threading.Event) -> bool:
        """Works until told to stop. True: the run was sent back to an earlier step, and wants a new Tuner."""
        parent = os.getppid()
        try:
            while not stop.is_set() and os.getppid() == parent:
                if self._answer_requests():
                    return True
                # People never wait for a comparison, and drift is measured after every step all the same.
                if not (self._apply_decided() or self._ask_ahead(1) or self._compare() or self._ask_ahead(_AHEAD)):
                    self._say_what_is_awaited()
                    stop.wait(_IDLE_SECONDS)
            return False
        finally:
            self.mezo.close()

    def _say_what_is_awaited(self) -> None:
        if not self.paused:
            self.store.set_tuner("waiting", "for verdicts")

    # --- steps ------------------------------------------------------------------------------------------------------

    def _ask_ahead(self, ready: int) -> bool:
        """Writes the pairs of one more probe, if fewer than `ready` wait for people."""
        waiting = [stored for stored, _ in self.probes.values() if not self.store.decided(stored.id)]
        if self.paused or len(waiting) >= ready:
            return False
        self.store.set_tuner("generating", "writing the next pairs")
        step = next(i for i in itertools.count(self.mezo.steps) if i not in self.probes)
        probe = self.mezo.ask(ahead=step - self.mezo.steps)
        take = self.store.probes_written()  # differs after a run was sent back, so that the prompts do too
        seed = derive_seed(self.settings.seed, "judged", take)
        prompts = self._prompts(self.settings.prompts, self.settings.prompts_per_step, take)
        rows = [{"prompt": prompt} for prompt in prompts]
        answers = self.policy.answers(rows, probe.points, noise_seed=seed)
        pairs = [
            NewPair(
                direction, row, prompts[row], text(answers[2 * direction][row]), text(answers[2 * direction + 1][row])
            )
            for direction in range(len(probe.seeds))
            for row in range(len(rows))
        ]
        stored = self.store.add_probe(
            pairs, key=f"take {take}", step=step, made_at=probe.made_at, epsilon=probe.epsilon, seeds=probe.seeds
        )
        self.probes[step] = (stored, probe)
        return True

    def _apply_decided(self) -> bool:
        """Makes the next step, if its verdicts are in. Steps are made in order."""
        if self.mezo.steps not in self.probes:
            return False
        stored, probe = self.probes[self.mezo.steps]
        votes: list[Vote] | None = []
        if self._updates_since(probe.made_at) > _MOST_UPDATES:
            self.store.withdraw(stored.id)
        else:
            votes = self.store.close_decided(stored.id)
        if votes is None:
            return False
        verdicts = [Verdict(2 * v.direction, 2 * v.direction + 1, v.row, v.choice) for v in votes]
        nobody = [Verdict(2 * i, 2 * i + 1, 0, Choice.ABSTAIN) for i in range(len(probe.seeds))]
        record = self.mezo.tell(probe.id, Verdicts(tuple(verdicts or nobody)))
        self._commit(stored, probe, record, votes)
        self.mezo.step()
        del self.probes[probe.step]
        return True

    def _commit(self, stored: StoredProbe, probe: Probe, record: Record, votes: Sequence[Vote]) -> None:
        decided = [v for v in votes if v.choice in (Choice.FIRST, Choice.SECOND)]
        figures = {"verdicts": float(len(votes)), "informative_share": self.mezo.recent_informative_share}
        if votes:
            figures["decided_share"] = len(decided) / len(votes)
        self.store.commit_step(
            StoredStep(
                step=probe.step, probe=stored.id, epsilon=probe.epsilon, seeds=probe.seeds, projected=record.projected,
                coefficients=record.coefficients, figures=figures, created=time.time(),
            )
        )  # fmt: skip

    def _updates_since(self, step: int) -> int:
        return sum(any(c != 0.0 for c in done.coefficients) for done in self.store.steps() if done.step >= step)

    def _reopened(self, stored: StoredProbe) -> tuple[StoredProbe, Probe]:
        points = self.mezo.estimator.points(stored.seeds, stored.epsilon)
        probe = Probe(stored.id, stored.step, stored.epsilon, stored.seeds, points, stored.made_at)
        self.mezo.reopen(probe)
        return stored, probe

    # --- the current model against the starting one -------------------------------------------------------------------

    def _compare(self) -> bool:
        """After a step: fresh pairs of the current and the starting model for the win rate, and the drift between them."""
        step = self.mezo.steps
        if step == self.compared_at or not self.settings.comparisons_per_step:
            return False
        self.store.set_tuner("generating", "comparing with the starting model")
        seed = derive_seed(self.settings.seed, "compared", step)
        held_out = self.settings.held_out or self.settings.prompts
        prompts = self._prompts(held_out, self.settings.comparisons_per_step, step)
        rows = [{"prompt": prompt} for prompt in prompts]
        (current,) = self.policy.answers(rows, [CENTRE], noise_seed=seed)
        (start,) = self.start.answers(rows, [CENTRE], noise_seed=seed)
        pairs = [NewPair(0, i, prompts[i], text(current[i]), text(start[i])) for i in range(len(rows))]
        if step:
            self.store.add_comparisons(pairs, step=step)
            measured = drift(self.policy, self.start, rows, current)
            self.store.add_figures(step - 1, {"drift": measured})
            self._mind_the_drift(measured)
        self.compared_at = step
        return True

    def _mind_the_drift(self, measured: float) -> None:
        limit = self.settings.max_drift
        if limit and measured > limit:
            self.paused = True
            self.store.set_tuner(
                "paused",
                f"drift from the starting model is {measured:.2f} nats a token, above the limit of {limit:g}: "
                "go back to an earlier step, or go on",
            )

    # --- what the page asks for ---------------------------------------------------------------------------------------

    def _answer_requests(self) -> bool:
        """Carries out what was asked. True: the run goes back to an earlier step."""
        for number, kind, payload in self.store.pending_requests():
            back = False
            try:
                if kind == "try":
                    result = self._try(str(payload["prompt"]))
                elif kind == "export_model":
                    result = self._export()
                elif kind == "go_on":
                    self.paused, result = False, {}
                elif kind == "rewind":
                    result, back = self._rewind(int(payload["step"])), True
                else:
                    result = {"error": f"there is no request {kind!r}"}
            except (ValueError, OSError, KeyError) as error:
                result = {"error": str(error)}
            self.store.answer_request(number, result)
            if back and "error" not in result:
                return True
        return False

    def _try(self, prompt: str) -> dict[str, Any]:
        if not prompt.strip():
            raise ValueError("type a prompt first")
        rows, seed = [{"prompt": prompt}], derive_seed(self.settings.seed, "tried", prompt, self.mezo.steps)
        (current,) = self.policy.answers(rows, [CENTRE], noise_seed=seed)
        (start,) = self.start.answers(rows, [CENTRE], noise_seed=seed)
        return {"start": text(start[0]), "current": text(current[0]), "step": self.mezo.steps}

    def _export(self) -> dict[str, Any]:
        folder = self.run_folder / "export" / f"model-step{self.mezo.steps}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        RunFolder(folder).write_settings({"prompt": Prompt("{prompt}").to_dict(), "step": self.mezo.steps})
        return {"path": shutil.make_archive(str(folder), "zip", folder), "step": self.mezo.steps}

    def _rewind(self, step: int) -> dict[str, Any]:
        if not 0 <= step < self.mezo.steps:
            raise ValueError(f"step {step} is not behind: {self.mezo.steps} steps are made")
        self.store.set_tuner("starting", f"going back to step {step}")
        self.store.rewind(step)
        return {"step": step}

    # --- parts ------------------------------------------------------------------------------------------------------

    def _optimizer(self, tuned: ParameterSet) -> MeZO:
        """MeZO where the store's steps end."""
        path = RunFolder(self.run_folder).trajectory
        header = {"model": self.settings.model, "objective": "judge:human", "init_sha256": None, "peft": None}

        def mezo(trajectory: Path) -> MeZO:
            return MeZO(
                tuned.items(), self.settings.learning_rate, self.settings.epsilon_value, update="normalized",
                seed=self.settings.seed, trajectory=trajectory, header=header,
            )  # fmt: skip

        steps = self.store.steps()
        if steps or path.exists():
            follow_store(path, mezo(path.with_name("none")).header, steps)
        return mezo(path)

    def _policy(self, evaluator: Any) -> Generation:
        return Generation(
            evaluator, self.tokenizer, Prompt("{prompt}"), max_new_tokens=self.settings.max_completion_length,
            temperature=self.settings.temperature,
        )  # fmt: skip

    def _prompts(self, prompts: Sequence[str], count: int, take: int) -> list[str]:
        """The next prompts: all are used before one comes again, in an order that differs from round to round."""
        chosen = []
        for i in range(take * count, (take + 1) * count):
            turn, place = divmod(i, len(prompts))
            order = sorted(range(len(prompts)), key=lambda j: derive_seed(self.settings.seed, "order", turn, j))
            chosen.append(prompts[order[place]])
        return chosen


def follow_store(path: Path, header: Mapping[str, Any], steps: Sequence[StoredStep]) -> None:
    """Brings a trajectory into line with the committed steps.

    A process that was killed may have written a step that it never committed, or committed one that it never wrote; and
    a damaged or missing file is written anew.
    """
    committed = [Record(step.projected, step.coefficients) for step in steps]
    try:
        written: list[Record] | None = read(path)[1]
    except (TrajectoryError, FileNotFoundError):
        written = None
    if written is not None and [bytes(r) for r in written] == [bytes(r) for r in committed]:
        return
    whole = path.with_name(f"{path.name}.rebuilt")
    whole.unlink(missing_ok=True)
    rebuilt = Trajectory.create(whole, header if written is None else read(path)[0])
    for record in committed:
        rebuilt.append(record)
    rebuilt.close()
    whole.replace(path)


def text(answer: Answer) -> str:
    assert isinstance(answer.completion, str)
    return answer.completion.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, as zorl judge made it")
    run = parser.parse_args().run
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if sys.platform != "win32":
        os.nice(5)  # the page goes first
    with RunFolder(run).claimed():
        try:
            while Tuner(run).work(stop):
                pass
        except Exception as error:
            JudgmentStore(run / "judgments.sqlite").set_tuner("failed", f"{type(error).__name__}: {error}")
            raise
        JudgmentStore(run / "judgments.sqlite").set_tuner("stopped")


if __name__ == "__main__":
    main()
