"""Generate text with a model and an adapter."""

from mindspeed_lora.entry import inference

if __name__ == "__main__":
    inference()
