"""Train a model on plain text."""

from mindspeed_lora.entry import pretrain

if __name__ == "__main__":
    pretrain()
