"""eval/choices.py against one plain forward pass for each choice."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from steerbook.eval import choices as module
from steerbook.eval.choices import choice_logprobs, encode

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", " ", ":", "?", ".", "ab", ":x"]
SIZES = dict(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    max_position_embeddings=128,
)


def make_tokenizer(*, bos: bool = True, eos: bool = False, side: str = "right") -> PreTrainedTokenizerFast:
    """One token a character, except that "ab" and ":x" are single tokens, so that texts merge across a boundary."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("ab|:x|.|\n"), "isolated")
    special = ["<bos>"] * bos, ["<eos>"] * eos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*special[0], "$A", *special[1]], special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side=side
    )


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif kind == "llama_eager":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
    elif kind == "gemma3":
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=types))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=3, n_head=4, n_positions=128))
    elif kind == "mamba":
        model = MambaForCausalLM(MambaConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, state_size=4))
    with torch.no_grad():  # the usual initial weights give nearly uniform predictions
        for parameter in model.parameters():
            if parameter.dim() > 1 and kind != "mamba":
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def one_by_one(model, tokenizer, prompts, choices) -> list[list[float]]:
    """The definition, with nothing shared: one forward pass a choice, no cache, no padding."""
    results = []
    with torch.no_grad():
        for prompt, options in zip(prompts, choices, strict=True):
            results.append([])
            head = tokenizer(prompt)["input_ids"]
            for option in options:
                full = tokenizer(prompt + option)["input_ids"]
                start = 0
                while start < min(len(head), len(full) - 1) and head[start] == full[start]:
                    start += 1
                logits = model(input_ids=torch.tensor([full]), use_cache=False).logits[0].float()
                logprobs = logits.log_softmax(-1)
                results[-1].append(sum(logprobs[i - 1, full[i]].item() for i in range(start, len(full))))
    return results


PRIMER = "q: what is it? a: the sky. "
PROMPTS = [PRIMER + end for end in ["q: x? a:", "q: why? a:", "q: y? a:", "q: a much longer one, no? a:", "q: z? a:"]]
CHOICES = [
    [" b", " the sea.", " c d"],
    [" no.", " yes it is."],
    [" q"],
    [" a", " a", " bcd", " efghi."],
    [" m", " nn"],
]


def check(model, tokenizer, prompts=PROMPTS, choices=CHOICES, tolerance=1e-5, **options) -> None:
    model.eval()
    expected = one_by_one(model, tokenizer, prompts, choices)
    found = choice_logprobs(model, tokenizer, prompts, choices, **options)
    assert [len(row) for row in found] == [len(row) for row in choices]
    for row, right in zip(found, expected, strict=True):
        assert row == pytest.approx(right, abs=tolerance, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "llama_eager", "mistral", "gemma3", "gpt2", "mamba"])
@pytest.mark.parametrize("max_rows", [64, 3, 1])
def test_equals_one_forward_pass_a_choice(kind, max_rows):
    check(build(kind), make_tokenizer(), max_rows=max_rows)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("prompts", [["c", "d"], ["abc: ", "ec: ab", "f"], [PRIMER, PRIMER], [PRIMER, PRIMER + "e"]])
def test_primer_of_any_length(kind, prompts):
    """From nothing but BOS to a primer that is one prompt as a whole."""
    check(build(kind), make_tokenizer(), prompts, [[" a", " bcd"], ["e", "fg hi", " m"], [" nop"]][: len(prompts)])


def test_without_bos_and_without_anything_in_common():
    tokenizer = make_tokenizer(bos=False)
    check(build("llama"), tokenizer, ["c", "dd", "e: f?"], [[" a", " bcd"], ["e"], [" nop", "c"]])
    with pytest.raises(ValueError, match="leaves no token in front"):
        choice_logprobs(build("llama"), tokenizer, ["c", ""], [[" a"], [" a"]])


def test_cache_is_used_where_it_can_be():
    """Guards the speed: the primer goes through the model once, a question's own tokens once."""
    for kind, used in [("llama", True), ("gemma3", True), ("gpt2", True), ("mamba", False)]:
        model = build(kind)
        seen: list[int] = []

        def count(_, args, kwargs, seen=seen):
            seen.append(kwargs["input_ids"].numel())

        model.register_forward_pre_hook(count, with_kwargs=True)
        choice_logprobs(model, make_tokenizer(), PROMPTS, CHOICES)
        tokens = sum(seen)
        whole = sum(len(p) + len(c) for p, options in zip(PROMPTS, CHOICES, strict=True) for c in options)
        assert (tokens < whole / 3) == used, (kind, tokens, whole)


