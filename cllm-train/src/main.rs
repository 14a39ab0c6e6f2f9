//! Command line of `cllm-train`.

fn main() {}
