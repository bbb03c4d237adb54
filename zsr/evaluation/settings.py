"""What a caller can choose about an evaluation; imports nothing heavy."""

from typing import Literal

Protocol = Literal["zero-shot", "generalised", "generalised-sempcyc", "few-shot"]
BackboneSaw = Literal["auto", "imagenet-1k", "unknown"]  # the classes that a backbone was trained on
LearnedOn = Literal["seen", "queries"]  # what binary codes are learned on
