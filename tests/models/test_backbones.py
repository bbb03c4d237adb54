"""Backbones: published sizes, names and preprocessing; weights from local files, and nothing else."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from zsr.errors import ConfigError, DamagedArtifact
from zsr.models import backbones, pretrained, vgg
from zsr.models.protocol import tuned

VIT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SQUARE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
CLIP: dict[str, Any] = {"vision_config": {**VIT, **SQUARE, "projection_dim": 512}, "projection_dim": 12}
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def pixels(side: int = 32, count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=draw)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def network(name: str) -> Any:
    """A small random network of transformers, in eval mode, as its own library makes it."""
    torch.manual_seed(1)
    made: dict[str, Callable[[], Any]] = {
        "resnet": lambda: transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1])
        ),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT, **SQUARE)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VIT, image_size=56, patch_size=8)),
        "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=VIT, **CLIP)),
    }
    made["classifier"] = lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, **SQUARE))
    return made[name]().eval()


def saved(name: str, path: Path) -> Path:
    network(name).save_pretrained(path)
    return path


def loaded(name: str, path: Path, **options: Any) -> backbones.Backbone:
    return backbones.load(name, path, backbones.digest(path), **options)


# -- VGG -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "batch_norm", "count"), [(16, False, 138_357_544), (16, True, 138_365_992), (19, False, 143_667_240)]
)
def test_vgg_has_the_published_number_of_parameters(depth: vgg.Depth, batch_norm: bool, count: int) -> None:
    with torch.device("meta"):
        assert size(vgg.VGG(depth, batch_norm, "logits")) == count


def test_doodle2search_encoder_has_the_released_number_of_parameters() -> None:
    with torch.device("meta"):
        plain, attended = (vgg.VGG(16, True, "fc7", attention) for attention in (False, True))
        last = nn.Linear(plain.dim, 256)
    assert size(plain) + size(last) == 135_317_824
    assert size(attended) - size(plain) == 195_321
    assert 2 * (size(attended) + size(last)) == 271_026_290


def torchvision_names(first: str, convolutions: list[int], norms: list[int]) -> set[str]:
    linear = {f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")}
    conv = {f"{first}.{i}.{kind}" for i in convolutions for kind in ("weight", "bias")}
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return linear | conv | {f"{first}.{i}.{kind}" for i in norms for kind in kinds}


PLAIN = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
NORMED = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]


def test_vgg_names_its_parameters_as_torchvision_does() -> None:
    with torch.device("meta"):
        assert set(vgg.VGG(16, False, "logits").state_dict()) == torchvision_names("features", PLAIN, [])
        normed = [i + 1 for i in NORMED]
        assert set(vgg.VGG(16, True, "logits").state_dict()) == torchvision_names("features", NORMED, normed)


def vgg_by_hand(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Pooled convolutions of VGG-16 with batch norm, out of torchvision's names."""
    for layer in NORMED:
        images = functional.conv2d(
            images, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=1
        )
        mean, variance, weight, bias = (
            state[f"features.{layer + 1}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        images = functional.batch_norm(images, mean, variance, weight, bias).relu()
        if layer in (3, 10, 20, 30, 40):
            images = functional.max_pool2d(images, 2)
    return images.mean((2, 3))


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    """Random weights of VGG-16 with batch norm by torchvision's names, the classifier's cut short."""
    torch.manual_seed(0)
    state = vgg.VGG(16, True, "conv").state_dict()
    for key, value in state.items():
        if key.endswith("running_mean"):
            value.uniform_(-0.1, 0.1)
    return {**state, "classifier.0.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(2)}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_vgg_loads_torchvision_weights(suffix: str, torchvision_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"vgg16_bn.{suffix}"
    if suffix == "pth":
        torch.save(torchvision_state, path)
    else:
        save_file(torchvision_state, path)
    with torch.no_grad():
        found = loaded("vgg16-bn", path, layer="conv")(pixels())
        images = ((pixels() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(
            0, 3, 1, 2
        )
        assert_close(found, vgg_by_hand(torchvision_state, images))
    assert found.shape == (3, 512)


def test_fc7_is_4096_wide_and_after_the_relu() -> None:
    with torch.device("meta"):
        network = vgg.VGG(16, False, "fc7")
    network = network.to_empty(device="cpu").eval()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    bias = torch.arange(-2048.0, 2048.0)
    with torch.no_grad():
        network.get_parameter("classifier.3.bias").copy_(bias)
        assert torch.equal(network(torch.zeros(2, 3, 32, 32)), bias.relu().expand(2, -1))


def test_attention_without_weights_is_uniform() -> None:
    attention = vgg.Attention()
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    maps = torch.ones(2, 512, 7, 7)
    assert_close(attention(maps), maps * 50 / 49)


def test_a_file_may_lack_attention_and_nothing_else(torchvision_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "vgg16_bn.safetensors"
    save_file(torchvision_state, path)
    attended = backbones.build(backbones.architecture("vgg16-bn", layer="conv", attention=True))
    before = attended.get_parameter("network.attention.score.weight").clone()
    backbones.load_weights(attended, path)
    assert torch.equal(attended.get_parameter("network.attention.score.weight"), before)
    save_file({key: value for key, value in torchvision_state.items() if key != "features.0.bias"}, path)
    with pytest.raises(DamagedArtifact, match=r"lacks features\.0\.bias"):
        backbones.load_weights(attended, path)


# -- towers of transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "count", "classes"),
    [
        ("resnet", transformers.ResNetConfig(), 25_557_032, 1000),  # ResNet-50
        ("vit", transformers.ViTConfig(), 86_567_656, 1000),  # ViT-B/16
        ("clip", transformers.CLIPVisionConfig(), 87_849_216, 0),  # the image tower of ViT-B/32
    ],
)
def test_towers_have_the_published_number_of_parameters(name: str, config: Any, count: int, classes: int) -> None:
    with torch.device("meta"):
        tower = pretrained.Pretrained(name, next(iter(pretrained.KINDS[name].outputs)), config.to_dict())
    assert size(tower) + classes * (tower.dim + 1) == count


@pytest.mark.parametrize(
    ("name", "layer", "mean_and_std", "feature"),
    [
        ("resnet", "pooled", IMAGENET, lambda net, images: net(images).pooler_output[:, :, 0, 0]),
        ("vit", "cls", ((127.5,) * 3, (127.5,) * 3), lambda net, images: net(images).last_hidden_state[:, 0]),
        ("vit", "pooled", ((127.5,) * 3, (127.5,) * 3), lambda net, images: net(images).pooler_output),
        ("dinov2", "cls", IMAGENET, lambda net, images: net(images).pooler_output),
        (
            "clip",
            "projected",
            ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
            lambda net, images: net.visual_projection(net.vision_model(images).pooler_output),
        ),
    ],
)
def test_features_are_the_bits_of_transformers(
    name: str, layer: str, mean_and_std: Any, feature: Callable[[Any, Tensor], Tensor], tmp_path: Path
) -> None:
    backbone = loaded(name, saved(name, tmp_path), layer=layer)
    mean, std = (torch.tensor(values) for values in mean_and_std)
    images = ((pixels().float() - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = feature(network(name), images)
        assert torch.equal(backbone(pixels()), expected)
    assert backbone.dim == expected.shape[1]
    assert not backbone.training


@pytest.mark.parametrize("name", ["resnet", "vit", "dinov2", "clip"])
def test_an_architecture_rebuilds_the_network_without_the_weights(name: str, tmp_path: Path) -> None:
    path = saved(name, tmp_path / "weights")
    first = loaded(name, path)
    described = json.dumps(backbones.architecture(name, path))
    (path / "model.safetensors").unlink()
    again = backbones.build(json.loads(described)).eval()
    again.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(again(pixels()), first(pixels()))


def test_a_directory_is_read_without_any_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved("clip", tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert loaded("clip", path).dim == 12


def test_a_classifier_serves_cls_and_has_no_pooled(tmp_path: Path) -> None:
    path = saved("classifier", tmp_path)
    with torch.no_grad():
        images = ((pixels().float() - 127.5) / 127.5).permute(0, 3, 1, 2)
        expected = network("classifier").vit(images).last_hidden_state[:, 0]
        assert torch.equal(loaded("vit", path)(pixels()), expected)
    with pytest.raises(DamagedArtifact, match=r"lacks 2 weights of backbone vit with layer pooled"):
        loaded("vit", path, layer="pooled")


def test_weights_in_16_bits_are_computed_in_32(tmp_path: Path) -> None:
    network("vit").half().save_pretrained(tmp_path)
    found = loaded("vit", tmp_path)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert found(pixels()).dtype == torch.float32


def test_shards_are_read_and_count(tmp_path: Path) -> None:
    network("vit").save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = backbones.digest(tmp_path)
    with torch.no_grad():
        expected = network("vit")(((pixels().float() - 127.5) / 127.5).permute(0, 3, 1, 2)).last_hidden_state[:, 0]
        assert torch.equal(loaded("vit", tmp_path)(pixels()), expected)
    shards[0].write_bytes(shards[1].read_bytes())
    assert backbones.digest(tmp_path) != whole


def test_a_directory_may_bring_its_own_preprocessing(tmp_path: Path) -> None:
    path = saved("vit", tmp_path)
    before = backbones.digest(path)
    own = {"image_mean": [0.0, 0.1, 0.2], "image_std": [1.0, 0.5, 0.25], "rescale_factor": 1 / 255, "resample": 3}
    (path / "preprocessor_config.json").write_text(json.dumps(own))
    found = backbones.architecture("vit", path)
    assert found["shift"] == pytest.approx([0.0, 25.5, 51.0])
    assert found["divisor"] == pytest.approx([255.0, 127.5, 63.75])
    assert found["interpolation"] == "bicubic"
    assert backbones.digest(path) != before
    edit(path / "preprocessor_config.json", image_std=[0.0, 1.0, 1.0])
    with pytest.raises(ConfigError, match=r"divisor\.0: Input should be greater than 0"):
        backbones.architecture("vit", path)
    edit(path / "preprocessor_config.json", do_normalize=False)
    with pytest.raises(ConfigError, match="do_normalize is false"):
        backbones.architecture("vit", path)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unfit_directories_are_refused(tmp_path: Path) -> None:
    path = saved("vit", tmp_path / "vit")
    with pytest.raises(ConfigError, match="model_type 'vit', expected dinov2"):
        backbones.architecture("dinov2", path)
    with pytest.raises(ConfigError, match="requires a directory"):
        backbones.weights_path("vit", path / "model.safetensors")
    edit(path / "config.json", quantization_config={"bits": 8})
    with pytest.raises(ConfigError, match="quantized"):
        backbones.architecture("vit", path)
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        backbones.architecture("vit", path)


def test_weights_of_other_sizes_than_the_configuration_are_refused(tmp_path: Path) -> None:
    path = saved("vit", tmp_path)
    edit(path / "config.json", hidden_size=32)
    with pytest.raises(DamagedArtifact, match="does not fit backbone vit"):
        loaded("vit", path)


def test_pickled_weights_and_adapters_are_refused(tmp_path: Path) -> None:
    path = saved("vit", tmp_path)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="found an adapter"):
        backbones.digest(path)
    (path / "adapter_config.json").unlink()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors are read"):
        backbones.digest(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ConfigError, match="expected a file in the same directory"):
        backbones.digest(path)


def test_a_configuration_chooses_neither_code_nor_kernels(tmp_path: Path) -> None:
    path = saved("vit", tmp_path)
    edit(path / "config.json", auto_map={"AutoModel": "evil.Model"}, attn_implementation="someone/kernel")
    config = backbones.architecture("vit", path)["config"]
    assert not {"auto_map", "attn_implementation", "_attn_implementation", "id2label"} & set(config)
    assert loaded("vit", path).dim == 16


# -- all -------------------------------------------------------------------------------------------------------------


def made(name: str, tmp_path: Path) -> backbones.Backbone:
    path = saved(name, tmp_path) if name in ("resnet", "vit", "dinov2", "clip") else None
    layer = "conv" if name.startswith("vgg") else None
    return backbones.build(backbones.architecture(name, path, layer=layer))


@pytest.mark.parametrize("name", sorted(backbones.BACKBONES))
def test_gradients_reach_every_parameter_and_pictures_may_be_float(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = made(name, tmp_path)
    assert backbone.training
    backbone(pixels()).square().mean().backward()
    assert [key for key, value in backbone.named_parameters() if value.grad is None] == []
    backbone.eval()
    with torch.no_grad():
        assert torch.equal(backbone(pixels()), backbone(pixels().float()))
        assert backbone(pixels(count=2)).shape == (2, backbone.dim)


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip"])
def test_prompts_join_the_tokens_and_train_with_the_norms(name: str, tmp_path: Path) -> None:
    path = saved(name, tmp_path)
    torch.manual_seed(0)
    plain, prompted = (backbones.build(backbones.architecture(name, path, prompts=count)).eval() for count in (0, 2))
    for backbone in (plain, prompted):
        backbones.load_weights(backbone, path)
    assert size(prompted) == size(plain) + 2 * prompted.get_parameter("network.prompts").shape[1]
    assert not torch.allclose(plain(pixels()), prompted(pixels()), atol=1e-4)
    names = {id(p): n for n, p in prompted.named_parameters()}
    trained = {names[id(p)] for p in tuned(prompted, "norms")}
    assert "network.prompts" in trained
    assert {"norm" in n for n in trained - {"network.prompts"}} == {True}
    torch.autograd.backward(prompted(pixels())[:, 0].sum())
    assert bool(cast(Tensor, prompted.get_parameter("network.prompts").grad).any())


def test_prompts_want_tokens(tmp_path: Path) -> None:
    for name in ("lite0", "resnet"):
        path = saved(name, tmp_path) if name == "resnet" else None
        with pytest.raises(ConfigError, match=f"backbone {name} has no tokens"):
            backbones.build(backbones.architecture(name, path, prompts=1))


def test_a_backbone_in_16_bits_normalises_in_32() -> None:
    torch.manual_seed(0)
    backbone = backbones.build(backbones.architecture("tiny")).eval()
    wide = backbone(pixels())
    narrow = backbone.bfloat16()(pixels())
    assert narrow.dtype == torch.bfloat16
    assert_close(narrow.float(), wide, atol=0.03, rtol=0.03)


def test_unit_scaling_is_division_by_255() -> None:
    found = backbones.architecture("tiny", scaling="unit")
    assert (found["shift"], found["divisor"]) == ([0.0] * 3, [255.0] * 3)


# -- batch norm folded into convolutions -----------------------------------------------------------------------------


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def with_statistics(backbone: backbones.Backbone) -> backbones.Backbone:
    """As after training: means, variances and weights that differ from a fresh norm's."""
    draw = torch.Generator().manual_seed(1)
    for norm in norms(backbone):
        for tensor in (norm.running_mean, norm.bias.data):
            cast(Tensor, tensor).copy_(0.3 * torch.randn(tensor.shape, generator=draw))  # type: ignore[union-attr]
        for tensor in (norm.running_var, norm.weight.data):
            cast(Tensor, tensor).copy_(0.5 + torch.rand(tensor.shape, generator=draw))  # type: ignore[union-attr]
    return backbone.eval()


@pytest.mark.parametrize("name", ["lite0", "tiny", "resnet"])
def test_folded_norms_change_features_by_rounding_only(name: str, tmp_path: Path) -> None:
    if name == "lite0":
        backbone = loaded(name, backbones.weights_path(name, None))
    else:
        path = saved(name, tmp_path) if name == "resnet" else None
        backbone = with_statistics(backbones.build(backbones.architecture(name, path)))
    before = norms(backbone)
    with torch.no_grad():
        plain, quick = backbone(pixels(64)), backbones.folded(backbone)(pixels(64))
    assert before
    assert norms(backbone) == before  # a copy was folded
    assert not norms(backbones.folded(backbone))
    assert_close(quick, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


class Twice(nn.Module):
    """A convolution that is read as it is, too, and one whose output is changed before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        found = self.first(images)
        changed = self.second(images)
        return cast(Tensor, (found + self.one(found) + self.two(changed.relu_())).mean((2, 3)))


def test_what_cannot_be_folded_stays() -> None:
    made = backbones.Architecture.model_validate(backbones.architecture("tiny"))
    backbone = with_statistics(backbones.Backbone(Twice(), 3, made))
    with torch.no_grad():
        assert torch.equal(backbones.folded(backbone)(pixels()), backbone(pixels()))


def test_the_size_is_the_users_where_the_network_takes_any(tmp_path: Path) -> None:
    assert backbones.side(backbones.architecture("vgg16"), None) == 224
    assert backbones.side(backbones.architecture("vgg16"), 96) == 96
    fixed = backbones.architecture("vit", saved("vit", tmp_path))
    assert backbones.side(fixed, None) == 32
    with pytest.raises(ConfigError, match="takes 32 pixels only, not 224"):
        backbones.side(fixed, 224)


def test_other_bytes_than_promised_are_refused(tmp_path: Path) -> None:
    path = backbones.weights_path("lite0", None)
    good, damaged = path.read_bytes(), tmp_path / "weights.pth"
    damaged.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DamagedArtifact, match="put the same file on every node"):
        backbones.load("lite0", damaged, backbones.digest(path))


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(DamagedArtifact, match=r"does not fit backbone lite0: it lacks network\._conv_stem"):
        loaded("lite0", path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["EVIL"],))


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DamagedArtifact, match="does not fit backbone lite0"):
        loaded("lite0", tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_what_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no backbone 'vgg'; there are"):
        backbones.weights_path("vgg", None)
    with pytest.raises(ConfigError, match="backbone tiny comes without weights; set --weights to a local file"):
        backbones.weights_path("tiny", None)
    with pytest.raises(ConfigError, match="no such file"):
        backbones.weights_path("vgg16", tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="has no layer 'fc8'; its layers are"):
        backbones.architecture("vgg16", layer="fc8")
    with pytest.raises(ConfigError, match="backbone lite0 has no attention"):
        backbones.architecture("lite0", attention=True)
    with pytest.raises(ConfigError, match=r"not an architecture of a backbone: .*made with"):
        backbones.build({**backbones.architecture("tiny"), "made with": "care"})
