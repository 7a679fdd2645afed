"""No verdict is lost or used twice, whoever comes at once and is killed when."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from stored_judgments import new_pairs, step_of

from zorl.probe import Choice
from zorl.rewards.judgment_store import AlreadyClosed, JudgmentStore, Vote


def test_eight_raters_at_once_lose_nothing_and_judge_nothing_twice(store_at: str | Path) -> None:
    """Threads over two connections' worth of stores, as two processes have them, while a tuner closes and adds probes."""
    acknowledged: dict[int, Choice] = {}
    lock = threading.Lock()
    used: list[Vote] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def rate(store: JudgmentStore, name: str) -> None:
        try:
            rater = store.rater(name)
            draws = random.Random(name)
            while not stop.is_set():
                showing = store.next_pair(rater)
                if showing is None:
                    time.sleep(0.002)
                    continue
                choice = draws.choice([Choice.FIRST, Choice.SECOND, Choice.TIE])
                try:
                    store.vote(showing.id, rater, choice)
                except AlreadyClosed:
                    continue
                with lock:
                    acknowledged[showing.id] = choice
        except BaseException as error:
            failures.append(error)
            stop.set()

    with JudgmentStore(store_at, repeat_share=0.0, comparison_share=0.0) as tuner, JudgmentStore(store_at) as page:
        threads = [threading.Thread(target=rate, args=((tuner, page)[i % 2], f"rater {i}")) for i in range(8)]
        for thread in threads:
            thread.start()
        for step in range(12):
            probe = tuner.add_probe(new_pairs(30), key=str(step), step=step)
            deadline = time.monotonic() + 20
            while not tuner.decided(probe.id) and not stop.is_set() and time.monotonic() < deadline:
                time.sleep(0.002)
            used += tuner.close_probe(probe.id)
            tuner.commit_step(step_of(probe.id, step))
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        records = {record.showing: record for record in page.showings() if record.choice is not None}
    assert {i: record.choice for i, record in records.items()} == acknowledged
    assert len(used) == len(acknowledged) >= 360
    assert {vote.pair for vote in used} == set(range(1, 361))
    assert len({(vote.pair, vote.rater) for vote in used}) == len(used)


