"""Parameter names of our U-Nets and of diffusers', as tables of rules."""

import re
from collections.abc import Iterable


def rename(names: Iterable[str], rules: list[tuple[str, str]]) -> dict[str, str]:
    """Each name, and what it becomes when the rules are applied one after the other."""
    table = {}
    for name in names:
        new = name
        for pattern, becomes in rules:
            new = re.sub(pattern, becomes, new)
        table[name] = new
    return table


def ddpm_rules(levels: int) -> list[tuple[str, str]]:
    """`Model` → diffusers' `UNet2DModel`, which counts the way up from the bottom."""
    return [
        (r"^temb\.dense\.0", "time_embedding.linear_1"),
        (r"^temb\.dense\.1", "time_embedding.linear_2"),
        (r"^norm_out", "conv_norm_out"),
        (r"^mid\.block_1", "mid_block.resnets.0"),
        (r"^mid\.block_2", "mid_block.resnets.1"),
        (r"^mid\.attn_1", "mid_block.attentions.0"),
        (r"^down\.", "down_blocks."),
        *[(rf"^up\.{i}\.", f"up_blocks.{levels - 1 - i}.") for i in range(levels)],
        (r"\.block\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.(down|up)sample\.", r".\1samplers.0."),
        (r"\.temb_proj", ".time_emb_proj"),
        (r"\.nin_shortcut", ".conv_shortcut"),
        (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out", r"\1.to_out.0"),
    ]


def openai_rules(levels: int, blocks: int) -> list[tuple[str, str]]:
    """`UNetModel` → diffusers' `UNet2DConditionModel`, with `blocks` residual blocks per level on the way down."""
    stride = blocks + 1
    rules = [
        (r"^time_embed\.0", "time_embedding.linear_1"),
        (r"^time_embed\.2", "time_embedding.linear_2"),
        (r"^label_emb", "class_embedding"),
        (r"^input_blocks\.0\.0", "conv_in"),
        (r"^middle_block\.0", "mid_block.resnets.0"),
        (r"^middle_block\.1", "mid_block.attentions.0"),
        (r"^middle_block\.2", "mid_block.resnets.1"),
        (r"^out\.0", "conv_norm_out"),
        (r"^out\.2", "conv_out"),
        (r"^output_blocks\.(\d+)\.\d\.conv", r"output_blocks.\1.upsample"),  # third where there is attention, else second
    ]
    for i in range(levels):
        rules.append((rf"^input_blocks\.{(i + 1) * stride}\.0\.op", f"down_blocks.{i}.downsamplers.0.conv"))
        rules.append((rf"^output_blocks\.{(i + 1) * stride - 1}\.upsample", f"up_blocks.{i}.upsamplers.0.conv"))
        for j in range(stride):
            for part, name in enumerate(("resnets", "attentions")):
                rules.append((rf"^output_blocks\.{i * stride + j}\.{part}\.", f"up_blocks.{i}.{name}.{j}."))
                if j < blocks:
                    rules.append((rf"^input_blocks\.{i * stride + j + 1}\.{part}\.", f"down_blocks.{i}.{name}.{j}."))
    return rules + [
        (r"\.in_layers\.0", ".norm1"),
        (r"\.in_layers\.2", ".conv1"),
        (r"\.emb_layers\.1", ".time_emb_proj"),
        (r"\.out_layers\.0", ".norm2"),
        (r"\.out_layers\.3", ".conv2"),
        (r"\.skip_connection", ".conv_shortcut"),
    ]