def test_plain_scoring_gives_the_same_numbers(monkeypatch):
    for kind in ["llama", "gemma3"]:
        model, tokenizer = build(kind), make_tokenizer()
        cached = choice_logprobs(model, tokenizer, PROMPTS, CHOICES)
        with monkeypatch.context() as patch:
            patch.setattr(module, "expandable", lambda cache: False)
            plain = choice_logprobs(model, tokenizer, PROMPTS, CHOICES, max_rows=5)
        for a, b in zip(cached, plain, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_left_padding_and_appended_eos_change_nothing():
    model = build("llama")
    right = choice_logprobs(model, make_tokenizer(), PROMPTS, CHOICES)
    assert choice_logprobs(model, make_tokenizer(side="left"), PROMPTS, CHOICES) == right
    assert choice_logprobs(model, make_tokenizer(eos=True), PROMPTS, CHOICES) == right


def test_encode_keeps_what_is_in_front_and_drops_what_is_appended():
    assert encode(make_tokenizer(), ["cd", "e"]) == [[1, 6, 7], [1, 8]]
    assert encode(make_tokenizer(eos=True), ["cd", "e"]) == [[1, 6, 7], [1, 8]]
    assert encode(make_tokenizer(bos=False, eos=True), ["cd"]) == [[6, 7]]
    assert encode(make_tokenizer(bos=False), []) == []


def test_merged_boundary():
    """ "q:" + "x" is "q", ":x": the choice is then the one token ":x" after "q", other choices are unaffected."""
    model, tokenizer = build("llama").eval(), make_tokenizer()
    (merged, plain), (alone,) = choice_logprobs(model, tokenizer, ["q:", "q:"], [["x", " x"], [" x"]])
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([tokenizer("q")["input_ids"]])).logits[0, -1].log_softmax(-1)
    assert merged == pytest.approx(logprobs[WORDS.index(":x")].item(), abs=1e-5)
    assert plain == pytest.approx(alone, abs=1e-5)
    check(model, tokenizer, ["q:", "ca"], [["x", " x", "xy", "y"], ["b", "bb", " b"]])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_peft_model(kind):
    config = LoraConfig(target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(build(kind), config)
    assert isinstance(model, PeftModel)
    check(model, make_tokenizer())
    tuned = choice_logprobs(model, make_tokenizer(), PROMPTS, CHOICES)
    with model.disable_adapter():
        base = choice_logprobs(model, make_tokenizer(), PROMPTS, CHOICES)
    assert abs(tuned[0][0] - base[0][0]) > 1e-3


def test_prompt_tuning():
    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    tokenizer = make_tokenizer()
    found = choice_logprobs(model, tokenizer, PROMPTS, CHOICES, max_rows=3)
    with torch.no_grad():
        for prompt, options, row in zip(PROMPTS, CHOICES, found, strict=True):
            start = len(tokenizer(prompt)["input_ids"])
            for option, value in zip(options, row, strict=True):
                ids = tokenizer(prompt + option, return_tensors="pt")["input_ids"]
                logprobs = model(input_ids=ids).logits[0, 4:].log_softmax(-1)
                expected = sum(logprobs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
                assert value == pytest.approx(expected, abs=1e-5)


def test_model_and_generator_are_left_as_they_were():
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)).train()
    model.base_model.model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    state, use_cache = torch.get_rng_state(), model.config.use_cache
    first = choice_logprobs(model, make_tokenizer(), PROMPTS, CHOICES)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state) and model.config.use_cache == use_cache
    assert first == choice_logprobs(model, make_tokenizer(), PROMPTS, CHOICES)  # dropout was off
    model(input_ids=torch.tensor([[1, 5, 6]]), labels=torch.tensor([[1, 5, 6]])).loss.backward()


def test_longer_choice_is_less_likely_and_probabilities_sum_to_one():
    letters = [f" {c}" for c in WORDS[4:]]
    model, tokenizer = build("llama"), make_tokenizer()
    (single,) = choice_logprobs(model, tokenizer, ["q: x? a: "], [[w for w in WORDS[4:]]])
    (more,) = choice_logprobs(model, tokenizer, ["q: x? a: "], [[w + "." for w in WORDS[4:]]])
    assert len(letters) == len(single) and all(a > b for a, b in zip(single, more, strict=True))
    assert 0.5 < sum(map(math.exp, single)) <= 1.0 + 1e-6  # the special tokens have the rest


def test_bad_input():
    model, tokenizer = build("llama"), make_tokenizer()
    assert choice_logprobs(model, tokenizer, [], []) == []
    with pytest.raises(ValueError, match="2 prompts but 1 lists"):
        choice_logprobs(model, tokenizer, ["a", "b"], [["c"]])
    for bad in ([], [""], ["c", ""], "cd"):
        with pytest.raises(ValueError, match="prompt 1: choices must be a list of non-empty texts"):
            choice_logprobs(model, tokenizer, ["a", "b"], [["c"], bad])
    with pytest.raises(ValueError, match="prompt 0 with its longest choice is 203 tokens; the model takes 128"):
        choice_logprobs(model, tokenizer, ["c" * 200], [[" c"]])
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        choice_logprobs(model, tokenizer, ["a"], [["c"]], max_rows=0)
