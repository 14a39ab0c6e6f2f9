//! The program `cllm-data`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cllm_data::cli::Arguments::parse();
    cllm_core::program::main(|| cllm_data::cli::run(arguments))
}
