"""What may be chosen of a model in a word? Without torch, so that whoever reads a job need not wait for it."""

from typing import Literal, get_args

Grouping = Literal["three", "stages", "blocks"]
"""How a model's layers are grouped; the head is a group of its own each time.

three: fastai's, the body in two halves. stages: by the size of the feature maps. blocks: as fine as it goes.
"""

GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
