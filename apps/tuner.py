"""The process that tunes while people judge: `python -m zorl.apps.tuner --run DIR`, started by `zorl judge`.

It owns the model and writes pairs before people need them; a probe whose pairs are all judged becomes one step. It
communicates with the page only through the store. A row in the store's `steps` table commits a step: whenever this process
starts, it makes the trajectory agree with that table, so it may be killed at any moment.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import signal
import stat
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zorl.answer_logits import AnswerLogits
from zorl.apps.judge_settings import JudgeSettings
from zorl.apps.learning import Direct, Learner, Replay, text
from zorl.apps.model_export import export_model
from zorl.apps.store_trajectory import follow_store
from zorl.devices import best_device
from zorl.directions import derive_seed
from zorl.drift import DriftMeter, starting_evaluator
from zorl.encoding import pad_token_id
from zorl.generation import Generation
from zorl.mezo import MeZO
from zorl.models import load_model, load_processing_class
from zorl.output_bias import add_output_bias, output_bias_name
from zorl.parameters import ParameterSet, base_sha256, select
from zorl.perturbation import Scratch
from zorl.preference_replay import PreferenceReplay
from zorl.probe import CENTRE, Choice
from zorl.prompts import Prompt
from zorl.rewards.judgment_records import AUTOMATIC
from zorl.rewards.judgment_store import JudgmentStore, NewPair, StoredProbe, StoredStep, Vote
from zorl.run_folder import RunFolder
from zorl.trajectory import Record

_DRIFT_PROMPTS = 16
_REPLAY_BATCH = 16  # pairs per update of replay
_MOST_UPDATES = 1  # updates of θ since a probe was written, beyond which the probe is withdrawn
_MOST_UNSEEN = 20  # steps in a row on which nobody had a choice, beyond which tuning pauses
_IDLE_SECONDS = 0.1
_ENDED = (
    "the model's process ended while it carried this out, perhaps for lack of memory; ask again to try it once more"
)


class Tuner:
    """One run's model, optimizer and store, from its start until it is told to stop or to go back.

    Args:
        run: the run's folder, with its settings.

    Raises:
        ValueError: there is no run, or its files contradict its settings.
    """

    def __init__(self, run: Path) -> None:
        self.run_folder = run
        self.settings = JudgeSettings.read(run)
        self.store = JudgmentStore(self.settings.store(run))
        self.store.set_tuner("starting", f"loading {Path(self.settings.model).name}")
        self.model = load_model(self.settings.model)
        self.model.to(best_device())  # type: ignore[arg-type]
        self.tokenizer = load_processing_class(self.settings.model)
        patterns = self.settings.parameters or None
        if self.settings.output_bias:
            add_output_bias(self.model)
            patterns = [output_bias_name(self.model)]
        tuned = ParameterSet(select(self.model, patterns))
        now, before = Scratch(self.model, tuned), starting_evaluator(self.model, tuned)
        self.policy, self.start = self._policy(now), self._policy(before)
        readers = self._reader(now), self._reader(before)
        self.mezo = self._optimizer(tuned)
        self.learner: Learner = Direct(self.mezo, self.policy)
        if self.settings.method == "replay":
            replay = PreferenceReplay(
                *readers, brake=self.settings.brake, batch_size=_REPLAY_BATCH, seed=self.settings.seed
            )
            self.learner = Replay(self.mezo, self.policy, replay)
        rows = [{"prompt": prompt} for prompt in self._held_out[:_DRIFT_PROMPTS]]
        self.meter = DriftMeter(self.policy, self.start, *readers, rows, noise_seed=self.settings.seed)
        self.measured_at = -1  # the step at which the drift was measured last
        self.unseen = 0  # latest steps in a row whose answers were identical, so that nobody was shown any
        self.paused = ""  # why, as people are told; empty while it is not
        self.drift = 0.0  # as measured last

    @property
    def step(self) -> int:
        """The step that is made next, counted from 0."""
        return self.store.count_steps()

    # --- the loop ---------------------------------------------------------------------------------------------------

    def work(self, stop: threading.Event) -> bool:
        """Works until told to stop. Returns True if the run was sent back to an earlier step and needs a new Tuner."""
        try:
            while not stop.is_set():
                if self._answer_requests():
                    return True
                # In this order people never wait for a comparison, and drift is still measured after every step.
                if not (
                    self._ask_ahead(1)
                    or self._compare()
                    or self._apply_decided()
                    or self._ask_ahead(self.learner.ahead)
                ):
                    self._say_what_is_awaited()
                    stop.wait(_IDLE_SECONDS)
            return False
        finally:
            self.mezo.close()

    def _say_what_is_awaited(self) -> None:
        self.store.set_tuner(*(("paused", self.paused) if self.paused else ("waiting", "for verdicts")))

    # --- steps ------------------------------------------------------------------------------------------------------

    def _ask_ahead(self, ready: int) -> bool:
        """Writes the pairs of one more probe, if fewer than `ready` probes wait for verdicts."""
        open_ones, step = self.store.open_probes(), self.step
        waiting = [stored for stored in open_ones if not self.store.decided(stored.id)]
        # Decided probes are applied first: another one would come from a model that is too old.
        if self.paused or len(waiting) >= ready or len(open_ones) >= self.learner.ahead:
            return False
        self.store.set_tuner("generating", "writing the next pairs")
        next_one = next(i for i in itertools.count(step) if i not in {stored.step for stored in open_ones})
        take = self.store.probes_written()  # also grows when a run is sent back, so that the prompts differ
        prompts = self._prompts(self.settings.prompts, int(self.settings.prompts_per_step or 1), take)
        seed = derive_seed(self.settings.seed, "judged", take)
        pairs, kept = self.learner.pairs(prompts, next_one - step, seed)
        self.store.add_probe(pairs, key=f"take {take}", step=next_one, made_at=step, **kept)
        return True

    def _apply_decided(self) -> bool:
        """Makes the next step, if its verdicts are complete. Steps are made in order."""
        step = self.step
        stored = next((stored for stored in self.store.open_probes() if stored.step == step), None)
        if stored is None or self.paused:
            return False
        votes: list[Vote] | None = []
        if stored.seeds and self._updates_since(stored.made_at) > _MOST_UPDATES:
            self.store.withdraw(stored.id)
        else:
            votes = self.store.close_decided(stored.id)
        if votes is None:
            return False
        self.store.set_tuner("computing", f"computing step {step + 1}")
        used = {done.probe for done in self.store.steps()} | {stored.id}
        judged = [pair for pair in self.store.preference_pairs() if pair.probe in used]
        records = self.learner.learn(stored, votes, judged)
        self._commit(stored, records, votes)
        self._mind_the_identical(votes)
        return True

    def _commit(self, stored: StoredProbe, records: Sequence[Record], votes: Sequence[Vote]) -> None:
        decided = [v for v in votes if v.choice in (Choice.FIRST, Choice.SECOND)]
        figures = {"verdicts": float(len(votes)), "updates": float(len(records))}
        if votes:
            figures["decided_share"] = len(decided) / len(votes)
        if not math.isnan(self.mezo.recent_informative_share):
            figures["informative_share"] = self.mezo.recent_informative_share
        first, *more = records if stored.seeds else [Record((), ()), *records]
        self.store.commit_step(
            StoredStep(
                step=stored.step, probe=stored.id, epsilon=stored.epsilon, seeds=stored.seeds,
                projected=first.projected, coefficients=first.coefficients, figures=figures,
                replayed=tuple((record.projected, record.coefficients) for record in more),
            )
        )  # fmt: skip

    def _mind_the_identical(self, votes: Sequence[Vote]) -> None:
        """Pauses when step after step has only identical answers: without anybody to wait for, that would go on for ever."""
        self.unseen = self.unseen + 1 if votes and all(vote.rater == AUTOMATIC for vote in votes) else 0
        if self.unseen >= _MOST_UNSEEN:
            more = "a larger --epsilon" if self.settings.method == "direct" else "a higher --temperature"
            self._pause(
                f"The model gave the same answer twice to every prompt of the last {self.unseen} steps, so there was nothing to "
                f"judge: on the Progress tab, go back to an earlier step, or start again with {more}."
            )

    def _updates_since(self, step: int) -> int:
        return sum(any(c != 0.0 for c in done.coefficients) for done in self.store.steps() if done.step >= step)

    # --- the current model against the starting one -------------------------------------------------------------------

    def _compare(self) -> bool:
        """After each step: writes comparisons of the current and the starting model for the win rate, and measures the drift."""
        step = self.step
        if step == self.measured_at:
            return False
        self.measured_at = step
        if step == 0:
            return True
        if not self.store.has_comparisons(step):  # a tuner before this one may have written them
            self._write_comparisons(step)
        drift = self.meter.measure()
        figures = {"drift": drift.kl, "perplexity": drift.perplexity, "distinct_2": drift.distinct_2}
        self.store.add_figures(step - 1, {name: value for name, value in figures.items() if math.isfinite(value)})
        self._mind_the_drift(drift.kl)
        return True

    def _write_comparisons(self, step: int) -> None:
        count = self.settings.comparisons_per_step
        if not count:
            return
        self.store.set_tuner("generating", "comparing with the starting model")
        # This also grows when a run is sent back, so that nobody judges the same twice.
        take = self.store.comparisons_written() // count
        seed = derive_seed(self.settings.seed, "compared", take)
        prompts = self._prompts(self._held_out, count, take)
        rows = [{"prompt": prompt} for prompt in prompts]
        (current,), (start,) = (p.answers(rows, [CENTRE], noise_seed=seed) for p in (self.policy, self.start))
        pairs = [NewPair(0, i, prompts[i], text(current[i]), text(start[i])) for i in range(len(rows))]
        self.store.add_comparisons(pairs, step=step)

    def _mind_the_drift(self, measured: float) -> None:
        self.drift = measured
        if self._too_far():
            self._pause(
                f"The drift from the starting model is {measured:.2f} nats per token, above the limit of {self._limit:g}: "
                "on the Progress tab, go back to an earlier step, or continue."
            )

    @property
    def _limit(self) -> float:
        return self.store.accepted_drift() or self.settings.max_drift

    def _too_far(self) -> bool:
        return self.settings.max_drift > 0.0 and not self.drift <= self._limit

    def _pause(self, message: str) -> None:
        self.paused = message
        self._say_what_is_awaited()

    def _go_on(self) -> dict[str, Any]:
        """Goes on after a pause. Because of drift, it pauses again when the model has gone on by as much as the limit allows."""
        self.paused, self.unseen = "", 0
        if self._too_far() and math.isfinite(self.drift):
            self.store.accept_drift(self.drift + self.settings.max_drift)
        return {}

    # --- requests of the page ---------------------------------------------------------------------------------------

    def _answer_requests(self) -> bool:
        """Carries out the requests. Returns True if the run goes back to an earlier step."""
        for number, kind, payload in self.store.pending_requests():
            back = False
            if not self.paused:  # else the page goes on saying so
                self.store.set_tuner("answering", "a request of the page")
            try:
                if not self.store.begin_request(number):
                    result = {"error": _ENDED}
                elif kind == "try":
                    result = self._try(str(payload["prompt"]))
                elif kind == "export_model":
                    result = self._export()
                elif kind == "go_on":
                    result = self._go_on()
                elif kind == "rewind":
                    result, back = self._rewind(int(payload["step"])), True
                else:
                    result = {"error": f"there is no request {kind!r}"}
            except ValueError as error:
                result = {"error": str(error)}
            except Exception as error:  # out of memory, too: it would end the next process as well
                result = {"error": f"{type(error).__name__}: {error}"}
            self.store.answer_request(number, result)
            if back and "error" not in result:
                return True
        return False

    def _try(self, prompt: str) -> dict[str, Any]:
        if not prompt.strip():
            raise ValueError("type a prompt first")
        rows, seed = [{"prompt": prompt}], derive_seed(self.settings.seed, "tried", prompt, self.step)
        (current,) = self.policy.answers(rows, [CENTRE], noise_seed=seed)
        (start,) = self.start.answers(rows, [CENTRE], noise_seed=seed)
        return {"start": text(start[0]), "current": text(current[0]), "step": self.step}

    def _export(self) -> dict[str, Any]:
        exports = self.run_folder / "export"
        archive = export_model(self.model, self.tokenizer, exports, self.step, output_bias=self.settings.output_bias)
        return {"path": str(archive), "step": self.step}

    def _rewind(self, step: int) -> dict[str, Any]:
        if not 0 <= step < self.step:
            raise ValueError(f"cannot go back to step {step}: only {self.step} steps have been made")
        self.store.set_tuner("starting", f"going back to step {step}")
        self.store.rewind(step)
        return {"step": step}

    # --- parts ------------------------------------------------------------------------------------------------------

    def _optimizer(self, tuned: ParameterSet) -> MeZO:
        """MeZO in the state after the steps in the store."""
        path = RunFolder(self.run_folder).trajectory
        header = {
            "model": self.settings.model, "objective": f"judge:human:{self.settings.method}", "init_sha256": None,
            "peft": None, "output_bias": self.settings.output_bias, "prompt": Prompt("{prompt}").to_dict(),
            "base_sha256": base_sha256(self.model),
        }  # fmt: skip

        def mezo(trajectory: Path | None) -> MeZO:
            return MeZO(
                tuned.items(), float(self.settings.learning_rate or 0), self.settings.epsilon_value, update="normalized",
                n_spsa=int(self.settings.directions or 1), seed=self.settings.seed, trajectory=trajectory, header=header,
            )  # fmt: skip

        steps = self.store.steps()
        if steps or path.exists():
            follow_store(path, mezo(None).header, steps)
        return mezo(path)

    @property
    def _held_out(self) -> list[str]:
        return self.settings.held_out or self.settings.prompts

    def _reader(self, evaluator: Scratch) -> AnswerLogits:
        pad = pad_token_id(self.tokenizer)
        return AnswerLogits(evaluator, evaluator.parameters, pad_id=pad, temperature=self.settings.temperature)

    def _policy(self, evaluator: Scratch) -> Generation:
        return Generation(
            evaluator, self.tokenizer, Prompt("{prompt}"), max_new_tokens=self.settings.max_completion_length,
            temperature=self.settings.temperature,
        )  # fmt: skip

    def _prompts(self, prompts: Sequence[str], count: int, take: int) -> list[str]:
        """The next prompts: all are used before one is repeated, in a different order each time."""
        chosen = []
        for i in range(take * count, (take + 1) * count):
            turn, place = divmod(i, len(prompts))
            order = sorted(range(len(prompts)), key=lambda j: derive_seed(self.settings.seed, "order", turn, j))
            chosen.append(prompts[order[place]])
        return chosen


def stop_with_the_page(stop: threading.Event) -> None:
    """Sets `stop` when the page's process is gone, even if it was killed: the pipe to standard input is then closed."""

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
            pass
        stop.set()

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, as created by zorl judge")
    run = parser.parse_args().run
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop_with_the_page(stop)
    if sys.platform != "win32":
        os.nice(5)  # the page has priority
    where = JudgeSettings.read(run).store(run)
    with RunFolder(run).claimed(), JudgmentStore(where) as store, store.tuning():
        try:
            while Tuner(run).work(stop):
                pass
        except Exception as error:
            store.set_tuner("failed", f"{type(error).__name__}: {error}")
            raise
        store.set_tuner("stopped")


if __name__ == "__main__":
    main()
