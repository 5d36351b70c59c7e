"""The diffusion U-Net, block by block."""

__version__ = "0.1.0"

from .attention import (
    AttentionBlock,
    AttnBlock,
    CrossAttention,
    LinearAttention,
    LinearAttentionBlock,
    make_attention,
    register_attention,
)
from .ddpm_unet import Model
from .embeddings import TimestepEmbedding, get_timestep_embedding, timestep_embedding
from .resampling import (
    AsymmetricDownsample,
    ConvNd,
    ConvTransposeNd,
    Downsample,
    Upsample,
    avg_pool_nd,
    conv_nd,
    conv_transpose_nd,
    max_pool_nd,
    zero_module,
)
from .resblock import GroupNorm32, Normalize, ResBlock, ResnetBlock, normalization
from .transformer import GEGLU, BasicTransformerBlock, FeedForward, SpatialTransformer
from .unet import TimestepEmbedSequential, UNetModel
