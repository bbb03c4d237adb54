"""What shapes a training run. Everything here enters the checkpoint's manifest."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


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
        patience: epochs without a better validation score before the run stops.
        validation_classes: seen classes held out to choose the checkpoint, where the split names none. With 0 nothing
            is chosen: the run goes to its last step, whose weights are kept.
        refit: when the step (of a closed form: the setting) is chosen, train again from the start to that step with the
            validation classes among the trained ones. The first checkpoint is published too.
        paired: draw a sketch's own photo instead of any photo of its class; by default as the model's paper does.
        augment: random crops and mirror images of pictures; only for models that eat pictures.
        rows_per_class: rows of a class and modality that a worker holds; more rows than that are a seeded sample.
        seed: of the split's validation draw, the initial weights, the batches and the noise.
        keep_checkpoints: "best" keeps the chosen weights; "all" keeps those of every epoch, to report the peak.
        num_workers: Ray Train workers. Bits are reproducible at a fixed number.
        threads: CPU threads a worker. Bits are reproducible at a fixed number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(30, ge=1)
    steps_per_epoch: int = Field(100, ge=1)
    batch_size: int = Field(64, ge=2)
    patience: int = Field(10, ge=1)
    validation_classes: Annotated[int, AfterValidator(not_one)] = Field(8, ge=0)
    refit: bool = False
    paired: bool | None = None
    augment: bool = False
    rows_per_class: int = Field(20_000, ge=1)
    seed: int = 0
    keep_checkpoints: str = Field("best", pattern="^(best|all)$")
    num_workers: int = Field(2, ge=1)
    threads: int = Field(1, ge=1)
