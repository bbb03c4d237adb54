"""Training settings. Every field is recorded in the checkpoint's manifest."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16"]  # of the forward passes
Stage = Literal[0, 1, 2, 3]  # of ZeRO
TrackerName = Literal["tensorboard", "mlflow", "wandb"]
SearcherName = Literal["random", "optuna"]  # of a sweep


def worker_range(count: int | str) -> int | str:
    """Normalize a number of workers, 0 for this process, or a range `MIN:MAX`."""
    if isinstance(count, int):
        least, most = count, count
    else:
        try:
            least, most = (int(part) for part in count.split(":")) if ":" in count else 2 * (int(count),)
        except ValueError:
            raise ValueError(f"{count!r} is neither a number of workers, such as 4, nor a range, such as 2:8") from None
    if least == most == 0:
        return 0
    if not 1 <= least <= most:
        raise ValueError(f"{count} workers; the minimum must be at least 1, and the maximum at least the minimum")
    return least if least == most else f"{least}:{most}"


def not_one(count: int) -> int:
    """Return `count`, which must not be 1: with a single class every ranking would be perfect."""
    if count == 1:
        raise ValueError("a single validation class makes every ranking perfect; hold out 0, or at least 2")
    return count


class TrainSettings(BaseModel):
    """Settings of a training run, for any model.

    Attributes:
        epochs: maximum number of epochs; early stopping may end the run sooner.
        steps_per_epoch: batches per epoch, 100 in SEM-PCYC's released code. The model is validated after each epoch.
        batch_size: rows per worker and step; with `accumulate`, per worker and gradient accumulation step.
        accumulate: gradient accumulation steps: a step uses `accumulate` x `batch_size` rows per worker, of which an
            image tower processes `batch_size` at a time. The gradient is that of all rows in one batch.
        patience: early stopping: epochs without a better validation score before the run stops.
        validation_classes: number of seen classes to hold out for choosing the checkpoint, if the split names none.
            With 0 the run trains to its last step and keeps those weights.
        refit: once the best step (for closed-form models: the best setting) is chosen, retrain from scratch up to that
            step on all seen classes, validation classes included. The first checkpoint is published too.
        paired: sample the photo that belongs to the sketch instead of any photo of its class; by default as in the
            model's paper.
        augment: apply random crops and horizontal flips to images; only with an image tower.
        rows_per_class: maximum number of feature rows per class and modality that a worker holds; of more rows, a
            seeded random sample.
        window: size of the shuffle buffer, in images per class and modality. It advances by one batch per step through
            all images. A larger buffer shuffles better and reads more.
        seed: random seed of the choice of validation classes, the initial weights, the batches and the noise.
        keep_checkpoints: "best" keeps the chosen weights; "all" also those of every epoch, to report the oracle; a
            number N those of the N best epochs, or of the last N if no class is held out.
        num_workers: number of Ray Train workers; 0 trains in this process, which starts faster than one worker and
            gives bit-identical results. Results are bit-reproducible at a fixed number. A range, such as 2:8, uses the
            workers that the cluster has room for and continues with fewer or more when that changes; the global batch
            is always that of the maximum number (less a remainder that does not divide), and results agree up to
            rounding and noise.
        threads: CPU threads per worker. Results are bit-reproducible at a fixed number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(30, ge=1)
    steps_per_epoch: int = Field(100, ge=1)
    batch_size: int = Field(64, ge=2)
    accumulate: int = Field(1, ge=1)
    patience: int = Field(10, ge=1)
    validation_classes: Annotated[int, AfterValidator(not_one)] = Field(8, ge=0)
    refit: bool = False
    paired: bool | None = None
    augment: bool = False
    rows_per_class: int = Field(20_000, ge=1)
    window: int = Field(32, ge=1)
    seed: int = 0
    keep_checkpoints: str = Field("best", pattern="^(best|all|[1-9][0-9]*)$")
    num_workers: Annotated[int | str, AfterValidator(worker_range)] = 2
    threads: int = Field(1, ge=1)

    @property
    def workers(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        least, _, most = str(self.num_workers or 1).partition(":")
        return int(least), int(most or least)

    def rows(self, world: int) -> int:
        """Rows per step on each of `world` workers.

        With a fixed number of workers, where results are bit-reproducible, it does not depend on `world`.
        """
        least, most = self.workers
        own = self.batch_size * self.accumulate
        return own if least == most else own * most // world
