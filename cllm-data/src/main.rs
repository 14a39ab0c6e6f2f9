//! Command line of `cllm-data`.

fn main() {}
