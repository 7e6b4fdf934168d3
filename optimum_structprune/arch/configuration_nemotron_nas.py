"""The config of NVIDIA's DeciLM: a Llama's, and a block for each layer, which says how that differs.

Written by optimum-structprune and independent of it, for engines that have the model; transformers has neither.
"""

import json
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class NemotronNASConfig(LlamaConfig):
    """A Llama's config with the fields of each block as attributes."""

    model_type = "nemotron-nas"

    def __post_init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        text = json.dumps(block_configs, default=vars)
        self.block_configs = json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))

    def to_dict(self) -> dict[str, Any]:
        """See `PreTrainedConfig`."""
        return {**super().to_dict(), "block_configs": json.loads(json.dumps(self.block_configs, default=vars))}
