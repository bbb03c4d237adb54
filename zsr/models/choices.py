"""Types of options of models and backbones, for flags and settings. Imports nothing heavy."""

from typing import Literal

Query = Literal["sketch", "text"]  # modality of the queries
PixelScaling = Literal["published", "unit"]  # as published with the backbone, or only pixels / 255
Fit = Literal["stretch", "published"]  # the whole image, or the center crop as published with the backbone
