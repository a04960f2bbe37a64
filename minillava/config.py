"""The model's configuration: the names that a checkpoint's `config.json` uses. `weights.py` reads the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillava.anyres import Tiling, fit


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; the names of `CLIPVisionConfig`, and its defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: str = "clip_vision_model"  # or "siglip_vision_model"

    @property
    def num_patches(self) -> int:
        """Patches per image. A border narrower than a patch is cut off, as the strided convolution does."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def has_cls(self) -> bool:
        """Whether a class token, CLS, stands before the patches: P + 1 positions per image, with SigLIP P."""
        return self.model_type == "clip_vision_model"


@dataclass(frozen=True)
class TextConfig:
    """The decoder; the names of `LlamaConfig`, and its defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # None, or {"rope_type": "linear" | "llama3", "factor": ...}
    model_type: str = "llama"  # or "qwen2": Llama with biases on query, key and value

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Dimensions per head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LlavaConfig:
    """The whole model: its two parts, and what joins them."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    image_token_id: int = 32000  # checkpoints have a larger vocabulary than the default, such as 32064
    vision_feature_layer: int = -2  # 0 is the input of the first layer, -1 the output of the last
    vision_feature_select_strategy: str = "default"  # "full" keeps all; "default" drops the first: CLS, or a patch
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    mm_projector_type: str = "mlp2x_gelu"  # or "linear": one layer, as in the first LLaVA
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()  # LLaVA-NeXT: sizes of grids of tiles, (height, width)
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int = 0

    @property
    def num_image_tokens(self) -> int:
        """Decoder positions that one image takes; in LLaVA-NeXT one tile, before padding is cut off."""
        positions = self.vision.num_patches + self.vision.has_cls  # CLS counts as one
        return positions - (self.vision_feature_select_strategy == "default")

    def tiling(self, size: Sequence[int]) -> Tiling:
        """LLaVA-NeXT: how a picture of (height, width) is cut into tiles."""
        side = self.vision.image_size // self.vision.patch_size
        return fit((size[0], size[1]), self.image_grid_pinpoints, self.vision.image_size, side)
