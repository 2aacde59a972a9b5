from pathlib import Path

import pytest
import smollm2
import torch
from fetch_assets import default_cache, fetch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mindspeed_lora.errors import Failed


@pytest.fixture(scope="module")
def assets() -> dict[str, Path]:
    return fetch(default_cache())


@pytest.fixture
def small_model(tmp_path: Path, assets: dict[str, Path]) -> Path:
    """A random model with SmolLM2's head counts, tokenizer and tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(assets["MODEL"]).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_padded_heads_compute_the_same_function(small_model: Path, tmp_path: Path) -> None:
    smollm2.write_padded_model(small_model, tmp_path / "padded")
    original = LlamaForCausalLM.from_pretrained(small_model)
    padded = LlamaForCausalLM.from_pretrained(tmp_path / "padded")
    assert (padded.config.num_attention_heads, padded.config.num_key_value_heads) == (12, 4)
    assert padded.config.head_dim == 8
    tokens = torch.randint(0, 49152, (2, 50))
    with torch.inference_mode():
        torch.testing.assert_close(padded(tokens).logits, original(tokens).logits, rtol=1e-5, atol=1e-4)


def test_heads_in_another_order_are_noticed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = smollm2._pad_heads

    def new_group_first(
        original: dict[str, torch.Tensor], padded: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        result = right(original, padded)
        key = "model.layers.0.self_attn.k_proj.weight"
        return {**result, key: result[key].roll(8, dims=0)}

    monkeypatch.setattr(smollm2, "_pad_heads", new_group_first)
    with pytest.raises(Failed, match="padded: its logits differ from those of small"):
        smollm2.write_padded_model(small_model, tmp_path / "padded")
    assert not (tmp_path / "padded").exists()


def test_real_model_is_a_normal_folder(assets: dict[str, Path]) -> None:
    for name, heads in {"MODEL": (9, 3), "PADDED_MODEL": (12, 4)}.items():
        model = LlamaForCausalLM.from_pretrained(assets[name])
        config = model.config
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (*heads, 64)
        assert model.dtype == torch.float32
        assert config.rms_norm_eps == 1e-5
        assert getattr(config, "quantization_config", None) is None
        assert model.generation_config.eos_token_id == 2


def test_real_model_answers(assets: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets["PADDED_MODEL"])
    model = LlamaForCausalLM.from_pretrained(assets["PADDED_MODEL"])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    answer = model.generate(tokens, max_new_tokens=12, do_sample=False)[0, tokens.size(1) :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("in 1999", ["in", "Ġ", "1", "9", "9", "9"]),
        # Only a digit-splitting tokenizer keeps both spaces together here.
        ("a  5", ["a", "ĠĠ", "5"]),
        ("<|im_start|>user\nHi", ["<|im_start|>", "user", "Ċ", "Hi"]),
    ],
)
def test_tokenizer_splits_as_the_model_was_trained(
    assets: dict[str, Path], text: str, pieces: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets["MODEL"])
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == pieces
    assert tokenizer.decode(tokenizer(text).input_ids) == text