def test_processes_that_come_at_once_make_one_store_and_get_a_pair_each(store_at: str | Path) -> None:
    """Eight open what is not there yet, and ask for a pair as eight raters when all are ready."""
    program = AT_ONCE.replace("PAIRS", "[NewPair(0, row, str(row), 'plus', 'minus') for row in range(8)]")
    result = subprocess.run([sys.executable, "-c", program, str(store_at)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert sorted(map(int, result.stdout.split())) == list(range(1, 9))
    with JudgmentStore(store_at) as store:
        assert store.probes_written() == 1
        assert {record.rater for record in store.showings()} == {f"rater {i}" for i in range(8)}


AT_ONCE = """
import os, sys
from zorl.rewards.judgment_store import JudgmentStore, NewPair
ready, go = os.pipe(), os.pipe()
children = []
for i in range(8):
    child = os.fork()
    if child == 0:
        store = JudgmentStore(sys.argv[1], repeat_share=0.0, comparison_share=0.0)
        store.add_probe(PAIRS, key="the same")
        rater = store.rater(f"rater {i}")
        os.write(ready[1], b".")
        os.read(go[0], 1)
        os.write(1, f"{store.next_pair(rater).pair}\\n".encode())
        store.close()
        os._exit(0)
    children.append(child)
for _ in children:
    os.read(ready[0], 1)
os.write(go[1], b"." * 8)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""

RATER = """
import os, random, sys, time
from zorl.probe import Choice
from zorl.rewards.judgment_store import AlreadyClosed, JudgmentStore
tell = lambda number: os.write(1, b"%d\\n" % number)  # one write, where print makes two if Python does not buffer
store, name = JudgmentStore(sys.argv[1]), sys.argv[2]
rater, draws = store.rater(name), random.Random()
print("ready", flush=True)
while True:
    showing = store.next_pair(rater)
    if showing is None:
        time.sleep(0.005)
        continue
    choice = Choice.FIRST if showing.first.startswith("plus") else Choice.SECOND
    try:
        store.vote(showing.id, rater, choice)
        tell(showing.id)  # acknowledged
        if draws.random() < 0.1:
            store.undo(rater)
            tell(-showing.id)
    except AlreadyClosed:
        pass
"""

TUNER = """
import sys, time
from zorl.rewards.judgment_store import JudgmentStore, NewPair, StoredStep
store = JudgmentStore(sys.argv[1])
print("ready", flush=True)
while True:
    for probe in store.open_probes():  # what a killed process left comes first
        while (votes := store.close_decided(probe.id)) is None:
            time.sleep(0.002)
        store.commit_step(StoredStep(probe.step, probe.id, 0.5, (1,), (0.0,), (0.0,), {"votes": float(len(votes))}))
    step = len(store.steps())
    pairs = [NewPair(0, row, f"prompt {row}", f"plus {row}", f"minus {row}") for row in range(8)]
    store.add_probe(pairs, key=f"step {step}", step=step)
"""


def test_processes_killed_at_any_moment_lose_nothing_and_use_nothing_twice(store_at: str | Path) -> None:
    """A tuner and two raters, killed thirty times. They are forked, for importing takes seconds and forking none."""
    JudgmentStore(store_at, repeat_share=0.1, comparison_share=0.0, lease_seconds=0.05).close()
    template = FORKING.replace("RATER", repr(RATER)).replace("TUNER", repr(TUNER))
    result = subprocess.run(
        [sys.executable, "-c", template, str(store_at)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    with JudgmentStore(store_at) as store:
        said = [line for line in result.stdout.splitlines() if line.lstrip("-").isdecimal()]
        check_the_books(store, said)
        assert len(store.steps()) >= 10


# Loads the modules and the driver once, and forks from there.
FORKING = """
import os, random, signal, sys, time, warnings
from zorl.rewards.judgment_store import JudgmentStore
warnings.simplefilter("ignore")
JudgmentStore(sys.argv[1]).close()
draws = random.Random(3)
for _ in range(10):
    children = []
    for program, words in ((TUNER, ()), (RATER, ("rater 0",)), (RATER, ("rater 1",))):
        child = os.fork()
        if child == 0:
            sys.argv = ["", sys.argv[1], *words]
            exec(program, {"__name__": "__main__"})
        children.append(child)
    # A step at least, however slow the machine is, and a moment more.
    deadline = time.monotonic() + 30
    with JudgmentStore(sys.argv[1]) as store:
        done = len(store.steps())
        while len(store.steps()) == done and time.monotonic() < deadline:
            time.sleep(0.01)
    time.sleep(draws.random() / 3)
    for child in draws.sample(children, 3):
        time.sleep(draws.random() / 50)
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            sys.exit("a process ended by itself")
"""


def check_the_books(store: JudgmentStore, said: list[str]) -> None:
    """What was acknowledged is there, what was taken back is not, and every vote was used once."""
    showings = {record.showing: record for record in store.showings()}
    last: dict[int, bool] = {}  # showing: voted, or taken back, as its rater was told at last
    for line in said:
        last[abs(int(line))] = int(line) > 0
    assert len(last) > 20
    # A rater who was killed may not have been told of one vote or undo more; the log has it.
    actions: dict[int | None, list[str]] = {}
    for event in store.events():
        if event.action in ("vote", "undo"):
            actions.setdefault(event.showing, []).append(event.action)
    for showing, record in showings.items():
        done = actions.get(showing, [])
        assert done == ["vote", "undo"] * (len(done) // 2) + ["vote"] * (len(done) % 2)
        assert (record.choice is not None) == (len(done) % 2 == 1)
        assert record.opinion in (None, Choice.FIRST)
    told = Counter(abs(int(line)) for line in said)
    for showing, times in told.items():
        assert len(actions[showing]) >= times
    steps = store.steps()
    assert [step.step for step in steps] == list(range(len(steps)))
    assert len({step.probe for step in steps}) == len(steps)
    counted = Counter(r.probe for r in showings.values() if r.choice is not None and not r.repeat)
    for step in steps:  # the votes that were used are the votes that there are
        assert store.probe(step.probe).state == "applied"
        assert step.figures["votes"] == len(store.close_probe(step.probe)) == counted[step.probe] >= 8
    assert store.progress().verdicts == sum(record.choice not in (None, Choice.ABSTAIN) for record in showings.values())
