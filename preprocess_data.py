"""Tokenise rows into an indexed dataset."""

from mindspeed_lora.entry import preprocess

if __name__ == "__main__":
    preprocess()
