"""Judge a model, with or without an adapter, on benchmarks."""

from mindspeed_lora.entry import evaluation

if __name__ == "__main__":
    evaluation()
