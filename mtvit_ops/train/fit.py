"""Train a model by a recipe, from the first step or from where an interrupted run was."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..models import Model
from ..nn import VisionTransformer, checkpointed_twin, drop_path_twin
from ..progress import Progress
from ..weights import ModelInfo, save_model
from .compute_loss import compute_loss
from .device_views import DeviceViews
from .folder import BEST, LAST, STATE, check_folder, check_shared, describe_images, find_state, prepare_folder
from .images import ImageSet, decode_images, open_images
from .journal import Journal
from .loading import eval_batches, train_batches
from .order import TrainOrder, derive_seed
from .parts import Average, Mixing, Schedule, make_optimiser
from .prepare import Prepared, prepare
from .processes import Processes
from .recipe import Recipe
from .scoring import Score, score
from .signals import StopRequest, stop_requests
from .state import TrainError, TrainState, save_state
from .teacher import check_teacher

_NAMED = 5  # images that cannot be used
_DRAWS = 1  # in the seed of a step's draws; what a view draws has no such part


class StoppedError(TrainError):
    """A signal ended the training; everything up to then is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class TrainResult(NamedTuple):
    """What came out."""

    model: Model  # in evaluation mode: the moving average, if there is one
    score: Score  # of the last evaluation
    best: float  # top-1
    steps: int
    seconds: float  # of training and evaluation, over all resumed parts


def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    resume: bool = False,
    reset_head: bool = False,
    teacher: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a model.

    Args:
        recipe: from ``load_recipe``.
        data: folder or zip with the recipe's splits; see ``train.images.open_images``.
        out: folder of the run, made if need be, one for the processes of all machines. Gets ``state.pt`` (what
            ``resume`` reads), ``best.safetensors`` and ``last.safetensors`` (see ``load_model``), ``recipe.json``,
            ``metrics.jsonl`` and TensorBoard's ``events``.
        start: weights to begin with, as ``load_checkpoint`` takes them; None: seeded random ones.
        resume: go on from the state in ``out``, if there is one; without it such a folder is refused. The recipe must
            be the same but for its title, ``data.workers``, ``run.sharding``, ``run.log_steps`` and ``run.save_steps``.
        reset_head: with ``start``, take everything but the classifier.
        teacher: weights of the model that softens the targets or answers, where the recipe's ``teacher`` wants one, as
            ``load_model`` takes them, or timm where ``teacher.model`` names one of its.
        device: ``"cpu"``, or None: what Accelerate finds.
        progress: what a person sees; None: nothing.

    Returns:
        TrainResult(model, score, best, steps, seconds).

    Raises:
        RecipeError, ValueError, TypeError, FileNotFoundError, ImportError: what was asked for cannot be done; nothing
            has been written.
        StoppedError: SIGTERM or SIGINT came; the state was saved.
        TrainError: a loss or weights that are no numbers, a file that cannot be written, a state of another recipe or
            other images. The last saved state is intact.

    Under ``torchrun`` all processes share the work. With one thread count, a resumed run on the CPU ends with the same
    bits as one that was never interrupted: order, augmentation and every other draw follow from the seed and the step.
    PyTorch's global generators are put back afterwards.
    """
    out = Path(out)
    if reset_head and start is None:
        raise ValueError("reset_head must be False without start: there is no classifier to leave out, got True")
    check_teacher(teacher, recipe.teacher)
    processes = Processes(recipe.run.precision, device, recipe.run.sharding)
    progress = progress if progress is not None and processes.is_first else Progress()
    with _own_generators(), stop_requests() as request:
        state = find_state(out, recipe, resume)
        check_shared(out, state, processes)
        processes.first_does(lambda: check_folder(out))
        train_set = open_images(data, recipe.data.train_split, cache=False)
        val_set = open_images(data, recipe.data.val_split, classes=train_set.classes, cache=False)
        prepared = prepare(
            recipe, train_set, processes, start=start, reset_head=reset_head, teacher=teacher, state=state
        )
        for images in (train_set, val_set):  # which takes minutes: nothing but the images can be wrong by now
            decode_images(images, recipe.data.cache, progress)
        run = _Run(recipe, prepared, train_set, val_set, out, processes, state)
        processes.first_does(lambda: prepare_folder(out, recipe))
        journal = Journal(progress)
        processes.first_does(lambda: journal.open(out, run.step, owed=run.owed))
        try:
            return run.go(journal, request)
        finally:
            journal.close()


class _Objective(nn.Module):
    """The loss as a module's forward, which is what data-parallel training hooks into."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, target: Tensor, weights: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return compute_loss(self.model, images, target, **weights)


