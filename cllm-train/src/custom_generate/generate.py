"""Jacobi decoding with a rolling window for `transformers`, 4.54 or later: a forward confirms several tokens, and the
answer has the tokens of greedy decoding. Written for the checkpoints of the CLLM toolkit; works with any decoder that
`DynamicCache` serves. Use it through `model.generate(input_ids, custom_generate=FOLDER, trust_remote_code=True)`, where
FOLDER is the one that holds the folder of this file."""

import copy
import itertools
import struct

import torch
from transformers import DynamicCache, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

# Generation settings that would change the answer or what is returned, with the value that does neither.
REQUIRED_SETTINGS = {
    "do_sample": False, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": None,
    "dola_layers": None, "prompt_lookup_num_tokens": None, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "force_words_ids": None,
    "constraints": None, "sequence_bias": None, "token_healing": False, "guidance_scale": 1.0, "min_length": 0,
    "min_new_tokens": 0, "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "exponential_decay_length_penalty": None, "watermarking_config": None,
    "stop_strings": None, "max_time": None, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False,
}  # fmt: skip
# `transformers` 5.24 renamed the argument of forwards and the field of outputs.
CACHE = "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"
OWN_GENERATE = "for the generate of transformers itself, call type(model).generate(model, ...)"


@torch.no_grad()
def generate(
    inputs=None, generation_config=None, *, model, input_ids=None, attention_mask=None, stopping_criteria=None,
    streamer=None, n=16, seed=0, sample_id="generate", **kwargs,
):  # fmt: skip
    """Continues one prompt greedily, as `GenerationMixin.generate` does, with `max_new_tokens`, `max_length`,
    `eos_token_id`, `stopping_criteria`, `streamer` and `return_dict_in_generate`, whose output has `num_forwards`, the
    number of forwards after the prompt was cached.

    `n` is the number of tokens of a forward: the last token and n - 1 draft tokens. Where the model has proposed none,
    one of the tokens so far is drawn. With its `seed`, and the id of the prompt as `sample_id`, there are as many
    forwards as with the strategy `rolling` of `cllm-eval run`."""
    input_ids = _prompt(inputs if inputs is not None else input_ids, attention_mask)
    config = _config(model, generation_config, kwargs)
    if not 2 <= n <= 1024:
        raise ValueError(f"n={n} is out of range: pass n from 2 to 1024")
    tokens = input_ids[0].tolist()
    limit = _limit(config, len(tokens), kwargs)
    eos = config.eos_token_id
    eos_ids = set() if eos is None else set(torch.as_tensor(eos).reshape(-1).tolist())
    criteria = StoppingCriteriaList(stopping_criteria or [])

    def is_finished():
        is_stopped = criteria and criteria(torch.tensor([tokens], device=input_ids.device), None).all()
        return tokens[-1] in eos_ids or len(tokens) == limit or bool(is_stopped)

    if streamer is not None:
        streamer.put(input_ids.cpu())
    # Without the model's config, the cache keeps every token of layers with a sliding window, too, so that draft tokens
    # can be removed from it. The attention mask has the window.
    cache = DynamicCache()
    if len(tokens) > 1:
        model(input_ids[:, :-1], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    num_forwards, has_ended = 0, False
    draft = _filled([], n - 1, tokens, _random_words(seed, sample_id, 0))
    while not has_ended:
        # No draft token beyond the last one that may be needed.
        window = [tokens[-1], *draft[: limit - len(tokens) - 1]]
        window_ids = torch.tensor([window], device=input_ids.device)
        predicted = model(window_ids, **{CACHE: cache}, use_cache=True).logits[0].argmax(-1).tolist()
        num_forwards += 1
        agreements = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(window[1:], predicted))
        num_accepted = sum(1 for _ in agreements)
        num_before = len(tokens)
        for token in predicted[: num_accepted + 1]:
            tokens.append(token)
            has_ended = is_finished()
            if has_ended:
                break
        if streamer is not None:
            streamer.put(torch.tensor(tokens[num_before:]))
        num_rejected = num_before - 1 + len(window) - (len(tokens) - 1)
        if num_rejected > 0:
            cache.crop(-num_rejected)
        words = _random_words(seed, sample_id, num_forwards)
        draft = _filled(predicted[num_accepted + 1 :], n - 1, tokens, words)
    if streamer is not None:
        streamer.end()
    sequences = torch.tensor([tokens], device=input_ids.device)
    if not config.return_dict_in_generate:
        return sequences
    output = GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: cache})
    output.num_forwards = num_forwards
    return output


