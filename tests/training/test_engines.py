"""What a DeepSpeed configuration may ask for, and which combinations are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from zsr.errors import ConfigError
from zsr.models import backbones
from zsr.models.cfsa import Cfsa
from zsr.models.doodle2search import Doodle2Search
from zsr.models.lcale import Lcale
from zsr.training.activation_checkpointing import recomputed
from zsr.training.engines import deepspeed_config, precision_of, refuse


def test_flags_win_over_the_file_and_say_the_same_as_it() -> None:
    plain = deepspeed_config()
    assert plain["zero_optimization"]["stage"] == 0
    assert precision_of(plain) == "fp32"
    assert deepspeed_config(0, "fp32") == plain
    asked = deepspeed_config(2, "bf16")
    assert (asked["zero_optimization"]["stage"], precision_of(asked)) == (2, "bf16")
    assert precision_of(deepspeed_config(None, "fp16")) == "fp16"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bf16: {enabled: true}", "use --precision bf16"),
        ("fp16: {enabled: true}", "use --precision fp16"),
        ("zero_optimization: {stage: 1, overlap_comm: true}", "overlap_comm loses"),
        ("zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}", "offload_optimizer is not supported"),
    ],
)
def test_what_checkpoints_do_not_cover_is_refused(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.yaml").write_text(content)
    monkeypatch.setenv("ZSR_DEEPSPEED", str(tmp_path / "d.yaml"))
    with pytest.raises(ConfigError, match=message):
        deepspeed_config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found NoneType, expected the DeepSpeed settings"),
        (b"- 1\n", "found list, expected"),
        (b"text", "found str, expected"),
        (
            b"zero_optimization: 2",
            "zero_optimization: found 2, expected a mapping such as zero_optimization: {stage: 2}",
        ),
        (b"zero_optimization: {stage: 7}", "zero_optimization.stage: found 7, expected one of"),
        (b"fp16: true", "fp16: found True, expected a mapping"),
        (b"torch_autocast:", "torch_autocast: found None, expected a mapping"),
        (b"note: \xe9t\xe9", "line 1 is not UTF-8"),
    ],
)
def test_a_deepspeed_file_of_another_shape_or_encoding_is_told(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "d.yaml"
    file.write_bytes(content)
    monkeypatch.setenv("ZSR_DEEPSPEED", str(file))
    with pytest.raises(ConfigError) as refused:
        deepspeed_config()
    assert f"{file}: " in str(refused.value)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "asked", "device", "accumulate", "message"),
    [
        (Cfsa, (3, "fp32"), "cuda", 1, "use --zero-stage 2"),
        (Lcale, (3, "fp32"), "cuda", 2, "use --zero-stage 2"),
        (Lcale, (0, "fp16"), "cpu", 1, "fp16 requires a GPU"),
        (Lcale, (0, "fp16"), "cuda", 2, "use --precision bf16"),
    ],
)
def test_combinations_that_do_not_go_together_name_the_way_out(
    model: Any, asked: Any, device: str, accumulate: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse(model, deepspeed_config(*asked), device, accumulate)


def test_others_are_taken() -> None:
    refuse(Cfsa, deepspeed_config(2, "bf16"), "cpu", 4)
    refuse(Doodle2Search, deepspeed_config(3, "fp16"), "cuda", 4)


def test_activation_checkpointing_gives_the_same_bits() -> None:
    pictures = torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8)
    gradients = []
    for forgets in (False, True):
        torch.manual_seed(0)
        tower = backbones.build(backbones.architecture("tiny")).eval()
        if forgets:
            recomputed(tower)
        torch.autograd.backward(tower(pictures).square().sum())
        gradients.append([p.grad for p in tower.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_a_tower_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no blocks to recompute"):
        recomputed(torch.nn.Linear(2, 2))
