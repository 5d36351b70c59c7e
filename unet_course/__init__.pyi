"""What `import unet_course` offers: each name, and its module, is loaded when it is first used (see __init__.py)."""

from . import (
    attention as attention,
    clip as clip,
    data as data,
    ddpm_unet as ddpm_unet,
    diffusion as diffusion,
    embeddings as embeddings,
    evaluation as evaluation,
    guidance as guidance,
    latent_diffusion as latent_diffusion,
    museum as museum,
    resampling as resampling,
    resblock as resblock,
    sampling as sampling,
    scale as scale,
    speed as speed,
    stable_diffusion as stable_diffusion,
    training as training,
    transformer as transformer,
    unet as unet,
    unet_nd as unet_nd,
    vae as vae,
    workbench as workbench,
)
from .attention import (
    AttentionBlock as AttentionBlock,
    AttnBlock as AttnBlock,
    CrossAttention as CrossAttention,
    LinearAttention as LinearAttention,
    LinearAttentionBlock as LinearAttentionBlock,
    make_attention as make_attention,
    register_attention as register_attention,
)
from .clip import (
    CLIP as CLIP,
    CLIPTextModel as CLIPTextModel,
    ImageEncoder as ImageEncoder,
    Tokenizer as Tokenizer,
    contrastive_loss as contrastive_loss,
    pretrained_clip as pretrained_clip,
    retrieval as retrieval,
    small_tokenizer as small_tokenizer,
    train_bpe as train_bpe,
    train_clip as train_clip,
)
from .data import (
    FolderDataset as FolderDataset,
    digits as digits,
    emoji as emoji,
    shapes as shapes,
)
from .ddpm_unet import (
    Model as Model,
)
from .diffusion import (
    Schedule as Schedule,
    cosine_betas as cosine_betas,
    diffusion_loss as diffusion_loss,
    linear_betas as linear_betas,
    scaled_linear_betas as scaled_linear_betas,
    zero_terminal_snr as zero_terminal_snr,
)
from .embeddings import (
    TimestepEmbedding as TimestepEmbedding,
    get_timestep_embedding as get_timestep_embedding,
    timestep_embedding as timestep_embedding,
)
from .evaluation import (
    digit_classifier as digit_classifier,
    frechet_distance as frechet_distance,
    judge as judge,
    kernel_distance as kernel_distance,
    nearest as nearest,
    precision_recall as precision_recall,
)
from .guidance import (
    Guided as Guided,
    drop_labels as drop_labels,
)
from .latent_diffusion import (
    TextToImage as TextToImage,
    evaluate_shapes as evaluate_shapes,
    train_text_to_image as train_text_to_image,
)
from .museum import (
    examine as examine,
    inject as inject,
)
from .resampling import (
    AsymmetricDownsample as AsymmetricDownsample,
    ConvNd as ConvNd,
    ConvTransposeNd as ConvTransposeNd,
    Downsample as Downsample,
    Upsample as Upsample,
    avg_pool_nd as avg_pool_nd,
    conv_nd as conv_nd,
    conv_transpose_nd as conv_transpose_nd,
    max_pool_nd as max_pool_nd,
    zero_module as zero_module,
)
from .resblock import (
    GroupNorm32 as GroupNorm32,
    Normalize as Normalize,
    ResBlock as ResBlock,
    ResnetBlock as ResnetBlock,
    normalization as normalization,
)
from .sampling import (
    choose_steps as choose_steps,
    ddim as ddim,
    ddim_invert as ddim_invert,
    ddpm as ddpm,
    denoiser as denoiser,
    dpm_solver as dpm_solver,
    heun as heun,
    img2img as img2img,
    inpaint as inpaint,
    sample as sample,
)
from .scale import (
    Machine as Machine,
    Numbered as Numbered,
    Stream as Stream,
    estimate as estimate,
    launch as launch,
    shard as shard,
)
from .speed import (
    cached_text as cached_text,
    machine_peaks as machine_peaks,
    make_fast as make_fast,
    measure_work as measure_work,
    reuse_features as reuse_features,
    time_in_turns as time_in_turns,
    time_operations as time_operations,
)
from .stable_diffusion import (
    SD1 as SD1,
    SD2 as SD2,
    SD2_BASE as SD2_BASE,
    StableDiffusion as StableDiffusion,
    load_stable_diffusion as load_stable_diffusion,
    read_picture as read_picture,
    save_stable_diffusion as save_stable_diffusion,
    write_picture as write_picture,
)
from .training import (
    EMA as EMA,
    Trainer as Trainer,
    load_checkpoint as load_checkpoint,
    load_weights as load_weights,
    pretrained as pretrained,
    save_checkpoint as save_checkpoint,
    train_digits as train_digits,
)
from .transformer import (
    GEGLU as GEGLU,
    BasicTransformerBlock as BasicTransformerBlock,
    FeedForward as FeedForward,
    SpatialTransformer as SpatialTransformer,
)
from .unet import (
    TimestepEmbedSequential as TimestepEmbedSequential,
    UNetModel as UNetModel,
)
from .unet_nd import (
    DoubleConv as DoubleConv,
    UNetND as UNetND,
)
from .vae import (
    AutoencoderKL as AutoencoderKL,
    DiagonalGaussian as DiagonalGaussian,
    pretrained_vae as pretrained_vae,
    psnr as psnr,
    scale_factor as scale_factor,
    tiled_decode as tiled_decode,
    train_vae as train_vae,
)

__version__: str
