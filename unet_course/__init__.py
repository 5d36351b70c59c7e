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
from .data import FolderDataset, digits, emoji, shapes
from .ddpm_unet import Model
from .diffusion import Schedule, cosine_betas, diffusion_loss, linear_betas, scaled_linear_betas, zero_terminal_snr
from .embeddings import TimestepEmbedding, get_timestep_embedding, timestep_embedding
from .evaluation import digit_classifier, frechet_distance, judge, kernel_distance, nearest, precision_recall
from .guidance import Guided, drop_labels
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
from .sampling import choose_steps, ddim, ddim_invert, ddpm, denoiser, dpm_solver, heun, img2img, inpaint, sample
from .training import EMA, Trainer, load_checkpoint, load_weights, pretrained, save_checkpoint, train_digits
from .transformer import GEGLU, BasicTransformerBlock, FeedForward, SpatialTransformer
from .unet import TimestepEmbedSequential, UNetModel
from .unet_nd import DoubleConv, UNetND
