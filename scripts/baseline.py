"""What scripts/bench-transformers and scripts/bench-vllm share: the prompt, the number of
repetitions and the output file."""
import json
import statistics
import sys

PROMPT_TOKENS, NEW_TOKENS, WARM_UPS, REPEATS = 200, 128, 2, 5


def arguments():
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} MODEL OUTPUT.json")
    return sys.argv[1:]


def prompt_ids(vocab_size):
    """The first synthetic prompt of `cllm-eval bench`."""
    return [i * 7919 % vocab_size for i in range(PROMPT_TOKENS)]


def measure(name, settings, tokens_per_second):
    """Repeats a timing, after warm-ups, and returns all of them with their median."""
    each = [tokens_per_second() for _ in range(WARM_UPS + REPEATS)][WARM_UPS:]
    result = {"name": name, "tokens_per_second": statistics.median(each), "each": each, "settings": settings}
    print(f"{name}: {result['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
    return result


def write(output, environment, measured):
    """Writes the file that setting `baseline` of `cllm-eval bench` reads."""
    of = {result["name"]: result["tokens_per_second"] for result in measured}
    result = {
        "schema_version": 1,
        **environment,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "ar_tokens_per_second": measured[0]["tokens_per_second"],
        "compiled_ar_tokens_per_second": of.get("compiled"),
        "measured": measured,
    }
    with open(output, "w") as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    print(json.dumps(result))
