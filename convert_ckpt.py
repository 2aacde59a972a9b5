"""Convert, reshard and merge checkpoints."""

from mindspeed_lora.entry import convert

if __name__ == "__main__":
    convert()
