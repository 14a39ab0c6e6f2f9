//! Command line of `cllm-train`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cllm_train::Arguments::parse();
    cllm_core::program::main(|| cllm_train::run(arguments))
}