class _Run:
    """Model, optimiser and where they are."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        train_set: ImageSet,
        val_set: ImageSet,
        out: Path,
        processes: Processes,
        state: TrainState | None,
    ) -> None:
        options = recipe.optimiser
        self.recipe, self.out, self.processes = recipe, out, processes
        self.train_set, self.val_set = train_set, val_set
        self.order = TrainOrder(
            len(train_set),
            options.batch_size,
            recipe.run.seed,
            processes.rank,
            processes.world_size,
            recipe.mix.mixes,
            recipe.augment.repeats,
        )
        self.model, self.plan, self.teacher = prepared
        model = self.model
        sharded = processes.weights.sharded
        self.average = Average(model, options.ema_decay, sharded=sharded) if options.ema_decay else None
        self.device_views = DeviceViews(recipe.augment) if recipe.data.augment_on == "device" else None
        self.mixing = Mixing(recipe.mix, len(train_set.classes)) if recipe.mix.mixes else None
        if state is not None:
            self._restore(state)  # while tensors are whole
        learner = model
        if isinstance(learner, VisionTransformer):
            learner = checkpointed_twin(learner) if recipe.run.checkpointing else learner
            rate = recipe.regularise.drop_path
            learner = drop_path_twin(learner, rate) if rate else learner
        self.objective = processes.prepare(_Objective(learner))
        if self.average is not None:
            processes.weights.shard_(self.average.holder)
        optimiser = make_optimiser(model, options, self.plan)
        self.optimiser = processes.prepare_optimiser(optimiser)
        self.schedule = Schedule(optimiser, options, self.order.steps)
        if state is not None:
            processes.weights.restore_optimiser(self.optimiser, state.optimiser)
        self.total = options.epochs * self.order.steps
        self.step = 0 if state is None else state.step
        self.owed = False if state is None else state.owed
        self.best = None if state is None else state.best
        self.seconds = 0.0 if state is None else state.seconds
        self.sums: dict[str, float] = {} if state is None else dict(state.sums)
        self.score: Score | None = None
        self.told = 0  # problems of the images so far
        self._since = time.monotonic()

    def go(self, journal: Journal, request: StopRequest) -> TrainResult:
        if self.step:
            journal.say(f"going on after step {self.step} of {self.total}")
        if self.recipe.run.sharding != "none" and not self.processes.weights.sharded:
            journal.say("one process holds all weights: there is nothing to shard")
        self._tell_problems(journal)
        if self.owed:
            self._end_epoch(journal, request)
        while self.step < self.total:
            epoch, first = divmod(self.step, self.order.steps)
            self._train_epoch(epoch, first, journal, request)
        if self.score is None:  # the run had ended before
            self.score = self._evaluate(journal, request)
        assert self.best is not None
        model = self.processes.weights.release(self._holder, self._judged).eval()
        return TrainResult(model, self.score, self.best, self.step, self._elapsed())

    def _train_epoch(self, epoch: int, first: int, journal: Journal, request: StopRequest) -> None:
        run = self.recipe.run
        size = self.model.config.img_size
        terms: list[Tensor] = []
        names: list[str] = []
        alone = self.processes.world_size == 1  # several have to ask each other, at the same steps
        # closed whatever happens: an error that keeps this frame would keep workers, for which the process would wait
        with closing(train_batches(self.train_set, self.recipe, size, self.order, epoch, first)) as batches:
            for images, targets in batches:
                names, values = self._train_step(images, targets)
                terms.append(values)
                self.step += 1
                ends = self.step % self.order.steps == 0
                if self.step % run.log_steps == 0 or ends or (alone and request.signal is not None):
                    self._collect(names, terms)
                    if self.step % run.log_steps == 0 or ends:
                        self._log(journal)
                    if not ends and self.processes.any(request.signal is not None):
                        self._stop(journal, request)
                if run.save_steps and self.step % run.save_steps == 0 and not ends:
                    self._collect(names, terms)
                    self._save()
        epochs = epoch + 1
        self.owed = epochs % run.eval_epochs == 0 or epochs == self.recipe.optimiser.epochs
        self._save()
        if self.owed:
            self._end_epoch(journal, request)
        elif self.processes.any(request.signal is not None):
            self._stop(journal, request, saved=True)

    def _train_step(self, images: Tensor, targets: Tensor) -> tuple[list[str], Tensor]:
        """One update; the names and values of the loss and its terms, on the device."""
        device, seed = self.processes.device, self.recipe.run.seed
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        torch.manual_seed(derive_seed(seed, _DRAWS, self.step, self.processes.rank))
        if self.device_views is not None:
            images = self.device_views(images)
        if self.mixing is not None:
            images, targets = self.mixing(images, targets, derive_seed(seed, _DRAWS, self.step))
        weights = self.plan.at(self.model, self.recipe.loss, self.step / self.total)
        self.schedule.set(self.step)
        with self.processes.autocast():
            if self.teacher is not None:
                if self.recipe.teacher.answers:
                    weights["answers"] = self.teacher.answers(images)
                else:
                    targets = self.teacher.soften(images, targets)
            loss, parts = self.objective(images, targets, weights)
        self.processes.backward(loss)
        if self.recipe.optimiser.clip_grad:
            self.processes.clip(self.objective.parameters(), self.recipe.optimiser)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, self.step)
        named = {"loss": loss, **parts}
        return list(named), torch.stack([value.detach().float() for value in named.values()])

    def _collect(self, names: list[str], terms: list[Tensor]) -> None:
        """Add up the terms of the steps since the last call, and refuse to go on with what is no number."""
        if not terms:
            return
        # float64: the sum is the same, however an interruption groups it
        values = self.processes.mean(torch.stack(terms)).double()  # (steps, terms)
        terms.clear()
        finite = values.isfinite()
        if not bool(finite.all()):
            row = int((~finite.all(dim=1)).int().argmax())
            bad = ", ".join(name for name, good in zip(names, finite[row].tolist()) if not good)
            raise self._no_number(f"no finite number in step {self.step - len(values) + row + 1}: {bad}")
        for name, value in zip(names, values.sum(dim=0).tolist()):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["steps"] = self.sums.get("steps", 0.0) + len(values)

    def _check_weights(self) -> None:
        """A finite loss does not promise a finite update; what is saved must be good to go on from."""
        held = map(self.processes.weights.held, self.model.state_dict().values())
        weights = [value for value in held if value.is_floating_point()]
        finite = bool(torch.stack([value.isfinite().all() for value in weights]).all())
        if self.processes.any(not finite):
            raise self._no_number(f"no finite number after step {self.step}: weights")

    def _no_number(self, what: str) -> TrainError:
        path = self.out / STATE
        kept = f"{path} is from before" if path.exists() else "nothing had been saved"
        return TrainError(f"{what}; lower the learning rate, or clip the gradient; {kept}")

    def _log(self, journal: Journal) -> None:
        steps = self.sums.pop("steps")
        means = {name: value / steps for name, value in self.sums.items()}
        self.sums = {}
        rate = self.optimiser.param_groups[0]["lr"]
        seconds = self._elapsed()
        self.processes.first_does(lambda: journal.record("train", self.step, **means, lr=rate, seconds=seconds))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        epoch = self.step / self.order.steps
        journal.say(f"epoch {epoch:.2f}  step {self.step}/{self.total}  {shown}  lr {rate:.2e}  {seconds:.0f} s")

    def _end_epoch(self, journal: Journal, request: StopRequest) -> None:
        """Evaluate what was saved, and save what follows from that."""
        self.score = found = self._evaluate(journal, request)
        epochs = self.step // self.order.steps
        values = {"epoch": epochs, **found._asdict(), "seconds": self._elapsed()}
        self.processes.first_does(lambda: journal.record("evaluate", self.step, **values))
        skipped = f", {found.skipped} skipped" if found.skipped else ""
        journal.say(f"epoch {epochs}: top-1 {100 * found.top1:.2f} % of {found.images} images{skipped}")
        better = self.best is None or found.top1 > self.best
        self.best = found.top1 if self.best is None else max(self.best, found.top1)
        self._tell_problems(journal)
        # before the state, which remembers the best score: a kill in between writes this file again
        weights = self.processes.weights.gather(self._judged.state_dict())
        for name in (BEST, LAST) if better else (LAST,):
            self.processes.first_does(partial(self._export, self.out / name, weights))
        self.owed = False
        self._save()
        if self.processes.any(request.signal is not None) and self.step < self.total:
            self._stop(journal, request, saved=True)

    def _tell_problems(self, journal: Journal) -> None:
        """Name the images that could not be used, each once."""
        problems = [*self.train_set.problems, *self.val_set.problems]
        if len(problems) == self.told:
            return
        self.told = len(problems)
        some = "; ".join(f"{problem.path} {problem.reason}" for problem in problems[:_NAMED])
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        journal.say(f"not used: {some}{more}")

    def _evaluate(self, journal: Journal, request: StopRequest) -> Score:
        processes = self.processes
        model = self._judged
        self.plan.at(model, self.recipe.loss, self.step / self.total)
        recipe = self.recipe
        loading = eval_batches(
            self.val_set,
            self.model.config.img_size,
            recipe.augment,
            recipe.run.eval_batch,
            recipe.data.workers,
            processes.rank,
            processes.world_size,
        )
        dtype = torch.bfloat16 if recipe.run.precision == "bfloat16" else None
        with processes.weights.whole(self._holder), closing(loading) as batches:
            heeding = self._until_stopped(batches, journal, request)
            found = score(model, heeding, autocast=dtype, distributed=processes.world_size > 1)
        # what a cache left out is broken as well, and every process has left out the same
        return found._replace(skipped=found.skipped + self.val_set.dropped)

    def _until_stopped(
        self, batches: Iterator[tuple[Tensor, Tensor]], journal: Journal, request: StopRequest
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an evaluation, of which a process may have one less than another: it asks as often."""
        processes, run = self.processes, self.recipe.run
        largest = -(-len(self.val_set) // processes.world_size)
        every = 1 if processes.world_size == 1 else run.log_steps
        for number in range(-(-largest // run.eval_batch)):
            if number % every == 0 and processes.any(request.signal is not None):
                self._stop(journal, request, saved=True)
            batch = next(batches, None)
            if batch is not None:
                yield batch

    @property
    def _judged(self) -> Model:
        return self.model if self.average is None else self.average.model

    @property
    def _holder(self) -> nn.Module:
        """What was cut into shards with ``_judged`` in it."""
        return self.objective if self.average is None else self.average.holder

    def _export(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        assert self.score is not None
        facts = {
            "step": self.step,
            "top1": self.score.top1,
            "images": self.score.images,
            "recipe": self.recipe.to_dict(),
        }
        # the method as it is now: training moves it, and so do some files to begin with
        options = {**self.recipe.model, **self._method(), "num_classes": len(self.train_set.classes)}
        augment = self.recipe.augment
        info = ModelInfo(options, self.train_set.classes, augment.crop_pct, facts, augment.eval_interpolation)
        try:
            save_model(path, weights, info)
        except OSError as error:
            raise TrainError(f"cannot write {path}: {error}; the last saved state is intact") from error

    def _method(self) -> dict[str, Any]:
        return dataclasses.asdict(self._judged.method.config)

    def _save(self) -> None:
        self._check_weights()
        weights = self.processes.weights
        state = TrainState(
            recipe=self.recipe.to_dict(),
            step=self.step,
            best=self.best,
            model=weights.gather(self.model.state_dict()),
            optimiser=weights.gather_optimiser(self.optimiser),
            average=None if self.average is None else weights.gather(self.average.model.state_dict()),
            sums=self.sums,
            classes=list(self.train_set.classes),
            images=describe_images(self.train_set),
            method=self._method(),
            seconds=self._elapsed(),
            teacher="" if self.teacher is None else self.teacher.digest,
            owed=self.owed,
        )
        self.processes.first_does(lambda: save_state(self.out / STATE, state))

    def _restore(self, state: TrainState) -> None:
        """Check that the state is of these images, and load the weights."""
        images = describe_images(self.train_set)
        if state.images != images:
            raise TrainError(
                f"the state is of other training images ({state.images}; now {images}): the data has"
                " changed, or a cache left broken images out in one run only (data.cache)"
            )
        for model in (self.model,) if self.average is None else (self.model, self.average.model):
            model.method.config = dataclasses.replace(model.method.config, **state.method)
            model.method.attach(cast(Any, model))
        self.model.load_state_dict(state.model)
        if self.average is not None and state.average is not None:
            self.average.model.load_state_dict(state.average)

    def _stop(self, journal: Journal, request: StopRequest, *, saved: bool = False) -> None:
        if not saved:
            self._save()
        message = f"asked to stop: saved after step {self.step} of {self.total}; resume goes on from there"
        journal.say(message)
        raise StoppedError(message, request.signal or 15)

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._since


@contextmanager
def _own_generators() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield
