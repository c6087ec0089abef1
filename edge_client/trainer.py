"""The model at work: loaded once, rebuilt each round, evaluated and trained step by step. Satisfies `jobs.Trainer`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from edge_client.config import KernelConfig, ModelConfig
from edge_client.data.batches import Batch, batch_for_step, collate
from edge_client.data.settings import DataConfig
from edge_client.data.task import Task, load_task
from edge_client.eps_check import DIRECTIONS, ROUNDS_BETWEEN, EpsCheck, eps_check
from edge_client.estimator import local_steps
from edge_client.evaluate import Evaluation, evaluation_steps
from edge_client.events import Evaluated, ModelReady, Trained, TrainingFailed
from edge_client.first_order import GradientSettings, Told, chosen
from edge_client.fit import Form, fit_of
from edge_client.jobs import HeldOutReport, Job, Report, StepReport
from edge_client.kernels import choose
from edge_client.loss import labelled_loss
from edge_client.model import LoadedModel, load_model
from edge_client.overlay import Overlay
from edge_client.shortage import Portions, TooLittleMemory, must_fit, release
from edge_client.streamed import load_streamed
from shared.errors import UserError
from shared.manifest import Manifest
from shared.messages import Plan, Run, Update
from shared.ranges import MODEL_DIGEST_BYTES
from shared.wire import coefficients_from_bytes, scalars_to_bytes

T = TypeVar("T")
Loader = Callable[[Run], LoadedModel]
NO_ROOM = "memory ran out in this round"
EVALUATED_AT_ONCE = 16  # sequences; without a backward pass more would not be faster


class ModelTrainer:
    """One device's model and data. `say` tells people what was chosen and why."""

    def __init__(
        self,
        device: str,
        data: DataConfig,
        *,
        model: ModelConfig,
        kernel: KernelConfig,
        say: Callable[[str], None],
        load: Loader | None = None,
        gradient: GradientSettings | None = None,
    ) -> None:
        """`load`: how the base model comes about, from `model` unless given. gradient: None never takes exact ones."""
        self._device = device
        self._data = data
        self._model = model
        self._kernel = kernel
        self._say = say
        self._gradient = gradient
        self._portions = Portions("local step", say)
        self._evaluated = Portions("held-out evaluation", say, EVALUATED_AT_ONCE)
        self._load = load or self._load_model
        self._is_whole = load is None and (model.load_in, model.form) == ("auto", "auto")  # a smaller form is left
        self._ready: ModelReady | None = None

    def load(self, run: Run) -> ModelReady:
        """Load model and data for `run`; a model that does not fit is read from its files as it is used.

        Raises UserError where one of them is unusable or does not fit.
        """
        try:
            return self._load_fitting(run)
        except TooLittleMemory as error:
            why = str(error)
        return self._load_smaller(run, why)

    def _load_fitting(self, run: Run) -> ModelReady:
        with must_fit(f"{self._model.source or run.model} does not fit into the memory of {self._model.device}"):
            return self._load_all(run)

    def _load_smaller(self, run: Run, why: str) -> ModelReady:
        """The same weights in the next smaller form. Raises UserError with `why` where there is none."""
        if not self._is_whole:
            raise UserError(why)
        self._say(f"warning: {why} Reading the weights from their files from here on, which takes longer.")
        self._is_whole, self._load = False, self._load_streamed
        for name in ("overlay", "_loaded", "_first_order"):
            vars(self).pop(name, None)
        release()
        try:
            ready = self._load_fitting(run)
        except UserError as error:
            self._is_whole, self._load = True, self._load_model  # the next round begins with it, if there is room
            raise UserError(f"{why} Nor can its weights be read from their files as they are used: {error}") from error
        return self._as_before(ready)

    def _as_before(self, ready: ModelReady) -> ModelReady:
        if self._ready is not None and ready != self._ready:
            raise UserError("the model or the data changed on disk since this agent began. Start it again.")
        return ready

    def _load_streamed(self, run: Run) -> LoadedModel:
        return load_streamed(self._model.source or run.model, run.dtype, self._model.device)

    def _load_model(self, run: Run) -> LoadedModel:
        model = self._model
        source, form = model.source or run.model, model.form
        if form == "auto":
            form = self._fitting(source, run)
        if form == "streamed":
            self._is_whole = False
            return self._load_streamed(run)
        return load_model(source, run.dtype, model.device, load_in=model.load_in, say=self._say)

    def _fitting(self, source: str, run: Run) -> Form:
        """The form of the model that fits into the memory there is, before it is loaded."""
        model, length = self._model, self._data.max_length
        found = fit_of(source, run.dtype, model.device, load_in=model.load_in, max_length=length)
        if found is None:
            return "loaded"
        self._say(f"model: {found.why}")
        self._portions.at_once = found.at_once
        self._evaluated.at_once = min(found.at_once, EVALUATED_AT_ONCE)
        return found.form

    def _load_all(self, run: Run) -> ModelReady:
        if self._kernel.threads:
            torch.set_num_threads(self._kernel.threads)
        choice = choose(self._model.device, self._kernel.name)
        self._loaded = self._load(run)
        self._task: Task = load_task(self._data, self._loaded.tokenizer)
        self._say(_data_line(self._task))
        self._run = run
        self.overlay = Overlay(
            self._loaded.model,
            pool_key=run.pool_key,
            seeds=run.seeds,
            directions=run.directions,
            kernel=choice.kernel,
            only={tensor.name for tensor in Manifest.unpack(run.manifest).tensors},
        )
        self._say(f"kernel {choice.kernel.name} ({choice.reason}), {torch.get_num_threads()} threads")
        data_digest = _data_digest(self._task)
        self._first_order = chosen(
            self._gradient, self.overlay, self._loaded, run, data_digest, self._say, self._portions.at_once
        )
        ready = ModelReady(self.overlay.manifest, self.overlay.base_digest(), data_digest)
        self._ready = self._ready or ready
        return ready

    def rebuild(self, version: int, coefficients: bytes) -> bytes:
        """Set the overlay to `coefficients`; returns the first 16 bytes of the model digest. Raises UserError.

        Where the model is gone, because no form of it fitted in the round before, it is loaded again.
        """
        if "overlay" not in vars(self):
            self._as_before(self.load(self._run))
        with must_fit(f"memory ran out while version {version} was rebuilt"):
            self._coefficients = coefficients_from_bytes(coefficients, self._run.seeds)
            self.overlay.set_coefficients(self._coefficients)
            return self.overlay.model_digest()[:MODEL_DIGEST_BYTES]

    def train(self, plan: Plan, model_digest: bytes, done: tuple[Report, ...] = ()) -> Job:
        """The held-out evaluation where the plan asks for it, then the local steps, but for what is done."""
        held_out = next((report for report in done if isinstance(report, HeldOutReport)), None)
        steps = [report for report in done if isinstance(report, StepReport)]
        try:
            if plan.evaluate and held_out is None:
                held_out = yield from self._with_less(self._evaluate)
            told = yield from self._gradient_steps(plan, model_digest)
            told = told or (yield from self._with_less(lambda: self._steps(plan, steps)))
        except (UserError, FloatingPointError) as error:
            return TrainingFailed(plan.round, str(error))
        return Trained(
            Update(
                round=plan.round,
                samples=len(self._task.train),
                train_loss=told.train_loss,
                held_out_loss=None if held_out is None else held_out.loss,
                held_out_accuracy=None if held_out is None else held_out.accuracy,
                model_digest=model_digest,
                scalars=told.scalars,
                change=told.change,
            )
        )

    def evaluate(self, version: int) -> Job:
        """The held-out evaluation alone."""
        try:
            yield from self._with_less(self._evaluate)
        except (UserError, FloatingPointError) as error:
            self._say(f"warning: version {version} could not be evaluated: {error}")
        return Evaluated(version)

    def _with_less(self, work: Callable[[], Generator[Report, bool, T]]) -> Generator[Report, bool, T]:
        """`work()`; where memory runs out with a single sequence, once more with the model in a smaller form."""
        try:
            with must_fit(NO_ROOM):
                return (yield from work())
        except TooLittleMemory as error:
            why = str(error)
        self._load_smaller(self._run, why)
        with must_fit(NO_ROOM):
            self.overlay.set_coefficients(self._coefficients)
            return (yield from work())

    def _evaluate(self) -> Generator[Report, bool, HeldOutReport]:
        rows = self._task.held_out
        running = self._evaluation()
        while True:
            try:
                done = next(running)
            except StopIteration as end:
                result: Evaluation = end.value
                report = HeldOutReport(len(rows), len(rows), result.loss, result.accuracy)
                yield report
                return report
            except (MemoryError, RuntimeError) as error:
                self._evaluated.shrink(error, len(rows))
                done = 0  # from the beginning
            if done == 0:
                release()
                running = self._evaluation()
            yield HeldOutReport(done, len(rows))

    def _evaluation(self) -> Generator[int, None, Evaluation]:
        return evaluation_steps(
            self._loaded.model,
            self._loaded.tokenizer,
            self._task.held_out,
            labelled_loss,
            answers=self._task.answers,
            batch_size=self._evaluated.at_once or EVALUATED_AT_ONCE,
        )

    def _batch(self, plan: Plan, step: int) -> Batch:
        rows = batch_for_step(
            self._task.train, nonce=plan.nonce, device=self._device, step=step, batch_size=plan.batch_size
        )
        return collate(rows, self._task.padding).to(self._loaded.device)

    def _gradient_steps(self, plan: Plan, model_digest: bytes) -> Generator[Report, bool, Told | None]:
        """The steps of a first-order device; None where it is none, or not any more for want of memory."""
        if self._first_order is None:
            return None
        try:
            return (yield from self._first_order.steps(plan, model_digest, partial(self._batch, plan)))
        except TooLittleMemory as error:
            self._say(f"warning: {error} Going on with forward passes alone.")
        self._first_order = self._gradient = None
        release()
        return None

    def _steps(self, plan: Plan, reports: list[StepReport]) -> Generator[Report, bool, Told]:
        """`reports`: of the steps done so far; it grows, so that another attempt goes on where this one ends."""

        def loss(batch: Batch) -> Tensor:
            return labelled_loss(self._loaded.model, batch, self._portions.at_once)

        def attempt(measure: Callable[[], T]) -> T:
            return self._portions.attempt(measure, min(plan.batch_size, len(self._task.train)))

        batch, form = partial(self._batch, plan), self._run.scalar_format
        done = [report.scalar for report in reports if report.scalar is not None]
        if plan.round % ROUNDS_BETWEEN == 0 and not done:
            self._say(str(attempt(lambda: self._eps_check(plan, batch(0)))))
        for step in local_steps(self.overlay, plan, self._device, batch, loss, form, attempt, tuple(done)):
            done.append(float(step.scalar))
            reports.append(StepReport(step.step + 1, plan.local_steps, step.loss, done[-1]))
            if (yield reports[-1]):
                break
        mean_loss = math.fsum(report.loss for report in reports) / len(reports)
        return Told(mean_loss, scalars_to_bytes(done, form), None)

    def _eps_check(self, plan: Plan, batch: Batch) -> EpsCheck:
        model, at_once = self._loaded.model, self._portions.at_once
        seeds = range(min(DIRECTIONS, self.overlay.seeds))
        return eps_check(lambda: labelled_loss(model, batch, at_once), self.overlay, seeds, plan.eps)


def _data_digest(task: Task) -> bytes:
    """SHA-256 of the examples on both sides, as the model sees them: other data, other steps."""
    digest = hashlib.sha256(repr((len(task.train), task.answers, task.padding)).encode())
    for row in (*task.train, *task.held_out):
        digest.update(repr((row.prompt, row.response, row.label)).encode())
    return digest.digest()


def _data_line(task: Task) -> str:
    skipped = f", {len(task.skipped)} left out" if task.skipped else ""
    split = f"{len(task.train)} examples to train on, {len(task.held_out)} held out{skipped}"
    return f"data: {split}; shape {task.shape}, because {task.reason}"
