"""Names of U-Net layers in the sgm layout, literally as in published files, and which adapters are of SDXL."""

import pytest

from lorakit.families import sdxl, sgm

KNOWN = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
    "mid_block.resnets.0.time_emb_proj": "middle_block.0.emb_layers.1",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj": "middle_block.1.transformer_blocks.1.ff.net.0.proj",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    "conv_out": "out.2",
}


@pytest.mark.parametrize(("ours", "theirs"), KNOWN.items())
def test_layers_have_the_names_of_published_files(ours: str, theirs: str) -> None:
    assert sgm.published_name(ours, sgm.blocks(sdxl.tiny().unet.config)) == theirs


def test_what_is_in_no_block_keeps_its_name() -> None:
    assert sgm.published_name("down_blocks", sgm.blocks(sdxl.tiny().unet.config)) == "down_blocks"


@pytest.mark.parametrize(
    ("key", "xl"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", True),
        ("lora_unet_input_blocks_4_1_proj_in.alpha", True),
        ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_3_attn1_to_q.lora_down.weight", True),
        ("unet.down_blocks.2.attentions.0.transformer_blocks.3.attn1.to_q.lora_A.weight", True),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", True),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", False),
        ("unet.up_blocks.1.attentions.1.proj_in.lora_A.weight", False),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", False),
        ("lora_unet_transformer_blocks_3_attn_to_q.lora_down.weight", False),
    ],
)
def test_one_telling_key_makes_an_adapter_one_of_sdxl(key: str, xl: bool) -> None:
    assert sgm.is_xl(["lora_unet_mid_block_attentions_0_proj_in.alpha", key]) == xl
