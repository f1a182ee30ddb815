"""
A search for the best settings of a recipe: trials that Optuna suggests, each a run in a process of its own.

A trial's settings depend on the seed, its number and the trials before it alone, and what a pruner decides on the losses
alone, so a search that was killed and continued equals an uninterrupted one (with one worker, and with a number of steps
as the length). Trials are kept in `search.db`. Who works on one holds its lock, which the operating system drops with the
process: a trial that runs and has no lock was killed, and whoever comes next takes it up.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np

from ..errors import UserError, first_line, not_installed, say
from ..evaluation.report import Report
from ..flags import as_flags
from ..hardware import default_num_threads
from ..runs import RunFolder, read_log
from .search_plan import VAL_LOSS, SearchPlan, show
from .search_report import describe, outcome_of, write_pictures, write_table
from .training import STOPPED, last_line, start_training


if TYPE_CHECKING:
    import optuna

POLL_SECONDS = 1.0
_MAX_FAILURES = 3  # of the first trials, after which the others would fail too
_WARMUP_VALIDATIONS = 5  # of the usual 20 of a run, before which none is pruned
_REPORT_NAME = "search"  # of the evaluation of a trial


class Search:
    """
    The trials of one plan in one folder.

    Args:
        plan ([`SearchPlan`]): What is searched.
        folder (`Path`): Folder of the search; created, or continued if it holds this plan's trials.
        command (`str`): The command line, for the table.

    Raises:
        UserError: If Optuna is not installed, or if the folder holds another search or other files.
    """

    def __init__(self, plan: SearchPlan, folder: Path, command: str):
        try:
            import optuna
        except ImportError as error:
            raise not_installed("Optuna", "search") from error

        self.optuna, self.plan, self.folder, self.command = optuna, plan, folder, command
        self.stop_signal = 0
        self.run_flags: dict[str, Any] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock("search"):
            self.study = self._open_study()

    def _open_study(self) -> "optuna.Study":
        optuna, database, identity = self.optuna, self.folder / "search.db", self.plan.identity()
        if not database.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise UserError(f"--output_dir: {self.folder} holds other files than a search's: name another folder.")
        n_startup_trials = self.plan.arguments.n_startup_trials
        pruner = optuna.pruners.MedianPruner(n_startup_trials, n_warmup_steps=_WARMUP_VALIDATIONS)
        try:
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{database}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            create = partial(
                optuna.create_study,
                storage=storage,
                study_name="search",
                load_if_exists=True,
                pruner=pruner if self.plan.arguments.prune else optuna.pruners.NopPruner(),
            )
            study = create()
        except Exception as error:  # of SQLAlchemy, which says the same in many ways
            raise UserError(
                f"{database} can't be used ({first_line(error)}): try again, or name another --output_dir."
            ) from error
        earlier = study.user_attrs.get("plan", identity)
        for name in {**identity, **earlier}:
            if identity.get(name) != earlier.get(name):
                raise UserError(
                    f"--output_dir: {self.folder} holds another search ({name}: {earlier.get(name)}, and not "
                    f"{identity.get(name)}): name another folder."
                )
        if self._is_hopeless(study.get_trials(deepcopy=False)):  # its trials are tried again
            optuna.delete_study(study_name="search", storage=storage)
            study = create()
        study.set_user_attr("plan", identity)
        return study

    # ----------------------------------------------------------------------------------------------- the workers

    def run(self, workers: int) -> int:
        """
        Runs trials until there are as many as were asked for, and writes the results; returns the exit status.

        Args:
            workers (`int`): Trials at a time.
        """
        if workers > 1 and "num_threads" not in {**self.plan.base, **self.plan.given}:
            self.run_flags["num_threads"] = max(1, default_num_threads() // workers)
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            with ThreadPoolExecutor(workers) as pool:
                for future in [pool.submit(self._work) for _ in range(workers)]:
                    future.result()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stop_signal:
            say("stopped: the same command continues.")
            return 128 + self.stop_signal
        with self._lock("search"):
            results = self._write_table(with_importances=True)
            write_pictures(results, self.folder)
        if results["best"] is None:
            raise UserError(f"no trial has finished: see why in {self.folder / 'README.md'}.")
        say(f"wrote {self.folder / 'README.md'}; the best is trial {results['best']}: {self.folder / 'best.yaml'}")
        return 0

    def _stop(self, number: int, frame: Any) -> None:
        self.stop_signal = number

    def _work(self) -> None:
        """Runs one trial after the other."""
        try:
            while not self.stop_signal:
                with contextlib.ExitStack() as held:
                    with self._lock("search"):
                        claimed = self._claim(held)
                    if claimed is None:
                        return
                    self._run_trial(*claimed)
        except BaseException:
            self.stop_signal = self.stop_signal or signal.SIGTERM  # for the other workers
            raise

    def _is_hopeless(self, trials: list["optuna.trial.FrozenTrial"]) -> bool:
        """Checks that all of the first trials have failed, so that every process of the search ends."""
        enough = len(trials) >= min(_MAX_FAILURES, self.plan.arguments.trials)
        return enough and all(outcome_of(entry) == "failed" for entry in trials)

    def _lock(self, name: str) -> filelock.FileLock:
        return filelock.FileLock(self.folder / f".{name}.lock")

    def _claim(self, held: contextlib.ExitStack) -> tuple["optuna.Trial", dict[str, Any]] | None:
        """Takes up a killed trial or asks for a new one, whose lock is then held; returns None if there are enough."""
        optuna, study, plan = self.optuna, self.study, self.plan
        trials = study.get_trials(deepcopy=False)
        for entry in trials:
            lock = self._lock(f"trial-{entry.number}")
            if entry.state == optuna.trial.TrialState.RUNNING and _try_to_acquire(lock):
                held.callback(lock.release)
                return self._suggest(entry.number, lambda entry=entry: optuna.Trial(study, entry._trial_id))
        if self._is_hopeless(trials):
            note = trials[0].user_attrs.get("note")
            raise UserError(
                f"the first {len(trials)} trials have failed, and the same command tries them again: {note}"
            )
        if len(trials) >= plan.arguments.trials:
            return None
        lock = self._lock(f"trial-{len(trials)}")
        held.enter_context(lock.acquire())
        return self._suggest(len(trials), study.ask)

    def _suggest(self, number: int, ask: Callable[[], "optuna.Trial"]) -> tuple["optuna.Trial", dict[str, Any]]:
        trial, values, arguments = ask(), {}, self.plan.arguments
        for index, (name, entry) in enumerate(self.plan.ranges.items()):  # a seed each: a kill may come between two
            seed = np.random.SeedSequence([arguments.sampler_seed, number, index]).generate_state(1)
            trial.study.sampler = self.optuna.samplers.TPESampler(
                n_startup_trials=arguments.n_startup_trials, seed=int(seed[0])
            )
            values[name] = entry.suggest(trial)
        say(f"trial {number}: {', '.join(f'{name} {show(value)}' for name, value in values.items())}")
        return trial, values

    # ------------------------------------------------------------------------------------------------- one trial

    def _run_trial(self, trial: "optuna.Trial", values: dict[str, Any]) -> None:
        """Trains and measures one trial; leaves it to be taken up again if this process is told to stop."""
        log = self.folder / "trials" / f"{trial.number:03}.log"
        run, flags = RunFolder(log.with_suffix("")), self.plan.train_flags(values) | self.run_flags
        with _running(start_training(self.plan.script, flags, run.path, log)) as training:
            pruned = self._wait(training, until=lambda: self._is_bad(trial, run))
        failed = training.returncode != 0 and not pruned
        if failed and self.stop_signal:
            return
        if failed:
            _refuse_stopped(training, run)
        if pruned or self._is_bad(trial, run):
            self._tell(trial, run, "pruned")
        elif failed:
            self._tell(trial, run, "failed", note=f"{last_line(log)} (exit status {training.returncode})")
        else:
            value, note = self._measure(run, log)
            if value is not None:
                self._tell(trial, run, "finished", value)
            elif not self.stop_signal:
                self._tell(trial, run, "failed", note=note)

    def _tell(
        self, trial: "optuna.Trial", run: RunFolder, outcome: str, value: float | None = None, note: str | None = None
    ) -> None:
        """Keeps the outcome of a trial, and writes the table anew."""
        with self._lock("search"):
            trial.set_user_attr("outcome", outcome)
            trial.set_user_attr("note", note)
            trial.set_user_attr("steps", self._num_steps(trial, run, outcome))
            trial.set_user_attr("seconds", run.read_facts().get("seconds"))
            if value is None:  # a failed trial too: the sampler learns nothing from what Optuna calls failed
                self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
            else:
                self.study.tell(trial, value if self.plan.arguments.lower_is_better else -value)
            self._write_table()
        result = f", {self.plan.arguments.objective} {show(value)}" if value is not None else ""
        say(f"trial {trial.number}: {outcome}{result}{f': {note}' if note else ''}")

    def _num_steps(self, trial: "optuna.Trial", run: RunFolder, outcome: str) -> int:
        """Returns the last step of a run; of a pruned one, which was stopped a little later, that of the decision."""
        if outcome == "pruned":
            return int(_validations(run)[0][len(self._losses(trial)) - 1])
        series = read_log(run.log).values() if run.log.exists() else []
        return max((int(steps[-1]) for steps, _ in series), default=0)

    def _losses(self, trial: "optuna.Trial") -> dict[int, float]:
        """Returns the validation losses of a trial so far, by their number from 1."""
        return self.study.get_trials(deepcopy=False)[trial.number].intermediate_values

    def _wait(self, process: subprocess.Popen, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits until a process ends or this one is told to stop; returns True if `until` holds before."""
        while process.poll() is None and not self.stop_signal:
            if until():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _is_bad(self, trial: "optuna.Trial", run: RunFolder) -> bool:
        """Reports the validation losses of a run in order; returns True at the first for which it is to be pruned."""
        reported, losses = len(self._losses(trial)), _validations(run)[1]
        for count in range(max(1, reported), len(losses) + 1):  # the last one again: a kill may have come after it
            if count > reported:
                trial.report(float(losses[count - 1]), count)
            if trial.should_prune():
                return True
        return False

    def _measure(self, run: RunFolder, log: Path) -> tuple[float | None, str | None]:
        """Returns the objective of a finished run, or None and why there is none."""
        objective = self.plan.arguments.objective
        if objective == VAL_LOSS:
            losses = _validations(run)[1]
            return (float(losses.min()), None) if len(losses) else (None, "no validation loss is finite")
        command = [sys.executable, "-m", "tiny_diffusers.cli", "evaluate", str(run.path), "--name", _REPORT_NAME]
        with log.open("ab") as file:
            evaluation = subprocess.Popen(
                [*command, *as_flags(self.plan.evaluate_flags())], stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        with _running(evaluation):
            self._wait(evaluation)
        if not self.stop_signal:
            _refuse_stopped(evaluation, run)
        if evaluation.returncode:
            return None, f"{last_line(log)} (exit status {evaluation.returncode} of evaluate)"
        figures = Report.load(run.reports / _REPORT_NAME).figures
        return (figures[objective]["value"], None) if objective in figures else (None, f"it has no {objective}")

    def _write_table(self, with_importances: bool = False) -> dict[str, Any]:
        results = describe(self.plan, self.study, self.command, with_importances)
        write_table(results, self.plan, self.folder)
        return results


@contextlib.contextmanager
def _running(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Stops a process at the end, if it still runs, and waits for it: a train script saves a checkpoint first."""
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _refuse_stopped(process: subprocess.Popen, run: RunFolder) -> None:
    """Leaves a trial whose process was stopped from outside to be taken up again."""
    if process.returncode in STOPPED:
        raise UserError(f"trial {run.path.name} was stopped: the same command goes on from there.")


def _try_to_acquire(lock: filelock.FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    return True


def _validations(run: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the losses of the validations that a run has logged so far."""
    series = read_log(run.log) if run.log.exists() else {}
    return series.get(VAL_LOSS, (np.empty(0), np.empty(0)))
