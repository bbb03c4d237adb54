"""Match unseen classes with the backbone's training classes (ImageNet-1k) by name.

Most backbones were trained on ImageNet-1k; if an unseen class is one of its classes, a score on it is not zero-shot for
the features. A class counts as known to ImageNet if WordNet 3.0 has a noun of its name that is one of the thousand
classes or a hypernym of one: `tiger`, or `door` because of "sliding door". `BY_HAND` overrides this where WordNet
misses an obvious match, where a name has another sense there, and for the coarse classes of the emoji.

Only names are compared. A class whose name is not an English noun counts as unknown to ImageNet; the report lists every
match, so that readers can check them.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Final

from zsr.data.rows import canonical_label

# class -> nouns to look up instead of its own name; empty if ImageNet has no such class
BY_HAND: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        # missed by WordNet
        "chicken": ("cock", "hen"),
        "cow": ("ox",),
        "hot_air_balloon": ("balloon",),
        "songbird": ("oscine",),
        "tablelamp": ("table_lamp",),
        "teacup": ("cup",),
        # another sense
        "mouse": (),
        "hedgehog": (),  # in WordNet a name of the porcupine
        "tank": ("army_tank",),
        # coarse classes of the emoji, by the content of their images
        "animal_amphibian": ("amphibian",),
        "animal_bird": ("bird",),
        "animal_bug": ("insect", "arachnid", "snail"),
        "animal_mammal": ("mammal",),
        "animal_marine": ("fish", "whale", "crab"),
        "animal_reptile": ("reptile",),
        "book_paper": ("book_jacket", "comic_book"),
        "drink": ("beer_glass", "cup", "teapot"),
        "event": ("jack_o_lantern", "balloon"),
        "food_fruit": ("edible_fruit",),
        "food_prepared": ("pizza", "hamburger", "hotdog", "burrito", "bread"),
        "food_sweet": ("ice_cream", "chocolate_sauce"),
        "food_vegetable": ("vegetable",),
        "game": ("slot", "joystick", "jigsaw_puzzle"),
        "household": ("toilet_seat", "bathtub", "bed", "sofa", "door", "broom", "bucket"),
        "light_&_video": ("camera", "television", "candle", "projector"),
        "mail": ("envelope", "mailbox"),
        "office": ("binder", "ballpoint"),
        "person": ("person",),
        "person_role": ("bridegroom",),
        "person_sport": ("athlete",),
        "place_building": ("building",),
        "place_other": ("bridge", "fountain", "carousel"),
        "plant_flower": ("flower",),
        "plant_other": ("mushroom",),
        "sky_&_weather": ("umbrella",),
        "sport": ("racket", "ball", "ski"),
        "time": ("timepiece",),
        "tool": ("hand_tool", "bow", "chain"),
        "transport_air": ("aircraft",),
        "transport_ground": ("motor_vehicle", "train", "bicycle", "locomotive", "traffic_light"),
    }
)


def known(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each class the sorted first names of the ImageNet-1k classes that equal it or are below it; may be empty."""
    return {
        label: _below(BY_HAND.get(label, (canonical_label(label.partition("(")[0].rstrip("_ ")),))) for label in labels
    }


def _below(nouns: Iterable[str]) -> tuple[str, ...]:
    by_name = _classes_by_name()
    return tuple(sorted({name for noun in nouns for name in by_name.get(noun, ())}))


@cache
def _classes_by_name() -> Mapping[str, frozenset[str]]:
    """Every synset name -> the ImageNet-1k classes that equal it or are below it."""
    content = json.loads(resources.files("zsr.evaluation").joinpath("imagenet1k.json").read_text())
    synsets = content["synsets"]
    found: dict[str, set[str]] = {}
    for leaf in range(content["classes"]):
        seen, todo = {leaf}, [leaf]
        while todo:
            names, above = synsets[todo.pop()]
            for name in names:
                found.setdefault(name, set()).add(synsets[leaf][0][0])
            todo += [number for number in above if number not in seen]
            seen.update(above)
    return {name: frozenset(classes) for name, classes in found.items()}
