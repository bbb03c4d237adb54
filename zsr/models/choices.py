"""What a caller can choose about models, for flags and settings; imports nothing heavy."""

from typing import Literal

Query = Literal["sketch", "text"]  # modality of the queries
PixelScaling = Literal["published", "unit"]  # as published with the backbone, or pixels / 255 and nothing else
Fit = Literal["stretch", "published"]  # the whole image, or the middle as the backbone's publishers cut it out
