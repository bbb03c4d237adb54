"""Classification of the seen classes: fine-tunes a backbone, from which SEM-PCYC and others start.

One linear layer per modality on the features is trained by cross entropy, together with the image tower in front. An
embedding is the feature itself, so a checkpoint serves as a fine-tuned backbone (`zsr features --finetune-on-seen`)
and, compared by cosine, as another baseline. Without a tower only the linear layers are trained, and embeddings do not
change.

Papers report such fine-tuning, but not how it was done: optimizer and learning rates were chosen in this project.

Shapes: B batch, F feature, N seen classes.
"""

from collections.abc import Mapping

from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.protocol import Group, Inputs, Model, ModelConfig, Optimizer, Phase, Scaling, Shared, Terms


class Config(ModelConfig):
    """Options.

    Attributes:
        lr: learning rate of Adam for the linear layers; that of a tower is `--tower-rate` times as high.
    """

    lr: PositiveFloat = 1e-3


class Classifier(Model):
    """Linear classifiers on features (B, F); embeddings (B, 1, F) are the features. All losses are per sample."""

    scaling: Scaling = "none"
    wants_words = False
    coupled = False

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        widths = {"sketch": inputs.sketch_dim, "photo": inputs.photo_dim}
        self.heads = nn.ModuleDict({side: nn.Linear(width, len(inputs.classes)) for side, width in widths.items()})

    @property
    def dim(self) -> int:
        return self.inputs.photo_dim

    @property
    def groups(self) -> Mapping[str, Group]:
        return {"all": Group(self.heads, Optimizer("adam", self.config.lr))}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("all", "all", self.terms),)

    def terms(self, batch: Batch, _: Shared) -> Terms:
        """Cross entropy of each side's classifier."""
        return {
            side: functional.cross_entropy(self.heads[side](rows), batch.label)
            for side, rows in (("sketch", batch.sketch), ("photo", batch.photo))
        }

    def embed(self, modality: str, features: Tensor) -> Tensor:
        return features.unsqueeze(1)
