//! Command line of `cllm-data`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cllm_data::Arguments::parse();
    cllm_core::program::main(|| cllm_data::run(arguments))
}
