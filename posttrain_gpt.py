"""Fine-tune a model on instruction rows."""

from mindspeed_lora.entry import posttrain

if __name__ == "__main__":
    posttrain()