def _prompt(input_ids, attention_mask):
    """The prompt's ids, of the shape [1, seq]."""
    if input_ids is None or input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        found = "none" if input_ids is None else list(input_ids.shape)
        raise ValueError(f"expected input_ids of one prompt, [1, seq], found {found}: call it for one prompt at a time")
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("the prompt has padding, which attention_mask hides: tokenize it without padding")
    return input_ids


def _config(model, generation_config, kwargs):
    """The settings of `model`, overridden by those of `generation_config` and then by `kwargs`."""
    config = copy.deepcopy(model.generation_config)
    if generation_config is not None:
        config.update(**generation_config.to_diff_dict())
    others = config.update(**kwargs)
    for name, required in REQUIRED_SETTINGS.items():
        value = getattr(config, name, None)
        if value is not None and value != required:
            raise ValueError(f"{name}={value} is not supported here: pass {name}={required}, or {OWN_GENERATE}")
    # `generate` does not always take out the two with which this function was found.
    for name, value in others.items():
        if value is not None and name not in ("custom_generate", "trust_remote_code", "synced_gpus", "tokenizer"):
            raise ValueError(f"the argument {name} is not supported here: leave it out, or {OWN_GENERATE}")
    return config


def _limit(config, num_prompt_tokens, kwargs):
    """Maximum number of tokens of the prompt and its answer. Without a setting, that is 20 new tokens, as in
    `transformers`, where a `max_length` of 20 is the default or was."""
    is_default = config.max_length in (None, 20) and kwargs.get("max_length") is None
    if config.max_new_tokens is not None or is_default:
        limit = num_prompt_tokens + (20 if config.max_new_tokens is None else config.max_new_tokens)
    else:
        limit = config.max_length
    if limit <= num_prompt_tokens:
        raise ValueError(f"the limit is {limit} tokens, and the prompt has {num_prompt_tokens}: raise max_new_tokens")
    return limit


def _filled(draft, length, tokens, words):
    """`draft` with random ones of `tokens` up to this length, drawn as rand 0.10 draws an index."""
    while len(draft) < length:
        index, low = divmod(next(words) * len(tokens), 2**32)
        if low > 2**32 - len(tokens):
            index += low + (next(words) * len(tokens) >> 32) >> 32
        draft.append(tokens[index])
    return draft


def _random_words(seed, name, index):
    """The numbers of 32 bits of ChaCha8, keyed with the BLAKE3 hash of the arguments."""
    data = struct.pack("<QQ", seed, index) + name.encode()
    if len(data) > 1024:
        raise ValueError(f"sample_id has {len(data) - 16} bytes: pass at most 1008")
    key = BLAKE3_IV
    for start in range(0, len(data), 64):
        block = data[start : start + 64]
        flags = (start == 0) + (start + 64 >= len(data)) * 10
        state = [*key, *BLAKE3_IV[:4], 0, 0, len(block), flags]
        _mix(state, 7, struct.unpack("<16I", block.ljust(64, b"\0")), (16, 20), (24, 25))
        key = [low ^ high for low, high in zip(state, state[8:])]
    for counter in itertools.count():
        start_state = [*struct.unpack("<4I", b"expand 32-byte k"), *key, counter, 0, 0, 0]
        state = list(start_state)
        _mix(state, 4, [0] * 16, (16, 12), (8, 7))
        yield from (word + start & 0xFFFFFFFF for word, start in zip(state, start_state))


BLAKE3_IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
BLAKE3_ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
DIAGONALS = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]


def _mix(state, num_rounds, message, *rotations):
    """Rounds of BLAKE3. Those of ChaCha are the same, two at a time, without a message and with other rotations."""
    for _ in range(num_rounds):
        words = iter(message)
        for (a, b, c, d), (first, second) in itertools.product(COLUMNS + DIAGONALS, rotations):
            state[a] = state[a] + state[b] + next(words) & 0xFFFFFFFF
            state[d] = _rotated(state[d] ^ state[a], first)
            state[c] = state[c] + state[d] & 0xFFFFFFFF
            state[b] = _rotated(state[b] ^ state[c], second)
        message = [message[i] for i in BLAKE3_ORDER]


def _rotated(word, num_bits):
    return (word << num_bits | word >> 32 - num_bits) & 0xFFFFFFFF
