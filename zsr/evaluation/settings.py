"""Option types of an evaluation; imports nothing heavy."""

from typing import Literal

Protocol = Literal["zero-shot", "generalised", "generalised-sempcyc", "few-shot"]
BackboneSaw = Literal["auto", "imagenet-1k", "unknown"]  # training classes of the backbone
LearnedOn = Literal["seen", "queries"]  # training set of the binary codes
