"""What shapes a training run. Everything here enters the checkpoint's manifest."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16"]  # of the forward passes
Stage = Literal[0, 1, 2, 3]  # of ZeRO
TrackerName = Literal["tensorboard", "mlflow", "wandb"]
SearcherName = Literal["random", "optuna"]  # of a sweep


def worker_range(count: int | str) -> int | str:
    """A number of workers as it is, 0 for this process, or `LEAST:MOST` in its one spelling."""
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
        raise ValueError(f"{count} workers; the least must be at least 1, and the most not below the least")
    return least if least == most else f"{least}:{most}"


def not_one(count: int) -> int:
    """`count`; a single class would make every ranking perfect."""
    if count == 1:
        raise ValueError("one validation class cannot be ranked wrong; hold out 0, or at least 2")
    return count


class TrainSettings(BaseModel):
    """Settings of a run, whatever the model.

    Attributes:
        epochs: at most this many; early stopping may end the run sooner.
        steps_per_epoch: batches an epoch. SEM-PCYC's released code calls 100 batches an epoch; validation follows each.
        batch_size: rows a worker and step.
        accumulate: so many times `batch_size` rows make a step of a worker. An image tower passes `batch_size` of them
            at a time; the step is the one that all rows together would make.
        patience: epochs without a better validation score before the run stops.
        validation_classes: seen classes held out to choose the checkpoint, where the split names none. With 0 nothing
            is chosen: the run goes to its last step, whose weights are kept.
        refit: when the step (of a closed form: the setting) is chosen, train again from the start to that step with the
            validation classes among the trained ones. The first checkpoint is published too.
        paired: draw a sketch's own photo instead of any photo of its class; by default as the model's paper does.
        augment: random crops and mirror images of pictures; only for models that eat pictures.
        rows_per_class: feature rows of a class and modality that a worker holds; of more rows a seeded sample.
        window: pictures of a class and modality that a step draws from; the window moves on by a batch a step, so that
            all of them come by. A wider one shuffles better and reads more.
        seed: of the split's validation draw, the initial weights, the batches and the noise.
        keep_checkpoints: "best" keeps the chosen weights; "all" also those of every epoch, to report the peak; a number
            those of so many epochs, the best ones, or the last ones where no class is held out.
        num_workers: Ray Train workers; 0 trains in this process, which starts sooner than one worker and ends with the
            same bits. Bits are reproducible at a fixed number. A range, such as 2:8, takes what the
            cluster has, and goes on with fewer or more when that changes. A step has the rows that the most workers
            would have, whatever the number (less a remainder that does not divide); results agree up to rounding and
            noise.
        threads: CPU threads a worker. Bits are reproducible at a fixed number.
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
        """The least and the most workers."""
        least, _, most = str(self.num_workers or 1).partition(":")
        return int(least), int(most or least)

    def rows(self, world: int) -> int:
        """Rows of a step on each of `world` workers. Of a fixed number, whose bits are promised, always as many."""
        least, most = self.workers
        own = self.batch_size * self.accumulate
        return own if least == most else own * most // world
