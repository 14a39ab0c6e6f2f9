//! Command line of `cllm-eval`.

fn main() {}
